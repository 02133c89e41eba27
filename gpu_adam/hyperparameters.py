"""Hyperparameters: numbers, callables and schedules, their rules, and the scalars of a step that they become."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.schedules import LearningRateSchedule
from gpu_adam.variables import Variable

DEFAULT_EPSILON = 1e-7
_ONE = np.float32(1)


class _Limits(NamedTuple):
    tiny: float
    max: float


_LIMITS = {name: _Limits(float(np.finfo(name).tiny), float(np.finfo(name).max)) for name in ("float32", "float64")}

# (holds, rule, remedy) of each hyperparameter.
_RULES: dict[str, tuple[Callable[[float], bool], str, str]] = {
    "learning_rate": (math.isfinite, "must be finite", "pass a finite number"),
    "beta_1": (lambda x: 0 <= x < 1, "must lie in [0, 1)", "pass 0.9, say"),
    "beta_2": (lambda x: 0 <= x < 1, "must lie in [0, 1)", "pass 0.999, say"),
    "epsilon": (lambda x: x >= 0, "must be >= 0", "pass 1e-7, say"),
    "decay": (lambda x: 0 <= x < math.inf, "must be >= 0 and finite", "pass 0 for no decay"),
    "clipnorm": (lambda x: x > 0, "must be > 0", "pass None for no clipping"),
    "clipvalue": (lambda x: x > 0, "must be > 0", "pass None for no clipping"),
    "global_clipnorm": (lambda x: x > 0, "must be > 0", "pass None for no clipping"),
}

_MAY_BE_CALLABLE = ("learning_rate", "beta_1", "beta_2", "epsilon")


def checked(name: str, value: Any) -> Any:
    """`value` as it is stored for hyperparameter `name`: a float, or what is evaluated at every step.

    Args:
        name: the hyperparameter.
        value: a real number; for learning_rate, beta_1, beta_2 and epsilon also a 0-d array or variable (read at every
            step; one on a CUDA device makes the host wait then) or a callable without arguments; for learning_rate also
            a schedule.

    Raises:
        ArgumentTypeError: neither of these.
        ArgumentValueError: a number outside the hyperparameter's rule.
    """
    if isinstance(value, LearningRateSchedule):
        if name == "learning_rate":
            return value
    elif name in _MAY_BE_CALLABLE and (_is_live(value) or callable(value)):
        if _is_live(value):
            as_number(name, value)
        return value
    return as_number(name, value)


def as_number(name: str, value: Any) -> float:
    """`value` as a float that obeys the rule of hyperparameter `name`."""
    what = "must be a real number" + (" or a callable without arguments" if name in _MAY_BE_CALLABLE else "")
    if isinstance(value, (str, bytes)) or value is None or callable(value) or np.ndim(value) != 0:
        raise ArgumentTypeError(name, what, _shown(value), _RULES[name][2])
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(name, what, _shown(value), _RULES[name][2]) from error
    holds, rule, remedy = _RULES[name]
    if not holds(number):
        raise ArgumentValueError(name, rule, number, remedy)
    return number


def evaluated(name: str, value: Any) -> float:
    """The number that a stored callable, variable or 0-d array has now; schedules are for `Scalars`."""
    return as_number(name, value() if callable(value) and not _is_live(value) else value)


def _is_live(value: Any) -> bool:
    return isinstance(value, Variable) or (hasattr(value, "dtype") and not isinstance(value, np.generic))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:40]}..."


class Clip(NamedTuple):
    """How the gradients of a step are clipped: by value, then by norm.

    Attributes:
        clipvalue: bound of every element's absolute value, or None.
        clipnorm: bound of each gradient's L2 norm, or None.
        global_clipnorm: bound of the L2 norm over all gradients together, or None.
    """

    clipvalue: float | None
    clipnorm: float | None
    global_clipnorm: float | None

    def value_in(self, dtype: str) -> float:
        """`clipvalue` as the kernels of a dtype take it: infinite where nothing is bounded.

        Raises:
            ArgumentValueError: the dtype would flush it to 0.
        """
        value, limits = self.clipvalue, _LIMITS[dtype]
        if value is None or value > limits.max:
            return math.inf
        if value < limits.tiny:
            rule = f"must be at least {limits.tiny:.3g}, the smallest {dtype} that is not flushed to 0"
            raise ArgumentValueError("clipvalue", rule, value, "pass None for no clipping, or a larger bound")
        return value


NO_CLIPPING = Clip(None, None, None)


class Hyperparameter:
    """An attribute of an optimizer that reads as its present value and may be assigned at any time.

    Args:
        name: under which the optimizer stores it in `_hyper`.
        doc: what it is.
    """

    def __init__(self, name: str, doc: str) -> None:
        self.name, self.__doc__ = name, doc

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        value = optimizer._hyper[self.name]
        is_function = callable(value) and not isinstance(value, LearningRateSchedule)
        return evaluated(self.name, value) if is_function else value

    def __set__(self, optimizer: Any, value: Any) -> None:
        new, old = checked(self.name, value), optimizer._hyper[self.name]
        if isinstance(old, Variable) and type(new) is float:
            old.assign(new)  # a variable given as hyperparameter is shared with whoever gave it
        else:
            optimizer._hyper[self.name] = new


class Bound:
    """An attribute of an optimizer that bounds its gradients; None where it does not.

    Args:
        name: the field of `Clip`, which the optimizer stores as `_clip`.
        doc: what it is.
    """

    def __init__(self, name: str, doc: str) -> None:
        self.name, self.__doc__ = name, doc

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        return self if optimizer is None else getattr(optimizer._clip, self.name)

    def __set__(self, optimizer: Any, value: Any) -> None:
        clip = optimizer._clip._replace(**{self.name: None if value is None else checked(self.name, value)})
        if clip.clipnorm is not None and clip.global_clipnorm is not None:
            rule = "must not be set together with global_clipnorm"
            got = f"{clip.clipnorm} and {clip.global_clipnorm}"
            raise ArgumentValueError("clipnorm", rule, got, "set one of them to None")
        optimizer._clip = clip


class Scalars:
    """The hyperparameters' values at one step, each evaluated once.

    Args:
        hyper: the stored values by name: learning_rate, beta_1, beta_2, epsilon, decay.
        iterations: steps done before this one, t - 1.

    Raises:
        ArgumentTypeError, ArgumentValueError: a callable's or schedule's value breaks its rule.
    """

    __slots__ = ("beta_1", "beta_2", "decay", "epsilon", "iterations", "learning_rate")

    def __init__(self, hyper: dict[str, Any], iterations: int) -> None:
        self.iterations = iterations
        rate = hyper["learning_rate"]
        if type(rate) is not float:
            rate = (
                as_number("learning_rate", rate(iterations))
                if isinstance(rate, LearningRateSchedule)
                else evaluated("learning_rate", rate)
            )
        self.learning_rate: float = rate
        self.beta_1: float = _now("beta_1", hyper["beta_1"])
        self.beta_2: float = _now("beta_2", hyper["beta_2"])
        self.epsilon: float = _now("epsilon", hyper["epsilon"])
        self.decay: float = hyper["decay"]

    def for_real(self, dtype: str) -> tuple[Any, ...]:
        """(alpha_t, 1 - beta_1, 1 - beta_2, epsilon), every operation rounded in `dtype` as the reference does.

        alpha_t = (lr_t sqrt(1 - beta_2^t)) / (1 - beta_1^t) with lr_t = lr / (1 + decay (t - 1)).
        """
        if dtype == "float64":
            return self._float64()
        constants = _in_float32(self.beta_1, self.beta_2, self.epsilon, self.decay)
        beta_1, beta_2, one_minus_beta_1, one_minus_beta_2, epsilon, decay = constants
        if abs(self.learning_rate) > _LIMITS["float32"].max:
            rule = "must be finite in float32"
            raise ArgumentValueError("learning_rate", rule, self.learning_rate, "pass less, or use float64 variables")
        f, t, power = np.float32, self.iterations + 1, _powf()
        rate = f(self.learning_rate)
        if decay > 0:
            rate = rate / (_ONE + decay * f(self.iterations))
        alpha = (rate * np.sqrt(_ONE - f(power(beta_2, t)))) / (_ONE - f(power(beta_1, t)))
        return alpha, one_minus_beta_1, one_minus_beta_2, epsilon

    def _float64(self) -> tuple[float, ...]:
        t, rate = float(self.iterations + 1), self.learning_rate
        if self.decay > 0:
            rate = rate / (1.0 + self.decay * float(self.iterations))
        alpha = (rate * math.sqrt(1.0 - math.pow(self.beta_2, t))) / (1.0 - math.pow(self.beta_1, t))
        return alpha, 1.0 - self.beta_1, 1.0 - self.beta_2, self.epsilon


def _now(name: str, value: Any) -> float:
    return value if type(value) is float else evaluated(name, value)


@functools.lru_cache(64)
def _in_float32(beta_1: float, beta_2: float, epsilon: float, decay: float) -> tuple[Any, ...]:
    """beta_1, beta_2, 1 - beta_1, 1 - beta_2, epsilon and decay in float32; refused where rounding breaks a rule."""
    tiny, largest = _LIMITS["float32"]
    for name, value in (("beta_1", beta_1), ("beta_2", beta_2)):
        if np.float32(value) == 1:
            rule = "must be below 1 after rounding to float32"
            raise ArgumentValueError(name, rule, value, "pass at most 0.9999999, or use float64 variables")
    for name, value in (("epsilon", epsilon), ("decay", decay)):
        if value > largest or (name == "epsilon" and 0 < value < tiny):
            rule = f"must be 0 or at least {tiny:.3g}, and at most {largest:.3g}, for float32 variables"
            raise ArgumentValueError(name, rule, value, "pass another value, or use float64 variables")
    rounded = np.float32(beta_1), np.float32(beta_2)
    return *map(float, rounded), _ONE - rounded[0], _ONE - rounded[1], np.float32(epsilon), np.float32(decay)


@functools.cache
def _powf() -> Any:
    """The C library's powf, as the reference uses: numpy.power on float32 differs from it in the last bit."""
    try:
        powf = ctypes.CDLL("libm.so.6").powf
    except OSError:  # not glibc
        powf = ctypes.CDLL(ctypes.util.find_library("m")).powf
    powf.argtypes, powf.restype = (ctypes.c_float, ctypes.c_float), ctypes.c_float
    return powf
