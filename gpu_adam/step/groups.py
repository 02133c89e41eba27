"""Groups: the variables that one launch updates, before they have slots, and gradients that passed their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_adam.devices import Array
from gpu_adam.errors import ArgumentValueError
from gpu_adam.hyperparameters import AnySettings
from gpu_adam.kernels import UpdateRule
from gpu_adam.step.gradients import as_array, check_shape, on_device
from gpu_adam.step.index_errors import index_error
from gpu_adam.variables import Variable

_INT32, _INT64 = np.dtype(np.int32), np.dtype(np.int64)


class DenseGroup:
    """Variables of one dtype on one device, each once, that get a dense gradient: what can be said before slots exist.

    Args:
        variables: the variables, none overlapping another.
        numbers: which pairs of the step are theirs.
        rule: of the update.
        settings: of each variable.
        gradient_dtype: of all their gradients.
        origin: the group of which this one is a part, if it is one, and the variables' places in it.

    Attributes:
        variables, numbers, rule, origin: as above.
        settings: the different ones.
        setting_numbers: which of them each variable has.
        device: where all of the variables lie.
        layout: how their elements appear to the kernels.
        sizes: how many elements each variable has.
        filled: which of the variables have elements.
        all_filled: whether all of them have.
        nbytes: size of each gradient in bytes.
    """

    def __init__(
        self,
        variables: Sequence[Variable],
        numbers: Sequence[int],
        rule: UpdateRule,
        settings: Sequence[AnySettings],
        gradient_dtype: np.dtype,
        origin: tuple[DenseGroup, Sequence[int]] | None = None,
    ) -> None:
        self.variables, self.numbers, self.rule = list(variables), np.array(numbers, np.intp), rule
        self.origin = origin
        self.settings = list(dict.fromkeys(settings))
        places = {each: place for place, each in enumerate(self.settings)}
        self.setting_numbers = np.array([places[each] for each in settings], np.int64)
        self.device, self._gradient_dtype = variables[0].device, gradient_dtype
        self.layout = rule.layout(variables[0].dtype, gradient_dtype)
        self.sizes = np.array([variable.size for variable in variables], np.uint64)
        self.filled = np.flatnonzero(self.sizes)
        self.all_filled = len(self.filled) == len(self.sizes)
        self.nbytes = self.sizes * np.uint64(gradient_dtype.itemsize)

    def part(self, places: Sequence[int], numbers: Sequence[int]) -> DenseGroup:
        """The group of some of the variables.

        Args:
            places: theirs, in this group.
            numbers: which pairs of a step are theirs.
        """
        settings = [self.settings[n] for n in self.setting_numbers[places].tolist()]
        origin = self, places
        return DenseGroup(
            [self.variables[n] for n in places], numbers, self.rule, settings, self._gradient_dtype, origin
        )

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
            array = self.as_array(gradient, variable)
            check_shape(array, variable.shape, variable)
            addresses[index] = self.device.address(array)
            if array is not gradient:
                kept.append(array)
        return DenseGradients(self, addresses, kept, may_be_remembered=False)

    def as_array(self, gradient: Any, variable: Variable) -> Array:
        """A gradient as the launch reads it; see `gradients.as_array`."""
        return as_array(gradient, variable, self._gradient_dtype)


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
        copy = group.device.array(group.as_array(pairs[group.numbers[index]][0], group.variables[index]))
        addresses = self.addresses.copy()
        addresses[index] = group.device.address(copy)
        return DenseGradients(group, addresses, [*self.kept, copy], may_be_remembered=False)


class SparseGroup:
    """One variable that gets a gradient for some of its rows: what can be said before slots exist.

    Args:
        variables: the variable, alone; at least one-dimensional.
        numbers: which pair of the step is its own, alone.
        rule: of the update.
        settings: of the variable, alone.
        gradient_dtype: of the gradient's values.

    Raises:
        ArgumentValueError: a variable without rows.
    """

    def __init__(
        self,
        variables: Sequence[Variable],
        numbers: Sequence[int],
        rule: UpdateRule,
        settings: Sequence[AnySettings],
        gradient_dtype: np.dtype,
    ) -> None:
        self.variables, self.numbers, self.rule = list(variables), np.array(numbers, np.intp), rule
        self.settings = list(settings)
        (self.variable,), (self.number,) = self.variables, numbers
        if self.variable.ndim == 0:
            raise ArgumentValueError(
                f"gradient of variable {self.variable.name!r}",
                "must be dense for a variable without rows",
                "IndexedSlices",
                "pass an array",
            )
        self.device = self.variable.device
        self._gradient_dtype, self._shape = gradient_dtype, self.variable.shape
        self.layout = rule.layout(self.variable.dtype, gradient_dtype)

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
        if not is_plain(values, self._gradient_dtype):
            values = as_array(values, variable, self._gradient_dtype, "IndexedSlices.values")
        rows = self._shape[0]
        if values.shape != (indices.shape[0], *self._shape[1:]):
            check_shape(values, (int(indices.shape[0]), *self._shape[1:]), variable, "IndexedSlices.values")
        if self.device.checks_indices and indices.size and not 0 <= indices.min() <= indices.max() < rows:
            position = int(np.argmax((indices < 0) | (indices >= rows)))
            raise index_error(variable, position, int(indices[position]))
        return SparseGradient(self, values, indices, gradient._joined)


class SparseGradient:
    """A gradient that passed its checks: contiguous arrays on the variable's device.

    Attributes:
        values, indices: of the slices.
        joined: the values of which a norm is taken: those of all ranks, of which these are some; else these.
    """

    __slots__ = ("_group", "indices", "joined", "values")

    may_be_remembered = False  # for the number of rows may change

    def __init__(self, group: SparseGroup, values: Array, indices: Array, joined: Array | None = None) -> None:
        self._group, self.values, self.indices = group, values, indices
        self.joined = values if joined is None else joined

    def reads(self) -> tuple[np.ndarray, np.ndarray]:
        """Addresses and sizes in bytes of the memory that the launches read for this gradient."""
        address, values, indices = self._group.device.address, self.values, self.indices
        addresses = np.array([address(values), address(indices)], np.uint64)
        return addresses, np.array([values.nbytes, indices.nbytes], np.uint64)

    def with_copy(self, pairs: Sequence[Any], index: int) -> SparseGradient:
        """The same gradient, its values (index 0) or indices (index 1) read from a copy. The pairs are not needed."""
        values, indices, array = self.values, self.indices, self._group.device.array
        joined = None if self.joined is values else self.joined
        if index == 0:
            return SparseGradient(self._group, array(values), indices, joined)
        return SparseGradient(self._group, values, array(indices), joined)


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
