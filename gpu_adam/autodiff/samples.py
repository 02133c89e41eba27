"""Derivatives of operations on the samples of a function: interpolation, slopes, areas, filters, polynomials."""

# the arguments of NumPy's functions, in their order

import math
from typing import Any

import numpy as np

from gpu_adam.autodiff.rules import Operand, OperandOrNumber, Primitive, composed, conj, derivative, plain


@composed(np.interp)
def _interp(
    x: Operand,
    xp: Operand,
    fp: Operand,
    left: OperandOrNumber = None,
    right: OperandOrNumber = None,
    period: Any = None,
) -> Any:
    # NumPy's function computes in double precision whatever it gets.
    x, xp = x.astype(np.float64), xp.astype(np.float64)
    fp = fp.astype(np.complex128 if fp.dtype.kind == "c" else np.float64)
    if period is not None:  # then nothing is left or right of all samples
        if not period:
            raise ValueError("period must be a non-zero value")
        period = abs(period)
        x, xp = x % period, xp % period
        order = np.argsort(plain(xp))
        xp, fp = np.take(xp, order), np.take(fp, order)
        xp = np.concatenate((xp[-1:] - period, xp, xp[:1] + period))
        fp = np.concatenate((fp[-1:], fp, fp[:1]))
    # The samples on either side; outside, the last one is both.
    ahead = np.searchsorted(plain(xp), plain(x), side="right")
    low, high = np.maximum(ahead - 1, 0), np.minimum(ahead, xp.shape[0] - 1)
    start, base = np.take(xp, low), np.take(fp, low)
    width = np.where(low == high, 1, np.take(xp, high) - start)
    y = base + (np.take(fp, high) - base) / width * (x - start)
    if left is not None:
        y = np.where(plain(x) < plain(xp)[0], left, y)
    if right is not None:
        y = np.where(plain(x) > plain(xp)[-1], right, y)
    return y


@composed(np.gradient)
def _gradient(f: Operand, *varargs: OperandOrNumber, axis: Any = None, edge_order: int = 1) -> Any:
    axes = range(f.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    if not varargs:
        varargs = (1.0,)
    if len(varargs) == 1 and not np.ndim(plain(varargs[0])):
        varargs *= len(axes)
    if len(varargs) != len(axes):
        raise TypeError(f"numpy.gradient takes one spacing or one for each axis (got {len(varargs)})")
    found = [
        np.moveaxis(_slopes(np.moveaxis(f, each, -1), spacing, edge_order), -1, each)
        for each, spacing in zip(axes, varargs, strict=True)
    ]
    return found[0] if len(found) == 1 else tuple(found)


def _slopes(f: Any, spacing: Any, edge_order: int) -> Any:
    """Along the last axis, the slopes of the parabolas through each three neighbours."""
    count = f.shape[-1]
    if edge_order not in (1, 2) or count <= edge_order:
        raise ValueError(
            f"numpy.gradient takes an edge_order of 1 or 2, and more samples than that (got {edge_order} and {count})"
        )
    if np.ndim(plain(spacing)):
        if spacing.shape != (count,):
            raise ValueError(f"numpy.gradient takes {count} coordinates here (got an array of shape {spacing.shape})")
        steps = np.diff(spacing)
    else:
        steps = np.ones_like(plain(f), shape=(count - 1,)) * spacing
    before, after = steps[:-1], steps[1:]
    slopes = np.diff(f) / steps
    bends = np.diff(slopes) / (before + after)
    first, last = slopes[..., :1], slopes[..., -1:]
    if edge_order == 2:
        first, last = first - before[:1] * bends[..., :1], last + after[-1:] * bends[..., -1:]
    return np.concatenate((first, slopes[..., :-1] + before * bends, last), axis=-1)


@composed(*(getattr(np, name) for name in ("trapezoid", "trapz") if hasattr(np, name)))
def _trapezoid(y: Operand, x: Operand = None, dx: OperandOrNumber = 1.0, axis: int = -1) -> Any:
    y = np.moveaxis(y, axis, -1)
    if x is not None:
        dx = np.diff(x if x.ndim == 1 else np.moveaxis(x, axis, -1))
    return np.sum(dx * (y[..., 1:] + y[..., :-1]) / 2.0, axis=-1)


# -- filters
def _valid(a: Any, v: Any) -> Any:
    return np.convolve(a, v, "valid")


_recorded_convolve = Primitive(
    np.convolve,
    (
        lambda g, y, a, v: _valid(g, conj(v[::-1])),
        lambda g, y, a, v: _valid(g, conj(a[::-1])),
    ),
)


@composed(np.convolve)
def _convolve(a: Operand, v: Operand, mode: Any = "full") -> Any:
    a, v = np.atleast_1d(a), np.atleast_1d(v)
    shorter, longer = sorted((a.shape[0], v.shape[0]))
    full = _recorded_convolve((a, v), {})
    if mode == "full":
        return full
    if mode == "same":
        start = (shorter - 1) // 2
        return full[start : start + longer]
    if mode == "valid":
        return full[shorter - 1 : longer]
    raise ValueError(f'mode must be "full", "same" or "valid" (got {mode!r})')


@composed(np.correlate)
def _correlate(a: Operand, v: Operand, mode: Any = "valid") -> Any:
    a, v = np.atleast_1d(a), np.atleast_1d(v)
    if a.shape[0] < v.shape[0]:  # the middle of "same" is counted from the other side
        return np.convolve(np.conjugate(v), a[::-1], mode)[::-1]
    return np.convolve(a, np.conjugate(v)[::-1], mode)


# A whole number of periods is added.
derivative(np.unwrap, lambda g, y, p, discont=None, axis=-1, *, period=math.tau: g)


@composed(np.polyval)
def _polyval(p: Operand, x: Operand) -> Any:
    y = np.zeros_like(plain(x))
    for i in range(p.shape[0]):
        y = y * x + p[i]
    return y
