"""Derivatives of sums, means, extremes and their like."""

# the arguments of NumPy's functions, in their order

import math
from typing import Any

import numpy as np

from gpu_adam.autodiff.operations import OPERATIONS
from gpu_adam.autodiff.rules import Operand, Primitive, composed, conj, constant, derivative, plain


def reduced_axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """The numbers of the axes that a reduction goes over, none negative."""
    if axis is None:
        return tuple(range(ndim))
    return tuple(a % ndim for a in (axis if isinstance(axis, tuple | list) else (axis,))) if ndim else ()


def with_axes(reduced: Any, like: Any, axis: Any) -> Any:
    """A result with the reduced axes put back as length 1, ready to broadcast against `like`."""
    if reduced.ndim in (0, like.ndim):
        return reduced
    axes = reduced_axes(axis, like.ndim)
    return reduced.reshape([1 if i in axes else n for i, n in enumerate(like.shape)])


def _count(reduced: Any, like: Any) -> float:
    """How many elements went into each result."""
    return like.size / reduced.size if reduced.size else 0.0


def _inverse(count: float) -> float:
    return 1 / count if count > 0 else math.nan


def _spread(g: Any, a: Any, axis: Any) -> Any:
    """The same gradient for every element that went into a result."""
    # Written out: faster than numpy.broadcast_to where calls are what costs, and never a view of another gradient.
    full = np.empty_like(a, dtype=g.dtype)
    full[...] = with_axes(g, a, axis)
    return full


def _sum_vjp(
    g: Any, y: Any, a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: Any = False
) -> Any:
    return _spread(g, a, axis)


def _mean_vjp(
    g: Any, y: Any, a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: Any = False
) -> Any:
    return _spread(g * _inverse(_count(y, a)), a, axis)


def _deviation(a: Any, axis: Any) -> Any:
    return a - a.mean(axis=axis, keepdims=True)


def _var_vjp(
    g: Any,
    y: Any,
    a: Any,
    axis: Any = None,
    dtype: Any = None,
    out: Any = None,
    ddof: Any = 0,
    keepdims: Any = False,
    *,
    correction: Any = 0,
) -> Any:
    scale = 2 * _inverse(_count(y, a) - ddof - correction)
    return with_axes(g * scale, a, axis) * _deviation(a, axis)


def _std_vjp(
    g: Any,
    y: Any,
    a: Any,
    axis: Any = None,
    dtype: Any = None,
    out: Any = None,
    ddof: Any = 0,
    keepdims: Any = False,
    *,
    correction: Any = 0,
) -> Any:
    scale = _inverse(_count(y, a) - ddof - correction)
    safe = np.where(y == 0, 1, y)  # equal numbers: a corner, whose flat middle is 0
    return with_axes(g * scale / safe, a, axis) * _deviation(a, axis)


def _ddof(kwargs: Any) -> Any:
    """The keyword arguments with `ddof` in place of `correction`, its newer name, which CuPy does not know."""
    if "correction" not in kwargs:
        return kwargs
    if "ddof" in kwargs:
        raise ValueError("ddof and correction can't be provided simultaneously.")
    return {"ddof" if key == "correction" else key: value for key, value in kwargs.items()}


def _extreme_vjp(g: Any, y: Any, a: Any, axis: Any = None, out: Any = None, keepdims: Any = False) -> Any:
    if not a.ndim:
        return g
    chosen = a == with_axes(y, a, axis)
    # Equal extremes share; none is chosen where the extreme is NaN.
    ties = np.maximum(chosen.sum(axis=reduced_axes(axis, a.ndim), keepdims=True), 1).astype(g.dtype)
    return np.where(chosen, with_axes(g, a, axis) / ties, 0)


def _order(axis: Any, ndim: int) -> tuple[int, ...]:
    """The axes, those of a reduction last."""
    axes = reduced_axes(axis, ndim)
    return (*(i for i in range(ndim) if i not in axes), *axes)


def merged_last(a: Any, axis: Any) -> Any:
    """The array with the axes of a reduction merged into a last one."""
    moved = a.transpose(_order(axis, a.ndim))
    kept = a.ndim - len(reduced_axes(axis, a.ndim))
    return moved.reshape((*moved.shape[:kept], math.prod(moved.shape[kept:])))


def _products_before(a: Any) -> Any:
    """Along the last axis, the product of all elements before each one."""
    return np.cumprod(np.concatenate((np.ones_like(a[..., :1]), a[..., :-1]), axis=-1), axis=-1)


def products_of_others(a: Any) -> Any:
    """For each element the product of all others along the last axis."""
    # From both sides: the product of all, divided by the element, would be 0/0 where that is 0.
    return _products_before(a) * _products_before(a[..., ::-1])[..., ::-1]


def _prod_vjp(
    g: Any, y: Any, a: Any, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: Any = False
) -> Any:
    flat, order = merged_last(a, axis), _order(axis, a.ndim)
    others = products_of_others(flat).reshape([a.shape[i] for i in order]).transpose(tuple(np.argsort(order)))
    return with_axes(g, a, axis) * conj(others)


def _cumprod_vjp(g: Any, y: Any, a: Any, axis: Any = None, dtype: Any = None, out: Any = None) -> Any:
    # Of an element, all before it times what follows: total[k] = g[k] + a[k+1] * total[k+1], solved by doubling the
    # distance.  Not g * y / a, which would be 0/0 where a is 0.
    along = 0 if axis is None else axis
    total = np.moveaxis(g, along, -1)
    factors = conj(np.moveaxis(a.reshape(y.shape), along, -1))
    before = _products_before(factors)
    ahead, distance = factors[..., 1:], 1
    while distance < total.shape[-1]:
        total = np.concatenate(
            (total[..., :-distance] + ahead * total[..., distance:], total[..., -distance:]), axis=-1
        )
        ahead = ahead[..., :-distance] * ahead[..., distance:]
        distance *= 2
    return np.moveaxis(before * total, -1, along).reshape(a.shape)


def _cumsum_vjp(g: Any, y: Any, a: Any, axis: Any = None, dtype: Any = None, out: Any = None) -> Any:
    along = 0 if axis is None else axis
    return np.flip(np.cumsum(np.flip(g, along), along), along).reshape(a.shape)


# By the arrays' own methods, which numpy.sum and cupy.sum only come to call in the end.
OPERATIONS[np.sum] = Primitive(lambda a, *args, **kwargs: a.sum(*args, **kwargs), (_sum_vjp,), of=np.sum)
OPERATIONS[np.mean] = Primitive(lambda a, *args, **kwargs: a.mean(*args, **kwargs), (_mean_vjp,), of=np.mean)
OPERATIONS[np.var] = Primitive(lambda *args, **kwargs: np.var(*args, **_ddof(kwargs)), (_var_vjp,), of=np.var)
OPERATIONS[np.std] = Primitive(lambda *args, **kwargs: np.std(*args, **_ddof(kwargs)), (_std_vjp,), of=np.std)
derivative(np.max, _extreme_vjp)
derivative(np.min, _extreme_vjp)
derivative(np.prod, _prod_vjp)
derivative(np.cumsum, _cumsum_vjp)
derivative(np.cumprod, _cumprod_vjp)


@composed(np.logaddexp.reduce)
def _logsumexp(a: Operand, axis: Any = 0, dtype: Any = None, out: Any = None, keepdims: Any = False) -> Any:
    top = np.max(plain(a), axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)  # all -inf: not -inf - -inf
    total = np.log(np.sum(np.exp(a - top), axis=axis, keepdims=keepdims))
    return total + (top if keepdims else top.reshape(total.shape))


@composed(np.average)
def _average(
    a: Operand, axis: Any = None, weights: Operand = None, returned: bool = False, *, keepdims: Any = False
) -> Any:
    if weights is None:
        mean = np.mean(a, axis=axis, keepdims=keepdims)
        total = np.full_like(mean, plain(a).size / max(mean.size, 1))
    else:
        if weights.shape != a.shape:
            weights = weights.reshape([n if i in reduced_axes(axis, a.ndim) else 1 for i, n in enumerate(a.shape)])
            weights = np.broadcast_to(weights, a.shape)
        total = np.sum(weights, axis=axis, keepdims=keepdims)
        mean = np.sum(a * weights, axis=axis, keepdims=keepdims) / total
    return (mean, total) if returned else mean


@composed(np.ptp)
def _ptp(a: Operand, axis: Any = None, out: Any = None, keepdims: Any = False) -> Any:
    return np.max(a, axis=axis, keepdims=keepdims) - np.min(a, axis=axis, keepdims=keepdims)


@composed(np.diff)
def _diff(a: Operand, n: int = 1, axis: int = -1) -> Any:
    for _ in range(n):
        ahead = [slice(None)] * a.ndim
        behind = list(ahead)
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        a = a[tuple(ahead)] - a[tuple(behind)]
    return a


constant(
    *(np.argmax, np.argmin, np.argsort, np.nanargmax, np.nanargmin, np.nonzero, np.flatnonzero, np.argwhere),
    *(np.count_nonzero, np.any, np.all, np.searchsorted, np.digitize),
)
