"""Row numbers in ascending order with their positions, on the device (sort.cu)."""

from __future__ import annotations

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices import Array, Device
from gpu_adam.step.index_errors import IndexErrors
from gpu_adam.uninterrupted import Call


class RowSorter:
    """The sort of one variable's row numbers, of as many as a step brings.

    Args:
        device: where.
        rows: valid indices are [0, rows).
        errors: where others are noted.

    Attributes:
        indices, keys, errors: the kernel arguments that sparse.cu takes.
    """

    def __init__(self, device: Device, rows: int, errors: IndexErrors) -> None:
        self._device, self._rows = device, rows
        self._passes = max(1, -(-rows.bit_length() // 4))  # the key `rows` stands for what is out of range
        self.indices = kernels.struct(kernels.INDICES, 0, 0, 0, rows)
        self.keys = kernels.struct(kernels.KEYS, 0, 0)
        self.errors = kernels.pointer(device.address(errors.array))
        self._error_array = errors.array
        # The keys wander between two pairs of arrays, one pass after the other.
        self._one, self._other = kernels.struct(kernels.KEYS, 0, 0), kernels.struct(kernels.KEYS, 0, 0)
        self._memory = self._memory_for(0)
        self._written: _Memory | None = None  # whose addresses the kernel arguments are
        self._count = 0
        self._sort_rows = device.prepare(
            kernels.sort("sort_rows"), [self.indices, self._one, self._other, kernels.scalar(self._passes), self.errors]
        )

    def bind(self, indices: Array) -> None:
        """Sort these indices from now on."""
        count = int(indices.size)
        if count > self._memory.capacity:
            self.reserve(max(count, 2 * self._memory.capacity))
        memory = self._memory  # a larger one takes the old one's place as a whole, and its addresses are written after
        if memory is not self._written:
            self._one[0], self._other[0] = memory.one, memory.other
            self.keys[0] = memory.one if self._passes % 2 == 0 else memory.other
            self._written = memory
        self._count = count
        self.indices[0] = (self._device.address(indices), indices.dtype.itemsize == 8, count, self._rows)

    @property
    def capacity(self) -> int:
        """How many indices there is memory for."""
        return self._memory.capacity

    def reserve(self, capacity: int) -> None:
        """Have memory for exactly so many indices."""
        self._memory = self._memory_for(capacity)

    def _memory_for(self, capacity: int) -> _Memory:
        by_runs, buffers = None, (self._one, self._other)
        if capacity > kernels.SORT_RUN:
            by_runs = _SortByRuns(self._device, self.indices, buffers, capacity, self._passes, self.errors)
        return _Memory(self._device, capacity, by_runs)

    def calls(self) -> list[Call]:
        """The calls that enqueue the sort."""
        count = self._count
        if count > kernels.SORT_RUN:
            assert self._memory.by_runs is not None
            return self._memory.by_runs.calls(count)
        return [self._sort_rows.call(1)] if count else []


class _Memory:
    """Two pairs of arrays of row numbers and positions, and the sort of more of them than one block takes."""

    def __init__(self, device: Device, capacity: int, by_runs: _SortByRuns | None) -> None:
        self.capacity, self.by_runs = capacity, by_runs
        self._arrays = [device.empty(capacity, np.dtype(np.int64)) for _ in range(4)] if capacity else []
        addresses = [device.address(array) for array in self._arrays] or [0] * 4
        self.one, self.other = tuple(addresses[:2]), tuple(addresses[2:])


class _SortByRuns:
    """The sort of more indices than one block takes: three launches for each 4 bits of the row number."""

    def __init__(
        self,
        device: Device,
        indices: np.ndarray,
        buffers: tuple[np.ndarray, np.ndarray],
        capacity: int,
        passes: int,
        errors: np.ndarray,
    ) -> None:
        self._starts = device.empty(16 * -(-capacity // kernels.SORT_RUN), np.dtype(np.int64))
        self._count, self._size = kernels.scalar(0), kernels.scalar(0)
        starts = kernels.pointer(device.address(self._starts))
        self._keys = device.prepare(kernels.sort("sort_keys"), [indices, buffers[0], errors])
        self._scan = device.prepare(kernels.sort("sort_scan"), [starts, self._size])
        self._passes = []
        for number in range(passes):
            source, target = buffers[number % 2], buffers[1 - number % 2]
            shift = kernels.scalar(4 * number)
            count = device.prepare(kernels.sort("sort_count"), [source, self._count, shift, starts])
            scatter = device.prepare(kernels.sort("sort_scatter"), [source, target, self._count, shift, starts])
            self._passes.append((count, scatter))

    def calls(self, count: int) -> list[Call]:
        """The calls that enqueue the sort of so many indices."""
        runs = -(-count // kernels.SORT_RUN)
        self._count[0], self._size[0] = count, 16 * runs
        calls = [self._keys.call(runs)]
        for count_digits, scatter in self._passes:
            calls += [count_digits.call(runs), self._scan.call(1), scatter.call(runs)]
        return calls
