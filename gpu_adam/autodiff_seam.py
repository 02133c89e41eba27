"""The seam between a variable and a running differentiation: what a variable stands for when it is computed with.

While a loss is being differentiated a tracer is set, and a variable hands itself to the tracer; otherwise a variable is
its value.  The tracer is a context variable, so that each thread and each asynchronous task sees its own tracer and no
other's.

A thread without a tracer that computes with a variable, while a loss is being differentiated for that variable in
another thread, computes a part of that loss, as the workers of a pool do: the tracer of that loss records it.  A thread
that is no part of the loss takes `Variable.value`.
"""

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from importlib import import_module
from threading import get_ident
from typing import Any, Protocol, TypeVar
from weakref import ref

from gpu_adam.errors import ArgumentValueError

_Result = TypeVar("_Result")


class Tracer(Protocol):
    """What a running differentiation must answer."""

    def operand(self, variable: Any, array: Any) -> Any:
        """What to compute with in place of `variable`: a recorded value, or the plain array.

        Args:
            variable: the variable.
            array: its array; what is going to be read of it is up to date.
        """

    def watches(self, variable: Any) -> bool:
        """Whether `operand` records this variable."""

    def shown(self, array: Any) -> Any:
        """The array of a variable as a constant."""

    def refuse_overwrite(self, variable: Any) -> None:
        """Raise if the value of `variable` must not change now."""


current_tracer: ContextVar[Tracer | None] = ContextVar("gpu_adam_tracer", default=None)


def refuse_in_loss(method: str) -> None:
    """Raise ArgumentValueError where a loss asks for what changes variables or state."""
    if current_tracer.get() is not None:
        rule = "must not be called or set while a loss is being differentiated"
        raise ArgumentValueError(method, rule, "a call inside the loss", "move it behind the loss")


class _Running:
    """A loss that is being called; it lives as long as the call, which ends by an interrupt too."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer, self.thread = tracer, get_ident()


_running: set[ref[_Running]] = set()


def traced_by(tracer: Tracer, function: Callable[..., _Result], *args: Any) -> _Result:
    """Call a function while `tracer` is set.

    The tracer is set in a copy of the caller's context, which C code enters and leaves: an interrupt can come between
    any two lines of Python, and a line that takes the tracer away again might never run.  What the function sets in
    other context variables ends with the copy.
    """
    return copy_context().run(_set_and_call, tracer, function, *args)


def _set_and_call(tracer: Tracer, function: Callable[..., _Result], *args: Any) -> _Result:
    running = _Running(tracer)
    _running.add(ref(running, _running.discard))
    current_tracer.set(tracer)
    return function(*args)


def operand(variable: Any, array: Any = None) -> Any:
    """The value of a variable, recorded where a differentiation is running.

    Args:
        variable: the variable.
        array: its array, where the caller has brought up to date what it is going to read; by default all of it is.
    """
    tracer = current_tracer.get()
    if tracer is None and _running:
        tracer = _of_another_thread(variable)
    if array is None:
        array = variable._value
    return array if tracer is None else tracer.operand(variable, array)


def shown(variable: Any) -> Any:
    """The array of a variable, which may be written to unless a differentiation is running."""
    tracer = current_tracer.get()
    return variable._value if tracer is None else tracer.shown(variable._value)


def _of_another_thread(variable: Any) -> Tracer | None:
    calls = [call for call in (reference() for reference in tuple(_running)) if call and call.thread != get_ident()]
    tracers = [call.tracer for call in calls if call.tracer.watches(variable)]
    if len(tracers) > 1:
        raise ArgumentValueError(
            f'variable "{variable.name}"',
            "must not be computed with in a thread that could be at work for either of several losses",
            f"{len(tracers)} losses that are being differentiated in other threads",
            "call it by contextvars.copy_context().run, copied inside the loss, or take .value for a constant",
        )
    return tracers[0] if tracers else None


def check_overwrite(variable: Any) -> None:
    """To be called before the value of a variable changes."""
    tracer = current_tracer.get()
    if tracer is not None:
        tracer.refuse_overwrite(variable)


def adapter(framework: str) -> Any:
    """The module that hands variables to another framework, "torch" or "jax"; imported when first asked for."""
    return import_module(f"gpu_adam.autodiff.{framework}")
