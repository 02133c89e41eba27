"""Where and how the memory of an array-like object lies, read from the object without making a view of its memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Placement(NamedTuple):
    """What must not change behind a variable's back.

    Attributes:
        address: of the first element.
        shape: of the array.
        dtype: in the words of the object's own framework; comparable within it.
        strides: in the words of the object's own framework.
        writeable: whether the object allows that its memory is written.
    """

    address: int
    shape: tuple[int, ...]
    dtype: Any
    strides: Any
    writeable: bool


def placement_of(obj: Any) -> Placement | None:
    """The placement of an array of NumPy, CuPy or torch, or of an object with an array interface; None for others."""
    if isinstance(obj, np.ndarray):
        address, is_read_only = obj.__array_interface__["data"]
        return Placement(address, obj.shape, obj.dtype, obj.strides, not is_read_only)
    if hasattr(obj, "data_ptr"):  # torch
        return Placement(obj.data_ptr(), tuple(obj.shape), obj.dtype, obj.stride(), True)
    memory = getattr(obj, "data", None)
    address = getattr(memory, "ptr", None)
    if address is not None:  # CuPy, whose array interface would have to look up the current stream
        return Placement(address, obj.shape, obj.dtype, obj.strides, True)
    for name in ("__cuda_array_interface__", "__array_interface__"):
        interface = getattr(obj, name, None)
        if interface is not None:
            address, is_read_only = interface["data"]
            return Placement(
                address, tuple(interface["shape"]), interface["typestr"], interface.get("strides"), not is_read_only
            )
    return None


def has_all_its_memory(obj: Any) -> bool:
    """Whether a torch tensor's storage still holds all its elements: `untyped_storage().resize_` takes them away."""
    if not hasattr(obj, "untyped_storage"):
        return True
    try:
        steps = sum((size - 1) * stride for size, stride in zip(obj.shape, obj.stride(), strict=True))
        end = obj.storage_offset() + steps + 1 if obj.numel() else 0
        return bool(obj.untyped_storage().nbytes() >= end * obj.element_size())
    except (NotImplementedError, RuntimeError):  # sparse, or without memory at all: a view of its memory is refused
        return True
