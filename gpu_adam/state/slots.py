"""The arrays behind slots: where they lie, how they begin, and what may be written into them."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_adam.conversion import as_numbers, cast, copied_to, on_host, place_of
from gpu_adam.devices import Array, Device, find_device
from gpu_adam.errors import ArgumentValueError
from gpu_adam.variables import Variable

_REMEDY = "pass the arrays of an optimizer of the same variables, in their order"
_FILLS = {"zeros": 0, "ones": 1}


def beside(values: Array, variable: Variable) -> Array:
    """A copy of `values` as far from a 16-byte boundary as the variable."""
    device = variable.device
    array = device.zeros(tuple(values.shape), values.dtype, like=variable._storage)
    with device.activate():
        array[...] = values
    return array


def _offset(variable: Variable) -> int:
    return variable.device.address(variable._storage) % 16 // variable.dtype.itemsize


def is_beside(slot: Variable, variable: Variable) -> bool:
    """Whether a slot lies as many elements past a 16-byte boundary as its variable."""
    if variable.size == 0 or slot.size == 0:
        return True
    pack = max(1, 16 // slot.dtype.itemsize)
    return _offset(slot) % pack == _offset(variable) % pack


def initialized(initializer: Any, shape: tuple[int, ...], dtype: np.dtype, device: Device | str | None) -> Any:
    """The array that an initializer makes: "zeros", "ones", a callable(shape=, dtype=), or the value itself."""
    device = find_device(device)
    if isinstance(initializer, str):
        if initializer not in _FILLS:
            raise ArgumentValueError(
                "initializer",
                f"must be one of {list(_FILLS)}",
                f"unknown initializer {initializer!r}",
                "pass a callable",
            )
        array = device.zeros(shape, dtype)
        with device.activate():
            array.fill(_FILLS[initializer])
        return array
    if initializer is None:
        raise ArgumentValueError(
            "initializer", "must make an array", None, "pass 'zeros', 'ones', a callable or a value"
        )
    value = initializer(shape=shape, dtype=dtype) if callable(initializer) else initializer
    value = value.value if isinstance(value, Variable) else value
    array = cast(as_numbers(value, "initializer", "pass 'zeros', or an array"), dtype, "initializer")
    return copied_to(device, array)


def as_slot(value: Any, slot: Variable, argument: str, *, from_file: bool) -> Array:
    """A contiguous array of its own with the slot's shape and dtype: what `Device.copy_call` copies into the slot.

    Args:
        value: numbers, an array on any device, or a Variable.
        slot: what the array is for.
        argument: the value's name, for messages.
        from_file: whether the value comes from a file: then its dtype must be the slot's, and it is not copied.

    Returns:
        An array in host memory; on the slot's device where the value lies there.

    Raises:
        ArgumentTypeError: no numbers.
        ArgumentValueError: another shape, or another dtype than is allowed.
    """
    array = as_numbers(value.value if isinstance(value, Variable) else value, argument, _REMEDY)
    if place_of(array) is not slot.device:
        array = on_host(array)
    if tuple(array.shape) != slot.shape:
        rule = f"must have shape {slot.shape} for {slot.name!r}"
        raise ArgumentValueError(argument, rule, tuple(array.shape), _REMEDY)
    if from_file and array.dtype != slot.dtype:
        rule = f"must have dtype {slot.dtype} for {slot.name!r}"
        raise ArgumentValueError(argument, rule, array.dtype, "save it from variables of the same dtype")
    own = cast(array, slot.dtype, argument)
    if isinstance(own, np.ndarray):
        return np.array(own, order="C", copy=None if from_file or own is not array else True)
    return slot.device.array(own)
