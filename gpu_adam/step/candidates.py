"""Candidates of a guarded step: its scalars for each number of steps that may be done, and the row that is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices.base import StagedArray
from gpu_adam.step.arguments import CAPTURED, EAGER, UpdateArguments, Use, Writer
from gpu_adam.step.guard import Guard
from gpu_adam.step.norms import NormPass
from gpu_adam.uninterrupted import Call

ROOM = 64
"""How many candidates a graph has memory for; where more are possible, a replay or `stage` waits for the device."""


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
        use: what the launches are made for.
        origin: of launches in a graph, the scalars of the launches that they were made from.
    """

    def __init__(
        self,
        guard: Guard,
        updates: Sequence[UpdateArguments],
        overwriting: Sequence[UpdateArguments],
        *,
        searched: bool,
        use: Use,
        origin: GuardedScalars | None,
    ) -> None:
        self._guard, device, self._updates = guard, guard.device, len(updates)
        self._use = use if device.captures else EAGER
        launches = [*updates, *overwriting]
        # Launches in a graph read the rows that are staged for the others, of which they may have but the first ones.
        self._dtype: np.dtype = _row_of(launches) if origin is None else origin._dtype
        fields, words = self._dtype.fields, self._dtype.itemsize // 8
        assert fields is not None
        offsets = [fields[str(number)][1] for number in range(len(launches))]
        self._row = device.empty(words, np.dtype(np.int64))
        row = device.address(self._row)
        for update, offset in zip(launches, offsets, strict=True):
            update.staged[0] = row + offset
            update.found[0] = guard.address("found") if searched else 0
        count = sum(each.settings for each in launches)
        if origin is None:
            places = [_places(update, offset) for update, offset in zip(launches, offsets, strict=True)]
            self._places = device.array(np.concatenate(places).view(np.uint8))
        else:  # written anew they would be a part of the graph
            self._places = origin._places
        self._rows = kernels.struct(kernels.GUARD_ROWS, 0, 0, row, device.address(self._places), words, count)
        self._live: _Table | None = None
        if self._use is CAPTURED:
            assert origin is not None
            assert origin._live is not None
            self._live, self._table = origin._live, self._table_for(1)
            self._rows["candidates"], self._rows["frozen"] = self._live.array.address, self._table.array.address
        else:
            self._have_room_for(ROOM if self._use.staged else 1)
        if self._use is EAGER and device.captures:
            self._live = self._table_for(ROOM)
            self._live.clear()
        self._begin = device.prepare(
            kernels.guard("guard_begin"), [guard.state, self._rows, guard.scale, guard.wide, guard.number]
        )
        self._end = device.prepare(
            kernels.guard("guard_end"), [guard.state, self._rows, guard.skips, guard.found_inf, guard.loss]
        )

    def _table_for(self, rows: int) -> _Table:
        return _Table(self._guard, self._dtype, self._updates, rows)

    def _have_room_for(self, rows: int) -> None:
        self._table = self._table_for(rows)
        self._rows["candidates"] = self._table.array.address

    def write(self, candidates: Candidates) -> None:
        """Let the next step's scalars be chosen among these; in a graph of the user's as long as none are staged."""
        if self._use is CAPTURED:
            self._table.write(candidates, self._use.write_scalars, chosen=0)  # a launch counts nothing
            return
        if len(candidates.rows) > self._table.room:
            self._have_room_for(2 * len(candidates.rows))
        self._table.write(candidates)

    def stage(self, candidates: Candidates) -> None:
        """Let the graphs of these launches choose among these from now on."""
        if self._live is None:
            self.write(candidates)
        else:
            self._live.write(candidates)

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


class _Table:
    """Candidates in device memory, and what the kernels know of them.

    Args:
        guard: whose steps these are.
        row: dtype of a row, of `_row_of`.
        updates: how many of its fields, the first ones, are of updates. Of the others only `apply` is not 0.
        room: for how many rows.

    Attributes:
        room: as above.
        array: in device memory.
    """

    def __init__(self, guard: Guard, row: np.dtype, updates: int, room: int) -> None:
        self._guard, self._updates, self.room, begin = guard, updates, room, kernels.CANDIDATES.itemsize
        self._values = np.zeros(begin + room * row.itemsize, np.uint8)
        self._head, self._rows = self._values[:begin].view(np.int64), self._values[begin:].view(row)
        self.array: StagedArray = guard.device.staged(self._values.size, self._values.dtype)

    def clear(self) -> None:
        """Have no rows."""
        self._head[:] = 0
        self.array.write(self._values)

    def write(self, candidates: Candidates, write: Writer = EAGER.write_scalars, chosen: int = -1) -> None:
        """Hold these candidates of the next step.

        Args:
            candidates: as many as there is room for, at most.
            write: how they come to the device.
            chosen: the row that is chosen already, -1 for none.
        """
        number, names = len(candidates.rows), self._rows.dtype.names or ()
        self._head[:] = candidates.first, number, self._guard.made + 1, chosen
        for update, name in enumerate(names[: self._updates]):
            self._rows[name][:number] = [scalars[update] for scalars in candidates.rows]
        for name in names[self._updates :]:  # all other scalars are zeros: theta = g
            self._rows[name]["apply"][:number, 0] = candidates.overwrites
        write(self.array, self._values)


def _row_of(launches: Sequence[UpdateArguments]) -> np.dtype:
    """A row of scalars: a field for each launch, with StepScalars for each of its settings; whole words."""
    parts = np.dtype([(str(n), (each.scalars_dtype, (each.settings,))) for n, each in enumerate(launches)], align=True)
    fields = parts.fields
    assert fields is not None
    formats, offsets = [fields[name][0] for name in fields], [fields[name][1] for name in fields]
    itemsize = 8 * -(-parts.itemsize // 8)
    return np.dtype({"names": list(fields), "formats": formats, "offsets": offsets, "itemsize": itemsize})


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
