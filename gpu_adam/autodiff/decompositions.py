"""Derivatives of the decompositions of matrices.

What a decomposition leaves to choice (phases of vectors, the basis of a space that equal values share, or of a null
space) has no derivative: gradients are those of losses that do not depend on the choice.  Where values are equal, the
gradient of a loss by its vectors, u @ vh or a projector for example, is finite and right.  That of a loss of equal
values and their vectors together, (vectors * f(values)) @ vectors.T for example, cannot be told from the gradients of
the two apart: it is not a number.

    cholesky, eigh    M. Giles, "Collected matrix derivative results for forward and reverse mode algorithmic
                      differentiation" (2008), with conjugates for complex matrices
    svd, eig          C. Boeddeker et al., "On the computation of complex-valued gradients with application to
                      statistically optimum beamforming" (2017)
    qr                S. Walter, L. Lehmann, "Algorithmic differentiation of linear algebra functions" (2010)
"""

# the arguments of NumPy's functions, in their order

from typing import Any

import numpy as np

from gpu_adam.autodiff.linalg import adjoint, like
from gpu_adam.autodiff.operations import missing
from gpu_adam.autodiff.rules import Operand, Primitive, composed, conj, own, plain

# Values nearer to each other than so many roundings of the largest one count as equal: LAPACK's error.
_ROUNDINGS = 16


def _inverse(x: Any, scale: Any) -> Any:
    """1/x, and 0 where x is no more than rounding of what is as large as `scale`."""
    none = np.absolute(x) <= _ROUNDINGS * float(np.finfo(x.dtype).eps) * scale
    # Not a division by infinity: of a complex number that is NaN in CuPy.
    return np.where(none, 0, 1 / np.where(none, 1, x))


def _inverse_gaps(values: Any) -> Any:
    """1/(values[j] - values[i]) at [i, j], and 0 where they are equal: what needs no choice needs no term there."""
    largest = np.max(np.absolute(values), axis=-1)[..., None, None] if values.shape[-1] else 0
    return _inverse(values[..., None, :] - values[..., :, None], largest)


class _Use:
    """Whether a loss uses the vectors of a decomposition, whose rules run before that of its values."""

    def __init__(self) -> None:
        self.vectors = False

    def gradient(self, g: Any, values: Any, scale: Any = None) -> Any:
        """The gradient of the values, not a number where that of the matrix cannot be told."""
        if not self.vectors:
            return g
        open_to_choice = (_inverse_gaps(values) == 0).sum(axis=-1) > 1  # besides the value itself
        if scale is not None:
            open_to_choice = open_to_choice | (_inverse(values, scale) == 0)
        return np.where(open_to_choice & (g != 0), np.nan, g)


# -- of a matrix that is taken to be Hermitian, and so is its gradient
def _hermitian(a: Any) -> Any:
    return (a + adjoint(a)) / 2


def _cholesky_vjp(g: Any, lower: Any, a: Any) -> Any:
    inner = np.matmul(adjoint(lower), np.tril(g))
    inner = (np.tril(inner) + np.tril(inner, -1)) / 2  # the lower half, and of the diagonal a half
    inverse = np.linalg.inv(lower)
    return _hermitian(np.matmul(adjoint(inverse), np.matmul(inner, inverse)))


_lower_cholesky = Primitive(np.linalg.cholesky, (_cholesky_vjp,))


@composed(np.linalg.cholesky)
def _cholesky(a: Operand, *, upper: bool = False) -> Any:
    lower = _lower_cholesky((a,), {})
    return conj(lower).swapaxes(-1, -2) if upper else lower


def _hermitian_values_vjp(g: Any, values: Any, a: Any, vectors: Any, use: _Use) -> Any:
    return np.matmul(vectors * use.gradient(g, values)[..., None, :], adjoint(vectors))


def _hermitian_vectors_vjp(g: Any, vectors: Any, a: Any, values: Any, use: _Use) -> Any:
    use.vectors = True
    inner = np.matmul(adjoint(vectors), g) * _inverse_gaps(values)
    return _hermitian(np.matmul(vectors, np.matmul(inner, adjoint(vectors))))


_hermitian_values = Primitive(np.linalg.eigh, (_hermitian_values_vjp,))
_hermitian_vectors = Primitive(np.linalg.eigh, (_hermitian_vectors_vjp,))


@composed(np.linalg.eigh)
def _eigh(a: Operand, UPLO: Any = "L") -> Any:  # noqa: N803  # NumPy's name
    pair = np.linalg.eigh(plain(a), UPLO)
    (values, vectors), use = pair, _Use()
    found = _hermitian_values((a, own(vectors), use), {}, values)
    return like(pair, found, _hermitian_vectors((a, own(values), use), {}, vectors))


@composed(np.linalg.eigvalsh)
def _eigvalsh(a: Operand, UPLO: Any = "L") -> Any:  # noqa: N803
    return _eigh(a, UPLO)[0]


# -- of a square matrix with distinct eigenvalues; equal ones may have too few vectors to come back from
def _values_vjp(g: Any, values: Any, a: Any, vectors: Any, use: _Use) -> Any:
    return np.linalg.solve(adjoint(vectors), use.gradient(g, values)[..., :, None] * adjoint(vectors))


def _vectors_vjp(g: Any, vectors: Any, a: Any, values: Any, use: _Use) -> Any:
    use.vectors = True
    across = np.matmul(adjoint(vectors), g)
    # Vectors have norm 1: what would lengthen one is taken out.
    along = np.diagonal(across, axis1=-2, axis2=-1).real[..., None, :]
    inner = across - np.matmul(adjoint(vectors), vectors) * along
    inner = inner * conj(_inverse_gaps(values))
    return np.linalg.solve(adjoint(vectors), np.matmul(inner, adjoint(vectors)))


_values = Primitive(np.linalg.eig, (_values_vjp,))
_vectors = Primitive(np.linalg.eig, (_vectors_vjp,))


@composed(np.linalg.eig)
def _eig(a: Operand) -> Any:
    pair = np.linalg.eig(plain(a))
    (values, vectors), use = pair, _Use()
    found = _values((a, own(vectors), use), {}, values)
    return like(pair, found, _vectors((a, own(values), use), {}, vectors))


@composed(np.linalg.eigvals)
def _eigvals(a: Operand) -> Any:
    return _eig(a)[0]


# -- singular values
def _singular_values_vjp(g: Any, s: Any, a: Any, u: Any, vh: Any, use: _Use) -> Any:
    # At 0 a corner, whose slope is 0 as that of the absolute value.
    return np.matmul(u * (use.gradient(g, s, s[..., :1]) * np.sign(s))[..., None, :], vh)


def _left_vjp(g: Any, u: Any, a: Any, s: Any, vh: Any, use: _Use) -> Any:
    """The gradient of u s vh by its left vectors; for k of them in m dimensions.

    With dP = u^H da v, the vectors turn by u^H du = X + Y, where X[i, j] = (dP - dP^H)[i, j] / 2 (s[i] + s[j]) also
    turns the right ones, backwards, and Y[i, j] = (dP + dP^H)[i, j] / 2 (s[j] - s[i]) turns both alike.  Equal singular
    values leave Y to choice, but not X.
    """
    use.vectors = True
    largest = s[..., :1]
    turns = np.matmul(adjoint(u), g)
    sums = _inverse(s[..., None, :] + s[..., :, None], largest[..., None])
    inner = (turns - adjoint(turns)) / 2 * (_inverse_gaps(s) + sums)
    gradient = np.matmul(u, inner)
    if u.shape[-2] > u.shape[-1]:  # out of the space of the k vectors
        gradient = gradient + (g - np.matmul(u, turns)) * _inverse(s, largest)[..., None, :]
    return np.matmul(gradient, vh)


def _right_vjp(g: Any, vh: Any, a: Any, u: Any, s: Any, use: _Use) -> Any:
    return adjoint(_left_vjp(adjoint(g), adjoint(vh), a, s, adjoint(u), use))


def _further_left_vjp(g: Any, further: Any, a: Any, u: Any, s: Any, vh: Any) -> Any:
    """The gradient by the vectors that no singular value belongs to: they stay at right angles to the others."""
    inverse = _inverse(s, s[..., :1])[..., None, :]
    return -np.matmul(further, np.matmul(np.matmul(adjoint(g), u) * inverse, vh))


def _further_right_vjp(g: Any, further: Any, a: Any, u: Any, s: Any, vh: Any) -> Any:
    return adjoint(_further_left_vjp(adjoint(g), adjoint(further), a, adjoint(vh), s, adjoint(u)))


_singular_values = Primitive(np.linalg.svd, (_singular_values_vjp,))
_left = Primitive(np.linalg.svd, (_left_vjp,))
_right = Primitive(np.linalg.svd, (_right_vjp,))
_further_left = Primitive(np.linalg.svd, (_further_left_vjp,))
_further_right = Primitive(np.linalg.svd, (_further_right_vjp,))


@composed(np.linalg.svd)
def _svd(a: Operand, full_matrices: bool = True, compute_uv: bool = True, hermitian: bool = False) -> Any:
    if hermitian:
        raise missing("numpy.linalg.svd with hermitian=True")
    full_matrices = full_matrices and compute_uv
    found = np.linalg.svd(plain(a), full_matrices=full_matrices)
    u, s, vh = found
    count = s.shape[-1]
    first_u, first_vh, use = own(u[..., :count]), own(vh[..., :count, :]), _Use()
    values = _singular_values((a, first_u, first_vh, use), {}, s)
    if not compute_uv:
        return values
    left = _left((a, own(s), first_vh, use), {}, first_u.array)
    right = _right((a, first_u, own(s), use), {}, first_vh.array)
    rest = (a, first_u, own(s), first_vh)
    if u.shape[-1] > count:
        left = np.concatenate([left, _further_left(rest, {}, u[..., count:])], axis=-1)
    if vh.shape[-2] > count:
        right = np.concatenate([right, _further_right(rest, {}, vh[..., count:, :])], axis=-2)
    return like(found, left, values, right)


@composed(np.linalg.svdvals)
def _svdvals(x: Operand) -> Any:
    return _svd(x, compute_uv=False)


# -- orthogonal and triangular, of at least as many rows as columns, the columns independent
def _triangular(g: Any) -> Any:
    """The adjoint of taking from b + b^H the upper triangle with half the diagonal."""
    half = (np.triu(g) + np.triu(g, 1)) / 2
    return half + adjoint(half)


def _divided(g: Any, r: Any) -> Any:
    """Solves x r^H = g."""
    return adjoint(np.linalg.solve(r, adjoint(g)))


def _orthogonal_vjp(g: Any, q: Any, a: Any, r: Any) -> Any:
    return _divided(g - np.matmul(q, _triangular(np.matmul(adjoint(q), g))), r)


def _upper_vjp(g: Any, r: Any, a: Any, q: Any) -> Any:
    return _divided(np.matmul(q, _triangular(np.matmul(g, adjoint(r)))), r)


_orthogonal = Primitive(np.linalg.qr, (_orthogonal_vjp,))
_upper = Primitive(np.linalg.qr, (_upper_vjp,))


@composed(np.linalg.qr)
def _qr(a: Operand, mode: str = "reduced") -> Any:
    rows, columns = np.shape(plain(a))[-2:]
    if mode not in ("reduced", "complete", "r"):
        raise missing(f"numpy.linalg.qr with mode={mode!r}")
    if mode == "complete" and rows > columns:
        raise missing('numpy.linalg.qr with mode="complete" of more rows than columns, where q is open to choice,')
    # The further columns of a wide matrix only come to be expressed in the basis that the first ones give.
    square = a[..., :rows] if columns > rows else a
    pair = np.linalg.qr(plain(square))
    q, r = pair
    left, right = _orthogonal((square, own(r)), {}, q), _upper((square, own(q)), {}, r)
    if columns > rows:
        right = np.concatenate([right, np.matmul(conj(left).swapaxes(-1, -2), a[..., rows:])], axis=-1)
    return right if mode == "r" else like(pair, left, right)
