"""Derivatives of one's own, and what the rules take off their authors' hands."""

from typing import Any, cast

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam import np as on_device
from gpu_adam.arrays import namespace
from gpu_adam.autodiff import register_vjp, value_and_grad
from gpu_adam.autodiff.operations import OPERATIONS
from gpu_adam.autodiff.rules import fit, unbroadcast
from gpu_adam.devices import Device

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


# -- what NumPy takes for an array
TWO_ARRAYS: dict[str, Any] = {
    "multiply": lambda a, b: a * b,
    "divide": np.divide,
    "power": np.power,
    "arctan2": np.arctan2,
    "maximum": np.maximum,
    "dot": np.dot,
    "inner": np.inner,
    "outer": np.outer,
    "vdot": np.vdot,
    "kron": np.kron,
    "matmul": np.matmul,
    "tensordot": lambda a, b: np.tensordot(a, b, 1),
    "einsum": lambda a, b: np.einsum("i,i->i", a, b),
    "append": np.append,
    "multiply.outer": np.multiply.outer,
    "where": lambda a, b: np.where([True, False, True], a, b),
    "average": lambda a, b: np.average(a, weights=b),
    "concatenate": lambda a, b: np.concatenate([a, b]),
    "stack": lambda a, b: np.stack((a, b), axis=1),
    "solve": lambda a, b: np.linalg.solve(np.outer(a, a) + np.diag([1.0, 2.0, 3.0]), b),
    "broadcast_arrays": lambda a, b: sum(np.broadcast_arrays(a, b)),
    "clip": lambda a, b: np.clip(a, b, [5.0, 5.0, 2.5]),
}
LIKE_ARRAYS: dict[str, Any] = {
    "list": [1.0, 2.0, 4.0],
    "tuple": (1.0, 2.0, 4.0),
    "shape": np.empty((1, 2, 4)).shape,
    "range": range(1, 4),
    "of NumPy's numbers": [np.float32(1), np.int64(2), 4],
    "memory view": memoryview(cast(Any, np.array([1.0, 2.0, 4.0]))),
}


@pytest.mark.parametrize("kind", LIKE_ARRAYS)
@pytest.mark.parametrize("name", TWO_ARRAYS)
def test_what_numpy_converts_is_converted(name: str, kind: str) -> None:
    """On either side, also where the function is an operator's."""
    x, function, given = Variable(np.array([0.5, 2.0, 3.0])), TWO_ARRAYS[name], LIKE_ARRAYS[kind]
    places: tuple[Any, ...] = (lambda a, b: (a, b), lambda a, b: (b, a))
    for place in places:
        if kind == "memory view" and name in ("multiply", "matmul"):  # which has no such operator
            continue
        found = value_and_grad(lambda: np.sum(function(*place(x, given))), x)  # noqa: B023
        expected = value_and_grad(lambda: np.sum(function(*place(x, np.asarray(given)))), x)  # noqa: B023
        assert float(found[0]) == float(expected[0])
        assert found[1].tolist() == expected[1].tolist()


@pytest.mark.parametrize(
    "use",
    [
        lambda w, b: np.concatenate([[b], w**2]),
        lambda w, b: np.concatenate(([b, b * 2], w)),
        lambda w, b: np.stack([[b, 1.0, 2 * b], w]),
        lambda w, b: np.vstack([[b, b, b], w]),
        lambda w, b: np.hstack([w, (b,)]),
        lambda w, b: np.append(w, [b, 3.0]),
        lambda w, b: w * [b, b, 1.0],
        lambda w, b: [[b], [b * b]] * w,
        lambda w, b: np.dot(w, [b, 1.0, b]),
        lambda w, b: np.einsum("i,i", w, (b, b, b)),
        lambda w, b: np.average(w, weights=[b, 1.0, 2.0]),
        np.full_like,
        lambda w, b: np.full_like(w, [b, 1.0, b]),
        lambda w, b: on_device.array([b, 1.0, b]) * w,
        lambda w, b: on_device.asarray([[b, 1.0], [b * 2, b]]),
        lambda w, b: np.heaviside([0.0, 1.0], b) + w[0],
        lambda w, b: np.nextafter(b, 2.0) * w,
        lambda w, b: np.interp(w, [0.0, 4.0], [b, b * b]),
    ],
)
def test_recorded_values_within_sequences_and_as_fill(device: Device, use: Any) -> None:
    w, b = Variable(np.array([1.0, 2.0, 3.0])), Variable(np.array(0.5))
    _, (_, gradient) = value_and_grad(lambda: np.sum(use(w, b)), [w, b])
    step = 1e-6
    start = w.numpy()
    host = {"array": np.array, "asarray": np.asarray}

    def plain_loss(at: float) -> float:
        with pytest.MonkeyPatch.context() as patch:
            for name, function in host.items():
                patch.setattr(on_device, name, function)
            return float(np.sum(use(start, np.float64(at))))

    slope = (plain_loss(0.5 + step) - plain_loss(0.5 - step)) / (2 * step)
    assert float(gradient) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize(
    "use",
    [
        lambda w, b: np.pad(w, 1, constant_values=b),
        lambda w, b: np.pad(w, 1, constant_values=(b, 0.0)),
        lambda w, b: np.nan_to_num(w, True, b),
        lambda w, b: np.nan_to_num(w, nan=b),
        lambda w, b: np.repeat(w, [b, b, b]),
        lambda w, b: np.array([w, w]),
        lambda w, b: np.full(3, b, like=w),
        lambda w, b: w[[b, b]],
        lambda w, b: w[b],
    ],
)
def test_recorded_values_in_other_places_raise(device: Device, use: Any) -> None:
    w, b = Variable(np.array([1.0, 2.0, 3.0])), Variable(np.array(0.5))
    with pytest.raises((NotImplementedError, TypeError)):
        value_and_grad(lambda: np.sum(use(w, b)), [w, b])


@pytest.mark.parametrize("kind", [lambda a: np.ma.array(a, mask=[True, False]), np.asmatrix])
@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_arrays_whose_operators_mean_something_else_are_refused(kind: Any) -> None:
    x, other = Variable(np.ones(2)), kind(np.array([1.0, 2.0]))
    for call in (lambda: x * other, lambda: np.dot(x, other.T), lambda: np.stack([x, other])):
        with pytest.raises(TypeError, match=r"must not meet a (MaskedArray|matrix)"):
            value_and_grad(lambda: np.sum(call()), x)  # noqa: B023


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
