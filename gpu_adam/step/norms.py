"""Norms of gradients, for clipping, whose factors never leave the device (norm.cu); norms of updates, for reports."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices import Array, Device
from gpu_adam.kernels import UpdateRule
from gpu_adam.step.arguments import UpdateArguments
from gpu_adam.uninterrupted import Call


class Normed(Protocol):
    """A launch whose gradients have a norm, and what it adds to its variables."""

    device: Device
    gradient: str
    tensors: int
    chunk_ends: Array | None
    arguments: UpdateArguments

    @property
    def sum_count(self) -> int:
        """How many partial sums the gradients have."""

    def square_sum_calls(self, address: int) -> list[Call]:
        """The calls that enqueue the partial sums of squares, to the float64 array at `address`."""

    @property
    def measured_count(self) -> int:
        """How many sums of each kind a measured update writes."""


class UpdateNorms:
    """The sums of squares over all variables of a step, which its updates measure.

    Args:
        launches: of the updates; of one device. They write their sums to where this object has memory.
        rule: of the update.
        totals: addresses of the float64 numbers to which the sums are added: of the updates, and of the variables.
    """

    def __init__(self, launches: Sequence[Normed], rule: UpdateRule, totals: Sequence[int]) -> None:
        device, count = launches[0].device, sum(launch.measured_count for launch in launches)
        self._sums = device.empty(2 * count, np.dtype(np.float64))
        places = [device.address(self._sums) + 8 * count * number for number in range(2)]
        kernel, size = kernels.norm(launches[0].gradient, "add_square_sum", rule), kernels.scalar(count)
        self._adds = [
            device.prepare(kernel, [kernels.pointer(place), size, kernels.pointer(total)])
            for place, total in zip(places, totals, strict=True)
        ]
        for launch in launches:
            launch.arguments.measured[0] = tuple(places)
            places = [place + 8 * launch.measured_count for place in places]

    def calls(self) -> list[Call]:
        """The calls that enqueue the additions, behind the updates."""
        return [add.call(1) for add in self._adds]


class NormPass:
    """One norm over the gradients of some launches, or one for each tensor of a launch, or their partial sums alone.

    The two halves are apart so that partial sums of other machines can come in between.

    Args:
        launches: whose gradients; of one device. Their clip factors are read from where this pass writes them.
        rule: of the update: whether there is one norm over all gradients, one for each tensor of the only launch, or
            nothing to clip by: a search for elements that are not finite takes the sums.
    """

    def __init__(self, launches: Sequence[Normed], rule: UpdateRule) -> None:
        self._launches, self._device = list(launches), launches[0].device
        is_global, norm = rule.norm == "global", functools.partial(kernels.norm, rule=rule)
        self._sums = self._device.empty(0, np.dtype(np.float64))
        self._sums_pointer, self._count = kernels.pointer(0), kernels.scalar(0)
        self._limit, self._total = kernels.scalar(0, np.float64), kernels.pointer(0)
        self._clips = rule.norm is not None
        if rule.searched:
            arguments = [self._sums_pointer, self._count, self._total]
            self._add = self._device.prepare(norm(launches[0].gradient, "add_square_sum"), arguments)
        if not self._clips:
            return
        self._blocks = 1 if is_global else launches[0].tensors
        self._factors = self._device.empty(max(1, self._blocks), np.dtype(np.float64))
        factors = kernels.pointer(self._device.address(self._factors))
        for launch in launches:
            launch.arguments.factors[0] = self._device.address(self._factors)
            launch.arguments.factor_stride[0] = 0 if is_global else 1
        if is_global:
            kernel = norm(launches[0].gradient, "clip_by_global_norm")
            arguments = [self._sums_pointer, self._count, self._limit, factors]
        else:
            self._chunk_ends = launches[0].chunk_ends
            ends = kernels.pointer(0 if self._chunk_ends is None else self._device.address(self._chunk_ends))
            kernel = norm(launches[0].gradient, "clip_by_norm")
            tensors = kernels.scalar(self._blocks)
            arguments = [self._sums_pointer, ends, tensors, self._count, self._limit, factors]
        self._launch = self._device.prepare(kernel, arguments)

    def bind(self) -> None:
        """Make room for the partial sums of the gradients bound last."""
        total = sum(launch.sum_count for launch in self._launches)
        if total > self._sums.size:
            self.reserve(max(total, 2 * self.capacity))
        self._sums_pointer[0], self._count[0] = self._device.address(self._sums), total

    @property
    def capacity(self) -> int:
        """How many partial sums there is room for."""
        return int(self._sums.size)

    def reserve(self, capacity: int) -> None:
        """Make room for exactly so many partial sums."""
        self._sums = self._device.empty(capacity, np.dtype(np.float64))

    def sums(self) -> list[Call]:
        """The calls that enqueue the partial sums of squares, launch after launch and chunk after chunk."""
        calls, address = [], int(self._sums_pointer[0])
        for launch in self._launches:
            calls += launch.square_sum_calls(address)
            address += 8 * launch.sum_count
        return calls

    def total(self, address: int) -> list[Call]:
        """The calls that enqueue the addition of the partial sums to the float64 number at `address`."""
        self._total[0] = address
        return [self._add.call(1)]

    def factors(self, limit: float | None) -> list[Call]:
        """The calls that enqueue the sum of the partial sums, and the factors that bound the norms by `limit`."""
        if not self._clips:
            return []
        assert limit is not None
        self._limit[0] = limit
        return [self._launch.call(self._blocks)] if self._blocks else []


def norm_passes(launches: Sequence[Normed], rule: UpdateRule) -> list[NormPass]:
    """The passes of a step: none, one for each launch for "each", else one."""
    if not rule.sums_squares:
        return []
    return [NormPass([launch], rule) for launch in launches] if rule.norm == "each" else [NormPass(launches, rule)]
