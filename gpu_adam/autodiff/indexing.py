"""Derivatives of picking elements: by index, by mask, in sorted order; gradients of picked rows stay sparse."""

# the arguments of NumPy's functions, in their order

from typing import Any

import numpy as np

from gpu_adam.arrays import gather
from gpu_adam.autodiff.node import getitem
from gpu_adam.autodiff.rules import Operand, Primitive, composed, derivative, own, plain
from gpu_adam.autodiff.sparse_cotangent import SparseCotangent


def _rows(indices: Any, a: Any, g: Any) -> SparseCotangent:
    """The gradient of a[indices], whatever the shape of the indices."""
    indices = indices.reshape(-1)
    if indices.dtype not in (np.int32, np.int64):  # what the sparse update takes, and wide enough for what follows
        indices = indices.astype(np.int64)
    return _gather_vjp(g, None, a, np.where(indices < 0, indices + a.shape[0], indices))


def _gather_vjp(g: Any, y: Any, a: Any, rows: Any) -> SparseCotangent:
    """Like the other rules here it reads a's shape and dtype alone: other rows of it may be behind."""
    return SparseCotangent(a, rows.reshape(-1), g.reshape((rows.size, *a.shape[1:])), rows=True)


def _getitem_vjp(g: Any, y: Any, a: Any, key: Any) -> Any:
    parts = key if type(key) is tuple else (key,)
    advanced = [part for part in parts if isinstance(part, list) or hasattr(part, "dtype")]
    if advanced and all(part is Ellipsis or _is_full(part) for part in parts[1:]):
        rows = np.asarray(parts[0], like=a)
        if rows.dtype.kind in "iu" and rows.ndim:
            return _rows(rows, a, g)
    masks = [getattr(part, "dtype", np.dtype(int)).kind == "b" for part in advanced]
    return SparseCotangent(a, key, g, repeats=not all(masks))


def _is_full(part: Any) -> bool:
    return isinstance(part, slice) and part == slice(None)


def _take_vjp(g: Any, y: Any, a: Any, indices: Any, axis: Any = None) -> Any:
    indices = np.asarray(indices, like=a)
    if axis is None and a.ndim != 1:
        return _rows(indices, a.reshape(-1), g).dense().reshape(a.shape)
    axis = 0 if axis is None else axis % a.ndim
    return SparseCotangent(a, (*[slice(None)] * axis, indices), g, repeats=True) if axis else _rows(indices, a, g)


derivative(getitem, _getitem_vjp)
derivative(gather, _gather_vjp, None)
_recorded_take = Primitive(np.take, (_take_vjp, None))


@composed(np.take)
def _take(a: Operand, indices: Any, axis: Any = None, out: Any = None, mode: str = "raise") -> Any:
    if mode != "raise":  # worked out here: CuPy's function has no modes
        array = plain(a)
        size = array.size if axis is None else array.shape[axis]
        indices = np.asarray(indices, like=array)
        indices = indices % size if mode == "wrap" else np.clip(indices, 0, size - 1)
    return _recorded_take((a, indices), {} if axis is None else {"axis": axis})


def _take_along_axis_vjp(g: Any, y: Any, a: Any, indices: Any, axis: Any = -1) -> Any:
    if axis is None:
        return np.reshape(_rows(np.asarray(indices, like=a), a.reshape(-1), g).dense(), a.shape)
    axis %= a.ndim
    key = [
        np.arange(n, like=a).reshape([-1 if i == j else 1 for j in range(a.ndim)]) for i, n in enumerate(indices.shape)
    ]
    key[axis] = indices
    return SparseCotangent(a, tuple(key), g, repeats=True)


derivative(np.take_along_axis, _take_along_axis_vjp)


@composed(np.sort)
def _sort(a: Operand, axis: Any = -1, kind: Any = None, order: Any = None, *, stable: Any = None) -> Any:
    if axis is None:
        a, axis = np.ravel(a), 0
    return np.take_along_axis(a, own(np.argsort(plain(a), axis=axis)), axis=axis)


@composed(np.compress)
def _compress(condition: Any, a: Operand, axis: Any = None, out: Any = None) -> Any:
    condition = np.asarray(condition, like=plain(a))
    if condition.ndim != 1:
        raise ValueError(f"numpy.compress takes a condition with 1 axis (got {condition.ndim}); use a[condition]")
    return np.take(a, np.flatnonzero(condition), axis=axis)


@composed(np.extract)
def _extract(condition: Any, arr: Operand) -> Any:
    return np.take(np.ravel(arr), np.flatnonzero(np.asarray(condition, like=plain(arr))))
