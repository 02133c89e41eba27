"""Dense updates: all variables of one dtype and device in one launch, from a table in device memory (dense.cu)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices import Array
from gpu_adam.kernels import UpdateRule
from gpu_adam.step.arguments import UpdateArguments
from gpu_adam.step.gradients import as_array, check_shape
from gpu_adam.uninterrupted import Call
from gpu_adam.variables import Variable


class DenseGroup:
    """Variables of one dtype on one device, each once, that get a dense gradient: what can be said before slots exist.

    Args:
        variables: the variables, none overlapping another.
        numbers: which pairs of the step are theirs.
        rule: of the update.

    Attributes:
        variables, numbers, rule: as above.
        device: where all of the variables lie.
        layout: how their elements appear to the kernels.
        filled: which of the variables have elements.
        all_filled: whether all of them have.
        nbytes: size of each gradient.
    """

    def __init__(self, variables: Sequence[Variable], numbers: Sequence[int], rule: UpdateRule) -> None:
        self.variables, self.numbers, self.rule = list(variables), np.array(numbers, np.intp), rule
        self.device = variables[0].device
        self.layout = rule.layout(variables[0].dtype)
        sizes = np.array([variable.size for variable in variables], np.uint64)
        self.filled = np.flatnonzero(sizes)
        self.all_filled = len(self.filled) == len(sizes)
        self.nbytes = sizes * np.uint64(variables[0].dtype.itemsize)

    def check(self, pairs: Sequence[Any], addresses: np.ndarray) -> DenseGradients:
        """The gradients of a step's pairs, ready to bind; what is no array of the right kind is converted or refused.

        Args:
            pairs: all pairs of the step.
            addresses: where this group's gradients lie; 0 for a gradient that has not been found to fit.

        Raises:
            ArgumentTypeError, ArgumentValueError: a gradient that does not fit its variable.
        """
        if addresses.all():
            return DenseGradients(self, addresses)
        addresses, kept = addresses.copy(), []
        for index in np.flatnonzero(addresses == 0):
            variable, gradient = self.variables[index], pairs[self.numbers[index]][0]
            array = as_array(gradient, variable)
            check_shape(array, variable.shape, variable)
            addresses[index] = self.device.address(array)
            if array is not gradient:
                kept.append(array)
        return DenseGradients(self, addresses, kept, may_be_remembered=False)


class DenseGradients:
    """Gradients of a group that passed their checks: their places, for a model's gradients are not kept alive.

    Attributes:
        addresses: where they lie, one uint64 for each variable.
        kept: arrays that were made of what was passed, and must live until they have been read.
        may_be_remembered: whether gradients at the same addresses need no further look, for the pair reader read all.
    """

    __slots__ = ("_group", "addresses", "kept", "may_be_remembered")

    def __init__(
        self,
        group: DenseGroup,
        addresses: np.ndarray,
        kept: Sequence[Array] = (),
        *,
        may_be_remembered: bool = True,
    ) -> None:
        self._group, self.addresses, self.kept, self.may_be_remembered = group, addresses, kept, may_be_remembered

    def reads(self) -> tuple[np.ndarray, np.ndarray]:
        """Addresses and sizes in bytes of the memory that the launches read for these gradients."""
        return self.addresses, self._group.nbytes

    def with_copy(self, pairs: Sequence[Any], index: int) -> DenseGradients:
        """The same gradients of a step's pairs, number `index` read from a copy."""
        group = self._group
        copy = group.device.array(as_array(pairs[group.numbers[index]][0], group.variables[index]))
        addresses = self.addresses.copy()
        addresses[index] = group.device.address(copy)
        return DenseGradients(group, addresses, [*self.kept, copy], may_be_remembered=False)


class DenseTable:
    """The multi-tensor table of a group in device memory: written once, and read by every launch of the group.

    Args:
        group: its variables.
        slots: the arrays of each slot, for each of the variables.

    Attributes:
        struct: the TensorTable, without gradients.
        chunks: how many chunks there are.
        chunk_ends: device array with the end of each tensor's chunks.
    """

    def __init__(self, group: DenseGroup, slots: Mapping[str, Sequence[Array]]) -> None:
        device, filled, parts = group.device, group.filled, group.layout.parts
        table = np.zeros(len(filled), kernels.TENSOR)
        arrays = {"theta": [variable.value for variable in group.variables], **slots}
        for name, column in arrays.items():
            table["slots"][name] = device.addresses(column)[filled]
        table["size"] = (group.nbytes // group.variables[0].dtype.itemsize)[filled].astype(np.int64) * parts
        chunks = -(-table["size"] // kernels.CHUNK)
        ends = np.cumsum(chunks)
        table["first_chunk"] = ends - chunks
        self.chunks = int(ends[-1]) if len(ends) else 0
        self.chunk_ends = device.array(ends)
        self._tensors = device.array(table.view(np.uint8))
        self._chunk_tensor = device.array(np.repeat(np.arange(len(filled), dtype=np.int32), chunks))
        self.struct = (device.address(self._tensors), 0, device.address(self._chunk_tensor), self.chunks)


class DenseLaunch:
    """The update of a group whose slots exist.

    Args:
        group: the variables.
        table: where they and their slots lie.
        captured: whether the launch becomes part of a graph.
    """

    def __init__(self, group: DenseGroup, table: DenseTable, *, captured: bool = False) -> None:
        self.group, self.table = group, table
        self.device, self.dtype = group.device, group.layout.dtype
        self.tensors, self.chunk_ends = len(group.filled), table.chunk_ends
        self._gradients = group.device.staged(max(1, self.tensors), np.dtype(np.uint64), captured=captured)
        tensor_table = kernels.struct(kernels.TENSOR_TABLE, *table.struct)
        tensor_table["gradients"] = self._gradients.address
        self.arguments = arguments = UpdateArguments(group.layout)
        self._launch = self.device.prepare(
            kernels.dense(self.dtype, group.rule),
            [tensor_table, arguments.factors, arguments.factor_stride, arguments.scalars, arguments.staged],
        )
        self._square_sums = None
        if group.rule.norm is not None:
            self._square_sums = self.device.prepare(
                kernels.norm(self.dtype, "square_sums"), [tensor_table, arguments.clip_value, arguments.sums]
            )
        self._bound: DenseGradients | None = None

    def is_bound_to(self, gradients: DenseGradients) -> bool:
        """Whether the launch reads these gradients already, from where they lie."""
        return self._bound is gradients

    def bind(self, gradients: DenseGradients) -> None:
        """Read these gradients from now on."""
        addresses = gradients.addresses if self.group.all_filled else gradients.addresses[self.group.filled]
        self._bound = None  # while the table is written, which may fail, nothing is known of it
        if self.tensors:
            self._gradients.write(addresses)
        self._bound = gradients

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
    def sum_count(self) -> int:
        """How many partial sums the gradients have: one for each chunk."""
        return self.table.chunks

    def for_graph(self) -> DenseLaunch:
        """The same update for a captured graph, with gradients, scalars and factors of its own."""
        return DenseLaunch(self.group, self.table, captured=True)

    @property
    def capacity(self) -> int:
        """For how many tensors there is memory."""
        return self.tensors
