"""atomic_file: the old file or the new one, whatever happens in between; and only files are replaced, or read."""

import errno
import fcntl
import io
import json
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import processes
import pytest
from simulated_disk import Operation, Recorder, after_power_failure, fates, recorded

from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, CheckpointError
from gpu_adam.state import atomic_file
from gpu_adam.state.atomic_file import name_of, opened, written

NOBODY = 65534


def write(target: Any, content: bytes) -> None:
    """Write as an archive does: in pieces, and at last the beginning again."""
    with written(target) as file:
        file.write(bytes(len(content[:10])))
        for start in range(10, len(content), 50):
            file.write(content[start : start + 50])
        file.seek(0)
        file.write(content[:10])


def read(source: Any) -> bytes:
    with opened(source) as file:
        return file.read()


# A power failure, a kill, an error.

VERSIONS = [bytes([65 + number]) * (180 + 70 * number) for number in range(4)]


def losses(log: list[Operation], count: int = 12) -> list[str]:
    """Of all moments of a power failure those after which "state" is not a whole version, or one that is too old."""
    found, returned = [], -1
    for end, operation in enumerate([*log, Operation("end")]):
        allowed = [VERSIONS[number] if number >= 0 else None for number in (returned, returned + 1) if number < 4]
        for fate in fates(count):
            content = after_power_failure(log[:end], fate).get("state")
            if content not in allowed:
                found.append(f"before {operation.what}: {content!r}")
        returned += operation.what == "returned"
    return found


def log_of_saves(folder: Path, forgotten: str = "") -> list[Operation]:
    recorder = Recorder()
    with recorded(recorder, forgotten):
        for content in VERSIONS:
            write(folder / "state", content)
            recorder.note("returned")
    return recorder.log


def test_a_power_failure_leaves_a_whole_file_no_older_than_the_last_save(tmp_path: Path) -> None:
    log = log_of_saves(tmp_path)
    assert [operation.what for operation in log].count("write") >= 20
    assert losses(log) == []


@pytest.mark.parametrize("forgotten", ["fsync", "fsync directory"])
def test_the_simulated_disk_sees_what_is_not_synced(tmp_path: Path, forgotten: str) -> None:
    assert losses(log_of_saves(tmp_path, forgotten)) != []


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_every_operation_may_fail(tmp_path: Path, error: int, lasting: bool) -> None:
    """A full disk, a full quota, a broken disk: the old file stays, and nothing beside it."""
    path, whole = tmp_path / "state", Recorder()
    path.write_bytes(b"old")
    with recorded(whole):
        write(path, VERSIONS[3])
    assert {operation.what for operation in whole.log} == {"create", "write", "fsync", "rename", "fsync directory"}
    for failing, operation in enumerate(whole.log):
        path.write_bytes(b"old")
        with recorded(Recorder(failing, error, lasting)), pytest.raises(OSError, match=os.strerror(error)) as raised:
            write(path, VERSIONS[3])
        assert raised.value.errno == error
        assert path.read_bytes() == (VERSIONS[3] if operation.what == "fsync directory" else b"old"), operation
        assert os.listdir(tmp_path) == ["state"], operation


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP])
def test_file_systems_that_do_not_sync_directories(tmp_path: Path, error: int) -> None:
    whole = Recorder()
    with recorded(whole):
        write(tmp_path / "state", b"old")
    with recorded(Recorder(len(whole.log) - 1, error)):
        write(tmp_path / "state", b"new")
    assert (tmp_path / "state").read_bytes() == b"new"


def test_the_file_system_has_the_last_word(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    (tmp_path / "state").write_bytes(b"old")
    code = f"""
import resource
from gpu_adam.state import atomic_file
from gpu_adam.state.atomic_file import written
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with written({str(tmp_path / "state")!r}) as file:
        for _ in range(20):
            file.write(bytes(100_000))
except OSError as error:
    print(error.strerror)
"""
    assert processes.run(code) == os.strerror(errno.EFBIG)
    assert (tmp_path / "state").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


KILLS = """
import json, os, random, select, signal, sys, time
from gpu_adam.state import atomic_file
from gpu_adam.state.atomic_file import written

path, kills = sys.argv[1], int(sys.argv[2])
content = lambda version: b"%08d" % version * 5000
version, left, bad, during = 0, [], [], 0
for number in range(kills):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            version += 1
            with written(path) as file:
                for start in range(0, 40_000, 1000):
                    file.write(content(version)[start : start + 1000])
            os.write(write, b"%08d" % version)
    os.close(write)
    os.read(read, 8)  # it is at work
    time.sleep(random.Random(number).uniform(0, 0.004))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    returned = b""
    while piece := os.read(read, 1 << 16):
        returned += piece
    os.close(read)
    with open(path, "rb") as file:
        found = file.read()
    version, at_least = int(found[:8]), int(returned[-8:] or b"0")
    if found != content(version) or version < at_least:
        bad.append((version, at_least))
    left.append(len(os.listdir(os.path.dirname(path))) - 1)
with written(path) as file:
    file.write(b"the last")
print(json.dumps({"bad": bad, "left": left, "end": os.listdir(os.path.dirname(path))}))
"""


@pytest.mark.parametrize("kills", [25, pytest.param(200, marks=pytest.mark.thorough)])
def test_a_writer_is_killed_at_any_moment(tmp_path: Path, kills: int) -> None:
    """What it has left is swept by the next one."""
    code = f"import sys; sys.argv = ['', {str(tmp_path / 'state')!r}, '{kills}']\n{KILLS}"
    report = json.loads(processes.run(code))
    assert report["bad"] == []
    assert report["end"] == ["state"]
    assert max(report["left"]) == 1, "some kills must have struck a write; the rest of an earlier one is swept"


def test_what_is_raised_in_the_block_leaves_the_old_file(tmp_path: Path) -> None:
    write(tmp_path / "state", b"old")

    def interrupted(target: Any) -> None:
        with written(target) as file:
            file.write(b"new" * 1000)
            raise KeyboardInterrupt

    memory = io.BytesIO(b"old")
    for target in (tmp_path / "state", memory):
        with pytest.raises(KeyboardInterrupt):
            interrupted(target)
    assert read(tmp_path / "state") == b"old"
    assert os.listdir(tmp_path) == ["state"]
    assert memory.getvalue() == b"old"


def test_a_directory_that_vanishes(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()

    def vanishes() -> None:
        with written(folder / "state") as file:
            file.write(b"new")
            shutil.rmtree(folder)

    with pytest.raises(FileNotFoundError):
        vanishes()
    with pytest.raises(FileNotFoundError):
        write(folder / "state", b"new")
    assert os.listdir(tmp_path) == []


# Temporary files.


def temporaries(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


def test_only_what_is_left_of_dead_writers_is_swept(tmp_path: Path) -> None:
    dead = ".state.0123456789abcdef.tmp"
    others = [".other.0123456789abcdef.tmp", ".state.0123.tmp", "state.0123456789abcdef.tmp", ".state.npz.tmp"]
    for name in (dead, *others):
        (tmp_path / name).write_bytes(b"part")
    (tmp_path / ".state.aaaaaaaaaaaaaaaa.tmp").symlink_to("nowhere")
    with written(tmp_path / "state") as file:
        (own,) = set(temporaries(tmp_path)) - {*others, ".state.aaaaaaaaaaaaaaaa.tmp"}
        write(tmp_path / "state", b"in between")  # by another call of this process, which must leave the first its file
        assert own in temporaries(tmp_path)
        assert read(tmp_path / "state") == b"in between"
        file.write(b"at last")
    assert read(tmp_path / "state") == b"at last"
    assert set(os.listdir(tmp_path)) == {"state", *others, ".state.aaaaaaaaaaaaaaaa.tmp"}


def test_a_writer_of_another_process_is_left_alone(tmp_path: Path) -> None:
    code = f"""
import os, time
from gpu_adam.state import atomic_file
from gpu_adam.state.atomic_file import written
with written({str(tmp_path / "state")!r}) as file:
    while not os.path.exists({str(tmp_path / "go on")!r}):
        time.sleep(0.01)
    file.write(b"the child's")
"""
    child = processes.start(code)
    while not temporaries(tmp_path):
        assert child.poll() is None
        time.sleep(0.01)
    write(tmp_path / "state", b"ours")
    (tmp_path / "go on").touch()
    processes.output_of(child)
    assert read(tmp_path / "state") == b"the child's"
    assert temporaries(tmp_path) == []


def test_writers_of_the_same_file_in_many_threads(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def save(letter: int) -> None:
        try:
            for _ in range(30):
                write(tmp_path / "state", bytes([letter]) * 500)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=save, args=(97 + number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "state").exists():
            content = read(tmp_path / "state")
            assert content == content[:1] * 500
    for thread in threads:
        thread.join()
    assert failed == []
    assert os.listdir(tmp_path) == ["state"]


def test_a_writer_whose_new_file_is_swept_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = fcntl.flock
    swept: list[str] = []

    def late(file: Any, operation: int) -> None:
        if not swept and not operation & fcntl.LOCK_NB:
            swept.append(file.name)
            atomic_file.sweep(str(tmp_path), "state")
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    write(tmp_path / "state", b"new")
    assert len(swept) == 1
    assert not os.path.exists(swept[0])
    assert read(tmp_path / "state") == b"new"


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing tells the dead there: all are left alone."""
    (tmp_path / ".state.0123456789abcdef.tmp").touch()

    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    write(tmp_path / "state", b"new")
    assert sorted(os.listdir(tmp_path)) == [".state.0123456789abcdef.tmp", "state"]


NAMES = [b"n" * 255, "\N{EURO SIGN}".encode() * 85, b"\xff" * 255, b"a[b]*.npz", b".hidden", b" ", b"-"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_the_file_system_allows(tmp_path: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(tmp_path), name)
    left = os.fsencode(tmp_path) + b"/." + name[:100].decode(errors="ignore").encode() + b".0123456789abcdef.tmp"
    with open(left, "xb"):
        pass
    write(path, b"new")
    assert read(path) == b"new"
    assert os.listdir(os.fsencode(tmp_path)) == [name]


# What is replaced.


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "latest").symlink_to("next")
    (tmp_path / "next").symlink_to("folder/state")
    for content in (b"new", b"newer"):  # the first where the link leads to nothing
        write(tmp_path / "latest", content)
        assert (tmp_path / "latest").is_symlink()
        assert (tmp_path / "next").is_symlink()
        assert (tmp_path / "folder" / "state").read_bytes() == content
        assert os.listdir(tmp_path / "folder") == ["state"]


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("state", b"new")
    assert read("state") == (tmp_path / "state").read_bytes() == b"new"


def test_a_new_file_has_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "state", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o640


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o660, 0o666, 0o755])
def test_the_mode_stays(tmp_path: Path, mode: int) -> None:
    write(tmp_path / "state", b"old")
    (tmp_path / "state").chmod(mode)
    with written(tmp_path / "state") as file:
        (beside,) = temporaries(tmp_path)
        assert (tmp_path / beside).stat().st_mode & 0o077 == 0, "nobody else may read a part"
        file.write(b"new")
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == mode


@pytest.fixture
def common() -> Iterator[Path]:
    """A directory that every user may write."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@contextmanager
def as_nobody() -> Iterator[None]:
    """As a user with no special rights, where the tests run as root; otherwise as the user that we are."""
    if os.geteuid() != 0:
        yield
        return
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def test_a_file_that_must_not_be_written_is_refused(common: Path) -> None:
    """Though the directory would let it be replaced."""
    with as_nobody():
        write(common / "state", b"old")
        (common / "state").chmod(0o444)
        with pytest.raises(PermissionError):
            write(common / "state", b"new")
    assert (common / "state").read_bytes() == b"old"
    assert os.listdir(common) == ["state"]


def test_a_directory_that_must_not_be_written(common: Path) -> None:
    write(common / "state", b"old")
    (common / "state").chmod(0o666)
    common.chmod(0o555)
    try:
        with as_nobody(), pytest.raises(PermissionError):
            write(common / "state", b"new")
    finally:
        common.chmod(0o777)
    assert (common / "state").read_bytes() == b"old"
    assert os.listdir(common) == ["state"]


def test_a_directory_that_must_not_be_read(common: Path) -> None:
    """It can be neither swept nor synced; files can be made in it."""
    common.chmod(0o333)
    try:
        with as_nobody():
            write(common / "state", b"new")
    finally:
        common.chmod(0o777)
    assert (common / "state").read_bytes() == b"new"


@pytest.mark.parametrize("owner", [(12345, 54321) if os.geteuid() == 0 else (os.geteuid(), os.getegid())])
def test_the_owner_stays(common: Path, owner: tuple[int, int]) -> None:
    write(common / "state", b"old")
    (common / "state").chmod(0o640)
    os.chown(common / "state", *owner)
    write(common / "state", b"new")
    found = (common / "state").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (*owner, 0o640)


if os.geteuid() == 0:  # who alone gives files away, and becomes another user

    @pytest.mark.parametrize(
        ("group", "mode", "kept"), [(NOBODY, 0o666, 0o666), (54321, 0o666, 0o666), (54321, 0o672, 0o622)]
    )
    def test_an_owner_that_cannot_stay(common: Path, group: int, mode: int, kept: int) -> None:
        """The writer owns the file then; what the old group was allowed, another group is not."""
        write(common / "state", b"old")
        (common / "state").chmod(mode)
        os.chown(common / "state", 12345, group)
        with as_nobody():
            write(common / "state", b"new")
        found = (common / "state").stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (NOBODY, NOBODY, kept)
        assert (common / "state").read_bytes() == b"new"


# What is no file.


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ArgumentValueError, match=r"path must be a file \(got the directory .*\); add a file's name"):
        write(tmp_path, b"new")
    with pytest.raises(CheckpointError, match=r"must be a regular file \(got a directory\)"):
        read(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_fifo_gets_the_bytes(tmp_path: Path) -> None:
    """Once there is a reader, who gets nothing before there are all."""
    os.mkfifo(tmp_path / "pipe")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    content = bytes(range(256)) * 1000  # more than a pipe holds
    (tmp_path / "link").symlink_to("pipe")
    with written(tmp_path / "link") as file:
        file.write(content[:1])
        reader.start()
        file.write(content[1:])
        file.flush()
        assert got == []
    reader.join()
    assert got == [content]
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_a_fifo_that_goes_is_not_made_anew(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    def goes() -> None:
        with written(tmp_path / "pipe"):
            (tmp_path / "pipe").unlink()

    with pytest.raises(FileNotFoundError):
        goes()
    assert os.listdir(tmp_path) == []


def test_a_fifo_is_not_read(tmp_path: Path) -> None:
    """Whoever opened it would wait for a writer, and for an end that may never come."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=r"pipe must be a regular file \(got a FIFO\); copy what it gives"):
        read(tmp_path / "pipe")


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        read(tmp_path / "none")
    assert raised.value.filename == str(tmp_path / "none")


class Drop(io.RawIOBase):
    """A file without a buffer that takes three bytes at a time, and cannot seek."""

    def __init__(self) -> None:
        self.content = b""

    def writable(self) -> bool:  # noqa: D102
        return True

    def write(self, data: Any) -> int:  # noqa: D102
        self.content += bytes(data[:3])
        return len(data[:3])


class Dumb:
    """A file that does not say how much it has taken."""

    content = b""

    def write(self, data: Any) -> None:  # noqa: D102
        self.content += bytes(data)


@pytest.mark.parametrize("kind", [Drop, Dumb])
def test_a_file_object_gets_the_bytes(kind: type[Drop | Dumb]) -> None:
    sink = kind()
    write(sink, VERSIONS[3])
    assert sink.content == VERSIONS[3]
    with pytest.raises(ArgumentTypeError, match="must be"):
        read(sink)


def test_files_in_memory() -> None:
    """They are written at their position and stay open; they are read from the beginning."""
    memory = io.BytesIO(b"before")
    memory.seek(0, 2)
    write(memory, b"new")
    assert memory.getvalue() == b"beforenew"
    assert read(memory) == b"beforenew"
    assert not memory.closed


def test_pipes_are_not_read_as_file_objects() -> None:
    end, other = os.pipe()
    with os.fdopen(end, "rb") as file, os.fdopen(other, "wb"), pytest.raises(ArgumentTypeError, match="seekable"):
        read(file)


@pytest.mark.parametrize("wrong", [None, 1, 1.5, ["state"], io.StringIO()])
def test_what_is_neither_a_path_nor_a_file(wrong: Any) -> None:
    for use in (written, opened):
        with pytest.raises(ArgumentTypeError, match="path must be a path or a binary file object"):
            use(wrong)


def test_names_in_messages(tmp_path: Path) -> None:
    assert name_of("state") == "state"
    assert name_of(tmp_path) == str(tmp_path)
    assert re.fullmatch(r"the file object <_io.BytesIO object at .*>", name_of(io.BytesIO()))
