"""What users pass for numbers, as arrays: looked at in the dtype that it has, and cast where nothing is lost by kind.

NumPy asked for a dtype at once makes numbers of texts, dates, None and truth values, drops imaginary parts and masks,
and lets what is too large become infinite.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_adam.devices import Array, Device, device_of, view_of
from gpu_adam.devices.torch_tensors import readable
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, GpuAdamError
from gpu_adam.rules import shown

_KINDS = {"b": 0, "i": 1, "u": 1, "f": 2, "V": 2, "c": 3}
"""Kinds of dtypes, each with a place in those of no lower number. "V": the dtypes of ml_dtypes, bfloat16 for one."""

_WANTED = ("truth values", "whole numbers", "real numbers", "numbers")
IN_HOST_MEMORY = (list, tuple, int, float, complex)
"""Types of what is no array, and is copied to wherever it is to go."""


def place_of(value: Any) -> Device | None:
    """The device in whose memory a value lies; None for numbers and lists."""
    return None if isinstance(value, (*IN_HOST_MEMORY, np.generic)) else device_of(value)


def as_numbers(value: Any, argument: str, remedy: str = "pass numbers or an array") -> Array:
    """`value` as an array where it lies and in the dtype that it has, without a copy if it is an array.

    Args:
        value: a number, a nested list of numbers, or an array of any device.
        argument: what the value was given as, for messages.
        remedy: what to do about a value that is refused.

    Raises:
        ArgumentTypeError: something in it is no number (None, a text, a date, any object), a list is ragged, an array
            is masked, or does not hand its memory out.
    """
    array: Array
    value = readable(value, argument)
    place = place_of(value)
    if place is None:
        try:
            array = np.asarray(value)
        except GpuAdamError:
            raise
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ArgumentTypeError(argument, "must consist of numbers", error, remedy) from error
    elif np.ma.is_masked(value):
        rule, got = "must have a number in every place", "a masked array"
        raise ArgumentTypeError(argument, rule, got, "pass its filled(0), say")
    elif isinstance(value, np.ndarray):
        array = np.asarray(value)  # not one of a subclass, such as a matrix, whose operators are its own
    else:
        array = value if isinstance(value, place.xp.ndarray) else view_of(value, place, argument)
    if array.dtype.kind not in _KINDS or array.dtype.names is not None or array.dtype.type is np.void:
        got = shown(value) if place is None else f"an array of {array.dtype}"
        raise ArgumentTypeError(argument, "must consist of numbers", got, remedy)
    return array


def cast(array: Array, dtype: np.dtype, argument: str) -> Array:
    """An array of numbers in another dtype; the array itself where the dtype is its own.

    Real numbers become complex ones, whole ones real, and all are rounded to the dtype's precision. What would be lost
    is refused: imaginary parts, fractions, and on the host, where it can be seen without waiting, what has no place in
    the dtype's range. Truth values are no numbers.

    Raises:
        ArgumentTypeError: numbers of a kind that the dtype has no place for.
        ArgumentValueError: a number outside of the dtype's range.
    """
    if array.dtype == dtype:
        return array
    kind, wanted = _KINDS[array.dtype.kind], _KINDS[dtype.kind]
    if array.size and (kind > wanted or (kind == 0) != (wanted == 0)):
        got = "truth values" if kind == 0 else f"numbers of {array.dtype}"
        raise ArgumentTypeError(argument, f"must consist of {_WANTED[wanted]} for {dtype}", got, "convert it first")
    if not isinstance(array, np.ndarray):
        place = device_of(array)
        assert place is not None
        with place.activate():
            return array.astype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(dtype)
    lost = converted != array if wanted == 1 else np.isinf(converted) & ~np.isinf(array)
    if lost.any():
        rule = f"must lie in the range of {dtype}"
        raise ArgumentValueError(argument, rule, array[lost].flat[0], "scale it, or use a wider dtype")
    return converted


def on_host(array: Array) -> np.ndarray:
    """An array of any device as one in host memory: itself, or a copy for which the host waits."""
    if isinstance(array, np.ndarray):
        return array
    place = device_of(array)
    assert place is not None
    return place.numpy(array)


def copied_to(device: Device, array: Array) -> Array:
    """A copy on `device` of an array of any device."""
    return device.array(on_host(array) if device.xp is np else array)
