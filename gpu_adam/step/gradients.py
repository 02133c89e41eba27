"""What may be passed as a gradient, or as a part of one: arrays as they are, numbers and lists as arrays."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from gpu_adam.conversion import IN_HOST_MEMORY, as_numbers, cast
from gpu_adam.devices import Array, Device, device_of, view_of
from gpu_adam.devices.placement import has_all_its_memory
from gpu_adam.devices.torch_tensors import readable
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.kernels import MIXING, dtype_named
from gpu_adam.uninterrupted import Call
from gpu_adam.variables import IndexedSlices, Variable


class Incoming:
    """What the gradients of a step are multiples of.

    Args:
        scale: by which they are to be divided: a number; for a rule that is guarded also a 0-d array on the device.
            None: the optimizer's loss scale, if it has one.
        found_inf: for a guarded rule, a 0-d float32 array on the device: where it is not 0, the step changes nothing.
        calls: over how many calls they were summed.
        taken: calls to be made with the step's launches, once nothing can fail any more.

    Attributes:
        scale, found_inf, calls, taken: as above.
        divisor: by which number the gradients are to be divided, besides a scale that the device knows.
    """

    __slots__ = ("calls", "divisor", "found_inf", "scale", "taken")

    def __init__(self, scale: Any = None, found_inf: Any = None, calls: int = 1, taken: tuple[Call, ...] = ()) -> None:
        self.scale, self.found_inf, self.calls, self.taken = scale, found_inf, calls, taken
        self.divisor: float = calls * (scale if type(scale) is float else 1.0)


AS_THEY_ARE = Incoming()


class OtherDtypeError(Exception):
    """A gradient has another dtype than the launches read, though one that other launches do."""


def dtype_read(gradient: Any, variable: Variable) -> np.dtype:
    """The dtype in which the kernels read a gradient: its own where they mix it with the variable's, else that one.

    Args:
        gradient: anything, IndexedSlices among it.
        variable: the variable it belongs to.
    """
    own = variable.dtype
    dtype = getattr(gradient.values if isinstance(gradient, IndexedSlices) else gradient, "dtype", own)
    return own if dtype is own else _dtype_read(str(dtype), own)


@functools.lru_cache(64)  # a dtype of NumPy makes its name anew each time
def _dtype_read(name: str, own: np.dtype) -> np.dtype:
    name = name.removeprefix("torch.")
    return dtype_named(name) if name in MIXING and own.name in MIXING else own


def as_array(gradient: Any, variable: Variable, dtype: np.dtype, what: str = "gradient") -> Array:
    """`gradient` as a C-contiguous array on the variable's device, with that dtype; its shape is as given.

    Arrays are taken as they are, lists and Python numbers are converted.

    Args:
        gradient: an array of the variable's device, a Variable, a nested list or a number.
        variable: the variable it belongs to.
        dtype: what `dtype_read` gave, for this gradient or one before it.
        what: the gradient's part, for messages.

    Raises:
        ArgumentTypeError: `gradient` makes no array of numbers.
        ArgumentValueError: another device than the variable's; a dtype that does not mix with the variable's.
        OtherDtypeError: another dtype, which does.
    """
    argument = f"{what} of variable {variable.name!r}"
    array = on_device(gradient, variable.device, argument, dtype)
    if array.dtype != dtype:
        if array.dtype == dtype_read(array, variable):
            raise OtherDtypeError(argument)
        mixing = " or ".join(MIXING) if variable.dtype.name in MIXING else variable.dtype
        raise ArgumentValueError(argument, f"must have dtype {mixing}", array.dtype, "cast it with astype")
    return array


def on_device(obj: Any, device: Device, argument: str, dtype: np.dtype | None) -> Array:
    """`obj` as a C-contiguous array on `device`; lists and Python numbers are converted, to `dtype` where it is given.

    Raises:
        ArgumentTypeError: `obj` makes no array of numbers.
        ArgumentValueError: `obj` lies on another device.
    """
    array = obj.value if isinstance(obj, Variable) else obj
    if isinstance(array, IN_HOST_MEMORY):
        array = as_numbers(array, argument, "pass an array")
        array = device.array(array if dtype is None else cast(array, dtype, argument))
    elif isinstance(array, (np.generic, np.ma.MaskedArray)) and device.xp is np:
        array = as_numbers(array, argument)
    elif not isinstance(array, device.xp.ndarray):
        array = _foreign(array, device, argument)
    place = device_of(array)
    if place is None or place.name != device.name:
        where = "an array elsewhere" if place is None else f"an array on {place.name}"
        raise ArgumentValueError(argument, f"must lie on {device.name}", where, "move it there")
    with device.activate():
        array = device.xp.ascontiguousarray(array) if array.ndim else array
    # The kernels load whole elements: a complex array may begin in the middle of one.
    return device.array(array) if array.size and device.address(array) % array.dtype.itemsize else array


def _foreign(obj: Any, device: Device, argument: str) -> Array:
    obj = readable(obj, argument)
    place = device_of(obj)
    if place is None:
        raise ArgumentTypeError(argument, "must be an array", type(obj).__name__, f"pass an array on {device.name}")
    if not has_all_its_memory(obj):
        got = "a storage that was resized"
        raise ArgumentValueError(argument, "must have memory for all its elements", got, "resize the storage back")
    array = view_of(obj, device, argument) if place.name == device.name else None
    if array is None:
        raise ArgumentValueError(argument, f"must lie on {device.name}", f"an array on {place.name}", "move it there")
    return array


def check_shape(array: Array, shape: tuple[int, ...], variable: Variable, what: str = "gradient") -> None:
    """ArgumentValueError unless the array has exactly this shape."""
    if tuple(array.shape) != shape:
        raise ArgumentValueError(
            f"{what} of variable {variable.name!r}", f"must have shape {shape}", tuple(array.shape), "reshape it"
        )
