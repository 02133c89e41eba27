"""The kernel arguments that dense and sparse updates share: scalars, clip factors, and what a norm is summed with."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices import Device
from gpu_adam.kernels import Layout


class UpdateArguments:
    """Arguments of one launch, which are written before each step and read when the kernel is enqueued.

    Args:
        layout: how the variables' elements appear to the kernels.
        device: where the kernel runs.
        settings: how many different settings the variables have.
        captured: whether the launch becomes part of a graph.
        guarded: whether a guard chooses the scalars on the device; it says where they are then.

    Attributes:
        scalars: StepScalars, by value.
        is_staged: whether the kernel is to read its scalars from `staged`: those of several settings, or guarded ones.
        settings, scalars_dtype: how many StepScalars there are, and their dtype.
        staged: address of an array of StepScalars in device memory that takes the place of `scalars`, or null.
        factors: address of the clip factors, null where gradients are not clipped by norm.
        factor_stride: 1 where each tensor has a factor of its own, 0 where one factor serves all.
        sums: address of the partial sums of squares.
        found: address of the number of elements that are not finite, null where nobody asks.
    """

    def __init__(
        self, layout: Layout, device: Device, settings: int = 1, *, captured: bool = False, guarded: bool = False
    ) -> None:
        real_dtype = kernels.DTYPES[layout.dtype].real_dtype
        self.is_staged = settings > 1 or guarded
        self.settings, self.scalars_dtype = settings, kernels.step_scalars(real_dtype)
        self._all = np.zeros(settings, self.scalars_dtype)
        self.scalars = self._all[:1]
        self.staged, self.factors, self.factor_stride = kernels.pointer(0), kernels.pointer(0), kernels.scalar(0)
        if self.is_staged and not guarded:
            self._table, self._captured = device.staged(settings, self._all.dtype), captured
            self.staged[0] = self._table.address
        _noise, *numbers = self.scalars_dtype.names or ("",)
        self.sums, self.found = kernels.pointer(0), kernels.pointer(0)
        # A third of the time of an assignment to NumPy's struct.
        form = struct.Struct(f"=Q{len(numbers)}{np.dtype(real_dtype).char}")
        self._write = functools.partial(form.pack_into, self.scalars.view(np.uint8).data, 0)

    def set_scalars(self, scalars: Sequence[tuple[Any, ...]]) -> None:
        """Use the scalars of a step: the fields of StepScalars, for each of the settings."""
        self._write(*scalars[0])
        if self.is_staged:
            self._all[1:] = scalars[1:]
            self._table.write(self._all, captured=self._captured)
