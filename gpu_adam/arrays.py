"""What is done to arrays of NumPy and of CuPy alike, by the module that they belong to.

Sums into elements that an index may name several times have the same order on every device: each element gets its
contributions one after the other, in order of occurrence in the index, as `numpy.add.at` adds them.  CuPy's `add.at`
adds atomically, in an order that differs from run to run, and takes no complex numbers.
"""

import functools
import math
import sys
from typing import Any

import numpy as np

# One thread for each number of the first contribution to a target; the other contributions follow in sorted order.
_SUM_RUNS = """
    const long long place = i / width, column = i % width, target = targets[place];
    if (place == 0 || targets[place - 1] != target) {
        T sum = total[target * width + column];
        for (long long next = place; next < count && targets[next] == target; ++next) {
            sum += values[order[next] * width + column];
        }
        total[target * width + column] = sum;
    }
"""

_TAKE_ROWS = """
    const long long row = rows[i / width];
    out = row >= 0 && row < count ? array[row * width + i % width] : outside;
"""


def namespace(array: Any) -> Any:
    """The module whose functions make and take such arrays: numpy, cupy."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules[type(array).__module__.partition(".")[0]]


def add_at(total: Any, key: Any, values: Any) -> None:
    """Add to elements of an array, in place.

    Args:
        total: the array.
        key: which elements, as an index in brackets with integer arrays in it; repeated ones add up.
        values: what to add, of the shape and dtype of `total[key]`.
    """
    module = namespace(total)
    if not hasattr(module, "ElementwiseKernel"):
        module.add.at(total, key, values)
        return
    if not values.size:
        return
    # The key is resolved by indexing the elements' numbers with it, so that it means here what it meant to the loss.
    # Axes after those that it names are taken whole.
    axes = _named_axes(key, total.ndim)
    size, width = math.prod(total.shape[:axes]), math.prod(total.shape[axes:])
    numbers = np.arange(size, dtype=np.int32 if size < 2**31 else np.int64, like=total)
    targets = numbers.reshape(total.shape[:axes])[key].reshape(-1)
    order = np.argsort(targets)  # CuPy's sort is stable: equal targets stay in order of occurrence
    _sum_runs(module)(targets[order], order, values, targets.size, width, total, size=targets.size * width)


def gather(array: Any, rows: Any) -> Any:
    """The rows of an array at some numbers, [*rows.shape, *row], as an array of their own.

    Args:
        array: [count, *row], C-contiguous.
        rows: int32 or int64 numbers of any shape, C-contiguous.  Those of NumPy must lie in [0, count).  CuPy's own
            indexing takes others modulo the count; here they give NaN, or 0 in an array of whole numbers.
    """
    module = namespace(array)
    if not hasattr(module, "ElementwiseKernel"):
        return array.take(rows, axis=0)
    out = module.empty((*rows.shape, *array.shape[1:]), array.dtype)
    if out.size:
        outside = array.dtype.type(0 if array.dtype.kind in "biu" else np.nan)
        _take_rows(module)(array, rows, array.shape[0], math.prod(array.shape[1:]), outside, out)
    return out


def _named_axes(key: Any, ndim: int) -> int:
    """How many leading axes an index names."""
    parts = key if type(key) is tuple else (key,)
    if any(part is Ellipsis for part in parts):
        return ndim
    counts = [int(part.ndim) if getattr(part, "dtype", None) == np.bool_ else int(part is not None) for part in parts]
    return sum(counts)


@functools.cache
def _sum_runs(module: Any) -> Any:
    arguments = "raw I targets, raw J order, raw T values, int64 count, int64 width"
    return module.ElementwiseKernel(arguments, "raw T total", _SUM_RUNS, "gpu_adam_sum_runs")


@functools.cache
def _take_rows(module: Any) -> Any:
    arguments = "raw T array, raw I rows, int64 count, int64 width, T outside"
    return module.ElementwiseKernel(arguments, "T out", _TAKE_ROWS, "gpu_adam_take_rows")
