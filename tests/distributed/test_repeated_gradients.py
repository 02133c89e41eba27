"""Steps with the variables of the last one: their gradients are taken at once, and mean what others mean."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reference import assert_same_bits

from distributed.threads import on_ranks
from gpu_adam import Adam, Variable
from gpu_adam.communicators import Alone, Communicator
from gpu_adam.devices import Device, find_device
from gpu_adam.distributed import ShardedAdam
from gpu_adam.errors import ArgumentValueError

SHAPES = [(7,), (3, 5), (), (0, 2), (2000,)]
Pairs = list[tuple[Any, Variable]]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Whose gradients are looked at one by one: the rank and the variable's name."""
    check, found = ShardedAdam._checked, list[tuple[int, str]]()

    def noted(self: ShardedAdam, gradient: Any, variable: Variable, argument: str) -> tuple[int, Any]:
        found.append((self.communicator.rank, variable.name))
        return check(self, gradient, variable, argument)

    monkeypatch.setattr(ShardedAdam, "_checked", noted)
    return found


def variables(device: Device) -> list[Variable]:
    return [Variable(np.ones(shape, np.float32), name=f"w{n}", device=device) for n, shape in enumerate(SHAPES)]


def gradients(device: Device, step: int, dtype: str = "float32") -> list[Any]:
    rng = np.random.default_rng(step)
    return [device.array(np.asarray(rng.standard_normal(shape), dtype)) for shape in SHAPES]


def train(communicator: Communicator, bucket_bytes: int) -> list[Any]:
    """What the variables are after four steps, with other gradients in each."""
    device, mine = communicator.device, variables(communicator.device)
    adam = ShardedAdam(communicator, 0.1, bucket_bytes=bucket_bytes, global_clipnorm=1.0, deterministic=True)
    for step in range(4):
        adam.apply_gradients(list(zip(gradients(device, 10 * step + communicator.rank), mine, strict=True)))
    return [variable.numpy() for variable in mine]


def expected(device: Device, ranks: int) -> list[Any]:
    """What they are to be."""
    plain, reference = variables(device), Adam(0.1, global_clipnorm=1.0)
    for step in range(4):
        for rank in range(ranks):
            reference.accumulate(list(zip(gradients(device, 10 * step + rank), plain, strict=True)))
        reference.apply_gradients()
    return [variable.numpy() for variable in plain]


@pytest.mark.parametrize("bucket_bytes", [1, 2**30])
def test_the_second_step_looks_at_no_gradient(device: Device, checked: list[Any], bucket_bytes: int) -> None:
    for one, other in zip(train(Alone(device), bucket_bytes), expected(device, 1), strict=True):
        assert_same_bits(one, other)
    assert checked == [(0, f"w{number}") for number in range(len(SHAPES))], "only in the first step"


@pytest.mark.parametrize("bucket_bytes", [1, 2**30])
def test_so_it_is_on_two_ranks(checked: list[Any], bucket_bytes: int) -> None:
    for found in on_ranks(2, lambda communicator: train(communicator, bucket_bytes)):
        for one, other in zip(found, expected(find_device("host"), 2), strict=True):
            assert_same_bits(one, other)
    assert sorted(checked) == [(rank, f"w{number}") for rank in range(2) for number in range(len(SHAPES))]


def test_nothing_of_a_gradient_is_kept_after_the_step(device: Device) -> None:
    """Which `push_gradient` has kept until then."""
    variable, gradient = Variable(np.ones(3), device=device), device.array(np.ones(3))
    adam = ShardedAdam(Alone(device), 0.1)
    adam.build(variable)
    adam.push_gradient(variable, gradient)
    gone = weakref.ref(gradient)
    del gradient
    assert adam.apply_gradients() == 1
    gc.collect()
    assert gone() is None


def reversed_pairs(pairs: Pairs) -> Pairs:
    return pairs[::-1]


def as_lists(pairs: Pairs) -> Pairs:
    return [(v.device.numpy(gradient).tolist() if gradient.size else gradient, v) for gradient, v in pairs]


def in_strides(pairs: Pairs) -> Pairs:
    return [(variable.device.xp.stack([gradient, gradient], -1)[..., 0], variable) for gradient, variable in pairs]


def from_an_iterator(pairs: Pairs) -> Any:
    return iter(pairs)


@pytest.mark.parametrize("other", [reversed_pairs, as_lists, in_strides, from_an_iterator])
def test_other_pairs_mean_the_same(device: Device, other: Callable[[Pairs], Any]) -> None:
    mine, plain = variables(device), variables(device)
    adam, reference = ShardedAdam(Alone(device), 0.1), Adam(0.1)
    for step in range(6):
        pairs, expected = (list(zip(gradients(device, step), targets, strict=True)) for targets in (mine, plain))
        adam.apply_gradients(other(pairs) if step % 3 == 1 else pairs)
        reference.apply_gradients(expected)
    for one, another in zip(mine, plain, strict=True):
        assert_same_bits(one.numpy(), another.numpy())


def test_a_gradient_that_was_pushed_does_not_come_again(device: Device) -> None:
    mine = variables(device)
    adam = ShardedAdam(Alone(device), 0.1)
    pairs = list(zip(gradients(device, 0), mine, strict=True))
    adam.apply_gradients(pairs)
    before = [variable.numpy() for variable in mine]
    adam.push_gradient(mine[1], pairs[1][0])
    with pytest.raises(ArgumentValueError, match="the gradient of variable 'w1' must come once for a step"):
        adam.apply_gradients(pairs)
    for variable, values in zip(mine, before, strict=True):
        assert_same_bits(variable.numpy(), values)
    adam.apply_gradients([pairs[0], *pairs[2:]])
    assert adam.iterations == 2


@pytest.mark.parametrize("wrong", ["twice", "missing", "none"])
def test_what_a_step_refuses_after_others(device: Device, wrong: str) -> None:
    mine = variables(device)
    adam = ShardedAdam(Alone(device), 0.1)
    pairs = list(zip(gradients(device, 0), mine, strict=True))
    for _ in range(2):
        adam.apply_gradients(pairs)
    refused: Pairs = {
        "twice": [*pairs, pairs[0]],
        "missing": pairs[1:],
        "none": [(None, mine[0]), *pairs[1:]],
    }[wrong]
    with pytest.raises(ArgumentValueError, match="must come once" if wrong == "twice" else r"none for \['w0'\]"):
        adam.apply_gradients(refused)
    assert adam.iterations == 2
    adam.apply_gradients(pairs)
    assert adam.iterations == 3


def test_new_variables_are_taken_note_of(device: Device) -> None:
    mine, late = variables(device), Variable(np.ones(3, np.float32), name="late", device=device)
    adam = ShardedAdam(Alone(device), 0.1)
    pairs = list(zip(gradients(device, 0), mine, strict=True))
    for _ in range(2):
        adam.apply_gradients(pairs)
    adam.build([late])
    with pytest.raises(ArgumentValueError, match=r"none for \['late'\]"):
        adam.apply_gradients(pairs)
    adam.apply_gradients([*pairs, (device.array(np.ones(3, np.float32)), late)])
    assert late.numpy().max() < 1


def test_a_shape_that_would_be_broadcast_is_refused(device: Device) -> None:
    mine = variables(device)
    adam = ShardedAdam(Alone(device), 0.1)
    pairs = list(zip(gradients(device, 0), mine, strict=True))
    adam.apply_gradients(pairs)
    with pytest.raises(ArgumentValueError, match=r"gradient of variable 'w0' must have shape \(7,\) \(got \(1,\)\)"):
        adam.apply_gradients([(device.array(np.ones(1, np.float32)), mine[0]), *pairs[1:]])
    assert adam.iterations == 1
