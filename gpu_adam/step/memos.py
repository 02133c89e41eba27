"""Steps that are recognised: their pairs were read before, or are some of those of a larger step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu_adam.devices.pair_reader import ExpectedPairs, PairReader
from gpu_adam.devices.placement import Placement
from gpu_adam.devices.torch_tensors import written_calls
from gpu_adam.errors import ArgumentValueError
from gpu_adam.kernels import UpdateRule, slots_of
from gpu_adam.state.adam_state import AdamState
from gpu_adam.state.registry import News, Registry
from gpu_adam.step import request as requests
from gpu_adam.step.plan import Plan
from gpu_adam.step.request import Request
from gpu_adam.variables import IndexedSlices, Variable

_PLANS_KEPT = 8  # sets of variables whose launches stay: a GAN steps two by turns


class Memo:
    """A request, so that the next one with the same variables is recognised without being read again.

    Args:
        plan: of the step.
        expected: its pairs.
        key: under which it is kept.

    Attributes:
        plan, key: as above.
        rule: of the plan.
        read: gives the addresses of a step's gradients, 0 for those still to be looked at; None for other pairs.
        written_calls: to be made with each step, see `written_calls`.
    """

    def __init__(self, plan: Plan, expected: ExpectedPairs, key: Any) -> None:
        self.plan, self.rule, self.key, self._expected = plan, plan.rule, key, expected
        self.written_calls = written_calls(expected.targets)
        self.read: PairReader = _reads_nothing
        if len(plan.devices) == 1:
            self.read = plan.devices[0].pair_reader(expected)
        self._numbers: dict[int, int] = {}

    @classmethod
    def of(cls, plan: Plan, request: Request, registry: Registry, key: Any) -> Memo:
        """The memo of a request.

        Args:
            plan: of the request's variables.
            request: of the step.
            registry: knows where the memory of raw arrays lies.
            key: as of the class.
        """
        targets = [target for _, target in request.pairs]
        kinds: list[type | None] = [IndexedSlices if is_sparse else None for is_sparse in request.sparse]
        placements = [
            None if isinstance(target, Variable) else _placement(target, request.news, registry) for target in targets
        ]
        shapes = [variable.shape for variable in request.variables]
        dtypes = list(request.gradient_dtypes)
        return cls(plan, ExpectedPairs(targets, placements, kinds, shapes, dtypes, _NEVER_ARRAYS), key)

    def is_of(self, request: Request) -> bool:
        """Whether the request's variables were passed as the same objects."""
        targets = self._expected.targets
        return len(request.pairs) == len(targets) and all(
            target is known for (_, target), known in zip(request.pairs, targets, strict=True)
        )

    def numbers_of(self, pairs: Sequence[Any]) -> list[int] | None:
        """The numbers that the variables of some pairs have here, each once; None where that cannot be said."""
        if not self._numbers:
            self._numbers = {id(target): number for number, target in enumerate(self._expected.targets)}
        try:
            numbers = [self._numbers[id(target)] for _, target in pairs]
        except (KeyError, TypeError, ValueError):  # another variable, or no pair at all, of which others complain
            return None
        return numbers if numbers and len(set(numbers)) == len(numbers) else None

    def part(self, numbers: list[int], key: Any) -> Memo:
        """The memo of a step of some of the variables, in this order; all gradients are dense."""
        return Memo(self.plan.part(numbers), self._expected.part(numbers), key)


# A missing gradient, one of rows, one that may have changed places with its variable.
_NEVER_ARRAYS = (type(None), IndexedSlices, Variable)


def _placement(target: Any, news: News, registry: Registry) -> Placement:
    new = news.entries.get(id(target))
    return registry.placement(target) if new is None else new.placement


def _reads_nothing(pairs: Sequence[Any]) -> None:
    """The reader of a step on several devices, whose pairs are looked at anew each time."""


class Found(NamedTuple):
    """What is known of a step when its pairs have been read.

    Attributes:
        pairs: those that have a gradient.
        memo: of such pairs.
        addresses: where each pair's gradient lies, 0 where that is not known.
        request: the step as it was asked for; None where a memo recognised it.
    """

    pairs: Sequence[Any]
    memo: Memo
    addresses: np.ndarray
    request: Request | None


class Whole(NamedTuple):
    """All variables of a rule.

    Attributes:
        weights: how many the state had when it was made.
        memo: of the step of all of them; None where there can be no such step.
    """

    weights: int
    memo: Memo | None


class Memos:
    """The memos of an optimizer's steps.

    Where steps update now these and now those of its variables, each set's memo is taken from that of all of them, the
    whole: a new set then takes a fraction of the time.

    Args:
        state: has the variables. Where one of them or a slot comes to lie elsewhere all memos are dropped, for their
            launches have its old address.
    """

    def __init__(self, state: AdamState) -> None:
        self._state, self._layout = state, state.layout
        self._kept: OrderedDict[Any, Memo] = OrderedDict()
        self._last: Memo | None = None
        self._wholes: dict[UpdateRule, Whole] = {}

    def last(self, rule: UpdateRule) -> Memo | None:
        """The memo of the last step, if another one of that rule may be like it."""
        memo = self._last
        return memo if memo is not None and memo.rule is rule and self._layout is self._state.layout else None

    def resolve(self, pairs: Sequence[Any], rule: UpdateRule) -> Found:
        """What is known of a step with other pairs than the last one.

        Raises:
            ArgumentTypeError, ArgumentValueError: see `requests.read` and `Plan.of`.
        """
        self.drop_what_moved()
        return self._in_whole(pairs, rule) or self.resolve_anew(pairs, rule)

    def resolve_anew(self, pairs: Sequence[Any], rule: UpdateRule) -> Found:
        """The same for pairs that the whole's memo does not fit."""
        state = self._state
        request = requests.read(pairs, state.registry)
        self.drop_what_moved()
        moved, key = request.news.moved, _key(request, rule)
        known = None if moved else self._kept.get(key)
        if known is not None and known.is_of(request):
            return _found(request, known)
        if known is None and self._kept and self._have_whole(request, rule):
            found = self._in_whole(request.pairs, rule)
            if found is not None:
                return found._replace(request=request)
        plan = Plan.of(request, rule, state) if known is None else known.plan
        return _found(request, Memo.of(plan, request, state.registry, key))

    def remember(self, memo: Memo, request: Request | None) -> None:
        """Keep the memo of a step that has been done, which `resolve` has found."""
        self.drop_what_moved()
        self._kept[memo.key] = memo
        self._kept.move_to_end(memo.key)
        if len(self._kept) > _PLANS_KEPT:
            self._kept.popitem(last=False)
        self._last = None if request is not None and request.without else memo

    def drop_what_moved(self) -> None:
        """Forget all memos where a variable or slot does not lie where it did."""
        if self._layout is not self._state.layout:
            self.forget()
            self._layout = self._state.layout

    def forget(self) -> None:
        """Forget all memos."""
        self._last = None
        self._kept.clear()
        self._wholes.clear()

    def _in_whole(self, pairs: Sequence[Any], rule: UpdateRule) -> Found | None:
        """What is known of a step by its variables' places in the whole; None where that is not enough."""
        whole = self._wholes.get(rule)
        if whole is None or whole.memo is None or (numbers := whole.memo.numbers_of(pairs)) is None:
            return None
        key = whole.weights, np.array(numbers).tobytes(), rule
        memo = self._kept.get(key) or whole.memo.part(numbers, key)
        addresses = memo.read(pairs)
        return None if addresses is None else Found(pairs, memo, addresses, None)

    def _have_whole(self, request: Request, rule: UpdateRule) -> bool:
        """Whether there is a whole that a step may be a part of; made here where variables came since."""
        own_dtypes = all(
            dtype == variable.dtype for dtype, variable in zip(request.gradient_dtypes, request.variables, strict=True)
        )
        if request.news or any(request.sparse) or not own_dtypes:
            return False
        weights = len(self._state.weights)
        if rule not in self._wholes or self._wholes[rule].weights != weights:
            self._wholes[rule] = Whole(weights, self._whole(rule))
        return True

    def _whole(self, rule: UpdateRule) -> Memo | None:
        """The memo of a step that gives a gradient to every variable with the slots of a rule, in their own dtypes."""
        state = self._state
        variables = [
            variable
            for variable in state.variables
            if all(state.has_slot(variable, spec.name) for spec in slots_of(rule, variable.dtype.name))
        ]
        pairs = [(None, obj) for obj in state.registry.objects(variables)]
        sparse, dtypes = (False,) * len(variables), tuple([variable.dtype for variable in variables])
        request = Request(pairs, variables, sparse, dtypes, (), News())
        try:
            plan = Plan.of(request, rule, state)
        except ArgumentValueError:  # what makes no step together, such as variables that overlap: not asked for
            return None
        return Memo.of(plan, request, state.registry, None) if len(plan.devices) == 1 else None


def _found(request: Request, memo: Memo) -> Found:
    addresses = memo.read(request.pairs)
    if addresses is None:
        addresses = np.zeros(len(request.pairs), np.uint64)
    return Found(request.pairs, memo, addresses, request)


def _key(request: Request, rule: UpdateRule) -> Any:
    return tuple(map(id, request.variables)), request.sparse, request.gradient_dtypes, rule
