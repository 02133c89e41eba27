"""Derivatives of products and of linear algebra.

The matrix formulas are those of M. Giles, "Collected matrix derivative results for forward and reverse mode algorithmic
differentiation" (2008), with conjugates for complex matrices.
"""

# the arguments of NumPy's functions, in their order

from typing import Any

import numpy as np

from gpu_adam.autodiff.operations import OPERATIONS, missing
from gpu_adam.autodiff.reductions import with_axes
from gpu_adam.autodiff.rules import Operand, Primitive, composed, conj, constant, derivative, own, plain


def _adjoint(a: Any) -> Any:
    return conj(a).swapaxes(-1, -2)


# -- products
def _matmul_left(g: Any, y: Any, a: Any, b: Any) -> Any:
    if b.ndim == 1:
        return g[..., None] * conj(b) if a.ndim > 1 else g * conj(b)
    if a.ndim == 1:
        return np.matmul(conj(b), g[..., None])[..., 0]
    return np.matmul(g, _adjoint(b))


def _matmul_right(g: Any, y: Any, a: Any, b: Any) -> Any:
    if a.ndim == 1:
        return conj(a)[:, None] * g[..., None, :] if b.ndim > 1 else g * conj(a)
    if b.ndim == 1:
        return np.matmul(_adjoint(a), g[..., None])[..., 0]
    return np.matmul(_adjoint(a), g)


derivative(np.matmul, _matmul_left, _matmul_right)


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


@composed(np.multiply.outer)
def _multiply_outer(a: Operand, b: Operand) -> Any:
    return np.reshape(a, (*np.shape(plain(a)), *(1,) * np.ndim(plain(b)))) * b


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


if hasattr(np, "vecdot"):

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
derivative(np.linalg.inv, lambda g, y, a: -np.matmul(_adjoint(y), np.matmul(g, _adjoint(y))))


def _solve_right(g: Any, y: Any, a: Any, b: Any) -> Any:
    return np.linalg.solve(_adjoint(a), g[..., None])[..., 0] if b.ndim == 1 else np.linalg.solve(_adjoint(a), g)


def _solve_matrix(g: Any, y: Any, a: Any, b: Any) -> Any:
    outer = _solve_right(g, y, a, b)
    if b.ndim == 1:
        return -outer[..., :, None] * conj(y)[..., None, :]
    return -np.matmul(outer, _adjoint(y))


_recorded_solve = Primitive(np.linalg.solve, (_solve_matrix, _solve_right))


@composed(np.linalg.solve)
def _solve(a: Operand, b: Operand) -> Any:
    stack, other = np.shape(plain(a))[:-2], np.shape(plain(b))[:-2]
    if np.ndim(plain(b)) > 1 and stack != other:  # CuPy's does not broadcast
        stack = np.broadcast_shapes(stack, other)
        a, b = (np.broadcast_to(x, (*stack, *np.shape(plain(x))[-2:])) for x in (a, b))
    return _recorded_solve((a, b), {})


derivative(np.linalg.det, lambda g, y, a: (g * conj(y))[..., None, None] * _adjoint(np.linalg.inv(a)))


def _sign_of_determinant_vjp(g: Any, sign: Any, a: Any) -> Any:
    turning = (g * conj(sign)).imag[..., None, None]  # a real sign stays what it is
    return 1j * turning * _adjoint(np.linalg.inv(a))


_log_of_determinant = Primitive(np.linalg.slogdet, (lambda g, y, a: g[..., None, None] * _adjoint(np.linalg.inv(a)),))
_sign_of_determinant = Primitive(np.linalg.slogdet, (_sign_of_determinant_vjp,))


def _like_pair(pair: Any, first: Any, second: Any) -> Any:
    return type(pair)(first, second) if hasattr(pair, "_fields") else (first, second)


@composed(np.linalg.slogdet)
def _slogdet(a: Operand) -> Any:
    pair = np.linalg.slogdet(plain(a))
    logarithm = _log_of_determinant((a,), {}, pair[1])
    sign = _sign_of_determinant((a,), {}, pair[0]) if pair[0].dtype.kind == "c" else pair[0]
    return _like_pair(pair, sign, logarithm)


# -- factorisations; of a matrix that is taken to be Hermitian, and so is its gradient
def _hermitian(a: Any) -> Any:
    return (a + _adjoint(a)) / 2


def _cholesky_vjp(g: Any, lower: Any, a: Any) -> Any:
    inner = np.matmul(_adjoint(lower), np.tril(g))
    inner = (np.tril(inner) + np.tril(inner, -1)) / 2  # the lower half, and of the diagonal a half
    inverse = np.linalg.inv(lower)
    return _hermitian(np.matmul(_adjoint(inverse), np.matmul(inner, inverse)))


_lower_cholesky = Primitive(np.linalg.cholesky, (_cholesky_vjp,))


@composed(np.linalg.cholesky)
def _cholesky(a: Operand, *, upper: bool = False) -> Any:
    lower = _lower_cholesky((a,), {})
    return conj(lower).swapaxes(-1, -2) if upper else lower


def _eigenvalues_vjp(g: Any, values: Any, a: Any, vectors: Any) -> Any:
    return np.matmul(vectors * g[..., None, :], _adjoint(vectors))


def _eigenvectors_vjp(g: Any, vectors: Any, a: Any, values: Any) -> Any:
    gaps = values[..., None, :] - values[..., :, None]
    # Equal eigenvalues: only what does not depend on the choice of their vectors has a gradient, and it needs no term.
    equal = gaps == 0
    # Not a division by infinity: of a complex number that is NaN in CuPy.
    inner = np.matmul(_adjoint(vectors), g) * np.where(equal, 0, 1 / np.where(equal, 1, gaps))
    return _hermitian(np.matmul(vectors, np.matmul(inner, _adjoint(vectors))))


_eigenvalues = Primitive(np.linalg.eigh, (_eigenvalues_vjp,))
_eigenvectors = Primitive(np.linalg.eigh, (_eigenvectors_vjp,))


@composed(np.linalg.eigh)
def _eigh(a: Operand, UPLO: Any = "L") -> Any:  # noqa: N803  # NumPy's name
    pair = np.linalg.eigh(plain(a), UPLO)
    values, vectors = pair
    found = _eigenvalues((a, own(vectors)), {}, values), _eigenvectors((a, own(values)), {}, vectors)
    return _like_pair(pair, *found)


@composed(np.linalg.eigvalsh)
def _eigvalsh(a: Operand, UPLO: Any = "L") -> Any:  # noqa: N803
    return _eigh(a, UPLO)[0]


# -- norms
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
    if ord is None or (ord == 2 and count == 1) or (ord == "fro" and count == 2):
        return _recorded_euclidean((x,), {"axis": axis, "keepdims": keepdims})
    if count == 1:
        return _vector_norm(x, ord, axis, keepdims)
    if ord in (1, -1, np.inf, -np.inf):
        return _matrix_norm(x, ord, axis or (0, 1), keepdims)
    raise missing(f"numpy.linalg.norm of a matrix with ord={ord!r}")


def _vector_norm(x: Any, ord: Any, axis: Any, keepdims: bool) -> Any:
    if ord == np.inf:
        return np.max(np.absolute(x), axis=axis, keepdims=keepdims)
    if ord == -np.inf:
        return np.min(np.absolute(x), axis=axis, keepdims=keepdims)
    if ord == 1:
        return np.sum(np.absolute(x), axis=axis, keepdims=keepdims)
    if ord == 0:
        return np.linalg.norm(plain(x), 0, axis, keepdims)
    return _recorded_power_norm((x,), {"ord": ord, "axis": axis, "keepdims": keepdims})


def _matrix_norm(x: Any, ord: Any, axis: Any, keepdims: bool) -> Any:
    rows, columns = axis if abs(ord) == 1 else axis[::-1]
    sums = np.sum(np.absolute(x), axis=rows, keepdims=True)
    extreme = (np.max if ord > 0 else np.min)(sums, axis=columns, keepdims=True)
    return extreme if keepdims else np.squeeze(extreme, axis=tuple(axis))


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


constant(np.linalg.matrix_rank)
for _name in ("matmul", "outer", "tensordot", "matrix_transpose", "vecdot"):
    if hasattr(np.linalg, _name) and getattr(np, _name, None) in OPERATIONS:
        OPERATIONS[getattr(np.linalg, _name)] = OPERATIONS[getattr(np, _name)]
