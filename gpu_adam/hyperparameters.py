"""Hyperparameters: numbers, callables and schedules, their rules, and clipping; step/scalars.py evaluates them."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np

from gpu_adam.errors import ArgumentValueError
from gpu_adam.rules import BELOW_ONE, FINITE, FINITE_NOT_NEGATIVE, LIMITS, NOT_NEGATIVE, POSITIVE, Rule, real_number
from gpu_adam.schedules import LearningRateSchedule
from gpu_adam.variables import Variable

DEFAULT_EPSILON = 1e-7

_CLIPPING = POSITIVE._replace(remedy="pass None for no clipping")
_RULES: dict[str, Rule] = {
    "learning_rate": FINITE._replace(remedy="pass a finite number"),
    "beta_1": BELOW_ONE._replace(remedy="pass 0.9, say"),
    "beta_2": BELOW_ONE._replace(remedy="pass 0.999, say"),
    "epsilon": NOT_NEGATIVE._replace(remedy="pass 1e-7, say"),
    "decay": Rule("must be >= 0 and finite", FINITE_NOT_NEGATIVE.holds, "pass 0 for no decay"),
    "clipnorm": _CLIPPING,
    "clipvalue": _CLIPPING,
    "global_clipnorm": _CLIPPING,
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
    rule = _RULES[name]
    kind = "a real number" + (" or a callable without arguments" if name in _MAY_BE_CALLABLE else "")
    number = float(real_number(name, value, kind=kind, remedy=rule.remedy))
    rule.check(name, number)
    return number


def evaluated(name: str, value: Any) -> float:
    """The number that a stored callable, variable or 0-d array has now; schedules are for `step.scalars.Scalars`."""
    return as_number(name, value() if callable(value) and not _is_live(value) else value)


def _is_live(value: Any) -> bool:
    return isinstance(value, Variable) or (hasattr(value, "dtype") and not isinstance(value, (np.generic, float)))


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

    @property
    def norm(self) -> Literal["each", "global"] | None:
        """Which norm is bounded: that of each gradient, the one over all gradients together, or none."""
        if self.global_clipnorm is not None:
            return "global"
        return None if self.clipnorm is None else "each"

    @property
    def limit(self) -> float | None:
        """The bound of that norm."""
        return self.clipnorm if self.global_clipnorm is None else self.global_clipnorm

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped in any way."""
        return self != NO_CLIPPING

    def value_in(self, dtype: str) -> float:
        """`clipvalue` as the kernels of a dtype take it: infinite where nothing is bounded.

        Raises:
            ArgumentValueError: the dtype would flush it to 0.
        """
        value, limits = self.clipvalue, LIMITS[dtype]
        if value is None or value > limits.max:
            return math.inf
        if value < limits.tiny:
            rule = f"must be at least {limits.tiny:.3g}, the smallest {dtype} that is not flushed to 0"
            raise ArgumentValueError("clipvalue", rule, value, "pass None for no clipping, or a larger bound")
        return value


NO_CLIPPING = Clip(None, None, None)


class PresentValue(float):
    """What a hyperparameter is when it is read: a float, with what the reference's variables offer besides.

    ``adam.learning_rate.assign(0.1)`` is ``adam.learning_rate = 0.1``. Copies and pickles are plain floats.

    Args:
        value: the number.
        optimizer: whose hyperparameter it is.
        name: the hyperparameter's.
    """

    dtype = np.dtype(np.float64)  # which tf.keras.backend.set_value looks at
    _optimizer: Any
    _name: str

    def __new__(cls, value: float, optimizer: Any, name: str) -> PresentValue:
        """The value of the optimizer's hyperparameter of that name."""
        self = super().__new__(cls, value)
        self._optimizer, self._name = optimizer, name
        return self

    def assign(self, value: Any) -> Any:
        """Give the hyperparameter another number; an array is read now, once. Returns the value after that."""
        setattr(self._optimizer, self._name, as_number(self._name, value))
        return getattr(self._optimizer, self._name)

    def numpy(self) -> np.float64:
        """The number as NumPy's."""
        return np.float64(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return float, (float(self),)

    def __copy__(self) -> float:
        return float(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> float:
        return float(self)


class Hyperparameter:
    """An attribute of an optimizer that reads as its present value and may be assigned at any time.

    A number, or what a function returns, reads as a `PresentValue`; a schedule, variable or array as itself.

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
        if callable(value) and not isinstance(value, LearningRateSchedule):
            value = evaluated(self.name, value)
        return PresentValue(value, optimizer, self.name) if type(value) is float else value

    def __set__(self, optimizer: Any, value: Any) -> None:
        new, old = checked(self.name, value), optimizer._hyper[self.name]
        if isinstance(old, Variable) and type(new) is float:
            old.assign(new)  # a variable given as hyperparameter is shared with whoever gave it
        else:
            optimizer._hyper[self.name] = new


class ClipAttribute:
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
