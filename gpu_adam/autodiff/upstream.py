"""Where the backward pass starts: the returned losses, and the gradients of something further with respect to them."""

from typing import Any

import numpy as np

from gpu_adam.autodiff.rules import fit, plain
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError

_RULE, _REMEDY = "must return real floating-point numbers", "return the loss computed from the variables"


def per_loss(grad_loss: Any, count: int) -> list[Any]:
    """The upstream gradient of each loss in a list of losses."""
    if not count:
        raise ArgumentValueError("loss()", "must return at least one loss", "an empty list", "return the losses")
    if not isinstance(grad_loss, (list, tuple)):
        return [grad_loss] * count
    if len(grad_loss) != count:
        raise ArgumentValueError(
            "grad_loss",
            f"must hold one upstream gradient for each loss, {count} in number",
            f"{len(grad_loss)} of them",
            "pass one per loss, or a single number for all",
        )
    return list(grad_loss)


def check_loss(value: Any, upstream: Any) -> None:
    """Raise if a returned value cannot be a loss."""
    if isinstance(value, (bool, int, float, complex)):
        check_kind(np.dtype(type(value)).kind, repr(value), upstream)
    elif hasattr(value, "dtype") and hasattr(value, "shape"):
        check_kind(value.dtype.kind, f"an array of dtype {value.dtype}", upstream)
    else:
        raise ArgumentTypeError("loss()", _RULE, "None" if value is None else f"a {type(value).__name__}", _REMEDY)


def check_kind(kind: str, got: str, upstream: Any) -> None:
    """Raise unless numbers of this kind can be a loss; complex ones need an upstream gradient to say what is meant."""
    if kind in "biu":
        raise ArgumentValueError("loss()", _RULE, f"{got}: no gradients provided", _REMEDY)
    if kind == "c" and upstream is None:
        raise ArgumentValueError("loss()", _RULE, got, "return their absolute value, its square, or a part of them")


def check_shape(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise unless an upstream gradient fits its loss."""
    if shape not in ((), expected):
        raise ArgumentValueError(
            "grad_loss",
            f"must be a number or have the shape of the loss, {expected}",
            f"shape {shape}",
            "pass one number per element of the loss",
        )


def seed(value: Any, upstream: Any) -> Any:
    """The gradient to start with at a loss of this value."""
    if upstream is None:
        return type(value)(1) if isinstance(value, np.generic) else np.ones_like(value)
    upstream = plain(upstream)
    shape = tuple(getattr(upstream, "shape", None) or np.shape(upstream))
    check_shape(shape, tuple(value.shape))
    if shape:
        upstream = np.asarray(upstream, like=value)
    return fit(np.ones_like(value) * upstream, value)
