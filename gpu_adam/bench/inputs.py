"""Values of variables and gradients: the same for every candidate, random, none of them zero, quick to make."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from gpu_adam.bench.workloads import Workload
from gpu_adam.kernels import dtype_named

_BLOCK = 2**20
_ZIPF = 1.1


class Inputs:
    """One set of a workload's variables and gradients, made anew at every call, in host memory.

    Args:
        workload: what to make.
        number: of the set; another number, other values.
    """

    def __init__(self, workload: Workload, number: int) -> None:
        self.workload, self.number = workload, number
        self.shapes = workload.shapes()
        self.dtype = dtype_named(workload.dtype)

    def theta(self, k: int) -> np.ndarray:
        """First value of variable `k`."""
        return self._values(self.shapes[k], 2 * k)

    def gradient(self, k: int) -> np.ndarray:
        """Dense gradient of variable `k`."""
        return self._values(self.shapes[k], 2 * k + 1)

    def indices(self, k: int) -> np.ndarray:
        """Rows that the sparse gradient of variable `k` names: int64."""
        rows, count = self.shapes[k][0], self.workload.indices
        rng = np.random.default_rng([self.number, k])
        if not self.workload.zipf:
            return rng.integers(0, rows, count)
        # Rank r has weight r ** -1.1; which row has which rank is random, as categories have no order.
        ranks = np.minimum(rng.zipf(_ZIPF, count), rows) - 1
        return (ranks * _stride(rows) + int(rng.integers(rows))) % rows

    def values(self, k: int) -> np.ndarray:
        """Values of the sparse gradient of variable `k`."""
        return self._values((self.workload.indices, *self.shapes[k][1:]), 2 * k + 1)

    def _values(self, shape: tuple[int, ...], seed: int) -> np.ndarray:
        size = int(np.prod(shape))
        block = _random_block(self.dtype.name)
        start = (seed * 7919 + self.number * 104729) % _BLOCK
        whole, rest = divmod(start + size, _BLOCK)
        pieces = [block[start:], *[block] * (whole - 1), block[:rest]] if whole else [block[start:rest]]
        return np.concatenate(pieces).reshape(shape)


@functools.cache
def _random_block(dtype: str) -> np.ndarray:
    """Random numbers with magnitudes in [0.1, 1.1] and random signs, or phases."""
    kind = dtype_named(dtype)
    rng = np.random.default_rng(0)
    magnitude = rng.random(_BLOCK) + 0.1
    if kind.kind == "c":
        phase = np.exp(2j * np.pi * rng.random(_BLOCK))
        values: Any = magnitude * phase
    else:
        values = magnitude * rng.choice([-1.0, 1.0], _BLOCK)
    return np.asarray(values).astype(kind)


def _stride(rows: int) -> int:
    """A number without a common divisor with `rows`: multiples of it visit every row once."""
    stride = max(1, int(rows * 0.618))
    while np.gcd(stride, rows) != 1:
        stride += 1
    return stride
