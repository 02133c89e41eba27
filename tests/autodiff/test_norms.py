"""Norms of vectors and matrices."""

from typing import Any

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam.autodiff import value_and_grad
from gpu_adam.devices import Device

from .cases import DerivativeTests, both


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
            for order in (1, -1, 2, -2, "nuc", np.inf, -np.inf)
            for one in both(f"matrix-{order}", lambda np, x, order=order: np.linalg.norm(x, order), (3, 4), hips=False)
        ),
        *both("order-0", lambda np, x: x * np.linalg.norm(x, 0, axis=0), (3, 4), hips=False),
        *(
            one
            for order in (1, 2, 2.0, -2, "nuc", "fro", np.inf)
            for one in both(
                f"matrices-{order}-{type(order).__name__}",
                lambda np, x, order=order: np.linalg.norm(x, order, (2, 0)) * np.linalg.norm(x, order, (-1, 0), True),
                (3, 2, 4),
                hips=False,
            )
        ),
        *(
            one
            for order in (0.5, 1, 2, 3, np.inf, -np.inf)
            for one in both(
                f"vector_norm-{order}",
                lambda np, x, order=order: (
                    np.linalg.vector_norm(x, axis=(0, -1), ord=order)
                    * np.linalg.vector_norm(x, ord=order, keepdims=True)
                    * np.linalg.vector_norm(x, ord=order)
                ),
                (3, 2, 4),
                hips=False,
            )
        ),
        *(
            one
            for order in (1, 2, "nuc", "fro", -np.inf)
            for one in both(
                f"matrix_norm-{order}",
                lambda np, x, order=order: np.linalg.matrix_norm(x, ord=order, keepdims=True) * x,
                (2, 3, 4),
                hips=False,
            )
        ),
    )


def test_norm_of_zero(device: Device) -> None:
    _, gradient = value_and_grad(lambda: np.linalg.norm(x), x := Variable(np.zeros(3)))
    assert gradient.tolist() == [0, 0, 0]


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


@pytest.mark.parametrize("ord", [2, "nuc"])
def test_norms_of_a_matrix_of_zeros_have_no_slope(device: Device, ord: Any) -> None:
    value, gradient = value_and_grad(lambda: np.linalg.norm(x, ord), x := Variable(np.zeros((3, 2))))
    assert (float(value), np.abs(device.numpy(gradient)).sum()) == (0, 0)


def test_norms_of_equal_singular_values_have_a_slope_of_one(device: Device) -> None:
    """Each of the gradients that meet there is one: of the largest value, of any of the sum."""
    x = Variable(2 * np.eye(3))
    _, gradient = value_and_grad(lambda: np.linalg.norm(x, "nuc"), x)
    np.testing.assert_allclose(device.numpy(gradient), np.eye(3), atol=1e-12)
    _, gradient = value_and_grad(lambda: np.linalg.norm(x, 2), x)
    np.testing.assert_allclose(np.linalg.svd(device.numpy(gradient), compute_uv=False), [1, 0, 0], atol=1e-12)


def test_norm_that_there_is_not(device: Device) -> None:
    x = Variable(np.ones((2, 2)))
    with pytest.raises(NotImplementedError, match="norm of a matrix with ord=3"):
        value_and_grad(lambda: np.linalg.norm(x, 3), x)
