"""Sparse updates: IndexedSlices to sorted rows on the device, then one pass over the variable (sort.cu, sparse.cu)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices import Array, Device
from gpu_adam.devices.base import PACK_BYTES
from gpu_adam.errors import ArgumentValueError, SparseIndexError
from gpu_adam.gradients import as_array, check_shape, on_device
from gpu_adam.memory import Interval, memory_of
from gpu_adam.slots import Slots, slot_names
from gpu_adam.variables import Variable


class BoundSlices(NamedTuple):
    """A sparse gradient that passed its checks: contiguous arrays on the variable's device."""

    values: Array
    indices: Array


class SparseUpdate:
    """The update of one variable by gradients for some of its rows.

    Args:
        variable: at least one-dimensional.
        errors: device array of one kernels.INDEX_ERRORS, where rows out of range are noted.
        complex_mode: one of kernels.COMPLEX_MODES.
        amsgrad: whether the update is AMSGrad's.
        clip: whether gradients are clipped.
    """

    tensors = 1

    def __init__(
        self, variable: Variable, errors: IndexErrors, *, complex_mode: str, amsgrad: bool, clip: bool
    ) -> None:
        if variable.ndim == 0:
            raise ArgumentValueError(
                f"gradient of variable {variable.name!r}",
                "must be dense for a variable without rows",
                "IndexedSlices",
                "pass an array",
            )
        self.variables = [variable]
        self.device = variable.device
        self.dtype, self._parts = kernels.layout(variable.dtype, complex_mode)
        self._rows, self._row_shape = variable.shape[0], variable.shape[1:]
        self._errors = errors
        self._amsgrad, self._clip = amsgrad, clip
        self._captured: list[BoundSlices] = []

    def check(self, gradients: Sequence[Any]) -> BoundSlices:
        """The one gradient's arrays.

        Raises:
            ArgumentTypeError, ArgumentValueError: values or indices of another shape, dtype or device.
            SparseIndexError: a row out of range, where that can be seen without waiting for the device.
        """
        (gradient,), (variable,) = gradients, self.variables
        indices = _as_indices(gradient.indices, variable)
        values = as_array(gradient.values, variable, "IndexedSlices.values")
        check_shape(values, (int(indices.shape[0]), *self._row_shape), variable, "IndexedSlices.values")
        if self.device.checks_indices and indices.size and not 0 <= indices.min() <= indices.max() < self._rows:
            position = int(np.argmax((indices < 0) | (indices >= self._rows)))
            raise index_error(variable, position, int(indices[position]))
        return BoundSlices(values, indices)

    def allocate(self, slots: Slots) -> None:
        """Cut the variable into tiles, once its slots exist."""
        (variable,), device = self.variables, self.device
        arrays = [variable, *(slots.get(variable, name) for name in slot_names(self._amsgrad))]
        addresses = [device.address(array.value) for array in arrays]
        row_size = self._parts * variable.size // self._rows if self._rows else 0
        tile = kernels.tile_size(self.dtype)
        pieces = max(1, -(-row_size // tile))
        rows_per_tile = max(1, tile // max(1, row_size)) if pieces == 1 else 1
        if rows_per_tile > PACK_BYTES:
            rows_per_tile -= rows_per_tile % PACK_BYTES  # so that tiles of an aligned variable begin aligned
        self._tiles = pieces * -(-self._rows // rows_per_tile) if row_size else 0
        table = kernels.struct(
            kernels.TABLE,
            *addresses,
            *([0] * (4 - len(addresses))),
            self._rows,
            row_size,
            rows_per_tile,
            pieces,
            self._tiles,
        )
        real_dtype = kernels.DTYPES[self.dtype].real_dtype
        self._values, self._factors = kernels.pointer(0), kernels.pointer(0)
        self._sorter = RowSorter(device, self._rows, self._errors)
        self._step = np.zeros(1, kernels.step_dtype(real_dtype))
        self._launch = device.prepare(
            kernels.sparse(self.dtype, amsgrad=self._amsgrad, clip=self._clip),
            [
                table,
                self._sorter.indices,
                self._sorter.keys,
                self._values,
                self._factors,
                self._step,
                self._sorter.errors,
            ],
        )
        if self._clip:
            self._clip_value, self._sums = np.zeros(1, real_dtype), kernels.pointer(0)
            self._size = kernels.scalar(0)
            self._square_sums = device.prepare(
                kernels.norm(self.dtype, "square_sums_of"), [self._values, self._size, self._clip_value, self._sums]
            )

    def written(self, slots: Slots) -> list[Interval]:
        """The memory that the launch writes."""
        (variable,) = self.variables
        arrays = (variable, *(slots.get(variable, name) for name in slot_names(self._amsgrad)))
        return [memory_of(self.device, array.value) for array in arrays]

    def read(self, bound: BoundSlices) -> tuple[np.ndarray, np.ndarray]:
        """Addresses and sizes in bytes of the memory that the launches read for this gradient."""
        addresses = [self.device.address(array) for array in bound]
        return np.array(addresses, np.uint64), np.array([array.nbytes for array in bound], np.uint64)

    def copied(self, bound: BoundSlices, index: int) -> BoundSlices:
        """The same gradient, its values (index 0) or indices (1) read from a copy."""
        copies = [self.device.array(array) if i == index else array for i, array in enumerate(bound)]
        return BoundSlices(*copies)

    def bind(self, bound: BoundSlices) -> bool:
        """Use this gradient from now on. Returns False: slices are looked at anew in every step."""
        self._bound = bound
        self._values[0] = self.device.address(bound.values)
        self._sorter.bind(bound.indices)
        return False

    def enqueue(self, step: tuple[Any, ...]) -> None:
        """Enqueue the sort and the update with the scalars of a step."""
        self._step[0] = step
        self._sorter.enqueue()
        self._launch(max(1, self._tiles))

    def begin_capture(self) -> None:
        """Keep the gradient: a graph reads it at every replay, and copies it to there where that was needed."""
        self._captured.append(self._bound)

    def end_capture(self) -> None:
        """Nothing to go back to: addresses are passed by value."""

    # Norm of the values, for gradients.NormClipping.

    def sum_count(self) -> int:
        """One partial sum per chunk of the values."""
        return -(-self._parts * int(self._bound.values.size) // kernels.CHUNK)

    def square_sums(self, address: int, clip_value: float) -> None:
        """Enqueue the partial sums of squares to the float64 array at `address`."""
        self._sums[0], self._clip_value[0] = address, clip_value
        self._size[0] = self._parts * self._bound.values.size
        if self._size[0]:
            self._square_sums(self.sum_count())

    def ends(self) -> None:
        """A single tensor needs none."""

    def set_factors(self, address: int, stride: int) -> None:
        """Let the update read its clip factor there."""
        self._factors[0] = address


class RowSorter:
    """Row numbers in ascending order with their positions, on the device (sort.cu).

    Args:
        device: where.
        rows: valid indices are [0, rows).
        errors: where others are noted.

    Attributes:
        indices, keys, errors: the structs that sparse.cu takes.
    """

    def __init__(self, device: Device, rows: int, errors: IndexErrors) -> None:
        self._device, self._rows, self._capacity = device, rows, -1
        self._passes = max(1, -(-rows.bit_length() // 4))  # the key `rows` stands for what is out of range
        self.indices = kernels.struct(kernels.INDICES, 0, 0, 0, rows)
        self.keys = kernels.struct(kernels.KEYS, 0, 0)
        self._a, self._b = kernels.struct(kernels.KEYS, 0, 0), kernels.struct(kernels.KEYS, 0, 0)
        self._buffers: list[Array] = []  # outgrown ones too: a captured graph may hold them
        self._by_runs: list[_SortByRuns] = []
        self._error_array = errors.array
        self.errors = kernels.pointer(device.address(errors.array))
        self._sort_rows = device.prepare(
            kernels.sort("sort_rows"), [self.indices, self._a, self._b, kernels.scalar(self._passes), self.errors]
        )

    def bind(self, indices: Array) -> None:
        """Sort these indices from now on."""
        count = int(indices.size)
        if count > self._capacity:
            self._allocate(max(count, 2 * self._capacity))
        self.indices[0] = (self._device.address(indices), indices.dtype.itemsize == 8, count, self._rows)

    def _allocate(self, capacity: int) -> None:
        self._capacity = capacity
        self._buffers += [self._device.empty(max(1, capacity), np.dtype(np.int64)) for _ in range(4)]
        addresses = [self._device.address(buffer) for buffer in self._buffers[-4:]]
        self._a[0], self._b[0] = tuple(addresses[:2]), tuple(addresses[2:])
        self.keys[0] = (self._a if self._passes % 2 == 0 else self._b)[0]
        if capacity > kernels.SORT_RUN:
            sort = _SortByRuns(self._device, self.indices, (self._a, self._b), capacity, self._passes, self.errors)
            self._by_runs.append(sort)

    def enqueue(self) -> None:
        """Enqueue the sort."""
        count = int(self.indices["count"][0])
        if count > kernels.SORT_RUN:
            self._by_runs[-1].enqueue(count)
        elif count:
            self._sort_rows(1)


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

    def enqueue(self, count: int) -> None:
        runs = -(-count // kernels.SORT_RUN)
        self._count[0], self._size[0] = count, 16 * runs
        self._keys(runs)
        for count_digits, scatter in self._passes:
            count_digits(runs)
            self._scan(1)
            scatter(runs)


class IndexErrors:
    """The note that the kernels make of rows out of range of one variable."""

    def __init__(self, variable: Variable) -> None:
        self._variable, self._device = variable, variable.device
        self.array = self._device.array(np.atleast_1d(kernels.NO_INDEX_ERRORS).view(np.uint8))

    def check(self) -> None:
        """Raise SparseIndexError if an index was out of range since the last check. Waits for the device."""
        found = self._device.numpy(self.array).view(kernels.INDEX_ERRORS)[0]
        if found["count"]:
            with self._device.current():
                self.array[...] = self._device.array(np.atleast_1d(kernels.NO_INDEX_ERRORS).view(np.uint8))
            others = int(found["count"]) - 1
            raise index_error(self._variable, int(found["first_position"]), int(found["first_index"]), others)


def index_error(variable: Variable, position: int, index: int, others: int = 0) -> SparseIndexError:
    """The error for a row out of range."""
    and_others = f" and {others} more" if others else ""
    return SparseIndexError(
        f"IndexedSlices.indices[{position}] of variable {variable.name!r}",
        f"must lie in [0, {variable.shape[0]})",
        f"{index}{and_others}",
        "check the indices; on a CUDA device such rows were left out of the update",
    )


def _as_indices(indices: Any, variable: Variable) -> Array:
    """`indices` as a contiguous one-dimensional int32 or int64 array on the variable's device."""
    argument = f"IndexedSlices.indices of variable {variable.name!r}"
    empty = isinstance(indices, (list, tuple)) and not indices
    array = on_device(indices, variable.device, argument, np.dtype(np.int64) if empty else None)
    if array.dtype not in (np.int32, np.int64):
        raise ArgumentValueError(argument, "must have dtype int32 or int64", array.dtype, "cast them with astype")
    if array.ndim != 1:
        raise ArgumentValueError(argument, "must be one-dimensional", f"shape {tuple(array.shape)}", "ravel them")
    return array
