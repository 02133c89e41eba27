"""Gradients: what may be passed as one, and clipping by norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices import Array, Device, device_of
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.hyperparameters import Clip
from gpu_adam.trace import stage
from gpu_adam.variables import Variable


def as_array(gradient: Any, variable: Variable, what: str = "gradient") -> Array:
    """`gradient` as a C-contiguous array on the variable's device, with the variable's dtype; its shape is as given.

    Arrays are taken as they are, lists and Python numbers are converted.

    Args:
        gradient: an array of the variable's device and dtype, a Variable, a nested list or a number.
        variable: the variable it belongs to.
        what: the gradient's part, for messages.

    Raises:
        ArgumentTypeError: it makes no array of numbers.
        ArgumentValueError: another dtype or device than the variable's.
    """
    argument = f"{what} of variable {variable.name!r}"
    array = on_device(gradient, variable.device, argument, variable.dtype)
    if array.dtype != variable.dtype:
        raise ArgumentValueError(argument, f"must have dtype {variable.dtype}", array.dtype, "cast it with astype")
    return array


def on_device(obj: Any, device: Device, argument: str, dtype: np.dtype | None) -> Array:
    """`obj` as a C-contiguous array on `device`; lists and Python numbers are converted, to `dtype` where it is given.

    Raises:
        ArgumentTypeError: it makes no array of numbers.
        ArgumentValueError: it lies on another device.
    """
    array = obj.value if isinstance(obj, Variable) else obj
    if isinstance(array, (list, tuple, int, float, complex)):
        if device.is_capturing():  # a copy from memory that is gone at the replays
            got = type(array).__name__
            raise ArgumentTypeError(argument, "must be an array while a graph is captured", got, f"use {device.name}'s")
        try:
            array = device.array(np.asarray(array, dtype))
        except (TypeError, ValueError) as error:
            raise ArgumentTypeError(argument, "must consist of numbers", error, "pass an array") from error
    elif isinstance(array, np.generic) and device.xp is np:
        array = np.asarray(array)
    elif not isinstance(array, device.xp.ndarray):
        array = _foreign(array, device, argument)
    place = device_of(array)
    if place is None or place.name != device.name:
        where = "an array elsewhere" if place is None else f"an array on {place.name}"
        raise ArgumentValueError(argument, f"must lie on {device.name}", where, "move it there")
    with device.current():
        array = device.xp.ascontiguousarray(array) if array.ndim else array
    # The kernels load whole elements: a complex array may begin in the middle of one.
    return device.array(array) if array.size and device.address(array) % array.dtype.itemsize else array


def _foreign(obj: Any, device: Device, argument: str) -> Array:
    place = device_of(obj)
    if place is None:
        raise ArgumentTypeError(argument, "must be an array", type(obj).__name__, f"pass an array on {device.name}")
    array = device.view(obj) if place.name == device.name else None
    if array is None:
        raise ArgumentValueError(argument, f"must lie on {device.name}", f"an array on {place.name}", "move it there")
    return array


def check_shape(array: Array, shape: tuple[int, ...], variable: Variable, what: str = "gradient") -> None:
    """ArgumentValueError unless the array has exactly this shape."""
    if tuple(array.shape) != shape:
        raise ArgumentValueError(
            f"{what} of variable {variable.name!r}", f"must have shape {shape}", tuple(array.shape), "reshape it"
        )


class Clippable(Protocol):
    """What a norm is taken of: the gradients that one kernel launch updates with."""

    device: Device
    dtype: str
    tensors: int

    def sum_count(self) -> int:
        """How many partial sums the gradients have now."""

    def square_sums(self, address: int, clip_value: float) -> None:
        """Enqueue the partial sums of squares to the float64 array at `address`."""

    def ends(self) -> Array | None:
        """Device array with the end of each tensor's partial sums; None for a single tensor."""

    def set_factors(self, address: int, stride: int) -> None:
        """Let the update read its clip factors there."""


class NormClipping:
    """Clipping by norm for the launches of a step: the norms and factors never leave the device (norm.cu).

    Args:
        members: the launches.
        global_norm: one norm over all of them, or one for each tensor.

    Raises:
        ArgumentValueError: a global norm over more than one device.
    """

    def __init__(self, members: Sequence[Clippable], *, global_norm: bool) -> None:
        places = {member.device.name for member in members}
        if global_norm and len(places) > 1:
            raise ArgumentValueError(
                "global_clipnorm", "must be taken over one device", sorted(places), "step each device's variables apart"
            )
        self._groups = [members] if global_norm else [[member] for member in members]
        self._passes = [_NormPass(group, global_norm=global_norm) for group in self._groups]

    @stage("clip")
    def enqueue(self, clip: Clip) -> None:
        """Enqueue both passes for the members' present gradients."""
        limit = clip.clipnorm if clip.global_clipnorm is None else clip.global_clipnorm
        for norm_pass in self._passes:
            norm_pass.enqueue(clip, limit)


class _NormPass:
    def __init__(self, members: Sequence[Clippable], *, global_norm: bool) -> None:
        self._members, self._device = members, members[0].device
        self._capacity = 0
        self._sums: list[Array] = []  # outgrown ones too: a captured graph may hold them
        self._sums_pointer, self._count = kernels.pointer(0), kernels.scalar(0)
        self._limit = kernels.scalar(0, np.float64)
        tensors = 1 if global_norm else members[0].tensors
        self._blocks = tensors
        self._factors = self._device.empty(tensors, np.dtype(np.float64))
        factors = kernels.pointer(self._device.address(self._factors))
        for member in members:
            member.set_factors(self._device.address(self._factors), 0 if global_norm else 1)
        if global_norm:
            kernel = kernels.norm(members[0].dtype, "clip_by_global_norm")
            arguments = [self._sums_pointer, self._count, self._limit, factors]
        else:
            self._ends = members[0].ends()
            ends = kernels.pointer(0 if self._ends is None else self._device.address(self._ends))
            kernel = kernels.norm(members[0].dtype, "clip_by_norm")
            arguments = [self._sums_pointer, ends, kernels.scalar(tensors), self._count, self._limit, factors]
        self._launch = self._device.prepare(kernel, arguments)

    def enqueue(self, clip: Clip, limit: float | None) -> None:
        counts = [member.sum_count() for member in self._members]
        total = sum(counts)
        if total > self._capacity:
            self._capacity = max(total, 2 * self._capacity)
            self._sums.append(self._device.empty(self._capacity, np.dtype(np.float64)))
            self._sums_pointer[0] = self._device.address(self._sums[-1])
        address = int(self._sums_pointer[0])
        for member, count in zip(self._members, counts, strict=True):
            member.square_sums(address, clip.value_in(kernels.DTYPES[member.dtype].real_dtype))
            address += 8 * count
        self._count[0] = total
        self._limit[0] = limit
        if self._blocks:
            self._launch(self._blocks)
