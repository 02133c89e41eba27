"""Where the backward pass starts: the cotangents of the returned losses.

The cotangent of a result is the gradient, with respect to it, of what is differentiated.  That of a loss is 1, unless
the caller gives the gradient of something further with respect to the loss.
"""

from typing import Any

import numpy as np

from gpu_adam.autodiff.rules import fit, plain
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError

_RULE, _REMEDY = "must return real floating-point numbers", "return the loss computed from the variables"


def per_loss(grad_loss: Any, count: int) -> list[Any]:
    """The cotangent of each loss in a list of losses."""
    if not count:
        raise ArgumentValueError("loss()", "must return at least one loss", "an empty list", "return the losses")
    if not isinstance(grad_loss, (list, tuple)):
        return [grad_loss] * count
    if len(grad_loss) != count:
        raise ArgumentValueError(
            "grad_loss",
            f"must hold one gradient for each loss, {count} in number",
            f"{len(grad_loss)} of them",
            "pass one per loss, or a single number for all",
        )
    return list(grad_loss)


def check_loss(value: Any, cotangent: Any) -> None:
    """Raise if a returned value cannot be a loss."""
    if isinstance(value, (bool, int, float, complex)):
        check_kind(np.dtype(type(value)).kind, repr(value), cotangent)
    elif hasattr(value, "dtype") and hasattr(value, "shape"):
        check_kind(value.dtype.kind, f"an array of dtype {value.dtype}", cotangent)
    else:
        raise ArgumentTypeError("loss()", _RULE, "None" if value is None else f"a {type(value).__name__}", _REMEDY)


def check_kind(kind: str, got: str, cotangent: Any) -> None:
    """Raise unless numbers of this kind can be a loss; complex ones need a cotangent to say what is meant."""
    if kind in "biu":
        raise ArgumentValueError("loss()", _RULE, f"{got}: no gradients provided", _REMEDY)
    if kind == "c" and cotangent is None:
        raise ArgumentValueError("loss()", _RULE, got, "return their absolute value, its square, or a part of them")


def check_shape(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise unless a cotangent fits its loss."""
    if shape not in ((), expected):
        raise ArgumentValueError(
            "grad_loss",
            f"must be a number or have the shape of the loss, {expected}",
            f"shape {shape}",
            "pass one number per element of the loss",
        )


def seed(value: Any, cotangent: Any) -> Any:
    """The gradient to start with at a loss of this value."""
    if cotangent is None:
        return type(value)(1) if isinstance(value, np.generic) else np.ones_like(value)
    cotangent = plain(cotangent)
    shape = tuple(getattr(cotangent, "shape", None) or np.shape(cotangent))
    check_shape(shape, tuple(value.shape))
    if shape:
        cotangent = np.asarray(cotangent, like=value)
    return fit(np.ones_like(value) * cotangent, value)
