"""The table of operations: what to do when a NumPy function meets a recorded value."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

Entry = Callable[[tuple[Any, ...], Mapping[str, Any]], Any]

# Filled by the modules named after the kinds of operations; a key is the NumPy function that a user calls.
OPERATIONS: dict[Callable[..., Any], Entry] = {}


def apply(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a NumPy function on arguments of which some are recorded, and record it.

    Raises:
        NotImplementedError: the function has no entry in the table.
    """
    try:
        entry = OPERATIONS[function]
    except KeyError:
        raise missing(function_name(function)) from None
    return entry(args, kwargs)


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


def namespace(array: Any) -> Any:
    """The module whose functions make and take such arrays: numpy, cupy."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules[type(array).__module__.partition(".")[0]]
