"""Recognising a step's pairs: whether they have the variables of an earlier step, and where the gradients lie.

A reader answers for one list of expected pairs. It returns an array of addresses, one for each pair, 0 where the
gradient must be looked at more closely; the same array object as at its last call where nothing differs; and None where
the pairs are others, or a variable is not where it was.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from gpu_adam.devices.placement import Placement
from gpu_adam.devices.places import Places

if TYPE_CHECKING:
    from gpu_adam.devices.torch_tensors import TorchReader


class ExpectedPairs(NamedTuple):
    """What the pairs of a step must be for the step to be a known one: one item of each list for each pair.

    Attributes:
        targets: the variables, as they are passed.
        placements: where the targets lie, if that may change; None for a gpu_adam.Variable.
        other_types: the exact type of a gradient that is no array; None where an array is expected.
        shapes: the variables'.
        dtypes: the gradients'.
        never_arrays: types of objects for which a pair must be read anew where an array is expected.
    """

    targets: list[Any]
    placements: list[Placement | None]
    other_types: list[type | None]
    shapes: list[tuple[int, ...]]
    dtypes: list[np.dtype]
    never_arrays: tuple[type, ...] = ()

    def part(self, numbers: Sequence[int]) -> ExpectedPairs:
        """The pairs with these numbers, in this order."""
        columns: list[list[Any]] = [[column[n] for n in numbers] for column in self[:-1]]
        targets, placements, kinds, shapes, dtypes = columns
        return ExpectedPairs(targets, placements, kinds, shapes, dtypes, self.never_arrays)

    def have_no_array(self, pairs: Sequence[Any], addresses: np.ndarray) -> bool:
        """Whether one of the gradients whose address is 0 is of a type for which its pair must be read anew."""
        kinds = self.other_types
        missing = np.flatnonzero(addresses == 0).tolist()
        return any(kinds[n] is None and isinstance(pairs[n][0], self.never_arrays) for n in missing)


def places_of(expected: ExpectedPairs, numbers: Sequence[int]) -> Places | None:
    """Where some of the targets lie, which have placements; None for no targets."""
    if not numbers:
        return None
    placements = [place for n in numbers if (place := expected.placements[n]) is not None]
    return Places([expected.targets[n] for n in numbers], placements, [expected.dtypes[n] for n in numbers])


class PairReader(Protocol):
    """Compares the pairs of a step with expected ones, and reads where the gradients lie."""

    def __call__(self, pairs: Sequence[Any]) -> np.ndarray | None:
        """One uint64 address for each pair, or None: see the module."""


AddressReader = Callable[[list[Any]], np.ndarray]
"""Addresses of arrays, in the order in which a reader was told to expect them; 0 where an object does not fit."""


class PythonPairReader:
    """A reader for any device.

    Gradients are remembered weakly, for the optimizer must not keep a model's gradients alive. A remembered one lies
    where it lay; only its shape can be assigned. Tensors of torch are not remembered: their memory can be exchanged.

    Args:
        expected: the pairs.
        addresses: reads the addresses of one gradient for each pair.
        tensors: reads those of torch's tensors.
    """

    def __init__(self, expected: ExpectedPairs, addresses: AddressReader, tensors: TorchReader) -> None:
        self._expected, self._read, self._tensors = expected, addresses, tensors
        self._places = places_of(expected, [n for n, place in enumerate(expected.placements) if place])
        self._is_array = np.array([kind is None for kind in expected.other_types])
        self._has_others = not self._is_array.all()
        self._gradients: list[Callable[[], Any]] = []
        self._last: np.ndarray | None = None

    def __call__(self, pairs: Sequence[Any]) -> np.ndarray | None:
        """See `PairReader`."""
        gradients = self._gradients_of(pairs)
        if gradients is None:
            return None
        if not self._are_remembered(gradients):
            self._gradients = []
            addresses = self._read(list(gradients))
            are_arrays = addresses[self._is_array].all()
            is_complete = are_arrays or self._tensors.read(pairs, addresses)
            if not is_complete and self._expected.have_no_array(pairs, addresses):
                return None
            # Of an object without an address nothing is known, in this step and in the last one.
            if not is_complete or self._last is None or not np.array_equal(addresses, self._last):
                self._last = addresses
            if are_arrays and not self._has_others:  # last: the addresses of what is remembered are known by now
                self._remember(gradients)
        return self._last

    def _gradients_of(self, pairs: Sequence[Any]) -> Sequence[Any] | None:
        """The gradients, if the pairs are the expected ones."""
        if type(pairs) is not list or list(map(type, pairs)).count(tuple) != len(pairs):
            return None
        try:
            gradients, targets = zip(*pairs, strict=True)
        except ValueError:  # not two in each tuple, or no pairs at all
            return None
        expected = self._expected.targets
        if len(targets) != len(expected) or not all(map(operator.is_, targets, expected)):
            return None
        if self._places is not None and not self._places.are_kept():
            return None
        return gradients if not self._has_others or self._have_their_types(gradients) else None

    def _are_remembered(self, gradients: Sequence[Any]) -> bool:
        remembered = [gradient() for gradient in self._gradients]
        if not remembered or not all(map(operator.is_, gradients, remembered)):
            return False
        if any(map(operator.is_, gradients, itertools.repeat(None))):  # remembered ones that are gone are None as well
            return False
        return list(map(_shape_of, gradients)) == self._expected.shapes

    def _have_their_types(self, gradients: Sequence[Any]) -> bool:
        for gradient, kind in zip(gradients, self._expected.other_types, strict=True):
            if kind is not None and type(gradient) is not kind:
                return False
        return True

    def _remember(self, gradients: Sequence[Any]) -> None:
        try:
            self._gradients = list(map(weakref.ref, gradients))
        except TypeError:  # an object that cannot be referred to weakly is looked at in every step
            self._gradients = []


_shape_of = operator.attrgetter("shape")
