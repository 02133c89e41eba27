"""The host device: NumPy arrays, and the CUDA sources compiled by the system's C++ compiler."""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices import compiler, libraries
from gpu_adam.devices.base import (
    Array,
    Device,
    Landing,
    Launch,
    ReadBack,
    SharedEvent,
    SharedMemory,
    Snapshot,
    StagedArray,
)
from gpu_adam.devices.native_pairs import (
    NUMPY,
    NativeAddressReader,
    NativePairReader,
    data_addresses,
    numpy_is_read_in_c,
)
from gpu_adam.devices.pair_reader import AddressReader, ExpectedPairs, PairReader
from gpu_adam.devices.sharing import HostEvent, HostSharedMemory, host_mapping
from gpu_adam.devices.torch_tensors import from_dlpack
from gpu_adam.errors import ArgumentValueError
from gpu_adam.kernels import Kernel, Source
from gpu_adam.uninterrupted import Call, all_of

_LARGE = 2**20  # bytes
_NOWHERE = nullcontext()


class HostDevice(Device):
    """NumPy arrays in host memory; the blocks of a launch run on a pool of processor threads.

    Args:
        threads: processor threads, the caller's included; default ``GPU_ADAM_THREADS``, or the cores that this process
            may use, divided by the processes that MPICH's ``mpiexec`` has started on the machine.
        block_size: None for the fast mode, one vectorised thread per block; a number for the faithful mode, in which
            every CUDA thread of a block is a fiber with real barriers and shuffles. For tests: it is slow.
        max_blocks: largest grid; kernels stride over what is beyond.
    """

    name = "host"
    xp = np
    checks_indices = True
    captures = False

    def __init__(self, threads: int | None = None, block_size: int | None = None, max_blocks: int = 2**31 - 1) -> None:
        default = threads is None and block_size is None and max_blocks == 2**31 - 1
        self._arguments = () if default else (threads, block_size, max_blocks)
        self.threads = _default_threads() if threads is None else threads
        self.block_size = block_size
        self.max_blocks = max_blocks
        self._large_arrays = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return host_device, self._arguments

    def activate(self) -> AbstractContextManager[Any]:
        """Nothing: there is one host."""
        return _NOWHERE

    def array(self, values: Any, dtype: np.dtype | None = None) -> Array:
        """A new C-contiguous array with these values."""
        values = np.asarray(values, dtype)
        array = self.empty(values.size, values.dtype).reshape(values.shape)
        array[...] = values
        return array

    def empty(self, size: int, dtype: np.dtype) -> Array:
        """A new one-dimensional array with undefined contents, its address a multiple of 64, a cache line."""
        # Large arrays begin at multiples of 4 KB, on huge pages of 2 MB. Streams that keep the same distance from one
        # are served by the same banks of memory and sets of the cache: up to three times slower (profiling/README.md).
        nbytes = size * dtype.itemsize
        shift = 0
        if nbytes >= _LARGE:
            self._large_arrays += 1
            shift = (4096 + 64) * (self._large_arrays % 16)
        spare = np.empty(nbytes + 64 + shift, np.uint8)
        start = -spare.ctypes.data % 64 + shift
        return spare[start : start + nbytes].view(dtype)

    def numpy(self, array: Array) -> np.ndarray:
        """A copy."""
        return np.array(array)

    def view(self, obj: Any) -> Array | None:
        """The memory of `obj` as a NumPy array; None where it is not in host memory."""
        if isinstance(obj, np.ndarray):
            return obj
        if isinstance(obj, np.generic):
            return None
        if hasattr(obj, "__dlpack_device__"):
            kind, _ = obj.__dlpack_device__()
            if kind == 1 and str(getattr(obj, "dtype", "")) == "bfloat16":
                return np.asarray(obj)  # of JAX, whose arrays NumPy takes as they are, but not through DLPack
            return from_dlpack(obj, np.from_dlpack) if kind == 1 else None
        if hasattr(obj, "__array_interface__"):
            return np.asarray(obj)
        return None

    def address(self, array: Array) -> int:
        """Address of the first element."""
        return int(array.__array_interface__["data"][0])

    def is_plain(self, obj: Any, dtype: np.dtype) -> bool:
        """Whether `obj` is known at a glance to be a C-contiguous array of that dtype, aligned."""
        if type(obj) is not np.ndarray or obj.dtype != dtype:
            return False
        flags = obj.flags
        return bool(flags.c_contiguous and flags.aligned)

    def addresses(self, arrays: Sequence[Array]) -> np.ndarray:
        """The address of each array's first element, as uint64."""
        return data_addresses(list(arrays)) if numpy_is_read_in_c() else super().addresses(arrays)

    def address_reader(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype]) -> AddressReader:
        """A function that reads the addresses of as many arrays as there are shapes and dtypes."""
        if numpy_is_read_in_c():
            return NativeAddressReader(shapes, dtypes, NUMPY)
        return functools.partial(_addresses, shapes, dtypes)

    def pair_reader(self, expected: ExpectedPairs) -> PairReader:
        """A reader that recognises a step whose variables lie on this device."""
        if numpy_is_read_in_c():
            return NativePairReader(expected, NUMPY, self.torch_device)
        return super().pair_reader(expected)

    def torch_device(self, torch: Any) -> Any:
        """The device of torch that this one is."""
        return torch.device("cpu")

    def staged(self, size: int, dtype: np.dtype) -> StagedArray:
        """A new array of `size` elements that is rewritten from step to step."""
        return _HostArray(size, dtype)

    def read_back(self, array: Array) -> ReadBack:
        """Copies of the contents of an array, as they come about."""
        return _HostCopies(array)

    def snapshot(self, arrays: Sequence[Array], *, lasting: bool) -> Snapshot:
        """Copies of the arrays; the arrays themselves where the contents need not last."""
        return _HostSnapshot([array.copy() for array in arrays] if lasting else list(arrays))

    def landing(self, array: Array) -> Landing:
        """The array itself."""
        return _HostLanding(array)

    def copy_call(self, targets: Sequence[Array], sources: Sequence[Array]) -> Call:
        """A call, to be made once, that copies into arrays, and casts where dtypes differ."""
        return all_of(operator.setitem, targets, itertools.repeat(...), sources)

    def prepare(self, kernel: Kernel, arguments: Sequence[np.ndarray]) -> Launch:
        """Compile `kernel` if need be and bind `arguments`."""
        library = _library(kernel.source, self.block_size is not None)
        return _HostLaunch(self, _entry(library, kernel.name), arguments)

    def prepare_native(self, file: str, name: str, arguments: Sequence[np.ndarray]) -> Launch:
        """The same for an entry point in a C++ file of ``cuda/host/``, which the pool runs as it does a kernel's."""
        text = (kernels.directory() / "host" / file).read_text()
        return _HostLaunch(self, _entry(libraries.load(text, file), name), arguments)

    def share_processors(self) -> None:
        """Have the threads of launches, those of all host devices, sleep 20 us after their work in place of 100."""
        set_patience = _pool_library()["set_patience"]
        set_patience.argtypes, set_patience.restype = (ctypes.c_longlong,), None
        set_patience(20_000)

    def is_capturing(self) -> bool:
        """Never."""
        return False

    def resumed(self) -> Callable[[], AbstractContextManager[Any]]:
        """Nothing: there are no streams."""
        return nullcontext

    def capture(self) -> None:
        """None: the host runs at once what it is asked for."""

    def private_pool(self) -> tuple[Any, AbstractContextManager[Any]]:
        """Every array's memory is its own."""
        return None, nullcontext()

    def keep_with_graph(self, obj: Any) -> None:
        """Nothing is captured."""

    def synchronize(self) -> None:
        """Nothing to wait for: a launch returns when its blocks are done."""

    @property
    def identity(self) -> str:
        """The name: every process has the same host."""
        return self.name

    def share_memory(self, nbytes: int, *, read_only: bool) -> SharedMemory:
        """New memory in a sealed anonymous file."""
        return HostSharedMemory(nbytes, read_only)

    def map_memory(self, handle: dict[str, Any], descriptor: int) -> SharedMemory:
        """Another process's memory, by its file's descriptor, which stays open."""
        return host_mapping(handle, descriptor)

    def share_event(self) -> SharedEvent:
        """Nothing to wait for."""
        return HostEvent()

    def map_event(self, handle: str) -> SharedEvent:
        """Nothing to wait for."""
        return HostEvent()

    def facts(self) -> list[tuple[str, str]]:
        """(label, value) pairs for ``gpu-adam info``."""
        command = compiler.command()
        return [
            ("processor", compiler.processor_name()),
            ("threads", str(self.threads)),
            ("compiler", f"{shlex.join(command)}: {compiler.compiler_version(tuple(command))}"),
            ("kernel cache", libraries.described()),
        ]


@functools.cache
def host_device(*arguments: int | None) -> HostDevice:
    """The one object for a host device with these arguments, also after unpickling."""
    return HostDevice(*arguments)  # type: ignore[arg-type]


def _addresses(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype], arrays: list[Any]) -> np.ndarray:
    found = [
        int(array.__array_interface__["data"][0])
        if type(array) is np.ndarray
        and array.shape == shape
        and array.dtype == dtype
        and array.flags.c_contiguous
        and array.flags.aligned
        else 0
        for array, shape, dtype in zip(arrays, shapes, dtypes, strict=True)
    ]
    return np.array(found, np.uint64)


class _HostArray:
    def __init__(self, size: int, dtype: np.dtype) -> None:
        self._array = np.zeros(size, dtype)
        self.address = int(self._array.ctypes.data)

    def write(self, values: np.ndarray, *, captured: bool = False) -> None:
        self._array[:] = values


class _HostCopies:
    """The array's contents of the moment: a launch has ended when the next call is made."""

    def __init__(self, array: Array) -> None:
        self._array, self._made = array, list[None]()

    def calls(self) -> list[Call]:
        return [functools.partial(self._made.append, None)]

    def read(self, *, waits: bool) -> tuple[int, np.ndarray]:
        return len(self._made), self._array.copy()

    def forget(self, number: int) -> list[Call]:
        return [functools.partial(self._made.__delitem__, slice(number))]


class _HostSnapshot:
    def __init__(self, arrays: list[np.ndarray]) -> None:
        self._arrays = arrays

    def read(self) -> list[np.ndarray]:
        return self._arrays


class _HostLanding:
    def __init__(self, array: Array) -> None:
        self.array = array

    def land(self) -> None:
        pass


class _HostLaunch:
    def __init__(self, device: HostDevice, entry: Any, arguments: Sequence[np.ndarray]) -> None:
        self._device, self._entry = device, entry
        self._kept = arguments
        self._table = np.array([a.ctypes.data for a in arguments], np.uint64)
        self._arguments = int(self._table.ctypes.data)
        self._entry_address = ctypes.cast(self._entry, ctypes.c_void_p).value
        self._pool = _pool()
        self._call: tuple[int, Call] = -1, functools.partial(int)

    def call(self, blocks: int) -> Call:
        device = self._device
        made_for, call = self._call
        if blocks != made_for:
            grid = min(blocks, device.max_blocks)
            if device.block_size is None:
                call = functools.partial(self._pool, self._entry_address, self._arguments, grid, device.threads)
            else:
                call = functools.partial(self._entry, self._arguments, 0, grid, grid, device.block_size)
            self._call = blocks, call
        return call

    def __call__(self, blocks: int) -> None:
        self.call(blocks)()


def _default_threads() -> int:
    given = os.environ.get("GPU_ADAM_THREADS")
    if given is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # MPICH's launcher lets all its processes of a machine use all cores; others give each its own.
        return max(1, cores // int(os.environ.get("MPI_LOCALNRANKS", "1")))
    if not given.isdecimal() or int(given) < 1:
        raise ArgumentValueError("GPU_ADAM_THREADS", "must be a whole number >= 1", repr(given), "set or unset it")
    return int(given)


@functools.cache
def _library(source: Source, faithful: bool) -> Any:
    return libraries.load(compiler.source_text(source, faithful=faithful), f"the kernels of {source.file}")


@functools.cache
def _pool_library() -> Any:
    return libraries.load((kernels.directory() / "host" / "pool.cpp").read_text(), "the thread pool")


@functools.cache
def _pool() -> Any:
    launch = _pool_library()["launch_blocks"]
    launch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int)
    launch.restype = None
    return launch


def _entry(library: Any, name: str) -> Any:
    entry = library[f"{name}_entry"]
    entry.argtypes = (ctypes.c_void_p, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_int)
    entry.restype = None
    return entry
