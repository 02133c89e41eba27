"""Recognising a step's pairs of NumPy's or CuPy's arrays: all in one call of cuda/host/addresses.cpp."""

from __future__ import annotations

import ctypes
import functools
import sysconfig
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices import libraries
from gpu_adam.devices.pair_reader import ExpectedPairs, places_of
from gpu_adam.devices.torch_tensors import TorchReader
from gpu_adam.errors import DeviceError, KernelCompileError

_POINTER = np.uint64
_INTEGER = np.int64
_INCOMPLETE = 2  # ``Answer`` of cuda/host/addresses.cpp

ARRAY = np.dtype(
    [(name, _POINTER) for name in ("type", "dtype", "shape")]
    + [(name, _INTEGER) for name in ("ndim", "itemsize", "device")]
)
"""``ExpectedArray`` of cuda/host/addresses.cpp."""

PAIR = np.dtype([("target", _POINTER), ("target_address", _POINTER), ("other_type", _POINTER), ("array", ARRAY)])
"""``ExpectedPair`` of cuda/host/addresses.cpp."""

PAIRS = np.dtype([(name, _POINTER) for name in ("list_type", "tuple_type", "pairs", "count", "last", "addresses")])
"""``ExpectedPairs`` of cuda/host/addresses.cpp."""


class ArrayKind(NamedTuple):
    """Which arrays are read.

    Attributes:
        type: exactly this one, ``numpy.ndarray`` or ``cupy.ndarray``.
        device: CuPy's number of the device; -1 for NumPy.
    """

    type: type
    device: int


NUMPY = ArrayKind(np.ndarray, -1)


class NativePairReader:
    """A `PairReader` for arrays of NumPy or CuPy; tensors of torch are read too, by torch.

    Args:
        expected: the pairs.
        kind: of the arrays.
        torch_device: as of `TorchReader`.
    """

    def __init__(self, expected: ExpectedPairs, kind: ArrayKind, torch_device: Callable[[Any], Any]) -> None:
        self._expected = expected  # keeps the objects alive whose addresses are compared
        self._arrays = _ExpectedArrays(expected.shapes, expected.dtypes, kind)
        self._tensors = TorchReader(expected, torch_device)
        count = len(expected.targets)
        self._pairs = np.zeros(count, PAIR)
        self._pairs["target"] = list(map(id, expected.targets))
        self._pairs["array"] = self._arrays.table
        self._pairs["other_type"] = [0 if kind is None else id(kind) for kind in expected.other_types]
        elsewhere = []
        for number, (target, placement) in enumerate(zip(expected.targets, expected.placements, strict=True)):
            if placement is None:
                continue
            if type(target) is kind.type and placement.address:
                self._pairs[number]["target_address"] = placement.address
            else:
                elsewhere.append(number)
        self._places = places_of(expected, elsewhere)
        self._last, self._next = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
        self._given = np.zeros(count, np.uint64)
        self._struct = np.zeros(1, PAIRS)
        pointers = (self._pairs.ctypes.data, count, self._last.ctypes.data, self._next.ctypes.data)
        self._struct[0] = (id(list), id(tuple), *pointers)
        self._read, self._address = _library().read_pairs, int(self._struct.ctypes.data)

    def __call__(self, pairs: Sequence[Any]) -> np.ndarray | None:
        """See `PairReader`."""
        answer = self._read(pairs, self._address)
        if answer < 0:
            return None
        if self._places is not None and not self._places.are_kept():
            return None
        if answer == _INCOMPLETE:
            if self._tensors.read(pairs, self._next):
                if self._next.tobytes() == self._last.tobytes():  # a tenth of the time of numpy.array_equal
                    return self._given
            elif self._expected.have_no_array(pairs, self._next):
                return None
        if answer != 0:
            # What was given away is not written again: launches compare with it. The last addresses are none until it
            # is complete, so that an interrupt in between makes the next call's addresses new ones.
            self._last.fill(0)
            self._given = self._next.copy()
            self._last[:] = self._next
        return self._given


class NativeAddressReader:
    """An `AddressReader` for arrays of these shapes and dtypes, one for each array, and of that kind."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype], kind: ArrayKind) -> None:
        self._arrays = _ExpectedArrays(shapes, dtypes, kind)
        self._read, self._count = _library().array_addresses, len(shapes)

    def __call__(self, arrays: list[Any]) -> np.ndarray:
        """One uint64 for each array; 0 where the object is not the array that is expected."""
        addresses = np.empty(self._count, np.uint64)
        self._read(arrays, self._count, self._arrays.table.ctypes.data, addresses.ctypes.data)
        return addresses


def data_addresses(arrays: list[np.ndarray]) -> np.ndarray:
    """The address of each NumPy array's first element, as uint64."""
    addresses = np.empty(len(arrays), np.uint64)
    _library().data_addresses(arrays, len(arrays), addresses.ctypes.data)
    return addresses


class _ExpectedArrays:
    def __init__(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype], kind: ArrayKind) -> None:
        ndims = np.array([len(shape) for shape in shapes], np.intp)
        self._sizes = np.array([size for shape in shapes for size in shape] or [0], np.intp)
        self._dtypes = [np.dtype(dtype.type) for dtype in dtypes]  # kept alive, for they are compared by address
        self.table = np.zeros(len(shapes), ARRAY)
        self.table["type"], self.table["dtype"] = id(kind.type), [id(dtype) for dtype in self._dtypes]
        self.table["device"] = kind.device
        starts = np.concatenate([np.zeros(1, np.intp), np.cumsum(ndims)[:-1]]) if len(shapes) else ndims
        self.table["shape"] = self._sizes.ctypes.data + starts * self._sizes.itemsize
        self.table["ndim"], self.table["itemsize"] = ndims, [dtype.itemsize for dtype in self._dtypes]


def numpy_is_read_in_c() -> bool:
    """Whether this interpreter and this NumPy lay out their objects as cuda/host/addresses.cpp expects."""
    return not sysconfig.get_config_var("Py_GIL_DISABLED") and _layout_is_known()


def cupy_is_read_in_c(cupy: Any) -> bool:
    """Whether this interpreter and this CuPy lay out their objects as cuda/host/addresses.cpp expects.

    False also where no C++ compiler is at hand, which a GPU's kernels do not need.

    Args:
        cupy: the module; its current device gets a few bytes of memory, once.
    """
    try:
        return not sysconfig.get_config_var("Py_GIL_DISABLED") and _cupy_layout_is_known(cupy)
    except (DeviceError, KernelCompileError):
        return False


@functools.cache
def _cupy_layout_is_known(cupy: Any) -> bool:
    library, pointer = _library(), type(cupy.empty(0).data)
    if (cupy.ndarray.__basicsize__, pointer.__basicsize__) < (library.cupy_array_bytes(), library.cupy_pointer_bytes()):
        return False
    for array in (cupy.empty((2, 3), np.float32), cupy.empty((4, 5), np.float64).T, cupy.empty(7, np.int8)[1:]):
        shape = np.array(array.shape, np.intp)
        facts = (array.size, array.ndim, shape.ctypes.data, array.flags.c_contiguous, id(array.dtype), id(array.data))
        if not library.cupy_layout_is_known(array, id(cupy.ndarray), *facts, array.data.ptr, array.data.device_id):
            return False
    return True


@functools.cache
def _layout_is_known() -> bool:
    check = _library().layout_is_known
    for array, flags in ((np.zeros((2, 3), np.float32), 0x501), (np.zeros((2, 3), np.float64).T, 0x500)):
        shape = np.array(array.shape, np.intp)
        data = array.__array_interface__["data"][0]
        facts = (data, id(array.dtype), array.ndim, shape.ctypes.data, flags, id(np.ndarray))
        if not check(array, *facts, [], id(list)):
            return False
    return True


@functools.cache
def _library() -> Any:
    text = (kernels.directory() / "host" / "addresses.cpp").read_text()
    # PyDLL: the functions work on Python objects, under the interpreter's lock.
    library = libraries.load(text, "the address look-up", ctypes.PyDLL)
    obj, pointer, size = ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t
    library.read_pairs.argtypes, library.read_pairs.restype = (obj, pointer), ctypes.c_int
    library.array_addresses.argtypes = (obj, size, pointer, pointer)
    library.array_addresses.restype = None
    library.data_addresses.argtypes, library.data_addresses.restype = (obj, size, pointer), None
    library.layout_is_known.argtypes = (
        *(obj, ctypes.c_uint64, pointer, size, pointer, ctypes.c_int, pointer),
        *(obj, pointer),
    )
    library.layout_is_known.restype = ctypes.c_int
    library.cupy_layout_is_known.argtypes = (
        *(obj, pointer, size, size, pointer, ctypes.c_int, pointer, pointer),
        *(ctypes.c_uint64, ctypes.c_int),
    )
    library.cupy_layout_is_known.restype = ctypes.c_int
    library.cupy_array_bytes.restype = library.cupy_pointer_bytes.restype = size
    return library
