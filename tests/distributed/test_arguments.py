"""What does not fit ShardedAdam: what is said, what has changed, and that nothing has travelled."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpu_adam
from gpu_adam import Variable
from gpu_adam.communicators import Alone, Communicator, Pending
from gpu_adam.communicators.base import Finish
from gpu_adam.devices import Device
from gpu_adam.distributed import ShardedAdam, agreement
from gpu_adam.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    DistributedError,
    GpuAdamError,
    SlotNotFoundError,
)

from . import arguments, equality
from .threads import on_ranks

MAKE: Any = ShardedAdam
"""The class, with arguments of any type."""


class Counted(Alone):
    """One rank, whose operations are counted."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.count = 0

    def begun(self, finish: Finish) -> Pending:
        """One more."""
        self.count += 1
        return super().begun(finish)


def variables_of(device: Device) -> list[Variable]:
    return [
        Variable(equality.numbers([number], shape, "float32"), name=f"w{number}", device=device)
        for number, shape in enumerate([(100, 70), (5,), ()])
    ]


def gradients_of(variables: list[Variable]) -> list[tuple[Any, Variable]]:
    return [(variable.numpy() if variable.device.xp is np else variable.value, variable) for variable in variables]


def test_what_is_refused_has_changed_nothing_and_nothing_travels(device: Device) -> None:
    communicator = Counted(device)
    optimizer, variables = ShardedAdam(communicator, 0.1), variables_of(device)
    optimizer.apply_gradients(gradients_of(variables))
    begun = communicator.count
    arguments.refused(optimizer, variables)
    assert communicator.count == begun
    plain, others = gpu_adam.Adam(0.1), variables_of(device)
    for _ in range(2):
        plain.apply_gradients(gradients_of(others))
    assert optimizer.apply_gradients(gradients_of(variables)) == 2
    for one, other in zip(variables, others, strict=True):
        assert one.numpy().tobytes() == other.numpy().tobytes()


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda c: MAKE(0.01), ArgumentTypeError, "communicator must be a Communicator (got float); pass gpu_"),
        (lambda c: MAKE(0.01, c), ArgumentTypeError, "communicator must be a Communicator (got float); pass g"),
        (
            lambda c: MAKE(c, bucket_bytes=0),
            ArgumentValueError,
            "bucket_bytes must be a whole number >= 1 (got 0); pass 2**25, say, or leave it out.",
        ),
        (
            lambda c: MAKE(c, bucket_bytes="x"),
            ArgumentValueError,
            "bucket_bytes must be a whole number >= 1 (got",
        ),
        (
            lambda c: MAKE(c, bucket_bytes=2.5),
            ArgumentValueError,
            "bucket_bytes must be a whole number >= 1 (got",
        ),
        (lambda c: MAKE(c, unknown=1), ArgumentTypeError, "keyword 'unknown' must be one of clipnorm, "),
        (
            lambda c: MAKE(c, deterministic="yes"),
            ArgumentTypeError,
            "deterministic must be True or False (got 'yes'); pass True or False.",
        ),
        (
            lambda c: MAKE(c, telemetry=True),
            ArgumentValueError,
            "telemetry must be left out by an optimizer on several ranks (got True); leave it out.",
        ),
        (
            lambda c: MAKE(c, stochastic_rounding=True),
            ArgumentValueError,
            "stochastic_rounding must be left out",
        ),
        (
            lambda c: MAKE(c, use_ema=True, ema_overwrite_frequency=2),
            ArgumentValueError,
            "ema_overwrite_frequency must be left out by an optimizer on several ranks (got 2)",
        ),
        (
            lambda c: MAKE.from_config(MAKE(c).get_config()),
            ArgumentTypeError,
            "communicator must be a Communicator (got NoneType)",
        ),
    ],
)
def test_construction(make: Callable[[Any], object], kind: type[GpuAdamError], words: str) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        make(Alone("host"))


def test_a_twin_by_its_configuration() -> None:
    communicator = Alone("host")
    optimizer = ShardedAdam(communicator, 0.5, clipnorm=2.0, amsgrad=True)
    twin = ShardedAdam.from_config(optimizer.get_config(), communicator=communicator, deterministic=True)
    assert twin.get_config() == optimizer.get_config()


@pytest.mark.parametrize("name", ["accumulate", "capture", "stage", "add_slot", "forget", "replace"])
def test_what_needs_a_process_to_itself(name: str) -> None:
    words = f"{name} must be asked of an optimizer that has no other ranks (got ShardedAdam); "
    with pytest.raises(ArgumentValueError, match=re.escape(words)):
        getattr(ShardedAdam(Alone("host")), name)()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda optimizer, variables, own: optimizer.set_group(variables, weight_decay=0.1 + own),
            "set_group({'weight_decay': 0.1}) of ['w0', 'w1', 'w2'] (got set_group({'weight_decay': 1.1}) of ",
        ),
        (
            lambda optimizer, variables, own: optimizer.exclude_from_weight_decay(variables[own:]),
            "(var_names=[]) of ['w0', 'w1', 'w2'] (got exclude_from_weight_decay(var_names=[]) of ['w1', 'w2'])",
        ),
        (
            lambda optimizer, variables, own: optimizer.exclude_from_weight_decay(var_names=[f"{own}"]),
            "(var_names=['0']) of None (got exclude_from_weight_decay(var_names=['1']) of None)",
        ),
        (
            lambda optimizer, variables, own: optimizer.overwrite_by_averages(variables[own:]),
            "overwrite_by_averages of ['w0', 'w1', 'w2'] (got overwrite_by_averages of ['w1', 'w2'])",
        ),
        (
            lambda optimizer, variables, own: optimizer.overwrite_by_averages(None if own else variables),
            "overwrite_by_averages of ['w0', 'w1', 'w2'] (got overwrite_by_averages of None)",
        ),
    ],
)
def test_a_call_that_another_rank_makes_otherwise(call: Callable[..., object], words: str) -> None:
    """Each rank would update what it owns in its own way."""

    def work(communicator: Communicator) -> None:
        optimizer = ShardedAdam(communicator, 0.1, use_ema=True)
        variables = variables_of(communicator.device)
        optimizer.apply_gradients(gradients_of(variables))
        before = [variable.numpy().tobytes() for variable in variables]
        with pytest.raises(DistributedError, match=f"rank 1 must do what rank 0 does, .*{re.escape(words)}"):
            call(optimizer, variables, communicator.rank)
        assert [variable.numpy().tobytes() for variable in variables] == before

    on_ranks(2, work)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies(copied: Callable[[Any], object]) -> None:
    with pytest.raises(ArgumentValueError, match=r"a copy of the optimizer must be asked of"):
        copied(ShardedAdam(Alone("host")))


def test_variables_of_another_device(gpu: Device) -> None:
    optimizer = ShardedAdam(Alone(gpu))
    with pytest.raises(
        ArgumentValueError, match=r"var_list\[0\] must lie on the communicator's device, cuda:0 \(got ho"
    ):
        optimizer.build([Variable(np.ones(3), device="host")])


def test_a_constraint_and_a_master() -> None:
    variable = Variable(np.ones(3), dtype="bfloat16", constraint=equality.half)
    with pytest.raises(
        ArgumentValueError, match=r"var_list\[0\] must do without a constraint, which changes no master"
    ):
        ShardedAdam(Alone("host"), master_weights=True).build(variable)


def test_a_variable_that_is_built_twice(device: Device) -> None:
    """By one optimizer, which knows it; by another one, which takes it away."""
    optimizer, other = (ShardedAdam(Alone(device)) for _ in range(2))
    variables = variables_of(device)
    optimizer.build(variables)
    optimizer.build([*variables, variables[0]])
    assert len(optimizer.weights) == 1 + 2 * len(variables)
    other.build(variables[:1])
    with pytest.raises(
        ArgumentValueError, match=r"variable 'w0' must lie where this optimizer has put it \(got one that"
    ):
        optimizer.apply_gradients(gradients_of(variables))


def test_what_a_callable_raises_leaves_the_gradients_for_the_next_call(device: Device) -> None:
    optimizer, variables = ShardedAdam(Alone(device), 0.1), variables_of(device)
    optimizer.build(variables)
    optimizer.learning_rate = lambda: "much"
    with pytest.raises(ArgumentTypeError, match="learning_rate must be a real number"):
        optimizer.apply_gradients(gradients_of(variables))
    optimizer.learning_rate = 0.1
    with pytest.raises(ArgumentValueError, match=r"add them up, or call apply_gradients\(\) where a step has failed"):
        optimizer.apply_gradients(gradients_of(variables))
    assert optimizer.apply_gradients() == 1


def test_a_slot_that_is_not_there() -> None:
    optimizer, variables = ShardedAdam(Alone("host")), variables_of(gpu_adam.get_device())
    optimizer.build(variables)
    with pytest.raises(SlotNotFoundError, match="slot 'average' of variable 'w0' must exist"):
        optimizer.get_slot(variables[0], "average")


class Array:
    """An array that tells of itself by NumPy's interface alone, its dtype too."""

    def __init__(self, values: Any) -> None:
        self.__array_interface__ = values.__array_interface__
        self._values = values


def test_a_gradient_of_another_dtype_that_does_not_say_so() -> None:
    """float32 for a variable of bfloat16, as every other float32."""
    found = []
    for wrap in (Array, np.asarray):
        variable, optimizer = Variable(np.ones(3), dtype="bfloat16"), ShardedAdam(Alone("host"), 0.1)
        optimizer.apply_gradients([(wrap(np.ones(3, np.float32)), variable)])
        found.append(variable.numpy().tolist())
    assert found[0] == found[1] != [1.0] * 3


def test_texts_of_one_rank(device: Device) -> None:
    for text in ("", "a", "12345678", "\u03b8" * 1000):
        assert agreement.gathered(Alone(device), text) == [text]
