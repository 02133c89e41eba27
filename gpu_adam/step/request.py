"""What a call of `apply_gradients` asks for: its pairs as gradients and variables. Nothing here changes anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu_adam.devices.pair_reader import ExpectedPairs, PairReader
from gpu_adam.devices.placement import Placement
from gpu_adam.devices.torch_tensors import written_calls
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.rules import items_of
from gpu_adam.state.registry import News, Registry
from gpu_adam.step.gradients import dtype_read
from gpu_adam.step.plan import Plan
from gpu_adam.variables import IndexedSlices, Variable


class Request(NamedTuple):
    """A step that is asked for.

    Attributes:
        pairs: the (gradient, variable) pairs that have a gradient.
        variables: the variable of each pair.
        sparse: whether each pair's gradient names rows.
        gradient_dtypes: in which dtype each pair's gradient is read.
        without: the names of the variables without gradient.
        news: what the registry does not know yet.
    """

    pairs: Sequence[Any]
    variables: Sequence[Variable]
    sparse: tuple[bool, ...]
    gradient_dtypes: tuple[np.dtype, ...]
    without: Sequence[str]
    news: News


def read(pairs: Sequence[Any], registry: Registry) -> Request:
    """Find the variables of all pairs.

    Raises:
        ArgumentTypeError: what is no pair, or no variable.
        ArgumentValueError: a variable that cannot be updated in place; no gradients at all.
    """
    news = News()
    with_gradient: list[Any] = []
    variables: list[Variable] = []
    without: list[str] = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            kind = type(pair).__name__
            got = f"{kind} of length {len(pair)}" if hasattr(pair, "__len__") else kind
            rule = "must be a (gradient, variable) pair"
            raise ArgumentTypeError(f"grads_and_vars[{number}]", rule, got, "pass a list of pairs")
        gradient, target = pair
        if isinstance(gradient, Variable) and not isinstance(target, Variable):
            rule = "must be (gradient, variable), in this order"
            raise ArgumentTypeError(f"grads_and_vars[{number}]", rule, "a Variable as gradient", "swap the two")
        argument = f"the variable of grads_and_vars[{number}]"
        if gradient is None:
            without.append(registry.find(target, argument, News()).name)  # which makes nobody known
        else:
            variables.append(registry.find(target, argument, news))
            with_gradient.append((gradient, target))
    if not variables:
        rule = "must hold a gradient for at least one variable"
        got = f"none for {without}" if without else "no pairs"
        raise ArgumentValueError("grads_and_vars", rule, got, "check that the loss depends on the variables")
    sparse = tuple([isinstance(gradient, IndexedSlices) for gradient, _ in with_gradient])
    dtypes = tuple([dtype_read(gradient, each) for (gradient, _), each in zip(with_gradient, variables, strict=True)])
    return Request(with_gradient, variables, sparse, dtypes, without, news)


def listed(grads_and_vars: Iterable[Any]) -> Sequence[Any]:
    """The pairs as a list; ArgumentTypeError where they are not iterable."""
    rule = "must be an iterable of (gradient, variable) pairs"
    return items_of("grads_and_vars", grads_and_vars, rule, "pass a list of pairs")


class Memo:
    """A request, so that the next one with the same variables is recognised without being read again.

    Args:
        plan: of the step.
        request: of the step.
        registry: knows where the memory of raw arrays lies.

    Attributes:
        plan: as above.
        rule: of the plan.
        read: gives the addresses of a step's gradients, 0 for those still to be looked at; None for other pairs.
        written_calls: to be made with each step, see `written_calls`.
    """

    def __init__(self, plan: Plan, request: Request, registry: Registry) -> None:
        self.plan, self.rule = plan, plan.rule
        self._targets = [target for _, target in request.pairs]
        self.read: PairReader = _reads_nothing
        self.written_calls = written_calls(self._targets)
        if len(plan.devices) == 1:
            kinds: list[type | None] = [IndexedSlices if is_sparse else None for is_sparse in request.sparse]
            placements = [
                None if isinstance(target, Variable) else _placement(target, request.news, registry)
                for target in self._targets
            ]
            shapes = [variable.shape for variable in request.variables]
            dtypes = list(request.gradient_dtypes)
            expected = ExpectedPairs(self._targets, placements, kinds, shapes, dtypes, _NEVER_ARRAYS)
            self.read = plan.devices[0].pair_reader(expected)

    def is_of(self, request: Request) -> bool:
        """Whether the request's variables were passed as the same objects."""
        return len(request.pairs) == len(self._targets) and all(
            target is known for (_, target), known in zip(request.pairs, self._targets, strict=True)
        )


# A missing gradient, one of rows, one that may have changed places with its variable.
_NEVER_ARRAYS = (type(None), IndexedSlices, Variable)


def _placement(target: Any, news: News, registry: Registry) -> Placement:
    new = news.entries.get(id(target))
    return registry.placement(target) if new is None else new.placement


def _reads_nothing(pairs: Sequence[Any]) -> None:
    """The reader of a step on several devices, whose pairs are looked at anew each time."""


def unknown_addresses(count: int) -> np.ndarray:
    """The addresses of so many gradients, of which nothing is known yet."""
    return np.zeros(count, np.uint64)
