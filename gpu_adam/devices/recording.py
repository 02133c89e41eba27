"""A device that does what another one does, and writes down what it is asked for: for measurements and tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from gpu_adam.devices.base import (
    Array,
    Capture,
    Device,
    Landing,
    Launch,
    ReadBack,
    SharedEvent,
    SharedMemory,
    Snapshot,
    StagedArray,
)
from gpu_adam.devices.pair_reader import AddressReader, ExpectedPairs, PairReader
from gpu_adam.kernels import Kernel
from gpu_adam.uninterrupted import Call


class Event(NamedTuple):
    """Something that the device was asked for.

    Attributes:
        kind: "launch", "copy" or "allocation".
        name: of the kernel of a launch; else empty.
        amount: blocks of a launch, bytes of a copy or an allocation.
    """

    kind: str
    name: str
    amount: int


class RecordingDevice(Device):
    """Wraps a device. Variables of the wrapper lie in the device's memory, and their steps are recorded.

    Args:
        device: does the work.
        before: called before each event is carried out; what it raises is raised in the event's place.

    Attributes:
        events: what was asked for, in order; may be cleared.
    """

    def __init__(self, device: Device, before: Callable[[Event], object] | None = None) -> None:
        self._device, self._before = device, before
        self.name, self.xp, self.captures = device.name, device.xp, device.captures
        self.events: list[Event] = []

    def launches(self) -> list[str]:
        """Names of the kernels that were launched, in order."""
        return [event.name for event in self.events if event.kind == "launch"]

    def record(self, event: Event) -> None:
        """Write an event down."""
        if self._before is not None:
            self._before(event)
        self.events.append(event)

    def activate(self) -> AbstractContextManager[Any]:
        """As the device."""
        return self._device.activate()

    def array(self, values: Any, dtype: np.dtype | None = None) -> Array:
        """As the device; an allocation."""
        array = self._device.array(values, dtype)
        self.record(Event("allocation", "", int(array.nbytes)))
        return array

    def empty(self, size: int, dtype: np.dtype) -> Array:
        """As the device; an allocation."""
        self.record(Event("allocation", "", size * dtype.itemsize))
        return self._device.empty(size, dtype)

    def numpy(self, array: Array) -> np.ndarray:
        """As the device; a copy."""
        self.record(Event("copy", "", int(array.nbytes)))
        return self._device.numpy(array)

    def view(self, obj: Any) -> Array | None:
        """As the device."""
        return self._device.view(obj)

    def address(self, array: Array) -> int:
        """As the device."""
        return self._device.address(array)

    def is_plain(self, obj: Any, dtype: np.dtype) -> bool:
        """As the device."""
        return self._device.is_plain(obj, dtype)

    def addresses(self, arrays: Sequence[Array]) -> np.ndarray:
        """As the device."""
        return self._device.addresses(arrays)

    def address_reader(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype]) -> AddressReader:
        """As the device."""
        return self._device.address_reader(shapes, dtypes)

    def pair_reader(self, expected: ExpectedPairs) -> PairReader:
        """As the device."""
        return self._device.pair_reader(expected)

    def staged(self, size: int, dtype: np.dtype) -> StagedArray:
        """As the device; an allocation, and a copy for each write."""
        self.record(Event("allocation", "", size * dtype.itemsize))
        return _RecordedArray(self, self._device.staged(size, dtype))

    def read_back(self, array: Array) -> ReadBack:
        """As the device, unrecorded: what a copy costs a step is in no measurement."""
        return self._device.read_back(array)

    def snapshot(self, arrays: Sequence[Array], *, lasting: bool) -> Snapshot:
        """As the device; a copy of all."""
        self.record(Event("copy", "", sum(int(array.nbytes) for array in arrays)))
        return self._device.snapshot(arrays, lasting=lasting)

    def landing(self, array: Array) -> Landing:
        """As the device; a copy of all."""
        self.record(Event("copy", "", int(array.nbytes)))
        return self._device.landing(array)

    def copy_call(self, targets: Sequence[Array], sources: Sequence[Array]) -> Call:
        """As the device; a copy of all when it is called."""
        event = Event("copy", "", sum(int(target.nbytes) for target in targets))
        return functools.partial(_recorded, self, event, self._device.copy_call(targets, sources))

    def prepare(self, kernel: Kernel, arguments: Sequence[np.ndarray]) -> Launch:
        """As the device; a launch each time it is called."""
        return _RecordedLaunch(self, kernel.name, self._device.prepare(kernel, arguments))

    def share_processors(self) -> None:
        """As the device."""
        self._device.share_processors()

    def resumed(self) -> Callable[[], AbstractContextManager[Any]]:
        """As the device."""
        return self._device.resumed()

    def is_capturing(self) -> bool:
        """As the device."""
        return self._device.is_capturing()

    def capture(self) -> Capture | None:
        """As the device."""
        return self._device.capture()

    def private_pool(self) -> tuple[Any, AbstractContextManager[Any]]:
        """As the device."""
        return self._device.private_pool()

    def keep_with_graph(self, obj: Any) -> None:
        """As the device."""
        self._device.keep_with_graph(obj)

    def synchronize(self) -> None:
        """As the device."""
        self._device.synchronize()

    @property
    def identity(self) -> str:
        """As the device."""
        return self._device.identity

    def share_memory(self, nbytes: int, *, read_only: bool) -> SharedMemory:
        """As the device; an allocation."""
        self.record(Event("allocation", "", nbytes))
        return self._device.share_memory(nbytes, read_only=read_only)

    def map_memory(self, handle: dict[str, Any], descriptor: int) -> SharedMemory:
        """As the device."""
        return self._device.map_memory(handle, descriptor)

    def share_event(self) -> SharedEvent:
        """As the device."""
        return self._device.share_event()

    def map_event(self, handle: str) -> SharedEvent:
        """As the device."""
        return self._device.map_event(handle)

    def facts(self) -> list[tuple[str, str]]:
        """As the device."""
        return self._device.facts()

    @property
    def checks_indices(self) -> bool:
        """As the device."""
        return self._device.checks_indices


def _recorded(device: RecordingDevice, event: Event, call: Call) -> None:
    device.record(event)
    call()


class _RecordedLaunch:
    def __init__(self, device: RecordingDevice, name: str, launch: Launch) -> None:
        self._device, self._name, self._launch = device, name, launch

    def call(self, blocks: int) -> Call:
        event = Event("launch", self._name, blocks)
        return functools.partial(_recorded, self._device, event, self._launch.call(blocks))

    def __call__(self, blocks: int) -> None:
        self.call(blocks)()


class _RecordedArray:
    def __init__(self, device: RecordingDevice, array: StagedArray) -> None:
        self._device, self._array = device, array
        self.address = array.address

    def write(self, values: np.ndarray, *, captured: bool = False) -> None:
        self._device.record(Event("copy", "", int(values.nbytes)))
        self._array.write(values, captured=captured)
