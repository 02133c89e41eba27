"""Threads: one optimizer steps in one thread at a time and says so in the others; several optimizers go on together."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import processes
import pytest
import reference
from reference import assert_same_bits
from snapshots import unchanged

import gpu_adam
from gpu_adam import GpuAdamError, IndexedSlices, Variable
from gpu_adam.devices import Device

WAIT = 20.0
"""Seconds after which a test gives up: far more than a step takes."""


@pytest.fixture(autouse=True)
def quick_switches() -> Iterator[None]:
    """Let threads take turns as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_the_error_and_its_names() -> None:
    error = gpu_adam.ConcurrentStepError
    assert error is gpu_adam.errors.ConcurrentStepError
    assert issubclass(error, GpuAdamError)
    assert issubclass(error, RuntimeError)
    assert "ConcurrentStepError" in gpu_adam.__all__


class Rate:
    """A callable learning rate that stops inside a step until it is told to go on."""

    def __init__(self) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> float:
        """Wait."""
        self.inside.set()
        assert self.go_on.wait(WAIT)
        return 0.1


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("kind", ["dense", "sparse", "other variables"])
def test_a_step_during_a_step_is_refused(device: Device, steps: int, kind: str) -> None:
    """In another thread, while the first one is inside of its step; that one goes on undisturbed."""
    x, y = Variable(np.ones((3, 2), np.float32)), Variable(np.ones(2, np.float32))
    g = device.array(np.ones((3, 2), np.float32))
    optimizer = gpu_adam.Adam(0.1)
    pairs: list[Any] = [(g, x)]
    for _ in range(steps):
        optimizer.apply_gradients(pairs)
    rate = optimizer.learning_rate = Rate()
    others: dict[str, list[Any]] = {
        "dense": pairs,
        "sparse": [(IndexedSlices(device.array(np.ones((1, 2), np.float32)), device.array(np.array([1]))), x)],
        "other variables": [(device.array(np.ones(2, np.float32)), y)],
    }
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(optimizer.apply_gradients, pairs)
        assert rate.inside.wait(WAIT)
        try:
            for _ in range(3):
                with unchanged(optimizer, x, y), pytest.raises(gpu_adam.ConcurrentStepError, match="must"):
                    optimizer.apply_gradients(others[kind])
        finally:
            rate.go_on.set()
        assert first.result(WAIT) == steps + 1
    assert optimizer.apply_gradients(pairs) == steps + 2
    oracle = reference.Adam([np.ones((3, 2), np.float32)], 0.1)
    for _ in range(steps + 2):
        oracle.step([np.ones((3, 2), np.float32)])
    assert_same_bits(x.numpy(), oracle.variables[0])


@pytest.mark.parametrize("steps", [0, 2])
def test_a_step_inside_of_a_step_is_refused(device: Device, steps: int) -> None:
    """A callable hyperparameter that steps the same optimizer, in the same thread."""
    x = Variable(np.ones(3, np.float32))
    pairs = [(device.array(np.ones(3, np.float32)), x)]
    optimizer = gpu_adam.Adam(0.1)
    for _ in range(steps):
        optimizer.apply_gradients(pairs)

    def stepping() -> float:
        optimizer.apply_gradients(pairs)
        return 0.1

    optimizer.learning_rate = stepping
    for _ in range(2):
        with unchanged(optimizer, x), pytest.raises(gpu_adam.ConcurrentStepError):
            optimizer.apply_gradients(pairs)
    optimizer.learning_rate = 0.1
    assert optimizer.apply_gradients(pairs) == steps + 1


def test_a_step_of_another_optimizer_inside_of_a_step(device: Device) -> None:
    """Is nobody else's business: a learned rate is stepped so."""
    x, rate = Variable(np.ones(3, np.float32)), Variable(np.float32(0.1))
    g = device.array(np.ones(3, np.float32))
    inner = gpu_adam.Adam(0.01)

    def learned() -> float:
        inner.apply_gradients([(device.array(np.float32(1)), rate)])
        return float(rate)

    outer = gpu_adam.Adam(learned)
    assert [outer.apply_gradients([(g, x)]) for _ in range(3)] == [1, 2, 3]
    assert inner.iterations == 3


def test_usable_after_every_kind_of_error(device: Device) -> None:
    """A step that raises, wherever it does, leaves the optimizer free for the next one."""
    x = Variable(np.ones(3, np.float32))
    g = device.array(np.ones(3, np.float32))
    optimizer = gpu_adam.Adam(0.1)

    def failing() -> float:
        raise LookupError("the caller's own")

    def failing_pairs() -> Iterator[Any]:
        yield g, x
        raise LookupError("the caller's own")

    for number in range(1, 4):
        for pairs in ([], [(None, x)], [(device.array(np.ones(4, np.float32)), x)], [(g, "x")], 3):
            with pytest.raises(GpuAdamError):
                optimizer.apply_gradients(pairs)  # type: ignore[arg-type]
        with pytest.raises(LookupError):
            optimizer.apply_gradients(failing_pairs())
        optimizer.learning_rate = failing
        with pytest.raises(LookupError):
            optimizer.apply_gradients([(g, x)])
        optimizer.learning_rate = 0.1
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(optimizer.apply_gradients, [(g, x)]).result(WAIT) == number


RUSH = """
import sys, threading
import numpy as np, gpu_adam
gpu_adam.set_device({device!r})
sys.setswitchinterval(1e-6)
device, sparse, first = gpu_adam.get_device(), {sparse}, {first}
ROWS, THREADS, CALLS = 20_000, 4, 40
x = gpu_adam.Variable(np.ones((ROWS, 2), np.float32))
g = device.array(np.ones((ROWS, 2), np.float32))
optimizer = gpu_adam.Adam(0.1)

def gradient():
    if not sparse:
        return g
    return gpu_adam.IndexedSlices(g, device.array(np.arange(ROWS)[::-1].copy()))

if not first:
    optimizer.apply_gradients([(gradient(), x)])
returned, refused, wrong = [], [], []
begin = threading.Barrier(THREADS)

def work():
    begin.wait()
    mine = 0
    while mine < CALLS and not wrong:
        try:
            returned.append(optimizer.apply_gradients([(gradient(), x)]))
            mine += 1
        except gpu_adam.ConcurrentStepError as error:
            refused.append(None)
        except BaseException as error:
            wrong.append(repr(error))

threads = [threading.Thread(target=work) for _ in range(THREADS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
done = (0 if first else 1) + len(returned)
assert not wrong, wrong[:3]
assert len(returned) == THREADS * CALLS
assert sorted(returned) == list(range(1 if first else 2, done + 1)), "counts must be those of whole steps"
assert int(optimizer.iterations) == done, (int(optimizer.iterations), done)
assert len(optimizer.weights) == 3
one, twin = gpu_adam.Variable(np.float32(1)), gpu_adam.Adam(0.1)
for _ in range(done):
    twin.apply_gradients([(device.array(np.float32(1)), one)])
assert (x.numpy() == one.numpy()).all(), (np.unique(x.numpy()), one.numpy())
for ours, theirs in zip(optimizer.weights[1:], twin.weights[1:], strict=True):
    assert (ours.numpy() == theirs.numpy()).all()
print("done")
"""


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_every_call_steps_wholly_or_is_refused(device: Device, sparse: bool, first: bool) -> None:
    """Four threads that step one optimizer as fast as they can; in a process of its own, which must not crash."""
    if getattr(device.xp, "__emulated__", False):
        pytest.skip("needs a real GPU: an emulated driver is that of one process")
    assert processes.run(RUSH.format(device=device.name, sparse=sparse, first=first)) == "done"


def _in_threads(*works: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(WAIT) for future in [pool.submit(work) for work in works]]


def test_different_optimizers_go_on_in_parallel(device: Device) -> None:
    """Both are inside of a step at once: each one's rate waits there for the other's."""
    together = threading.Barrier(2)

    def rate() -> float:
        together.wait(WAIT)
        return 0.1

    def train(number: int) -> list[Any]:
        x, g = Variable(np.full(1000, number, np.float32)), device.array(np.ones(1000, np.float32))
        optimizer = gpu_adam.Adam(rate)
        return [*(optimizer.apply_gradients([(g, x)]) for _ in range(5)), x.numpy()]

    for number, result in enumerate(_in_threads(lambda: train(0), lambda: train(1))):
        oracle = reference.Adam([np.full(1000, number, np.float32)], 0.1)
        for _ in range(5):
            oracle.step([np.ones(1000, np.float32)])
        assert result[:-1] == [1, 2, 3, 4, 5]
        assert_same_bits(result[-1], oracle.variables[0])


def test_many_optimizers_in_many_threads(device: Device) -> None:
    """Dense and sparse, first steps and later ones: each comes to the bits that it has alone."""
    if getattr(device.xp, "__emulated__", False):
        pytest.skip("needs a real GPU: an emulated driver keeps account of the memory of one thread")

    def train(number: int) -> list[bytes]:
        x = Variable(np.full((50, 4), number, np.float32))
        optimizer = gpu_adam.Adam(0.1, amsgrad=bool(number % 2))
        rows = np.arange(0, 50, 3)
        for step in range(20):
            g: Any = device.array(np.cos(np.arange(200, dtype=np.float32) + step).reshape(50, 4))
            if step % 2:
                g = IndexedSlices(g[: len(rows)], device.array(rows))
            optimizer.apply_gradients([(g, x)])
        return [x.numpy().tobytes(), *(weight.numpy().tobytes() for weight in optimizer.weights)]

    alone = [train(number) for number in range(4)]
    assert _in_threads(*(lambda number=number: train(number) for number in range(4))) == alone
