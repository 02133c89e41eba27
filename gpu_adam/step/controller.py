"""The road of a step: read the request, compute the scalars, make the state fit, enqueue the launches and count.

Whatever raises before the first launch has changed nothing. From the first launch on the step is done and counted:
nothing can interrupt the calls in between (gpu_adam/uninterrupted.py). Constraints of variables are Python of the
user's; they are applied after that, and what they raise comes after a step that is done.
"""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from gpu_adam.conversion import place_of
from gpu_adam.devices import Device
from gpu_adam.devices.torch_tensors import written_calls
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.hyperparameters import OWN_SETTINGS, Clip, Flavour
from gpu_adam.kernels import UpdateRule
from gpu_adam.nvtx import stage
from gpu_adam.rules import items_of
from gpu_adam.state.adam_state import AdamState
from gpu_adam.state.counter import check_countable
from gpu_adam.state.registry import News
from gpu_adam.state.replace import successors
from gpu_adam.state.transaction import Transaction
from gpu_adam.step import request as requests
from gpu_adam.step.capture import Graph, Graphs
from gpu_adam.step.gradients import OtherDtypeError
from gpu_adam.step.plan import Plan, check_updatable
from gpu_adam.step.request import Memo, Request
from gpu_adam.step.scalars import Scalars
from gpu_adam.uninterrupted import Call, make_all
from gpu_adam.variables import Variable

_enqueue = stage("update")(make_all)
_PLANS_KEPT = 8  # sets of variables whose launches stay: a GAN steps two by turns


class Controller:
    """The steps of one optimizer.

    Args:
        state: what the steps change.
        flavour: what they do besides plain Adam.
    """

    def __init__(self, state: AdamState, flavour: Flavour) -> None:
        self._state, self._flavour = state, flavour
        self._graphs = Graphs()
        self._memos: OrderedDict[Any, Memo] = OrderedDict()
        self._memo: Memo | None = None
        self._layout = state.layout

    @stage("step")
    def step(self, grads_and_vars: Iterable[Any], rule: UpdateRule, hyper: dict[str, Any], clip: Clip) -> int:
        """Update every variable by its gradient and count the step.

        Args:
            grads_and_vars: (gradient, variable) pairs.
            rule: which update; the same object for equal rules.
            hyper: stored hyperparameters by name.
            clip: how the gradients are clipped.

        Returns:
            The steps done.

        Raises:
            ArgumentTypeError, ArgumentValueError, SparseIndexError, ConcurrentStepError: nothing has changed then.
        """
        # A list of the step's own: the caller's may be emptied meanwhile, and nothing else keeps the gradients alive.
        pairs = grads_and_vars[:] if type(grads_and_vars) is list else requests.listed(grads_and_vars)
        state, request = self._state, None
        with state.alone():
            memo = self._memo if self._layout is state.layout else None
            addresses = None if memo is None or memo.rule is not rule else memo.read(pairs)
            if memo is None or addresses is None:
                request, memo, addresses = self._resolved(pairs, rule)
                pairs = request.pairs
            plan = memo.plan
            with self._graphs.step(plan.devices) as graph:
                if graph is not None:
                    graph.check(pairs, is_first=not plan.is_launched)
                try:
                    gradients = plan.check(pairs, addresses)
                except OtherDtypeError:
                    request, memo, addresses = self._resolved(pairs, rule)
                    pairs, plan = request.pairs, memo.plan
                    if graph is not None:
                        graph.check(pairs, is_first=not plan.is_launched)
                    gradients = plan.check(pairs, addresses)
                done = check_countable(state.counter)
                now = Scalars(hyper, done, self._flavour)
                if now.are_called:
                    now.iterations = done = self._checked_after_calls(memo, pairs, addresses)
                scalars = plan.scalars(now, clip)
                if request is not None and request.without:
                    _warn(request.without)
                with Transaction(state) as change:
                    if request is not None:
                        change.ensure_counter()
                        change.adopt(request.news)
                        change.ensure_slots(request.variables, rule)
                    launches = plan.launches(state, graph, gradients)
                    change.note(plan.index_errors)
                    launches.bind(pairs, gradients)
                    count = functools.partial(state.counter._value.fill, done + 1)
                    calls = launches.calls(scalars, clip)
                    if self._flavour.use_ema and self._flavour.overwrites_at(done + 1):
                        calls += self._overwriting(plan.variables, graph)
                    _enqueue([*calls, *memo.written_calls, count, *change.commit])
                if graph is None:
                    launches.release()
                for variable in plan.constrained:
                    variable.constrain()
            if request is not None:
                self._remember(memo, request)
            return done + 1

    def _checked_after_calls(self, memo: Memo, pairs: Sequence[Any], addresses: np.ndarray) -> int:
        """The number of steps done, once callables have been called, which may have changed it.

        Raises:
            ArgumentValueError: the memory of a variable or gradient does not lie where it was checked.
        """
        again = memo.read(pairs)
        if again is not addresses and (addresses.any() if again is None else not np.array_equal(again, addresses)):
            rule = "must not move or resize a variable or gradient of the step that calls it"
            raise ArgumentValueError("a callable hyperparameter", rule, "other memory", "do so between steps")
        return check_countable(self._state.counter)

    def _resolved(self, pairs: Sequence[Any], rule: UpdateRule) -> tuple[Request, Memo, np.ndarray]:
        """The request, with a plan of an earlier one like it or a new plan."""
        request = requests.read(pairs, self._state.registry)
        self._drop_what_moved()
        moved = request.news.moved
        known = None if moved else self._memos.get(_key(request, rule))
        if known is not None and known.is_of(request):
            memo = known
        else:
            settings = self._state.settings_of
            if known is None:
                plan = Plan(request.variables, request.sparse, request.gradient_dtypes, rule, moved, settings)
            else:
                plan = known.plan
            memo = Memo(plan, request, self._state.registry)
        addresses = memo.read(request.pairs)
        return request, memo, requests.unknown_addresses(len(request.pairs)) if addresses is None else addresses

    def _remember(self, memo: Memo, request: Request) -> None:
        self._drop_what_moved()
        key = _key(request, memo.rule)
        self._memos[key] = memo
        self._memos.move_to_end(key)
        if len(self._memos) > _PLANS_KEPT:
            self._memos.popitem(last=False)
        self._memo = None if request.without else memo

    def _drop_what_moved(self) -> None:
        """Forget all plans where a variable or slot does not lie where it did: their launches have its old address."""
        if self._layout is not self._state.layout:
            self._memo = None
            self._memos.clear()
            self._layout = self._state.layout

    def _overwriting(self, variables: Sequence[Variable], graph: Graph | None) -> list[Call]:
        """The calls that overwrite variables by their averages."""
        if graph is not None:
            rule = "must not overwrite variables by their averages, as every replay would do again"
            remedy = "capture another step, or leave ema_overwrite_frequency out and call overwrite_by_averages()"
            raise ArgumentValueError("a step captured in a graph", rule, "such a step", remedy)
        by_device: dict[Device, list[Variable]] = {}
        for variable in dict.fromkeys(variables):
            by_device.setdefault(variable.device, []).append(variable)
        averages, masters = (self._state.slots.get(name, {}) for name in ("average", "master"))
        calls = []
        for device, there in by_device.items():
            with_master = [variable for variable in there if variable in masters]
            targets = [*there, *(masters[variable] for variable in with_master)]
            sources = [averages[variable].value for variable in (*there, *with_master)]
            calls.append(device.copy_call([target.value for target in targets], sources))
        return calls

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
            arrays = self._state.registry.arrays(variables)
            news = self._news_of(arrays)
            with Transaction(self._state) as change:
                change.adopt(news)
                make_all([*self._overwriting(variables, None), *written_calls(arrays), *change.commit])
            self._drop_what_moved()

    def set_group(self, objects: Iterable[Any], rule: UpdateRule, given: Mapping[str, Any]) -> None:
        """Let the updates of variables take other numbers than the optimizer's; new ones are built."""
        OWN_SETTINGS.updated(given)
        self._build(objects, rule, "variables", lambda change, found: change.set_settings(found, given))

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
            with Transaction(self._state) as change:
                change.ensure_counter()
                change.adopt(news)
                change.ensure_slots(found, rule)
                also(change, found)
            self._drop_what_moved()

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
            self._drop_what_moved()

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
            arrays = successors(self._state, old, new, index)
            with Transaction(self._state) as change:
                change.replace(old, new, arrays)
                change.adopt(news)
            self._drop_what_moved()

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
            self._drop_what_moved()

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


def _key(request: Request, rule: UpdateRule) -> Any:
    return tuple(map(id, request.variables)), request.sparse, request.gradient_dtypes, rule


def _warn(without: Sequence[str]) -> None:
    message = f"no gradient for the variables {without}; they are left as they are"
    warnings.warn(message, UserWarning, stacklevel=4)
