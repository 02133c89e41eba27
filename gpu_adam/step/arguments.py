"""The kernel arguments that dense and sparse updates share: scalars, clip factors, and what a norm is summed with."""

from __future__ import annotations

import functools
import struct
from typing import Any

import numpy as np

from gpu_adam import kernels
from gpu_adam.kernels import Layout


class UpdateArguments:
    """Arguments of one launch, which are written before each step and read when the kernel is enqueued.

    Args:
        layout: how the variables' elements appear to the kernels.

    Attributes:
        scalars: StepScalars, by value.
        staged: address of StepScalars in device memory that take the place of `scalars`; null here.
        factors: address of the clip factors, null where gradients are not clipped by norm.
        factor_stride: 1 where each tensor has a factor of its own, 0 where one factor serves all.
        clip_value: bound of every element's absolute value, infinite where there is none; the last of `scalars`.
        sums: address of the partial sums of squares.
    """

    def __init__(self, layout: Layout) -> None:
        real_dtype = kernels.DTYPES[layout.dtype].real_dtype
        self.scalars = np.zeros(1, kernels.step_scalars(real_dtype))
        self.staged, self.factors, self.factor_stride = kernels.pointer(0), kernels.pointer(0), kernels.scalar(0)
        numbers = self.scalars.view(real_dtype)
        self.clip_value, self.sums = numbers[-1:], kernels.pointer(0)
        # A third of the time of an assignment to NumPy's struct.
        form = struct.Struct(f"={len(numbers)}{numbers.dtype.char}")
        self._write = functools.partial(form.pack_into, numbers.data.cast("B"), 0)

    def set_scalars(self, scalars: tuple[Any, ...]) -> None:
        """Use the scalars of a step: alpha_t, 1 - beta_1, 1 - beta_2, epsilon, clip value."""
        self._write(*scalars)
