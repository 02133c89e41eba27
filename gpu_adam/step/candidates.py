"""Candidates of a guarded step: its scalars for each number of steps that may be done, and the row that is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices.base import StagedArray
from gpu_adam.step.arguments import UpdateArguments
from gpu_adam.step.guard import Guard
from gpu_adam.step.norms import NormPass
from gpu_adam.uninterrupted import Call

ROOM = 64
"""How many candidates a graph has memory for; where more are possible, a replay waits for the device."""


class Candidates(NamedTuple):
    """The scalars among which the device chooses.

    Attributes:
        first: the least number of steps that may be done.
        rows: for each number from there on, for each update, for each of its settings.
        overwrites: for each of these numbers, whether the averages take the variables' places at the end of the step.
    """

    first: int
    rows: Sequence[Sequence[Sequence[tuple[Any, ...]]]]
    overwrites: Sequence[bool]


class GuardedScalars:
    """The scalars of guarded updates: rows of candidates, and the row on the device that the updates read.

    Args:
        guard: chooses the row.
        updates: the updates' arguments, which are told where their scalars lie.
        overwriting: those of the launches that put averages in the variables' places, likewise.
        searched: whether elements that are not finite are counted.
        room: for how many candidates there is memory. More get other memory, which a graph would not read.
    """

    def __init__(
        self,
        guard: Guard,
        updates: Sequence[UpdateArguments],
        overwriting: Sequence[UpdateArguments],
        *,
        searched: bool,
        room: int,
    ) -> None:
        self._guard, device, self._updates = guard, guard.device, len(updates)
        launches = [*updates, *overwriting]
        parts = np.dtype(
            [(str(n), (each.scalars_dtype, (each.settings,))) for n, each in enumerate(launches)], align=True
        )
        fields = parts.fields
        assert fields is not None
        offsets = [fields[name][1] for name in fields]
        words = -(-parts.itemsize // 8)
        formats = [fields[name][0] for name in fields]
        self._dtype = np.dtype({"names": list(fields), "formats": formats, "offsets": offsets, "itemsize": 8 * words})
        self._row = device.array(np.zeros(words, np.int64))
        places = np.concatenate([_places(update, offset) for update, offset in zip(launches, offsets, strict=True)])
        self._places = device.array(places.view(np.uint8))
        row, table = device.address(self._row), device.address(self._places)
        self._rows = kernels.struct(kernels.GUARD_ROWS, 0, row, table, words, len(places))
        for update, offset in zip(launches, offsets, strict=True):
            update.staged[0] = row + offset
            update.found[0] = guard.address("found") if searched else 0
        self._have_room_for(room)
        self._begin = device.prepare(
            kernels.guard("guard_begin"), [guard.state, self._rows, guard.scale, guard.wide, guard.number]
        )
        self._end = device.prepare(
            kernels.guard("guard_end"), [guard.state, self._rows, guard.skips, guard.found_inf, guard.loss]
        )

    def _have_room_for(self, rows: int) -> None:
        begin = kernels.CANDIDATES.itemsize
        self._values = np.zeros(begin + rows * self._dtype.itemsize, np.uint8)
        self._known, self._candidates = self._values[:begin].view(np.int64), self._values[begin:].view(self._dtype)
        self._table: StagedArray = self._guard.device.staged(self._values.size, np.dtype(np.uint8))
        self._rows["candidates"] = self._table.address

    def write(self, candidates: Candidates) -> None:
        """Let the next step's scalars be chosen among these."""
        number = len(candidates.rows)
        if number > len(self._candidates):
            self._have_room_for(2 * number)
        self._known[:] = candidates.first, number
        names = self._dtype.names or ()
        for update, name in enumerate(names[: self._updates]):
            self._candidates[name][:number] = [scalars[update] for scalars in candidates.rows]
        for name in names[self._updates :]:  # all other scalars are zeros: theta = g
            self._candidates[name]["apply"][:number, 0] = candidates.overwrites
        self._table.write(self._values)

    def begin(self) -> list[Call]:
        """The calls that enqueue the choice of a step's scalars."""
        return [self._begin.call(1)]

    def end(self, norms: Sequence[NormPass]) -> list[Call]:
        """The calls that enqueue the decision, behind the passes over the gradients."""
        calls: list[Call] = []
        if self._guard.measures:
            for norm in norms:
                calls += norm.total(self._guard.address("square_sum"))
        return [*calls, self._end.call(1)]


def _places(update: UpdateArguments, offset: int) -> np.ndarray:
    """Where the members of an update's StepScalars lie in a row: one GUARD_PLACE for each of its settings."""
    fields = update.scalars_dtype.fields
    assert fields is not None
    places = np.zeros(update.settings, kernels.GUARD_PLACE)
    begins = offset + update.scalars_dtype.itemsize * np.arange(update.settings)
    for name in ("unscale", "apply"):
        places[name] = begins + fields[name][1]
    places["size"] = fields["apply"][0].itemsize
    return places
