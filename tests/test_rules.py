"""The check of numbers: what counts as one, what it becomes, and the messages."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from gpu_adam import Variable, rules
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3),
        (-0.5, -0.5),
        (np.float16(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.array(0.25, np.float32), 0.25),
        (np.array(Fraction(1, 2)), 0.5),
        (Fraction(1, 4), 0.25),
        (Variable(np.float64(0.125), device="host"), 0.125),
    ],
    ids=lambda value: type(value).__name__,
)
def test_real_numbers_become_pythons_own(value: Any, number: float) -> None:
    found = rules.real_number("x", value)
    assert found == number
    assert type(found) is type(number)


@pytest.mark.parametrize(
    "value",
    [
        None, True, np.True_, "1", b"1", 1j, np.complex64(1), np.array("1"), np.array(None), np.ones(1), [1.0], {},
        object, lambda: 1.0,
    ],
    ids=lambda value: f"{type(value).__name__} {value}"[:20],
)  # fmt: skip
def test_what_is_no_real_number(value: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^x must be a real number \(got .*\); pass a float\.$"):
        rules.real_number("x", value)


def test_an_integer_larger_than_any_float() -> None:
    with pytest.raises(ArgumentValueError, match=r"^x must be at most 1\.8e\+308 \(got int 10000.*\.\.\.\); pass less"):
        rules.real_number("x", 10**400)


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (rules.FINITE, [0, -1e308], [math.inf, -math.inf]),
        (rules.FINITE_NOT_NEGATIVE, [0, 1e308], [-5e-324, math.inf]),
        (rules.POSITIVE, [5e-324, math.inf], [0, -1]),
        (rules.NOT_NEGATIVE, [0, math.inf], [-5e-324]),
        (rules.BELOW_ONE, [0, 1 - 2**-53], [1, -0.1]),
    ],
    ids=lambda value: getattr(value, "text", ""),
)
def test_rules(rule: rules.Rule, good: list[float], bad: list[float]) -> None:
    for number in good:
        rule.check("x", number)
    for number in [*bad, math.nan]:
        with pytest.raises(ArgumentValueError) as caught:
            rule.check("x", number)
        assert str(caught.value) == f"x {rule.text} (got {number}); {rule.remedy}."


def test_limits_are_those_of_the_dtypes() -> None:
    for name, (tiny, largest) in rules.LIMITS.items():
        dtype = np.dtype(name).type
        assert dtype(tiny) == tiny
        assert 0 < float(np.nextafter(dtype(tiny), dtype(0))) < tiny
        assert float(np.nextafter(dtype(math.inf), dtype(0))) == largest
