"""Derivatives of statistics: quantiles, covariances, weighted counts."""

# the arguments of NumPy's functions, in their order

import math
from typing import Any

import numpy as np

from gpu_adam.autodiff.operations import missing
from gpu_adam.autodiff.reductions import merged_last, reduced_axes
from gpu_adam.autodiff.rules import Operand, Primitive, composed, plain


# -- quantiles: elements in sorted order, and what lies between two neighbours
def _at(a: Any, position: Any) -> Any:
    """Along the last axis, what lies at some positions (..., m) among the sorted elements, between two of them too."""
    values = plain(a)
    order = np.argsort(values, axis=-1)

    def element(number: Any) -> Any:
        number = np.broadcast_to(number.astype(np.int64), (*a.shape[:-1], number.shape[-1]))
        return np.take_along_axis(a, np.take_along_axis(order, number, -1), -1)

    low = np.floor(position)
    below = element(low)
    return below + (element(np.ceil(position)) - below) * (position - low).astype(values.dtype)


def _arranged(found: Any, a: Any, q: Any, axis: Any, keepdims: Any) -> Any:
    """Quantiles that lie along the last axis, along the first axes, which are those of q."""
    axes = reduced_axes(axis, a.ndim)
    rest = [1 if i in axes else n for i, n in enumerate(a.shape) if keepdims or i not in axes]
    return np.moveaxis(found, -1, 0).reshape((*np.shape(q), *rest))


@composed(np.quantile)
def _quantile(
    a: Operand,
    q: Any,
    axis: Any = None,
    out: Any = None,
    overwrite_input: bool = False,
    method: Any = "linear",
    keepdims: Any = False,
) -> Any:
    flat = merged_last(a, axis)
    # The quantiles of the elements' numbers are their positions, by whatever method.
    position = np.quantile(np.arange(flat.shape[-1]), q, method=method).reshape(-1)
    found = _at(flat, np.asarray(position, like=plain(a)))
    has_nan = np.isnan(plain(flat)).any(axis=-1, keepdims=True)
    return _arranged(np.where(has_nan, math.nan, found), a, q, axis, keepdims)


@composed(np.nanquantile)
def _nanquantile(
    a: Operand,
    q: Any,
    axis: Any = None,
    out: Any = None,
    overwrite_input: bool = False,
    method: Any = "linear",
    keepdims: Any = False,
) -> Any:
    if method != "linear":
        raise missing(f'numpy.nanquantile with method="{method}"')
    flat = merged_last(a, axis)
    last = (~np.isnan(plain(flat))).sum(axis=-1, keepdims=True) - 1  # NaN is sorted behind all numbers
    position = np.maximum(last, 0) * np.asarray(np.reshape(q, (-1,)), like=plain(a))
    return _arranged(_at(flat, position), a, q, axis, keepdims)


def _enter_percentiles(percentile: Any, median: Any, quantile: Any) -> None:
    @composed(percentile)
    def of_hundred(a: Operand, q: Any, *args: Any, **kwargs: Any) -> Any:
        return quantile(a, np.true_divide(q, 100), *args, **kwargs)

    @composed(median)
    def in_the_middle(
        a: Operand, axis: Any = None, out: Any = None, overwrite_input: bool = False, keepdims: Any = False
    ) -> Any:
        return quantile(a, 0.5, axis=axis, keepdims=keepdims)


_enter_percentiles(np.percentile, np.median, np.quantile)
_enter_percentiles(np.nanpercentile, np.nanmedian, np.nanquantile)


# -- covariances
@composed(np.cov)
def _cov(
    m: Operand, y: Operand = None, rowvar: bool = True, bias: bool = False, ddof: Any = None, *, dtype: Any = None
) -> Any:
    parts = [m] if y is None else [m, y]
    rows = np.concatenate([a.T if a.ndim == 2 and not rowvar else np.atleast_2d(a) for a in parts])
    rows = rows.astype(np.result_type(*(a.dtype for a in parts), np.float64) if dtype is None else dtype)
    rows = rows - np.mean(rows, axis=1, keepdims=True)
    freedom = rows.shape[1] - (0 if bias else 1) if ddof is None else rows.shape[1] - ddof
    return np.squeeze(rows @ np.conjugate(rows).T / freedom)


@composed(np.corrcoef)
def _corrcoef(x: Operand, y: Operand = None, rowvar: bool = True, *, dtype: Any = None) -> Any:
    covariance = np.cov(x, y, rowvar, dtype=dtype)
    if not covariance.ndim:
        return covariance / covariance
    deviation = np.sqrt(np.real(np.diag(covariance)))
    found = covariance / deviation[:, None] / deviation
    return found if found.dtype.kind == "c" else np.clip(found, -1, 1)


# -- counts
_recorded_bincount = Primitive(np.bincount, (None, lambda g, y, x, _weights, minlength=0: g[x]))


@composed(np.bincount)
def _bincount(x: Any, weights: Operand = None, minlength: Any = 0) -> Any:
    return _recorded_bincount((np.asarray(x, like=plain(weights)), weights), {"minlength": minlength})
