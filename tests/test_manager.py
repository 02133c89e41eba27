"""CheckpointManager: when it saves, which files stay, what is restored, and signals that wait for the end of a step."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest

import gpu_adam
from gpu_adam import CheckpointManager, Variable
from gpu_adam.communicators import Alone
from gpu_adam.devices import Device
from gpu_adam.distributed import DataParallelAdam, ShardedAdam
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, CheckpointError, CheckpointWarning
from gpu_adam.state import checkpoint


class Save:
    """A save that is written when a test says so, or when it is waited for."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content, self.done = path, content, False
        self.error: OSError | None = None

    def write(self) -> None:
        """Complete it."""
        self.path.write_bytes(self.content)
        self.done = True

    def wait(self) -> None:
        """Complete it, unless it was, or fail."""
        if self.error is not None:
            raise self.error
        if not self.done:
            self.write()


class Optimizer:
    """What a manager needs of one. Its files hold the number of steps; with a "?" they are damaged."""

    def __init__(self) -> None:
        self.iterations = Variable(np.int64(0), device="host")
        self.saves: list[Save] = []

    def save(self, path: Path, *, variables: bool, asynchronous: bool) -> Save:
        """Begin a save."""
        assert (variables, asynchronous) == (True, True)
        self.saves.append(Save(path, b"%d" % int(self.iterations)))
        return self.saves[-1]

    def load(self, path: Path, *, variables: bool) -> None:
        """Take the number of steps."""
        assert variables
        content = path.read_bytes()
        if not content.isdigit():
            raise CheckpointError(str(path), "must hold a number", content, "pass another")
        self.iterations.assign(int(content))


@pytest.fixture
def optimizer(monkeypatch: pytest.MonkeyPatch) -> Optimizer:
    def read(path: Path) -> None:
        if b"?" in path.read_bytes():
            raise CheckpointError(str(path), "must be whole", "damage", "pass another")

    monkeypatch.setattr(checkpoint, "read", read)
    return Optimizer()


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def file(step: int, suffix: str = "") -> str:
    return f"step-{step:09}{suffix}.npz"


def run_to(manager: CheckpointManager, optimizer: Optimizer, end: int, by: int = 1) -> list[int]:
    """Take steps, each save written before the next; after which of them the manager saved."""
    saved = []
    while int(optimizer.iterations) < end:
        optimizer.iterations.assign_add(by)
        path = manager.step()
        if path is not None:
            assert path == optimizer.saves[-1].path
            optimizer.saves[-1].write()
            saved.append(int(optimizer.iterations))
    return saved


# When.


def test_it_saves_at_multiples(tmp_path: Path, optimizer: Optimizer) -> None:
    manager = CheckpointManager(tmp_path, optimizer, every_steps=10)
    assert run_to(manager, optimizer, 35) == [10, 20, 30]
    assert names(tmp_path) == [file(10), file(20), file(30)]


def test_multiples_that_are_passed(tmp_path: Path, optimizer: Optimizer) -> None:
    """Replays of a graph may be several steps."""
    manager = CheckpointManager(tmp_path, optimizer, every_steps=10)
    assert run_to(manager, optimizer, 40, by=4) == [12, 20, 32, 40]


def test_it_saves_by_time(tmp_path: Path, optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    manager = CheckpointManager(tmp_path, optimizer, every_seconds=5)
    saved = []
    for second in range(20):
        now[0] = float(second)
        optimizer.iterations.assign_add(1)
        if manager.step() is not None:
            saved.append(second)
            optimizer.saves[-1].write()
    assert saved == [5, 10, 15]
    now[0] = 100.0
    assert manager.step() is not None
    optimizer.saves[-1].write()
    now[0] = 200.0
    assert manager.step() is None, "there is nothing new to save"


def test_by_steps_and_by_time(tmp_path: Path, optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    manager = CheckpointManager(tmp_path, optimizer, every_steps=10, every_seconds=5)
    assert run_to(manager, optimizer, 13) == [10]
    now[0] = 6.0
    assert run_to(manager, optimizer, 22) == [14, 20]


def test_it_saves_never_unless_asked(tmp_path: Path, optimizer: Optimizer) -> None:
    manager = CheckpointManager(tmp_path, optimizer)
    assert run_to(manager, optimizer, 30) == []
    assert manager.save() == tmp_path / file(30)
    assert manager.save() == tmp_path / file(30), "the state is in that file already"
    assert len(optimizer.saves) == 1
    assert names(tmp_path) == [file(30)]


def test_a_save_waits_for_the_one_before(tmp_path: Path, optimizer: Optimizer) -> None:
    """No step in between does."""
    manager = CheckpointManager(tmp_path, optimizer, every_steps=10)
    for _ in range(19):
        optimizer.iterations.assign_add(1)
        manager.step()
    assert [save.path.name for save in optimizer.saves] == [file(10)]
    assert not optimizer.saves[0].done
    optimizer.iterations.assign_add(1)
    assert manager.step() == tmp_path / file(20)
    assert [save.done for save in optimizer.saves] == [True, False]


def test_the_first_multiple_after_a_restored_step(tmp_path: Path, optimizer: Optimizer) -> None:
    (tmp_path / file(17)).write_bytes(b"17")
    manager = CheckpointManager(tmp_path, optimizer, every_steps=10)
    assert manager.restore_latest() == tmp_path / file(17)
    assert run_to(manager, optimizer, 31) == [20, 30]


def test_errors_of_the_writer_come_out(tmp_path: Path, optimizer: Optimizer) -> None:
    """And the file that could not be written is none: nothing is removed for it, and the state is saved again."""
    manager = CheckpointManager(tmp_path, optimizer, every_steps=10, keep=1)
    run_to(manager, optimizer, 10)
    optimizer.iterations.assign(20)
    manager.step()
    optimizer.saves[-1].error = OSError(28, "No space left on device")
    optimizer.saves[-1].done = True
    with pytest.raises(OSError, match="No space left"):
        manager.step()
    assert names(tmp_path) == [file(10)]
    assert manager.save() == tmp_path / file(20)
    assert names(tmp_path) == [file(20)]


@pytest.mark.parametrize("argument", ["every_steps", "every_seconds", "keep"])
def test_arguments(tmp_path: Path, optimizer: Optimizer, argument: str) -> None:
    for wrong in (0, -1, *([float("nan"), float("inf")] if argument == "every_seconds" else [])):
        with pytest.raises(ArgumentValueError, match=f"{argument} must be >"):
            CheckpointManager(tmp_path / "new", optimizer, **{argument: wrong})  # type: ignore[arg-type]
    for odd in ("10", True, [1], *([1.5] if argument != "every_seconds" else [])):
        with pytest.raises(ArgumentTypeError, match=f"{argument} must be"):
            CheckpointManager(tmp_path / "new", optimizer, **{argument: odd})  # type: ignore[arg-type]
    assert names(tmp_path) == []


def test_an_optimizer_of_several_ranks_is_refused(tmp_path: Path) -> None:
    """One rank's time to save is not another's."""
    for kind in (ShardedAdam, DataParallelAdam):
        words = rf"optimizer must be of one process \(got {kind.__name__}\); call its save on all ranks"
        with pytest.raises(ArgumentValueError, match=words):
            CheckpointManager(tmp_path / "new", kind(Alone("host")))
    assert names(tmp_path) == []


def test_the_directory_is_made(tmp_path: Path, optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its name is durable, as those of the directories above it that are new."""
    synced, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    CheckpointManager(tmp_path / "a" / "b", optimizer)
    assert (tmp_path / "a" / "b").is_dir()
    assert synced == [str(tmp_path), str(tmp_path / "a")]
    CheckpointManager(tmp_path / "a" / "b", optimizer)
    assert len(synced) == 2


# Which files stay.


def test_the_newest_are_kept(tmp_path: Path, optimizer: Optimizer) -> None:
    for name in ("step-1.npz", "notes.txt", "step-000000001.npz.old", "step-000000001.safetensors"):
        (tmp_path / name).touch()
    others = names(tmp_path)
    manager = CheckpointManager(tmp_path, optimizer, every_steps=10, keep=2)
    run_to(manager, optimizer, 50)
    manager.wait()
    assert names(tmp_path) == sorted([*others, file(40), file(50)])


def test_older_ones_go_only_after_the_newer_one_is_there(tmp_path: Path, optimizer: Optimizer) -> None:
    manager = CheckpointManager(tmp_path, optimizer, every_steps=10, keep=1)
    run_to(manager, optimizer, 19)
    optimizer.iterations.assign_add(1)
    manager.step()
    optimizer.iterations.assign_add(1)
    manager.step()
    assert names(tmp_path) == [file(10)]
    optimizer.saves[-1].write()
    assert names(tmp_path) == [file(10), file(20)]
    manager.step()
    assert names(tmp_path) == [file(20)]


def test_files_of_more_steps_neither_count_nor_go(tmp_path: Path, optimizer: Optimizer) -> None:
    """Such as those of a run that was to be better, which a program has gone back before."""
    for step in (10, 30, 40):
        (tmp_path / file(step)).write_bytes(b"%d" % step)
    optimizer.load(tmp_path / file(10), variables=True)
    manager = CheckpointManager(tmp_path, optimizer, every_steps=10, keep=1)
    assert run_to(manager, optimizer, 20) == [20]
    manager.wait()
    assert names(tmp_path) == [file(20), file(30), file(40)]


def test_a_file_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(tmp_path, optimizer, every_steps=10, keep=1)

    def refuse(path: Path, missing_ok: bool) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    run_to(manager, optimizer, 10)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.warns(CheckpointWarning, match=r"cannot be removed: .*step-000000010\.npz"):
        run_to(manager, optimizer, 21)
    assert names(tmp_path) == [file(10), file(20)]


# What is restored.


def test_nothing_to_restore(tmp_path: Path, optimizer: Optimizer) -> None:
    (tmp_path / "other.npz").touch()
    manager = CheckpointManager(tmp_path, optimizer)
    assert manager.restore_latest() is None
    assert int(optimizer.iterations) == 0


def test_steps_are_numbers(tmp_path: Path, optimizer: Optimizer) -> None:
    """And sort as such, beyond the nine digits, too."""
    for step in (999_999_999, 1_000_000_000, 5):
        (tmp_path / file(step)).write_bytes(b"%d" % step)
    assert CheckpointManager(tmp_path, optimizer).restore_latest() == tmp_path / "step-1000000000.npz"


def test_damaged_files_are_skipped(tmp_path: Path, optimizer: Optimizer) -> None:
    """With a warning for each; they are not overwritten, do not count among those kept, and stay."""
    for step, content in ((10, b"10"), (20, b"?"), (30, b"??"), (5, b"5")):
        (tmp_path / file(step)).write_bytes(content)
    manager = CheckpointManager(tmp_path, optimizer, every_steps=10, keep=2)
    with pytest.warns(CheckpointWarning) as warned:
        assert manager.restore_latest() == tmp_path / file(10)
    assert [str(warning.message) for warning in warned] == [
        f"a checkpoint is skipped: {tmp_path / file(step)} must hold a number (got {content!r}); pass another."
        for step, content in ((30, b"??"), (20, b"?"))
    ]
    assert all(warning.filename == __file__ for warning in warned)
    assert run_to(manager, optimizer, 20) == [20]
    manager.wait()
    assert names(tmp_path) == [file(10), file(20, "-1"), file(20), file(30)]
    assert (tmp_path / file(20)).read_bytes() == b"?"
    with pytest.warns(CheckpointWarning):
        assert CheckpointManager(tmp_path, optimizer).restore_latest() == tmp_path / file(20, "-1")
    assert run_to(manager, optimizer, 30) == [30]
    manager.wait()
    assert names(tmp_path) == [file(20, "-1"), file(20), file(30, "-1"), file(30)]


def test_no_file_is_whole(tmp_path: Path, optimizer: Optimizer) -> None:
    (tmp_path / file(10)).write_bytes(b"?")
    with pytest.warns(CheckpointWarning, match="must hold a number"):
        assert CheckpointManager(tmp_path, optimizer).restore_latest() is None


def test_a_whole_file_that_does_not_fit_is_an_error(tmp_path: Path, optimizer: Optimizer) -> None:
    """A mistake of the program, which no older file mends; to begin anew would be the worst answer."""
    (tmp_path / file(10)).write_bytes(b"10")
    (tmp_path / file(20)).write_bytes(b"another model's")
    with pytest.raises(CheckpointError, match="must hold a number"):
        CheckpointManager(tmp_path, optimizer).restore_latest()


# With the optimizer.


def training(device: Device, **config: Any) -> tuple[gpu_adam.Adam, Variable, Callable[[], None]]:
    variable, adam = Variable(np.ones(5, np.float32), name="w"), gpu_adam.Adam(0.1, **config)
    adam.build([variable])

    def step() -> None:
        adam.minimize(lambda: ((variable - 3) ** 2).sum(), [variable])  # noqa: PLW0108  # a new sum at each call

    return adam, variable, step


def test_a_training_that_goes_on(device: Device, tmp_path: Path) -> None:
    """Variables and all, from the newest whole file, as if it had never stopped."""
    adam, variable, step = training(device)
    manager = CheckpointManager(tmp_path, adam, every_steps=2, keep=2)
    for _ in range(7):
        step()
        manager.step()
    manager.wait()
    assert names(tmp_path)[-1] == file(6)
    (tmp_path / file(8)).write_bytes((tmp_path / file(6)).read_bytes()[:-50])

    resumed, again, resumed_step = training(device)
    manager = CheckpointManager(tmp_path, resumed)
    with pytest.warns(CheckpointWarning, match="000000008"):
        assert manager.restore_latest() == tmp_path / file(6)
    resumed_step()
    assert int(resumed.iterations) == int(adam.iterations) == 7
    assert again.numpy().tobytes() == variable.numpy().tobytes()


def test_the_optimizer_alone(device: Device, tmp_path: Path) -> None:
    adam, variable, step = training(device)
    step()
    CheckpointManager(tmp_path, adam, variables=False).save()
    resumed, again, _ = training(device)
    assert CheckpointManager(tmp_path, resumed, variables=False).restore_latest() is not None
    assert again.numpy().tolist() == [1] * 5
    assert resumed.get_slot(again, "m").numpy().tobytes() == adam.get_slot(variable, "m").numpy().tobytes()


def test_an_optimizer_that_is_not_built_is_an_error(device: Device, tmp_path: Path) -> None:
    adam, _, step = training(device)
    step()
    CheckpointManager(tmp_path, adam).save()
    with pytest.raises(CheckpointError):
        CheckpointManager(tmp_path, gpu_adam.Adam()).restore_latest()


def test_steps_that_are_left_out(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not count, and the device is asked only where a save would be due if they did."""
    adam, variable, _ = training(device, skip_nonfinite=True)
    manager, asked = CheckpointManager(tmp_path, adam, every_steps=4), 0
    settle, saved = adam._controller.guards.settle, []

    def count() -> None:
        nonlocal asked
        asked += 1
        settle()

    for number in range(12):
        gradient = np.full(5, np.nan if number in (1, 2) else 1, np.float32)
        adam.apply_gradients([(device.array(gradient), variable)])
        with monkeypatch.context() as patch:
            patch.setattr(adam._controller.guards, "settle", count)
            path = manager.step()
        if path is not None:
            saved.append(path.name)
        manager.wait()
    assert saved == [file(4), file(8)]
    assert asked < 12


# Signals.


def test_ctrl_c_waits_for_the_end_of_the_step(tmp_path: Path, optimizer: Optimizer) -> None:
    manager = CheckpointManager(tmp_path, optimizer, every_steps=100)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    done = 0

    def train() -> None:
        nonlocal done
        with manager.guard():
            while True:
                if done == 3:
                    signal.raise_signal(signal.SIGINT)
                    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
                optimizer.iterations.assign_add(1)
                done += 1
                manager.step()

    with pytest.raises(KeyboardInterrupt):
        train()
    assert done == 4
    assert names(tmp_path) == [file(4)]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert manager.step() is None


def test_a_second_signal_does_not_wait(tmp_path: Path, optimizer: Optimizer) -> None:
    manager = CheckpointManager(tmp_path, optimizer)

    def train() -> None:
        with manager.guard():
            signal.raise_signal(signal.SIGINT)
            optimizer.iterations.assign_add(1)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        train()


def contexts(error: BaseException | None) -> Iterator[BaseException]:
    """What was handled when an exception was raised, and when that one was."""
    while error is not None and (error := error.__context__) is not None:
        yield error


@pytest.mark.parametrize("error", [None, ValueError("of the block")])
def test_a_block_that_ends_before_the_next_step(tmp_path: Path, optimizer: Optimizer, error: Exception | None) -> None:
    """By itself, or by an exception: the signal may have reached what it depends on, such as workers that read data."""
    manager = CheckpointManager(tmp_path, optimizer)

    def train() -> None:
        with manager.guard():
            optimizer.iterations.assign_add(1)
            signal.raise_signal(signal.SIGINT)
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt) as raised:
        train()
    assert error in (None, *contexts(raised.value))
    assert names(tmp_path) == [file(1)]


def test_a_block_without_a_signal(tmp_path: Path, optimizer: Optimizer) -> None:
    """It ends when the last file is written."""
    manager = CheckpointManager(tmp_path, optimizer, every_steps=2)
    before = signal.getsignal(signal.SIGINT)
    with manager.guard():
        for _ in range(3):
            optimizer.iterations.assign_add(1)
            manager.step()
        assert names(tmp_path) == []
    assert names(tmp_path) == [file(2)]
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_of_the_program_have_the_last_word(tmp_path: Path, optimizer: Optimizer) -> None:
    """One that returns lets the loop go on; what is ignored stays ignored."""
    manager, got = CheckpointManager(tmp_path, optimizer), []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with manager.guard():
            signal.raise_signal(signal.SIGINT)
            manager.step()
            assert names(tmp_path) == []
            signal.raise_signal(signal.SIGTERM)
            assert got == []
            manager.step()
            assert got == [signal.SIGTERM]
            assert names(tmp_path) == [file(0)]
            manager.step()
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, ignored)
    assert got == [signal.SIGTERM]


def test_a_guard_outside_of_the_main_thread(tmp_path: Path, optimizer: Optimizer) -> None:
    manager, raised = CheckpointManager(tmp_path, optimizer), []

    def train() -> None:
        try:
            with manager.guard():
                raise AssertionError("not reached")
        except ArgumentValueError as error:
            raised.append(str(error))

    thread = threading.Thread(target=train, name="trainer")
    thread.start()
    thread.join()
    assert raised == [
        "signals must be held in the main thread, where Python handles them (got trainer); enter the block there."
    ]


TRAINING = """
import sys, numpy, gpu_adam
w = gpu_adam.Variable(numpy.ones(1000), name="w")
adam = gpu_adam.Adam(0.1)
adam.build([w])
manager = gpu_adam.CheckpointManager(sys.argv[1], adam, every_steps=50, keep=2)
with manager.guard():
    while True:
        adam.minimize(lambda: ((w - 3) ** 2).sum(), [w])
        manager.step()
        if adam.iterations == 3:
            print("begun", flush=True)
"""


def test_a_process_that_is_told_to_end(tmp_path: Path) -> None:
    """It ends as one that SIGTERM has ended, and its last step is in the newest file."""
    child = processes.start(f"import sys; sys.argv = ['', {str(tmp_path)!r}]\n{TRAINING}")
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    time.sleep(0.1)
    child.terminate()
    text, _ = child.communicate(timeout=60)
    assert (child.returncode, text) == (-signal.SIGTERM, "")
    found = names(tmp_path)
    assert 1 <= len(found) <= 2
    w = Variable(np.ones(1000), name="w", device="host")
    adam, other = gpu_adam.Adam(0.1), Variable(np.ones(1000), name="w", device="host")
    adam.build([w])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CheckpointManager(tmp_path, adam).restore_latest() == tmp_path / found[-1]
    steps = int(adam.iterations)
    assert found[-1] == file(steps)
    replayed = gpu_adam.Adam(0.1)
    for _ in range(steps):
        replayed.minimize(lambda: ((other - 3) ** 2).sum(), [other])  # noqa: PLW0108
    assert w.numpy().tobytes() == other.numpy().tobytes()
