"""A prepared step: which groups a set of variables is updated in, in which order."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices import Array, Device
from gpu_adam.errors import ArgumentValueError
from gpu_adam.hyperparameters import OWN_SETTINGS, Clip, Cohort, counting
from gpu_adam.kernels import MIXING, UpdateRule, dtype_row
from gpu_adam.nvtx import stage
from gpu_adam.state.adam_state import AdamState
from gpu_adam.step.arguments import Writer
from gpu_adam.step.candidates import Candidates
from gpu_adam.step.capture import Graph
from gpu_adam.step.deferred import DeferredRows
from gpu_adam.step.groups import DenseGroup, SparseGroup
from gpu_adam.step.guard import GUARDING, Guard
from gpu_adam.step.index_errors import IndexErrors
from gpu_adam.step.launches import Launches
from gpu_adam.step.overlap import first_overlap, memory_of
from gpu_adam.step.request import Request
from gpu_adam.step.scalars import Scalars, reciprocal
from gpu_adam.variables import Variable


class Plan:
    """How a set of variables is updated: the groups, and once slots exist the launches.

    There is one group for all dense gradients of a device, a dtype and a dtype of their variables, and one for each
    sparse gradient. A variable that comes several times is updated that often, in order: its second gradient waits for
    a second round of launches, so that no launch has two threads at one element.

    Args:
        rule: of the update.
        variables: of each pair, in order.
        groups: of them.
        whole: the plan of which this one is a part, if it is one.

    Attributes:
        rule, variables, groups: as above.
        index_errors: the note of rows out of range of each variable with a sparse gradient.
        deferred: what rows have missed, for each variable with a deferred update.
        constrained: the variables with a constraint, which is applied after the update.
        cohorts: those among the variables.
        counts: the calls that count the step of each of them.
    """

    def __init__(
        self,
        rule: UpdateRule,
        variables: Sequence[Variable],
        groups: Sequence[DenseGroup | SparseGroup],
        whole: Plan | None = None,
    ) -> None:
        self.rule, self.variables, self.groups, self._whole = rule, list(variables), list(groups), whole
        # One group has all pairs, in order: their addresses are its own.
        self._takes_all = len(self.groups) == 1
        self._checked = _Checked(None, [], [], is_whole=False)
        self.devices: list[Device] = list(dict.fromkeys(group.device for group in self.groups))
        self.constrained = [v for v in dict.fromkeys(self.variables) if v.constraint is not None]
        self._kinds = [
            [(kernels.DTYPES[group.layout.dtype].real_dtype, settings) for settings in group.settings]
            for group in self.groups
        ]
        self._different = list(dict.fromkeys(itertools.chain(*self._kinds)))
        self.cohorts = list(dict.fromkeys(each for _, each in self._different if isinstance(each, Cohort)))
        self.counts = counting(self.cohorts, 1)
        self.index_errors: dict[Variable, IndexErrors] = {}
        self.deferred: dict[Variable, DeferredRows] = {}
        self._launches: Launches | None = None

    @classmethod
    def of(cls, request: Request, rule: UpdateRule, state: AdamState) -> Plan:
        """The plan of a step that is asked for.

        Args:
            request: the step.
            rule: of the update.
            state: has the variables' settings.

        Raises:
            ArgumentValueError: a dtype that is not computed with; variables that overlap; slices for a variable without
                rows; a global norm or a guarded step over several devices; a variable with a constraint that comes
                twice or gets slices; one whose rows another optimizer defers.
        """
        variables, sparse, dtypes = request.variables, request.sparse, request.gradient_dtypes
        check_updatable(variables, request.news.moved, rule)
        state.check_undivided(variables)
        rounds: dict[Variable, int] = {}
        members: dict[Any, list[int]] = {}
        for number, variable in enumerate(variables):
            turn = rounds[variable] = rounds.get(variable, -1) + 1
            part = 0 if state.exchange is None else state.exchange.part_of(variable)
            kind = part, variable.device, variable.dtype, dtypes[number]
            key = (turn, number) if sparse[number] else (turn, *kind)
            members.setdefault(key, []).append(number)
        groups = [
            (SparseGroup if sparse[numbers[0]] else DenseGroup)(
                [variables[n] for n in numbers],
                numbers,
                rule,
                [state.settings_of(variables[n]) for n in numbers],
                dtypes[numbers[0]],
            )
            for _, numbers in sorted(members.items(), key=lambda item: item[0][0])
        ]
        plan = cls(rule, variables, groups)
        plan._check_devices()
        for variable in plan.constrained:
            _check_constrained(
                variable, [is_sparse for v, is_sparse in zip(variables, sparse, strict=True) if v is variable]
            )
        return plan

    def _check_devices(self) -> None:
        """Raise ArgumentValueError where the variables must lie on one device, and do not."""
        places = sorted({device.name for device in self.devices})
        if self.rule.norm == "global" and len(places) > 1:
            raise ArgumentValueError(
                "global_clipnorm", "must be taken over one device", places, "step each device's variables apart"
            )
        if self.rule.guarded and len(self.devices) > 1:
            raise ArgumentValueError(
                "the variables of grads_and_vars",
                f"must lie on one device for a step with {GUARDING}",
                places,
                "step each device's variables apart",
            )

    def part(self, numbers: Sequence[int]) -> Plan:
        """The plan of a step over some of the variables, each at most once, all of them with dense gradients.

        Nothing is checked again, and the launches take their tables' rows from those of this plan.

        Args:
            numbers: of the variables, in the order of the step's pairs.
        """
        asked, groups = np.array(numbers), list[DenseGroup | SparseGroup]()
        for group in self.groups:
            assert isinstance(group, DenseGroup)
            places = np.full(len(self.variables), -1)
            places[group.numbers] = np.arange(len(group.numbers))
            own = np.flatnonzero(places[asked] >= 0)
            if len(own):
                groups.append(group.part(places[asked[own]].tolist(), own.tolist()))
        # As they would be without a whole: a norm's partial sums are added launch after launch.
        groups.sort(key=lambda group: int(group.numbers[0]))
        return Plan(self.rule, [self.variables[n] for n in numbers], groups, self)

    @stage("check")
    def check(self, pairs: Sequence[Any], addresses: np.ndarray) -> list[Any]:
        """The gradients of each group, ready to bind. Raises on the first that does not fit; nothing has changed then.

        Args:
            pairs: those of the step that have a gradient.
            addresses: where each pair's gradient lies, 0 where that is not known. The same array object as in an
                earlier step means the same places.
        """
        last = self._checked
        if addresses is not last.addresses:
            parts = [addresses] if self._takes_all else [addresses[group.numbers] for group in self.groups]
            last = _Checked(addresses, parts, [None] * len(parts), is_whole=False)
        elif last.is_whole:
            return last.gradients
        found = [
            group.check(pairs, part) if known is None else known
            for group, part, known in zip(self.groups, last.parts, last.gradients, strict=True)
        ]
        known = [gradients if gradients.may_be_remembered else None for gradients in found]
        is_whole = None not in known
        self._checked = last._replace(gradients=found if is_whole else known, is_whole=is_whole)
        return found

    @stage("read")
    def scalars(self, now: Scalars, clip: Clip, scale: float = 1.0, left_out: int = 0) -> list[list[tuple[Any, ...]]]:
        """The scalars of each group for each of its settings, in its dtype.

        Args:
            now: the hyperparameters' values.
            clip: how gradients are clipped.
            scale: by which the gradients are to be divided.
            left_out: of the steps that each cohort has counted.

        Raises:
            ArgumentValueError: a value breaks its rule in that dtype.
        """
        if len(self._different) == 1:  # then a group has no more than one
            dtype, settings = self._different[0]
            if settings is not OWN_SETTINGS:
                now = now.under(settings, left_out)
            unscale = 1.0 if scale == 1.0 else reciprocal(scale, dtype)
            return [[(*now.for_real(dtype), clip.value_in(dtype), unscale, 1.0)]] * len(self._kinds)
        computed: dict[Any, tuple[Any, ...]] = {}
        by_kind = {}
        for kind in self._different:
            dtype, settings = kind
            key = dtype, settings.present if isinstance(settings, Cohort) else settings
            if key not in computed:
                own = now.under(settings, left_out).for_real(dtype)
                computed[key] = (*own, clip.value_in(dtype), reciprocal(scale, dtype), 1.0)
            by_kind[kind] = computed[key]
        return [[by_kind[kind] for kind in kinds] for kinds in self._kinds]

    def candidates(self, now: Scalars, rate: Any, clip: Clip, scale: float, counts: range) -> Candidates:
        """The scalars of a guarded step for each number of steps that may be done before it.

        Args:
            now: the hyperparameters' values.
            rate: the stored learning rate.
            clip: how gradients are clipped.
            scale: by which the gradients are to be divided.
            counts: these numbers; the largest one is what the counters say.
        """
        rows = [self.scalars(now.at(count, rate), clip, scale, counts[-1] - count) for count in counts]
        return Candidates(counts[0], rows, [now.flavour.overwrites_at(count + 1) for count in counts])

    def constrain(self) -> None:
        """Apply the variables' constraints, one after the other."""
        for variable in self.constrained:
            variable.constrain()

    @property
    def own_launches(self) -> Launches | None:
        """The launches of steps that are no part of a graph, if they exist."""
        return self._launches

    def launches(
        self, state: AdamState, graph: Graph | None, checked: Sequence[Any], guard: Guard | None = None
    ) -> Launches:
        """The launches, with memory of their own for a graph; made by the first call, when the slots exist.

        Args:
            state: has the slots.
            graph: what the step is captured in, if it is.
            checked: the gradients of each group.
            guard: of a rule that is guarded; the same one in all steps.
        """
        own = self._launches
        if own is None:
            own = self._make_launches(state, guard)
        if graph is None:
            return own
        if self.deferred:  # a log has room for so many steps, which nobody counts where a graph is the user's
            rule, remedy = "must do without deferred rows", "use Adam.capture, or set sparse_update='dense'"
            raise ArgumentValueError("a step captured in a graph", rule, "one with them", remedy)
        launches = own.take_for_graph(checked)
        graph.kept.append(launches)
        return launches

    def launches_for_replays(
        self, state: AdamState, guard: Guard | None, clip: Clip, divisor: float, write: Writer
    ) -> Launches:
        """New launches for a graph whose scalars are staged before each replay.

        Args:
            state: has the slots.
            guard: as for `launches`.
            clip: as the following ones, see `Launches.for_replays`.
            divisor: see there.
            write: see there.
        """
        return (self._launches or self._make_launches(state, guard)).for_replays(clip, divisor, write)

    def _make_launches(self, state: AdamState, guard: Guard | None) -> Launches:
        # Between two updates of one variable in a step nobody brings rows up to date.
        whole = {each for group in self.groups if isinstance(group, DenseGroup) for each in group.variables}
        for group in self.groups:
            if isinstance(group, SparseGroup):
                variable = group.variable
                errors = self.index_errors[variable] = state.index_errors.get(variable) or IndexErrors(variable)
                if state.defers(variable) and variable not in whole:
                    real_dtype = kernels.DTYPES[group.layout.dtype].real_dtype
                    known = state.deferred.get(variable)
                    self.deferred[variable] = known or DeferredRows(variable, state, real_dtype, errors)
        if self._whole is None:
            self._launches = Launches.of(self.groups, self.rule, state, self.index_errors, self.deferred, guard)
        else:
            self._launches = self._whole.launches(state, None, (), guard).part(self.groups, state, guard)
        return self._launches


def _check_constrained(variable: Variable, sparse: Sequence[bool]) -> None:
    """Raise ArgumentValueError where a variable with a constraint gets slices, or several gradients."""
    got, remedy = None, ""
    if any(sparse):  # as in the reference
        got, remedy = "IndexedSlices", "pass an array, or make the variable without a constraint"
    elif len(sparse) > 1:  # between whose updates the constraint would have to be applied
        got, remedy = f"{len(sparse)} gradients", "pass their sum, or do one step for each"
    if got is not None:
        rule = "must be a single dense one, for the variable has a constraint"
        raise ArgumentValueError(f"gradient of variable {variable.name!r}", rule, got, remedy)


class _Checked(NamedTuple):
    """Gradients of an earlier step, which need no further look where they lie still.

    Attributes:
        addresses: of all pairs.
        parts: the addresses of each group.
        gradients: the checked gradients of each group; None for those that must be looked at in every step.
        is_whole: whether there is no None among them.
    """

    addresses: np.ndarray | None
    parts: list[np.ndarray]
    gradients: list[Any]
    is_whole: bool


def check_updatable(variables: Sequence[Variable], moved: Mapping[Variable, Array], rule: UpdateRule) -> None:
    """Raise ArgumentValueError for a dtype that the rule does not update, and for variables that share memory.

    Args:
        variables: the variables.
        moved: the arrays that some of them are about to move to.
        rule: of the update.
    """
    by_place: dict[str, list[Variable]] = {}  # several host devices share one memory
    dtypes: set[np.dtype] = set()
    for variable in dict.fromkeys(variables):
        if variable.dtype not in dtypes:
            _check_dtype(variable, rule)
            dtypes.add(variable.dtype)
        by_place.setdefault(variable.device.name, []).append(variable)
    for there in by_place.values():
        arrays = [moved.get(variable, variable._storage) for variable in there]
        found = first_overlap(memory_of(there[0].device, arrays))
        if found is not None:
            one, other, shared = found
            raise ArgumentValueError(
                f"variables {there[one].name!r} and {there[other].name!r}",
                "must not overlap in memory",
                f"{shared} shared bytes",
                "pass arrays that own their memory, or one variable for both",
            )


def _check_dtype(variable: Variable, rule: UpdateRule) -> None:
    """Raise ArgumentValueError where the rule does not update variables of that dtype."""
    argument, name = f"variable {variable.name!r}", variable.dtype.name
    dtype_row(variable.dtype, argument)
    for keyword, is_asked, fitting in (
        ("slot_dtype", rule.slot_dtype is not None, MIXING),
        ("master_weights", rule.master, MIXING),
        ("stochastic_rounding", rule.stochastic, ("bfloat16",)),
    ):
        if is_asked and name not in fitting:
            rule_text = f"must have dtype {' or '.join(fitting)} with {keyword}"
            raise ArgumentValueError(argument, rule_text, name, f"update it by an optimizer without {keyword}")
