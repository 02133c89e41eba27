"""Reductions of some of the elements."""

from typing import Any

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam.autodiff import value_and_grad
from gpu_adam.devices import Device

from .cases import DerivativeTests, both, case, random

HOLES = random((3, 4))
HOLES[[0, 1, 1], [1, 0, 3]] = np.nan
MASK = np.array([[True, False, True, True], [True, True, False, False], [False, True, True, False]])
AXES: dict[str, dict[str, Any]] = {"all": {}, "axis": {"axis": 1}, "kept": {"axis": (0,), "keepdims": True}}


class TestWhere(DerivativeTests):
    """`where` and `initial`, of functions, methods and ufuncs."""

    test_hips_autograd = None  # type: ignore[assignment]  # which has neither
    cases = (
        *(
            one
            for name in ("sum", "prod", "mean", "var", "std")
            for label, options in AXES.items()
            for one in both(
                f"{name}-{label}",
                lambda np, x, name=name, options=options: getattr(np, name)(x, where=MASK, **options),
                (3, 4),
                hips=False,
            )
        ),
        *(
            case(
                f"{name}-{label}",
                lambda np, x, name=name, options=options: getattr(np, name)(x, where=x > -1, initial=0.1, **options),
                (3, 4),
                hips=False,
            )
            for name in ("max", "min")
            for label, options in AXES.items()
        ),
        case(
            "ddof",
            lambda np, x: np.var(x, 1, ddof=1, where=MASK) + np.std(x, 1, None, None, 1, where=MASK),
            (3, 4),
            hips=False,
        ),
        case(
            "correction", lambda np, x: np.var(x, 0, correction=1, where=[[True], [False], [True]]), (3, 4), hips=False
        ),
        case(
            "row",
            lambda np, x: np.sum(x, axis=1, where=[True, False, True, True]) + np.sum(x, where=True),
            (3, 4),
            hips=False,
        ),
        case("method", lambda np, x: (x * 2).sum(where=x > 0) + (x * 2).mean(1, where=MASK), (3, 4), hips=False),
        case(
            "ufunc", lambda np, x: np.add.reduce(x, where=MASK) * np.multiply.reduce(x, initial=2), (3, 4), hips=False
        ),
        case("ufunc-extreme", lambda np, x: np.maximum.reduce(x, axis=1, where=MASK, initial=-9), (3, 4), hips=False),
        *both(
            "initial", lambda np, x: np.sum(x, axis=0, initial=2) * np.prod(x, axis=0, initial=3), (3, 4), hips=False
        ),
        case("initial-extreme", lambda np, x: np.max(x, 1, initial=0) * np.min(x, 1, initial=0), (3, 4), hips=False),
        case(
            "positional",
            lambda np, x: np.sum(x, 0, None, None, False, 2, MASK) + np.max(x, 0, None, False, 0),
            (3, 4),
            hips=False,
        ),
        case(
            "recorded-initial",
            lambda np, x, y: np.sum(x, initial=y) * np.max(x, axis=0, initial=y),
            (3, 4),
            (),
            hips=False,
        ),
        case("empty", lambda np, x: np.max(x, axis=0, initial=1) + np.sum(x, axis=0, initial=2), (0, 3), hips=False),
    )


class TestWithoutNaN(DerivativeTests):
    """The functions whose names begin with nan."""

    test_hips_autograd = None  # type: ignore[assignment]  # which has none of them
    cases = (
        *(
            case(
                f"{name}-{label}",
                lambda np, x, name=name, options=options: getattr(np, name)(x, **options),
                HOLES,
                hips=False,
            )
            for name in ("nansum", "nanprod", "nanmean", "nanvar", "nanstd", "nanmax", "nanmin")
            for label, options in AXES.items()
        ),
        *(
            case(
                f"{name}",
                lambda np, x, name=name: getattr(np, name)(x, axis=1) * getattr(np, name)(x)[3],
                HOLES,
                hips=False,
            )
            for name in ("nancumsum", "nancumprod")
        ),
        *both("complex", lambda np, x: np.nansum(x, 0) * np.nanmean(x, 0) * np.nanvar(x, 0), (3, 4), hips=False),
        case(
            "where",
            lambda np, x: np.nansum(x, 0, where=MASK, initial=2) + np.nanmean(x, 0, where=MASK),
            HOLES,
            hips=False,
        ),
        case(
            "where-extreme",
            lambda np, x: np.nanmax(x, 1, initial=0, where=MASK) + np.nanmin(x, 1, initial=9),
            HOLES,
            hips=False,
        ),
        case("ddof", lambda np, x: np.nanvar(x, 1, ddof=1) + np.nanstd(x, axis=1, ddof=1), HOLES, hips=False),
        case("ufunc", lambda np, x: np.fmax.reduce(x) - np.fmin.reduce(x, axis=0), HOLES, hips=False),
    )


REDUCTIONS = ("sum", "prod", "mean", "var", "std", "max", "min")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", REDUCTIONS)
def test_values_are_those_of_numpy(name: str) -> None:
    """With holes, and where a row has none but holes."""
    holes = HOLES.copy()
    holes[2] = np.nan
    x, plain, without = Variable(holes), getattr(np, name), getattr(np, "nan" + name)
    options: dict[str, Any] = {"initial": 0.25} if name in ("max", "min") else {}
    for call in (
        lambda a: without(a, axis=1),
        without,
        lambda a: plain(a, axis=1, where=~np.isnan(holes), **options),
        lambda a: plain(a, axis=0, keepdims=True, where=[[True], [True], [False]], **options),
    ):
        (found, _), _ = value_and_grad(lambda: (np.sum(call(x)), np.sum(x)), x)  # noqa: B023
        np.testing.assert_allclose(found, np.sum(call(holes)))


def test_a_row_of_holes_has_no_gradient(device: Device) -> None:
    x = Variable(np.array([[np.nan, np.nan], [1.0, 3.0]]))
    for function, expected in ((np.nanmax, [0, 1]), (np.nanmin, [1, 0]), (np.nansum, [1, 1]), (np.nanprod, [3, 1])):
        _, gradient = value_and_grad(lambda: np.sum(function(x, axis=1)[1:]) + np.sum(function(x, axis=1)), x)  # noqa: B023
        assert gradient.tolist() == [[0, 0], [2 * e for e in expected]]


def test_deviation_of_equal_numbers(device: Device) -> None:
    x = Variable(np.array([1.0, 1.0, np.nan]))
    _, gradient = value_and_grad(lambda: np.nanstd(x), x)
    assert gradient.tolist() == [0, 0, 0]


def test_a_mask_without_a_first_value(device: Device) -> None:
    x = Variable(np.ones(3))
    with pytest.raises(ValueError, match=r"numpy\.max with where= must have an initial value"):
        value_and_grad(lambda: np.max(x, where=[True, False, True]), x)


def test_first_values_do_not_widen(device: Device) -> None:
    x = Variable(np.ones(3, np.float32))
    firsts: tuple[Any, ...] = (2.0, np.float64(2), np.ones((), like=x))
    for first in firsts:
        value, gradient = value_and_grad(lambda: np.sum(x, initial=first) + np.max(x, initial=first), x)  # noqa: B023
        assert value.dtype == gradient.dtype == np.float32
