"""The counter of steps: which numbers it may hold."""

from __future__ import annotations

from typing import Any

from gpu_adam.conversion import as_numbers, on_host
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.variables import Variable

LAST_COUNT = 2**63 - 2
"""The largest number of steps done after which another step can be counted in an int64."""


def checked_count(value: Any, argument: str) -> int:
    """`value` as a number of steps done: an integer in [0, 2^63 - 1).

    Raises:
        ArgumentTypeError: no real number.
        ArgumentValueError: a number that is not whole, or outside the range.
    """
    remedy = "pass the number of steps done"
    array = on_host(as_numbers(value.value if isinstance(value, Variable) else value, argument, remedy))
    if array.shape != () or array.dtype.kind not in "iuf":
        what = f"{type(value).__name__} of {array.dtype}" if array.shape == () else f"shape {array.shape}"
        raise ArgumentTypeError(argument, "must be a whole number", what, remedy)
    if array.dtype.kind == "f" and not float(array).is_integer():
        raise ArgumentValueError(argument, "must be a whole number", array, remedy)
    count = int(array)
    if not 0 <= count <= LAST_COUNT:
        raise ArgumentValueError(argument, "must lie in [0, 2^63 - 1)", count, remedy)
    return count


def check_countable(counter: Variable) -> int:
    """The number of steps done, after which another step can be counted.

    Raises:
        ArgumentValueError: the counter, which anyone may write, holds no such number, or can no longer be written.
    """
    value = counter._storage  # its contents too: no update writes a counter, and no loss is being differentiated
    done = int(value.item())
    if not 0 <= done <= LAST_COUNT:
        raise ArgumentValueError(
            "iterations", "must lie in [0, 2^63 - 1) before a step", done, "assign the number of steps done"
        )
    if not value.flags.writeable:
        raise ArgumentValueError("iterations", "must be writeable", "a read-only array", "set its flag `writeable`")
    return done
