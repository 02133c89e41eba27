"""Sums, means, extremes and their like."""

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam.autodiff import value_and_grad
from gpu_adam.devices import Device

from .cases import DerivativeTests, both, case, random

AXES = {
    "all": {},
    "axis": {"axis": 1},
    "negative": {"axis": -1},
    "kept": {"axis": 0, "keepdims": True},
    "two": {"axis": (0, 2)},
    "two-kept": {"axis": (-1, 0), "keepdims": True},
}
WITH_ZEROS = np.array([[1.5, 0.0, -2.0], [0.0, 3.0, 0.0], [1.0, 2.0, -0.5]])


class TestReductions(DerivativeTests):
    """Over all kinds of axes."""

    cases = (
        *(
            one
            for name in ("sum", "mean", "prod", "var", "std")
            for label, options in AXES.items()
            for one in both(
                f"{name}-{label}",
                lambda np, x, name=name, options=options: getattr(np, name)(x, **options),
                (2, 3, 4),
                hips=name == "sum",
            )
        ),
        *(
            case(
                f"{name}-{label}", lambda np, x, name=name, options=options: getattr(np, name)(x, **options), (2, 3, 4)
            )
            for name in ("max", "min")
            for label, options in AXES.items()
        ),
        *(
            case(f"{name}-hips", lambda np, x, name=name: getattr(np, name)(x, axis=1), (2, 3, 4))
            for name in ("mean", "prod", "var", "std")
        ),
        case("methods", lambda np, x: (x * 2).sum(1) + (x * 2).mean(0)[:3] + (x * 2).max() + (x * 2).min(), (3, 4)),
        case("methods-2", lambda np, x: (x * 2).var(1) + (x * 2).std(axis=1) + (x * 2).prod(1) + x.cumsum()[2], (3, 4)),
        case("amax", lambda np, x: np.amax(x, 1) - np.amin(x, 1), (3, 4)),
        case("ptp", lambda np, x: np.ptp(x, axis=1), (3, 4), hips=False),
        case("var-ddof", lambda np, x: np.var(x, axis=0, ddof=1) + np.std(x, axis=0, ddof=1), (3, 4)),
        case(
            "correction",
            lambda np, x: np.var(x, axis=0, correction=1) + np.std(x, axis=0, correction=1),
            (3, 4),
            hips=False,
        ),
        case("prod-with-zeros", lambda np, x: np.prod(x, axis=1), WITH_ZEROS, hips=False),
        *both("cumsum", lambda np, x: np.cumsum(x) + np.ravel(np.cumsum(x, axis=0)), (3, 4)),
        *both("cumprod", lambda np, x: np.cumprod(x) + np.ravel((x * 2).cumprod(0)), (3, 4), hips=False),
        *both("cumprod-long", lambda np, x: np.cumprod(x, axis=-1), (2, 11), hips=False),
        case("cumprod-with-zeros", lambda np, x: np.cumprod(x, axis=1) * np.cumprod(x, axis=0), WITH_ZEROS, hips=False),
        case("cumprod-none", lambda np, x: np.cumprod(x, axis=1), (2, 0), hips=False),
        *both("sum-zero-dimensional", lambda np, x: np.sum(x) * np.mean(x), ()),
        *both("zero-size", lambda np, x: np.sum(x, axis=0) + np.prod(x, axis=0), (0, 3), hips=False),
        *both("zero-size-result", lambda np, x: np.sum(x, axis=0) * np.mean(x, axis=0), (3, 0), hips=False),
        case("extreme-zero-dimensional", lambda np, x: np.max(x) + np.min(x), ()),
        case(
            "logsumexp", lambda np, x: np.log(np.sum(np.exp(x - np.max(x, 1, keepdims=True)), 1)) + np.max(x, 1), (3, 4)
        ),
        case("logaddexp-reduce", lambda np, x: np.logaddexp.reduce(x, axis=1), (3, 4), hips=False),
        case("logaddexp-reduce-first", lambda np, x: np.logaddexp.reduce(x * 1000, keepdims=True), (3, 4), hips=False),
        case("ufunc-reduce", lambda np, x: np.add.reduce(x) * np.multiply.reduce(x, axis=0), (3, 4), hips=False),
        case("ufunc-extremes", lambda np, x: np.maximum.reduce(x) * np.minimum.reduce(x, axis=0), (3, 4), hips=False),
        case("ufunc-accumulate", lambda np, x: np.add.accumulate(x) * np.multiply.accumulate(x, 1), (3, 4), hips=False),
        case("average", lambda np, x: np.average(x, axis=1), (3, 4), hips=False),
        case("average-weights", lambda np, x, w: np.average(x, 1, w**2), (3, 4), (4,), hips=False),
        case("average-full-weights", lambda np, x, w: np.average(x, weights=w**2), (3, 4), (3, 4), hips=False),
        *both("diff", lambda np, x: np.diff(x)[:2] + np.diff(x, 2, axis=0)[:, :3], (4, 4), hips=False),
        *both("variance-of-one", lambda np, x: np.var(x, axis=0), (1, 3), hips=False),
    )


def test_equal_extremes_share(device: Device) -> None:
    _, gradient = value_and_grad(lambda: np.max(x), x := Variable(np.array([1.0, 3.0, 3.0, 3.0])))
    np.testing.assert_allclose(device.numpy(gradient), [0, 1 / 3, 1 / 3, 1 / 3])


def test_deviation_of_equal_numbers(device: Device) -> None:
    _, gradient = value_and_grad(lambda: np.std(x), x := Variable(np.ones(4)))
    assert gradient.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_narrow_types_stay(device: Device, dtype: type) -> None:
    x = Variable(np.abs(random((4, 5))).astype(dtype))
    loss = lambda: np.mean(np.var(x, 0)) + np.max(np.logaddexp.reduce(x)) + np.prod(np.std(x, 1)) + np.cumsum(x)[3]  # noqa: E731
    value, gradient = value_and_grad(loss, x)
    assert value.dtype == gradient.dtype == dtype
