"""Products and linear algebra."""

from typing import Any

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam.autodiff import value_and_grad
from gpu_adam.devices import Device

from .cases import Case, DerivativeTests, both, case, random


def regular(*shape: int, is_complex: bool = False) -> Any:
    """Well-conditioned matrices."""
    return random(shape, is_complex, "regular") + 4 * np.eye(shape[-1])


def hermitian(np: Any, a: Any) -> Any:
    return a + np.conj(np.swapaxes(a, -1, -2))


def of_matrix(name: str, function: Any, *more: Any, **options: Any) -> list[Case]:
    """On one matrix and on a stack of them, real and complex."""
    return [
        Case(
            f"{name}{'-stack' * (len(shape) > 2)}{'-complex' * c}",
            function,
            (regular(*shape, is_complex=c), *more),
            **options,
        )
        for shape in ((3, 3), (2, 3, 3))
        for c in (False, True)
    ]


class TestProducts(DerivativeTests):
    """Products and diagonals."""

    cases = (
        *(
            one
            for label, shapes in {
                "2-2": ((3, 4), (4, 2)),
                "1-1": ((4,), (4,)),
                "1-2": ((4,), (4, 2)),
                "2-1": ((3, 4), (4,)),
                "3-2": ((2, 3, 4), (4, 2)),
                "2-3": ((3, 4), (2, 4, 2)),
                "3-1": ((2, 3, 4), (4,)),
                "1-3": ((4,), (2, 4, 3)),
                "broadcast": ((2, 1, 3, 4), (3, 4, 2)),
                "zero-size": ((3, 0), (0, 2)),
            }.items()
            for one in both(
                f"matmul-{label}", lambda np, a, b: np.matmul(a, b) + a @ b, *shapes, hips=label != "zero-size"
            )
        ),
        *(
            one
            for shapes in (((3, 4), (4, 2)), ((4,), (4,)), ((3, 4), ()), ((2, 3, 4), (4,)), ((2, 3, 4), (5, 4, 2)))
            for one in both(f"dot-{len(shapes[0])}-{len(shapes[1])}", lambda np, a, b: np.dot(a, b), *shapes)
        ),
        *both("inner", lambda np, a, b: np.inner(a, b), (2, 4), (3, 4)),
        *both("dot-method", lambda np, a, b: (a * 1).dot(b), (2, 3), (3,), hips=False),
        *both("outer", lambda np, a, b: np.outer(a, b), (3,), (2,)),
        *both("outer-flattens", lambda np, a, b: np.outer(a, b), (3,), (2, 2), hips=False),
        *both("multiply-outer", lambda np, a, b: np.multiply.outer(a, b), (3,), (2, 2), hips=False),
        *both("vdot", lambda np, a, b: np.vdot(a, b), (3, 2), (3, 2), hips=False),
        *(
            [  # since NumPy 2.2
                *both("matvec", lambda np, a, b: np.matvec(a, b), (2, 3, 4), (4,), hips=False),
                *both("vecmat", lambda np, a, b: np.vecmat(a, b), (3,), (2, 3, 4), hips=False),
            ]
            if hasattr(np, "matvec")
            else []
        ),
        *both("vecdot", lambda np, a, b: np.vecdot(a, b), (3, 2), (2,), hips=False),
        *both("kron", lambda np, a, b: np.kron(a, b), (2, 3), (3, 2)),
        *both("tensordot", lambda np, a, b: np.tensordot(a, b), (2, 3, 4), (3, 4, 5)),
        *both("tensordot-0", lambda np, a, b: np.tensordot(a, b, 0), (2,), (3,)),
        *both("tensordot-axes", lambda np, a, b: np.tensordot(a, b, axes=([2, 0], [0, -1])), (2, 3, 4), (4, 5, 2)),
        *both("trace", lambda np, x: np.trace(x) + np.trace(x, 1) * (x * 2).trace(), (3, 4)),
        *both("trace-axes", lambda np, x: np.trace(x, -1, 2, 0), (3, 2, 4), hips=False),
        *both("diagonal", lambda np, x: np.diagonal(x, 1) * (x * 2).diagonal(-1)[..., :1], (4, 3), hips=False),
        *both("diagonal-axes", lambda np, x: np.diagonal(x, 0, -1, 0), (3, 2, 4), hips=False),
        *both("diag", lambda np, x: np.diag(np.diag(x, 1), -1), (3, 4), hips=False),
    )


class TestLinearAlgebra(DerivativeTests):
    """On one matrix and on stacks."""

    cases = (
        *of_matrix("inv", lambda np, a: np.linalg.inv(a)),
        *of_matrix("det", lambda np, a: np.linalg.det(a)),
        *of_matrix("slogdet", lambda np, a: np.linalg.slogdet(a)[1], hips=False),
        *of_matrix("slogdet-sign", lambda np, a: np.linalg.slogdet(a)[0] * np.linalg.slogdet(a)[1], hips=False),
        *of_matrix("solve", lambda np, a, b: np.linalg.solve(a, b), random((3, 2)), hips=False),
        case("solve-vector", lambda np, a, b: np.linalg.solve(a, b), regular(3, 3), (3,)),
        Case(
            "solve-complex",
            lambda np, a, b: np.linalg.solve(a, b),
            (regular(2, 3, 3, is_complex=True), random((2, 3, 2), True)),
        ),
        *of_matrix("cholesky", lambda np, a: np.linalg.cholesky(hermitian(np, a)), hips=False),
        *of_matrix("cholesky-upper", lambda np, a: np.linalg.cholesky(hermitian(np, a), upper=True), hips=False),
        *of_matrix("eigvalsh", lambda np, a: np.linalg.eigvalsh(hermitian(np, a)), hips=False),
        *of_matrix("eigh-values", lambda np, a: np.linalg.eigh(hermitian(np, a))[0], hips=False),
        # A phase of the eigenvectors is arbitrary: only what does not depend on it has a derivative.
        *of_matrix("eigh-vectors", lambda np, a: np.abs(np.linalg.eigh(hermitian(np, a))[1]) ** 2, hips=False),
        *of_matrix(
            "eigh-both",
            lambda np, a: np.abs(
                np.linalg.eigh(hermitian(np, a))[1] * np.linalg.eigh(hermitian(np, a))[0][..., None, :]
            ),
            hips=False,
        ),
        *of_matrix(
            "matrix_power", lambda np, a: np.linalg.matrix_power(a, 5) + np.linalg.matrix_power(a, -2), hips=False
        ),
        *of_matrix("norm", lambda np, a: np.linalg.norm(a)),
    )


class TestNorms(DerivativeTests):
    """Norms of vectors and matrices."""

    cases = (
        *both("vector", lambda np, x: np.linalg.norm(x), (4,)),
        *both("axis", lambda np, x: np.linalg.norm(x, axis=1), (3, 4)),
        *both(
            "kept",
            lambda np, x: np.linalg.norm(x, axis=-1, keepdims=True) * np.linalg.norm(x, axis=(0, 1), keepdims=True),
            (3, 4),
            hips=False,
        ),
        *both("frobenius", lambda np, x: np.linalg.norm(x, "fro", axis=(0, 2)), (2, 3, 4), hips=False),
        *(
            one
            for order in (1, 2, 3, 0.5, np.inf, -np.inf)
            for one in both(
                f"order-{order}", lambda np, x, order=order: np.linalg.norm(x, order, axis=0), (3, 4), hips=False
            )
        ),
        *(
            one
            for order in (1, -1, np.inf, -np.inf)
            for one in both(f"matrix-{order}", lambda np, x, order=order: np.linalg.norm(x, order), (3, 4), hips=False)
        ),
    )


def test_norm_of_zero(device: Device) -> None:
    _, gradient = value_and_grad(lambda: np.linalg.norm(x), x := Variable(np.zeros(3)))
    assert gradient.tolist() == [0, 0, 0]


def test_spectral_norm_is_not_there(device: Device) -> None:
    x = Variable(np.ones((2, 2)))
    with pytest.raises(NotImplementedError, match="norm of a matrix with ord=2"):
        value_and_grad(lambda: np.linalg.norm(x, 2), x)


def test_equal_eigenvalues(device: Device) -> None:
    _, gradient = value_and_grad(lambda: np.sum(np.linalg.eigh(a)[0]), a := Variable(np.eye(3)))
    np.testing.assert_allclose(device.numpy(gradient), np.eye(3), atol=1e-12)


@pytest.mark.parametrize("ord", [None, 1, 2, np.inf, 3, 1.5, 0.5])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_norms_at_zero_have_no_slope(device: Device, ord: Any, axis: Any) -> None:
    """As torch has it: in a row or vector of zeros, and for a single zero where the power's own slope is infinite."""
    zero = Variable(np.zeros(3)) if axis is None else Variable(np.zeros((3, 3)))
    value, gradient = value_and_grad(lambda: np.sum(np.linalg.norm(zero, ord, axis)), zero)
    assert (float(value), np.abs(device.numpy(gradient)).sum()) == (0, 0)
    some = Variable(np.array([0.0, 3.0, -4.0]))
    with np.errstate(divide="ignore"):
        _, gradient = value_and_grad(lambda: np.linalg.norm(some, -2), some)  # 0, as the first element has it
    assert device.numpy(gradient).tolist() == [0, 0, 0]
    _, gradient = value_and_grad(lambda: np.linalg.norm(some, ord), some)
    found = device.numpy(gradient)
    assert found[0] == 0
    assert np.isfinite(found).all()
    assert (np.sign(found) == [0, ord != np.inf, -1]).all()


@pytest.mark.parametrize("ord", [3, 1.5, 0.5])
def test_norms_of_numbers_whose_powers_leave_the_range(device: Device, ord: float) -> None:
    for scale in (1e-80, 1.0, 1e80):
        x = Variable(np.array([1.0, 2.0]) * scale)
        _, gradient = value_and_grad(lambda: np.linalg.norm(x, ord), x)  # noqa: B023
        ratio = np.array([1.0, 2.0]) / np.linalg.norm([1.0, 2.0], ord)
        np.testing.assert_allclose(device.numpy(gradient), ratio ** (ord - 1), rtol=1e-12)
