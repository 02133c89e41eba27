"""The copy that every kernel is compared with: how many bytes a second this machine moves when nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_adam import kernels
from gpu_adam.bench.clocks import Candidate, Clock, Effort, Summary, WallClock, measure
from gpu_adam.bench.facts import cache_bytes
from gpu_adam.bench.own_step import stream_clock
from gpu_adam.devices import Device, HostDevice

BLOCK = 2**18  # COPY_BLOCK of cuda/host/copy.cpp
_LEAST = 2**28


@dataclass(frozen=True)
class CopyBandwidth:
    """Bandwidth of a copy.

    Attributes:
        summary: seconds of one copy.
        moved_bytes: by one copy, those read and those written.
        how: in words.
    """

    summary: Summary
    moved_bytes: int
    how: str

    @property
    def bytes_per_second(self) -> float:
        """At the median."""
        return self.moved_bytes / self.summary.median


def copy_bandwidth(device: Device, effort: Effort, nbytes: int | None = None) -> CopyBandwidth:
    """Measure a copy of `nbytes`, a multiple of 64; by default of more than the caches hold."""
    if nbytes is None:
        nbytes = max(_LEAST, 4 * cache_bytes(device)) // 64 * 64
    source, target = (device.empty(nbytes, np.dtype(np.uint8)) for _ in range(2))
    with device.activate():
        source.fill(1)
        target.fill(2)
    device.synchronize()
    if isinstance(device, HostDevice):
        step, how = _host_copy(device, target, source), "parallel copy with non-temporal stores"
        clock: Clock = WallClock(device.synchronize)
    else:
        events = stream_clock(device)
        step, how, clock = _device_copy(device, target, source, events.stream), "device-to-device copy", events
    candidate = Candidate("copy", [step], clock)
    measure([candidate], effort)
    return CopyBandwidth(candidate.summary, 2 * nbytes, how)


def _host_copy(device: HostDevice, target: Any, source: Any) -> Callable[[], None]:
    arguments = [kernels.pointer(device.address(array)) for array in (target, source)]
    launch = device.prepare_native("copy.cpp", "copy", [*arguments, kernels.scalar(source.nbytes)])
    blocks = -(-source.nbytes // BLOCK)
    return lambda: launch(blocks)


def _device_copy(device: Device, target: Any, source: Any, stream: Any) -> Callable[[], None]:
    runtime = device.xp.cuda.runtime
    addresses = device.address(target), device.address(source)
    kind, kept = runtime.memcpyDeviceToDevice, (target, source)
    return lambda: runtime.memcpyAsync(*addresses, kept[0].nbytes, kind, stream.ptr)
