"""The tape frees what it holds."""

import contextlib
import gc
import resource
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam.autodiff import register_vjp, value_and_grad
from gpu_adam.autodiff.node import Node
from gpu_adam.devices import Device


@pytest.fixture
def recorded_objects() -> Iterator[Callable[[], int]]:
    """How many recorded values there are more than before. Only reference counts free memory: a cycle would keep it."""
    gc.collect()
    before = count_recorded_objects()
    gc.disable()
    yield lambda: count_recorded_objects() - before
    gc.enable()


def loss_of(x: Variable) -> Any:
    hidden = np.tanh(x @ np.ones((8, 8), like=x))
    return np.sum(np.logaddexp.reduce(hidden * x, axis=1)) + np.linalg.norm(hidden) + np.sum(np.take(x, [0, 1], axis=0))


def count_recorded_objects() -> int:
    return sum(type(o) is Node for o in gc.get_objects())


def test_nothing_is_left_after_a_step(device: Device, recorded_objects: Callable[[], int]) -> None:
    x = Variable(np.ones((4, 8)))
    value_and_grad(lambda: loss_of(x), x)
    assert recorded_objects() == 0


@pytest.mark.usefixtures("recorded_objects")
def test_arrays_are_freed_with_the_tape(device: Device) -> None:
    x = Variable(np.ones(1000))
    kept: list[Any] = []

    def loss() -> Any:
        hidden: Any = np.exp(x)
        kept.append(weakref.ref(hidden.array))
        return np.sum(hidden * x)

    value_and_grad(loss, x)
    assert kept[0]() is None


def test_a_kept_result_keeps_its_value_only(device: Device, recorded_objects: Callable[[], int]) -> None:
    x = Variable(np.ones(1000))
    kept: list[Any] = []

    def loss() -> Any:
        hidden: Any = np.exp(x)
        kept.extend([weakref.ref(hidden.array), np.sum(hidden * x)])
        return kept[1]

    value_and_grad(loss, x)
    assert kept[0]() is None
    assert recorded_objects() == 1


def test_a_failed_loss_leaves_nothing(device: Device, recorded_objects: Callable[[], int]) -> None:
    x = Variable(np.ones((4, 8)))

    def loss() -> Any:
        loss_of(x)
        raise KeyError

    with contextlib.suppress(KeyError):
        value_and_grad(loss, x)
    assert recorded_objects() == 0


def failing(x: Any) -> Any:
    return x * 2


def test_an_error_of_the_backward_pass_names_the_operation_and_the_line(device: Device) -> None:
    x = Variable(np.ones((4, 8)))
    own = register_vjp(failing, lambda g, y, x: g.nonsense)

    def loss() -> Any:
        hidden = np.exp(x) + 1
        return np.sum(own(hidden))

    with pytest.raises(AttributeError) as caught:
        value_and_grad(loss, x)
    notes = getattr(caught.value, "__notes__", caught.value.args)  # Python 3.10 has no notes
    line = loss.__code__.co_firstlineno + 2
    assert notes[-1] == (
        "This is the derivative of what was recorded by autodiff.test_tape.failing "
        f'in "{__file__}", line {line}, in loss.'
    )


def resident_bytes() -> int:
    """Memory of this process now, not at its peak."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.long
def test_many_steps_do_not_grow_the_process(device: Device) -> None:
    x = Variable(np.ones((4, 8)))
    for _ in range(100):
        value_and_grad(lambda: loss_of(x), x)
    before = resident_bytes()
    for _ in range(10_000):
        value_and_grad(lambda: np.sum(np.tanh(x) * x) + np.sum(np.take(x, [0, 1], axis=0)), x)
    assert resident_bytes() - before < 2**20
