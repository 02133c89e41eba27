"""gpu_adam's own step of a workload: checked against the reference, then as candidates for the clock."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

import gpu_adam
from gpu_adam.bench.clocks import Candidate, CudaEvents, WallClock
from gpu_adam.bench.inputs import Inputs
from gpu_adam.bench.reference import FACTOR, STEPS, Reference
from gpu_adam.bench.workloads import CLIP_NORM, Workload
from gpu_adam.devices import Device
from gpu_adam.devices.recording import RecordingDevice
from gpu_adam.errors import GpuAdamError

NAME = "gpu_adam"
GRAPH = ", graph"


class WrongResultError(GpuAdamError):
    """A kernel's result differs from the reference by more than rounding; it is not timed."""


class OwnStep:
    """One set of inputs on a device, and an optimizer.

    Args:
        inputs: the values.
        device: where to.
        hyperparameters: of the optimizer.
    """

    def __init__(self, inputs: Inputs, device: Device, hyperparameters: Mapping[str, Any] | None = None) -> None:
        workload, count = inputs.workload, range(len(inputs.shapes))
        self.variables = [gpu_adam.Variable.over(device.array(inputs.theta(k)), device, f"variable {k}") for k in count]
        if workload.indices:
            slices = [(device.array(inputs.values(k)), device.array(inputs.indices(k))) for k in count]
            self.gradients: list[Any] = [gpu_adam.IndexedSlices(values, indices) for values, indices in slices]
            self._read = sum(values.nbytes + indices.nbytes for values, indices in slices)
        else:
            self.gradients = [device.array(inputs.gradient(k)) for k in count]
            self._read = sum(gradient.nbytes for gradient in self.gradients)
        self._pairs = list(zip(self.gradients, self.variables, strict=True))
        clip = CLIP_NORM if workload.clip else None
        self.optimizer = gpu_adam.Adam(
            amsgrad=workload.amsgrad,
            complex_mode=workload.complex_mode,
            global_clipnorm=clip,
            **(hyperparameters or {}),
        )
        self._norm_passes = int(workload.clip)

    def __call__(self) -> None:
        """Enqueue a step."""
        self.optimizer.apply_gradients(self._pairs)

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients, in place."""
        for gradient, variable in zip(self.gradients, self.variables, strict=True):
            array = getattr(gradient, "values", gradient)
            with variable.device.activate():
                array *= array.dtype.type(factor)

    @property
    def slot_bytes(self) -> int:
        """Of all slots."""
        return sum(slot.size * slot.dtype.itemsize for slot in self.optimizer.weights[1:])

    @property
    def moved_bytes(self) -> int:
        """What a step must read and write: gradients once (twice for a norm), variables and slots there and back."""
        variables = sum(variable.size * variable.dtype.itemsize for variable in self.variables)
        return int((1 + self._norm_passes) * self._read + 2 * (variables + self.slot_bytes))


@dataclass(frozen=True)
class Facts:
    """What a workload's step does, apart from taking time.

    Attributes:
        moved_bytes: that must move.
        launches: kernels per step.
        extra_bytes: peak memory beside variables, gradients and slots; None where it cannot be seen.
    """

    moved_bytes: int
    launches: int
    extra_bytes: int | None


def checked(workload: Workload, device: Device) -> Facts:
    """Compare STEPS steps with the reference.

    Raises:
        WrongResultError: an element is off.
    """
    inputs = Inputs(workload, 0)
    reference = Reference(inputs)
    recording = RecordingDevice(device)
    step = OwnStep(inputs, recording, reference.hyperparameters)
    with _extra_memory(device) as peak:
        for number in range(STEPS):
            if number == STEPS - 1:
                recording.events.clear()
            step()
            device.synchronize()
            step.scale_gradients(FACTOR)
        extra = peak()
    for k, variable in enumerate(step.variables):
        flat = variable.value.reshape(-1)
        for place, expected, tolerance in reference.parts(k):
            actual = device.numpy(flat[place])
            wrong = ~(np.abs(actual.astype(expected.dtype) - expected) <= tolerance)  # NaN is wrong, too
            if wrong.any():
                i = int(np.argmax(wrong))
                raise WrongResultError(
                    f"{workload.name}: variable {k}, element {place.start + i}",
                    f"must be {expected[i]:.9g} within {tolerance[i]:.2g}",
                    f"{actual[i]:.9g}; {int(wrong.sum())} of {wrong.size} are off",
                    "this workload is not timed; run the tests",
                )
    extra_bytes = None if extra is None else max(0, extra - step.slot_bytes)
    return Facts(step.moved_bytes, len(recording.launches()), extra_bytes)


def candidates(sets: Sequence[Inputs], device: Device) -> Iterator[Callable[[], Candidate]]:
    """Makers of our candidates: the step as called from Python, and on a GPU its replay from a graph."""
    yield lambda: _eager(sets, device)
    if device.name != "host":
        yield lambda: _replayed(sets, device)


def stream_clock(device: Device) -> CudaEvents:
    """CUDA events in a new stream of the device."""
    with device.activate():
        return CudaEvents(device.xp.cuda, device.xp.cuda.Stream(non_blocking=True))


def _eager(sets: Sequence[Inputs], device: Device) -> Candidate:
    steps = [OwnStep(inputs, device) for inputs in sets]
    if device.name == "host":
        return Candidate(NAME, steps, WallClock(device.synchronize))
    device.synchronize()
    return Candidate(NAME, steps, stream_clock(device))


def _replayed(sets: Sequence[Inputs], device: Device) -> Candidate:
    steps, clock = [OwnStep(inputs, device) for inputs in sets], stream_clock(device)
    device.synchronize()
    replays = []
    with clock.stream:
        for step in steps:
            step()  # slots and tables are made outside of the graph
            clock.stream.begin_capture()
            step()
            replays.append(_Replay(step, clock.stream.end_capture(), clock.stream))
    return Candidate(NAME + GRAPH, replays, clock)


class _Replay:
    def __init__(self, step: OwnStep, graph: Any, stream: Any) -> None:
        self._kept, self._graph, self._stream = step, graph, stream

    def __call__(self) -> None:
        self._graph.launch(self._stream)


@contextmanager
def _extra_memory(device: Device) -> Iterator[Callable[[], int | None]]:
    """A function that tells the peak of memory allocated since the start of the block."""
    if device.name == "host":
        tracemalloc.start()  # NumPy reports to it
        try:
            yield lambda: tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        return
    with device.activate():
        pool = device.xp.get_default_memory_pool()
        pool.free_all_blocks()
        before = int(pool.used_bytes())
        yield lambda: int(pool.total_bytes()) - before  # the pool gives nothing back by itself
