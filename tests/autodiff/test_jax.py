"""Losses of JAX, and functions of JAX inside a loss."""

import functools
import weakref
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
    assert loss.calls == 2  # begun again at the first view
    value_and_grad(loss, [w, b])
    assert loss.calls == 3


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


@pytest.mark.parametrize(
    "cotangent",
    [2, 2.0, [2.0, 2.0], np.array([2.0, 2.0]), np.array([2, 2]), jnp.array([2.0, 2.0]), 2 + 5j],
    ids=lambda cotangent: f"{type(cotangent).__name__} {getattr(cotangent, 'dtype', '')}",
)
def test_cotangents(cotangent: Any) -> None:
    w = Variable(np.array([1, 2], np.float32))
    if not isinstance(cotangent, list):  # which would be of a list of losses
        assert gradients(lambda: view(w) ** 2, w, cotangent)[1][0][0].tolist() == [4, 8]
    assert gradients(lambda: [view(w) ** 2], w, [cotangent])[1][0][0].tolist() == [4, 8]
    with pytest.raises(ArgumentValueError, match="shape of the loss"):
        Adam(0.1).minimize(lambda: view(w) ** 2, [w], grad_loss=np.ones(3))


def test_losses_of_one_code() -> None:
    """Each is called once, but for the one call that shows that JAX is asked for."""
    w, calls = Variable(np.array([1, 2], np.float32)), 0

    def loss_of(function: Any) -> Any:
        def loss() -> Any:
            nonlocal calls
            calls += 1
            return function()

        return loss

    losses = [loss_of(lambda: np.sum(w * w)), loss_of(lambda: jnp.sum(view(w) ** 2))]
    results = [value_and_grad(loss, w) for _ in range(3) for loss in losses]
    assert [type(value) for value, _ in results] == [np.float32, type(jnp.ones(()))] * 3
    assert [gradient.tolist() for _, gradient in results] == [[2, 4]] * 6
    assert calls == 7


def test_what_a_loss_has_left_is_gone_when_it_is_begun_again() -> None:
    w, left = Variable(np.array([1, 2], np.float32)), list[Any]()

    def loss() -> Any:
        assert all(reference() is None for reference in left)
        large = np.exp(w)
        left.append(weakref.ref(large))
        return jnp.sum(view(w) ** 2)

    assert value_and_grad(loss, w)[1].tolist() == [2, 4]
    assert len(left) == 2


@pytest.mark.parametrize("wrapped", [Counted, functools.partial, lambda loss: loss])
def test_losses_of_numpy_are_never_called_by_jax(monkeypatch: pytest.MonkeyPatch, wrapped: Any) -> None:
    monkeypatch.setattr(jax, "vjp", None)
    for dtype in (np.float32, np.float64, np.longdouble):
        w = Variable(np.array([1, 2], dtype))
        for _ in range(3):
            assert value_and_grad(wrapped(lambda: np.sum(w * w)), w)[1].tolist() == [2, 4]  # noqa: B023  # called here


def test_variables_that_jax_cannot_take_do_no_harm() -> None:
    w, wide = Variable(np.array([1, 2], np.float32)), Variable(np.array([3, 4], np.longdouble))
    _, found = value_and_grad(lambda: [jnp.sum(view(w) ** 2), np.sum(wide * wide)], [w, wide])
    assert [gradient.tolist() for gradient in found] == [[2, 4], [6, 8]]
    with pytest.raises(ArgumentValueError, match="that JAX can take"):
        value_and_grad(lambda: [jnp.sum(view(w) ** 2), jnp.sum(view(wide))], [w, wide])
    with pytest.raises(ArgumentValueError, match="jax_enable_x64"):
        value_and_grad(lambda: jnp.sum(view(double)), double := Variable(np.array([3.0, 4.0])))


def test_views_inside_compiled_functions_are_refused() -> None:
    w = Variable(np.array([1, 2], np.float32))
    compiled = jax.jit(lambda: jnp.sum(view(w) ** 2))
    value_and_grad(compiled, w)
    with pytest.raises(ArgumentValueError, match=r"function compiled by jax\.jit"):
        value_and_grad(compiled, w)
    passed = jax.jit(lambda w: jnp.sum(w**2))
    for _ in range(3):
        assert value_and_grad(lambda: passed(view(w)), w)[1].tolist() == [2, 4]
    named = differentiable(lambda w: jnp.sum(w**2))
    assert value_and_grad(lambda: named(view(w)), w)[1].tolist() == [2, 4]


def test_indices_and_shapes_of_other_frameworks() -> None:
    w, rows = Variable(np.array([1, 2], np.float32)), jnp.array([1, 1, 0])
    assert value_and_grad(lambda: np.sum(np.where(rows[:2] == 1, w, 0)), w)[1].tolist() == [1, 1]
    gradient = value_and_grad(lambda: np.sum(w[rows]), w)[1]
    assert np.asarray(gradient.indices).tolist() == [1, 1, 0]
    assert value_and_grad(lambda: np.sum(np.reshape(w, jnp.ones((2, 1)).shape)), w)[1].tolist() == [1, 1]


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
