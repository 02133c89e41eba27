"""Derivatives of operations that move elements about: reshape, transpose, join, split, repeat, pad, shift."""

import itertools
from typing import Any

import numpy as np

from gpu_adam.autodiff.node import outer
from gpu_adam.autodiff.operations import OPERATIONS, missing
from gpu_adam.autodiff.rules import Each, Operand, Operands, Primitive, composed, constant, derivative, own, plain


# -- one array, the same elements
def _reshape_vjp(
    g: Any, y: Any, a: Any, shape: Any = None, order: Any = "C", *, newshape: Any = None, copy: Any = None
) -> Any:
    return np.reshape(g, a.shape, order=order)


def _transpose_vjp(g: Any, y: Any, a: Any, axes: Any = None) -> Any:
    if axes is None:
        return np.transpose(g)
    inverse = [0] * g.ndim
    for position, axis in enumerate(axes):
        inverse[axis] = position
    return np.transpose(g, inverse)


def _roll_vjp(g: Any, y: Any, a: Any, shift: Any, axis: Any = None) -> Any:
    back = tuple(-s for s in shift) if isinstance(shift, tuple | list) else -shift
    return np.roll(g, back, axis)


derivative(np.reshape, _reshape_vjp)
derivative(np.ravel, lambda g, y, a, order="C": np.reshape(g, a.shape, order=order))
derivative(np.expand_dims, lambda g, y, a, axis: g.reshape(a.shape))
derivative(np.squeeze, lambda g, y, a, axis=None: g.reshape(a.shape))
derivative(np.atleast_1d, lambda g, y, a: g.reshape(a.shape))
derivative(np.atleast_2d, lambda g, y, a: g.reshape(a.shape))
derivative(np.atleast_3d, lambda g, y, a: g.reshape(a.shape))
derivative(np.transpose, _transpose_vjp)
derivative(np.swapaxes, lambda g, y, a, axis1, axis2: np.swapaxes(g, axis1, axis2))
derivative(np.moveaxis, lambda g, y, a, source, destination: np.moveaxis(g, destination, source))
derivative(np.matrix_transpose, lambda g, y, a: np.swapaxes(g, -1, -2))
OPERATIONS[np.linalg.matrix_transpose] = OPERATIONS[np.matrix_transpose]
derivative(np.broadcast_to, lambda g, y, a, shape: g)
derivative(np.flip, lambda g, y, a, axis=None: np.flip(g, axis))
derivative(np.roll, _roll_vjp)
derivative(np.tril, lambda g, y, a, k=0: np.tril(g, k))
derivative(np.triu, lambda g, y, a, k=0: np.triu(g, k))


@composed(np.flipud)
def _flipud(a: Operand) -> Any:
    return np.flip(a, 0)


@composed(np.fliplr)
def _fliplr(a: Operand) -> Any:
    return np.flip(a, 1)


@composed(np.rot90)
def _rot90(a: Operand, k: int = 1, axes: Any = (0, 1)) -> Any:
    first, second = axes
    if k % 4 == 2:
        return np.flip(np.flip(a, first), second)
    if k % 4 == 1:
        return np.swapaxes(np.flip(a, second), first, second)
    return np.flip(np.swapaxes(a, first, second), second) if k % 4 else np.copy(a)


@composed(np.broadcast_arrays)
def _broadcast_arrays(*arrays: Operand) -> Any:
    shape = np.broadcast_shapes(*(np.shape(plain(a)) for a in arrays))
    return tuple(np.broadcast_to(a, shape) for a in arrays)


@composed(outer)
def _outer(ufunc: Any, a: Operand, b: Operand, **kwargs: Any) -> Any:
    return ufunc(np.reshape(a, (*a.shape, *(1,) * b.ndim)), b, **kwargs)


# -- several arrays into one
def _join(*arrays: Any, axis: int, bounds: list[int]) -> Any:
    return np.concatenate(arrays, axis=axis)


def _part_vjp(position: int, g: Any, y: Any, *_arrays: Any, axis: int, bounds: list[int]) -> Any:
    part = [slice(None)] * g.ndim
    part[axis] = slice(bounds[position], bounds[position + 1])
    return g[tuple(part)]


_recorded_join = Primitive(_join, Each(_part_vjp), of=np.concatenate)


@composed(np.concatenate)
def _concatenate(arrays: Operands, axis: Any = 0, out: Any = None, *, dtype: Any = None, casting: Any = None) -> Any:
    arrays = tuple(arrays)
    if axis is None:
        arrays, axis = tuple(np.ravel(a) for a in arrays), 0
    values = [plain(a) for a in arrays]
    result = np.concatenate(values, axis=axis)
    # Where each begins, found once for all of them.
    bounds = [0, *itertools.accumulate(np.shape(value)[axis] for value in values)]
    joined = _recorded_join(arrays, {"axis": axis, "bounds": bounds}, result)
    return joined if dtype is None else joined.astype(dtype)


@composed(np.stack)
def _stack(arrays: Operands, axis: int = 0, out: Any = None, *, dtype: Any = None, casting: Any = None) -> Any:
    return np.concatenate([np.expand_dims(a, axis) for a in arrays], axis=axis, dtype=dtype)


@composed(np.vstack)
def _vstack(arrays: Operands, *, dtype: Any = None, casting: Any = None) -> Any:
    return np.concatenate([np.atleast_2d(a) for a in arrays], axis=0, dtype=dtype)


@composed(np.hstack)
def _hstack(arrays: Operands, *, dtype: Any = None, casting: Any = None) -> Any:
    arrays = [np.atleast_1d(a) for a in arrays]
    return np.concatenate(arrays, axis=0 if arrays[0].ndim == 1 else 1, dtype=dtype)


@composed(np.dstack)
def _dstack(arrays: Operands) -> Any:
    return np.concatenate([np.atleast_3d(a) for a in arrays], axis=2)


@composed(np.column_stack)
def _column_stack(arrays: Operands) -> Any:
    return np.concatenate([a if a.ndim > 1 else a.reshape(-1, 1) for a in arrays], axis=1)


@composed(np.append)
def _append(arr: Operand, values: Operand, axis: Any = None) -> Any:
    return np.concatenate([arr, values], axis=axis)


# -- one array into several
def _pieces(a: Any, boundaries: Any, axis: int) -> list[Any]:
    part = [slice(None)] * a.ndim
    pieces = []
    for start, stop in zip((0, *boundaries), (*boundaries, a.shape[axis]), strict=True):
        part[axis] = slice(start, stop)
        pieces.append(a[tuple(part)])
    return pieces


@composed(np.array_split)
def _array_split(ary: Operand, indices_or_sections: Any, axis: int = 0) -> Any:
    if not np.isscalar(indices_or_sections):
        return _pieces(ary, tuple(indices_or_sections), axis)
    quotient, longer = divmod(ary.shape[axis], indices_or_sections)
    sizes = [quotient + 1] * longer + [quotient] * (indices_or_sections - longer)
    return _pieces(ary, tuple(sum(sizes[:i]) for i in range(1, len(sizes))), axis)


@composed(np.split)
def _split(ary: Operand, indices_or_sections: Any, axis: int = 0) -> Any:
    if np.isscalar(indices_or_sections) and ary.shape[axis] % indices_or_sections:
        raise ValueError("array split does not result in an equal division")
    return _array_split(ary, indices_or_sections, axis)


@composed(np.vsplit)
def _vsplit(ary: Operand, indices_or_sections: Any) -> Any:
    return _split(ary, indices_or_sections, 0)


@composed(np.hsplit)
def _hsplit(ary: Operand, indices_or_sections: Any) -> Any:
    return _split(ary, indices_or_sections, 0 if ary.ndim == 1 else 1)


@composed(np.dsplit)
def _dsplit(ary: Operand, indices_or_sections: Any) -> Any:
    return _split(ary, indices_or_sections, 2)


# -- more elements, and fewer
def _placed(a: Any, numbers: Any, axis: int) -> Any:
    """The elements along an axis whose numbers are given, in host memory."""
    return np.take(a, own(np.asarray(numbers, like=plain(a))), axis=axis)


@composed(np.delete)
def _delete(arr: Operand, obj: Any, axis: Any = None) -> Any:
    if axis is None:
        arr, axis = np.ravel(arr), 0
    return _placed(arr, np.delete(np.arange(arr.shape[axis]), obj), axis)


@composed(np.insert)
def _insert(arr: Operand, obj: Any, values: Operand, axis: Any = None) -> Any:
    if axis is None:
        arr, axis = np.ravel(arr), 0
    axis %= arr.ndim
    count = arr.shape[axis]
    values = values.astype(arr.dtype)
    values = np.reshape(values, (1,) * (arr.ndim - values.ndim) + values.shape)
    added = np.insert(np.arange(count), obj, count).size - count
    if added == 1:  # one place takes any number of values
        if np.ndim(obj) == 0 and not isinstance(obj, slice):
            values = np.moveaxis(values, 0, axis)
        added = values.shape[axis]
    numbers = np.insert(np.arange(count), obj, np.arange(count, count + added))
    values = np.broadcast_to(values, (*arr.shape[:axis], added, *arr.shape[axis + 1 :]))
    return _placed(np.concatenate([arr, values], axis=axis), numbers, axis)


@composed(np.repeat)
def _repeat(a: Operand, repeats: Any, axis: Any = None) -> Any:
    if axis is None:
        a, axis = np.ravel(a), 0
    if isinstance(repeats, int):  # a new axis, and no gather
        axis %= a.ndim
        longer = (*a.shape[: axis + 1], repeats, *a.shape[axis + 1 :])
        merged = (*a.shape[:axis], a.shape[axis] * repeats, *a.shape[axis + 1 :])
        return np.broadcast_to(np.expand_dims(a, axis + 1), longer).reshape(merged)
    return _placed(a, np.repeat(np.arange(a.shape[axis]), repeats), axis)


@composed(np.tile)
def _tile(A: Operand, reps: Any) -> Any:  # noqa: N803  # NumPy's name
    reps = tuple(reps) if isinstance(reps, tuple | list) else (reps,)
    shape = (1,) * (len(reps) - A.ndim) + tuple(A.shape)
    reps = (1,) * (len(shape) - len(reps)) + reps
    apart = [n for size in shape for n in (1, size)]
    blocks = [n for pair in zip(reps, shape, strict=True) for n in pair]
    return np.broadcast_to(A.reshape(apart), blocks).reshape([r * n for r, n in zip(reps, shape, strict=True)])


def _pad_vjp(g: Any, y: Any, a: Any, pad_width: Any, mode: str = "constant", *, constant_values: Any = 0) -> Any:
    return g[tuple(slice(before, before + n) for (before, _), n in zip(pad_width, a.shape, strict=True))]


_pad_constant = Primitive(np.pad, (_pad_vjp,))


@composed(np.pad)
def _pad(
    array: Operand, pad_width: Any, mode: str = "constant", *, constant_values: Any = 0, reflect_type: str = "even"
) -> Any:
    widths = np.broadcast_to(np.asarray(pad_width), (array.ndim, 2)).tolist()
    if mode == "constant":
        return _pad_constant((array, widths), {"constant_values": constant_values})
    if mode not in ("edge", "reflect", "symmetric", "wrap") or reflect_type != "even":
        raise missing(f'numpy.pad with mode="{mode}", reflect_type="{reflect_type}"')
    for axis, width in enumerate(widths):
        if any(width):  # what is repeated is found by padding the indices
            indices = np.pad(np.arange(array.shape[axis]), width, mode=mode)  # type: ignore[call-overload]
            array = _placed(array, indices, axis)
    return array if any(map(any, widths)) else np.copy(array)


constant(np.broadcast_shapes)
for _alias, _function in (("concat", np.concatenate), ("permute_dims", np.transpose)):
    if hasattr(np, _alias):
        OPERATIONS[getattr(np, _alias)] = OPERATIONS[_function]
