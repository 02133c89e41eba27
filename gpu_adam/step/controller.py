"""The road of a step: read the request, compute the scalars, make the state fit, enqueue the launches and count.

Whatever raises before the first launch has changed nothing. From the first launch on the step is done and counted:
nothing can interrupt the calls in between (gpu_adam/uninterrupted.py). Constraints of variables are Python of the
user's; they are applied after that, and what they raise comes after a step that is done.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from gpu_adam.conversion import place_of
from gpu_adam.devices import Device, get_device
from gpu_adam.devices.torch_tensors import written_calls
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.hyperparameters import OWN_SETTINGS, Clip, Cohort, Flavour, Settings
from gpu_adam.kernels import UpdateRule
from gpu_adam.nvtx import stage
from gpu_adam.rules import items_of
from gpu_adam.state.adam_state import SCALE, AdamState
from gpu_adam.state.counter import check_countable
from gpu_adam.state.registry import News
from gpu_adam.state.replace import successors
from gpu_adam.state.transaction import Transaction
from gpu_adam.step import request as requests
from gpu_adam.step.capture import Graph, Graphs, check_capturable
from gpu_adam.step.gradients import AS_THEY_ARE, Incoming, OtherDtypeError
from gpu_adam.step.guard import Aim, Guard, Guards
from gpu_adam.step.launches import LaunchScalars, make_ready
from gpu_adam.step.memos import Found, Memo, Memos
from gpu_adam.step.plan import Plan, check_updatable
from gpu_adam.step.replays import (
    CapturedStep,
    Configuration,
    Recording,
    Stepper,
    current_recording,
)
from gpu_adam.step.request import Request
from gpu_adam.step.scalars import Scalars
from gpu_adam.step.staging import StagedSteps, overwriting_in_graph
from gpu_adam.uninterrupted import Call, make_all
from gpu_adam.variables import Variable

_enqueue = stage("update")(make_all)


class Controller:
    """The steps of one optimizer.

    Args:
        state: what the steps change.
        flavour: what they do besides plain Adam.
        configuration: a weak reference to what gives the optimizer's present configuration; without one no captured
            function can have its steps.

    Attributes:
        guards: what is known of its guarded steps.
        staged: its steps in graphs of the user's.
    """

    def __init__(
        self,
        state: AdamState,
        flavour: Flavour,
        configuration: Callable[[], Callable[[], Configuration] | None] | None = None,
    ) -> None:
        self._state, self._flavour, self._configuration = state, flavour, configuration
        self._graphs = Graphs()
        self._memos = Memos(state)
        self.staged = StagedSteps(state)
        self.guards = Guards(state)

    @stage("step")
    def step(
        self,
        grads_and_vars: Iterable[Any],
        rule: UpdateRule,
        hyper: dict[str, Any],
        clip: Clip,
        incoming: Incoming = AS_THEY_ARE,
    ) -> int | None:
        """Update every variable by its gradient and count the step.

        Args:
            grads_and_vars: (gradient, variable) pairs.
            rule: which update; the same object for equal rules.
            hyper: stored hyperparameters by name.
            clip: how the gradients are clipped.
            incoming: what the gradients are multiples of.

        Returns:
            The steps done; None where the host does not know, because the device may leave this step out.

        Raises:
            ArgumentTypeError, ArgumentValueError, SparseIndexError, ConcurrentStepError: nothing has changed then.
        """
        # A list of the step's own: the caller's may be emptied meanwhile, and nothing else keeps the gradients alive.
        pairs = grads_and_vars[:] if type(grads_and_vars) is list else requests.listed(grads_and_vars)
        state, request = self._state, None
        with state.alone():
            memo = recalled = self._memos.last(rule)
            addresses = None if memo is None else memo.read(pairs)
            if memo is None or addresses is None:
                pairs, memo, addresses, request = self._memos.resolve(pairs, rule)
            if (recording := current_recording.get()) is not None:
                return self._record(recording, Found(pairs, memo, addresses, request), hyper, clip, incoming)
            with self._graphs.step(memo.plan.devices) as graph:
                if graph is not None:
                    check_capturable(pairs, is_first=memo.plan.own_launches is None)
                try:
                    gradients = memo.plan.check(pairs, addresses)
                except OtherDtypeError:
                    pairs, memo, addresses, request = self._memos.resolve_anew(pairs, rule)
                    gradients = _checked_anew(pairs, memo, addresses, graph)
                plan = memo.plan
                guard = self._guard_of(plan, graph) if rule.guarded or self.guards.last is not None else None
                done = check_countable(state.counter)
                now = Scalars(hyper, done, self._flavour) if guard is None else self._evaluated(hyper, done)
                if now.are_called:
                    done = self._checked_after_calls(pairs, memo, addresses)
                rate = hyper["learning_rate"]
                done, scalars, aim = self._scalars(plan, now, rate, clip, incoming, done, guard, graph)
                if request is not None and request.without:
                    _warn(request.without)
                with Transaction(state) as change:
                    if request is not None or guard is not None:
                        self._make_fit(change, request, rule, guard)
                    launches = plan.launches(state, graph, gradients, guard)
                    change.note(plan.index_errors, plan.deferred)
                    launches.make_ready()
                    launches.bind(pairs, gradients)
                    launches.set_scalars(scalars)
                    count = functools.partial(state.counter._storage.fill, done + 1)
                    report = [] if guard is None or aim is None or graph else guard.done_calls(plan.cohorts, aim)
                    calls = [*launches.calls(clip), *self._overwriting(plan, done + 1, graph), *report, count]
                    # torch's tensors first: the processor's caches have them still, until the host's launches.
                    _enqueue(
                        [*memo.written_calls, *calls, *plan.counts, *launches.counts, *incoming.taken, *change.commit]
                    )
                if graph is None:
                    launches.release()
                    self.staged.forget()
                else:
                    self._note_captured(memo, clip, incoming, done, aim)
                plan.constrain()
            if memo is not recalled:
                self._memos.remember(memo, request)
            return done + 1 if guard is None or not guard.is_unsure else None

    def _overwriting(self, plan: Plan, step: int, graph: Graph | None) -> Sequence[Call]:
        """The calls that overwrite variables by their averages at the end of step t, where that is asked for.

        Launches of guarded steps do so themselves.
        """
        if not self._flavour.overwrites_at(step):
            return ()
        if graph is not None:
            raise overwriting_in_graph()
        return () if plan.rule.guarded else self._state.overwriting_calls(plan.variables)

    def _ensure_own(self, change: Transaction, device: Device | None) -> None:
        """Create what belongs to no variable: the counter, and a loss scale on the device if there is one."""
        change.ensure_counter()
        if self._flavour.loss_scale is not None and device is not None:
            change.ensure_loss_scale(device, self._flavour.loss_scale.initial)

    def _make_fit(self, change: Transaction, request: Request | None, rule: UpdateRule, guard: Guard | None) -> None:
        """Let the state have what a step needs, unless one like it was done before, and the guard find it."""
        if request is not None:
            self._ensure_own(change, request.variables[0].device)
            change.adopt(request.news)
            change.ensure_slots(request.variables, rule)
        if guard is not None:
            guard.find_loss_scale(self._state.own)

    def _guard_of(self, plan: Plan, graph: Graph | None) -> Guard | None:
        """The guard of a step that begins, if it has one."""
        guard = self.guards.of(plan.devices[0]) if plan.rule.guarded else None
        if graph is None:
            self.guards.begin(guard, plan.cohorts)
        elif self.guards.is_unsure:
            rule, got = "must begin with a count that is known", "steps before it that may have been left out"
            remedy = "read iterations before the capture, which waits for them"
            raise ArgumentValueError("a step captured in a graph", rule, got, remedy)
        return guard

    def _evaluated(self, hyper: dict[str, Any], done: int) -> Scalars:
        """The scalars of a guarded step."""
        with self.guards.evaluating():
            return Scalars(hyper, done, self._flavour)

    def _scalars(
        self,
        plan: Plan,
        now: Scalars,
        rate: Any,
        clip: Clip,
        incoming: Incoming,
        done: int,
        guard: Guard | None,
        graph: Graph | None,
    ) -> tuple[int, LaunchScalars, Aim | None]:
        """How many steps are done, at most, what launches take for the next one, and how it is decided if guarded."""
        if guard is None:
            now.iterations = done
            return done, plan.scalars(now, clip, incoming.divisor), None
        aim = guard.aim(incoming, self._flavour)
        if graph is not None:
            graph.kept.append(aim)
        # In a capture nobody may ask what has come from the device, and nothing is missing either.
        counts = guard.counts(self._state.counter) if graph is None else range(done, done + 1)
        return counts[-1], plan.candidates(now, rate, clip, aim.number, counts), aim

    def loss_scale(self) -> Variable:
        """The scale of an optimizer with a loss scale; on its variables' device or, before it has any, the default one.

        Raises:
            ConcurrentStepError: a call of the optimizer is at work, and the scale does not exist yet.
        """
        found = self._state.own.get(SCALE)
        if found is not None:
            return found
        variables = self._state.variables
        with self._state.alone(is_brief=True), self._outside(), Transaction(self._state) as change:
            self._ensure_own(change, variables[0].device if variables else get_device())
        return self._state.own[SCALE]

    def _note_captured(self, memo: Memo, clip: Clip, incoming: Incoming, done: int, aim: Aim | None) -> None:
        plan = memo.plan
        assert plan.own_launches is not None
        fixed = memo.written_calls, clip, incoming.divisor, self._state.layout, aim
        self.staged.note(CapturedStep(plan, plan.own_launches, *fixed), done)

    def stage(self) -> int | None:
        """Write the scalars of the next step to where the user's graphs read them, and count it.

        Returns:
            The steps done; None where the host does not know.
        """
        self._state.raise_error_of_save()
        with self._state.alone():
            return self.staged.stage(self.stepper())

    def stepper(self) -> Stepper:
        """The optimizer, for what is captured of it."""
        if self._configuration is None:
            rule, remedy = "must make steps of gpu_adam.Adam alone", "capture the others by torch.cuda.graph, say"
            raise ArgumentValueError("the captured function", rule, f"one of {self._state.name!r}", remedy)
        configuration = self._configuration()
        assert configuration is not None, "the optimizer is at work"
        return Stepper(self._state, self._flavour, configuration, self.guards, self.staged)

    def _record(
        self, recording: Recording, found: Found, hyper: dict[str, Any], clip: Clip, incoming: Incoming
    ) -> int | None:
        """Enqueue a step for the replays of a captured function, and count nothing; the number that it will have.

        What is created for it, like slots, is no part of the graph. A call that adds to sums is counted: the sums are
        the function's own, and its replays count only steps that use them.
        """
        state, plan = self._state, found.memo.plan
        stepper = None if plan.rule.accumulates else self.stepper()
        recording.check(plan, stepper)
        pairs, memo, gradients, request = self._checked_for_graph(found)
        plan, done = memo.plan, check_countable(state.counter)
        if request is not None and request.without:
            _warn(request.without)
        guard = aim = None
        if plan.rule.guarded:
            with recording.outside():
                guard = self.guards.of(plan.devices[0])
            aim = guard.aim(incoming, self._flavour)  # within: a flag or scale is cast anew at each replay
        with Transaction(state) as change:
            with self._outside():
                self._make_fit(change, request, plan.rule, guard)
                launches = plan.launches_for_replays(state, guard, clip, incoming.divisor, recording.write_outside)
                recording.check_deferred(state, plan.deferred)
                change.note(plan.index_errors, plan.deferred)
                make_ready([*(step.launches for _, step in recording.steps), launches])
            launches.bind(pairs, gradients)
            ending = [*incoming.taken, *change.commit]
            if stepper is None:
                launches.set_scalars(plan.scalars(Scalars(hyper, done), clip, incoming.divisor))
                ending.append(functools.partial(state.counter._storage.fill, done + 1))
            make_all([*launches.calls(clip), *ending])
        if stepper is None:
            recording.kept.append(launches)
            number = done + 1
        else:
            step = CapturedStep(plan, launches, memo.written_calls, clip, incoming.divisor, state.layout, aim)
            number = recording.add(stepper, step)
        plan.constrain()
        self._memos.remember(memo, request)
        return None if aim is not None and aim.may_be_left_out else number

    def check(self, grads_and_vars: Iterable[Any], rule: UpdateRule) -> None:
        """Raise what a step would raise of its pairs; nothing changes."""
        pairs = requests.listed(grads_and_vars)
        with self._state.alone(is_brief=True):
            self._checked(self._memos.resolve(pairs, rule))

    def _checked_for_graph(self, found: Found) -> tuple[Sequence[Any], Memo, list[Any], Request | None]:
        """What is known of a step, with its gradients, ready to bind."""
        check_capturable(found.pairs, is_first=False)
        return self._checked(found)

    def _checked(self, found: Found) -> tuple[Sequence[Any], Memo, list[Any], Request | None]:
        pairs, memo, addresses, request = found
        try:
            return pairs, memo, memo.plan.check(pairs, addresses), request
        except OtherDtypeError:
            pairs, memo, addresses, request = self._memos.resolve_anew(pairs, memo.rule)
            return pairs, memo, _checked_anew(pairs, memo, addresses, None), request

    def _outside(self) -> AbstractContextManager[Any]:
        """A context in which what is created is no part of a captured function, which undoes it where it fails."""
        recording = current_recording.get()
        if recording is None:
            return nullcontext()
        recording.note(self._state, self._memos.forget)
        return recording.outside()

    def _checked_after_calls(self, pairs: Sequence[Any], memo: Memo, addresses: np.ndarray) -> int:
        """The number of steps done, once callables have been called, which may have changed it.

        Raises:
            ArgumentValueError: the memory of a variable or gradient does not lie where it was checked.
        """
        again = memo.read(pairs)
        if again is not addresses and (addresses.any() if again is None else not np.array_equal(again, addresses)):
            rule = "must not move or resize a variable or gradient of the step that calls it"
            raise ArgumentValueError("a callable hyperparameter", rule, "other memory", "do so between steps")
        return check_countable(self._state.counter)

    def overwrite_by_averages(self, objects: Iterable[Any] | None) -> None:
        """Overwrite variables, all those with an average if none are named, by their averages."""
        with self._state.alone():
            if objects is None:
                variables = list(self._state.slots.get("average", ()))
            else:
                listed = enumerate(_in_order(objects, "var_list"))
                variables = [self._known(obj, f"var_list[{number}]", News()) for number, obj in listed]
            for variable in variables:
                self._state.slot(variable, "average")  # which raises where there is none
            self._state.check_undivided(variables)
            arrays = self._state.registry.arrays(variables)
            news = self._news_of(arrays)
            with Transaction(self._state) as change:
                change.adopt(news)
                make_all([*self._state.overwriting_calls(variables), *written_calls(arrays), *change.commit])
            self._memos.drop_what_moved()

    def set_group(self, objects: Iterable[Any], rule: UpdateRule, given: Mapping[str, Any]) -> None:
        """Let the updates of variables take other numbers than the optimizer's; new ones are built."""
        OWN_SETTINGS.updated(given)
        settings = self._state.settings

        def set_each(change: Transaction, found: Sequence[Variable]) -> None:
            before = {variable: settings.get(variable, OWN_SETTINGS) for variable in found}
            change.set_settings({v: each.updated(given) for v, each in before.items() if isinstance(each, Settings)})

        self._build(objects, rule, "variables", set_each)

    def set_cohorts(self, objects: Sequence[Any], rule: UpdateRule, cohorts: Sequence[Cohort]) -> None:
        """Let each of some variables belong to the cohort at its place; new ones are built."""
        self._build(
            objects,
            rule,
            "variables",
            lambda change, found: change.set_settings(dict(zip(found, cohorts, strict=True))),
        )

    def never_decay(self, objects: Iterable[Any], rule: UpdateRule, patterns: Sequence[str]) -> None:
        """Let the weights of variables, new ones among them, and of those with such names not decay."""
        self._build(objects, rule, "var_list", lambda change, found: change.never_decay(found, patterns))

    def build(self, variables: Iterable[Any], rule: UpdateRule) -> None:
        """Create the slots of `variables` ahead of their first step."""
        self._build(variables, rule, "var_list", lambda change, found: None)

    def _build(
        self,
        objects: Iterable[Any],
        rule: UpdateRule,
        argument: str,
        also: Callable[[Transaction, Sequence[Variable]], None],
    ) -> None:
        with self._state.alone():
            news = News()
            find = self._state.registry.find
            found = [
                find(obj, f"{argument}[{number}]", news) for number, obj in enumerate(_in_order(objects, argument))
            ]
            check_updatable(found, news.moved, rule)
            self._state.check_undivided(found)
            with self._outside(), Transaction(self._state) as change:
                self._ensure_own(change, found[0].device if found else None)
                change.adopt(news)
                change.ensure_slots(found, rule)
                also(change, found)
            self._memos.drop_what_moved()

    def add_slot(self, obj: Any, name: str, initializer: Any, shape: tuple[int, ...] | None) -> Variable:
        """A slot of a variable, created from an initializer where it does not exist."""
        with self._state.alone():
            news = News()
            variable = self._state.registry.find(obj, "var", news)
            with Transaction(self._state) as change:
                change.adopt(news)
                return change.add_slot(variable, name, initializer, shape)

    def forget(self, obj: Any) -> None:
        """Drop the slots and the registration of a variable."""
        with self._state.alone():
            variable = self._known(obj, "variable", News())
            with Transaction(self._state) as change:
                change.forget(variable)
            self._memos.drop_what_moved()

    def replace(self, old_obj: Any, new_obj: Any, index: Any) -> None:
        """Hand the slots of a variable over to another one, rows of them where an index says which."""
        with self._state.alone():
            news = News()
            old = self._known(old_obj, "old", News())
            new = self._state.registry.find(new_obj, "new", news)
            if self._state.has_slots(new):
                got = f"{new.name!r}, which has slots"
                raise ArgumentValueError("new", "must be a variable without slots", got, "call forget(new) first")
            check_updatable([new], {}, UpdateRule())
            self._state.check_undivided([new])
            arrays = successors(self._state, old, new, index)
            with Transaction(self._state) as change:
                change.replace(old, new, arrays)
                change.adopt(news)
            self._memos.drop_what_moved()

    def _known(self, obj: Any, argument: str, news: News) -> Variable:
        variable = self._state.registry.known(obj)
        if variable is None:
            variable = self._state.registry.find(obj, argument, news)
        if not self._state.has_slots(variable):
            rule = f"must be a variable of optimizer {self._state.name!r}"
            got = f"{variable.name!r}, which has no slots"
            raise ArgumentValueError(argument, rule, got, "pass a variable that was stepped or built")
        return variable

    def follow_memory(self) -> None:
        """Let the variables of raw arrays lie where the arrays lie now."""
        with self._state.alone():
            news = self._news_of(self._state.registry.arrays())
            with Transaction(self._state) as change:
                change.adopt(news)
            self._memos.drop_what_moved()

    def _news_of(self, arrays: Sequence[Any]) -> News:
        """Which of the raw variables lie elsewhere by now."""
        news = News()
        for array in arrays:
            self._state.registry.find(array, "a raw variable", news)
        return news

    def check_errors(self) -> None:
        """Raise what the kernels have noted. Waits for the device."""
        for errors in self._state.index_errors.values():
            errors.check()


def _in_order(objects: Iterable[Any], argument: str) -> Iterable[Any]:
    """The objects; a variable alone is one, not one for each of its rows.

    Raises:
        ArgumentTypeError: they come in no order, which the weights would follow.
    """
    rule = "must hold variables in an order"
    if isinstance(objects, Variable) or place_of(objects) is not None:
        return [objects]
    if isinstance(objects, Set):
        raise ArgumentTypeError(argument, rule, f"a {type(objects).__name__}", "pass a list")
    return items_of(argument, objects, rule)


def _checked_anew(pairs: Sequence[Any], memo: Memo, addresses: np.ndarray, graph: Graph | None) -> list[Any]:
    """The gradients of a step that was found anew, because their dtypes are other ones than in the step before."""
    if graph is not None:
        check_capturable(pairs, is_first=memo.plan.own_launches is None)
    return memo.plan.check(pairs, addresses)


def _warn(without: Sequence[str]) -> None:
    warnings.warn(requests.without_gradient(without), UserWarning, stacklevel=4)
