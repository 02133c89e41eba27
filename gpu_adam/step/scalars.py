"""The scalars of a step: the hyperparameters' present values, and the numbers that the kernels take of them."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import math
from ctypes import c_float
from typing import Any, NamedTuple

import numpy as np

from gpu_adam.errors import ArgumentValueError
from gpu_adam.hyperparameters import PLAIN, AnySettings, Cohort, Flavour, as_number, evaluated
from gpu_adam.rules import LIMITS
from gpu_adam.schedules import LearningRateSchedule

_ONE = np.float32(1)
_TINY, _LARGEST = LIMITS["float32"]
_NEUTRAL = (1.0, 0.0, 1.0, 0.0, 1.0)


class Scalars:
    """The hyperparameters' values at one step, each evaluated once.

    Args:
        hyper: the stored values by name: learning_rate, beta_1, beta_2, epsilon, decay, weight_decay, l2.
        iterations: steps done before this one, t - 1.
        flavour: what the optimizer does besides plain Adam.

    Attributes:
        are_called: whether one of the values came from code that is not ours: a callable, a schedule, an array.

    Raises:
        ArgumentTypeError, ArgumentValueError: a callable's or schedule's value breaks its rule.
    """

    __slots__ = (
        *("are_called", "beta_1", "beta_2", "decay", "epsilon", "iterations", "l2", "learning_rate", "weight_decay"),
        "flavour",
    )

    def __init__(self, hyper: dict[str, Any], iterations: int, flavour: Flavour = PLAIN) -> None:
        self.iterations, self.decay, self.flavour = iterations, hyper["decay"], flavour
        self.weight_decay, self.l2 = hyper["weight_decay"], hyper["l2"]
        rate, beta_1, beta_2, epsilon = hyper["learning_rate"], hyper["beta_1"], hyper["beta_2"], hyper["epsilon"]
        self.are_called = not type(rate) is type(beta_1) is type(beta_2) is type(epsilon) is float
        self.learning_rate: float = rate if type(rate) is float else _rate_now(rate, iterations)
        self.beta_1: float = beta_1 if type(beta_1) is float else evaluated("beta_1", beta_1)
        self.beta_2: float = beta_2 if type(beta_2) is float else evaluated("beta_2", beta_2)
        self.epsilon: float = epsilon if type(epsilon) is float else evaluated("epsilon", epsilon)

    def _copied(self) -> Scalars:
        copied = object.__new__(Scalars)  # a third of the time of copy.copy
        for name in self.__slots__:
            setattr(copied, name, getattr(self, name))
        return copied

    def at(self, iterations: int, rate: Any) -> Scalars:
        """The values at another step: a schedule is evaluated for it, what callables returned stays.

        Args:
            iterations: steps done before that one.
            rate: the stored learning rate.
        """
        if iterations == self.iterations:
            return self
        own = self._copied()
        own.iterations = iterations
        if isinstance(rate, LearningRateSchedule):
            own.learning_rate = _rate_now(rate, iterations)
        return own

    def under(self, settings: AnySettings, left_out: int = 0) -> Scalars:
        """The values for variables with settings of their own.

        Args:
            settings: as above.
            left_out: of the steps that a cohort has counted.
        """
        if isinstance(settings, Cohort):
            return _CohortScalars(settings.hyper, settings.iterations - left_out, settings.flavour)
        own = self._copied()
        own.learning_rate = self.learning_rate * settings.learning_rate_multiplier
        for name in ("weight_decay", "beta_1", "beta_2", "epsilon"):
            value = getattr(settings, name)
            if value is not None:
                setattr(own, name, value)
        return own

    def for_real(self, dtype: str) -> tuple[float, ...]:
        """What the kernels take, every operation rounded in `dtype` as the reference does.

            alpha_t = (lr_t sqrt(1 - beta_2^t)) / (1 - beta_1^t)      lr_t = lr / (1 + decay (t - 1))
            epsilon, or epsilon sqrt(1 - beta_2^t) in the paper's form
            1 - lr_t weight_decay, in float64, rounded once

        Args:
            dtype: "float32" or "float64".

        Returns:
            The fields of StepScalars but those of clipping and scale: the noise as an int; alpha_t, 1 - beta_1,
            1 - beta_2, epsilon, sign, l2, decay, momentum, 1 - momentum, as Python floats that `dtype` holds exactly.

        Raises:
            ArgumentValueError: rounding a value to `dtype` breaks its rule.
        """
        adam = self._float64() if dtype == "float64" else self._float32()
        flavour = self.flavour
        if (flavour is PLAIN or flavour == PLAIN) and not self.weight_decay and not self.l2:
            return (0, *adam, *_NEUTRAL)
        return (self._noise() if self.flavour.stochastic_rounding else 0, *adam, *self._others(dtype))

    def _noise(self) -> int:
        """A hash of the seed and t in 64 bits, from which noise.cuh makes that of each element."""
        return _mixed(_mixed(self.flavour.seed) + self.iterations + 1)

    def _others(self, dtype: str) -> tuple[float, ...]:
        """sign, l2, decay, momentum, 1 - momentum."""
        flavour, decay = self.flavour, 1.0
        if self.weight_decay:
            rate = self.learning_rate
            if self.decay > 0:
                rate = rate / (1.0 + self.decay * float(self.iterations))
            decay = 1.0 - rate * self.weight_decay
        numbers: tuple[float, ...] = (self.l2, decay, flavour.ema_momentum, 1.0 - flavour.ema_momentum)
        if not abs(self.l2) <= LIMITS[dtype].max:
            raise _too_large("l2", self.l2, dtype)
        if not abs(decay) <= LIMITS[dtype].max:
            raise _too_large("weight_decay times learning_rate", 1.0 - decay, dtype)
        if dtype == "float32":
            numbers = tuple([c_float(number).value for number in numbers])
        return (-1.0 if flavour.maximize else 1.0, *numbers)

    def _float64(self) -> tuple[float, ...]:
        t, rate = float(self.iterations + 1), self.learning_rate
        if not math.isfinite(rate):  # by a multiplier
            raise _too_large("learning_rate", rate, "float64")
        if self.decay > 0:
            rate = rate / (1.0 + self.decay * float(self.iterations))
        root = math.sqrt(1.0 - math.pow(self.beta_2, t))
        alpha = (rate * root) / (1.0 - math.pow(self.beta_1, t))
        epsilon = self.epsilon * root if self.flavour.epsilon_form == "paper" else self.epsilon
        return alpha, 1.0 - self.beta_1, 1.0 - self.beta_2, epsilon

    def _float32(self) -> tuple[float, ...]:
        """In doubles, each result rounded once more by storing it in a C float: a fifth of the time of NumPy's scalars.

        The bits are those of float32 arithmetic: a double has more than twice a float's digits and two, so that the
        second rounding of a sum, product, quotient or root of floats never differs from a single one (Figueroa, "When
        is double rounding innocuous?", 1995).
        """
        beta_1, beta_2, vanished_1, vanished_2, others, powf = _constants(
            self.beta_1, self.beta_2, self.epsilon, self.decay
        )
        rate, t = self.learning_rate, self.iterations + 1
        if not -_LARGEST <= rate <= _LARGEST:
            raise _too_large("learning_rate", rate, "float32")
        stored = c_float(t)
        # The powers first: their argument t is where the results are going to be stored.
        power_1 = powf(beta_1, stored) if t < vanished_1 else 0.0
        power_2 = powf(beta_2, stored) if t < vanished_2 else 0.0
        stored.value = rate
        if self.decay > 0:  # rare enough for NumPy's scalars, whose warning of an overflow is welcome
            stored.value = float(np.float32(rate) / (_ONE + np.float32(self.decay) * np.float32(self.iterations)))
        if power_2:
            rate = stored.value
            stored.value = 1.0 - power_2
            stored.value = math.sqrt(stored.value)
            if self.flavour.epsilon_form == "paper":
                others = (*others[:2], c_float(others[2] * stored.value).value)
            stored.value = rate * stored.value
        if power_1:
            dividend = stored.value
            stored.value = 1.0 - power_1
            quotient = dividend / stored.value
            # A C float becomes infinite in silence; NumPy warns of it.
            stored.value = quotient if -_LARGEST <= quotient <= _LARGEST else float(np.float32(quotient))
        return (stored.value, *others)


def _mixed(number: int) -> int:
    """The finalizer of splitmix64, as in noise.cuh."""
    number = (number + 0x9E3779B97F4A7C15) % 2**64
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31


def reciprocal(scale: float, dtype: str) -> float:
    """1 / scale, rounded once to float64 and once to `dtype`: what scaled gradients are multiplied by.

    Raises:
        ArgumentValueError: the dtype has no place for it.
    """
    number, limits = 1.0 / scale, LIMITS[dtype]
    if not limits.tiny <= number <= limits.max:
        rule = f"must have a reciprocal that {dtype} holds, in [{limits.tiny:.3g}, {limits.max:.3g}]"
        raise ArgumentValueError("grad_scale", rule, scale, "pass a scale nearer to 1")
    return c_float(number).value if dtype == "float32" else number


class _CohortScalars(Scalars):
    """The values for a cohort."""

    __slots__ = ()

    def _float32(self) -> tuple[float, ...]:
        numbers = tuple([c_float(number).value for number in self._float64()])
        if not math.isfinite(numbers[0]):
            raise _too_large("learning_rate", self.learning_rate, "float32")
        return numbers


def _too_large(argument: str, number: float, dtype: str) -> ArgumentValueError:
    remedy = "pass less, or use float64 variables" if dtype == "float32" else "pass less"
    return ArgumentValueError(argument, f"must be finite in {dtype}", number, remedy)


def _rate_now(rate: Any, iterations: int) -> float:
    if isinstance(rate, LearningRateSchedule):
        return as_number("learning_rate", rate(iterations))
    return evaluated("learning_rate", rate)


class _Constants(NamedTuple):
    """What float32 steps with the same beta_1, beta_2, epsilon and decay share.

    Attributes:
        beta_1, beta_2: as C floats, which `powf` takes.
        vanished_1, vanished_2: a step t from which on beta^t is too small to change 1 - beta^t, which is then 1: below
            2^-25, half the distance of 1 to its neighbour. Stated for 2^-26, so that no rounding of a power matters.
        others: 1 - beta_1, 1 - beta_2 and epsilon.
        powf: the C library's.
    """

    beta_1: c_float
    beta_2: c_float
    vanished_1: float
    vanished_2: float
    others: tuple[float, float, float]
    powf: Any


@functools.lru_cache(64)
def _constants(beta_1: float, beta_2: float, epsilon: float, decay: float) -> _Constants:
    """Round the values to float32; ArgumentValueError where that breaks a rule."""
    for name, value in (("beta_1", beta_1), ("beta_2", beta_2)):
        if np.float32(value) == 1:
            rule = "must be below 1 after rounding to float32"
            raise ArgumentValueError(name, rule, value, "pass at most 0.9999999, or use float64 variables")
    for name, value in (("epsilon", epsilon), ("decay", decay)):
        if value > _LARGEST or (name == "epsilon" and 0 < value < _TINY):
            rule = f"must be 0 or at least {_TINY:.3g}, and at most {_LARGEST:.3g}, for float32 variables"
            raise ArgumentValueError(name, rule, value, "pass another value, or use float64 variables")
    one, two = np.float32(beta_1), np.float32(beta_2)
    return _Constants(
        c_float(float(one)),
        c_float(float(two)),
        _vanished(float(one)),
        _vanished(float(two)),
        (float(_ONE - one), float(_ONE - two), float(np.float32(epsilon))),
        _powf(),
    )


def _vanished(beta: float) -> float:
    return -26 / math.log2(beta) if beta > 0 else 0.0


@functools.cache
def _powf() -> Any:
    """The C library's powf, as the reference uses: numpy.power on float32 differs from it in the last bit.

    It takes C floats only: without argtypes ctypes has nothing to convert, which takes a third of a call.
    """
    try:
        powf = ctypes.CDLL("libm.so.6").powf
    except OSError:  # not glibc
        powf = ctypes.CDLL(ctypes.util.find_library("m")).powf
    powf.restype = c_float
    return powf
