"""Memory as intervals of addresses: which arrays overlap."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from gpu_adam.devices import Array, Device

Interval = tuple[int, int]


def memory_of(device: Device, array: Array) -> Interval:
    """[begin, end) of a C-contiguous array's memory, in bytes; (0, 0) where it has no elements."""
    if not array.nbytes:
        return 0, 0
    begin = device.address(array)
    return begin, begin + int(array.nbytes)


class Intervals:
    """Intervals of addresses, sorted; empty ones are left out.

    Args:
        intervals: [begin, end) pairs, which may overlap each other.
    """

    def __init__(self, intervals: Iterable[Interval]) -> None:
        table = np.array(sorted(i for i in intervals if i[0] < i[1]), np.uint64).reshape(-1, 2)
        self._begins = table[:, 0]
        # The furthest end so far: an interval inside an earlier one must not hide it.
        self._ends = np.maximum.accumulate(table[:, 1]) if len(table) else table[:, 1]

    def overlapped(self, intervals: Iterable[Interval]) -> np.ndarray:
        """Indices of those `intervals` that share a byte with one of these."""
        table = np.array(list(intervals), np.uint64).reshape(-1, 2)
        # The last of these that begins before an interval ends: does any up to it reach into the interval?
        last = np.searchsorted(self._begins, table[:, 1], side="left") - 1
        reaches = np.zeros(len(table), bool)
        inside = last >= 0
        reaches[inside] = self._ends[last[inside]] > table[inside, 0]
        return np.flatnonzero(reaches & (table[:, 0] < table[:, 1]))
