"""Sparse updates: the rows of an IndexedSlices sorted on the device, then one pass over the variable (sparse.cu)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices import Array
from gpu_adam.devices.base import PACK_BYTES
from gpu_adam.errors import ArgumentValueError
from gpu_adam.kernels import UpdateRule
from gpu_adam.step.arguments import UpdateArguments
from gpu_adam.step.gradients import as_array, check_shape, on_device
from gpu_adam.step.index_errors import IndexErrors, index_error
from gpu_adam.step.row_sort import RowSorter
from gpu_adam.uninterrupted import Call
from gpu_adam.variables import Variable

_INT32, _INT64 = np.dtype(np.int32), np.dtype(np.int64)


class SparseGroup:
    """One variable that gets a gradient for some of its rows: what can be said before slots exist.

    Args:
        variables: the variable, alone; at least one-dimensional.
        numbers: which pair of the step is its own, alone.
        rule: of the update.

    Raises:
        ArgumentValueError: a variable without rows.
    """

    def __init__(self, variables: Sequence[Variable], numbers: Sequence[int], rule: UpdateRule) -> None:
        self.variables, self.numbers, self.rule = list(variables), np.array(numbers, np.intp), rule
        (self.variable,), (self.number,) = self.variables, numbers
        if self.variable.ndim == 0:
            raise ArgumentValueError(
                f"gradient of variable {self.variable.name!r}",
                "must be dense for a variable without rows",
                "IndexedSlices",
                "pass an array",
            )
        self.device = self.variable.device
        self._dtype, self._shape = self.variable.dtype, self.variable.shape
        self.layout = rule.layout(self._dtype)

    def check(self, pairs: Sequence[Any], addresses: np.ndarray) -> SparseGradient:
        """The gradient of the group's pair, ready to bind.

        Args:
            pairs: all pairs of the step.
            addresses: unused; slices are looked at in every step, for their number may change.

        Raises:
            ArgumentTypeError, ArgumentValueError: values or indices of another shape, dtype or device.
            SparseIndexError: a row out of range, where that can be seen without waiting for the device.
        """
        gradient, variable, is_plain = pairs[self.number][0], self.variable, self.device.is_plain
        indices, values = gradient.indices, gradient.values
        if not (is_plain(indices, _INT64) or is_plain(indices, _INT32)) or indices.ndim != 1:
            indices = _as_indices(indices, variable)
        if not is_plain(values, self._dtype):
            values = as_array(values, variable, "IndexedSlices.values")
        rows = self._shape[0]
        if values.shape != (indices.shape[0], *self._shape[1:]):
            check_shape(values, (int(indices.shape[0]), *self._shape[1:]), variable, "IndexedSlices.values")
        if self.device.checks_indices and indices.size and not 0 <= indices.min() <= indices.max() < rows:
            position = int(np.argmax((indices < 0) | (indices >= rows)))
            raise index_error(variable, position, int(indices[position]))
        return SparseGradient(self, values, indices)


class SparseGradient:
    """A gradient that passed its checks: contiguous arrays on the variable's device."""

    __slots__ = ("_group", "indices", "values")

    may_be_remembered = False  # for the number of rows may change

    def __init__(self, group: SparseGroup, values: Array, indices: Array) -> None:
        self._group, self.values, self.indices = group, values, indices

    def reads(self) -> tuple[np.ndarray, np.ndarray]:
        """Addresses and sizes in bytes of the memory that the launches read for this gradient."""
        address, values, indices = self._group.device.address, self.values, self.indices
        addresses = np.array([address(values), address(indices)], np.uint64)
        return addresses, np.array([values.nbytes, indices.nbytes], np.uint64)

    def with_copy(self, pairs: Sequence[Any], index: int) -> SparseGradient:
        """The same gradient, its values (index 0) or indices (index 1) read from a copy. The pairs are not needed."""
        arrays = [self.values, self.indices]
        arrays[index] = self._group.device.array(arrays[index])
        return SparseGradient(self._group, *arrays)


class EmbeddingTable:
    """How a variable is cut into tiles, with the place of its slots (EmbeddingTable of sparse.cu).

    Args:
        group: the variable.
        slots: the array of each slot, alone in a list.

    Attributes:
        struct: the kernel argument.
        tiles: how many there are.
    """

    def __init__(self, group: SparseGroup, slots: Mapping[str, Sequence[Array]]) -> None:
        variable, device = group.variable, group.device
        rows = variable.shape[0]
        row_size = group.layout.parts * variable.size // rows if rows else 0
        tile = kernels.tile_size(group.layout.dtype)
        pieces = max(1, -(-row_size // tile))
        rows_per_tile = max(1, tile // max(1, row_size)) if pieces == 1 else 1
        if rows_per_tile > PACK_BYTES:
            rows_per_tile -= rows_per_tile % PACK_BYTES  # so that tiles of an aligned variable begin aligned
        self.tiles = pieces * -(-rows // rows_per_tile) if row_size else 0
        self.struct = np.zeros(1, kernels.EMBEDDING_TABLE)
        arrays = {"theta": variable.value, **{name: array for name, (array,) in slots.items()}}
        for name, array in arrays.items():
            self.struct["slots"][name] = device.address(array)
        numbers = {"rows": rows, "row_size": row_size, "rows_per_tile": rows_per_tile, "pieces": pieces}
        for name, number in {**numbers, "tiles": self.tiles}.items():
            self.struct[name] = number


class SparseLaunch:
    """The update of a group whose slots exist.

    Args:
        group: the variable.
        table: where it and its slots lie.
        errors: where rows out of range are noted.
    """

    tensors, chunk_ends = 1, None

    def __init__(self, group: SparseGroup, table: EmbeddingTable, errors: IndexErrors) -> None:
        self.group, self.table = group, table
        self.device, self.dtype = group.device, group.layout.dtype
        self._errors = errors
        self.arguments = arguments = UpdateArguments(group.layout)
        self._values, self._size = kernels.pointer(0), kernels.scalar(0)
        self._sorter = RowSorter(self.device, group.variable.shape[0], errors)
        sorter = self._sorter
        self._launch = self.device.prepare(
            kernels.sparse(self.dtype, group.rule),
            [
                *(table.struct, sorter.indices, sorter.keys, self._values),
                *(arguments.factors, arguments.scalars, arguments.staged, sorter.errors),
            ],
        )
        self._square_sums = None
        if group.rule.norm is not None:
            self._square_sums = self.device.prepare(
                kernels.norm(self.dtype, "square_sums_of"),
                [self._values, self._size, arguments.clip_value, arguments.sums],
            )
        self._gradient: SparseGradient | None = None

    def is_bound_to(self, gradient: SparseGradient) -> bool:
        """Never: slices are bound anew in every step."""
        return False

    def bind(self, gradient: SparseGradient) -> None:
        """Read this gradient from now on."""
        self._sorter.bind(gradient.indices)
        self._values[0] = self.device.address(gradient.values)
        self._size[0] = self.group.layout.parts * int(gradient.values.size)
        self._gradient = gradient

    def release(self) -> None:
        """Let go of the gradient."""
        self._gradient = None

    def calls(self) -> list[Call]:
        """The calls that enqueue the sort and the update, with the arguments' contents of that moment."""
        return [*self._sorter.calls(), self._launch.call(max(1, self.table.tiles))]

    def square_sum_calls(self, address: int) -> list[Call]:
        """The calls that enqueue the partial sums of squares, to the float64 array at `address`."""
        self.arguments.sums[0] = address
        assert self._square_sums is not None
        return [self._square_sums.call(self.sum_count)] if self._size[0] else []

    @property
    def sum_count(self) -> int:
        """How many partial sums the values have: one for each chunk."""
        return -(-int(self._size[0]) // kernels.CHUNK)

    def for_graph(self) -> SparseLaunch:
        """The same update for a captured graph, with keys, scalars and factors of its own."""
        launch = SparseLaunch(self.group, self.table, self._errors)
        launch._sorter.reserve(self.capacity)
        return launch

    @property
    def capacity(self) -> int:
        """How many rows there is memory for."""
        return self._sorter.capacity


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
