"""Deferred sparse updates: a step leaves rows without a gradient alone, and they make up for it when they are needed.

Each step of a deferred variable is an entry of a log in device memory (deferred.cu), and each row knows how many of the
entries it has taken. Whoever reads or writes the contents of the variable, or of its slots, has all rows take the rest
first: `DeferredRows` is what stands `Behind` them (gpu_adam/behind.py).
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices import Array
from gpu_adam.devices.base import Launch
from gpu_adam.errors import ArgumentValueError
from gpu_adam.kernels import UpdateRule
from gpu_adam.state.adam_state import AdamState
from gpu_adam.step.arguments import UpdateArguments
from gpu_adam.step.groups import SparseGroup
from gpu_adam.step.index_errors import IndexErrors
from gpu_adam.step.norms import norm_counters
from gpu_adam.step.row_sort import RowSorter
from gpu_adam.uninterrupted import Call, make_all
from gpu_adam.variables import Variable

_SPARE = 64
"""Steps that the log has room for beyond `max_deferral`: of one call, which all are logged before the rows settle."""

_ROWS_AT_ONCE = 2**20
"""Rows that one launch brings up to date at most: an interrupt need not wait for a whole table."""


@functools.cache
def replayed_rule(rule: UpdateRule) -> UpdateRule:
    """What matters of a rule to a row without a gradient; the same object for equal ones."""
    return rule._replace(bounded=False, norm=None, scaled=False, guarded=False, searched=False)


class DeferredRows:
    """Which steps each row of a variable has missed. Behind the variable and its slots.

    Args:
        variable: the variable.
        state: of the optimizer that updates it, and nobody else does.
        real_dtype: of the scalars of its steps.
        errors: where rows out of range are noted.

    Attributes:
        at_once: whether v takes missed steps in one product.
        table: where the variable and its slots lie, for the logged steps.
    """

    def __init__(self, variable: Variable, state: AdamState, real_dtype: str, errors: IndexErrors) -> None:
        self._owner, self._variable, self.at_once = weakref.ref(state), variable, state.replay == "closed_form"
        self._device, self._errors, self._limit = variable.device, errors, state.max_deferral
        device = self._device
        self._last_step = device.zeros(variable.shape[:1], np.dtype(np.int32))
        size = kernels.logged_step(real_dtype).itemsize
        self._steps = device.empty((self._limit + _SPARE) * size, np.dtype(np.uint8))
        log = kernels.struct(kernels.STEP_LOG, 0, 0, device.address(self._steps))
        self._log = device.array(log.view(np.uint8))
        self.last_step, self.log = device.address(self._last_step), device.address(self._log)
        self._count = np.zeros(1, np.int64)  # steps in the log, at most: the device may leave some out
        self.count_call: Call = functools.partial(np.add, self._count, 1, self._count)
        self._lock = threading.RLock()
        self.begin: Call = functools.partial(self._lock.acquire)
        self.end: Call = functools.partial(self._lock.release)
        self.table: DeferredTable | None = None
        self._sorter: RowSorter | None = None
        self._errors_of_reads = IndexErrors(variable)  # which nobody is told of: a row that is not there comes as NaN
        self._of_graphs: list[tuple[Any, RowSorter, DeferredTable]] = []  # that they read and write at replays

    def owner(self) -> AdamState | None:
        """The state of the optimizer that defers the rows; None where there is none any more."""
        state = self._owner()
        return state if state is not None and state.deferred.get(self._variable) is self else None

    def make_ready(self, table: DeferredTable, steps: int) -> None:
        """Let the log have room for steps, and hold steps of this table's rule alone.

        Args:
            table: of the steps.
            steps: how many.

        Raises:
            ArgumentValueError: more than the log has room for.
        """
        own = self.table
        if own is not table:
            if own is not None and not own.has_steps_of(table):
                if not all(of_graph.has_steps_of(table) for _, _, of_graph in self._of_graphs):
                    rule = "must be updated as when a function was captured that gathers its rows"
                    got, remedy = "another kind of update", "do one such step before functions are captured"
                    raise ArgumentValueError(f"variable {self._variable.name!r}", rule, got, remedy)
                self.settle()
            self.table = table
        if self._count[0] >= self._limit or self._count[0] + steps > self._limit + _SPARE:
            self.settle()
            if steps > self._limit + _SPARE:
                rule = f"must come at most {self._limit + _SPARE} times in a step, or in a captured function"
                remedy = "add up its gradients, or raise max_deferral"
                raise ArgumentValueError(f"variable {self._variable.name!r}", rule, steps, remedy)

    def settle(self) -> None:
        """Bring every row up to date; nothing where they are."""
        self._refuse_in_graph()  # also where they are: at the replays they may not be
        if self._count[0]:
            with self._lock:
                for calls in self._settling():
                    make_all(calls)

    def settle_calls(self) -> list[Call]:
        """The calls that do so behind whatever else is enqueued by then; to be made once."""
        return [self.begin, *(call for calls in self._settling() for call in calls), self.end]

    def _settling(self) -> list[list[Call]]:
        """Sequences of calls; after each of them some more rows are up to date, after the last one all are."""
        table = self.table
        return [] if table is None else [*table.replay_calls(), [table.restart_call(), self._reset_call()]]

    def _reset_call(self) -> Call:
        return functools.partial(self._count.fill, 0)

    def bring_up_to_date(self, rows: Array) -> None:
        """Bring these rows up to date; see `gpu_adam.behind.Behind`."""
        table, is_capturing = self.table, self._device.is_capturing()
        if table is None or not (self._count[0] or is_capturing):  # at the replays of a graph rows may be behind
            return
        with self._lock, ExitStack() as stack:
            if is_capturing:
                pool, memory = self._device.private_pool()
                stack.enter_context(memory)
                sorter = self._new_sorter()
                self._of_graphs.append((pool, sorter, table))
            else:
                sorter = self._sorter = self._sorter or self._new_sorter()
            sorter.bind(rows)
            make_all([*sorter.calls(), *table.touch_calls(sorter)])

    def _new_sorter(self) -> RowSorter:
        return RowSorter(self._device, self._variable.shape[0], self._errors_of_reads)

    def _refuse_in_graph(self) -> None:
        if self._device.is_capturing():
            raise ArgumentValueError(
                f"variable {self._variable.name!r}, whose rows are deferred,",
                "must not be read, assigned or updated as a whole while a graph is captured",
                "such a call",
                "take the rows that are needed by gather, or do it outside of the graph",
            )


class DeferredTable:
    """Where a deferred variable and its slots lie (DeferredTable of deferred.cu), and the kernels that update its rows.

    Args:
        group: the variable.
        slots: the array of each slot, alone in a list.
        place: of the variable among all that have slots.
        rows: what each row has missed.

    Attributes:
        rows: as above.
        rule: what the logged steps and this table's ones must have in common.
        counters: of its norm, if it has one.
    """

    tiles = 0  # nothing is measured

    def __init__(
        self, group: SparseGroup, slots: Mapping[str, Sequence[Array]], place: int, rows: DeferredRows
    ) -> None:
        variable, device, layout = group.variable, group.device, group.layout
        self._group, self.rows, self.rule, self._place = group, rows, replayed_rule(group.rule), place
        self._number = variable.shape[0] if variable.size else 0  # rows without elements are none
        row_size = layout.parts * variable.size // self._number if self._number else 1
        self._rows_per_tile = max(1, _tile_size(layout.dtype) // row_size)
        self.counters = norm_counters(device, group.rule, 1)
        self._struct = np.zeros(1, kernels.DEFERRED_TABLE)
        arrays = {"theta": variable._storage, **{name: array for name, (array,) in slots.items()}}
        for name, array in arrays.items():
            self._struct["slots"][name] = device.address(array)
        numbers = {"rows": self._number, "row_size": row_size, "rows_per_tile": self._rows_per_tile, "place": place}
        for name, number in {**numbers, "last_step": rows.last_step, "log": rows.log, "at_once": rows.at_once}.items():
            self._struct[name] = number
        self._kept = list(arrays.values())
        self._all = kernels.struct(kernels.INDICES, 0, 0, 0, self._number)
        self._first = kernels.scalar(0)
        self._replay = self._prepare_replay(self._all, kernels.struct(kernels.KEYS, 0, 0), rows._errors)
        self._restart = device.prepare(kernels.restart_log(layout.dtype, self.rule), [self._struct])
        self._touches: tuple[RowSorter, Launch] | None = None

    def _prepare_replay(self, indices: np.ndarray, keys: np.ndarray, errors: IndexErrors) -> Launch:
        device, layout, null = self._group.device, self._group.layout, kernels.pointer(0)
        scalars = np.zeros(1, kernels.step_scalars(kernels.DTYPES[layout.dtype].real_dtype))
        arguments = [
            indices,
            keys,
            self._first,
            kernels.scalar(0),
            null,
            null,
            scalars,
            null,
            kernels.pointer(device.address(errors.array)),
        ]
        return device.prepare(kernels.deferred(layout.dtype, self.rule), [self._struct, *arguments])

    def has_steps_of(self, other: DeferredTable) -> bool:
        """Whether rows can take the steps of another table by this one's kernels."""
        return self.rule is other.rule and self._place == other._place

    def prepare(self, sorter: RowSorter, values: np.ndarray, arguments: UpdateArguments) -> Launch:
        """See `gpu_adam.step.sparse.Table`."""
        group = self._group
        return group.device.prepare(
            kernels.deferred(group.layout.dtype, group.rule, gradient=group.layout.gradient, staged=arguments.kind),
            [
                *(self._struct, sorter.indices, sorter.keys, kernels.scalar(0), kernels.scalar(1), values),
                *(arguments.factors, arguments.scalars, arguments.staged, sorter.errors),
            ],
        )

    def calls(self, launch: Launch, count: int) -> list[Call]:
        """See `gpu_adam.step.sparse.Table`: the rows with a gradient."""
        return [self.rows.begin, launch.call(self._blocks(count)), self.rows.end]

    def _blocks(self, rows: int) -> int:
        return max(1, -(-rows // self._rows_per_tile))

    def replay_calls(self) -> list[list[Call]]:
        """For some rows after the others the calls that bring them up to date."""
        calls = []
        for first in range(0, self._number, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, self._number - first)
            # A launch reads its arguments when it is enqueued.
            which = functools.partial(self._first.fill, first), functools.partial(self._all["count"].fill, count)
            calls.append([*which, self._replay.call(self._blocks(count))])
        return calls

    def restart_call(self) -> Call:
        """The call that empties the log, when all rows are up to date."""
        return self._restart.call(max(1, min(-(-self._number // kernels.BLOCK_SIZE), 1024)))

    def touch_calls(self, sorter: RowSorter) -> list[Call]:
        """The calls that bring sorted rows up to date."""
        if self._touches is None or self._touches[0] is not sorter:
            self._touches = sorter, self._prepare_replay(sorter.indices, sorter.keys, self.rows._errors_of_reads)
        return [functools.partial(self._first.fill, 0), self._touches[1].call(self._blocks(sorter.count))]


def make_ready(tables: Sequence[DeferredTable]) -> None:
    """Let each log have room for a step of each of these tables.

    Raises:
        ArgumentValueError: more than there is room for.
    """
    for table in tables:
        rows = table.rows
        rows.make_ready(table, len(tables) if len(tables) == 1 else sum(other.rows is rows for other in tables))


def _tile_size(dtype_name: str) -> int:
    """Elements of a tile: a pack for each thread of a block."""
    return kernels.BLOCK_SIZE * max(1, 16 // np.dtype(kernels.DTYPES[dtype_name].wide_dtype).itemsize)
