"""The launches of a step: what is bound to them, and the calls that enqueue them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from gpu_adam.devices import Array
from gpu_adam.errors import ArgumentValueError
from gpu_adam.hyperparameters import Clip
from gpu_adam.kernels import UpdateRule
from gpu_adam.state.adam_state import AdamState, Copies
from gpu_adam.step.arguments import CAPTURED, EAGER, Use, Writer, replayed
from gpu_adam.step.averages import overwriting_launches
from gpu_adam.step.candidates import Candidates, GuardedScalars
from gpu_adam.step.deferred import DeferredRows, DeferredTable
from gpu_adam.step.deferred import make_ready as make_logs_ready
from gpu_adam.step.dense import DenseLaunch, DenseTable, rows_of
from gpu_adam.step.exchange import Exchange
from gpu_adam.step.groups import DenseGroup, SparseGroup
from gpu_adam.step.guard import Guard
from gpu_adam.step.index_errors import IndexErrors
from gpu_adam.step.norms import UpdateNorms, norm_passes
from gpu_adam.step.overlap import Intervals, memory_of
from gpu_adam.step.scalars import reciprocal
from gpu_adam.step.sparse import EmbeddingTable, SparseLaunch, Table
from gpu_adam.uninterrupted import Call
from gpu_adam.variables import Variable

LaunchScalars = Sequence[Sequence[tuple[Any, ...]]] | Candidates
"""The scalars of a step, for each update, for each of its settings; of a guarded one, its candidates."""


class Launches:
    """The launches of a plan.

    Where a later step may be captured, its launches are ready before it: many a capture forbids to allocate memory.

    Args:
        updates: one for each group, in order.
        written: for each place by name, the memory that the launches write. Several host devices share one.
        rule: of the update.
        kept: the variables' and slots' arrays, and pools, kept alive: the launches have addresses only.
        captures: whether the launches of a graph are made ready.
        pools: where memory of the updates' own comes from; kept as well.
        behind: what rows of variables have missed; the same mapping for ever.
        exchange: what other ranks do in the step, if there are some.
        guard: of a guarded step.
        use: what the launches are made for.
        origin: of launches in a graph, those that they were made from.
        copies: by which a guarded step overwrites variables where its candidates have it.

    Attributes:
        deferred: the tables of the deferred updates.
        counts: the calls that count the step of each of them; to be made with the launches.
    """

    def __init__(
        self,
        updates: Sequence[DenseLaunch | SparseLaunch],
        written: dict[str, Intervals],
        rule: UpdateRule,
        kept: Sequence[Any],
        *,
        behind: Mapping[Variable, DeferredRows],
        exchange: Exchange | None,
        captures: bool,
        pools: Sequence[Any] = (),
        guard: Guard | None = None,
        use: Use = EAGER,
        origin: Launches | None = None,
        copies: Copies = (),
    ) -> None:
        self._updates, self._written, self._rule, self._guard = list(updates), written, rule, guard
        self._kept, self._pools, self._behind = [*kept, *pools], list(pools), behind
        tables = {update: update.table for update in self._updates}
        self.deferred = [table for table in tables.values() if isinstance(table, DeferredTable)]
        self.counts = [table.rows.count_call for table in self.deferred]
        self._whole_arrays = [update for update, table in tables.items() if not isinstance(table, DeferredTable)]
        self._norms = norm_passes(self._updates, rule, exchange)
        self._exchange = exchange
        self._parts = [] if exchange is None else [exchange.part_of(each.group.variables[0]) for each in self._updates]
        self._bound: Sequence[Any] | None = None
        self._captures = captures
        self._graph_launches: Launches | None = None
        self._guarded: GuardedScalars | None = None
        self._update_norms: UpdateNorms | None = None
        self._copies, self._overwriting = copies, overwriting_launches(copies)
        if guard is not None:
            own, others = ([each.arguments for each in every] for every in (self._updates, self._overwriting))
            self._guarded = GuardedScalars(
                *(guard, own, others),
                searched=rule.searched,
                use=use,
                origin=None if origin is None else origin._guarded,
            )
            if rule.measured:
                self._update_norms = UpdateNorms(self._updates, rule, guard.update_totals)

    @classmethod
    def of(
        cls,
        groups: Sequence[DenseGroup | SparseGroup],
        rule: UpdateRule,
        state: AdamState,
        index_errors: Mapping[Variable, IndexErrors],
        deferred: Mapping[Variable, DeferredRows],
        guard: Guard | None,
    ) -> Launches:
        """The launches of groups whose variables have slots.

        Args:
            groups: of a plan.
            rule: of the update.
            state: has the slots.
            index_errors: where rows out of range are noted, for each variable with a sparse gradient.
            deferred: what rows have missed, for each variable with a deferred update.
            guard: of a guarded step.
        """
        places = {variable: place for place, variable in enumerate(state.variables)} if rule.stochastic else {}
        updates: list[DenseLaunch | SparseLaunch] = []
        memory: dict[str, list[np.ndarray]] = {}
        kept: list[Array] = []
        for group in groups:
            slots = state.slots_at(group.variables, rule)
            own_places = [places.get(variable, 0) for variable in group.variables]
            columns = [[variable._storage for variable in group.variables], *slots.values()]
            written = [memory_of(group.device, column) for column in columns]
            memory.setdefault(group.device.name, []).extend(written)
            kept += itertools.chain(*columns)
            if isinstance(group, SparseGroup):
                rows = deferred.get(group.variable)
                (place,) = own_places
                table: Table = EmbeddingTable(group, slots, place)
                if rows is not None:
                    table = DeferredTable(group, slots, place, rows)
                updates.append(SparseLaunch(group, table, index_errors[group.variable]))
            else:
                updates.append(DenseLaunch(group, DenseTable(group, rows_of(group, slots, own_places))))
        written_on = {place: Intervals(np.concatenate(parts)) for place, parts in memory.items()}
        captures = not deferred and any(group.device.captures for group in groups)
        others: dict[str, Any] = {"behind": state.deferred, "exchange": state.exchange, "guard": guard}
        others["copies"] = _copies(groups, rule, state)
        return cls(updates, written_on, rule, kept, captures=captures, **others)

    def part(self, groups: Sequence[DenseGroup | SparseGroup], state: AdamState, guard: Guard | None) -> Launches:
        """The launches of groups that are parts of these launches' groups. They keep all of these launches' memory."""
        tables = {id(update.group): update.table for update in self._updates if isinstance(update, DenseLaunch)}
        updates: list[DenseLaunch | SparseLaunch] = []
        for group in groups:
            assert isinstance(group, DenseGroup)
            assert group.origin is not None
            origin, places = group.origin
            updates.append(DenseLaunch(group, DenseTable(group, tables[id(origin)].rows[places])))
        shared = self._written, self._rule, self._kept
        others: dict[str, Any] = {"behind": self._behind, "exchange": self._exchange, "guard": guard}
        others["copies"] = _copies(groups, self._rule, state)
        return Launches(updates, *shared, captures=self._captures, **others)

    def take_for_graph(self, checked: Sequence[Any]) -> Launches:
        """The same launches for a captured graph, with memory of their own.

        Addresses of gradients that lie in device memory already become the graph's, which then copies nothing.

        Args:
            checked: the gradients that the graph is going to read.
        """
        launches, self._graph_launches = self._graph_launches, None
        if launches is None:
            launches = self._for_graph()
        self._bound = None
        self._kept += launches._pools  # of the memory that is taken in exchange
        for own, update, gradients in zip(self._updates, launches._updates, checked, strict=True):
            if isinstance(own, DenseLaunch) and isinstance(update, DenseLaunch) and own.is_bound_to(gradients):
                update.take_addresses_of(own)
        return launches

    def _for_graph(self) -> Launches:
        pools = []
        with ExitStack() as stack:
            # Made ahead they take memory as every array does: a later step uses some of it in exchange. In a capture
            # memory of the common pool would be a node of the graph, or forbidden.
            for device in {update.device for update in self._updates if update.device.is_capturing()}:
                pool, memory = device.private_pool()
                pools.append(pool)
                stack.enter_context(memory)
            return self._again(CAPTURED, pools)

    def for_replays(self, clip: Clip, divisor: float, write: Writer) -> Launches:
        """The same launches for a captured graph whose scalars are staged before each replay; those of sums stay.

        Args:
            clip: the bounds, which the kernels of a norm take as arguments.
            divisor: by which gradients are divided, which they take too.
            write: gives an array other contents that are no part of the graph.
        """
        launches = self._again(replayed(write, is_constant=self._rule.accumulates))
        for update in launches._updates:
            numbers = update.arguments.scalars
            real_dtype = numbers["clip_value"].dtype.name
            numbers["clip_value"], numbers["unscale"] = clip.value_in(real_dtype), reciprocal(divisor, real_dtype)
        return launches

    def _again(self, use: Use, pools: Sequence[Any] = ()) -> Launches:
        updates = [update.for_graph(use) for update in self._updates]
        shared = self._written, self._rule, self._kept
        others: dict[str, Any] = {"behind": self._behind, "exchange": self._exchange, "guard": self._guard}
        # A graph of the user's would overwrite variables at each launch that nobody has staged.
        others["copies"] = () if use is CAPTURED else self._copies
        launches = Launches(updates, *shared, captures=False, pools=pools, use=use, origin=self, **others)
        for norm, own in zip(launches._norms, self._norms, strict=True):
            norm.reserve(own.capacity)
        return launches

    def _capacities(self) -> list[int]:
        return [part.capacity for parts in (self._updates, self._norms) for part in parts]

    def _settle_whole_arrays(self, tables: Sequence[DeferredTable]) -> None:
        """Bring up to date what is going to be updated as a whole, unless these tables' steps come first."""
        for update in self._whole_arrays:
            for variable in update.group.variables:
                if variable._behind is None:
                    continue
                if any(variable._behind is table.rows for table in tables):
                    rule = "must not be updated as a whole behind a deferred step of the same captured function"
                    remedy = "capture the two steps apart"
                    raise ArgumentValueError(f"variable {variable.name!r}", rule, "such a step", remedy)
                variable._behind.settle()

    def make_ready(self) -> None:
        """What `make_ready` does for several steps, for a step by itself: nothing, as long as no rows are deferred."""
        if self._behind:
            make_ready([self])

    def bind(self, pairs: Sequence[Any], checked: Sequence[Any]) -> None:
        """Use these gradients of a step's pairs.

        A gradient in memory that the step writes is copied first: the memory may be another gradient's variable.
        """
        if checked is not self._bound:
            self._bound, is_copied = None, False
            for update, gradients in zip(self._updates, checked, strict=True):
                if update.is_bound_to(gradients):
                    continue
                overlapped = self._written[update.device.name].overlapped(*gradients.reads())
                for index in () if overlapped is None else overlapped:
                    gradients, is_copied = gradients.with_copy(pairs, int(index)), True  # noqa: PLW2901
                update.bind(gradients)
            for norm in self._norms:
                norm.bind()
            if not is_copied and all(gradients.may_be_remembered for gradients in checked):
                self._bound = checked
        if self._captures and (self._graph_launches is None or self._bound is None):
            self._have_graph_launches()

    def _have_graph_launches(self) -> None:
        """Make the launches of a graph, or larger ones."""
        ready = self._graph_launches
        if ready is None or ready._capacities() != self._capacities():
            self._graph_launches = self._for_graph()

    def release(self) -> None:
        """Let go of arrays that were made of gradients, once all that reads them is enqueued.

        A device gives their memory out again in the order of its stream.
        """
        if self._bound is None:
            for update in self._updates:
                update.release()

    def set_scalars(self, scalars: LaunchScalars) -> None:
        """Let the next step use these scalars."""
        if isinstance(scalars, Candidates):
            assert self._guarded is not None
            self._guarded.write(scalars)
            return
        for number, update in enumerate(self._updates):
            update.arguments.set_scalars(scalars[number])

    def stage(self, scalars: LaunchScalars) -> None:
        """Let the graphs of these launches use these scalars from now on."""
        if isinstance(scalars, Candidates):
            assert self._guarded is not None
            self._guarded.stage(scalars)
            return
        for update, own in zip(self._updates, scalars, strict=True):
            update.arguments.stage(own)

    def _update_calls(self) -> list[Call]:
        """Those of the updates; with other ranks each part's after its gradients, and before it is handed on."""
        calls, exchange = list[Call](), self._exchange
        for number, update in enumerate(self._updates):
            if exchange is None:
                calls += update.calls()
            else:
                part = self._parts[number]
                calls += [*exchange.arriving([part]), *update.calls(), *exchange.departing(part)]
        return calls if exchange is None else calls + exchange.finishing(self._parts)

    def calls(self, clip: Clip) -> list[Call]:
        """The calls that enqueue the whole step with the gradients bound last; to be made at once, and once."""
        calls: list[Call] = []
        if self._guarded is not None:
            calls += self._guarded.begin()
        exchange = self._exchange
        if exchange is not None and self._norms:
            calls += exchange.arriving(self._parts)
        for norm in self._norms:
            calls += norm.calls(clip.limit)
        if self._guarded is not None:
            assert self._guard is not None
            if exchange is not None:
                calls += exchange.adding(self._guard.found)
            calls += self._guarded.end(self._norms)
        calls += self._update_calls()
        if self._overwriting:  # the device alone knows whether it comes to that
            for table in self.deferred:
                calls += table.rows.settle_calls()
        for launch in self._overwriting:
            calls += launch.calls()
        if self._update_norms is not None:
            calls += self._update_norms.calls()
        return calls


def make_ready(steps: Iterable[Launches]) -> None:
    """Bring up to date what launches are going to update as a whole, and let logs have room for all of them.

    Raises:
        ArgumentValueError: a log has no room for so many steps at once; rows that one of the steps leaves behind are
            needed by a later one.
    """
    tables: list[DeferredTable] = []
    for launches in steps:
        if launches._behind:
            launches._settle_whole_arrays(tables)
            tables += launches.deferred
    if tables:
        make_logs_ready(tables)


def _copies(groups: Sequence[DenseGroup | SparseGroup], rule: UpdateRule, state: AdamState) -> Copies:
    """By which a step of these groups overwrites variables, if it is a guarded one."""
    if not (rule.guarded and rule.overwrites):
        return ()
    variables = dict.fromkeys(variable for group in groups for variable in group.variables)
    return state.overwriting_copies(list(variables))
