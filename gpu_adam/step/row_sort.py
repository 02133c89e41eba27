"""Row numbers in ascending order with their positions, on the device (sort.cu)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices import Array, Device
from gpu_adam.step.index_errors import IndexErrors
from gpu_adam.uninterrupted import Call

_DIGITS = 2**kernels.DIGIT_BITS


class RowSorter:
    """The sort of one variable's row numbers, of as many as a step brings.

    Args:
        device: where.
        rows: valid indices are [0, rows).
        errors: where others are noted.

    Attributes:
        indices, keys, errors: the kernel arguments that sparse.cu takes.
        count: how many indices were bound last.
    """

    def __init__(self, device: Device, rows: int, errors: IndexErrors) -> None:
        self._device, self._rows = device, rows
        # The key `rows` stands for what is out of range.
        self._passes = max(1, -(-rows.bit_length() // kernels.DIGIT_BITS))
        self.indices = kernels.struct(kernels.INDICES, 0, 0, 0, rows)
        self.keys = kernels.struct(kernels.KEYS, 0, 0)
        self.errors = kernels.pointer(device.address(errors.array))
        self._error_array = errors.array
        self._memory = self._memory_for(0)
        self._written: _Memory | None = None  # whose addresses the kernel arguments are
        self.count = 0
        self._sort_rows = device.prepare(
            kernels.sort("sort_rows"), [self.indices, self.keys, kernels.scalar(self._passes), self.errors]
        )

    def bind(self, indices: Array) -> None:
        """Sort these indices from now on."""
        count = int(indices.size)
        if count > self._memory.keys.capacity:
            self.reserve(max(count, 2 * self._memory.keys.capacity))
        memory = self._memory  # a larger one takes the old one's place as a whole, and its addresses are written after
        if memory is not self._written:
            self.keys[0] = memory.keys.addresses
            self._written = memory
        self.count = count
        self.indices[0] = (self._device.address(indices), indices.dtype.itemsize == 8, count, self._rows)

    @property
    def capacity(self) -> int:
        """How many indices there is memory for."""
        return self._memory.keys.capacity

    def reserve(self, capacity: int) -> None:
        """Have memory for exactly so many indices."""
        self._memory = self._memory_for(capacity)

    def _fits_a_block(self, count: int) -> bool:
        return count <= kernels.SORT_RUN and self._rows < kernels.SORT_ROWS

    def _memory_for(self, capacity: int) -> _Memory:
        by_runs = None
        if not self._fits_a_block(capacity):
            by_runs = _SortByRuns(self._device, self.indices, self.keys, capacity, self._passes, self.errors)
        return _Memory(_Keys(self._device, capacity), by_runs)

    def calls(self) -> list[Call]:
        """The calls that enqueue the sort."""
        count = self.count
        if not self._fits_a_block(count):
            assert self._memory.by_runs is not None
            return self._memory.by_runs.calls(count)
        return [self._sort_rows.call(1)] if count else []


class _Keys:
    """Arrays of row numbers and of positions, so many of each."""

    def __init__(self, device: Device, capacity: int) -> None:
        self.capacity = capacity
        self._arrays = [device.empty(capacity, np.dtype(np.int64)) for _ in range(2)]
        self.addresses = tuple(map(device.address, self._arrays)) if capacity else (0, 0)


class _Memory(NamedTuple):
    """Where the sorted keys go, and the sort of more of them than one block takes."""

    keys: _Keys
    by_runs: _SortByRuns | None


class _SortByRuns:
    """The sort of more indices than one block takes: three launches for each digit of the row number.

    The keys wander between two pairs of arrays, one pass after the other; the last pass ends where they are wanted.
    """

    def __init__(
        self,
        device: Device,
        indices: np.ndarray,
        keys: np.ndarray,
        capacity: int,
        passes: int,
        errors: np.ndarray,
    ) -> None:
        runs = -(-capacity // kernels.SORT_RUN)
        self._starts = device.empty(_DIGITS * (runs + 1), np.dtype(np.int64))  # of each run, and of all
        self._others = _Keys(device, capacity)
        others = kernels.struct(kernels.KEYS, *self._others.addresses)
        self._count, self._runs = kernels.scalar(0), kernels.scalar(0)
        starts = kernels.pointer(device.address(self._starts))
        source, target = (others, keys) if passes % 2 else (keys, others)
        self._keys = device.prepare(kernels.sort("sort_keys"), [indices, source, errors])
        self._scan = device.prepare(kernels.sort("sort_scan"), [starts, self._runs])
        self._passes = []
        for number in range(passes):
            shift = kernels.scalar(kernels.DIGIT_BITS * number)
            count = device.prepare(kernels.sort("sort_count"), [source, self._count, shift, starts])
            scatter = device.prepare(kernels.sort("sort_scatter"), [source, target, self._count, shift, starts])
            self._passes.append((count, scatter))
            source, target = target, source

    def calls(self, count: int) -> list[Call]:
        """The calls that enqueue the sort of so many indices."""
        runs = -(-count // kernels.SORT_RUN)
        self._count[0], self._runs[0] = count, runs
        calls = [self._keys.call(runs)]
        for count_digits, scatter in self._passes:
            calls += [count_digits.call(runs), self._scan.call(_DIGITS), scatter.call(runs)]
        return calls
