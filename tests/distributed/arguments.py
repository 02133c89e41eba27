"""Calls of an optimizer on several ranks that are refused before anything travels."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

from gpu_adam import IndexedSlices, Variable
from gpu_adam.distributed import ShardedAdam
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, GpuAdamError, SparseIndexError

Array = np.ndarray[Any, np.dtype[Any]]


class Given(NamedTuple):
    """What a call gets: the optimizer, and its variables with a fitting gradient for each."""

    optimizer: Any
    variables: Sequence[Variable]
    pairs: list[tuple[Any, Variable]]


def _with(given: Given, gradient: Any) -> list[tuple[Any, Variable]]:
    """The pairs with another gradient for the first variable, so that those after it are right."""
    return [(gradient, given.variables[0]), *given.pairs[1:]]


def _build_table(given: Given, table: Variable) -> None:
    given.optimizer.build([table], tables=[table])


def _clipped(given: Given, pairs: list[tuple[Any, Variable]]) -> None:
    before, given.optimizer.clipnorm = given.optimizer.clipnorm, 1.0
    try:
        given.optimizer.apply_gradients(pairs)
    finally:
        given.optimizer.clipnorm = before


Call = Callable[[Given], object]

CALLS: list[tuple[str, type[GpuAdamError], Call]] = [
    (
        "gradients must come for every variable at each step (got none for ['w0']); pass zeros",
        ArgumentValueError,
        lambda given: given.optimizer.apply_gradients(given.pairs[1:]),
    ),
    (
        "gradients must come for every variable at each step (got none for ['w0']); pass zeros",
        ArgumentValueError,
        lambda given: given.optimizer.apply_gradients(_with(given, None)),
    ),
    (
        "gradients must come for every variable at each step (got none for [",
        ArgumentValueError,
        lambda given: given.optimizer.apply_gradients(),
    ),
    (
        "] must be a variable of optimizer 'Adam' (got 'other'); call build with all variables first.",
        ArgumentValueError,
        lambda given: given.optimizer.apply_gradients([*given.pairs, (np.zeros(2, np.float32), _other(given))]),
    ),
    (
        "must come once for a step (got a second one); add them up",
        ArgumentValueError,
        lambda given: given.optimizer.apply_gradients([*given.pairs, given.pairs[0]]),
    ),
    (
        "gradient of variable 'w0' must have shape (100, 70) (got (1,)); reshape it.",
        ArgumentValueError,
        lambda given: given.optimizer.apply_gradients(_with(given, given.pairs[0][0].reshape(-1)[:1])),
    ),
    (
        "gradient of variable 'w0' must have dtype float32 or float16 or bfloat16 (got int32); cast it",
        ArgumentValueError,
        lambda given: given.optimizer.apply_gradients(_with(given, given.pairs[0][0].astype(np.int32))),
    ),
    (
        "the gradient of variable 'w0' must have dtype float32, as the others with which it travels (got float1",
        ArgumentValueError,
        lambda given: given.optimizer.apply_gradients(_with(given, given.pairs[0][0].astype(np.float16))),
    ),
    (
        "gradient of variable 'w0' must be an array (got str)",
        ArgumentTypeError,
        lambda given: given.optimizer.apply_gradients(_with(given, "text")),
    ),
    (
        "grads_and_vars must be an iterable of (gradient, variable) pairs (got int); pass a list of pairs.",
        ArgumentTypeError,
        lambda given: given.optimizer.apply_gradients(5),
    ),
    (
        "grads_and_vars[0] must be a (gradient, variable) pair (got tuple of length 3)",
        ArgumentTypeError,
        lambda given: given.optimizer.apply_gradients([(*given.pairs[0], 1), *given.pairs[1:]]),
    ),
    (
        "grads_and_vars[0] must be (gradient, variable), in this order (got a Variable as gradient); swap the two.",
        ArgumentTypeError,
        lambda given: given.optimizer.apply_gradients([given.pairs[0][::-1], *given.pairs[1:]]),
    ),
    (
        "grads_and_vars[0] must be a gpu_adam.Variable (got ndarray); wrap the array in gpu_adam.Variable, which can",
        ArgumentTypeError,
        lambda given: given.optimizer.apply_gradients([(given.pairs[0][0],) * 2, *given.pairs[1:]]),
    ),
    (
        "grad_scale must be > 0 and finite (got -1.0); pass what the loss was multiplied by.",
        ArgumentValueError,
        lambda given: given.optimizer.apply_gradients(given.pairs, grad_scale=-1.0),
    ),
    (
        "variable must be a gpu_adam.Variable (got ndarray)",
        ArgumentTypeError,
        lambda given: given.optimizer.push_gradient(*given.pairs[0]),
    ),
    (
        "gradient of variable 'w0' must have shape (100, 70) (got ())",
        ArgumentValueError,
        lambda given: given.optimizer.push_gradient(given.variables[0], 1.0),
    ),
    (
        "the gradient of variable 'w0' must be an array, as build was told (got IndexedSlices); name variables with",
        ArgumentValueError,
        lambda given: _clipped(given, _with(given, IndexedSlices(given.pairs[0][0][:1], np.array([0])))),
    ),
    (
        "a variable of tables must be one of var_list too (got 'other' of shape (2,)); name it there.",
        ArgumentValueError,
        lambda given: given.optimizer.build([], tables=_other(given)),
    ),
    (
        "a variable of tables must be one from the first (got 'w0' of shape (100, 70)); name it in tables when it is",
        ArgumentValueError,
        lambda given: given.optimizer.build(given.variables, tables=given.variables[0]),
    ),
    (
        "a variable of tables must have rows (got 'number' of shape ()); leave it out of tables.",
        ArgumentValueError,
        lambda given: _build_table(given, Variable(1.0, name="number", device=given.variables[0].device)),
    ),
    (
        "a variable of tables must do without a constraint, as with any slices (got 'bound' of shape (2,)); leave one",
        ArgumentValueError,
        lambda given: _build_table(
            given, Variable(np.ones(2), name="bound", device=given.variables[0].device, constraint=abs)
        ),
    ),
    ("var_list must be variables (got int)", ArgumentTypeError, lambda given: given.optimizer.build(5)),
    (
        "var_list[0] must be a gpu_adam.Variable (got ndarray)",
        ArgumentTypeError,
        lambda given: given.optimizer.build([np.zeros(2)]),
    ),
    (
        "variable 'whole' must have one of the dtypes float32, float64, complex64, complex128, float16, bfloat16 (g",
        ArgumentValueError,
        lambda given: given.optimizer.build(Variable(np.arange(3), name="whole", device=given.variables[0].device)),
    ),
    (
        "variables 'w0' and 'part' must not overlap in memory (got 280 shared bytes)",
        ArgumentValueError,
        lambda given: given.optimizer.build(
            [Variable.over(given.variables[0].value[0], given.variables[0].device, "part")]
        ),
    ),
    ("get_group", ArgumentValueError, lambda given: given.optimizer.get_group(_other(given))),
    ("get_slot", ArgumentValueError, lambda given: given.optimizer.get_slot(_other(given), "m")),
]
"""What the message says, the class, and the call; "get_..." for what any message will do."""


def _other(given: Given) -> Variable:
    return Variable(np.zeros(2, np.float32), name="other", device=given.variables[0].device)


def refused(optimizer: ShardedAdam, variables: Sequence[Variable]) -> None:
    """Make all calls, each of which must raise what it should, and change nothing."""
    device = variables[0].device
    pairs = [(device.zeros(variable.shape, variable.dtype), variable) for variable in variables]
    before = [variable.numpy().tobytes() for variable in variables]
    state = {name: array.tobytes() for name, array in optimizer.export().items()}
    for words, kind, call in CALLS:
        if kind is SparseIndexError and not device.checks_indices:
            continue
        with pytest.raises(kind) as raised:
            call(Given(optimizer, variables, list(pairs)))
        assert words.startswith("get_") or words in str(raised.value), (words, str(raised.value))
    assert [variable.numpy().tobytes() for variable in variables] == before
    assert {name: array.tobytes() for name, array in optimizer.export().items()} == state
