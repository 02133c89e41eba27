"""CUDA's interprocess communication on the emulated driver, whose processes are the threads of this one.

Memory has the same address in all of them; everything else goes by CUDA's rules, as far as they can be looked at. A
handle is had of an allocation of `cudaMalloc` by its first address, and of an event made for it. Who made it cannot
open it. An open handle is opened once more by counting, and closed as often. What was given back is not used any more.

Source: the CUDA Runtime API, version 13, section 6.11 (Device Management) on `cudaIpc*`.
"""

from __future__ import annotations

import importlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_TIMELESS, _INTERPROCESS = 2, 4  # cudaEventDisableTiming, cudaEventInterprocess

_local, _numbers = threading.local(), itertools.count(1)


class Processes:
    """What threads have given to each other.

    Args:
        cupy: the module, above the emulated driver.

    Attributes:
        mapped: how often memory is open, by its address.
        faults: what broke CUDA's rules where nothing can be raised.
        calls: the names of the functions that were called.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy, self.error = cupy, cupy.cuda.runtime.CUDARuntimeError
        self._scheduler = importlib.import_module("emulated_driver.core.scheduler")
        self._blocks = importlib.import_module("emulated_driver.runtime_api")._blocks
        self._memories: dict[bytes, tuple[int, int, Any]] = {}  # process, address, block
        self._events: dict[bytes, tuple[int, Any]] = {}  # process, event
        self.mapped = Counter[int]()
        self.faults: list[str] = []
        self.calls: list[str] = []

    def functions(self) -> dict[str, Callable[..., Any]]:
        """What takes the place of CuPy's."""
        return {
            "ipcGetMemHandle": self._memory_handle,
            "ipcOpenMemHandle": self._open_memory,
            "ipcCloseMemHandle": self._close_memory,
            "ipcGetEventHandle": self._event_handle,
            "ipcOpenEventHandle": self._open_event,
        }

    def _memory_handle(self, address: int) -> bytes:
        self.calls.append("ipcGetMemHandle")
        block, device, stream = self._blocks.get(address, (None, None, None))
        if block is None or device is None or stream is not None:
            raise self.error(1)  # no allocation of cudaMalloc begins there
        handle = _handle(b"memory", address, id(block))
        self._memories[handle] = _process(), address, block
        return handle

    def _open_memory(self, handle: bytes, flags: int = 1) -> int:
        self.calls.append("ipcOpenMemHandle")
        process, address, block = self._memories.get(handle, (0, 0, None))
        if block is None or self._blocks.get(address, (None,))[0] is not block:
            raise self.error(400)  # cudaErrorInvalidResourceHandle
        if process == _process():
            raise self.error(201)  # cudaErrorDeviceUninitialized: the process's own
        if self._blocks[address][1] != self._scheduler.current_device():
            raise self.error(217)  # cudaErrorPeerAccessUnsupported: another device's
        self.mapped[address] += 1
        return address

    def _close_memory(self, address: int) -> None:
        self.calls.append("ipcCloseMemHandle")
        if not self.mapped[address]:
            self.faults.append("memory was unmapped that this process had not mapped")
            raise self.error(1)
        if address not in self._blocks:
            self.faults.append("memory was freed while another process had it")
        self.mapped[address] -= 1

    def _event_handle(self, address: int) -> bytes:
        self.calls.append("ipcGetEventHandle")
        event = self._scheduler.event(address)
        if event.flags & (_TIMELESS | _INTERPROCESS) != _TIMELESS | _INTERPROCESS:
            raise self.error(400)
        handle = _handle(b"event", address, id(event))
        self._events[handle] = _process(), event
        return handle

    def _open_event(self, handle: bytes) -> int:
        self.calls.append("ipcOpenEventHandle")
        process, event = self._events.get(handle, (0, None))
        if event is None or not self._is_there(event):
            raise self.error(400)
        if process == _process() or event.device != self._scheduler.current_device():
            raise self.error(201)
        address = self._scheduler.new_handle()
        self._scheduler._events[address] = _Imported(event, address, self)
        return int(address)

    def _is_there(self, event: Any) -> bool:
        return self._scheduler._events.get(event.ptr) is event


class _Imported:
    """Another thread's event. It must not be used when that one is destroyed."""

    def __init__(self, event: Any, address: int, processes: Processes) -> None:
        vars(self).update(ptr=address, _event=event, _processes=processes)

    def _checked(self) -> Any:
        if not self._processes._is_there(self._event):
            self._processes.faults.append("an event was used after its process had destroyed it")
            raise self._processes.error(400)
        return self._event

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checked(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._checked(), name, value)


def _process() -> int:
    """A number of this thread, which no other one ever has."""
    if not hasattr(_local, "process"):
        _local.process = next(_numbers)
    return int(_local.process)


def _handle(kind: bytes, *numbers: int) -> bytes:
    """64 bytes, zeros among them."""
    return b"".join([kind.ljust(8, b"\0"), *(number.to_bytes(8, "big") for number in numbers)]).ljust(64, b"\0")


@contextmanager
def processes(cupy: Any) -> Iterator[Processes]:
    """A block in which the threads of this process share memory by handles, like processes."""
    made = Processes(cupy)
    with pytest.MonkeyPatch.context() as patch:
        for name, function in made.functions().items():
            patch.setattr(cupy.cuda.runtime, name, function)
        yield made
    assert not made.faults, made.faults
