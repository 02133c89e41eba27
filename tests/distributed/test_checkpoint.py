"""Checkpoints of several ranks: any number of ranks loads them, to the bit; no crash and no damage makes a mixture."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
from communicators import jobs
from simulated_disk import Operation, Recorder, after_power_failure, fates, recorded

import gpu_adam
from distributed.ranks import HALF, MIXED, TABLES, Kind, alone, sharded
from distributed.threads import on_ranks
from gpu_adam.__main__ import main
from gpu_adam.communicators import Alone, Communicator
from gpu_adam.devices import Device
from gpu_adam.distributed import ShardedAdam
from gpu_adam.distributed import checkpoint as distributed_checkpoint
from gpu_adam.distributed.agreement import together
from gpu_adam.distributed.checkpoint import Contents, contents_of
from gpu_adam.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CheckpointError,
    ConcurrentStepError,
    DistributedError,
    GpuAdamError,
)
from gpu_adam.files import contents
from gpu_adam.state import checkpoint, manifest

TESTS = Path(__file__).parents[1]
SMALL: tuple[Kind, ...] = (("a", (3,), "float32"), ("b", (5000,), "float32"))
CONFIGS: dict[str, tuple[tuple[Kind, ...], dict[str, Any]]] = {
    "mixed": (MIXED, {"amsgrad": True}),
    "tables": (TABLES, {}),
    "deferred": (TABLES, {"sparse_update": "deferred"}),
    "half": (HALF, {"master_weights": True, "use_ema": True, "loss_scale": gpu_adam.LossScale(4.0, 2)}),
}


def save(path: Path, ranks: int, name: str = "mixed", steps: int = 3) -> Path:
    """What so many ranks save after some steps: a directory "run" and a file "one.npz", with the variables."""
    kinds, config = CONFIGS[name]

    def work(communicator: Communicator) -> None:
        found = sharded(communicator, kinds, **config)
        found.step(range(steps), communicator.rank)
        found.optimizer.save(path / "run", variables=True, user={"epoch": 3})
        found.optimizer.save(path / "one.npz", variables=True, user={"epoch": 3}, gather=True)

    on_ranks(ranks, work)
    return path


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[int, Path]]:
    """A configuration, and what ranks of different numbers have saved with it."""
    folders = {ranks: tmp_path_factory.mktemp("saved") for ranks in (1, 2, 3, 4, 7)}
    for ranks, folder in folders.items():
        save(folder, ranks, request.param)
    return request.param, folders


# Any number of ranks, and a plain Adam.


@pytest.mark.parametrize("ranks", [1, 3, *(pytest.param(ranks, marks=pytest.mark.thorough) for ranks in (2, 4, 7))])
def test_any_number_of_ranks_loads_what_any_number_saved(
    saved: tuple[str, dict[int, Path]], tmp_path: Path, ranks: int
) -> None:
    """The state and the variables of all ranks, as one file of them."""
    name, folders = saved

    def sources_of(number: int) -> list[str]:
        return ["run", *(["one.npz"] if number == 3 else [])]

    kinds, config = CONFIGS[name]

    def load(communicator: Communicator) -> list[bytes]:
        work = sharded(communicator, kinds, value=5.0, **config)
        for number, folder in folders.items():
            for source in sources_of(number):
                work.optimizer.load(folder / source, variables=True)
                work.optimizer.save(tmp_path / f"{number}-{source}", variables=True, user={"epoch": 3}, gather=True)
        return work.values()

    values = on_ranks(ranks, load)
    for number, folder in folders.items():
        expected = (folder / "one.npz").read_bytes()
        for source in sources_of(number):
            assert (tmp_path / f"{number}-{source}").read_bytes() == expected, (number, source)
    arrays, _ = checkpoint.read(folders[7] / "one.npz")
    expected_values = [arrays[key].tobytes() for key in arrays if key.endswith("/value")]
    assert values == [expected_values] * ranks


def test_one_file_of_several_ranks_is_that_of_a_plain_adam(saved: tuple[str, dict[int, Path]], tmp_path: Path) -> None:
    name, folders = saved
    kinds, config = CONFIGS[name]
    for ranks, folder in folders.items():
        work = alone(kinds, value=5.0, **config)
        work.optimizer.load(folder / "one.npz", variables=True)
        work.optimizer.save(tmp_path / "plain.npz", variables=True, user={"epoch": 3})
        assert (tmp_path / "plain.npz").read_bytes() == (folder / "one.npz").read_bytes(), ranks
        assert int(work.optimizer.iterations.numpy()) == 3


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_optimizer_goes_on_as_the_one_that_saved(tmp_path: Path, name: str) -> None:
    kinds, config = CONFIGS[name]

    def work(communicator: Communicator) -> tuple[list[bytes], list[bytes]]:
        first = sharded(communicator, kinds, **config)
        first.step(range(3), communicator.rank)
        first.optimizer.save(tmp_path / "run", variables=True)
        first.step(range(3, 6), communicator.rank)
        second = sharded(communicator, kinds, value=5.0, **config)
        second.step([9], communicator.rank)
        second.optimizer.load(tmp_path / "run", variables=True)
        second.step(range(3, 6), communicator.rank)
        return first.values(), second.values()

    for first, second in on_ranks(3, work):
        assert first == second


@pytest.mark.parametrize("name", CONFIGS)
def test_every_device_saves_and_loads(device: Device, tmp_path: Path, name: str) -> None:
    kinds, config = CONFIGS[name]
    work = sharded(Alone(device), kinds, **config)
    work.step(range(2))
    work.optimizer.save(tmp_path / "run", variables=True)
    work.optimizer.save(tmp_path / "one.npz", variables=True, gather=True)
    before = work.state(), work.values()
    for path in ("run", "one.npz"):
        work.step([2])
        work.optimizer.load(tmp_path / path, variables=True)
        assert (work.state(), work.values()) == before
    plain = alone(kinds, 5.0, device, **config)
    plain.optimizer.load(tmp_path / "one.npz", variables=True)
    assert (plain.state(), plain.values()) == before


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_ranks_load_what_a_plain_adam_saved(tmp_path: Path, suffix: str) -> None:
    plain, path = alone(MIXED, amsgrad=True), tmp_path / f"plain{suffix}"
    plain.step(range(2))
    plain.optimizer.save(path, variables=True)

    def work(communicator: Communicator) -> list[bytes]:
        found = sharded(communicator, MIXED, value=5.0, amsgrad=True)
        found.optimizer.load(path, variables=True)
        found.optimizer.save(tmp_path / f"again{suffix}", variables=True, gather=True)
        return found.values()

    assert on_ranks(3, work) == [plain.values()] * 3
    assert (tmp_path / f"again{suffix}").read_bytes() == path.read_bytes()


def test_variables_stay_unless_they_are_asked_for(tmp_path: Path) -> None:
    save(tmp_path, 3)

    def work(communicator: Communicator) -> None:
        found = sharded(communicator, MIXED, value=5.0, amsgrad=True)
        before = found.values()
        found.optimizer.load(tmp_path / "run")
        assert found.values() == before
        assert int(found.optimizer.iterations.numpy()) == 3
        found.optimizer.save(tmp_path / "slots")
        with pytest.raises(CheckpointError, match=r"nothing for 'w/value', 'b/value', 'empty/value' and 3 more"):
            found.optimizer.load(tmp_path / "slots", variables=True)
        found.optimizer.load(tmp_path / "slots")

    on_ranks(2, work)


def test_the_note_tells_of_variables_that_other_ranks_own(tmp_path: Path) -> None:
    kinds: tuple[Kind, ...] = (("a", (5,), "float32"), ("b", (9000,), "float32"), ("c", (5,), "float32"))

    def work(communicator: Communicator) -> None:
        found = sharded(communicator, kinds, weight_decay=0.1)
        for variable in reversed(found.variables):
            found.optimizer.set_group([variable], learning_rate_multiplier=0.5)
        found.optimizer.exclude_from_weight_decay(found.variables[::2])
        found.optimizer.save(tmp_path / "run")
        found.optimizer.save(tmp_path / "one", gather=True)

    on_ranks(4, work)
    for note in (contents_of(tmp_path / "run").note, checkpoint.read(tmp_path / "one")[1]):
        assert list(note["groups"]) == ["a", "b", "c"]
        assert note["never_decayed"] == ["a", "c"]


# What is read.


def test_only_files_and_arrays_are_read_of_which_something_is_owned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 4)
    read, found = checkpoint.read_all, dict[str, dict[str, set[str]]]()

    def noted(path: Any, names: Any = None) -> Any:
        here = found.setdefault(threading.current_thread().name, {})
        here.setdefault(kept(os.path.basename(path))[13:18], set()).update(names)
        return read(path, names)

    def load(communicator: Communicator) -> None:
        work = sharded(communicator, MIXED, amsgrad=True)
        threading.current_thread().name = str(communicator.rank)
        work.optimizer.load(tmp_path / "run")

    monkeypatch.setattr(checkpoint, "read_all", noted)
    on_ranks(4, load)
    assert {rank: sorted(files) for rank, files in found.items()} == {
        "0": ["00000"],
        **{str(rank): ["00000", f"{rank:05}"] for rank in (1, 2, 3)},  # the counter is in the first one
    }
    for rank, files in found.items():
        own = contents_of(tmp_path / "run").said.arrays
        assert not any(name.partition("[")[0].endswith("/value") for members in files.values() for name in members)
        if rank != "0":
            assert files["00000"] == {"iterations"}
        assert all(name in own for members in files.values() for name in members)


def test_what_is_not_read_may_be_damaged(tmp_path: Path) -> None:
    save(tmp_path, 2)
    file = sorted((tmp_path / "run").glob("shard*"))[1]
    content, (arrays, _) = file.read_bytes(), checkpoint.read(file)
    value = next(array for name, array in arrays.items() if "/value[" in name)
    file.write_bytes(content.replace(value.tobytes(), bytes(value.nbytes)))

    def load(communicator: Communicator) -> None:
        work = sharded(communicator, MIXED, amsgrad=True)
        work.optimizer.load(tmp_path / "run")
        with pytest.raises(CheckpointError):
            work.optimizer.load(tmp_path / "run", variables=True)

    on_ranks(2, load)


# Damage.


def remove(folder: Path) -> None:
    """A file is missing."""
    sorted(folder.glob("shard*"))[1].unlink()


def flip(folder: Path) -> None:
    """A bit of an array has changed."""
    file = sorted(folder.glob("shard*"))[1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def cut(folder: Path) -> None:
    """A file is shorter."""
    file = sorted(folder.glob("shard*"))[2]
    os.truncate(file, file.stat().st_size - 1000)


def exchange(folder: Path) -> None:
    """A file of the save before has the name of this one's."""
    shutil.copy(folder.parent / "older.npz", sorted(folder.glob("shard*"))[1])


def change_manifest(folder: Path) -> None:
    """A digit of the manifest has changed."""
    path = folder / manifest.NAME
    text = path.read_text()
    place = text.index('"epoch": 3')
    path.write_text(text[:place] + '"epoch": 4' + text[place + 10 :])


def forget_piece(folder: Path) -> None:
    """The manifest, whole otherwise, tells of one piece less."""
    said = manifest.parsed("", (folder / manifest.NAME).read_bytes())
    entries = dict(said.arrays)
    del entries[list(entries)[-1]]
    files = said.meta["sharded"]["files"]
    files[list(files)[-1]][1] -= 1
    (folder / manifest.NAME).write_text(manifest.text_of(entries, said.meta))


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (remove, r"shard-000002-\w{8}-00001-of-00003.npz( \(rank \d\))? must be there, for meta.json tells of it"),
    (flip, r"must be (as its meta.json says|a whole gpu_adam checkpoint)"),
    (cut, "must be a whole gpu_adam checkpoint"),
    (exchange, r"must have the sha256 that meta.json tells, \w{12}\.\.\. \(got \w{12}\.\.\. of generation 1\)"),
    (change_manifest, "must have its digest"),
    (forget_piece, "must have all pieces of its arrays"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=lambda found: getattr(found, "__name__", ""))
def test_all_ranks_refuse_what_is_damaged_and_change_nothing(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "run"

    def work(communicator: Communicator) -> None:
        found = sharded(communicator, MIXED)
        for number in range(2):
            found.step([number], communicator.rank)
            found.optimizer.save(folder, variables=True, user={"epoch": 3})
            if communicator.rank == 0 and number == 0:
                shutil.copy(sorted(folder.glob("shard*"))[1], tmp_path / "older.npz")
        if communicator.rank == 0:
            damage(folder)
        communicator.barrier()
        found.step([2], communicator.rank)
        before = found.state(), found.values()
        with pytest.raises(CheckpointError, match=message):
            found.optimizer.load(folder, variables=True)
        assert (found.state(), found.values()) == before

    on_ranks(3, work)


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    def work(communicator: Communicator) -> None:
        found = sharded(communicator, SMALL)
        for name in ("empty", "none"):
            with pytest.raises(FileNotFoundError):
                found.optimizer.load(tmp_path / name)

    on_ranks(2, work)


OTHERS: list[tuple[tuple[Kind, ...], dict[str, Any], str]] = [
    ((("a", (3,), "float32"),), {}, "also 'b/m', 'b/v'"),
    ((*SMALL, ("c", (2,), "float32")), {}, "nothing for 'c/m', 'c/v'"),
    (
        (("a", (1, 3), "float32"), ("b", (5000,), "float32")),
        {},
        r"'a/m' in .* must be \"float32 \[1, 3\]\" \(got float32",
    ),
    ((("a", (3,), "float64"), ("b", (5000,), "float32")), {}, r"'a/m' in .* must be \"float64 \[3\]\""),
    (SMALL, {"amsgrad": True}, "nothing for 'a/vhat', 'b/vhat'"),
    (SMALL, {"complex_mode": "real_imag"}, "complex_mode='real_imag'"),
]


@pytest.mark.parametrize(("kinds", "config", "message"), OTHERS)
def test_all_ranks_refuse_the_checkpoint_of_another_optimizer(
    tmp_path: Path, kinds: tuple[Kind, ...], config: dict[str, Any], message: str
) -> None:
    def work(communicator: Communicator) -> None:
        found = sharded(communicator, SMALL)
        found.step([0])
        found.optimizer.save(tmp_path / "run")
        found.optimizer.save(tmp_path / "one", gather=True)
        other = sharded(communicator, kinds, **config)
        before = other.state()
        for name in ("run", "one"):
            with pytest.raises(CheckpointError, match=message):
                other.optimizer.load(tmp_path / name)
        assert other.state() == before

    on_ranks(3, work)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "file", {"x": np.ones(3)}, {})
    found = sharded(Alone("host"), SMALL)
    with pytest.raises(CheckpointError, match=r"must be written by Adam.save \(got None\)"):
        found.optimizer.load(tmp_path / "file")


def test_a_plain_adam_loads_no_directory_and_no_part_of_one(tmp_path: Path) -> None:
    save(tmp_path, 2)
    plain = alone(MIXED, amsgrad=True)
    with pytest.raises(CheckpointError, match="must be a regular file"):
        plain.optimizer.load(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"must be written by Adam.save \(got Adam shard\)"):
        plain.optimizer.load(min((tmp_path / "run").glob("shard*")))


def test_ranks_that_see_different_checkpoints(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        save(tmp_path / str(number), 1, steps=number + 1)

    def work(communicator: Communicator) -> None:
        found = sharded(communicator, MIXED, amsgrad=True)
        before = found.state()
        with pytest.raises(CheckpointError, match="must be the same on all ranks; rank"):
            found.optimizer.load(tmp_path / str(communicator.rank) / "run")
        assert found.state() == before

    on_ranks(2, work)


def test_version_1_is_converted_first() -> None:
    found = sharded(Alone("host"), SMALL)
    with pytest.raises(CheckpointError, match=r"must have version 2 for several ranks \(got 1\); convert it first"):
        found.optimizer.load(TESTS / "data" / "checkpoint_v1.npz")


# Saving.


def kept(name: str) -> str:
    """What a file is called, but for what was drawn by lot."""
    return re.sub(r"(shard-\d{6})-[0-9a-f]{8}-", r"\1-", name)


def names(folder: Path, pattern: str = "*") -> list[str]:
    """What files of a folder are called, but for that."""
    return sorted(kept(file.name) for file in folder.glob(pattern))


def failing_write(patch: pytest.MonkeyPatch, name: str) -> None:
    """The disk is full for files that begin with a name."""
    write = checkpoint.write

    def full(path: Any, *rest: Any) -> None:
        if kept(os.path.basename(path)).startswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, *rest)

    patch.setattr(checkpoint, "write", full)


def test_a_rank_that_cannot_write_is_told_of_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3)
    folder, before = tmp_path / "run", contents_of(tmp_path / "run").said
    (folder / "mine.txt").write_text("stays")

    def work(communicator: Communicator) -> None:
        found = sharded(communicator, MIXED, amsgrad=True)
        with pytest.raises(OSError, match="No space left on device") as raised:
            found.optimizer.save(folder)
        assert raised.value.errno == errno.ENOSPC

    with monkeypatch.context() as patch:
        failing_write(patch, "shard-000002-00001")
        on_ranks(3, work)
    assert contents_of(folder).said == before
    assert len(list(folder.glob("shard-000002*"))) == 2
    (folder / ".shard-000002-12345678-00001-of-00003.npz.0123456789abcdef.tmp").touch()
    with monkeypatch.context() as patch:  # what is left of it goes before the next one needs the room
        failing_write(patch, "shard-000002-00001")
        on_ranks(3, work)
        assert [name[:12] for name in names(folder, "shard*")] == ["shard-000001"] * 3 + ["shard-000002"] * 2
        assert not list(folder.glob(".shard*"))
    save(tmp_path, 2)
    assert names(folder) == [
        "meta.json",
        "mine.txt",
        *(f"shard-000002-0000{n}-of-00002.npz" for n in "01"),
    ]


def test_ranks_that_save_or_load_otherwise(tmp_path: Path) -> None:
    """What some of them write of the variables would be no whole one."""
    save(tmp_path, 2)
    before = contents_of(tmp_path / "run").said

    def work(communicator: Communicator) -> None:
        found, is_first = sharded(communicator, MIXED, amsgrad=True), communicator.rank == 0
        state = found.state()
        for name in ("variables", "asynchronous", "gather"):
            with pytest.raises(DistributedError, match=f"rank 1 must do what rank 0 does, save with .*'{name}': True"):
                found.optimizer.save(tmp_path / "run", **{name: is_first})
        with pytest.raises(DistributedError, match=r"rank 1 must .*'variables': True} \(got load with .*False"):
            found.optimizer.load(tmp_path / "run", variables=is_first)
        assert found.state() == state

    on_ranks(2, work)
    assert contents_of(tmp_path / "run").said == before


def test_a_damaged_manifest_is_replaced_by_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 2)
    (tmp_path / "run" / manifest.NAME).write_text("{")
    save(tmp_path, 2)
    assert contents_of(tmp_path / "run").note["user"] == {"epoch": 3}
    assert names(tmp_path / "run")[1:] == [f"shard-000002-0000{n}-of-00002.npz" for n in "01"]


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def work(communicator: Communicator) -> None:
        found = sharded(communicator, SMALL)
        optimizer = found.optimizer
        before = found.state()
        with pytest.raises(ArgumentValueError, match="on_busy"):
            optimizer.save(tmp_path / "run", on_busy="go")
        with pytest.raises(ArgumentValueError, match=r"path( \(rank 0\))? must be a directory"):
            optimizer.save(tmp_path / "file")
        with pytest.raises(ArgumentTypeError, match="must be the path of a directory"):
            optimizer.save(io.BytesIO())
        with pytest.raises(ArgumentTypeError, match=r"user( \(rank 0\))? must be JSON-serialisable"):
            optimizer.save(tmp_path / "run", user={"a": object()})
        with pytest.raises(ArgumentValueError, match="must be a directory that all ranks see"):
            optimizer.save(tmp_path / f"run{communicator.rank}")
        with pytest.raises(FileNotFoundError):
            optimizer.save(tmp_path / "none" / "one.npz", gather=True)
        optimizer.push_gradient(found.variables[0], np.ones(3, np.float32))
        for call in (optimizer.save, optimizer.load):
            with pytest.raises(ArgumentValueError, match="must come between steps"):
                call(tmp_path / "run")
        assert found.state() == before
        ShardedAdam(communicator).build(found.variables)
        for call in (optimizer.save, optimizer.load):
            with pytest.raises(ArgumentValueError, match="must lie where this optimizer has put it"):
                call(tmp_path / "run", variables=True)

    on_ranks(2, work)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "copy"),
    [
        (CheckpointError("file", "must be whole", "half of it", "pass another"), CheckpointError),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), FileNotFoundError),
        (ValueError("what"), DistributedError),
    ],
)
def test_an_error_of_one_rank_is_one_of_all(error: Exception, copy: type[Exception]) -> None:
    def work(communicator: Communicator) -> Exception:
        def fails() -> None:
            if communicator.rank:
                raise error if communicator.rank == 1 else KeyError(2)

        with pytest.raises(Exception) as raised:  # noqa: PT011  (whichever it is)
            together(communicator, fails)
        return raised.value

    first, second, third = on_ranks(3, work)
    assert second is error
    for found in (first, third):
        assert type(found) is copy
        assert "rank 1" in str(found)
    if isinstance(error, GpuAdamError):
        assert str(first) == "file (rank 1) must be whole (got half of it); pass another."


# Saves beside which the ranks go on.


class Held:
    """Files that are not written before somebody says so.

    Args:
        patch: of the test.
        names: a pattern of their names.
    """

    def __init__(self, patch: pytest.MonkeyPatch, names: str) -> None:
        self._write, self._reached, self._go = checkpoint.write, threading.Semaphore(0), threading.Event()
        self._patch, self._names = patch, re.compile(names)
        patch.setattr(checkpoint, "write", self._write_later)

    def _write_later(self, path: Any, *rest: Any) -> None:
        if self._names.search(os.path.basename(path)):
            self._reached.release()
            assert self._go.wait(30)
        self._write(path, *rest)

    def hold_no_more(self, count: int) -> None:
        """Hold no others than so many, once these are held."""
        for _ in range(count):
            assert self._reached.acquire(timeout=30)
        self._patch.setattr(checkpoint, "write", self._write)

    def go(self) -> None:
        """Let them be written."""
        self._go.set()


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_next_steps_change_nothing_of_what_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, gather: bool
) -> None:
    (kinds, config), held = CONFIGS[name], Held(monkeypatch, "run|shard")

    def work(communicator: Communicator) -> None:
        found = sharded(communicator, kinds, **config)
        found.step(range(3), communicator.rank)
        found.optimizer.save(tmp_path / "expected", variables=True, gather=True)
        pending = found.optimizer.save(tmp_path / "run", variables=True, gather=gather, asynchronous=True)
        found.step([3, 4], communicator.rank)
        communicator.barrier()
        held.go()
        pending.wait()
        assert pending.done
        found.optimizer.load(tmp_path / "run", variables=True)
        found.optimizer.save(tmp_path / "again", variables=True, gather=True)

    on_ranks(3, work)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("seed", [1, 2])
def test_the_copies_are_a_piece_of_the_stream(gpu: Device, emulation: Any, tmp_path: Path, seed: int) -> None:
    work = sharded(Alone(gpu), MIXED, amsgrad=True)
    work.step(range(3))
    work.optimizer.save(tmp_path / "expected", variables=True, gather=True)
    with emulation.asynchronous(seed=seed):
        pending = work.optimizer.save(tmp_path / "run", variables=True, asynchronous=True)
        work.step([3, 4])
        pending.wait()
        work.optimizer.load(tmp_path / "run", variables=True)
    work.optimizer.save(tmp_path / "again", variables=True, gather=True)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "expected").read_bytes()


def test_a_checkpoint_is_there_when_all_files_are_whoever_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2, steps=1)
    folder, before, held = tmp_path / "run", contents_of(tmp_path / "run").said, Held(monkeypatch, "-00001-of-")

    def work(communicator: Communicator) -> None:
        found = sharded(communicator, MIXED, amsgrad=True)
        pending = found.optimizer.save(folder, asynchronous=True)
        while communicator.rank == 0 and len(list(folder.glob("shard-000002*"))) == 0:
            time.sleep(0.01)
        assert contents_of(folder).said == before
        assert not pending.done
        communicator.barrier()
        held.go()
        end = time.monotonic() + 20
        while contents_of(folder).said == before and time.monotonic() < end:
            time.sleep(0.01)
        assert contents_of(folder).said != before
        pending.wait()  # files of the save before are removed then, too

    on_ranks(2, work)
    assert [name[:12] for name in names(folder, "shard*")] == ["shard-000002"] * 2


@pytest.mark.parametrize("way", ["close", "load", "save"])
def test_what_waits_for_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    held = Held(monkeypatch, "-00001-of-")

    def work(communicator: Communicator) -> None:
        found = sharded(communicator, SMALL)
        found.step([0])
        pending = found.optimizer.save(tmp_path / "run", asynchronous=True)
        found.step([1])
        if communicator.rank == 1:
            threading.Timer(0.2, held.go).start()
        if way == "close":
            communicator.close()
        elif way == "load":
            found.optimizer.load(tmp_path / "run")
            assert int(found.optimizer.iterations.numpy()) == 1
        else:
            found.optimizer.save(tmp_path / "other")
        assert pending.done
        contents_of(tmp_path / "run")

    on_ranks(2, work)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_has_ended_a_save_is_raised_once_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """Where somebody waits, or else by the next save; `load` waits, and raises nothing."""
    save(tmp_path, 2, steps=1)
    folder, before = tmp_path / "run", contents_of(tmp_path / "run").said
    failing_write(monkeypatch, f"shard-000002-{rank:05}")

    def work(communicator: Communicator) -> None:
        found = sharded(communicator, MIXED, amsgrad=True)
        pending = found.optimizer.save(folder, asynchronous=True)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left on device"):
                pending.wait()
        pending = found.optimizer.save(folder, asynchronous=True)
        found.optimizer.load(folder)
        assert pending.done
        with pytest.raises(OSError, match="No space left on device"):
            found.optimizer.save(tmp_path / "other")
        assert contents_of(folder).said == before
        found.optimizer.save(tmp_path / "other")

    on_ranks(2, work)
    contents_of(tmp_path / "other")


def test_a_save_while_another_rank_still_writes_may_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(monkeypatch, "-00001-of-")

    def work(communicator: Communicator) -> None:
        found = sharded(communicator, SMALL)
        pending = found.optimizer.save(tmp_path / "run", asynchronous=True)
        with pytest.raises(ConcurrentStepError, match="save must not be called while a save is at work"):
            found.optimizer.save(tmp_path / "run", on_busy="error")
        communicator.barrier()
        held.go()
        pending.wait()
        found.optimizer.save(tmp_path / "run", on_busy="error")

    on_ranks(3, work)


def test_directories_of_different_machines(tmp_path: Path) -> None:
    def work(communicator: Communicator) -> None:
        found = sharded(communicator, SMALL)
        pending = found.optimizer.save(tmp_path / f"run{communicator.rank}", asynchronous=True)
        with pytest.raises(ArgumentValueError, match="must be a directory that all ranks see"):
            pending.wait()

    on_ranks(2, work)


def test_a_file_that_does_not_come_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed_checkpoint, "SECONDS", 0.05)
    held = Held(monkeypatch, "-00001-of-")

    def work(communicator: Communicator) -> None:
        found = sharded(communicator, SMALL)
        pending = found.optimizer.save(tmp_path / "run", asynchronous=True)
        while communicator.rank == 0 and not pending.done:
            time.sleep(0.01)
        communicator.barrier()
        held.go()
        with pytest.raises(DistributedError, match=r"must have the files of all ranks 0.05 s after .*-00001-of-00002"):
            pending.wait()

    on_ranks(2, work)


@pytest.mark.parametrize("both", [False, True])
def test_ranks_that_outlive_their_job_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, both: bool
) -> None:
    """They write their files when another job has saved as many times; the next save removes these."""
    folder, held = tmp_path / "run", Held(monkeypatch, "shard")
    saved = threading.Event()

    def outlives(communicator: Communicator) -> None:
        found = sharded(communicator, SMALL, value=3.0)
        if communicator.rank == 0 and not both:
            monkeypatch.setattr(distributed_checkpoint, "_are_there", lambda *_: False)
        pending = found.optimizer.save(folder, variables=True, asynchronous=True)
        assert saved.wait(30)
        held.go()
        if both:
            with pytest.raises(CheckpointError, match=r"must have the meta\.json that was there when the save began"):
                pending.wait()
        else:
            pending.wait()

    def job(communicator: Communicator) -> None:
        sharded(communicator, SMALL).optimizer.save(folder, variables=True)

    with ThreadPoolExecutor() as threads:
        outcome = threads.submit(on_ranks, 2, outlives)
        held.hold_no_more(2)
        on_ranks(2, job)
        before = contents_of(folder).said
        saved.set()
        outcome.result()
    assert contents_of(folder).said == before
    assert [name[:12] for name in names(folder, "shard*")] == ["shard-000001"] * 4
    work = sharded(Alone("host"), SMALL, value=7.0)
    work.optimizer.load(folder, variables=True)
    assert work.values() == sharded(Alone("host"), SMALL).values()
    on_ranks(2, job)
    assert [name[:12] for name in names(folder, "shard*")] == ["shard-000002"] * 2


# Crashes.


class Versions:
    """An optimizer that saves after each step, and what it has after each.

    Args:
        folder: where to.
        ranks: on how many ranks.
        asynchronous: whether threads write.
    """

    def __init__(self, folder: Path, ranks: int = 2, *, asynchronous: bool = False) -> None:
        self.folder, self.ranks, self.states = folder, ranks, list[bytes]()
        self.asynchronous = asynchronous

    def save(self, recorder: Recorder, count: int) -> None:
        """Save so many versions; one rank writes after the other, for the recorder takes one writer at a time."""
        order, write = threading.Lock(), checkpoint.write

        def one_by_one(*arguments: Any) -> None:
            with order:
                write(*arguments)

        def work(communicator: Communicator) -> None:
            found = sharded(communicator, SMALL)
            for number in range(count):
                found.step([number])
                if communicator.rank == 0:
                    self.states.append(found.values()[1])
                    recorder.note("begun", "", number)
                with contextlib.suppress(OSError):
                    pending = found.optimizer.save(self.folder, variables=True, asynchronous=self.asynchronous)
                    if self.asynchronous:
                        pending.wait()
                    if communicator.rank == 0:
                        recorder.note("returned", "", number)
                communicator.barrier()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "write", one_by_one)
            on_ranks(self.ranks, work)

    def found(self) -> int:
        """The number of the version that the folder has, -1 for none."""
        work = sharded(Alone("host"), SMALL, value=7.0)
        try:
            work.optimizer.load(self.folder, variables=True)
        except FileNotFoundError:
            return -1
        number = int(work.optimizer.iterations.numpy()) - 1
        assert work.values()[1] == self.states[number]
        return number


def losses(versions: Versions, log: list[Operation], count: int = 2) -> Iterator[str]:
    """Of all moments of a power failure those that lose a version which was saved, or leave a mixture."""
    folder, begun, returned = versions.folder, -1, -1
    for end, operation in enumerate([*log, Operation("end")]):
        for fate in fates(count):
            shutil.rmtree(folder)
            folder.mkdir()
            for name, content in after_power_failure(log[:end], fate).items():
                (folder / name).write_bytes(content)
            try:
                found = versions.found()
            except (CheckpointError, AssertionError) as error:
                yield f"before {operation}: {error}"
            else:
                if not returned <= found <= begun:
                    yield f"before {operation}: version {found}"
        begun = operation.number if operation.what == "begun" else begun
        returned = operation.number if operation.what == "returned" else returned


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.thorough), True])
@pytest.mark.parametrize("forgotten", ["", "fsync", "fsync directory"])
def test_a_power_failure_leaves_this_save_or_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str, asynchronous: bool
) -> None:
    """And the simulated disk sees what is not synced."""
    monkeypatch.setattr(io, "BufferedWriter", _Coarse)
    versions, recorder = Versions(tmp_path / "run", asynchronous=asynchronous), Recorder()
    with recorded(recorder, forgotten):
        versions.save(recorder, 3)
    assert (next(losses(versions, recorder.log), None) is not None) == bool(forgotten)


def test_a_manifest_that_was_not_synced_is_before_others_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second save fails at its last operation, when its manifest is seen already, and the old one may come back."""
    monkeypatch.setattr(io, "BufferedWriter", _Coarse)
    whole = Recorder()
    with recorded(whole):
        Versions(tmp_path / "whole", 1).save(whole, 2)
    last = max(number for number, operation in enumerate(whole.log) if operation.what == "fsync directory")
    versions, recorder = Versions(tmp_path / "run", 1), Recorder(last, errno.EIO)
    with recorded(recorder):
        versions.save(recorder, 3)
    assert recorder.log.pop(last).what == "fsync directory"  # which was not made
    assert [operation.number for operation in recorder.log if operation.what == "returned"] == [0, 2]
    assert list(losses(versions, recorder.log)) == []


class _Coarse(io.BufferedWriter):
    """Fewer writes than with the recorder's own buffer, so that fewer moments are looked at."""

    def __init__(self, raw: Any, size: int) -> None:
        super().__init__(raw, 200 * size)


KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
from distributed.ranks import sharded
from distributed.test_checkpoint import SMALL, Versions
from distributed.threads import on_ranks
from gpu_adam.communicators import Alone

folder, kills, asynchronous = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
sharded(Alone("host"), SMALL).step([0])  # compiled, and loaded, before there are children
found, bad, left = 0, [], []
for number in range(kills):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        def work(communicator):
            here = sharded(communicator, SMALL)
            if found:
                here.optimizer.load(folder, variables=True)
            while True:
                here.step([int(here.optimizer.iterations.numpy())])
                pending = here.optimizer.save(folder, variables=True, asynchronous=asynchronous)
                if pending is not None:
                    pending.wait()
                if communicator.rank == 0:
                    os.write(write, b"%08d" % int(here.optimizer.iterations.numpy()))
                communicator.barrier()
        on_ranks(2, work)
    os.close(write)
    os.read(read, 8)  # it is at work
    time.sleep(random.Random(number).uniform(0, 0.015))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    returned = b""
    while piece := os.read(read, 1 << 16):
        returned += piece
    os.close(read)
    left.append(len(list(folder.iterdir())))
    here = sharded(Alone("host"), SMALL, value=7.0)
    here.optimizer.load(folder, variables=True)
    found = int(here.optimizer.iterations.numpy())
    expected = sharded(Alone("host"), SMALL)
    expected.step(range(found))
    at_least = int(returned[-8:] or b"0")
    if here.values() != expected.values() or here.state() != expected.state() or found < at_least:
        bad.append((found, at_least))
print(json.dumps({"bad": bad, "left": left}))
"""


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_ranks_are_killed_at_any_moment(tmp_path: Path, asynchronous: bool) -> None:
    code = f"import sys; sys.argv = ['', {str(tmp_path / 'run')!r}, '15', '{asynchronous}']\n{KILLS}"
    report = json.loads(processes.run(code, (TESTS,)))
    assert report["bad"] == []
    assert max(report["left"]) > 3, "some kills must have struck a save"


# Processes.

SAVES = """
import os, signal
from pathlib import Path
from distributed.ranks import MIXED, sharded
from gpu_adam.communicators import Mpi
from gpu_adam.state import checkpoint

with Mpi(device="host") as communicator:
    work = sharded(communicator, MIXED, amsgrad=True)
    work.step(range(3), communicator.rank)
    work.optimizer.save("older", variables=True)
    pending = work.optimizer.save("run", variables=True, asynchronous=True)
    work.step([3], communicator.rank)
    pending.wait()
    work.optimizer.load("older", variables=True)
    work.optimizer.save("one.npz", variables=True, gather=True, asynchronous=True)
    work.step([3], communicator.rank)
    if communicator.rank == 1:
        checkpoint.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    work.optimizer.save("run", variables=True, asynchronous=True).wait()
    print("not killed")
"""

LOADS = """
from pathlib import Path
from distributed.ranks import MIXED, sharded
from gpu_adam.communicators import Mpi
from gpu_adam.errors import CheckpointError

with Mpi(device="host") as communicator:
    work = sharded(communicator, MIXED, value=5.0, amsgrad=True)
    work.optimizer.load("run", variables=True)
    work.optimizer.save("again.npz", variables=True, gather=True)
    work.optimizer.save("other", variables=True)
    communicator.barrier()
    if communicator.rank == 2:
        with open(sorted(Path("other").glob("shard*"))[2], "r+b") as file:
            file.truncate(100)
    communicator.barrier()
    before = work.state()
    try:
        work.optimizer.load("other")
    except CheckpointError as error:
        assert work.state() == before
        print("refused:", error, flush=True)
"""


def test_processes_of_mpi(tmp_path: Path) -> None:
    """One of three is killed while it saves; four load what was saved before."""
    killed = jobs.run(tmp_path, 3, SAVES)
    assert killed.status != 0
    assert "not killed" not in killed.out
    loaded = jobs.run(tmp_path, 4, LOADS)
    assert loaded.status == 0, loaded.err
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    lines = [line for line in loaded.out.splitlines() if line.startswith("refused:")]
    assert len(lines) == 4
    assert len(set(lines)) <= 2, "the damaged rank's own message, and the others' copy"
    assert all("-00002-of-00004.npz" in line for line in lines)
    (tmp_path / "threads").mkdir()
    save(tmp_path / "threads", 3)
    one, other = (checkpoint.read(folder / "one.npz")[0] for folder in (tmp_path, tmp_path / "threads"))
    assert all(one[name].tobytes() == other[name].tobytes() for name in other)


# Commands.


def test_commands_take_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 3)
    run, one = str(tmp_path / "run"), str(tmp_path / "one.npz")
    for arguments in (["inspect", run, one], ["convert", run, str(tmp_path / "two.npz")]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    with pytest.raises(SystemExit):
        main(["inspect", run])
    assert "w_1/m" in capsys.readouterr().out
    found = contents.read(tmp_path / "two.npz")
    assert found.arrays.keys() == contents.read(Path(one)).arrays.keys()
    assert "sharded" not in found.note
    alone(MIXED, amsgrad=True).optimizer.load(tmp_path / "two.npz", variables=True)


def test_a_file_elsewhere_is_not_read(tmp_path: Path) -> None:
    """Whatever a manifest says: a name leads to a file of its directory."""
    save(tmp_path, 1)
    path = tmp_path / "run" / manifest.NAME
    said = manifest.parsed("", path.read_bytes())
    table = said.meta["sharded"]
    table["files"] = {f"../{name}": found for name, found in table["files"].items()}
    path.write_text(manifest.text_of(said.arrays, said.meta))
    with pytest.raises(CheckpointError, match=r"a file '\.\./shard"):
        contents_of(tmp_path / "run")
    assert isinstance(contents_of(tmp_path / "one.npz"), Contents)
