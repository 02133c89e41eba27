"""Dense updates: all variables of one dtype and device in one launch, from a table in device memory (dense.cu)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices import Array
from gpu_adam.devices.base import StagedArray
from gpu_adam.step.arguments import EAGER, UpdateArguments, Use
from gpu_adam.step.groups import DenseGradients, DenseGroup
from gpu_adam.step.norms import norm_counters
from gpu_adam.uninterrupted import Call


def rows_of(group: DenseGroup, slots: Mapping[str, Sequence[Array]], places: Sequence[int]) -> np.ndarray:
    """A TENSOR for each variable of a group, also for those without elements: where it lies, its size and its place.

    Args:
        group: the variables.
        slots: the arrays of each slot, for each of the variables.
        places: of each variable among all that have slots.
    """
    rows = np.zeros(len(group.variables), kernels.TENSOR)
    arrays = {"theta": [variable._storage for variable in group.variables], **slots}
    for name, column in arrays.items():
        rows["slots"][name] = group.device.addresses(column)
    rows["size"] = group.sizes.astype(np.int64) * group.layout.parts
    rows["place"] = places
    return rows


class DenseTable:
    """The multi-tensor table of a group in device memory: written once, and read by every launch of the group.

    Args:
        group: its variables.
        rows: of `rows_of`, for each of the variables.

    Attributes:
        rows: as above.
        struct: the TensorTable, without gradients.
        chunks: how many chunks there are.
        counters: of its norms, if it has any.
    """

    def __init__(self, group: DenseGroup, rows: np.ndarray) -> None:
        device, filled, self.rows = group.device, group.filled, rows
        table = rows[filled]
        chunks = -(-table["size"] // kernels.CHUNK)
        table["first_chunk"] = np.cumsum(chunks) - chunks
        table["group"] = group.setting_numbers[filled]
        self.chunks = int(chunks.sum())
        self.counters = norm_counters(device, group.rule, len(filled))
        self._tensors = device.array(table.view(np.uint8))
        self._chunk_tensor = device.array(np.repeat(np.arange(len(filled), dtype=np.int32), chunks))
        self.struct = (device.address(self._tensors), 0, device.address(self._chunk_tensor), self.chunks, 0)


class DenseLaunch:
    """The update of a group whose slots exist.

    Args:
        group: the variables.
        table: where they and their slots lie.
        use: what the launch is made for.
        live: where a graph of the user's finds staged scalars.
    """

    def __init__(self, group: DenseGroup, table: DenseTable, use: Use = EAGER, live: StagedArray | None = None) -> None:
        self.group, self.table, self._write = group, table, use.write_addresses
        self.device, self.gradient = group.device, group.layout.gradient
        self.tensors, self.counters = len(group.filled), table.counters
        self._tensor_table = tensor_table = kernels.struct(kernels.TENSOR_TABLE, *table.struct)
        self._read_from(group.device.staged(max(1, self.tensors), np.dtype(np.uint64)))
        self.arguments = arguments = UpdateArguments(
            group.layout, group.device, len(group.settings), use, live, guarded=group.rule.guarded
        )
        tensor_table["frozen"] = arguments.frozen
        self._launch = self.device.prepare(
            kernels.dense(group.layout.dtype, group.rule, gradient=self.gradient, staged=arguments.kind),
            [
                *(tensor_table, arguments.factors, arguments.factor_stride),
                *(arguments.scalars, arguments.staged, arguments.measured),
            ],
        )
        self._square_sums = None
        if group.rule.sums_squares:
            self._square_sums = self.device.prepare(
                kernels.norm(self.gradient, "square_sums", group.rule),
                [tensor_table, arguments.scalars, arguments.staged, arguments.sums, arguments.found, arguments.norm],
            )
        self._bound: DenseGradients | None = None

    def _read_from(self, gradients: StagedArray) -> None:
        self._gradients = gradients
        self._tensor_table["gradients"] = gradients.address

    def is_bound_to(self, gradients: DenseGradients) -> bool:
        """Whether the launch reads these gradients already, from where they lie."""
        return self._bound is gradients

    def bind(self, gradients: DenseGradients) -> None:
        """Read these gradients from now on."""
        addresses = gradients.addresses if self.group.all_filled else gradients.addresses[self.group.filled]
        self._bound = None  # while the table is written, which may fail, nothing is known of it
        if self.tensors:
            self._write(self._gradients, addresses)
        self._bound = gradients

    def take_addresses_of(self, other: DenseLaunch) -> None:
        """Read the addresses that another launch of the group is bound to, where it has written them.

        The other launch gets this one's memory for addresses, and is bound to nothing.
        """
        bound, mine = other._bound, self._gradients
        other._bound = None
        self._read_from(other._gradients)
        other._read_from(mine)
        self._bound = bound

    def release(self) -> None:
        """Let go of arrays that were made of gradients."""
        if self._bound is not None and self._bound.kept:
            self._bound = None

    def calls(self) -> list[Call]:
        """The calls that enqueue the update, with the arguments' contents of that moment."""
        return [self._launch.call(self.table.chunks)] if self.table.chunks else []

    def square_sum_calls(self, address: int) -> list[Call]:
        """The calls that enqueue the partial sums of squares, to the float64 array at `address`."""
        self.arguments.sums[0] = address
        assert self._square_sums is not None
        return [self._square_sums.call(self.table.chunks)] if self.table.chunks else []

    @property
    def measured_count(self) -> int:
        """How many sums of each kind a measured update writes: one for each chunk."""
        return self.table.chunks

    @property
    def sum_count(self) -> int:
        """How many partial sums the gradients have: one for each chunk."""
        return self.table.chunks

    def for_graph(self, use: Use) -> DenseLaunch:
        """The same update for a captured graph, with gradients, scalars and factors of its own."""
        return DenseLaunch(self.group, self.table, use, self.arguments.live)

    @property
    def capacity(self) -> int:
        """For how many tensors there is memory."""
        return self.tensors
