"""Reading many of torch's tensors, and whether dicts hold the same ones, in one call each of cuda/host/tensors.cpp."""

from __future__ import annotations

import ctypes
import functools
import math
import operator
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpu_adam import kernels
from gpu_adam.errors import DeviceError, KernelCompileError

_POINTER, _INTEGER = np.uint64, np.int64

TENSOR = np.dtype(
    [(name, _POINTER) for name in ("type", "shape")]
    + [(name, _INTEGER) for name in ("ndim", "elements", "code", "bits")]
)
"""``ExpectedTensor`` of cuda/host/tensors.cpp."""

READING = np.dtype(
    [("expected", _POINTER), ("count", _INTEGER), ("api", _POINTER), ("questions", _POINTER)]
    + [(name, _INTEGER) for name in ("device_type", "device_id")]
)
"""``Reading`` of cuda/host/tensors.cpp."""

_CODES = {"i": 0, "u": 1, "f": 2, "V": 4, "c": 5}  # DLPack's, for NumPy's kinds; "V" is bfloat16 of ml_dtypes
_DEVICES = {"cpu": 1, "cuda": 2}  # DLPack's, for torch's


class NativeTensorReader:
    """Reads the addresses of one tensor for each of some shapes and dtypes.

    It looks at class, shape, dtype, device, order and alignment and, where tensors are to be plain, at what DLPack
    leaves out: whether a tensor requires its gradient, is to be negated or conjugated when it is read, or has lost a
    part of its storage.

    Args:
        torch: the module; `is_available` for it.
        types: the class of each tensor, `torch.Tensor` or one below it that has its memory; None for no tensor.
        shapes: of the tensors.
        dtypes: of the tensors.
        are_plain: whether the tensors are to be plain.
    """

    def __init__(
        self,
        torch: Any,
        types: Sequence[type | None],
        shapes: Sequence[tuple[int, ...]],
        dtypes: Sequence[np.dtype],
        *,
        are_plain: bool,
    ) -> None:
        self._types, self._asked = list(types), _asked(torch)  # kept alive, for C has their addresses
        self._sizes = np.array([size for shape in shapes for size in shape] or [0], _INTEGER)
        ndims = np.array([len(shape) for shape in shapes], _INTEGER)
        self._table = table = np.zeros(len(shapes), TENSOR)
        table["type"], table["ndim"] = [0 if kind is None else id(kind) for kind in types], ndims
        table["shape"] = self._sizes.ctypes.data + (np.cumsum(ndims) - ndims) * self._sizes.itemsize
        table["elements"] = list(map(math.prod, shapes))
        table["code"] = [_CODES.get(dtype.kind, -1) for dtype in dtypes]
        table["bits"] = [8 * dtype.itemsize for dtype in dtypes]
        self._questions = np.array(list(map(id, self._asked)), _POINTER)
        questions = self._questions.ctypes.data if are_plain else 0
        self._reading = np.zeros(1, READING)
        self._reading[0] = table.ctypes.data, len(table), _api(torch), questions, 0, 0
        self._arguments = int(self._reading.ctypes.data)
        self._device: Any = None
        self._read, self._compare = _library().read_gradients, _library().lie_at

    def read_gradients(self, pairs: Sequence[Any], device: Any, addresses: np.ndarray) -> bool:
        """Write the addresses of the gradients in a list of tuples to where `addresses` is 0; 1 for an empty tensor.

        Args:
            pairs: as many as there are shapes.
            device: of torch, where the gradients are to lie.
            addresses: one uint64 for each pair.

        Returns:
            Whether none is missing of a tensor that is expected.

        Raises:
            What Python code raises that torch calls, such as a TorchFunctionMode's.
        """
        self._look_on(device)
        return not self._read(pairs, self._arguments, addresses.ctypes.data)

    def lie_at(self, tensors: list[Any], device: Any, addresses: np.ndarray) -> bool:
        """Whether each tensor fits and lies at its address, which is 1 for an empty one.

        Args:
            tensors: as many as there are shapes.
            device: of torch.
            addresses: one uint64 for each tensor.
        """
        self._look_on(device)
        return bool(self._compare(tensors, self._arguments, addresses.ctypes.data))

    def _look_on(self, device: Any) -> None:
        if device != self._device:
            self._reading["device_type"] = _DEVICES.get(device.type, -1)
            self._reading["device_id"] = device.index or 0
            self._device = device


def _asked(torch: Any) -> list[Any]:
    """What C asks of a tensor, and an answer to compare with: ``Questions`` of cuda/host/tensors.cpp, in order."""
    tensor, storage = torch.Tensor, torch.UntypedStorage
    functions = tensor.is_neg, tensor.is_conj, tensor.untyped_storage, storage.nbytes, tensor.storage_offset
    return [sys.intern("requires_grad"), *functions, False]


def pairs_with_gradients(torch: Any, parameters: list[Any]) -> list[Any]:
    """(gradient, parameter) for each of torch's parameters that has a gradient, in order."""
    if is_available(torch):
        found: list[Any] = _library().pairs(parameters, "grad", None)
        return found
    return [(gradient, each) for each in parameters if (gradient := each.grad) is not None]


def are_same(torch: Any, one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two sequences hold the same objects, in order."""
    if isinstance(one, list) and isinstance(other, list) and is_available(torch):
        return bool(_library().are_same(one, other))
    return _are_same(one, other)


class Contents:
    """What the dicts in a dict hold at this time, such as tensors; values of it that are no dicts count for nothing.

    Args:
        dicts: by any keys.
        at_once: whether to compare in one call; see `is_available`.
    """

    def __init__(self, dicts: Mapping[Any, Any], *, at_once: bool) -> None:
        # Kept alive, so that no other object comes to have the address of one.
        self._dicts = _dicts_in(dicts)
        self._objects = _values(self._dicts)
        self._addresses = np.array(list(map(id, self._objects)), np.uint64) if at_once else None

    def are_in(self, dicts: Mapping[Any, Any]) -> bool:
        """Whether the same objects are in these dicts, in the same order, and no others."""
        if self._addresses is not None:
            return bool(_library().hold(dicts, self._dicts, int(self._addresses.ctypes.data), len(self._addresses)))
        return _are_same(_values(_dicts_in(dicts)), self._objects)


def _dicts_in(dicts: Mapping[Any, Any]) -> list[dict[Any, Any]]:
    return [each for each in dicts.values() if isinstance(each, dict)]


def _values(dicts: list[dict[Any, Any]]) -> list[Any]:
    return [value for each in dicts for value in each.values()]


def _are_same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


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
    library.read_gradients.argtypes, library.read_gradients.restype = (obj, pointer, pointer), ctypes.c_ssize_t
    library.lie_at.argtypes, library.lie_at.restype = (obj, pointer, pointer), ctypes.c_int
    library.pairs.argtypes, library.pairs.restype = (obj, obj, obj), obj
    library.are_same.argtypes, library.are_same.restype = (obj, obj), ctypes.c_int
    library.hold.argtypes, library.hold.restype = (obj, obj, pointer, ctypes.c_ssize_t), ctypes.c_int
    library.can_read.argtypes, library.can_read.restype = (pointer,), ctypes.c_int
    return library
