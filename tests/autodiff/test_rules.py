"""Derivatives of one's own, and what the rules take off their authors' hands."""

from typing import Any, cast

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam.autodiff import register_vjp, value_and_grad
from gpu_adam.autodiff.operations import OPERATIONS, namespace
from gpu_adam.autodiff.rules import fit, unbroadcast

from .duck import DuckArray, DuckNamespace


def softplus(x: Any, scale: Any, power: int = 1) -> Any:
    assert type(x) in (np.ndarray, np.float64)  # never a recorded value
    return np.log1p(np.exp(x * scale)) ** power


recorded_softplus = register_vjp(
    softplus,
    lambda g, y, x, scale, power=1: g * power * y ** ((power - 1) / power) * scale / (1 + np.exp(-x * scale)),
    None,
)


def test_own_function() -> None:
    x = Variable(np.array([0.5, -1.0]))
    _, gradient = value_and_grad(lambda: np.sum(recorded_softplus(x, 2.0) * 3), x)
    np.testing.assert_allclose(gradient, 3 * 2 / (1 + np.exp(-2 * x.value)))
    _, gradient = value_and_grad(lambda: np.sum(recorded_softplus(+x, 1.0, power=2)), x)
    np.testing.assert_allclose(gradient, 2 * np.log1p(np.exp(x.value)) / (1 + np.exp(-x.value)))


def test_own_function_outside_a_loss() -> None:
    x = Variable(np.array([0.5, -1.0]))
    np.testing.assert_array_equal(recorded_softplus(x, 2.0), softplus(x.value, 2.0))
    np.testing.assert_array_equal(recorded_softplus(x.value, 2.0), softplus(x.value, 2.0))
    assert recorded_softplus.__name__ == "softplus"


def test_argument_without_a_derivative() -> None:
    x, scale = Variable(np.array([0.5, -1.0])), Variable(np.array(2.0))
    assert value_and_grad(lambda: np.sum(recorded_softplus(x.value, scale)), scale)[1] is None
    squared = register_vjp(lambda a, b: a * a * b, lambda g, y, a, b: 2 * g * a * b)
    with pytest.raises(NotImplementedError, match="with respect to argument 1"):
        value_and_grad(lambda: np.sum(squared(1.0, x)), x)


def test_a_function_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cast(Any, OPERATIONS), np.cumprod, None)  # undone afterwards
    register_vjp(np.cumprod, lambda g, y, x: np.flip(np.cumsum(np.flip(g * y))) / x)
    x = Variable(np.array([1.0, 2.0, 4.0]))
    _, gradient = value_and_grad(lambda: np.sum(np.cumprod(x)), x)
    assert gradient.tolist() == [11, 5, 2]


def test_arrays_by_keyword_are_refused() -> None:
    x = Variable(np.ones(2))
    with pytest.raises(TypeError, match="must be passed by position"):
        value_and_grad(lambda: np.sum(np.clip(2.0, 0.0, max=+x)), x)


def test_fit_undoes_broadcasting_widening_and_complex_parts() -> None:
    gradient = np.ones((2, 3, 4)) * (1 + 2j)
    fitted = fit(gradient, np.ones((3, 1), np.float32))
    assert fitted.dtype == np.float32
    assert fitted.tolist() == [[8], [8], [8]]
    assert unbroadcast(np.ones((2, 3)), (3,)).tolist() == [2, 2, 2]
    assert unbroadcast(np.ones((2, 0)), (1, 0)).shape == (1, 0)
    assert unbroadcast(np.ones(()), ()).shape == ()


def test_namespace() -> None:
    assert namespace(np.ones(1)) is namespace(np.float32(1)) is np
    assert namespace(DuckArray(1.0)) is DuckNamespace
