"""The table of operations: what to do when a NumPy function meets a recorded value."""

from collections.abc import Callable, Mapping
from typing import Any

Entry = Callable[[tuple[Any, ...], Mapping[str, Any]], Any]


class _Operations(dict[Callable[..., Any], Entry]):
    """What to do instead of calling a function, by the function that a user calls: entry(args, kwargs).

    Raises:
        NotImplementedError: the function has no entry.
    """

    def __missing__(self, function: Callable[..., Any]) -> Entry:
        raise missing(function_name(function))


# Filled by the modules named after the kinds of operations.
OPERATIONS = _Operations()


def function_name(function: Callable[..., Any]) -> str:
    """The public name of a function: `numpy.linalg.svd`."""
    name = getattr(function, "__name__", repr(function))
    module = getattr(function, "__module__", None) or "numpy"  # old ufuncs have no module
    return f"{module}.{name}"


def missing(operation: str) -> NotImplementedError:
    """The error for an operation that cannot be differentiated, with the ways out."""
    return NotImplementedError(
        f"{operation} has no derivative in gpu_adam; write it with operations that have one, "
        "teach it with gpu_adam.autodiff.register_vjp, "
        "or compute the gradients yourself and pass them as minimize(..., grad_fn=...)."
    )
