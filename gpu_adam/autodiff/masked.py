"""Derivatives of reductions of some of the elements: `where`, `initial`, and functions that leave NaN out."""

# the arguments of NumPy's functions, in their order

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpu_adam.autodiff.operations import OPERATIONS, function_name
from gpu_adam.autodiff.rules import Operand, OperandOrNumber, composed, plain


def _with_options(function: Callable[..., Any]) -> Callable[[Callable[..., Any]], None]:
    """Decorator: what a reduction with `where` or `initial` is; CuPy's reductions have neither."""
    whole = OPERATIONS[function]

    def enter(implementation: Callable[..., Any]) -> None:
        composed(function)(implementation)
        partial = OPERATIONS[function]
        names = list(inspect.signature(implementation).parameters)
        most = names.index("initial") if "initial" in names else math.inf

        def entry(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            is_whole = "where" not in kwargs and "initial" not in kwargs and len(args) <= most
            return (whole if is_whole else partial)(args, kwargs)

        OPERATIONS[function] = entry

    return enter


def _mask(where: Any, a: Any) -> Any:
    """`where` as an array of the shape of another one."""
    return np.broadcast_to(np.asarray(where, like=plain(a)), a.shape)


def _chosen(a: Any, where: Any, other: Any) -> Any:
    return a if where is True else np.where(_mask(where, a), a, other)


def _combined(function: Any, reduced: Any, initial: Any) -> Any:
    if initial is None:
        return reduced
    return function(reduced, initial.astype(reduced.dtype) if hasattr(initial, "dtype") else initial)


@_with_options(np.sum)
def _sum(
    a: Operand,
    axis: Any = None,
    dtype: Any = None,
    out: Any = None,
    keepdims: Any = False,
    initial: OperandOrNumber = None,
    where: Any = True,
) -> Any:
    total = np.sum(_chosen(a, where, 0), axis=axis, dtype=dtype, keepdims=keepdims)
    return _combined(np.add, total, initial)


@_with_options(np.prod)
def _prod(
    a: Operand,
    axis: Any = None,
    dtype: Any = None,
    out: Any = None,
    keepdims: Any = False,
    initial: OperandOrNumber = None,
    where: Any = True,
) -> Any:
    product = np.prod(_chosen(a, where, 1), axis=axis, dtype=dtype, keepdims=keepdims)
    return _combined(np.multiply, product, initial)


def _extreme(function: Any, either: Any) -> None:
    @_with_options(function)
    def extreme(
        a: Operand,
        axis: Any = None,
        out: Any = None,
        keepdims: Any = False,
        initial: OperandOrNumber = None,
        where: Any = True,
    ) -> Any:
        if initial is None and where is not True:
            raise ValueError(f"{function_name(function)} with where= must have an initial value; pass initial=")
        if not a.size:  # there is nothing to compare
            return np.sum(plain(a), axis=axis, keepdims=keepdims) + initial
        found = function(_chosen(a, where, initial), axis=axis, keepdims=keepdims)
        return _combined(either, found, initial)


_extreme(np.max, np.maximum)
_extreme(np.min, np.minimum)


def _number(a: Any, where: Any, axis: Any, keepdims: Any) -> Any:
    """How many elements went into each result, in the dtype of the array's real part."""
    return np.sum(_mask(where, a), axis=axis, keepdims=keepdims).astype(plain(a).real.dtype)


@_with_options(np.mean)
def _mean(
    a: Operand, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: Any = False, *, where: Any = True
) -> Any:
    total = np.sum(a, axis=axis, dtype=dtype, keepdims=keepdims, where=where)
    return total / _number(a, where, axis, keepdims)


@_with_options(np.var)
def _var(
    a: Operand,
    axis: Any = None,
    dtype: Any = None,
    out: Any = None,
    ddof: Any = 0,
    keepdims: Any = False,
    *,
    where: Any = True,
    correction: Any = 0,
) -> Any:
    mean = np.mean(a, axis=axis, dtype=dtype, keepdims=True, where=where)
    squares = np.sum(np.square(np.absolute(_chosen(a - mean, where, 0))), axis=axis, keepdims=keepdims)
    freedom = _number(a, where, axis, keepdims) - ddof - correction
    return squares / np.where(freedom > 0, freedom, math.nan)


@_with_options(np.std)
def _std(a: Operand, *args: Any, where: Any = True, **kwargs: Any) -> Any:
    variance = np.var(a, *args, where=where, **kwargs)
    is_flat = plain(variance) == 0  # a corner, whose flat middle is 0
    return np.where(is_flat, 0, np.sqrt(np.where(is_flat, 1, variance)))


OPERATIONS[np.amax], OPERATIONS[np.amin] = OPERATIONS[np.max], OPERATIONS[np.min]


# -- NaN left out
def _present(a: Any, where: Any) -> Any:
    numbers = ~np.isnan(plain(a))
    return numbers if where is True else numbers & _mask(where, a)


def _ignore_nan(nan_function: Any, function: Any) -> None:
    @composed(nan_function)
    def ignoring(a: Operand, *args: Any, where: Any = True, **kwargs: Any) -> Any:
        return function(a, *args, where=_present(a, where), **kwargs)


_ignore_nan(np.nansum, np.sum)
_ignore_nan(np.nanprod, np.prod)
_ignore_nan(np.nanmean, np.mean)
_ignore_nan(np.nanvar, np.var)
_ignore_nan(np.nanstd, np.std)


def _ignore_nan_in_extreme(nan_function: Any, function: Any, worst: float) -> None:
    @composed(nan_function)
    def ignoring(
        a: Operand, axis: Any = None, out: Any = None, keepdims: Any = False, initial: Any = None, where: Any = True
    ) -> Any:
        present = _present(a, where)
        if initial is not None:
            return function(a, axis=axis, keepdims=keepdims, initial=initial, where=present)
        found = function(np.where(present, a, worst), axis=axis, keepdims=keepdims)
        return np.where(np.any(present, axis=axis, keepdims=keepdims), found, math.nan)


_ignore_nan_in_extreme(np.nanmax, np.max, -math.inf)
_ignore_nan_in_extreme(np.nanmin, np.min, math.inf)


@composed(np.nancumsum)
def _nancumsum(a: Operand, axis: Any = None, dtype: Any = None, out: Any = None) -> Any:
    return np.cumsum(np.where(np.isnan(plain(a)), 0, a), axis=axis, dtype=dtype)


@composed(np.nancumprod)
def _nancumprod(a: Operand, axis: Any = None, dtype: Any = None, out: Any = None) -> Any:
    return np.cumprod(np.where(np.isnan(plain(a)), 1, a), axis=axis, dtype=dtype)
