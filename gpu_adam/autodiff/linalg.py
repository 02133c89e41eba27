"""Derivatives of products, inverses and determinants of matrices.

The matrix formulas are those of M. Giles, "Collected matrix derivative results for forward and reverse mode algorithmic
differentiation" (2008), with conjugates for complex matrices; that of the pseudo-inverse is equation 4.12 of G. Golub
and V. Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems whose variables separate"
(1973).
"""

# the arguments of NumPy's functions, in their order

import operator
from typing import Any

import numpy as np

from gpu_adam.autodiff.operations import OPERATIONS, missing
from gpu_adam.autodiff.reductions import products_of_others
from gpu_adam.autodiff.rules import Operand, Operands, Primitive, composed, conj, constant, derivative, plain


def adjoint(a: Any) -> Any:
    """The conjugate transpose of the matrices in the last two axes; of a sparse matrix too."""
    conjugate = conj(a)
    return conjugate.T if conjugate.ndim == 2 else conjugate.swapaxes(-1, -2)


# -- products; by the operator, which sparse matrices have as well
def _matmul_left(g: Any, y: Any, a: Any, b: Any) -> Any:
    if b.ndim == 1:
        return g[..., None] * conj(b) if a.ndim > 1 else g * conj(b)
    if a.ndim == 1:
        return (conj(b) @ g[..., None])[..., 0]
    return g @ adjoint(b)


def _matmul_right(g: Any, y: Any, a: Any, b: Any) -> Any:
    if a.ndim == 1:
        return conj(a)[:, None] * g[..., None, :] if b.ndim > 1 else g * conj(a)
    if b.ndim == 1:
        return (adjoint(a) @ g[..., None])[..., 0]
    return adjoint(a) @ g


OPERATIONS[np.matmul] = Primitive(operator.matmul, (_matmul_left, _matmul_right), of=np.matmul)


@composed(np.dot)
def _dot(a: Operand, b: Operand, out: Any = None) -> Any:
    if not (np.ndim(plain(a)) and np.ndim(plain(b))):
        return np.multiply(a, b)
    if b.ndim <= 2:
        return np.matmul(a, b)
    return np.tensordot(a, b, (-1, -2))


@composed(np.inner)
def _inner(a: Operand, b: Operand) -> Any:
    if not (np.ndim(plain(a)) and np.ndim(plain(b))):
        return np.multiply(a, b)
    return np.tensordot(a, b, (-1, -1))


@composed(np.outer)
def _outer(a: Operand, b: Operand, out: Any = None) -> Any:
    return np.ravel(a)[:, None] * np.ravel(b)[None, :]


@composed(np.vdot)
def _vdot(a: Operand, b: Operand) -> Any:
    return np.matmul(conj(np.ravel(a)), np.ravel(b))


@composed(np.kron)
def _kron(a: Operand, b: Operand) -> Any:
    ndim = max(a.ndim, b.ndim)
    first = (1,) * (ndim - a.ndim) + tuple(a.shape)
    second = (1,) * (ndim - b.ndim) + tuple(b.shape)
    a = np.reshape(a, [n for size in first for n in (size, 1)])
    b = np.reshape(b, [n for size in second for n in (1, size)])
    return np.reshape(a * b, [n * m for n, m in zip(first, second, strict=True)])


@composed(np.tensordot)
def _tensordot(a: Operand, b: Operand, axes: Any = 2) -> Any:
    if isinstance(axes, int):
        summed_a, summed_b = list(range(a.ndim - axes, a.ndim)), list(range(axes))
    else:
        summed_a, summed_b = (
            [axis % x.ndim for axis in (given if isinstance(given, tuple | list) else (given,))]
            for x, given in zip((a, b), axes, strict=True)
        )
    kept_a = [axis for axis in range(a.ndim) if axis not in summed_a]
    kept_b = [axis for axis in range(b.ndim) if axis not in summed_b]
    size = int(np.prod([a.shape[axis] for axis in summed_a], dtype=int))
    rows = [a.shape[axis] for axis in kept_a]
    columns = [b.shape[axis] for axis in kept_b]
    left = np.transpose(a, kept_a + summed_a).reshape((int(np.prod(rows, dtype=int)), size))
    right = np.transpose(b, summed_b + kept_b).reshape((size, int(np.prod(columns, dtype=int))))
    return np.matmul(left, right).reshape((*rows, *columns))


@composed(np.vecdot)
def _vecdot(a: Operand, b: Operand, *, axis: int = -1) -> Any:
    return np.sum(np.conjugate(a) * b, axis=axis)


if hasattr(np, "matvec"):

    @composed(np.matvec)
    def _matvec(a: Operand, b: Operand) -> Any:
        return np.matmul(a, np.expand_dims(b, -1))[..., 0]

    @composed(np.vecmat)
    def _vecmat(a: Operand, b: Operand) -> Any:
        return np.matmul(np.expand_dims(np.conjugate(a), -2), b)[..., 0, :]


_recorded_cross = Primitive(
    np.cross, (lambda g, y, a, b: np.cross(conj(b), g), lambda g, y, a, b: np.cross(g, conj(a)))
)


@composed(np.cross)
def _cross(a: Operand, b: Operand, axisa: int = -1, axisb: int = -1, axisc: int = -1, axis: Any = None) -> Any:
    if axis is not None:
        axisa = axisb = axisc = axis
    a, b = np.moveaxis(a, axisa, -1), np.moveaxis(b, axisb, -1)
    is_planar = a.shape[-1] == b.shape[-1] == 2
    a, b = (np.concatenate((x, np.zeros_like(plain(x)[..., :1])), axis=-1) if x.shape[-1] == 2 else x for x in (a, b))
    product = _recorded_cross((a, b), {})
    return product[..., 2] if is_planar else np.moveaxis(product, -1, axisc)


@composed(np.linalg.cross)
def _cross_in_space(x1: Operand, x2: Operand, *, axis: int = -1) -> Any:
    if not x1.shape[axis] == x2.shape[axis] == 3:
        raise ValueError(f"numpy.linalg.cross takes vectors of 3 numbers (got {x1.shape[axis]} and {x2.shape[axis]})")
    return np.cross(x1, x2, axis=axis)


# -- diagonals
def _diagonal_vjp(g: Any, y: Any, a: Any, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Any:
    total = np.zeros_like(a)
    last = np.moveaxis(total, (axis1, axis2), (-2, -1))  # a view
    first = np.arange(g.shape[-1], like=a)
    last[..., first + max(-offset, 0), first + max(offset, 0)] = g
    return total


derivative(np.diagonal, _diagonal_vjp)


@composed(np.trace)
def _trace(a: Operand, offset: int = 0, axis1: int = 0, axis2: int = 1, dtype: Any = None, out: Any = None) -> Any:
    return np.sum(np.diagonal(a, offset, axis1, axis2), axis=-1, dtype=dtype)


derivative(np.diag, lambda g, y, a, k=0: np.diag(g, k) if a.ndim == 1 else _diagonal_vjp(g, y, a, k))

# -- inverses and determinants
derivative(np.linalg.inv, lambda g, y, a: -np.matmul(adjoint(y), np.matmul(g, adjoint(y))))


def _solve_right(g: Any, y: Any, a: Any, b: Any) -> Any:
    return np.linalg.solve(adjoint(a), g[..., None])[..., 0] if b.ndim == 1 else np.linalg.solve(adjoint(a), g)


def _solve_matrix(g: Any, y: Any, a: Any, b: Any) -> Any:
    outer = _solve_right(g, y, a, b)
    if b.ndim == 1:
        return -outer[..., :, None] * conj(y)[..., None, :]
    return -np.matmul(outer, adjoint(y))


_recorded_solve = Primitive(np.linalg.solve, (_solve_matrix, _solve_right))


@composed(np.linalg.solve)
def _solve(a: Operand, b: Operand) -> Any:
    stack, other = np.shape(plain(a))[:-2], np.shape(plain(b))[:-2]
    if np.ndim(plain(b)) > 1 and stack != other:  # CuPy's does not broadcast
        stack = np.broadcast_shapes(stack, other)
        a, b = (np.broadcast_to(x, (*stack, *np.shape(plain(x))[-2:])) for x in (a, b))
    return _recorded_solve((a, b), {})


# -- pseudo-inverses, of matrices whose rank stays what it is
def _pinv_vjp(g: Any, y: Any, a: Any, rcond: Any = None) -> Any:
    back = adjoint(g)
    from_rows = np.matmul(back, np.matmul(y, adjoint(y)))
    from_columns = np.matmul(np.matmul(adjoint(y), y), back)
    return (
        (from_rows - np.matmul(a, np.matmul(y, from_rows)))  # 0 for independent rows
        + (from_columns - np.matmul(np.matmul(from_columns, y), a))  # 0 for independent columns
        - np.matmul(adjoint(y), np.matmul(g, adjoint(y)))
    )


_recorded_pinv = Primitive(np.linalg.pinv, (_pinv_vjp,))


@composed(np.linalg.pinv)
def _pinv(a: Operand, rcond: Any = None, hermitian: bool = False, *, rtol: Any = 1e-15) -> Any:
    if hermitian:
        raise missing("numpy.linalg.pinv with hermitian=True")
    if rtol is None:
        rtol = max(a.shape[-2:]) * float(np.finfo(a.dtype).eps)
    return _recorded_pinv((a,), {"rcond": rtol if rcond is None else rcond})


@composed(np.linalg.lstsq)
def _lstsq(a: Operand, b: Operand, rcond: Any = None) -> Any:
    _, residuals, rank, values = np.linalg.lstsq(plain(a), plain(b), rcond)
    eps = float(np.finfo(values.dtype).eps)
    cutoff = max(a.shape) * eps if rcond is None else eps if rcond == -1 else rcond
    solution = np.matmul(np.linalg.pinv(a, cutoff), b)
    if residuals.size:
        error = np.absolute(b - np.matmul(a, solution))
        residuals = np.sum(error * error, axis=0, keepdims=b.ndim == 1)
    return solution, residuals, rank, np.linalg.svd(a, compute_uv=False)


# -- determinants
def _regular(a: Any, singular: Any) -> Any:
    """The matrices, and in place of those that are known to be singular one that has an inverse."""
    number = np.arange(a.shape[-1], like=a)
    identity = (number == number[:, None]).astype(a.dtype)
    return np.where(singular[..., None, None], identity, a)


def _cofactors(a: Any) -> Any:
    """The conjugate of the derivative of the determinant, from singular values."""
    u, s, vh = np.linalg.svd(a)
    turn = conj(np.linalg.det(u) * np.linalg.det(vh))[..., None, None]
    return turn * np.matmul(u * products_of_others(s)[..., None, :], vh)


def _det_vjp(g: Any, y: Any, a: Any) -> Any:
    g = g[..., None, None]
    # The host waits here for the device: singular values take many times as long as an inverse.
    if (y == 0).any():
        return g * _cofactors(a)
    return g * conj(y)[..., None, None] * adjoint(np.linalg.inv(a))


def _sign_of_determinant_vjp(g: Any, sign: Any, a: Any) -> Any:
    turning = (g * conj(sign)).imag[..., None, None]  # a real sign stays what it is, and so does 0
    return 1j * turning * adjoint(np.linalg.inv(_regular(a, sign == 0)))


def _log_of_determinant_vjp(g: Any, y: Any, a: Any) -> Any:
    singular = np.isneginf(y)
    # Infinitely steep, in directions that depend on the way there; but not where the loss does not look at it.
    g = np.where(singular & (g != 0), np.nan, g)
    return g[..., None, None] * adjoint(np.linalg.inv(_regular(a, singular)))


derivative(np.linalg.det, _det_vjp)
_log_of_determinant = Primitive(np.linalg.slogdet, (_log_of_determinant_vjp,))
_sign_of_determinant = Primitive(np.linalg.slogdet, (_sign_of_determinant_vjp,))


def like(results: Any, *found: Any) -> Any:
    """Recorded values in a tuple of the kind that NumPy or CuPy returned."""
    return type(results)(*found) if hasattr(results, "_fields") else found


@composed(np.linalg.slogdet)
def _slogdet(a: Operand) -> Any:
    pair = np.linalg.slogdet(plain(a))
    logarithm = _log_of_determinant((a,), {}, pair[1])
    sign = _sign_of_determinant((a,), {}, pair[0]) if pair[0].dtype.kind == "c" else pair[0]
    return like(pair, sign, logarithm)


@composed(np.linalg.matrix_power)
def _matrix_power(a: Operand, n: int) -> Any:
    if n < 0:
        a, n = np.linalg.inv(a), -n
    if n == 0:
        return np.linalg.matrix_power(plain(a), 0)
    if n == 1:
        return np.copy(a)
    half = _matrix_power(a, n // 2)
    squared = np.matmul(half, half)
    return np.matmul(squared, a) if n % 2 else squared


@composed(np.linalg.multi_dot)
def _multi_dot(arrays: Operands, *, out: Any = None) -> Any:
    # A first vector is a row, a last one a column, as for a product of two.
    shapes = [(1, *a.shape)[-2:] if i == 0 else (*a.shape, 1)[:2] for i, a in enumerate(arrays)]
    sizes = [rows for rows, _ in shapes] + [shapes[-1][1]]
    return _product(arrays, _best_splits(sizes), 0, len(arrays))


def _product(arrays: Any, splits: Any, start: int, stop: int) -> Any:
    if stop - start == 1:
        return arrays[start]
    middle = splits[start, stop]
    return np.matmul(_product(arrays, splits, start, middle), _product(arrays, splits, middle, stop))


def _best_splits(sizes: list[int]) -> dict[tuple[int, int], int]:
    """Where to split each part of a chain of matrices, so that there are the fewest multiplications.

    Reference: T. H. Cormen et al., "Introduction to Algorithms", section "Matrix-chain multiplication".
    """
    count = len(sizes) - 1
    costs = {(i, i + 1): 0 for i in range(count)}
    splits = {}
    for length in range(2, count + 1):
        for start in range(count - length + 1):
            stop = start + length
            costs[start, stop], splits[start, stop] = min(
                (costs[start, middle] + costs[middle, stop] + sizes[start] * sizes[middle] * sizes[stop], middle)
                for middle in range(start + 1, stop)
            )
    return splits


constant(np.linalg.matrix_rank)

# -- the functions of numpy.linalg that are those of numpy, for matrices in the last axes
for _name in ("matmul", "outer", "tensordot", "vecdot"):
    OPERATIONS[getattr(np.linalg, _name)] = OPERATIONS[getattr(np, _name)]


@composed(np.linalg.diagonal)
def _diagonal_of_matrices(x: Operand, *, offset: int = 0) -> Any:
    return np.diagonal(x, offset, -2, -1)


@composed(np.linalg.trace)
def _trace_of_matrices(x: Operand, *, offset: int = 0, dtype: Any = None) -> Any:
    return np.trace(x, offset, -2, -1, dtype)
