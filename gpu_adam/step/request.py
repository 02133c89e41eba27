"""What a call of `apply_gradients` asks for: its pairs as gradients and variables. Nothing here changes anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.rules import items_of
from gpu_adam.state.registry import News, Registry
from gpu_adam.step.gradients import dtype_read
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
        gradient, target = checked_pair(pair, number)
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


def checked_pair(pair: Any, number: int) -> tuple[Any, Any]:
    """The gradient and the variable of pair number `number`; ArgumentTypeError where it is no pair of them."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        kind = type(pair).__name__
        got = f"{kind} of length {len(pair)}" if hasattr(pair, "__len__") else kind
        rule = "must be a (gradient, variable) pair"
        raise ArgumentTypeError(f"grads_and_vars[{number}]", rule, got, "pass a list of pairs")
    gradient, target = pair
    if isinstance(gradient, Variable) and not isinstance(target, Variable):
        rule = "must be (gradient, variable), in this order"
        raise ArgumentTypeError(f"grads_and_vars[{number}]", rule, "a Variable as gradient", "swap the two")
    return gradient, target


def without_gradient(names: Sequence[str]) -> str:
    """The warning that some variables, by their names, have no gradient."""
    return f"no gradient for the variables {list(names)}; they are left as they are"


def listed(grads_and_vars: Iterable[Any]) -> Sequence[Any]:
    """The pairs as a list; ArgumentTypeError where they are not iterable."""
    rule = "must be an iterable of (gradient, variable) pairs"
    return items_of("grads_and_vars", grads_and_vars, rule, "pass a list of pairs")
