"""Dense updates: all variables of one dtype and device in one launch, from a table in device memory (dense.cu)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices import Array
from gpu_adam.devices.base import PointerTable
from gpu_adam.gradients import as_array, check_shape
from gpu_adam.memory import Interval, memory_of
from gpu_adam.slots import Slots, slot_names
from gpu_adam.variables import Variable


class Bound(NamedTuple):
    """Gradients that passed their checks.

    Attributes:
        gradients: what was passed.
        addresses: where they lie, one uint64 per variable.
        kept: arrays that were made from what was passed, and must live until they are used.
    """

    gradients: Sequence[Any]
    addresses: np.ndarray
    kept: list[Array]


class DenseUpdate:
    """The update of some variables of one dtype on one device by dense gradients.

    Args:
        variables: the variables, each once, none overlapping another.
        complex_mode: one of kernels.COMPLEX_MODES.
        amsgrad: whether the update is AMSGrad's.
        clip: whether gradients are clipped.
    """

    def __init__(self, variables: Sequence[Variable], *, complex_mode: str, amsgrad: bool, clip: bool) -> None:
        self.variables = list(variables)
        self.device = variables[0].device
        self.dtype, self._parts = kernels.layout(variables[0].dtype, complex_mode)
        self._amsgrad, self._clip = amsgrad, clip
        self._read = self.device.address_reader([variable.shape for variable in variables], variables[0].dtype)
        self._filled = np.array([index for index, variable in enumerate(variables) if variable.size], np.intp)
        self.tensors = len(self._filled)
        self._nbytes = np.array([variable.size * variable.dtype.itemsize for variable in variables], np.uint64)
        self._addresses = self._written = np.zeros(self.tensors, np.uint64)
        self._captured: list[tuple[PointerTable, list[Array]]] = []

    def check(self, gradients: list[Any]) -> Bound:
        """The gradients' addresses; what is not an array of the right kind is converted or refused.

        Raises:
            ArgumentTypeError, ArgumentValueError: a gradient that does not fit its variable.
        """
        addresses = self._read(gradients)
        kept: list[Array] = []
        if not addresses.all():
            for index in np.flatnonzero(addresses == 0):
                variable = self.variables[index]
                array = as_array(gradients[index], variable)
                check_shape(array, variable.shape, variable)
                addresses[index] = self.device.address(array)
                if array is not gradients[index]:
                    kept.append(array)
        return Bound(gradients, addresses, kept)

    def allocate(self, slots: Slots) -> None:
        """Write the table, once the variables' slots exist."""
        device = self.device
        table = np.zeros(self.tensors, kernels.TENSOR)
        first_chunk = 0
        for entry, index in zip(table, self._filled, strict=True):
            variable = self.variables[index]
            entry["theta"] = device.address(variable.value)
            for name in slot_names(self._amsgrad):
                entry[name] = device.address(slots.get(variable, name).value)
            entry["size"], entry["first_chunk"] = variable.size * self._parts, first_chunk
            first_chunk += -(-variable.size * self._parts // kernels.CHUNK)
        self.chunks = first_chunk
        per_tensor = np.diff(table["first_chunk"], append=first_chunk)
        self._ends = device.array(np.cumsum(per_tensor))
        self._table = device.array(table.view(np.uint8))
        self._chunk_tensor = device.array(np.repeat(np.arange(self.tensors, dtype=np.int32), per_tensor))
        self._gradients = device.pointer_table(max(1, self.tensors))
        self._tensor_table = kernels.struct(
            kernels.TENSOR_TABLE,
            device.address(self._table),
            self._gradients.address,
            device.address(self._chunk_tensor),
            self.chunks,
        )
        real_dtype = kernels.DTYPES[self.dtype].real_dtype
        self._step = np.zeros(1, kernels.step_dtype(real_dtype))
        self._factors, self._stride = kernels.pointer(0), kernels.scalar(0)
        self._launch = device.prepare(
            kernels.dense(self.dtype, amsgrad=self._amsgrad, clip=self._clip),
            [self._tensor_table, self._factors, self._stride, self._step],
        )
        if self._clip:
            self._clip_value, self._sums = np.zeros(1, real_dtype), kernels.pointer(0)
            self._square_sums = device.prepare(
                kernels.norm(self.dtype, "square_sums"), [self._tensor_table, self._clip_value, self._sums]
            )

    def written(self, slots: Slots) -> list[Interval]:
        """The memory that the launch writes."""
        arrays = [(v, *(slots.get(v, name) for name in slot_names(self._amsgrad))) for v in self.variables]
        return [memory_of(self.device, variable.value) for group in arrays for variable in group]

    def read(self, bound: Bound) -> tuple[np.ndarray, np.ndarray]:
        """Addresses and sizes in bytes of the memory that the launch reads for these gradients."""
        return bound.addresses, self._nbytes

    def copied(self, bound: Bound, index: int) -> Bound:
        """The same gradients, number `index` read from a copy."""
        copy = self.device.array(as_array(bound.gradients[index], self.variables[index]))
        bound.addresses[index] = self.device.address(copy)
        return bound._replace(kept=[*bound.kept, copy])

    def bind(self, bound: Bound) -> bool:
        """Use these gradients from now on. Returns whether the same objects would give the same addresses again."""
        self._kept = bound.kept
        self._addresses = bound.addresses[self._filled]
        if (self._addresses != self._written).any():
            if self.device.is_capturing():  # what is written now is written at replays only: see begin_capture
                return False
            self._written = self._addresses
            self._gradients.write(self._written)
        return not bound.kept

    def enqueue(self, step: tuple[Any, ...]) -> None:
        """Enqueue the update with the scalars of a step (alpha_t, 1 - beta_1, 1 - beta_2, epsilon, clip value)."""
        self._step[0] = step
        if self.chunks:
            self._launch(self.chunks)

    def begin_capture(self) -> None:
        """Read the gradients' addresses from a table of its own: a graph does so at every replay, after later steps.

        It also copies the gradients that need it at every replay, to where it does now.
        """
        own = self.device.pointer_table(max(1, self.tensors))
        own.write(self._addresses)
        self._captured.append((own, self._kept))
        self._tensor_table["gradients"] = own.address

    def end_capture(self) -> None:
        """Go back to the table that steps rewrite."""
        self._tensor_table["gradients"] = self._gradients.address

    # Norms of the gradients, for gradients.NormClipping.

    def sum_count(self) -> int:
        """One partial sum per chunk."""
        return self.chunks

    def square_sums(self, address: int, clip_value: float) -> None:
        """Enqueue the partial sums of squares to the float64 array at `address`."""
        self._sums[0], self._clip_value[0] = address, clip_value
        if self.chunks:
            self._square_sums(self.chunks)

    def ends(self) -> Array | None:
        """Device array with the end of each tensor's partial sums."""
        return self._ends

    def set_factors(self, address: int, stride: int) -> None:
        """Let the update read its clip factors there."""
        self._factors[0], self._stride[0] = address, stride
