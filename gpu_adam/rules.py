"""One check of numbers, for hyperparameters and schedules: is it a real number, and does it obey its rule?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu_adam.errors import ArgumentTypeError, ArgumentValueError


class Rule(NamedTuple):
    """What a number must obey.

    Attributes:
        text: the rule as errors say it, starting with a verb.
        holds: whether a number obeys it; False for NaN, unless the rule allows NaN.
        remedy: what to do about a number that does not, as an imperative.
    """

    text: str
    holds: Callable[[float], bool]
    remedy: str = "choose a value in this range"

    def check(self, argument: str, number: float) -> None:
        """Raise ArgumentValueError unless `number`, given as `argument`, obeys the rule."""
        if not self.holds(number):
            raise ArgumentValueError(argument, self.text, number, self.remedy)


FINITE = Rule("must be finite", math.isfinite)
FINITE_NOT_NEGATIVE = Rule("must be finite and >= 0", lambda x: 0 <= x < math.inf)
POSITIVE = Rule("must be > 0", lambda x: x > 0)
NOT_NEGATIVE = Rule("must be >= 0", lambda x: x >= 0)
BELOW_ONE = Rule("must lie in [0, 1)", lambda x: 0 <= x < 1)


class Limits(NamedTuple):
    """The range of a floating-point dtype.

    Attributes:
        tiny: its smallest positive normal number; the kernels flush less to 0.
        max: its largest finite number.
    """

    tiny: float
    max: float


LIMITS = {name: Limits(float(np.finfo(name).tiny), float(np.finfo(name).max)) for name in ("float32", "float64")}


def real_number(argument: str, value: Any, *, kind: str = "a real number", remedy: str = "pass a float") -> float:
    """`value` as a Python number: an int as it is, any other real number or 0-d array as a float.

    Args:
        argument: what `value` was given as, for the message.
        value: of any type. Reading an array on a CUDA device makes the host wait.
        kind: what the argument may be, for the message.
        remedy: what to do instead, for the message.

    Raises:
        ArgumentTypeError: it is no real number; truth values, texts and arrays with an axis are none.
        ArgumentValueError: it is a finite number larger than any float.
    """
    if type(value) is float:
        return value
    number: float | None = None
    if not _is_something_else(value):
        try:
            number = float(value)
        except (TypeError, ValueError):  # an array of texts or objects
            number = None
        except OverflowError as error:
            largest = f"{LIMITS['float64'].max:.3g}"
            raise ArgumentValueError(argument, f"must be at most {largest}", shown(value), "pass less") from error
    if number is None:
        raise ArgumentTypeError(argument, f"must be {kind}", shown(value), remedy)
    return value if type(value) is int else number


def truth_value(argument: str, value: Any) -> bool:
    """`value` as True or False: one of the two, Python's or NumPy's, or 1 or 0.

    Raises:
        ArgumentTypeError: something else, whose truth would be an accident: the text "False" is true.
    """
    if isinstance(value, (bool, np.bool_)) or (type(value) is int and value in (0, 1)):
        return bool(value)
    raise ArgumentTypeError(argument, "must be True or False", shown(value), "pass True or False")


def one_of(argument: str, value: Any, choices: Sequence[str]) -> str:
    """`value` as one of some words.

    Raises:
        ArgumentValueError: another word, or none.
    """
    if isinstance(value, str) and value in choices:
        return str(value)
    raise ArgumentValueError(argument, f"must be one of {', '.join(choices)}", shown(value), "pass one of them")


def is_whole(value: Any) -> bool:
    """Whether `value` is an integer of Python or NumPy: no truth value, and no span of time, an integer to NumPy."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.timedelta64))


def items_of(argument: str, values: Any, rule: str, remedy: str = "pass a list") -> list[Any]:
    """The items of what can be iterated over, as a list.

    Raises:
        ArgumentTypeError: a text, or what has no items, such as an array without an axis.
    """
    try:
        iterator = None if isinstance(values, (str, bytes)) else iter(values)
    except TypeError:
        iterator = None
    if iterator is None:
        raise ArgumentTypeError(argument, rule, type(values).__name__, remedy)
    return list(iterator)


def _is_something_else(value: Any) -> bool:
    """Whether `value` is something else than one real number, though Python or NumPy may make a float of it."""
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__") or getattr(value, "ndim", 0) != 0:
        return True
    return getattr(getattr(value, "dtype", None), "kind", "f") in "bcSUMm" or np.ma.is_masked(value)


def shown(value: Any) -> str:
    """`value` as messages show it: its text, or its type and the beginning of its text where that is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:40]}..."
