"""The kernel arguments that dense and sparse updates share: scalars, clip factors, and what a norm is summed with."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices import Device
from gpu_adam.devices.base import StagedArray
from gpu_adam.kernels import Layout

Writer = Callable[[StagedArray, np.ndarray], object]
"""Gives an array that a launch reads other contents."""


def _write_now(array: StagedArray, values: np.ndarray) -> None:
    array.write(values)


def _write_at_replays(array: StagedArray, values: np.ndarray) -> None:
    array.write(values, captured=True)


class Use(NamedTuple):
    """What a launch is made for.

    Attributes:
        staged: the least GPU_ADAM_STAGED of its kernel, see adam_math.cuh.
        write_scalars: how scalars that are not among the kernel's arguments come to the device.
        write_addresses: how the addresses of gradients do.
    """

    staged: int
    write_scalars: Writer
    write_addresses: Writer


EAGER = Use(staged=0, write_scalars=_write_now, write_addresses=_write_now)
"""A step at once."""

CAPTURED = Use(staged=2, write_scalars=_write_at_replays, write_addresses=_write_at_replays)
"""A graph of the user's, every replay of which repeats the step with its scalars, or takes those that were staged."""


def replayed(write_addresses: Writer, *, is_constant: bool = False) -> Use:
    """A graph of ours, whose addresses are written but once; scalars are staged before each replay, or are constant."""
    return Use(staged=int(not is_constant), write_scalars=_write_now, write_addresses=write_addresses)


class UpdateArguments:
    """Arguments of one launch, which are written before each step and read when the kernel is enqueued.

    Args:
        layout: how the variables' elements appear to the kernels.
        device: where the kernel runs.
        settings: how many different settings the variables have.
        use: what the launch is made for.
        shared: `live` of the launch of which this one is the graph's.
        guarded: whether a guard chooses the scalars on the device; it says where they are then.

    Attributes:
        scalars: StepScalars, by value.
        settings, scalars_dtype: how many StepScalars there are, and their dtype.
        kind: GPU_ADAM_STAGED of the kernel: not 0 where there are several settings, or guarded ones.
        staged: address of an array of StepScalars in device memory, one for each of the settings, or null.
        frozen: address of another one, with the scalars of a capture, or 0.
        live: the array that graphs read, zeros until something is staged; None where nothing can be captured.
        factors: address of the clip factors, null where gradients are not clipped by norm.
        factor_stride: 1 where each tensor has a factor of its own, 0 where one factor serves all.
        sums: address of the partial sums of squares.
        norm: what becomes of these sums, NORM; nothing but the sums by default.
        found: address of the number of elements that are not finite, null where nobody asks.
        measured: addresses of what a measured update adds up, MEASURED_SUMS; else null.
    """

    def __init__(
        self,
        layout: Layout,
        device: Device,
        settings: int = 1,
        use: Use = EAGER,
        shared: StagedArray | None = None,
        *,
        guarded: bool = False,
    ) -> None:
        real_dtype = kernels.DTYPES[layout.dtype].real_dtype
        if not device.captures:  # another device's group of the same step may be in a graph
            use = EAGER
        self.kind = 1 if guarded else use.staged or int(settings > 1)
        self.settings, self.scalars_dtype = settings, kernels.step_scalars(real_dtype)
        self._all = np.zeros(settings, self.scalars_dtype)
        self._bytes = self._all.view(np.uint8)  # NumPy copies structs field by field
        self.scalars = self._all[:1]
        self.staged, self.factors, self.factor_stride = kernels.pointer(0), kernels.pointer(0), kernels.scalar(0)
        self.frozen = 0
        self._table: StagedArray | None = None
        self._write_table = use.write_scalars
        if (self.kind == 1 or settings > 1) and not guarded:
            self._table = self._array_for(device)
        self.live = self._table if use.staged else None
        if self.kind == 2:
            assert shared is not None
            self.live, self.staged[0] = shared, shared.address
            self.frozen = 0 if self._table is None else self._table.address
        elif self._table is not None:
            self.staged[0] = self._table.address
        if use is EAGER and device.captures and not guarded:
            self.live = self._array_for(device)
            self.live.write(self._bytes)
        _noise, *numbers = self.scalars_dtype.names or ("",)
        self.sums, self.found = kernels.pointer(0), kernels.pointer(0)
        self.norm = np.zeros(1, kernels.NORM)
        self.measured = kernels.struct(kernels.MEASURED_SUMS, 0, 0)
        # A third of the time of an assignment to NumPy's struct.
        form = struct.Struct(f"=Q{len(numbers)}{np.dtype(real_dtype).char}")
        self._write = functools.partial(form.pack_into, self.scalars.view(np.uint8).data, 0)

    def _array_for(self, device: Device) -> StagedArray:
        return device.staged(self._all.nbytes, self._bytes.dtype)

    def set_scalars(self, scalars: Sequence[tuple[Any, ...]]) -> None:
        """Use the scalars of a step: the fields of StepScalars, for each of the settings."""
        self._write(*scalars[0])
        if self._table is not None:
            self._all[1:] = scalars[1:]
            self._write_table(self._table, self._bytes)

    def stage(self, scalars: Sequence[tuple[Any, ...]]) -> None:
        """Let graphs read these scalars from now on, in the order of the current stream."""
        if self.live is not None:
            self._write(*scalars[0])
            if len(scalars) > 1:
                self._all[1:] = scalars[1:]
            self.live.write(self._bytes)
