"""Calls that fail: no memory, no kernel, no sense, a warning turned into an error. Nothing changes, nothing is kept.

Whether a call leaves everything as it was is judged as for interruptions: see injection.py.
"""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import injection
import numpy as np
import pytest
import reference
from injection import SCENARIOS
from reference import assert_same_bits
from snapshots import unchanged

import gpu_adam
from gpu_adam import GpuAdamError, IndexedSlices, KernelCompileError, SlotNotFoundError, Variable
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, SparseIndexError

X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)


class Failing:
    """Counts calls of some methods of a device; number `target` of them, counted from 0, raises `error`."""

    def __init__(
        self, device: Device, methods: tuple[str, ...], error: BaseException, target: int | None = None
    ) -> None:
        self._device, self._methods, self._error, self._target = device, methods, error, target
        self.calls = 0

    @contextmanager
    def patched(self) -> Iterator[None]:
        """The device's methods fail in this block."""
        with pytest.MonkeyPatch.context() as patch:
            for name in self._methods:
                patch.setattr(self._device, name, self._counted(getattr(self._device, name)))
            yield

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls - 1 == self._target:
                raise self._error
            return method(*arguments, **options)

        return counted


def torn(device: Device, name: str, methods: tuple[str, ...], error: BaseException) -> tuple[int, list[str]]:
    """How many calls of the methods a scenario makes, and what is torn after each of them has failed in its turn."""
    factory = SCENARIOS[name](device)
    expect = injection.expected(factory)
    counting, world = Failing(device, methods, error), factory()
    with counting.patched():
        world.call()
    results = []
    for target in range(counting.calls):
        for retry in (True, False):
            world = factory()
            identities, failing = world.identities(), Failing(device, methods, error, target)
            with failing.patched():
                try:
                    world.call()
                except type(error) as raised:
                    raised.__traceback__ = None
                else:
                    results.append(f"call {target}: the error is lost")
                    continue
            why = injection.verdict(world, expect, identities, retry=retry, only_before=True)
            if why:
                results.append(f"call {target}: {why}")
    return counting.calls, results


ALLOCATING = [
    name for name in SCENARIOS if name.startswith(("first step", "build", "add_slot", "minimize, first", "replace"))
]


@pytest.mark.parametrize("name", ALLOCATING)
def test_no_memory(device: Device, name: str) -> None:
    """Every allocation of the call fails in its turn: all is as before, and a second try or another step succeeds."""
    calls, results = torn(device, name, ("empty", "array", "zeros"), MemoryError("no memory left"))
    assert calls >= 1
    assert results == []


@pytest.mark.parametrize(
    "name", ["set_weights", "load", "iterations =, fresh", *[n for n in SCENARIOS if "later" in n]]
)
def test_no_memory_where_little_is_needed(device: Device, name: str) -> None:
    _, results = torn(device, name, ("empty", "array", "zeros"), MemoryError("no memory left"))
    assert results == []


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith(("first step", "minimize, first"))])
def test_a_kernel_that_does_not_compile(device: Device, name: str) -> None:
    error = KernelCompileError("kernel 'adam_step'", "must compile", "line 1: error", "report it")
    calls, results = torn(device, name, ("prepare",), error)
    assert calls >= 1
    assert results == []


def test_no_memory_for_a_variable_that_comes_later(device: Device) -> None:
    """The slots of those that were there stay, bits and objects alike."""
    x, y, g = Variable(X), device.array(X + 1), device.array(np.ones_like(X))
    methods, error = ("empty", "array", "zeros"), MemoryError("no memory left")

    def started() -> tuple[gpu_adam.Adam, Any]:
        optimizer = gpu_adam.Adam(0.1)
        optimizer.apply_gradients([(g, x)])
        return optimizer, device.array(X + 1)

    optimizer, new = started()
    counting = Failing(device, methods, error)
    with counting.patched():
        optimizer.apply_gradients([(g, x), (g, new)])
    assert counting.calls >= 2
    for target in range(counting.calls):
        optimizer, new = started()
        failing = Failing(device, methods, error, target)
        with unchanged(optimizer, x, new), failing.patched(), pytest.raises(MemoryError):
            optimizer.apply_gradients([(g, x), (g, new)])
        error.__traceback__ = None
        watched = weakref.ref(new)
        del new
        gc.collect()
        assert watched() is None
        assert optimizer.apply_gradients([(g, x), (g, y)]) == 2


# Warnings as errors


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("raw", [False, True], ids=["Variable", "raw"])
def test_a_warning_turned_into_an_error(device: Device, raw: bool, steps: int) -> None:
    make = device.array if raw else Variable
    x, y, g = make(X), make(X + 1), device.array(np.ones_like(X))
    optimizer = gpu_adam.Adam(0.1)
    for _ in range(steps):
        optimizer.apply_gradients([(g, x)])
    watched = [weakref.ref(y)] if steps else [weakref.ref(x), weakref.ref(y)]
    with warnings.catch_warnings(), unchanged(optimizer, x, y):
        warnings.simplefilter("error")
        for pairs in ([(g, x), (None, y)], [(None, y), (g, x)]):
            with pytest.raises(UserWarning, match="no gradient for the variables"):
                optimizer.apply_gradients(pairs)
    del y, pairs
    if not steps:
        del x
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)
    assert (optimizer.weights == []) == (steps == 0)


def test_a_warning_does_not_stop_the_step(device: Device) -> None:
    x, y, g = Variable(X), Variable(X), device.array(np.ones_like(X))
    optimizer = gpu_adam.Adam(0.1)
    with pytest.warns(UserWarning, match="no gradient"):
        assert optimizer.apply_gradients([(g, x), (None, y)]) == 1
    oracle = reference.Adam([X], 0.1)
    oracle.step([np.ones_like(X)])
    assert_same_bits(x.numpy(), oracle.variables[0])
    assert len(optimizer.weights) == 3


# Strangers that a refused call must not keep


def refused_get_slot(optimizer: gpu_adam.Adam, stranger: Any, device: Device) -> None:
    with pytest.raises(SlotNotFoundError):
        optimizer.get_slot(stranger, "m")


def refused_name(optimizer: gpu_adam.Adam, stranger: Any, device: Device) -> None:
    with pytest.raises(ArgumentValueError):
        optimizer.add_slot(stranger, "note", "unknown")


def refused_none(optimizer: gpu_adam.Adam, stranger: Any, device: Device) -> None:
    with pytest.raises(ArgumentValueError):
        optimizer.add_slot(stranger, "note", None)


def refused_words(optimizer: gpu_adam.Adam, stranger: Any, device: Device) -> None:
    with pytest.raises(ArgumentTypeError):
        optimizer.add_slot(stranger, "note", ["a", "b"])


def refused_shape(optimizer: gpu_adam.Adam, stranger: Any, device: Device) -> None:
    with pytest.raises(ArgumentValueError):
        optimizer.add_slot(stranger, "m", device.array(np.zeros(7, np.float32)))


def refused_callable(optimizer: gpu_adam.Adam, stranger: Any, device: Device) -> None:
    def fail(shape: Any, dtype: Any) -> Any:
        raise LookupError("the caller's own")

    with pytest.raises(LookupError, match="the caller's own"):
        optimizer.add_slot(stranger, "note", fail)


def refused_index(optimizer: gpu_adam.Adam, stranger: Any, device: Device) -> None:
    if not device.checks_indices:
        pytest.skip("a CUDA device says so later")
    for rows in ([3], [-1], [0, 2**40]):
        slices = IndexedSlices(device.array(np.ones((len(rows), 2), np.float32)), device.array(np.array(rows)))
        with pytest.raises(SparseIndexError):
            optimizer.apply_gradients([(slices, stranger)])


def refused_gradient_shape(optimizer: gpu_adam.Adam, stranger: Any, device: Device) -> None:
    with pytest.raises(ArgumentValueError):
        optimizer.apply_gradients([(device.array(np.ones(5, np.float32)), stranger)])


def refused_gradient_kind(optimizer: gpu_adam.Adam, stranger: Any, device: Device) -> None:
    with pytest.raises(ArgumentTypeError):
        optimizer.apply_gradients([(object(), stranger)])


def refused_second_pair(optimizer: gpu_adam.Adam, stranger: Any, device: Device) -> None:
    with pytest.raises(ArgumentTypeError):
        optimizer.apply_gradients([(device.array(X), stranger), (device.array(X), "a word")])


def refused_build(optimizer: gpu_adam.Adam, stranger: Any, device: Device) -> None:
    with pytest.raises(ArgumentTypeError):
        optimizer.build([stranger, "a word"])


def refused_rate(optimizer: gpu_adam.Adam, stranger: Any, device: Device) -> None:
    def fail() -> float:
        raise LookupError("the caller's own")

    rate, optimizer.learning_rate = optimizer.learning_rate, fail
    with pytest.raises(LookupError, match="the caller's own"):
        optimizer.apply_gradients([(device.array(X), stranger)])
    optimizer.learning_rate = rate


REFUSED = [function for name, function in list(globals().items()) if name.startswith("refused_")]


@pytest.mark.parametrize("call", REFUSED, ids=lambda call: call.__name__.removeprefix("refused_"))
@pytest.mark.parametrize("raw", [False, True], ids=["Variable", "raw"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_stranger_is_not_kept_alive(
    device: Device, call: Callable[[gpu_adam.Adam, Any, Device], None], raw: bool, steps: int
) -> None:
    optimizer, x = gpu_adam.Adam(0.1), Variable(X)
    for _ in range(steps):
        optimizer.apply_gradients([(device.array(X), x)])
    stranger = device.array(X) if raw else Variable(X)
    watched = weakref.ref(stranger)
    with unchanged(optimizer, x, stranger):
        call(optimizer, stranger, device)
    del stranger
    gc.collect()
    assert watched() is None
    assert optimizer.apply_gradients([(device.array(X), x)]) == steps + 1


@pytest.mark.parametrize("call", ["step", "build"])
@pytest.mark.parametrize("dtype", ["int32", "bool", "uint8"])
def test_a_dtype_without_a_kernel(device: Device, call: str, dtype: str) -> None:
    optimizer, x, wrong = gpu_adam.Adam(0.1), device.array(X), device.array(np.ones(3, dtype))
    watched = [weakref.ref(x), weakref.ref(wrong)]
    calls: dict[str, Callable[[Any, Any], object]] = {
        "step": lambda x, wrong: optimizer.apply_gradients([(device.array(X), x), (wrong, wrong)]),
        "build": lambda x, wrong: optimizer.build([x, wrong]),
    }
    with unchanged(optimizer, x, wrong), pytest.raises(GpuAdamError):
        calls[call](x, wrong)
    del x, wrong
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


def test_a_refused_call_leaves_no_trace_of_a_known_memory(device: Device) -> None:
    """Memory that a refused call has seen may be given again, as another object and another shape."""
    optimizer, memory = gpu_adam.Adam(0.1), device.array(X)
    with pytest.raises(SlotNotFoundError):
        optimizer.get_slot(memory, "m")
    flat = memory.reshape(-1)
    assert optimizer.apply_gradients([(device.array(np.ones(6, np.float32)), flat)]) == 1
    assert [weight.shape for weight in optimizer.weights] == [(), (6,), (6,)]
