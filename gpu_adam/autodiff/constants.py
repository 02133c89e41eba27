"""Constants of a loss: what a rule reads in the backward pass must be what the loss was computed with.

NumPy and CuPy do not count the writes to an array, as torch does.  So that a buffer which the loss fills again is not
read with its later contents, a constant that a rule reads later is

    unchangeable    a number, an array of which no writeable view exists, the memory of a `Variable` on the host
    copied          an array up to a size whose copy costs no more than the operation that it enters
    watched         a larger one: it stays where it is, and its fingerprint is taken at each use and at the end

A changed watched array is an error.  Copies add 3 % to `profiling/autodiff.py`.  To sum((w * x - y)**2) of 64 MB copies
add 8 % and fingerprints 10 %; to a product of such a matrix and a vector, which does little else than to read it, 50 %
and 110 %.  But copies of all constants would double the memory of a loss over a large data set.  A large array that a
`Variable` holds on the host is neither copied nor watched.
"""

from typing import Any, NamedTuple

import numpy as np

from gpu_adam.autodiff.lines import Line
from gpu_adam.autodiff.sparse_matrices import is_sparse, with_kept_arrays
from gpu_adam.errors import ArgumentValueError

COPIED_BYTES = 2**22
"""Largest array in host memory that is copied: it fits into a processor's cache."""

COPIED_DEVICE_BYTES = 2**28
"""Largest array on a device that is copied: to compare fingerprints is to wait for the device."""

# Words in a row of a fingerprint; a prime, so that rows of the data are not rows of the fingerprint.
_COLUMNS = 1021


class _Watched(NamedTuple):
    """A large constant: the array, its fingerprint when it was used, and where that was."""

    array: Any
    fingerprint: tuple[Any, ...]
    line: Line


class Constants:
    """The constants of one loss."""

    def __init__(self) -> None:
        self._unwritten: dict[int, Any] = {}
        self._watched: dict[int, _Watched] = {}

    def of_variable(self, array: Any) -> Any:
        """The array of a variable without gradient, as the loss gets it; on the host it cannot be written to."""
        if not isinstance(array, np.ndarray):
            return array
        owner = _owner(array)
        self._unwritten[id(owner)] = owner
        return shown(array)

    def kept(self, value: Any, operation: Any) -> Any:
        """What to read in the backward pass in place of an argument of an operation.

        Raises:
            ArgumentValueError: a large array has changed since its last use.
        """
        if type(value) is np.ndarray:
            return value.copy("K") if value.nbytes <= COPIED_BYTES else self._kept_large(value, operation)
        if type(value) in (list, tuple):  # of index arrays
            return type(value)([self.kept(item, operation) for item in value])
        if is_sparse(value):
            return with_kept_arrays(value, lambda array: self.kept(array, operation))
        if isinstance(value, np.generic) or not hasattr(value, "__array_function__"):
            return value
        if isinstance(value, np.ndarray):  # a memory map
            return self._kept_large(value, operation)
        is_small = value.size * value.dtype.itemsize <= COPIED_DEVICE_BYTES
        return value.copy() if is_small else self._kept_large(value, operation)

    def _kept_large(self, array: Any, operation: Any) -> Any:
        if isinstance(array, np.ndarray) and (_is_unwriteable(array) or id(_owner(array)) in self._unwritten):
            return array
        if not (array.flags.c_contiguous or array.flags.f_contiguous):
            repeated = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)
            return np.broadcast_to(array[repeated].copy(), array.shape)
        found, known = _fingerprint(array), self._watched.get(id(array))
        if known is not None:
            _compare(known, found)
        self._watched[id(array)] = _Watched(array, found, Line.of_caller(operation))
        return array

    def check(self) -> None:
        """ArgumentValueError if a constant is not what it was when it was used."""
        for known in self._watched.values():
            _compare(known, _fingerprint(known.array))

    def clear(self) -> None:
        """Let go of all arrays."""
        self._unwritten.clear()
        self._watched.clear()


def shown(array: Any) -> Any:
    """An array that a loss may look at, but through which it cannot write: a view on the host, else a copy."""
    if isinstance(array, np.ndarray):
        view = array.view()
        view.flags.writeable = False
        return view
    return array if isinstance(array, np.generic) else array.copy()


def _owner(array: np.ndarray) -> Any:
    return array if array.base is None else array.base


def _is_unwriteable(array: np.ndarray) -> bool:
    """Whether no NumPy array can write to this memory; a read-only view of a writeable one does not count."""
    return not array.flags.writeable and not isinstance(array.base, np.ndarray)


def _fingerprint(array: Any) -> tuple[Any, ...]:
    """Sums of the bits, along rows and along columns: what changes one of them, or their order, changes the sums."""
    flat = (array if array.flags.c_contiguous else array.T).reshape(-1).view(np.uint8)
    size = flat.size - flat.size % (8 * _COLUMNS)
    words = flat[:size].view(np.uint64).reshape(-1, _COLUMNS)
    return words.sum(axis=0), words.sum(axis=1), flat[size:].copy()


def _compare(known: _Watched, found: tuple[Any, ...]) -> None:
    if not all(bool((before == now).all()) for before, now in zip(known.fingerprint, found, strict=True)):
        raise ArgumentValueError(
            "an array of the loss",
            "must not change between its use and the end of the differentiation, which reads it again",
            f"new contents after its use {known.line}",
            "use a copy, or make a new array where the old one is filled again",
        )
