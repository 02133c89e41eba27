"""Derivatives of the norms of vectors and matrices.  Where a norm has a corner its slope is 0, as torch has it."""

# the arguments of NumPy's functions, in their order

from typing import Any

import numpy as np

from gpu_adam.autodiff.operations import missing
from gpu_adam.autodiff.reductions import with_axes
from gpu_adam.autodiff.rules import Operand, Primitive, composed


def _euclidean(a: Any, axis: Any = None, keepdims: bool = False) -> Any:
    return np.sqrt(
        np.sum(np.square(a.real) + np.square(a.imag) if a.dtype.kind == "c" else a * a, axis=axis, keepdims=keepdims)
    )


def _euclidean_vjp(g: Any, y: Any, a: Any, axis: Any = None, keepdims: bool = False) -> Any:
    return with_axes(g / np.where(y == 0, 1, y), a, axis) * a  # 0 at the tip of the cone


def _power_norm(a: Any, ord: Any, axis: Any, keepdims: bool) -> Any:
    return np.sum(np.absolute(a) ** ord, axis=axis, keepdims=keepdims) ** (1.0 / ord)


def _power_norm_vjp(g: Any, y: Any, a: Any, ord: Any, axis: Any, keepdims: bool) -> Any:
    size, norm = np.absolute(a), with_axes(y, a, axis)
    # 0 where an element is, as torch has it: where the norm is 0 too, and for powers whose slope there is infinite.
    flat = (size == 0) | (norm == 0)
    ratio = np.where(flat, 1, size) / np.where(norm == 0, 1, norm)
    return with_axes(g, a, axis) * np.where(flat, 0, np.sign(a)) * ratio ** (ord - 1)


_recorded_power_norm = Primitive(_power_norm, (_power_norm_vjp,), of=np.linalg.norm)
_recorded_euclidean = Primitive(_euclidean, (_euclidean_vjp,), of=np.linalg.norm)


@composed(np.linalg.norm)
def _norm(x: Operand, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:
    count = x.ndim if axis is None else len(axis) if isinstance(axis, tuple | list) else 1
    axis = tuple(axis) if isinstance(axis, list) else axis
    if ord is None or (ord == "fro" and count == 2):
        return _recorded_euclidean((x,), {"axis": axis, "keepdims": keepdims})
    if count == 1:
        return _of_vectors(x, ord, axis, keepdims)
    return _of_matrices(x, ord, axis or (0, 1), keepdims)


def _of_vectors(x: Any, ord: Any, axis: Any, keepdims: bool) -> Any:
    if ord == 2:
        return _recorded_euclidean((x,), {"axis": axis, "keepdims": keepdims})
    if ord == np.inf:
        return np.max(np.absolute(x), axis=axis, keepdims=keepdims)
    if ord == -np.inf:
        return np.min(np.absolute(x), axis=axis, keepdims=keepdims)
    if ord == 1:
        return np.sum(np.absolute(x), axis=axis, keepdims=keepdims)
    if ord == 0:
        size = np.absolute(x)
        return np.sum((size != 0).astype(size.dtype), axis=axis, keepdims=keepdims)
    return _recorded_power_norm((x,), {"ord": ord, "axis": axis, "keepdims": keepdims})


def _of_matrices(x: Any, ord: Any, axis: Any, keepdims: bool) -> Any:
    if ord in (1, -1, np.inf, -np.inf):
        rows, columns = axis if abs(ord) == 1 else axis[::-1]
        sums = np.sum(np.absolute(x), axis=rows, keepdims=True)
        norm = (np.max if ord > 0 else np.min)(sums, axis=columns, keepdims=True)
        return norm if keepdims else np.squeeze(norm, axis=tuple(axis))
    if ord not in (2, -2, "nuc"):
        raise missing(f"numpy.linalg.norm of a matrix with ord={ord!r}")
    values = np.linalg.svd(np.moveaxis(x, axis, (-2, -1)), compute_uv=False)  # in descending order
    norm = np.sum(values, axis=-1) if ord == "nuc" else values[..., 0 if ord == 2 else -1]
    return np.expand_dims(norm, tuple(sorted(i % x.ndim for i in axis))) if keepdims else norm


@composed(np.linalg.vector_norm)
def _vector_norm(x: Operand, *, axis: Any = None, keepdims: bool = False, ord: Any = 2) -> Any:
    return _of_vectors(x, ord, tuple(axis) if isinstance(axis, list) else axis, keepdims)


@composed(np.linalg.matrix_norm)
def _matrix_norm(x: Operand, *, keepdims: bool = False, ord: Any = "fro") -> Any:
    return np.linalg.norm(x, ord, (-2, -1), keepdims)
