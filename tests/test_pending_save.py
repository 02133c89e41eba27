"""Asynchronous saves: what is written is the state of the call, its errors are told once, and no save is lost."""

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
from reference import assert_same_bits
from snapshots import unchanged

import gpu_adam
from gpu_adam import ConcurrentStepError, Variable
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.state import checkpoint, saving

NOT_THERE = "none/state"


class Gate(io.BytesIO):
    """A file whose writer waits until it is let in."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()

    def write(self, content: Any) -> int:  # noqa: D102
        self.open.wait()
        return super().write(content)


class Work:
    """An optimizer of a dense and a sparse variable that has done two steps."""

    def __init__(self, device: Device, **config: Any) -> None:
        self.device, self.optimizer = device, gpu_adam.Adam(0.1, **config)
        self.variables = [Variable(np.ones((3, 2), np.float32), name="table"), Variable(np.ones(5), name="vector")]
        self.number = 0
        self.step()
        self.step()

    def step(self) -> None:
        """Take the next step."""
        self.number += 1
        table, vector = self.variables
        rows = self.device.array(np.array([2, 0, 2]))
        slices = gpu_adam.IndexedSlices(self.device.array(np.full((3, 2), self.number + 0.5, np.float32)), rows)
        self.optimizer.apply_gradients([(slices, table), (self.device.array(np.full(5, 1.0 * self.number)), vector)])

    def contents(self) -> dict[str, np.ndarray]:
        """What a file with the variables holds."""
        values = {f"{variable.name}/value": variable.numpy() for variable in self.variables}
        return {**self.optimizer.export(), **values}


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Files are written once this event is set; until then nobody reads what is to be written."""
    write, event = checkpoint.write, threading.Event()

    def after_the_event(*arguments: Any) -> None:
        event.wait()
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write", after_the_event)
    return event


def assert_same_arrays(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert_same_bits(found[name], array, name)


@pytest.mark.parametrize("config", [{}, {"loss_scale": gpu_adam.LossScale(4.0, 2)}], ids=["plain", "guarded"])
def test_the_next_steps_change_nothing_of_what_is_saved(
    device: Device, late: threading.Event, config: dict[str, Any]
) -> None:
    work, file = Work(device, **config), io.BytesIO()
    expected, losses = work.contents(), [0.5]
    pending = work.optimizer.save(file, variables=True, asynchronous=True, user={"losses": losses})
    for _ in range(3):
        work.step()
        losses.append(0.25)
    assert pending is not None
    was_done = pending.done
    late.set()
    pending.wait()
    assert (was_done, pending.done) == (False, True)
    arrays, note = checkpoint.read(file)
    assert_same_arrays(arrays, expected)
    assert note["user"] == {"losses": [0.5]}
    work.optimizer.load(file, variables=True)
    assert_same_arrays(work.contents(), expected)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_nobody_waits_for_the_copies(gpu: Device, emulation: Any, tmp_path: Path, seed: int) -> None:
    """They are one piece of the stream, whatever the device does when."""
    work = Work(gpu)
    expected = work.contents()
    emulation.reset()
    with emulation.asynchronous(seed=seed):
        note: dict[str, Any] = {}
        write = saving.writing(tmp_path / "state", work.optimizer._state, note, variables=True, lasting=True)
        for _ in range(3):
            work.step()
        counters = emulation.counters
        assert counters.syncs == []
        assert counters.d2h == len(expected) - 1  # the counter lies on the host
        write()
    assert_same_arrays(checkpoint.read(tmp_path / "state")[0], expected)


def test_memory_of_a_snapshot_that_nobody_reads(gpu: Device, emulation: Any) -> None:
    """It is given to nobody before its copies are made."""
    work = Work(gpu)
    with emulation.asynchronous(seed=5):
        for _ in range(4):
            arrays = [weight.value for weight in work.optimizer.weights[1:]]
            gpu.snapshot(arrays, lasting=True)
            kept = gpu.snapshot(arrays, lasting=True)
            work.step()
            read = kept.read()
    assert [array.shape for array in read] == [array.shape for array in arrays]


def test_no_save_becomes_part_of_a_graph(gpu: Device, tmp_path: Path) -> None:
    work = Work(gpu)
    for asynchronous in (False, True):
        with pytest.raises(ArgumentValueError, match="save must not be called while a graph is captured"):
            work.optimizer.capture(partial(work.optimizer.save, tmp_path / "state", asynchronous=asynchronous))
    assert list(tmp_path.iterdir()) == []


def test_a_save_returns_nothing_to_wait_for(device: Device, tmp_path: Path) -> None:
    assert Work(device).optimizer.save(tmp_path / "state") is None


# Errors.


def failed(work: Work, folder: Path) -> gpu_adam.state.pending_save.PendingSave:
    """An asynchronous save that has ended with a FileNotFoundError."""
    pending = work.optimizer.save(folder / NOT_THERE, asynchronous=True)
    assert pending is not None
    pending.join()
    return pending


def test_an_error_is_raised_by_whoever_waits(device: Device, tmp_path: Path) -> None:
    work = Work(device)
    pending = failed(work, tmp_path)
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            pending.wait()
    work.step()
    work.optimizer.save(tmp_path / "state")


@pytest.mark.parametrize("call", ["step", "stage", "replay", "save"])
def test_an_error_is_raised_by_the_next_call(device: Device, tmp_path: Path, call: str) -> None:
    """Which does nothing; after that the optimizer goes on."""
    work = Work(device)
    w = work.variables[1]
    gradient = device.array(np.ones(5))
    replay = work.optimizer.capture(lambda: work.optimizer.apply_gradients([(gradient, w)])).replay
    calls: dict[str, Callable[[], object]] = {
        "step": work.step,
        "stage": work.optimizer.stage,
        "replay": replay,
        "save": lambda: work.optimizer.save(tmp_path / "state"),
    }
    failed(work, tmp_path)
    with unchanged(work.optimizer, *work.variables), pytest.raises(FileNotFoundError):
        calls[call]()
    if call == "stage":
        with pytest.raises(ArgumentValueError, match="must follow the capture"):
            calls[call]()
    else:
        calls[call]()


def test_what_a_file_cannot_hold_is_told_at_once(device: Device, tmp_path: Path) -> None:
    optimizer, z = gpu_adam.Adam(), Variable(np.ones(2, np.complex128))
    optimizer.build([z])
    with pytest.raises(ArgumentTypeError, match="safetensors"):
        optimizer.save(tmp_path / "state.safetensors", asynchronous=True)
    with pytest.raises(ArgumentValueError, match=r"on_busy must be one of"):
        optimizer.save(tmp_path / "state", on_busy="skip")
    assert list(tmp_path.iterdir()) == []


# One save at a time.


def test_a_save_while_another_is_at_work(device: Device, tmp_path: Path) -> None:
    work, first, path = Work(device), Gate(), tmp_path / "state"
    pending = work.optimizer.save(first, asynchronous=True)
    assert pending is not None
    for asynchronous in (False, True):
        with pytest.raises(ConcurrentStepError, match="save must not be called while a save is at work"):
            work.optimizer.save(path, asynchronous=asynchronous, on_busy="error")
    timer = threading.Timer(0.1, first.open.set)
    timer.start()
    work.optimizer.save(path)
    assert pending.done
    assert path.read_bytes() == first.getvalue()
    timer.join()


def test_a_load_waits_for_the_save(device: Device) -> None:
    work, file = Work(device), Gate()
    expected = work.optimizer.export()
    work.optimizer.save(file, asynchronous=True)
    work.step()
    timer = threading.Timer(0.1, file.open.set)
    timer.start()
    work.optimizer.load(file)
    assert_same_arrays(work.optimizer.export(), expected)
    timer.join()


def test_a_relative_path_is_that_of_the_call(
    device: Device, late: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    work = Work(device)
    pending = work.optimizer.save("state", asynchronous=True)
    monkeypatch.chdir(tmp_path)
    late.set()
    assert pending is not None
    pending.wait()
    assert (tmp_path / "here" / "state").exists()


# Copies, and the end.


def test_copies_of_an_optimizer_that_saves(device: Device) -> None:
    work, file = Work(device), Gate()
    pending = work.optimizer.save(file, asynchronous=True)
    for other in (copy.deepcopy(work.optimizer), pickle.loads(pickle.dumps(work.optimizer))):
        again = io.BytesIO()
        other.save(again, on_busy="error")
        assert_same_arrays(checkpoint.read(again)[0], work.optimizer.export())
    file.open.set()
    assert pending is not None
    pending.wait()


def test_an_optimizer_that_nobody_holds_any_more(device: Device) -> None:
    work, file = Work(device), Gate()
    expected, gone = work.optimizer.export(), weakref.ref(work.optimizer)
    pending = work.optimizer.save(file, asynchronous=True)
    del work
    gc.collect()
    assert gone() is None
    file.open.set()
    assert pending is not None
    pending.wait()
    assert_same_arrays(checkpoint.read(file)[0], expected)


LAST_WORDS = """
import sys, time, numpy, gpu_adam
from gpu_adam.state import checkpoint
write = checkpoint.write
def slowly(*arguments):
    time.sleep(0.5)
    write(*arguments)
checkpoint.write = slowly
variable, optimizer = gpu_adam.Variable(numpy.ones(3), name="w"), gpu_adam.Adam()
optimizer.apply_gradients([(numpy.ones(3), variable)])
optimizer.save(PATH, asynchronous=True)
"""


def test_the_interpreter_exits_after_the_save(tmp_path: Path) -> None:
    path = tmp_path / "state"
    assert processes.run(LAST_WORDS.replace("PATH", repr(str(path)))) == ""
    assert checkpoint.read(path)[0]["iterations"] == 1


def test_an_error_that_nobody_was_told_is_shown_at_the_end(tmp_path: Path) -> None:
    shown = processes.run(LAST_WORDS.replace("PATH", repr(str(tmp_path / NOT_THERE))))
    assert shown.count("FileNotFoundError") == 1
