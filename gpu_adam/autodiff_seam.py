"""The seam between a variable and a running differentiation: what a variable stands for when it is computed with.

While a loss is being differentiated a tracer is set, and a variable hands itself to the tracer; otherwise a variable is
its value.  The tracer is a context variable, so that each thread and each asynchronous task sees its own tracer and no
other's.
"""

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from importlib import import_module
from typing import Any, Protocol, TypeVar

_Result = TypeVar("_Result")


class Tracer(Protocol):
    """What a running differentiation must answer."""

    def operand(self, variable: Any) -> Any:
        """What to compute with in place of `variable`: a recorded value, or the plain array."""

    def refuse_overwrite(self, variable: Any) -> None:
        """Raise if the value of `variable` must not change now."""


current_tracer: ContextVar[Tracer | None] = ContextVar("gpu_adam_tracer", default=None)


def traced_by(tracer: Tracer, function: Callable[..., _Result], *args: Any) -> _Result:
    """Call a function while `tracer` is set.

    The tracer is set in a copy of the caller's context, which C code enters and leaves: an interrupt can come between
    any two lines of Python, and a line that takes the tracer away again might never run.  What the function sets in
    other context variables ends with the copy.
    """
    return copy_context().run(_set_and_call, tracer, function, *args)


def _set_and_call(tracer: Tracer, function: Callable[..., _Result], *args: Any) -> _Result:
    current_tracer.set(tracer)
    return function(*args)


def operand(variable: Any) -> Any:
    """The value of a variable, recorded where a differentiation is running."""
    tracer = current_tracer.get()
    return variable.value if tracer is None else tracer.operand(variable)


def check_overwrite(variable: Any) -> None:
    """To be called before the value of a variable changes."""
    tracer = current_tracer.get()
    if tracer is not None:
        tracer.refuse_overwrite(variable)


def adapter(framework: str) -> Any:
    """The module that hands variables to another framework, "torch" or "jax"; imported when first asked for."""
    return import_module(f"gpu_adam.autodiff.{framework}")
