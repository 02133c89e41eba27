"""Quantiles, covariances, weighted counts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam.autodiff import value_and_grad
from gpu_adam.devices import Device

from .cases import DerivativeTests, both, case, random

HOLES = random((3, 4))
HOLES[[0, 1, 1], [1, 0, 3]] = np.nan
METHODS = (
    *("inverted_cdf", "averaged_inverted_cdf", "closest_observation", "interpolated_inverted_cdf", "hazen", "weibull"),
    *("linear", "median_unbiased", "normal_unbiased", "lower", "higher", "midpoint", "nearest"),
)
BINS = np.array([0, 3, 1, 3])


class TestQuantiles(DerivativeTests):
    """All ways to choose between two neighbours, all kinds of axes, with and without NaN."""

    test_hips_autograd = None  # type: ignore[assignment]  # which has none

    cases = (
        *(
            case(
                f"quantile-{method}",
                lambda np, x, method=method: np.quantile(x, [0.15, 0.7], axis=1, method=method),
                (2, 5),
                hips=False,
            )
            for method in METHODS
        ),
        *(
            one
            for options in ({}, {"axis": 0}, {"axis": -1, "keepdims": True}, {"axis": (0, 2), "keepdims": True})
            for one in (
                case(f"median-{options}", lambda np, x, o=options: np.median(x, **o), (2, 3, 4), hips=False),
                case(f"quantile-{options}", lambda np, x, o=options: np.quantile(x, 0.3, **o), (2, 3, 4), hips=False),
                case(
                    f"percentile-{options}",
                    lambda np, x, o=options: np.percentile(x, [[30], [100]], **o),
                    (2, 3, 4),
                    hips=False,
                ),
            )
        ),
        case("median-odd", lambda np, x: np.median(x * x, axis=1), (4, 5), hips=False),
        case("one-element", lambda np, x: np.median(x) * np.quantile(x, 0.2), (), hips=False),
        case("nanmedian", lambda np, x: np.nanmedian(x) * np.nanmedian(x, axis=1), HOLES, hips=False),
        case("nanquantile", lambda np, x: np.nanquantile(x, [0.3, 0.8], axis=0, keepdims=True), HOLES, hips=False),
        case("nanpercentile", lambda np, x: np.nanpercentile(x, 30, (0, 1)), HOLES, hips=False),
    )


class TestCovariances(DerivativeTests):
    """In double precision at least, as NumPy computes them."""

    test_hips_autograd = None  # type: ignore[assignment]  # which has none
    test_single_precision = None  # type: ignore[assignment]

    cases = (
        *both("cov", lambda np, x: np.cov(x), (3, 5), hips=False),
        *both("cov-two", lambda np, x, y: np.cov(x, y), (2, 5), (5,), hips=False),
        *both("cov-columns", lambda np, x, y: np.cov(x, y, rowvar=False, bias=True), (5, 2), (5, 1), hips=False),
        case("cov-one", lambda np, x: np.cov(x, ddof=2), (5,), hips=False),
        *both("corrcoef", lambda np, x: np.corrcoef(x * 2)[0, 1:], (3, 5), hips=False),
        case("corrcoef-two", lambda np, x, y: np.corrcoef(x, y, False), (5, 2), (5,), hips=False),
    )


class TestCounts(DerivativeTests):
    """numpy.bincount, which computes in double precision."""

    test_hips_autograd = None  # type: ignore[assignment]  # which has none
    test_single_precision = None  # type: ignore[assignment]

    cases = (
        case("bincount", lambda np, w: np.bincount(np.asarray(BINS, like=w), w), (4,), hips=False),
        case("bincount-longer", lambda np, w: np.bincount([0, 3, 1, 3], weights=w * w, minlength=6), (4,), hips=False),
    )


VALUES: dict[str, Callable[..., Any]] = {
    **{f"quantile-{m}": lambda x, m=m: np.quantile(x, [[0.0, 0.45], [0.5, 1.0]], axis=1, method=m) for m in METHODS},
    "median": lambda x: np.median(x, axis=(1,), keepdims=True),
    "percentile": lambda x: np.percentile(x, 0.3),
    "nanmedian": lambda x: np.nanmedian(x, axis=1),
    "nanquantile": lambda x: np.nanquantile(x, [0.1, 1.0], axis=1),
    "nanpercentile": lambda x: np.nanpercentile(x, [[12.0]], axis=0, keepdims=True),
}


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_are_those_of_numpy(name: str, dtype: Any) -> None:
    """Where there is NaN too, in a part of the rows or in all of one."""
    array = random((5, 6)).astype(dtype)
    array[1, 2] = array[3] = np.nan
    x = Variable(array)
    kept: list[Any] = []

    def loss() -> Any:
        kept.append(VALUES[name](x))
        return np.sum(x)

    value_and_grad(loss, x)
    expected = VALUES[name](array)
    assert kept[0].shape == expected.shape
    np.testing.assert_allclose(kept[0].value, expected, rtol=1e-6 if dtype == np.float32 else 1e-14)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda x: np.quantile(x, x), "with respect to the argument q="),
        (lambda x: np.quantile(x, 2.0), "in the range"),
        (lambda x: np.quantile(x, 0.5, weights=np.ones(4), method="inverted_cdf"), "the argument weights="),
        (lambda x: np.percentile(x, 5, None, np.ones(1)), "the argument out="),
        (lambda x: np.nanquantile(x, 0.5, method="lower"), 'numpy.nanquantile with method="lower"'),
        (lambda x: np.cov(x, aweights=np.ones(4)), "the argument aweights="),
        (np.bincount, "with respect to the argument x="),
    ],
)
def test_what_they_refuse(device: Device, use: Any, message: str) -> None:
    x = Variable(np.arange(4.0))
    with pytest.raises((NotImplementedError, ValueError), match=message):
        value_and_grad(lambda: np.sum(use(x)), x)


def test_uncorrelated_with_itself(device: Device) -> None:
    """The coefficient of a series with itself is 1 whatever it is."""
    x = Variable(random(5))
    value, gradient = value_and_grad(lambda: np.corrcoef(x), x)
    assert float(value) == 1
    np.testing.assert_allclose(device.numpy(gradient), 0, atol=1e-12)
