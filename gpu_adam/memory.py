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
        # The furthest end of the first k intervals: one inside an earlier one must not hide it.
        self._furthest = np.concatenate([np.zeros(1, np.uint64), np.maximum.accumulate(table[:, 1])])

    def overlapped(self, begins: np.ndarray, sizes: np.ndarray) -> np.ndarray | None:
        """Indices of the intervals [begin, begin + size), as uint64, that share a byte with one of these, or None."""
        # The last of these that begins before an interval ends: does any up to it reach into the interval?
        last = self._begins.searchsorted(begins + sizes)
        shared = self._furthest[last] > begins
        # Empty intervals lie nowhere. Asked for last: hardly any step has an overlap at all.
        return np.flatnonzero(shared & (sizes > 0)) if shared.any() else None
