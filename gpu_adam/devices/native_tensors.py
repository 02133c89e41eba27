"""Reading where torch's tensors lie, and whether dicts hold the same ones: in one call of cuda/host/tensors.cpp."""

from __future__ import annotations

import ctypes
import functools
import operator
import sysconfig
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpu_adam import kernels
from gpu_adam.errors import DeviceError, KernelCompileError

TENSOR = np.dtype([("type", np.uint64), ("shape", np.uint64), *((name, np.int64) for name in ("ndim", "code", "bits"))])
"""``ExpectedTensor`` of cuda/host/tensors.cpp."""

_CODES = {"i": 0, "u": 1, "f": 2, "V": 4, "c": 5}  # DLPack's, for NumPy's kinds; "V" is bfloat16 of ml_dtypes
_DEVICES = {"cpu": 1, "cuda": 2}  # DLPack's, for torch's


class NativeTensorReader:
    """Reads the addresses of one tensor for each of some shapes and dtypes.

    It looks at class, shape, dtype, device, order and alignment; not at what DLPack leaves out: whether a tensor
    requires its gradient, is to be negated or conjugated when it is read, and has lost a part of its storage.

    Args:
        torch: the module; `is_available` for it.
        types: the class of each tensor, `torch.Tensor` or one below it that has its memory.
        shapes: of the tensors.
        dtypes: of the tensors.
    """

    def __init__(
        self, torch: Any, types: Sequence[type], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype]
    ) -> None:
        self._types = list(types)  # kept alive, for they are compared by address
        self._sizes = np.array([size for shape in shapes for size in shape] or [0], np.int64)
        ndims = np.array([len(shape) for shape in shapes], np.int64)
        self._table = table = np.zeros(len(shapes), TENSOR)
        table["type"], table["ndim"] = list(map(id, self._types)), ndims
        table["shape"] = self._sizes.ctypes.data + (np.cumsum(ndims) - ndims) * self._sizes.itemsize
        table["code"] = [_CODES.get(dtype.kind, -1) for dtype in dtypes]
        table["bits"] = [8 * dtype.itemsize for dtype in dtypes]
        self._read, self._api = _library().tensor_addresses, _api(torch)
        self._arguments = int(table.ctypes.data), self._api

    def __call__(self, tensors: list[Any], device: Any) -> np.ndarray:
        """One uint64 for each tensor: 0 where the object does not fit or lies elsewhere, 1 for one without elements.

        Args:
            tensors: as many as there are shapes.
            device: of torch, where they are to lie.
        """
        addresses = np.empty(len(self._types), np.uint64)
        assert len(tensors) == len(self._types)
        place = _DEVICES.get(device.type, -1), device.index or 0
        self._read(tensors, *self._arguments, *place, int(addresses.ctypes.data))
        return addresses


class Contents:
    """What the dicts in a dict hold at this time, such as tensors; values of it that are no dicts count for nothing.

    Args:
        dicts: by any keys.
        at_once: whether to compare in one call; see `is_available`.
    """

    def __init__(self, dicts: Mapping[Any, Any], *, at_once: bool) -> None:
        self._objects = _values(dicts)  # kept alive, so that no other object comes to have the address of one
        self._addresses = np.array(list(map(id, self._objects)), np.uint64) if at_once else None

    def are_in(self, dicts: Mapping[Any, Any]) -> bool:
        """Whether the same objects are in these dicts, in the same order, and no others."""
        if self._addresses is not None:
            return bool(_library().hold(dicts, int(self._addresses.ctypes.data), len(self._addresses)))
        found = _values(dicts)
        return len(found) == len(self._objects) and all(map(operator.is_, found, self._objects))


def _values(dicts: Mapping[Any, Any]) -> list[Any]:
    return [value for each in dicts.values() if isinstance(each, dict) for value in each.values()]


@functools.cache
def is_available(torch: Any) -> bool:
    """Whether this torch offers DLPack's C functions, this interpreter has a global lock, and there is a compiler.

    Args:
        torch: the module.
    """
    if sysconfig.get_config_var("Py_GIL_DISABLED") or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return False
    try:
        return bool(_library().can_read(_api(torch)))
    except (DeviceError, KernelCompileError):
        return False


def _api(torch: Any) -> int:
    pointer = ctypes.PyDLL(None).PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
    return int(pointer(torch.Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api"))


@functools.cache
def _library() -> Any:
    from gpu_adam.devices import libraries  # noqa: PLC0415  (needs the compiler, which imports the devices' interface)

    text = (kernels.directory() / "host" / "tensors.cpp").read_text()
    # PyDLL: the functions work on Python objects, under the interpreter's lock.
    library = libraries.load(text, "the tensor look-up", ctypes.PyDLL)
    obj, pointer = ctypes.py_object, ctypes.c_void_p
    library.tensor_addresses.argtypes = (obj, pointer, pointer, ctypes.c_int, ctypes.c_int, pointer)
    library.tensor_addresses.restype = None
    library.hold.argtypes, library.hold.restype = (obj, pointer, ctypes.c_ssize_t), ctypes.c_int
    library.can_read.argtypes, library.can_read.restype = (pointer,), ctypes.c_int
    return library
