"""Random programs give the same bits with deferred updates as with updates of all rows.

A program is a list of actions, done with two optimizers side by side; its numbers follow from the actions' arguments.
"""

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import assert_same_bits
from twins import Twins, numbers, touches

import gpu_adam
from gpu_adam import Variable
from gpu_adam.devices import Device
from gpu_adam.errors import SlotNotFoundError

ROWS, COLUMNS = 13, 3


def sparse_steps(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    for step in range(1 + 3 * amount):
        kind = ("uniform", "zipf", "adversarial", "empty")[int(rng.integers(4))]
        gradients: list[Any] = []
        for number in range(1 + (amount + step) % 2):
            rows = len(twins.variables[0][number])
            indices = touches(kind, rng, rows, step)
            gradients.append(((numbers(rng, (len(indices), COLUMNS), "float32"), indices), number))
        twins.step(*gradients)


def idle_steps(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    """Many steps that touch one row."""
    indices = rng.integers(0, len(twins.variables[0][0]), 1)
    values = numbers(rng, (1, COLUMNS), "float32")
    for _ in range(40 * amount):
        twins.step(((values, indices), 0))


def dense_step(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    twins.step((numbers(rng, twins.variables[0][amount % 2].shape, "float32"), amount % 2))


def mixed_step(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    rows = len(twins.variables[0][0])
    indices = rng.integers(0, rows, amount)
    pairs: list[Any] = [((numbers(rng, (amount, COLUMNS), "float32"), indices), 0)]
    pairs += [(numbers(rng, (rows, COLUMNS), "float32"), 0), *pairs]
    twins.step(*pairs[: 1 + amount])


def refused_step(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    def fail(optimizer: gpu_adam.Adam, variables: list[Variable]) -> None:
        optimizer.learning_rate, before = (lambda: "no number"), optimizer.learning_rate
        try:
            with pytest.raises(gpu_adam.ArgumentTypeError):
                optimizer.apply_gradients([(twins.gradient((np.ones((1, COLUMNS), np.float32), [0])), variables[0])])
        finally:
            optimizer.learning_rate = before

    twins.both(fail)


def read(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    dense, deferred = (variables[amount % 2] for variables in twins.variables)
    assert_same_bits(deferred.numpy(), dense.numpy())


def gather(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    indices = twins.device.array(rng.integers(0, len(twins.variables[0][0]), amount))
    dense, deferred = (twins.device.numpy(variables[0].gather(indices)) for variables in twins.variables)
    assert_same_bits(deferred, dense)


def read_slot(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    def slot(optimizer: gpu_adam.Adam, variables: list[Variable]) -> Any:
        try:
            return optimizer.get_slot(variables[amount % 2], "mv"[amount // 2 % 2]).numpy()
        except SlotNotFoundError:
            return np.zeros(1)

    dense, deferred = twins.both(slot)
    assert_same_bits(deferred, dense)


def assign(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    values = numbers(rng, twins.variables[0][0].shape, "float32")
    for variables in twins.variables:
        if amount % 2:
            variables[0].assign(values)
        else:
            variables[0][amount] = twins.device.array(values[amount])


def assign_slot(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    values = np.abs(numbers(rng, twins.variables[0][0].shape, "float32"))
    values[rng.integers(0, len(values))] = 1e-38
    for optimizer, variables in twins.pairs:
        optimizer.build(variables)
        optimizer.get_slot(variables[0], "mv"[amount % 2]).assign(values)


def export_and_restore(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    for optimizer, variables in twins.pairs:
        optimizer.build(variables)
    before = twins.optimizers[0].export()
    sparse_steps(twins, rng, amount)
    twins.both(lambda optimizer, variables: optimizer.restore(before))


def save_and_load(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    def saved(optimizer: gpu_adam.Adam, variables: list[Variable]) -> io.BytesIO:
        file = io.BytesIO()
        optimizer.build(variables)
        pending = optimizer.save(file, variables=amount > 1, asynchronous=amount % 2 == 1)
        if pending is not None:
            pending.wait()
        return file

    files = twins.both(saved)
    sparse_steps(twins, rng, amount)
    for (optimizer, _), file in zip(twins.pairs, files, strict=True):
        file.seek(0)
        optimizer.load(file, variables=amount > 1)


def copies(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    """Go on with copies of the optimizers and their variables; the others go."""
    both = list(zip(twins.optimizers, twins.variables, strict=True))
    both = copy.deepcopy(both) if amount % 2 else pickle.loads(pickle.dumps(both))
    twins.optimizers, twins.variables = [optimizer for optimizer, _ in both], [variables for _, variables in both]
    gc.collect(0)


def forget(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    for optimizer, variables in twins.pairs:
        optimizer.build(variables)
        optimizer.forget(variables[amount % 2])


def replace(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    index = rng.integers(0, len(twins.variables[0][0]), ROWS + amount)
    for optimizer, variables in twins.pairs:
        optimizer.build(variables)
        old = variables[0]
        variables[0] = Variable(old.gather(index), name=old.name, device=twins.device)
        optimizer.replace(old, variables[0], twins.device.array(index))


def new_optimizer(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    """One that goes, and was the only one to know what rows have missed, and another one in its place."""
    twins.optimizers = [type(optimizer).from_config(optimizer.get_config()) for optimizer in twins.optimizers]
    gc.collect()


def settings_of(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    groups: list[dict[str, Any]] = [
        {"learning_rate_multiplier": 0.5, "beta_1": 0.5},
        {"weight_decay": 0.3, "epsilon": 1.0},
        {"beta_2": 0.3, "beta_1": None},
        {"learning_rate_multiplier": 1.0, "beta_2": None, "epsilon": None},
    ]
    twins.both(lambda optimizer, variables: optimizer.set_group(variables[:1], **groups[amount]))


def update_kind(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    """Of the deferred optimizer alone."""
    kind = ("dense", "deferred", None, "dense")[amount]
    twins.optimizers[1].set_group(twins.variables[1][:1], sparse_update=kind)
    twins.optimizers[0].build(twins.variables[0][:1])


def hyperparameter(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    name, value = [("learning_rate", 0.0), ("learning_rate", 0.3), ("beta_1", 0.3), ("weight_decay", 0.05)][amount]
    twins.both(lambda optimizer, variables: setattr(optimizer, name, value))


def iterations(twins: Twins, rng: np.random.Generator, amount: int) -> None:
    twins.both(lambda optimizer, variables: setattr(optimizer, "iterations", amount**5))


ACTIONS: list[Callable[[Twins, np.random.Generator, int], None]] = [
    *(sparse_steps, sparse_steps, sparse_steps, idle_steps, dense_step, mixed_step, refused_step, read, gather),
    *(read_slot, assign, assign_slot, export_and_restore, save_and_load, copies, forget, replace, new_optimizer),
    *(settings_of, update_kind, hyperparameter, iterations),
]
PROGRAMS = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 3)), min_size=1, max_size=25)
SETTINGS = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def run(device: Device, limit: int, actions: list[Any], seed: int, **config: Any) -> None:
    rng = np.random.default_rng(seed)
    initial = [numbers(rng, (ROWS, COLUMNS), "float32"), numbers(rng, (5, COLUMNS), "float32")]
    twins = Twins(device, initial, max_deferral=limit, weight_decay=0.01, **config)
    for action, amount in actions:
        action(twins, rng, amount)
    twins.check(f"after {[(action.__name__, amount) for action, amount in actions]}")


@settings(SETTINGS, max_examples=40)
@given(limit=st.sampled_from([1, 2, 5, 13, 65536]), actions=PROGRAMS, seed=st.integers(0, 2**32))
def test_programs(device: Device, limit: int, actions: list[Any], seed: int) -> None:
    run(device, limit, actions, seed)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "config",
    [{}, {"amsgrad": True, "use_ema": True, "clipnorm": 1.0}, {"skip_nonfinite": True, "maximize": True}],
    ids=str,
)
@settings(SETTINGS, max_examples=60)
@given(limit=st.sampled_from([1, 2, 5, 13, 65536]), actions=PROGRAMS, seed=st.integers(0, 2**32))
def test_more_programs(device: Device, config: dict[str, Any], limit: int, actions: list[Any], seed: int) -> None:
    run(device, limit, actions, seed, **config)
