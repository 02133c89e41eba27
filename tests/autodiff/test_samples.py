"""Operations on the samples of a function."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam.autodiff import value_and_grad
from gpu_adam.devices import Device

from .cases import Case, DerivativeTests, both, case, random

GRID = np.array([-2.0, -0.7, 0.1, 0.5, 1.9])
INSIDE = np.array([[-1.9, 0.3, 1.2], [0.45, -0.1, -1.0]])
AROUND = np.array([-3.0, -1.0, 0.3, 2.5])
SHIFTED = np.array([0.4, 3.3, 1.9, 3.7])


def interp(**options: Any) -> Callable[..., Any]:
    return lambda np, x, xp, fp: np.interp(x, xp, fp, **options)


class TestInterpolation(DerivativeTests):
    """At the points asked for, of the values and of where they lie; always in double precision."""

    test_hips_autograd = None  # type: ignore[assignment]  # which has none
    test_single_precision = None  # type: ignore[assignment]

    cases = tuple(
        Case(name, function, tuple(random(a) if isinstance(a, tuple) else a for a in inputs), hips=False, narrow=False)
        for name, function, *inputs in (
            ("inside", interp(), INSIDE, GRID, (5,)),
            ("around", interp(), AROUND, GRID, (5,)),
            ("ends", interp(left=3.0, right=-2.0), AROUND, GRID, (5,)),
            ("period", interp(period=2.5), AROUND, SHIFTED, (4,)),
            ("one", interp(), AROUND, np.array([0.5]), (1,)),
            ("number", lambda np, x, fp: np.interp(x, [0, 1], fp) + np.interp(0.3, [0, 1], fp), np.array(0.4), (2,)),
            ("recorded-ends", lambda np, x, a, b: np.interp(x, [0, 1], [1, 3], a, b), AROUND, (), ()),
            ("complex", interp(), AROUND, GRID, random(5, True)),
        )
    )


class TestSlopesAndAreas(DerivativeTests):
    """Samples at equal distances, and at given places."""

    cases = (
        case("gradient-hips", lambda np, f: np.gradient(f, axis=0), (4, 3)),
        *both("gradient", lambda np, f: np.gradient(f), (5,), hips=False),
        case("gradient-axes", lambda np, f: np.multiply(*np.gradient(f, 0.5)), (4, 3), hips=False),
        case("gradient-two", lambda np, f: np.add(*np.gradient(f, 0.5, 2.0, edge_order=2)), (4, 3), hips=False),
        case("gradient-axis", lambda np, f: np.gradient(f, 0.5, axis=(-1,), edge_order=2), (4, 3), hips=False),
        case("gradient-places", lambda np, f, x: np.gradient(f, x, axis=1), (2, 5), GRID, hips=False),
        case("gradient-places-2", lambda np, f, x: np.gradient(f, x, edge_order=2), (5,), GRID, hips=False),
        case("gradient-spacing", lambda np, f, h: np.multiply(*np.gradient(f, h, 1)), (3, 3), (), hips=False),
        case("gradient-one-spacing", lambda np, f, h: np.gradient(f, h)[0], (3, 3), (), hips=False),
        case("gradient-shortest", lambda np, f: np.gradient(f), (2,), hips=False),
        *both("trapezoid", lambda np, y: np.trapezoid(y, axis=0) + np.trapezoid(y, None, 0.5)[0], (3, 4), hips=False),
        case("trapezoid-places", lambda np, y, x: np.trapezoid(y, x), (3, 5), GRID, hips=False),
        case("trapezoid-places-axis", lambda np, y, x: np.trapezoid(y, x, axis=0), (5, 3), GRID, hips=False),
        case("trapezoid-own-places", lambda np, y, x: np.trapezoid(y, x, axis=0), (3, 4), (3, 4), hips=False),
        case("trapezoid-spacing", lambda np, y, h: np.trapezoid(y, dx=h), (3, 4), (), hips=False),
        case("unwrap", lambda np, p: np.unwrap(p * 3, axis=0) * np.unwrap(p, 2, period=2.5), (6, 2), hips=False),
        *both("polyval", lambda np, p, x: np.polyval(p, x), (4,), (2, 3), hips=False),
        case("polyval-number", lambda np, p: np.polyval(p, 3) * np.polyval(p, [2]), (4,), hips=False, narrow=False),
        case("polyval-constants", lambda np, x: np.polyval([1, 0, -2], x), (4,), hips=False, narrow=False),
    )  # fmt: skip


class TestFilters(DerivativeTests):
    """Every mode, and either one the longer."""

    test_hips_autograd = None  # type: ignore[assignment]  # its convolve is that of images

    cases = (
        *(
            one
            for name in ("convolve", "correlate")
            for mode in ("full", "same", "valid")
            for sizes in ((5, 2), (2, 5), (3, 3), (4, 1))
            for one in both(
                f"{name}-{mode}-{sizes}",
                lambda np, a, v, name=name, mode=mode: getattr(np, name)(a, v, mode),
                *sizes,
                hips=False,
            )
        ),
        case(
            "mixed",
            lambda np, a, v: np.convolve(a, v * 1j) * np.convolve(v, [1, 2j, 3, 4, 5]),
            5,
            2,
            hips=False,
            narrow=False,
        ),
        case("numbers", lambda np, a: np.convolve(a, 2) + np.correlate(a, [3]), 3, hips=False, narrow=False),
    )


def recorded(function: Callable[..., Any], *args: Any) -> Any:
    """What a function of variables over the arrays among `args` returns inside a loss."""
    kept: list[Any] = []
    given = [Variable(arg) if isinstance(arg, np.ndarray) else arg for arg in args]

    def loss() -> Any:
        kept.append(function(*given))
        return np.sum(np.real(given[0]))

    value_and_grad(loss, given[0])
    return Variable(kept[0].value).numpy()


@pytest.mark.parametrize("name", ["convolve", "correlate"])
@pytest.mark.parametrize("mode", ["full", "same", "valid"])
def test_filters_are_those_of_numpy(device: Device, name: str, mode: Any) -> None:
    """Of all lengths: where the middle is, and which way round."""
    for n, m in np.ndindex(7, 7):
        arrays = random(n + 1, True), random(m + 1, True, seed=1)
        np.testing.assert_allclose(recorded(getattr(np, name), *arrays, mode), getattr(np, name)(*arrays, mode))


CONVOLVE: Any = np.convolve
GRADIENT: Any = np.gradient
VALUES: dict[str, Callable[..., Any]] = {
    "interp": lambda x: np.interp(x, [-1.0, 0.0, 0.0, 0.5, 2.0], [1.0, 5.0, 3.0, 2.0, 7.0]),
    "interp-ends": lambda x: np.interp(x, [-1.0, 0.5, 1.0], [1.0, 2.0, 3.0], -5, 9),
    "interp-period": lambda x: np.interp(x, [3.0, 1.0, 2.0], [1.0, 2.0, 4.0], period=-1.7),
    "gradient": lambda x: GRADIENT(x, [0.0, 1.0, 3.0, 3.5, 6.0], edge_order=2),
    "gradient-uniform": lambda x: GRADIENT(x, 0.3),
    "trapezoid": np.trapezoid,
    "unwrap": lambda x: np.unwrap(x * 9),
    "polyval": lambda x: np.polyval([1.0, 2.0, 3.0], x),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_are_those_of_numpy(device: Device, name: str) -> None:
    points = np.array([0.0, -1.5, 0.5, 2.0, 4.0])
    found, expected = recorded(VALUES[name], points), VALUES[name](points)
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-14)
    assert found.dtype == expected.dtype


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda x: CONVOLVE(x, x, "all"), "mode must be"),
        (lambda x: GRADIENT(x, edge_order=3), r"edge_order of 1 or 2.*\(got 3 and 4\)"),
        (lambda x: np.gradient(x[:2], edge_order=2), r"more samples than that \(got 2 and 2\)"),
        (lambda x: np.gradient(x, [1.0, 2.0]), r"takes 4 coordinates here \(got an array of shape \(2,\)\)"),
        (lambda x: np.gradient(x, 1.0, 2.0), r"one spacing or one for each axis \(got 2\)"),
        (lambda x: np.interp(x, [0, 1], [0, 1], period=0), "non-zero"),
        (lambda x: np.interp(x, [0, 1], [0, 1], period=x), "with respect to the argument period="),
        (lambda x: np.unwrap(x, period=x), "passed by position"),
        (lambda x: np.polyval(x, np.poly1d([1, 2])), "must not meet a poly1d"),
    ],
)  # fmt: skip
def test_what_they_refuse(device: Device, use: Any, message: str) -> None:
    x = Variable(np.arange(4.0))
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        value_and_grad(lambda: np.sum(use(x)), x)
