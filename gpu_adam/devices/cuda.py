"""CUDA devices: CuPy arrays, and the CUDA sources compiled by NVRTC. The only module that imports CuPy."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import cupy
import numpy as np

from gpu_adam.devices.base import PACK_BYTES, AddressReader, Array, Device, Launch, PointerTable
from gpu_adam.errors import KernelCompileError
from gpu_adam.kernels import BLOCK_SIZE, Kernel

# No contraction to multiply-add: the bits of the host device. Division and square root are IEEE by default, and CuPy
# itself adds -ftz=true.
_OPTIONS = ("--std=c++17", "-fmad=false")


class CudaDevice(Device):
    """One NVIDIA GPU. Everything is enqueued on CuPy's current stream of this device.

    Args:
        index: the device's number, as CuPy counts.
    """

    xp = cupy
    max_blocks = 2**31 - 1
    checks_indices = False

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self.index = index

    def __reduce__(self) -> tuple[Any, ...]:
        return cuda_device, (self.index,)

    def current(self) -> AbstractContextManager[Any]:
        """A context in which CuPy works on this device."""
        return cupy.cuda.Device(self.index)  # type: ignore[no-any-return]

    def array(self, values: Any, dtype: np.dtype | None = None) -> Array:
        """A new C-contiguous array with these values; host values are copied over."""
        with self.current():
            return cupy.array(values, dtype, order="C")

    def empty(self, size: int, dtype: np.dtype) -> Array:
        """A new one-dimensional array with undefined contents; CuPy's addresses are multiples of 512."""
        with self.current():
            return cupy.empty(size, dtype)

    def numpy(self, array: Array) -> np.ndarray:
        """A copy in host memory. Waits for the device."""
        with self.current():
            return np.asarray(cupy.asnumpy(array))

    def view(self, obj: Any) -> Array | None:
        """The memory of `obj` as a CuPy array; None where it does not lie on this device."""
        array = None
        if isinstance(obj, cupy.ndarray):
            array = obj
        elif hasattr(obj, "__cuda_array_interface__"):
            array = cupy.asarray(obj)
        elif hasattr(obj, "__dlpack_device__") and int(obj.__dlpack_device__()[0]) in (2, 13):
            array = cupy.from_dlpack(obj)
        return array if array is not None and array.device.id == self.index else None

    def address(self, array: Array) -> int:
        """Address of the first element."""
        return int(array.data.ptr)

    def address_reader(self, shapes: Sequence[tuple[int, ...]], dtype: np.dtype) -> AddressReader:
        """A function that checks and finds the addresses of arrays of these shapes and this dtype."""
        ndarray, index, itemsize = cupy.ndarray, self.index, dtype.itemsize

        def addresses(arrays: list[Any]) -> np.ndarray:
            found = [
                array.data.ptr
                if type(array) is ndarray
                and array.shape == shape
                and array.dtype == dtype
                and array.flags.c_contiguous
                and array.data.device_id == index
                and array.data.ptr % itemsize == 0
                else 0
                for array, shape in zip(arrays, shapes, strict=True)
            ]
            return np.array(found, np.uint64)

        return addresses

    def pointer_table(self, size: int) -> PointerTable:
        """A new table of `size` addresses."""
        return _CudaPointers(self, size)

    def prepare(self, kernel: Kernel, arguments: Sequence[np.ndarray]) -> Launch:
        """Compile `kernel` if need be and bind `arguments`."""
        return _CudaLaunch(self.index, _raw_kernel(kernel, self.index), tuple(arguments))

    def is_capturing(self) -> bool:
        """Whether the current stream is being captured."""
        with self.current():
            return bool(cupy.cuda.get_current_stream().is_capturing())

    def own_memory(self) -> tuple[Any, AbstractContextManager[Any]]:
        """A pool of memory of its own, and a context whose new arrays lie in it."""
        pool = cupy.cuda.MemoryPool()
        return pool, cupy.cuda.using_allocator(pool.malloc)

    def synchronize(self) -> None:
        """Wait for the current stream."""
        with self.current():
            cupy.cuda.get_current_stream().synchronize()

    def facts(self) -> list[tuple[str, str]]:
        """(label, value) pairs for ``gpu-adam info``."""
        runtime = cupy.cuda.runtime
        properties = runtime.getDeviceProperties(self.index)
        name = properties["name"]
        with self.current():
            free, total = runtime.memGetInfo()
        driver = runtime.driverGetVersion()
        return [
            ("GPU", name.decode() if isinstance(name, bytes) else str(name)),
            ("compute capability", f"{properties['major']}.{properties['minor']}"),
            ("memory", f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"),
            ("driver", f"for CUDA {driver // 1000}.{driver % 1000 // 10}"),
            ("CuPy", cupy.__version__),
            ("NVRTC", "{}.{}".format(*nvrtc_version())),
        ]


def device_count() -> int:
    """How many devices answer. Raises CuPy's error where there is no driver."""
    return int(cupy.cuda.runtime.getDeviceCount())


def nvrtc_version() -> tuple[int, int]:
    """Version of NVRTC. Raises what its loader raises where there is none."""
    major, minor = cupy.cuda.nvrtc.getVersion()
    return int(major), int(minor)


def current_index() -> int:
    """Number of CuPy's current device."""
    return int(cupy.cuda.runtime.getDevice())


@functools.cache
def cuda_device(index: int) -> CudaDevice:
    """The one object for a device."""
    return CudaDevice(index)


def options(kernel_defines: Sequence[str]) -> tuple[str, ...]:
    """NVRTC's options for a kernel with these definitions."""
    return (*_OPTIONS, f"-DGPU_ADAM_PACK_BYTES={PACK_BYTES}", *(f"-D{define}" for define in kernel_defines))


@functools.cache
def _raw_kernel(kernel: Kernel, index: int) -> Any:
    # Headers are part of the text: CuPy's cache on disk does not look into -I directories.
    raw = cupy.RawKernel(kernel.source.text, kernel.name, options=options(kernel.source.defines))
    with cupy.cuda.Device(index):
        try:
            raw.compile()
        except cupy.cuda.compiler.CompileException as error:
            raise KernelCompileError(
                f"the kernels of {kernel.source.file}",
                "must compile with NVRTC",
                f"{error}\n",
                "check the versions of CuPy and NVRTC with: gpu-adam info",
            ) from error
    return raw


class _CudaLaunch:
    def __init__(self, index: int, kernel: Any, arguments: tuple[np.ndarray, ...]) -> None:
        self._index, self._kernel, self._arguments = index, kernel, arguments

    def __call__(self, blocks: int) -> None:
        if current_index() == self._index:
            self._kernel((blocks,), (BLOCK_SIZE,), self._arguments)
        else:
            with cupy.cuda.Device(self._index):
                self._kernel((blocks,), (BLOCK_SIZE,), self._arguments)


_orphans: list[_Pinned] = []  # buffers whose table is gone before their copy has run


class _CudaPointers:
    """Addresses in device memory, written through a ring of pinned buffers.

    A pinned buffer must not be rewritten before its copy has run. Rather than wait for that, the ring grows. A copy
    that is captured runs at every replay: its buffer is never used again, and its table must not be used by others.
    """

    def __init__(self, device: CudaDevice, size: int) -> None:
        self._device = device
        with device.current():
            self._table = cupy.zeros(size, np.uint64)
        self.address = int(self._table.data.ptr)
        self._ring: list[_Pinned] = []
        self._captured: list[_Pinned] = []
        _orphans[:] = [pinned for pinned in _orphans if not pinned.copied.done]

    def __del__(self) -> None:
        if not sys.is_finalizing():
            _orphans.extend(pinned for pinned in self._ring if not pinned.copied.done)

    def write(self, addresses: np.ndarray) -> None:
        with self._device.current():
            stream = cupy.cuda.get_current_stream()
            if stream.is_capturing():
                pinned = _Pinned(self._table.size)
                self._captured.append(pinned)
            elif self._ring and self._ring[0].copied.done:
                pinned = self._ring.pop(0)
                self._ring.append(pinned)
            else:
                pinned = _Pinned(self._table.size)
                self._ring.append(pinned)
            pinned.array[:] = addresses
            to_device = cupy.cuda.runtime.memcpyHostToDevice
            cupy.cuda.runtime.memcpyAsync(self.address, pinned.address, self._table.nbytes, to_device, stream.ptr)
            if pinned not in self._captured:
                pinned.copied.record(stream)


class _Pinned:
    def __init__(self, size: int) -> None:
        memory = cupy.cuda.alloc_pinned_memory(8 * size)
        self.array = np.frombuffer(memory, np.uint64, size)
        self.address = memory.ptr
        self.copied = cupy.cuda.Event(disable_timing=True)
