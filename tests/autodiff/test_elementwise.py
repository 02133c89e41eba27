"""Elementwise operations."""

from typing import Any

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam.autodiff import value_and_grad
from gpu_adam.devices import Device

from .cases import Case, DerivativeTests, both, case, random

UNIT = np.linspace(-0.9, 0.9, 12).reshape(3, 4)
POSITIVE = np.linspace(0.2, 3, 12).reshape(3, 4)
ABOVE_ONE = POSITIVE + 1.1

COMPLEX_UNARY = (
    "exp log sqrt square sin cos tan sinh cosh tanh arcsin arccos arctan arcsinh arccosh arctanh conj reciprocal abs "
    "real imag angle expm1 log1p log2 log10 sign negative copy"
)


def words(text: str) -> list[str]:
    return text.split()


def unary(name: str, inputs: np.ndarray = UNIT, hips: bool = True) -> Case:
    return case(name, lambda np, x: getattr(np, name)(x), inputs, hips=hips)


class TestElementwise(DerivativeTests):
    """Each operation, where it is smooth."""

    cases = (
        *(unary(name) for name in words("negative exp exp2 expm1 sin cos tan sinh cosh tanh arcsinh abs fabs square")),
        *(unary(name) for name in words("arcsin arccos arctan arctanh deg2rad rad2deg radians degrees sinc real imag")),
        *(unary(name, POSITIVE) for name in words("log log2 log10 log1p sqrt reciprocal")),
        *(unary(name, hips=False) for name in ("positive", "nan_to_num", "copy", "angle")),
        unary("sign", hips=False),
        unary("cbrt", POSITIVE, hips=False),
        unary("arccosh", ABOVE_ONE),
        *(
            Case(
                f"{name}-complex",
                lambda np, z, name=name: getattr(np, name)(z),
                (random((2, 3), True, name),),
                hips=False,
            )
            for name in words(COMPLEX_UNARY)
        ),
        Case("angle-degrees", lambda np, z: np.angle(z, deg=True), (random((2, 3), True),), hips=False),
        Case("attributes", lambda np, z: z.real * z.imag, (random((2, 3), True),), hips=False),
        Case("imag-number", lambda np, z: np.imag(np.sum(z * z)), (random((2, 3), True),), hips=False),
        Case("imag-real-number", lambda np, x: np.imag(np.sum(x)) + np.sum(x), (UNIT,), hips=False),
        Case("abs-complex-hips", lambda np, z: np.abs(z) ** 2, (random((2, 3), True),)),
        Case("complex-hips", lambda np, z: np.exp(z) * np.sin(z) / np.sqrt(z) + np.conj(z), (random((2, 3), True),)),
        Case("real-to-complex", lambda np, x: np.exp(1j * x), (UNIT,)),
        Case("real-plus-complex", lambda np, x, z: x * z + z / x, (POSITIVE, random((3, 4), True))),
        *both("add", lambda np, a, b: a + b, (3, 4), (4,)),
        *both("subtract", lambda np, a, b: a - b, (3, 1), (2, 3, 4)),
        *both("multiply", lambda np, a, b: a * b, (3, 4), ()),
        *both("divide", lambda np, a, b: a / b, (2, 1, 4), (3, 1)),
        *both("constants", lambda np, x: 2 - (3.0 * x + 1) / 4 + 1 / (x + 7) + x * 2 - (-x), (3,)),
        *both("zero-size", lambda np, a, b: np.exp(a) * b, (0, 4), (4,)),
        *both("zero-size-broadcast", lambda np, a, b: a * b, (3, 1), (3, 0)),
        *both("zero-dimensional", lambda np, a, b: np.sin(a) * b, (), ()),
        *both("used-again", lambda np, x: x * x + np.exp(x) * x - x, (3, 4)),
        case("power", lambda np, a, b: a**b, POSITIVE, (3, 4)),
        case("power-broadcast", lambda np, a, b: a**b, POSITIVE, (4,)),
        *(case(f"power-{n}", lambda np, x, n=n: x**n, POSITIVE) for n in (0, 1, 2, 3, -1, 0.5, -2.5)),
        case("power-negative-base", lambda np, x: x**3, UNIT),
        case("power-array-exponent", lambda np, a, b: a**b, POSITIVE, np.array([0.0, 1.0, 2.0, -1.0])),
        case("power-constant-base", lambda np, x: 2.0**x + 3**x, (3, 4)),
        Case("power-complex", lambda np, a, b: a**b, (random((3,), True), random((3,), True, 1)), hips=False),
        Case("power-complex-2", lambda np, z: z**2 + z**-1.5, (random((3,), True),), hips=False),
        case("float_power", lambda np, a, b: np.float_power(a, b), POSITIVE, (4,), hips=False, narrow=False),
        case("remainder", lambda np, a, b: np.mod(a, b) + a % 0.7, UNIT * 5 + 0.01, POSITIVE),
        case("fmod", lambda np, a, b: np.fmod(a, b), UNIT * 5 + 0.01, POSITIVE, hips=False),
        case("divmod", lambda np, a: np.divmod(a, 0.7)[1] + divmod(a, 0.3)[1], UNIT + 0.01, hips=False),
        case("modf", lambda np, a: np.modf(a)[0] * 2, UNIT * 3 + 0.01, hips=False),
        case("frexp", lambda np, a: np.frexp(a)[0], UNIT * 3 + 0.01, hips=False),
        case("ldexp", lambda np, a: np.ldexp(a, 3), UNIT, hips=False),
        case("floor", lambda np, a: a * np.floor(a * 3) + a // 0.3, UNIT + 0.01, hips=False),
        case("arctan2", lambda np, a, b: np.arctan2(a, b), UNIT, (4,)),
        case("hypot", lambda np, a, b: np.hypot(a, b), UNIT, (4,), hips=False),
        case("copysign", lambda np, a, b: np.copysign(a, b), UNIT, -POSITIVE, hips=False),
        case("logaddexp", lambda np, a, b: np.logaddexp(a, b), UNIT, (4,)),
        case("logaddexp2", lambda np, a, b: np.logaddexp2(a, b), UNIT, (4,)),
        case("maximum", lambda np, a, b: np.maximum(a, b) + np.maximum(a, 0.05), UNIT, (4,)),
        case("minimum", lambda np, a, b: np.minimum(a, b) + np.minimum(0.05, a), UNIT, (4,)),
        case("fmax", lambda np, a, b: np.fmax(a, b), UNIT, (4,)),
        case("fmin", lambda np, a, b: np.fmin(a, b), UNIT, (4,)),
        case("clip", lambda np, a: np.clip(a, -0.5, 0.4) + np.clip(a, None, 0.2) * a, UNIT, hips=False),
        case("clip-keywords", lambda np, a: np.clip(a, min=-0.5, max=0.4), UNIT, hips=False),
        case("clip-number", lambda np, a, b: np.clip(0.1, a, 0.4) + np.clip(0.1, -9, b), UNIT, (4,), hips=False),
        case("list", lambda np, a: [1.0, 2.0, 3.0, 4.0] * a + np.maximum(a, [0.1] * 4), UNIT, hips=False, narrow=False),
        case("clip-bounds", lambda np, a, b, c: np.clip(a, b, c), UNIT, -POSITIVE / 5, POSITIVE / 5, hips=False),
        case("where", lambda np, a, b: np.where(a > b, a * b, a - b), UNIT, (4,), hips=False),
        case("where-scalar", lambda np, a: np.where(a > 0, np.sqrt(np.maximum(a, 1e-3)), 0.0), UNIT),
        case("select", lambda np, a, b: np.select([a > 0.3, a > 0], [a * b, 3], 2), UNIT, (4,), hips=False),
        case("select-default", lambda np, a, b: np.select([a > 0], [a * a], b), UNIT, (), hips=False),
        case("choose", lambda np, a, b: np.choose([[0, 1, 2, 1]], [a, b * b, 0.5]), UNIT, (4,), hips=False),
        case(
            "choose-mode",
            lambda np, a: np.choose([1, 4, -2, 2], a, mode="wrap") + np.choose([-1, 4, 1, 0], a, None, "clip"),
            UNIT,
            hips=False,
        ),
        case("view-pairs", lambda np, x: (x * 2).view({"d": complex, "f": "F"}[x.dtype.char]), (3, 4), hips=False),
        Case(
            "view-parts",
            lambda np, z: z.view(z.real.dtype) * (z * z).view(z.dtype).view(z.real.dtype),
            (random((3, 2), True),),
            hips=False,
        ),
        Case(
            "view-there-and-back",
            lambda np, z: (z * 2).T.copy().view(z.real.dtype)[::-1].view(z.dtype),
            (random((3, 2), True),),
            hips=False,
        ),
        Case("view-turned", lambda np, z: z.view(z.real.dtype).T * 2, (random((3, 2), True),), hips=False),
        *both("operators", lambda np, a, b: -a + +b - abs(a * b) + 2 / b + (b - 1), (3,), (3,), hips=False),
    )


def test_choices_that_do_not_fit(device: Device) -> None:
    x = Variable(np.ones(2))
    with pytest.raises(ValueError, match="invalid entry in choice array"):
        value_and_grad(lambda: np.sum(np.choose([0, 2], [x, x])), x)
    with pytest.raises(ValueError, match=r"as many choices as conditions \(got 1 and 2\)"):
        value_and_grad(lambda: np.sum(np.select([x > 0, x > 1], [x])), x)


# -- at singular points


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_absolute_value_of_zero(device: Device, dtype: type) -> None:
    _, gradient = value_and_grad(lambda: np.sum(np.abs(x)), x := Variable(np.zeros(3, dtype)))
    assert gradient.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("exponent", "expected"), [(0, [0, 0]), (1, [1, 1]), (2, [0, 0]), (np.array([0.0, 1.0]), [0, 1])]
)
def test_powers_of_zero(device: Device, exponent: Any, expected: list[float]) -> None:
    exponent = device.array(exponent) if isinstance(exponent, np.ndarray) else exponent
    _, gradient = value_and_grad(lambda: np.sum(x**exponent), x := Variable(np.zeros(2)))
    assert gradient.tolist() == expected


def test_zero_to_a_power(device: Device) -> None:
    _, gradient = value_and_grad(lambda: np.sum(0.0**b), b := Variable(np.array([1.0, 2.0])))
    assert gradient.tolist() == [0, 0]


@pytest.mark.parametrize("choose", [np.maximum, np.minimum, np.fmax, np.fmin])
def test_ties_are_shared(device: Device, choose: Any) -> None:
    a, b = Variable(np.ones(2)), Variable(np.ones(2))
    _, pair = value_and_grad(lambda: np.sum(choose(a, b)), [a, b])
    assert [g.tolist() for g in pair] == [[0.5, 0.5]] * 2


def test_phase_of_zero(device: Device) -> None:
    _, gradient = value_and_grad(lambda: np.sum(np.angle(z)), z := Variable(np.zeros(2, complex)))
    assert gradient.tolist() == [0, 0]


def test_descent_convention(device: Device) -> None:
    _, gradient = value_and_grad(lambda: np.sum(np.abs(z) ** 2), z := Variable(np.array([3 + 4j, -1j])))
    np.testing.assert_allclose(device.numpy(gradient), 2 * z.numpy())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_narrow_types_stay(device: Device, dtype: type) -> None:
    x = Variable(np.linspace(0.1, 0.9, 5).astype(dtype))
    value, gradient = value_and_grad(lambda: np.mean(np.log(x) * 2 - 0.5 / x + np.maximum(x, 0.5) ** 2), x)
    assert value.dtype == gradient.dtype == dtype


def test_conversion_between_types(device: Device) -> None:
    x = Variable(np.ones(3, np.float32))
    _, gradient = value_and_grad(lambda: np.sum(x.astype(np.float64) * 3), x)
    assert gradient.dtype == np.float32
    assert gradient.tolist() == [3, 3, 3]


@pytest.mark.parametrize("scale", [0.0, 1e-300, 1e-200, 1.0, 1e200])
def test_angles_near_the_origin_and_far_from_it(device: Device, scale: float) -> None:
    """At the origin 0, as torch has it; nowhere is a square of the radius taken, which would leave the range."""
    y, x = Variable(np.array(3 * scale)), Variable(np.array(4 * scale))
    z = Variable(np.array(complex(4 * scale, 3 * scale)))
    _, (of_y, of_x) = value_and_grad(lambda: np.arctan2(y, x), [y, x])
    _, of_z = value_and_grad(lambda: np.angle(z), z)
    radius = np.hypot(3 * scale, 4 * scale)
    expected = [0.0, 0.0] if not scale else [4 * scale / radius / radius, -3 * scale / radius / radius]
    np.testing.assert_allclose([float(of_y), float(of_x)], expected, rtol=1e-12)
    np.testing.assert_allclose([complex(of_z).imag, complex(of_z).real], expected, rtol=1e-12)
