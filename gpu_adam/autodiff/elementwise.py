"""Derivatives of the elementwise operations."""

import math
from typing import Any

import numpy as np

from gpu_adam.autodiff.node import Node, astype, view
from gpu_adam.autodiff.operations import OPERATIONS, missing
from gpu_adam.autodiff.rules import (
    Operand,
    OperandOrNumber,
    OperandsOrNumbers,
    Primitive,
    composed,
    conj,
    constant,
    derivative,
    first_array,
    own,
    plain,
)

_LN2, _LN10 = math.log(2), math.log(10)
_SCALARS: Any = (int, float, complex, np.generic)


def _nonzero(x: Any) -> Any:
    """x, and 1 where it is 0: a divisor for what is 0 there anyway."""
    return np.where(x == 0, 1, x)


# -- arithmetic
derivative(np.positive, lambda g, y, x: g)
derivative(np.negative, lambda g, y, x: -g)
derivative(np.add, lambda g, y, _a, _b: g, lambda g, y, _a, _b: g)
derivative(np.subtract, lambda g, y, _a, _b: g, lambda g, y, _a, _b: -g)
derivative(np.multiply, lambda g, y, _a, b: g * conj(b), lambda g, y, a, _b: g * conj(a))
derivative(np.divide, lambda g, y, _a, b: g / conj(b), lambda g, y, _a, b: -g * conj(y / b))
derivative(np.reciprocal, lambda g, y, x: -g * conj(y * y))
derivative(np.square, lambda g, y, x: g * conj(2 * x))
derivative(np.sqrt, lambda g, y, x: g / conj(2 * y))
derivative(np.cbrt, lambda g, y, x: g / (3 * y * y))
derivative(np.remainder, lambda g, y, _a, _b: g, lambda g, y, a, b: -g * np.floor(a / b))
derivative(np.fmod, lambda g, y, _a, _b: g, lambda g, y, a, b: -g * np.trunc(a / b))
derivative(np.ldexp, lambda g, y, x, n: np.ldexp(g, n), None)


def _power_base(g: Any, y: Any, a: Any, b: Any) -> Any:
    if isinstance(b, _SCALARS):
        if b == 2:
            return g * conj(2 * a)
        return g * conj(b * a ** (b - 1)) if b else g * 0
    # Not b * a**(b-1) where b is 0: that is 0 times infinity at a = 0.
    return g * conj(np.where(b == 0, 0, b * np.power(a, np.where(b == 0, 1, b - 1))))


def _power_exponent(g: Any, y: Any, a: Any, b: Any) -> Any:
    if isinstance(a, _SCALARS):  # a Python number, which leaves the dtype alone
        a = a.item() if isinstance(a, np.generic) else a
        logarithm = 0 if a == 0 else np.log(a).item()
    else:
        logarithm = np.log(_nonzero(a))  # 0**b does not depend on b > 0
    return g * conj(y * logarithm)


def _power(a: Any, b: Any) -> Any:
    # The operator knows short cuts for exponents like 2.
    return a**b if isinstance(b, (int, float)) else np.power(a, b)


OPERATIONS[np.power] = Primitive(_power, (_power_base, _power_exponent), of=np.power)
derivative(np.float_power, _power_base, _power_exponent)

# -- exponentials and logarithms
derivative(np.exp, lambda g, y, x: g * conj(y))
derivative(np.exp2, lambda g, y, x: g * conj(y * _LN2))
derivative(np.expm1, lambda g, y, x: g * conj(y + 1))
derivative(np.log, lambda g, y, x: g / conj(x))
derivative(np.log2, lambda g, y, x: g / conj(x * _LN2))
derivative(np.log10, lambda g, y, x: g / conj(x * _LN10))
derivative(np.log1p, lambda g, y, x: g / conj(x + 1))
derivative(np.logaddexp, lambda g, y, a, b: g * np.exp(a - y), lambda g, y, a, b: g * np.exp(b - y))
derivative(np.logaddexp2, lambda g, y, a, b: g * np.exp2(a - y), lambda g, y, a, b: g * np.exp2(b - y))

# -- trigonometric and hyperbolic
derivative(np.sin, lambda g, y, x: g * conj(np.cos(x)))
derivative(np.cos, lambda g, y, x: -g * conj(np.sin(x)))
derivative(np.tan, lambda g, y, x: g * conj(1 + y * y))
derivative(np.arcsin, lambda g, y, x: g / conj(np.sqrt(1 - x * x)))
derivative(np.arccos, lambda g, y, x: -g / conj(np.sqrt(1 - x * x)))
derivative(np.arctan, lambda g, y, x: g / conj(1 + x * x))
derivative(np.sinh, lambda g, y, x: g * conj(np.cosh(x)))
derivative(np.cosh, lambda g, y, x: g * conj(np.sinh(x)))
derivative(np.tanh, lambda g, y, x: g * conj(1 - y * y))
derivative(np.arcsinh, lambda g, y, x: g / conj(np.sqrt(x * x + 1)))
# Not sqrt(x*x - 1): its branch cut is not that of arccosh.
derivative(np.arccosh, lambda g, y, x: g / conj(np.sqrt(x - 1) * np.sqrt(x + 1)))
derivative(np.arctanh, lambda g, y, x: g / conj(1 - x * x))
# By the radius twice: its square underflows where it does not, and at the origin the derivative is 0, as torch has it.
derivative(
    np.arctan2,
    lambda g, y, a, b: g * (b / (radius := _nonzero(np.hypot(a, b)))) / radius,
    lambda g, y, a, b: -g * (a / (radius := _nonzero(np.hypot(a, b)))) / radius,
)
derivative(np.hypot, lambda g, y, a, b: g * a / _nonzero(y), lambda g, y, a, b: g * b / _nonzero(y))
derivative(np.deg2rad, lambda g, y, x: g * (math.pi / 180))
derivative(np.radians, lambda g, y, x: g * (math.pi / 180))
derivative(np.rad2deg, lambda g, y, x: g * (180 / math.pi))
derivative(np.degrees, lambda g, y, x: g * (180 / math.pi))
derivative(np.sinc, lambda g, y, x: g * np.where(x == 0, 0, (np.cos(math.pi * x) - y) / _nonzero(x)))

# -- magnitude and complex parts
derivative(np.absolute, lambda g, y, x: g * np.sign(x))  # complex too: sign(z) = z/|z|, and 0 at 0
derivative(np.fabs, lambda g, y, x: g * np.sign(x))
derivative(np.copysign, lambda g, y, a, b: np.where(np.signbit(a) == np.signbit(b), g, -g), None)
derivative(np.conjugate, lambda g, y, x: conj(g))
derivative(np.real, lambda g, y, x: g)
# A real argument's part of that is 0, as it should be. Not 1j * g, which is Python's where g is a np.float64.
derivative(np.imag, lambda g, y, x: g * 1j)


def _angle_vjp(g: Any, y: Any, z: Any, deg: bool = False) -> Any:
    radius = _nonzero(np.absolute(z))
    return (180 / math.pi if deg else 1) * g * (1j * (z / radius) / radius)


def _sign_vjp(g: Any, y: Any, z: Any) -> Any:
    # Real: flat.  Complex: only the phase turns, at the rate 1/|z| per unit across.
    return 1j * y * ((g * conj(y)).imag / _nonzero(np.absolute(z)))


derivative(np.angle, _angle_vjp)
derivative(np.sign, _sign_vjp)

# -- choices; at a tie both sides get half
derivative(
    np.maximum,
    lambda g, y, a, b: np.where(a > b, g, np.where(a == b, g / 2, 0)),
    lambda g, y, a, b: np.where(b > a, g, np.where(a == b, g / 2, 0)),
)
derivative(
    np.minimum,
    lambda g, y, a, b: np.where(a < b, g, np.where(a == b, g / 2, 0)),
    lambda g, y, a, b: np.where(b < a, g, np.where(a == b, g / 2, 0)),
)
# Of a number and a NaN, the number was chosen.
derivative(
    np.fmax,
    lambda g, y, a, b: np.where((a > b) | np.isnan(b), g, np.where(a == b, g / 2, 0)),
    lambda g, y, a, b: np.where((b > a) | np.isnan(a), g, np.where(a == b, g / 2, 0)),
)
derivative(
    np.fmin,
    lambda g, y, a, b: np.where((a < b) | np.isnan(b), g, np.where(a == b, g / 2, 0)),
    lambda g, y, a, b: np.where((b < a) | np.isnan(a), g, np.where(a == b, g / 2, 0)),
)


def _clip(a: Any, a_min: Any = None, a_max: Any = None, *, min: Any = None, max: Any = None) -> Any:
    # CuPy's function takes the bounds by position, and calls a method of the first argument.
    low, high = a_min if min is None else min, a_max if max is None else max
    if isinstance(a, (int, float)):
        bound = low if hasattr(low, "dtype") else high
        a = np.full_like(bound, a, shape=())
    return np.clip(a, low, high)


OPERATIONS[np.clip] = Primitive(
    _clip,
    (
        lambda g, y, a, a_min=None, a_max=None, *, min=None, max=None: np.where(y == a, g, 0),
        lambda g, y, a, a_min, a_max=None: np.where((a < a_min) & (y == a_min), g, 0),
        lambda g, y, a, a_min, a_max: np.where((a > a_max) & (y == a_max), g, 0),
    ),
    of=np.clip,
)
derivative(
    np.where,
    None,
    lambda g, y, condition, _a, _b: np.where(condition, g, 0),
    lambda g, y, condition, _a, _b: np.where(condition, 0, g),
)


@composed(np.select)
def _select(condlist: Any, choicelist: OperandsOrNumbers, default: OperandOrNumber = 0) -> Any:
    if not len(condlist) == len(choicelist) > 0:
        raise ValueError(
            f"numpy.select takes as many choices as conditions (got {len(choicelist)} and {len(condlist)})"
        )
    chosen = default
    if not hasattr(default, "dtype"):  # beside another number it would decide the dtype
        dtypes = [choice.dtype for choice in choicelist if hasattr(choice, "dtype")]
        chosen = np.asarray(default, np.result_type(*dtypes, default), like=first_array(choicelist))
    for condition, choice in zip(reversed(condlist), reversed(choicelist), strict=True):
        chosen = np.where(condition, choice, chosen)
    return chosen


@composed(np.choose)
def _choose(a: Any, choices: OperandsOrNumbers, out: Any = None, mode: Any = "raise") -> Any:
    like = first_array(choices)
    numbers = np.arange(len(choices), like=like)
    number = np.choose(np.asarray(a, like=like), numbers, mode=mode)  # checked, or brought into the range
    return np.select([number == i for i in range(1, len(choices))], choices[1:], choices[0])


derivative(np.heaviside, None, lambda g, y, a, _b: np.where(a == 0, g, 0))
derivative(np.nextafter, lambda g, y, _a, _b: g, None)
derivative(
    np.nan_to_num,
    lambda g, y, x, copy=True, nan=0.0, posinf=None, neginf=None: np.where(np.isfinite(x), g, 0),
)


# -- several results
@composed(np.modf)
def _modf(x: Operand) -> Any:
    whole = np.trunc(plain(x))
    return x - whole, whole


@composed(np.divmod)
def _divmod(a: Operand, b: Operand) -> Any:
    return np.floor_divide(plain(a), plain(b)), np.remainder(a, b)


@composed(np.frexp)
def _frexp(x: Operand) -> Any:
    exponent = np.frexp(plain(x))[1]
    return np.ldexp(x, own(-exponent)), exponent


# -- conversion
@composed(np.full_like)
def _full_like(
    a: Operand, fill_value: Operand, dtype: Any = None, order: str = "K", subok: bool = True, shape: Any = None
) -> Any:
    # A sum: so it is a new array, and what fills it is broadcast and cast as there.
    zeros = np.zeros_like(plain(a), dtype=dtype, shape=shape)
    return np.copy(np.broadcast_to(fill_value.astype(zeros.dtype), zeros.shape))


derivative(np.copy, lambda g, y, x, order="K": g)
derivative(astype, lambda g, y, x, dtype: g)
_record_astype: Any = OPERATIONS[astype]


def _astype(args: tuple[Any, ...], kwargs: Any) -> Any:
    array, dtype = args
    if dtype.kind in "biu":  # whole numbers have no gradient
        return plain(array).astype(dtype)
    if type(array) is Node and dtype == array.dtype:
        return _record_astype((array, dtype), kwargs, array.array)  # the same memory, but another array
    return _record_astype((array, dtype), kwargs)


OPERATIONS[astype] = _astype
# A gradient has the parts of a complex number as the number has them.
_record_view = Primitive(view, (lambda g, y, a, dtype: g.copy().view(a.dtype), None))


@composed(view)
def _view(a: Operand, dtype: Any) -> Any:
    if np.empty(0, dtype).real.dtype != np.empty(0, a.dtype).real.dtype:
        raise missing(f"A view of {a.dtype} as {dtype}")
    return _record_view((a, dtype), {})


if hasattr(np, "astype"):

    @composed(np.astype)
    def _astype_function(x: Operand, dtype: Any, *, copy: bool = True, device: Any = None) -> Any:
        return x.astype(dtype)


# -- flat almost everywhere, or no numbers
constant(
    *(np.floor, np.ceil, np.trunc, np.rint, np.round, np.around, np.fix, np.floor_divide, np.signbit),
    *(np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal),
    *(np.logical_and, np.logical_or, np.logical_not, np.logical_xor),
    *(np.isnan, np.isinf, np.isfinite, np.isclose, np.allclose, np.isreal, np.iscomplex, np.array_equal),
    *(np.isposinf, np.isneginf, np.spacing),
    *(np.zeros_like, np.ones_like, np.empty_like),
    *(np.shape, np.ndim, np.size, np.iscomplexobj, np.isrealobj, np.result_type, np.can_cast, np.array_repr),
    *(np.array_str, np.shares_memory, np.may_share_memory),
)
