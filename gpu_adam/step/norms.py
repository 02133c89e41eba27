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
from gpu_adam.step.exchange import Exchange
from gpu_adam.step.groups import DenseGroup, SparseGroup
from gpu_adam.uninterrupted import Call


def norm_counters(device: Device, rule: UpdateRule, tensors: int) -> Array | None:
    """For each norm of a launch how many of its sums are written; None where it has no norm.

    They are zeros between two launches. So those of graphs have the same ones: a copy of zeros would become a part of a
    graph.
    """
    if rule.norm is None:
        return None
    return device.array(np.zeros(max(1, tensors) if rule.norm == "each" else 1, np.uint64))


class Normed(Protocol):
    """A launch whose gradients have a norm, and what it adds to its variables."""

    device: Device
    gradient: str
    tensors: int
    counters: Array | None
    arguments: UpdateArguments

    @property
    def group(self) -> DenseGroup | SparseGroup:
        """Of the variables."""

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

    A launch that has a norm to itself finishes it; where several have one together, another kernel does.

    Args:
        launches: whose gradients; of one device. Their clip factors are read from where this pass writes them.
        rule: of the update: whether there is one norm over all gradients, one for each tensor of the only launch, or
            nothing to clip by: a search for elements that are not finite takes the sums.
        exchange: makes one norm of the gradients of all ranks, if there are several.
    """

    def __init__(self, launches: Sequence[Normed], rule: UpdateRule, exchange: Exchange | None = None) -> None:
        self._launches, self._device = list(launches), launches[0].device
        self._shared = None
        if exchange is not None:
            self._shared = exchange.sums([exchange.part_of(launch.group.variables[0]) for launch in launches])
        norm = functools.partial(kernels.norm, launches[0].gradient, rule=rule)
        self._sums = self._device.empty(0, np.dtype(np.float64))
        self._sums_pointer, self._count = kernels.pointer(0), kernels.scalar(0)
        self._limit, self._total = kernels.scalar(0, np.float64), kernels.pointer(0)
        self._finish, self._begins_pointer = None, kernels.pointer(0)
        if rule.searched:
            arguments = [self._sums_pointer, self._count, self._total]
            self._add = self._device.prepare(norm("add_square_sum"), arguments)
        if rule.norm is None:
            return
        stride = int(rule.norm == "each")
        norms = max(1, launches[0].tensors) if stride else 1
        self._norms = norms
        self._factors = self._device.empty(norms, np.dtype(np.float64))
        factors = self._device.address(self._factors)
        for launch in launches:
            launch.arguments.factors[0], launch.arguments.factor_stride[0] = factors, stride
        counters = launches[0].counters
        if self._shared is not None and stride:
            ranges = [self._begins_pointer, kernels.scalar(launches[0].tensors)]
            arguments = [self._sums_pointer, *ranges, self._limit, kernels.pointer(factors)]
            self._finish = self._device.prepare(norm("clip_by_norms"), arguments)
        elif self._shared is None and len(launches) == 1 and counters is not None:
            own = launches[0].arguments.norm
            own["factors"], own["written"], own["stride"] = factors, self._device.address(counters), stride
            self._limit = own["limit"]
        else:
            arguments = [self._sums_pointer, self._count, self._limit, kernels.pointer(factors)]
            self._finish = self._device.prepare(norm("clip_by_global_norm"), arguments)

    def bind(self) -> None:
        """Make room for the partial sums of the gradients bound last."""
        shared = self._shared
        if shared is not None:
            if shared.bind([launch.sum_count for launch in self._launches]):
                self._sums_pointer[0], self._count[0] = self._device.address(shared.whole), shared.whole.size
                self._begins = self._device.array(np.array(shared.begins, np.int64).reshape(-1))
                self._begins_pointer[0] = self._device.address(self._begins)
            return
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

    def calls(self, limit: float | None) -> list[Call]:
        """The calls that enqueue the partial sums of squares, launch after launch and chunk after chunk.

        Args:
            limit: by which the factors that they enqueue too bound the norms; None where there are none.
        """
        if limit is not None:
            self._limit[0] = limit
        shared = self._shared
        calls, address = [], int(self._sums_pointer[0] if shared is None else self._device.address(shared.own))
        for launch in self._launches:
            calls += launch.square_sum_calls(address)
            address += 8 * launch.sum_count
        if shared is not None:
            calls += shared.calls()
        return calls if self._finish is None else [*calls, self._finish.call(self._norms)]

    def total(self, address: int) -> list[Call]:
        """The calls that enqueue the addition of the partial sums to the float64 number at `address`."""
        self._total[0] = address
        return [self._add.call(1)]


def norm_passes(launches: Sequence[Normed], rule: UpdateRule, exchange: Exchange | None) -> list[NormPass]:
    """The passes of a step: none, one for each launch for "each", else one."""
    if not rule.sums_squares:
        return []
    groups = [[launch] for launch in launches] if rule.norm == "each" else [launches]
    return [NormPass(group, rule, exchange) for group in groups]
