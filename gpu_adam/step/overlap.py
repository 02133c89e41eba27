"""Memory as intervals of addresses: which arrays overlap."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from gpu_adam.devices import Array, Device

_FEW = 8


def memory_of(device: Device, arrays: Sequence[Array]) -> np.ndarray:
    """[begin, end) of the memory of C-contiguous arrays of a device, in bytes: uint64 [n, 2]."""
    begins = device.addresses(arrays)
    return np.stack([begins, begins + np.array([array.nbytes for array in arrays], np.uint64)], axis=1)


def first_overlap(memory: np.ndarray) -> tuple[int, int, int] | None:
    """The first two of several intervals that overlap, and how many bytes they share; None where none do.

    Args:
        memory: [begin, end) of each, uint64 [n, 2]; empty ones overlap nothing.
    """
    numbers = np.flatnonzero(memory[:, 0] < memory[:, 1])
    numbers = numbers[np.argsort(memory[numbers, 0], kind="stable")]
    begins, ends = memory[numbers].T
    furthest = np.maximum.accumulate(ends)
    overlapping = np.flatnonzero(begins[1:] < furthest[:-1])
    if not overlapping.size:
        return None
    later = int(overlapping[0]) + 1
    earlier = int(np.flatnonzero(ends[:later] == furthest[later - 1])[0])
    shared = int(min(ends[earlier], ends[later]) - begins[later])
    return int(numbers[earlier]), int(numbers[later]), shared


class Intervals:
    """Intervals of addresses, sorted; empty ones are left out.

    Args:
        memory: [begin, end) of each, uint64 [n, 2]; they may overlap each other.
    """

    def __init__(self, memory: np.ndarray) -> None:
        filled = memory[memory[:, 0] < memory[:, 1]]
        table = filled[np.argsort(filled[:, 0], kind="stable")]
        self._begins = table[:, 0]
        # The furthest end of the first k intervals: one inside an earlier one must not hide it.
        self._furthest = np.concatenate([np.zeros(1, np.uint64), np.maximum.accumulate(table[:, 1])])
        self._as_lists: tuple[list[int], list[int]] = self._begins.tolist(), self._furthest.tolist()

    def overlapped(self, begins: np.ndarray, sizes: np.ndarray) -> Sequence[int] | None:
        """Indices of the intervals [begin, begin + size), as uint64, that share a byte with one of these, or None."""
        if len(begins) <= _FEW:
            return self._overlapped(begins.tolist(), sizes.tolist())
        # The last of these that begins before an interval ends: does any up to it reach into the interval?
        last = self._begins.searchsorted(begins + sizes)
        shared = self._furthest[last] > begins
        # Empty intervals lie nowhere. Asked for last: hardly any step has an overlap at all.
        return np.flatnonzero(shared & (sizes > 0)).tolist() if shared.any() else None

    def _overlapped(self, begins: list[int], sizes: list[int]) -> list[int] | None:
        """The same for few intervals, without NumPy, whose calls take longer than the work then."""
        own, furthest = self._as_lists
        found = [
            index
            for index, (begin, size) in enumerate(zip(begins, sizes, strict=True))
            if size and furthest[bisect_left(own, begin + size)] > begin
        ]
        return found or None
