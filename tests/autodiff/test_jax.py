"""Losses of JAX, and functions of JAX inside a loss."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gpu_adam import Adam, ArgumentTypeError, ArgumentValueError, Variable
from gpu_adam.autodiff import gradients, value_and_grad

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from gpu_adam.autodiff.jax import differentiable, view  # noqa: E402  # needs JAX


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


# Losses that JAX computes from end to end.


class Counted:
    """A function that counts its calls. As a loss, it has no code of its own."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any) -> Any:
        """What the function returns."""
        self.calls += 1
        return self.function(*args)


def test_a_loss_of_jax() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((5, 3), np.float32), rng.standard_normal(5, np.float32)
    w, b, other = Variable(rng.standard_normal(3, np.float32)), Variable(np.float32(0.5)), Variable(np.float32(1))
    loss = Counted(lambda: jnp.mean((jnp.asarray(x) @ w + b - y) ** 2))
    value, found = value_and_grad(loss, [w, b, other])
    residual = x @ w.value + b.value - y
    np.testing.assert_allclose(value, np.mean(residual**2), rtol=1e-5)
    np.testing.assert_allclose(found[0], 2 / 5 * x.T @ residual, rtol=1e-4)
    np.testing.assert_allclose(found[1], 2 * np.mean(residual), rtol=1e-4)
    assert found[2] is None
    assert [type(gradient) for gradient in found[:2]] == [np.ndarray] * 2
    assert loss.calls == 1


@pytest.mark.parametrize("of", [view, jnp.asarray, lambda z: jnp.ones(2) * z])
def test_all_ways_to_a_view(of: Any) -> None:
    z = Variable(np.array([3 + 4j, 1j], np.complex64))
    constant = Variable(np.array([1, 2], np.float32))
    value, gradient = value_and_grad(lambda: jnp.sum(jnp.abs(of(z)) ** 2 * of(constant)), z)
    assert value == 27
    np.testing.assert_allclose(gradient, 2 * z.value * constant.value)


def test_minimize() -> None:
    w, optimizer = Variable(np.array([1, 2], np.float32)), Adam(0.1)
    for _ in range(200):
        optimizer.minimize(lambda: (jnp.asarray(w) - 3) ** 2, [w])
    np.testing.assert_allclose(w.numpy(), 3, atol=0.05)


def test_beside_losses_of_numpy() -> None:
    w = Variable(np.array([1, 2], np.float32))
    values, gradient = value_and_grad(lambda: [jnp.sum(view(w) * 2), np.sum(w * 3), jnp.sum(view(w))], w)
    assert [float(value) for value in values] == [6, 9, 3]
    assert gradient.tolist() == [6, 6]


@pytest.mark.parametrize("upstream", [2.0, np.array([2.0, 2.0], np.float32), jnp.array([2.0, 2.0])])
def test_upstream_gradients(upstream: Any) -> None:
    w = Variable(np.array([1, 2], np.float32))
    assert gradients(lambda: view(w) ** 2, w, upstream)[1][0][0].tolist() == [4, 8]
    with pytest.raises(ArgumentValueError, match="shape of the loss"):
        Adam(0.1).minimize(lambda: view(w) ** 2, [w], grad_loss=np.ones(3))


def test_a_loss_that_comes_to_use_jax_later() -> None:
    """The first calls go straight to the loss; the one that asks is begun again, without what it had recorded."""
    w, calls = Variable(np.array([1, 2], np.float32)), 0

    def loss() -> Any:
        nonlocal calls
        calls += 1
        kept = np.sum(w * w)
        return kept if calls < 3 else jnp.sum(view(w) ** 2)

    results = [value_and_grad(loss, w) for _ in range(4)]
    assert [type(value) for value, _ in results] == [np.float32] * 2 + [type(jnp.ones(()))] * 2
    assert [gradient.tolist() for _, gradient in results] == [[2, 4]] * 4
    assert calls == 5


def test_a_loss_of_numpy_is_not_called_by_jax_again(monkeypatch: pytest.MonkeyPatch) -> None:
    w = Variable(np.array([1, 2], np.float32))
    vjp = Counted(jax.vjp)
    monkeypatch.setattr(jax, "vjp", vjp)
    for _ in range(3):
        assert value_and_grad(lambda: np.sum(w * w), w)[1].tolist() == [2, 4]
    assert vjp.calls == 1


def test_a_numpy_loss_in_double_precision_does_not_care_about_jax() -> None:
    w = Variable(np.array([3.0, 4.0]))
    assert value_and_grad(lambda: np.sum(w * w), w)[1].tolist() == [6, 8]
    with pytest.raises(ArgumentValueError, match="jax_enable_x64"):
        value_and_grad(lambda: jnp.sum(view(w)), w)


def test_outside_a_loss_a_view_is_an_array() -> None:
    w = Variable(np.array([3, 4], np.float32))
    array = view(w)
    w.assign(np.zeros(2, np.float32))
    assert isinstance(array, jax.Array)
    assert array.tolist() == [3, 4]


def test_bad_losses() -> None:
    w = Variable(np.array([1, 2], np.float32))
    with pytest.raises(ArgumentValueError, match="no gradients provided"):
        value_and_grad(lambda: jnp.asarray(3), w)
    with pytest.raises(ArgumentValueError, match="real floating-point numbers"):
        value_and_grad(lambda: view(w) * 1j, w)
    with pytest.raises(ArgumentValueError, match="depends on the variables"):
        Adam(0.1).minimize(lambda: jnp.sum(jnp.ones(3)), [w])
    with pytest.raises(ArgumentValueError, match="pass the variables themselves"):
        value_and_grad(lambda: jnp.sum(view(w)), lambda: [w])
    with pytest.raises(TypeError, match=r"numpy\.multiply.*got one of jax.*gpu_adam\.autodiff\.jax\.view"):
        value_and_grad(lambda: w * jnp.ones(2), w)
    assert w.numpy().tolist() == [1, 2]
