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
from typing import Any

import numpy as np

from gpu_adam.devices.base import Array, SharedMemory
from gpu_adam.errors import DeviceError

_F_SEAL_FUTURE_WRITE = 0x10  # of <linux/fcntl.h>, Linux 5.1; Python's fcntl has it from 3.13 on
_RESIZING = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
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
        except (AttributeError, OSError) as error:
            raise _refused("needs memfd_create", error, "use Linux") from error
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
    """Memory in an allocation of its own, full of zeros.

    Args:
        cupy: the module, whose current device has the memory.
        nbytes: >= 0.
    """

    descriptor = -1

    def __init__(self, cupy: Any, nbytes: int) -> None:
        size = max(1, -(-nbytes // _CUDA_PAGE)) * _CUDA_PAGE
        memory = cupy.cuda.Memory(size)
        self.array = _uint8(cupy, cupy.cuda.MemoryPointer(memory, 0), size)
        self.array.fill(0)
        self.handle = {"ipc": cupy.cuda.runtime.ipcGetMemHandle(memory.ptr).hex(), "bytes": size}

    def close(self) -> None:
        """Forget the array, with which the allocation goes."""
        self.array = None


class CudaMapping:
    """What another process's `CudaSharedMemory` has.

    Args:
        cupy: the module, whose current device has the memory.
        handle: of the memory.
    """

    descriptor = -1

    def __init__(self, cupy: Any, handle: dict[str, Any]) -> None:
        self._runtime, self.handle = cupy.cuda.runtime, handle
        self._address = self._runtime.ipcOpenMemHandle(bytes.fromhex(handle["ipc"]))
        memory = cupy.cuda.UnownedMemory(self._address, handle["bytes"], self)
        self.array = _uint8(cupy, cupy.cuda.MemoryPointer(memory, 0), handle["bytes"])

    def close(self) -> None:
        """Unmap the memory: no array of it may be used any more."""
        if self._address:
            self.array = None
            self._runtime.ipcCloseMemHandle(self._address)
            self._address = 0


class CudaEvent:
    """An interprocess event of the current device.

    Args:
        cupy: the module.
        handle: of another process's event; without one a new event is made.
    """

    def __init__(self, cupy: Any, handle: str | None = None) -> None:
        self._cuda, runtime = cupy.cuda, cupy.cuda.runtime
        if handle is None:
            self._event = cupy.cuda.Event(disable_timing=True, interprocess=True)
            self._address = self._event.ptr
            self.handle = runtime.ipcGetEventHandle(self._address).hex()
        else:
            self._event = None
            self._address = runtime.ipcOpenEventHandle(bytes.fromhex(handle))
            self.handle = handle

    def record(self) -> None:
        """Record it on the current stream."""
        self._cuda.runtime.eventRecord(self._address, self._cuda.get_current_stream().ptr)

    def wait(self) -> None:
        """Have the current stream wait for it."""
        self._cuda.runtime.streamWaitEvent(self._cuda.get_current_stream().ptr, self._address)

    def close(self) -> None:
        """Destroy this process's event."""
        if self._event is None and self._address:
            self._cuda.runtime.eventDestroy(self._address)
        self._event, self._address = None, 0


def _uint8(cupy: Any, pointer: Any, size: int) -> Array:
    return cupy.ndarray((size,), np.uint8, memptr=pointer)


def _refused(rule: str, error: Exception, remedy: str) -> DeviceError:
    return DeviceError("shared memory", rule, error, remedy)
