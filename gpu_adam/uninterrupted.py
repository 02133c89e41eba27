"""Sequences of calls that are made as a whole: nothing interrupts them between two calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

Call = partial[Any]
"""A call that is ready to be made. Its function is C code, so that making it runs no Python bytecode."""


def make_all(calls: Iterable[Call]) -> None:
    """Make the calls in order, without a moment in between at which Python could raise an exception of another origin.

    Python runs the handlers of signals (Ctrl-C raises KeyboardInterrupt in one) and raises what other threads throw in
    (`PyThreadState_SetAsyncExc`) between two bytecodes, and nowhere else. ``map`` makes the calls from C: there is no
    bytecode before the last one is done. (A finalizer that the garbage collector runs meanwhile is Python, but what is
    raised in a finalizer goes no further.) To hold signals off instead would take a change of every handler and back at
    each step, and would leave other threads' exceptions out.

    Raises:
        Whatever a call raises; the calls after it are not made.
    """
    _drain(map(partial.__call__, calls))


def all_of(function: Callable[..., object], *arguments: Iterable[Any]) -> Call:
    """One call, to be made once, of a C function with the first item of each of the arguments, then with the second."""
    return partial(_drain, map(function, *arguments))


_drain = deque[Any](maxlen=0).extend
