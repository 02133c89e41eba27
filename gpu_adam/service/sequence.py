"""Whole steps in memory that one process writes while others read.

A sequence counter (seqlock): it is odd while a step is at work, and even between steps. Who reads copies what is there
and looks at the counter before and after: where both times it has the same even value, the copy is whole. Nobody waits
for a reader.

    64 bytes: the sequence counter, then the number of steps done, both uint64

Source: H.-J. Boehm, "Can seqlocks get along with programming language memory models?", MSPC 2012.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

NBYTES = 64
_ONE = np.uint64(1)
_SPIN_SECONDS = 1e-4
_Result = TypeVar("_Result")


class _Fence:
    """Keeps loads and stores of this thread that come before it apart from those that come after it.

    A release, then an acquisition of the same lock: neither kind of access may cross that pair.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def __call__(self) -> None:
        self._lock.release()
        self._lock.acquire()


class StepSequence:
    """The counter.

    Args:
        memory: NBYTES bytes or more of host memory, as uint8; those that only read may have them read-only.
    """

    def __init__(self, memory: np.ndarray) -> None:
        self._words = memory[:NBYTES].view(np.uint64)
        self._fence = _Fence()

    @property
    def step(self) -> int:
        """The number of steps that are done."""
        return int(self._words[1])

    def begin(self) -> None:
        """Say that the memory is going to change."""
        self._words[0] += _ONE
        self._fence()

    def end(self, step: int) -> None:
        """Say that it has changed, and how many steps are done."""
        self._fence()
        self._words[1] = step
        self._words[0] += _ONE

    @property
    def version(self) -> int:
        """The sequence counter: another one after each change."""
        return int(self._words[0])

    def whole(self, copy: Callable[[], _Result], seconds: float) -> tuple[_Result, int, int] | None:
        """What `copy` returns of memory that did not change meanwhile, the steps done, and the version.

        None where time ran out.

        Args:
            copy: reads the memory; called until it has succeeded.
            seconds: how long to try; once at least.
        """
        end = time.monotonic() + seconds
        while True:
            before = self.version
            self._fence()
            if before % 2 == 0:
                result, step = copy(), self.step
                self._fence()
                if self.version == before:
                    return result, step, before
            elif time.monotonic() > end - seconds + _SPIN_SECONDS:
                time.sleep(_SPIN_SECONDS)
            if time.monotonic() > end:
                return None
