"""Memory and events that one process makes and others map.

    memory    The host: an anonymous file (memfd), whose descriptor travels over a Unix socket. It cannot be resized,
              and where others may only read, the kernel refuses them a mapping to write to. It has no name, and is
              freed with its last holder, whichever process that is.
              CUDA: an allocation of its own, whose IPC handle travels, for the handle names the allocation and not an
              array in it.
    events    The host: nothing, for what a call enqueues is done when the call returns. CUDA: interprocess events,
              which a stream records, and for which streams of other processes wait, and no host.

Sources: memfd_create(2), fcntl(2) on file seals; the CUDA Runtime API on interprocess communication.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from gpu_adam.devices.base import Array, SharedMemory
from gpu_adam.errors import DeviceError

_F_SEAL_FUTURE_WRITE = 0x10  # of <linux/fcntl.h>, Linux 5.1; Python's fcntl has it from 3.13 on
_RESIZING = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_NEEDS = (
    "see that both processes run on one Linux machine, in containers with --ipc=host, not on WSL or Tegra, "
    "and that the device is not exclusive to one process"
)
_CUDA_PAGE = 2**21  # cudaMalloc's granularity, within which an allocation would share what a handle gives access to


class HostSharedMemory:
    """Memory in an anonymous file.

    Args:
        nbytes: >= 0.
        read_only: whether other processes may only read.

    Raises:
        DeviceError: the kernel has no such files, or not so much memory.
    """

    def __init__(self, nbytes: int, read_only: bool) -> None:
        size = max(nbytes, 1)
        try:
            self.descriptor = os.memfd_create("gpu_adam", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except AttributeError as error:
            raise _refused("needs memfd_create", error, "use Linux") from error
        except OSError as error:
            raise _refused("must be made", error, "raise the limit of open files (ulimit -n)") from error
        try:
            # Reserved at once: a page that is missing later would kill the process that touches it.
            os.posix_fallocate(self.descriptor, 0, size)
            memory = mmap.mmap(self.descriptor, size)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _RESIZING | (_F_SEAL_FUTURE_WRITE if read_only else 0))
        except OSError as error:
            os.close(self.descriptor)
            rule = f"must have {size} bytes of memory that can be sealed"
            raise _refused(rule, error, "ask for less, or use Linux 5.1 or newer") from error
        self.array = np.frombuffer(memory, np.uint8)
        self.handle: dict[str, Any] = {"bytes": size, "read_only": read_only}

    def close(self) -> None:
        """Close the descriptor and forget the array."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        self.array = np.zeros(0, np.uint8)


class _HostMapping:
    def __init__(self, handle: dict[str, Any], descriptor: int) -> None:
        protection = mmap.PROT_READ | (0 if handle["read_only"] else mmap.PROT_WRITE)
        try:
            memory = mmap.mmap(descriptor, handle["bytes"], prot=protection)
        except (OSError, ValueError) as error:
            raise _refused("must be mapped", error, "ask the process that shares it") from error
        self.array = np.frombuffer(memory, np.uint8)
        self.handle, self.descriptor = handle, -1

    def close(self) -> None:
        self.array = np.zeros(0, np.uint8)


class HostEvent:
    """Nothing to wait for."""

    handle = ""

    def record(self) -> None:
        """Nothing: what was enqueued is done."""

    def wait(self) -> None:
        """Nothing: what was enqueued is done."""

    def close(self) -> None:
        """Nothing is held."""


def host_mapping(handle: dict[str, Any], descriptor: int) -> SharedMemory:
    """What another process's `HostSharedMemory` has, by its handle and descriptor, which stays open."""
    return _HostMapping(handle, descriptor)


class CudaSharedMemory:
    """Memory in an allocation of its own, full of zeros. Making it waits for the zeros, and for nothing else.

    Args:
        cupy: the module, whose current device has the memory.
        nbytes: >= 0.

    Raises:
        DeviceError: there is not so much memory, or the device cannot share any.
    """

    descriptor = -1

    def __init__(self, cupy: Any, nbytes: int) -> None:
        size = max(1, -(-nbytes // _CUDA_PAGE)) * _CUDA_PAGE
        self._device = cupy.cuda.Device()
        with _told(cupy, f"must have {size} bytes that processes can share", f"ask for less, or {_NEEDS}"):
            memory = cupy.cuda.Memory(size)
            self.handle = {"ipc": cupy.cuda.runtime.ipcGetMemHandle(memory.ptr).hex(), "bytes": size}
        pointer = cupy.cuda.MemoryPointer(memory, 0)
        # Those who write to it know of no stream of this process. A new stream waits for no steps.
        stream = cupy.cuda.Stream(non_blocking=True)
        pointer.memset_async(0, size, stream)
        stream.synchronize()
        self.array = _uint8(cupy, pointer, size)

    def close(self) -> None:
        """Forget the array, with which the allocation goes. Waits for the device, whose work may use it."""
        if self.array is not None:
            self._device.synchronize()
            self.array = None


class CudaMapping:
    """What another process's `CudaSharedMemory` has.

    Args:
        cupy: the module, whose current device has the memory.
        handle: of the memory.

    Raises:
        DeviceError: the memory cannot be mapped here.
    """

    descriptor = -1

    def __init__(self, cupy: Any, handle: dict[str, Any]) -> None:
        self.handle = handle
        with _told(cupy, "must be mapped", _NEEDS):
            address = cupy.cuda.runtime.ipcOpenMemHandle(bytes.fromhex(handle["ipc"]))
        memory = cupy.cuda.UnownedMemory(address, handle["bytes"], _Opened(cupy, address))
        self.array = _uint8(cupy, cupy.cuda.MemoryPointer(memory, 0), handle["bytes"])

    def close(self) -> None:
        """Forget the array: the memory is unmapped as soon as no other array has it."""
        self.array = None


class _Opened:
    """A mapping of the current device, which is undone with this object."""

    def __init__(self, cupy: Any, address: int) -> None:
        self._device, self._address = cupy.cuda.Device(), address
        self._close = cupy.cuda.runtime.ipcCloseMemHandle

    def __del__(self) -> None:
        if not sys.is_finalizing():
            with self._device:
                self._device.synchronize()  # what is enqueued may use the memory
                self._close(self._address)


class CudaEvent:
    """An interprocess event of the current device.

    Args:
        cupy: the module.
        handle: of another process's event; without one a new event is made.

    Raises:
        DeviceError: the device has no such events, or this process cannot have them.
    """

    def __init__(self, cupy: Any, handle: str | None = None) -> None:
        self._runtime, self._address = cupy.cuda.runtime, 0
        self._stream = cupy.cuda.get_current_stream
        with _told(cupy, "must have events that processes can share", _NEEDS):
            if handle is None:
                flags = self._runtime.eventDisableTiming | self._runtime.eventInterprocess
                self._address = self._runtime.eventCreateWithFlags(flags)
                self.handle = self._runtime.ipcGetEventHandle(self._address).hex()
            else:
                self._address = self._runtime.ipcOpenEventHandle(bytes.fromhex(handle))
                self.handle = handle

    def record(self) -> None:
        """Record it on the current stream."""
        self._runtime.eventRecord(self._address, self._stream().ptr)

    def wait(self) -> None:
        """Have the current stream wait for it."""
        self._runtime.streamWaitEvent(self._stream().ptr, self._address)

    def close(self) -> None:
        """Destroy this process's event; what waits for it goes on waiting."""
        address, self._address = self._address, 0
        if address:
            self._runtime.eventDestroy(address)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()


@contextmanager
def _told(cupy: Any, rule: str, remedy: str) -> Iterator[None]:
    """A block in which an error of CUDA's becomes one of shared memory."""
    try:
        yield
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise _refused(rule, error, remedy) from error


def _uint8(cupy: Any, pointer: Any, size: int) -> Array:
    return cupy.ndarray((size,), np.uint8, memptr=pointer)


def _refused(rule: str, error: Exception, remedy: str) -> DeviceError:
    return DeviceError("shared memory", rule, error, remedy)
