"""Sparse updates: the rows of an IndexedSlices sorted on the device, then one pass over the variable (sparse.cu).

A deferred update (deferred.py) has another table, and with it another kernel for that pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices import Array
from gpu_adam.devices.base import PACK_BYTES, Launch, StagedArray
from gpu_adam.step.arguments import EAGER, UpdateArguments, Use
from gpu_adam.step.groups import SparseGradient, SparseGroup
from gpu_adam.step.index_errors import IndexErrors
from gpu_adam.step.norms import norm_counters
from gpu_adam.step.row_sort import RowSorter
from gpu_adam.uninterrupted import Call


class Table(Protocol):
    """Where a variable and its slots lie, and the kernel that updates them by sorted rows.

    Attributes:
        tiles: how many sums of each kind a measured update writes.
        counters: of its norm, if it has one.
    """

    tiles: int
    counters: Array | None

    def prepare(self, sorter: RowSorter, values: np.ndarray, arguments: UpdateArguments) -> Launch:
        """The update's kernel with its arguments: the sorted rows, a pointer to their gradients, and the others."""

    def calls(self, launch: Launch, count: int) -> list[Call]:
        """The calls that enqueue the kernel for so many rows."""


class EmbeddingTable:
    """How a variable is cut into tiles, with the place of its slots (EmbeddingTable of sparse.cu).

    Args:
        group: the variable.
        slots: the array of each slot, alone in a list.
        place: of the variable among all that have slots.

    Attributes:
        struct: the kernel argument.
        tiles: how many there are.
        counters: of its norm, if it has one.
    """

    def __init__(self, group: SparseGroup, slots: Mapping[str, Sequence[Array]], place: int) -> None:
        variable, device = group.variable, group.device
        rows = variable.shape[0]
        row_size = group.layout.parts * variable.size // rows if rows else 0
        self._group = group
        tile = kernels.tile_size(group.layout.dtype)
        pieces = max(1, -(-row_size // tile))
        rows_per_tile = max(1, tile // max(1, row_size)) if pieces == 1 else 1
        if rows_per_tile > PACK_BYTES:
            rows_per_tile -= rows_per_tile % PACK_BYTES  # so that tiles of an aligned variable begin aligned
        self.tiles = pieces * -(-rows // rows_per_tile) if row_size else 0
        self.counters = norm_counters(device, group.rule, 1)
        self.struct = np.zeros(1, kernels.EMBEDDING_TABLE)
        arrays = {"theta": variable._storage, **{name: array for name, (array,) in slots.items()}}
        for name, array in arrays.items():
            self.struct["slots"][name] = device.address(array)
        numbers = {"rows": rows, "row_size": row_size, "rows_per_tile": rows_per_tile, "pieces": pieces, "place": place}
        for name, number in {**numbers, "tiles": self.tiles}.items():
            self.struct[name] = number

    def prepare(self, sorter: RowSorter, values: np.ndarray, arguments: UpdateArguments) -> Launch:
        """See `Table`."""
        group = self._group
        return group.device.prepare(
            kernels.sparse(group.layout.dtype, group.rule, gradient=group.layout.gradient, staged=arguments.kind),
            [
                *(self.struct, sorter.indices, sorter.keys, values),
                *(arguments.factors, arguments.scalars, arguments.staged, sorter.errors, arguments.measured),
            ],
        )

    def calls(self, launch: Launch, count: int) -> list[Call]:
        """See `Table`: all rows, however many have a gradient."""
        return [launch.call(max(1, self.tiles))]


class SparseLaunch:
    """The update of a group whose slots exist.

    Args:
        group: the variable.
        table: where it and its slots lie.
        errors: where rows out of range are noted.
        use: what the launch is made for.
        live: where a graph of the user's finds staged scalars.
    """

    tensors = 1

    def __init__(
        self,
        group: SparseGroup,
        table: Table,
        errors: IndexErrors,
        use: Use = EAGER,
        live: StagedArray | None = None,
    ) -> None:
        self.group, self.table, self.counters = group, table, table.counters
        self.device, self.gradient = group.device, group.layout.gradient
        self._errors = errors
        self.arguments = arguments = UpdateArguments(
            group.layout, group.device, 1, use, live, guarded=group.rule.guarded
        )
        self._values, self._joined, self._size = kernels.pointer(0), kernels.pointer(0), kernels.scalar(0)
        self._sorter = RowSorter(self.device, group.variable.shape[0], errors)
        self._launch = table.prepare(self._sorter, self._values, arguments)
        self._square_sums = None
        if group.rule.sums_squares:
            self._square_sums = self.device.prepare(
                kernels.norm(self.gradient, "square_sums_of", group.rule),
                [
                    *(self._joined, self._size, arguments.scalars, arguments.staged),
                    *(arguments.sums, arguments.found, arguments.norm),
                ],
            )
        self._gradient: SparseGradient | None = None

    def is_bound_to(self, gradient: SparseGradient) -> bool:
        """Never: slices are bound anew in every step."""
        return False

    def bind(self, gradient: SparseGradient) -> None:
        """Read this gradient from now on."""
        self._sorter.bind(gradient.indices)
        self._values[0], self._joined[0] = map(self.device.address, (gradient.values, gradient.joined))
        self._size[0] = self.group.layout.parts * int(gradient.joined.size)
        self._gradient = gradient

    def release(self) -> None:
        """Let go of the gradient."""
        self._gradient = None

    def calls(self) -> list[Call]:
        """The calls that enqueue the sort and the update, with the arguments' contents of that moment."""
        return [*self._sorter.calls(), *self.table.calls(self._launch, self._sorter.count)]

    def square_sum_calls(self, address: int) -> list[Call]:
        """The calls that enqueue the partial sums of squares, to the float64 array at `address`."""
        self.arguments.sums[0] = address
        assert self._square_sums is not None
        return [self._square_sums.call(self.sum_count)] if self._size[0] else []

    @property
    def measured_count(self) -> int:
        """How many sums of each kind a measured update writes: one for each tile."""
        return self.table.tiles

    @property
    def sum_count(self) -> int:
        """How many partial sums the values have: one for each chunk."""
        return -(-int(self._size[0]) // kernels.CHUNK)

    def for_graph(self, use: Use) -> SparseLaunch:
        """The same update for a captured graph, with keys, scalars and factors of its own."""
        launch = SparseLaunch(self.group, self.table, self._errors, use, self.arguments.live)
        launch._sorter.reserve(self.capacity)
        return launch

    @property
    def capacity(self) -> int:
        """How many rows there is memory for."""
        return self._sorter.capacity
