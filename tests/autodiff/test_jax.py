"""Functions of JAX inside a loss."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gpu_adam import ArgumentTypeError, ArgumentValueError, Variable
from gpu_adam.autodiff import value_and_grad

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from gpu_adam.autodiff.jax import differentiable  # noqa: E402  # needs JAX


@pytest.fixture
def wide() -> Iterator[None]:
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@differentiable
def squares(w: Any, scale: Any) -> Any:
    return jnp.sum(jnp.abs(w) ** 2) * scale


def test_gradients() -> None:
    w = Variable(np.array([3, 4], np.float32))
    value, gradient = value_and_grad(lambda: squares(w, 2.0), w)
    assert value == 50
    assert gradient.dtype == np.float32
    assert gradient.tolist() == [12, 16]


def test_complex_gradients_point_uphill() -> None:
    z = Variable(np.array([3 + 4j, 1j], np.complex64))
    _, gradient = value_and_grad(lambda: squares(z, 1.0), z)
    np.testing.assert_allclose(gradient, 2 * z.value)


def test_part_of_a_larger_loss() -> None:
    w, scale, other = (Variable(np.array(v, np.float32)) for v in ([1.0, 2.0], 3.0, 5.0))
    _, found = value_and_grad(lambda: np.sqrt(squares(np.exp(w), scale)) + other, [w, scale, other])
    inner = np.sum(np.exp(2 * w.value))
    np.testing.assert_allclose(found[0], np.sqrt(3 / inner) * np.exp(2 * w.value), rtol=1e-5)
    np.testing.assert_allclose(found[1], np.sqrt(inner / 3) / 2, rtol=1e-5)
    assert found[2] == 1


def test_outside_a_loss() -> None:
    w = Variable(np.array([3, 4], np.float32))
    assert squares(w, 1.0) == 25
    assert type(squares(w, 1.0)) is np.ndarray


def test_overwriting_the_variable_later_does_not_reach_jax() -> None:
    w = Variable(np.ones(64, np.float32))
    identity = differentiable(lambda x: x)
    before = identity(w)
    w.assign(np.zeros(64, np.float32))
    assert before.tolist() == [1] * 64


@pytest.mark.usefixtures("wide")
def test_double_precision() -> None:
    w = Variable(np.array([3.0, 4.0]))
    assert value_and_grad(lambda: squares(w, 1.0), w)[1].dtype == np.float64


def test_double_precision_must_be_enabled() -> None:
    w = Variable(np.array([3.0, 4.0]))
    with pytest.raises(ArgumentValueError, match="jax_enable_x64"):
        value_and_grad(lambda: squares(w, 1.0), w)


def test_bad_results() -> None:
    w = Variable(np.ones(2, np.float32))
    with pytest.raises(ArgumentTypeError, match="must return one JAX array"):
        value_and_grad(lambda: differentiable(lambda x: (x, x))(w), w)
    with pytest.raises(ArgumentTypeError, match=r"bare JAX array.*gpu_adam\.autodiff\.jax\.differentiable"):
        value_and_grad(lambda: jnp.sum(jnp.asarray(w.value)), w)
