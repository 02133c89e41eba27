"""Decompositions of matrices; of what is open to choice in them only what does not depend on the choice is tested."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam.autodiff import value_and_grad
from gpu_adam.devices import Device

from .cases import Case, DerivativeTests, of_matrix, random

SHAPES = {"square": (3, 3), "tall": (5, 3), "wide": (3, 5), "stack": (2, 4, 3), "wide-stack": (2, 2, 4)}


def hermitian(np: Any, a: Any) -> Any:
    return a + np.conj(np.swapaxes(a, -1, -2))


def of_shapes(name: str, function: Callable[..., Any], **options: Any) -> list[Case]:
    """Matrices of every shape, real and complex."""
    return [
        Case(f"{name}-{label}{'-complex' * c}", function, (random(shape, c, name),), **options)
        for label, shape in SHAPES.items()
        for c in (False, True)
    ]


def adjoint(np: Any, a: Any) -> Any:
    return np.conj(np.swapaxes(a, -1, -2))


def spread(np: Any, a: Any) -> Any:
    """A function of u, s and vh together, in which their phases cancel."""
    u, s, vh = np.linalg.svd(a, full_matrices=False)
    return np.matmul(u * (s * s)[..., None, :], vh) * np.sum(s)


def null_spaces(np: Any, a: Any) -> Any:
    """The projectors to the null spaces, between which the vectors of full matrices are open to choice."""
    u, s, vh = np.linalg.svd(a)
    left, right = u[..., s.shape[-1] :], vh[..., s.shape[-1] :, :]
    return np.sum(np.matmul(left, adjoint(np, left)) ** 3) + np.sum(np.matmul(adjoint(np, right), right) ** 3)


def near(np: Any, a: Any) -> Any:
    """Of full matrices the vectors that singular values belong to."""
    u, s, vh = np.linalg.svd(a)
    count = s.shape[-1]
    return np.abs(u[..., :count, :count]) ** 2 * np.abs(vh[..., :count, :count]) ** 2 * s[..., None]


class TestHermitian(DerivativeTests):
    """Of Hermitian matrices."""

    cases = (
        *of_matrix("cholesky", lambda np, a: np.linalg.cholesky(hermitian(np, a)), hips=False),
        *of_matrix("cholesky-upper", lambda np, a: np.linalg.cholesky(hermitian(np, a), upper=True), hips=False),
        *of_matrix("eigvalsh", lambda np, a: np.linalg.eigvalsh(hermitian(np, a)), hips=False),
        *of_matrix("eigh-values", lambda np, a: np.linalg.eigh(hermitian(np, a))[0]),
        # A phase of the eigenvectors is arbitrary: only what does not depend on it has a derivative.
        *of_matrix("eigh-vectors", lambda np, a: np.abs(np.linalg.eigh(hermitian(np, a))[1]) ** 2),
        *of_matrix(
            "eigh-both",
            lambda np, a: np.abs(
                np.linalg.eigh(hermitian(np, a))[1] * np.linalg.eigh(hermitian(np, a))[0][..., None, :]
            ),
            hips=False,
        ),
    )


class TestRectangular(DerivativeTests):
    """Of matrices of every shape."""

    cases = (
        *of_shapes("values", lambda np, a: np.linalg.svd(a, compute_uv=False)),
        *of_shapes("svdvals", lambda np, a: np.linalg.svdvals(a), hips=False),
        *of_shapes("left", lambda np, a: np.abs(np.linalg.svd(a, full_matrices=False)[0]) ** 2),
        *of_shapes("right", lambda np, a: np.abs(np.linalg.svd(a, False)[2]) ** 2),
        *of_shapes("spread", spread),
        *of_shapes("near", near, hips=False),
        *of_shapes("null-spaces", null_spaces, hips=False),
        *of_shapes("q", lambda np, a: np.linalg.qr(a)[0], hips=False),
        *of_shapes("r", lambda np, a: np.linalg.qr(a)[1], hips=False),
        *of_shapes("mode-r", lambda np, a: np.linalg.qr(a, "r"), hips=False),
        *(
            one
            for one in of_shapes(
                "complete", lambda np, a: np.matmul(*np.linalg.qr(a, mode="complete")) ** 2, hips=False
            )
            if one.inputs[0].shape[-2] <= one.inputs[0].shape[-1]
        ),
    )


class TestEigenvalues(DerivativeTests):
    """Of matrices with distinct eigenvalues; those of real ones are complex in pairs."""

    cases = (
        *of_matrix("eigvals", lambda np, a: np.sort(np.linalg.eigvals(hermitian(np, a)).real), hips=False),
        *of_matrix("eigvals-general", lambda np, a: np.linalg.eigvals(a) ** 2, hips=False),
        *of_matrix("eig-values", lambda np, a: np.exp(np.linalg.eig(a)[0] / 3)),
        *of_matrix("eig-vectors", lambda np, a: np.abs(np.linalg.eig(a)[1]) ** 2),
        *of_matrix(
            "eig-both", lambda np, a: np.abs(np.linalg.eig(a)[1] * np.linalg.eig(a)[0][..., None, :]), hips=False
        ),
    )


def test_equal_eigenvalues(device: Device) -> None:
    _, gradient = value_and_grad(lambda: np.sum(np.linalg.eigh(a)[0]), a := Variable(np.eye(3)))
    np.testing.assert_allclose(device.numpy(gradient), np.eye(3), atol=1e-12)


def rotated(values: Any, rows: int, dtype: Any) -> Any:
    """A matrix with these singular values."""
    is_complex = np.dtype(dtype).kind == "c"
    u, _ = np.linalg.qr(random((rows, len(values)), is_complex, "u"))
    v, _ = np.linalg.qr(random((len(values), len(values)), is_complex, "v"))
    return ((u * np.array(values)) @ np.conj(v.T)).astype(dtype)


DTYPES = (np.float32, np.float64, np.complex64, np.complex128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [8, 11])
def test_equal_singular_values(device: Device, rows: int, dtype: Any) -> None:
    """The nearest orthogonal matrix u vh has a derivative there, whatever vectors were chosen."""
    values = [2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.5]
    start = rotated(values, rows, dtype)
    a, weights = Variable(start), device.array(random(start.shape, start.dtype.kind == "c").astype(dtype))

    def loss() -> Any:
        u, _, vh = np.linalg.svd(a, full_matrices=False)
        return np.sum((np.conj(weights) * (u @ vh)).real)

    _, gradient = value_and_grad(loss, a)
    # From the Sylvester equation of the polar decomposition, solved in the basis of a's own vectors.
    w = device.numpy(weights).astype(complex)
    u, s, vh = np.linalg.svd(start.astype(complex), full_matrices=False)
    inner = np.conj(u.T) @ w @ np.conj(vh.T)
    expected = u @ ((inner - np.conj(inner.T)) / (s + s[:, None])) @ vh
    expected = expected + (w - u @ (np.conj(u.T) @ w)) @ np.conj(vh.T) @ ((1 / s)[:, None] * vh)
    accuracy = 1e-4 if np.finfo(dtype).eps > 1e-10 else 1e-11
    np.testing.assert_allclose(device.numpy(gradient), expected, atol=accuracy)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_eigenvalues_of_rotated_matrices(device: Device, dtype: Any) -> None:
    """Computed ones differ by rounding, whose inverse must not multiply that of the vectors."""
    v, _ = np.linalg.qr(random((8, 8), np.dtype(dtype).kind == "c"))
    a = Variable(((v * np.array([1, 1, 1, 1, 2, 2, 2, 3])) @ np.conj(v.T)).astype(dtype))
    weights = device.array(random((8, 8)).astype(dtype))

    def loss() -> Any:
        top = np.linalg.eigh(a)[1][:, 4:]
        return np.sum((weights * (top @ np.conj(top.T))).real)

    _, gradient = value_and_grad(loss, a)
    # The projector to the space of the larger eigenvalues turns by 1/(2 - 1) and by 1/(3 - 1).
    inner = np.conj(v.T) @ np.conj(device.numpy(weights)) @ v
    gaps = np.array([[1, 1, 1, 2]] * 4)
    inner[:4, :4], inner[4:, 4:] = 0, 0
    inner[:4, 4:], inner[4:, :4] = inner[:4, 4:] / gaps, inner[4:, :4] / gaps.T
    expected = v @ (inner + np.conj(inner.T)) @ np.conj(v.T) / 2
    accuracy = 1e-4 if np.finfo(dtype).eps > 1e-10 else 1e-12
    np.testing.assert_allclose(device.numpy(gradient), expected, atol=accuracy)


def function_by_eigh(a: Any) -> Any:
    values, vectors = np.linalg.eigh(a)
    return (vectors * values**2) @ vectors.T


def function_by_eig(a: Any) -> Any:
    values, vectors = np.linalg.eig(a)
    return ((vectors * values**2) @ np.linalg.inv(vectors)).real


def function_by_svd(a: Any) -> Any:
    u, s, vh = np.linalg.svd(a)
    return (u * s**2) @ vh


@pytest.mark.parametrize("function", [function_by_eigh, function_by_eig, function_by_svd])
def test_functions_of_equal_values_and_vectors_are_not_a_number(device: Device, function: Any) -> None:
    """The gradient by the values would be a part of it, and pass for all of it; of distinct ones it is right."""
    distinct = Variable(np.diag([1.0, 2.0, 4.0]))
    _, gradient = value_and_grad(lambda: np.sum(function(distinct)), distinct)
    expected = np.add.outer([1.0, 2.0, 4.0], [1.0, 2.0, 4.0])  # of the sum of the square's elements
    if function is function_by_svd:  # u s^2 vh is symmetric here only
        gradient = (gradient + gradient.T) / 2
    np.testing.assert_allclose(device.numpy(gradient), expected)
    equal = Variable(np.eye(3))
    _, gradient = value_and_grad(lambda: np.sum(function(equal)), equal)
    assert np.isnan(device.numpy(gradient)).any()


def test_singular_values_of_0(device: Device) -> None:
    """The vectors of a null space are open to choice: not a number if they matter, and right if they do not."""
    start = rotated([3.0, 2.0, 0.0, 0.0], 5, float)
    a, weights = Variable(start), device.array(start / 2)

    def loss(count: int) -> Any:
        u, s, vh = np.linalg.svd(a, full_matrices=False)
        return np.sum((u[:, :count] * s[:count]) @ vh[:count] * weights)

    value, gradient = value_and_grad(lambda: loss(2), a)
    np.testing.assert_allclose(float(value), 6.5)
    np.testing.assert_allclose(device.numpy(gradient), start / 2, atol=1e-12)
    weights = device.array(random((5, 4)))
    for values in ([3.0, 2.0, 0.0, 0.0], [3.0, 2.0, 1.0, 0.0]):
        a = Variable(rotated(values, 5, float))
        _, gradient = value_and_grad(lambda: loss(4), a)
        assert np.isnan(device.numpy(gradient)).any()


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda a: np.linalg.qr(a, "complete")[1], "complete"),
        (lambda a: np.linalg.qr(a, "raw")[0], "raw"),
        (lambda a: np.linalg.svd(a[:3], hermitian=True)[1], "hermitian"),
        (lambda a: np.linalg.pinv(a[:3], hermitian=True), "hermitian"),
    ],
)
def test_what_has_no_derivative_is_refused(device: Device, loss: Any, words: str) -> None:
    a = Variable(random((4, 3)))
    with pytest.raises(NotImplementedError, match=words):
        value_and_grad(lambda: np.sum(loss(a)), a)


def test_names_of_the_results(device: Device) -> None:
    """NumPy's tuples have names, and CuPy's have none."""
    a, found = Variable(random((3, 3))), []

    def loss() -> Any:
        found.extend([np.linalg.svd(a), np.linalg.qr(a), np.linalg.eig(a), np.linalg.slogdet(a)])
        return np.sum(found[0][1])

    value_and_grad(loss, a)
    names = [getattr(result, "_fields", None) for result in found]
    host = np.eye(3)
    expected = [np.linalg.svd(host), np.linalg.qr(host), np.linalg.eig(host), np.linalg.slogdet(host)]
    assert names == [result._fields if device.xp is np else None for result in expected]  # type: ignore[attr-defined]
