"""A disk that forgets: what a power failure may leave of the operations that a program has made.

`recorded` notes every operation that `gpu_adam.state.atomic_file` makes on files, and makes one of them fail.
`after_power_failure` replays the first of them on a disk in memory, which has kept for certain only what was synced:
of the rest any part, in any order, a write also in part.
"""

import builtins
import errno
import io
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from gpu_adam.state import atomic_file


class Operation(NamedTuple):
    """One operation: "create", "write", "fsync", "rename", "unlink", "fsync directory", or what a test notes.

    Attributes:
        what: which one.
        name: the last part of the file's path.
        number: the file that had the name then; files are numbered as they are created.
        offset: where a write begins.
        data: what is written; the new name of a rename.
    """

    what: str
    name: str = ""
    number: int = -1
    offset: int = 0
    data: bytes = b""


class Recorder:
    """The operations so far, and the one that is to fail.

    Args:
        failing: the number of the operation that fails, from 0; -1 for none.
        error: with which errno.
        lasting: whether all later writes fail, too.
    """

    def __init__(self, failing: int = -1, error: int = errno.ENOSPC, lasting: bool = False) -> None:
        self.log: list[Operation] = []
        self.failing, self.error, self.lasting = failing, error, lasting
        self.numbers: dict[str, int] = {}
        self.names: dict[int, str] = {}

    def note(self, *operation: Any) -> None:
        """Add an operation to the log, before it is made; or raise in its place."""
        self.log.append(Operation(*operation))
        at, what = len(self.log) - 1, operation[0]
        if at == self.failing or (self.lasting and 0 <= self.failing < at and what == "write"):
            raise OSError(self.error, os.strerror(self.error))


class _File(io.FileIO):
    """A file whose writes are recorded."""

    recorder: Recorder

    def write(self, data: Any) -> int:
        name = os.path.basename(str(self.name))
        self.recorder.note("write", name, self.recorder.numbers[name], self.tell(), bytes(data))
        return super().write(data)


@contextmanager
def recorded(recorder: Recorder, forgotten: str = "") -> Iterator[None]:
    """Record what the block does to files, with buffers so small that there are many writes.

    Args:
        recorder: where to.
        forgotten: "fsync" or "fsync directory", which is not made then.
    """
    real_open, real_fsync, real_replace, real_unlink = os.open, os.fsync, os.replace, os.unlink

    def open_descriptor(path: Any, flags: int, mode: int = 0o777) -> int:
        name = os.path.basename(path)
        if flags & os.O_CREAT:
            number = len(recorder.numbers)
            recorder.note("create", name, number)
            recorder.numbers[name] = number
        descriptor = real_open(path, flags, mode)
        recorder.names[descriptor] = "" if flags & os.O_DIRECTORY else name
        return descriptor

    def fsync(descriptor: int) -> None:
        name = recorder.names[descriptor]
        what = "fsync" if name else "fsync directory"
        if what != forgotten:
            recorder.note(what, name, recorder.numbers.get(name, -1))
        real_fsync(descriptor)

    def replace(source: Any, target: Any) -> None:
        name, new = os.path.basename(source), os.path.basename(target)
        recorder.note("rename", name, recorder.numbers[name], 0, new.encode())
        real_replace(source, target)

    def unlink(path: Any) -> None:
        real_unlink(path)
        recorder.note("unlink", os.path.basename(path))

    def open_file(path: Any, mode: str, buffer: int = -1, opener: Callable[[str, int], int] | None = None) -> Any:
        if "x" not in mode:
            return builtins.open(path, mode, buffer, opener=opener)
        file = _File(path, mode.replace("b", ""), opener=opener)
        file.recorder = recorder
        return io.BufferedWriter(file, 64)

    with pytest.MonkeyPatch.context() as patch:
        for name, function in (("open", open_descriptor), ("fsync", fsync), ("replace", replace), ("unlink", unlink)):
            patch.setattr(os, name, function)
        patch.setattr(atomic_file, "open", open_file, raising=False)
        yield


def after_power_failure(log: list[Operation], kept: Callable[[], float]) -> dict[str, bytes]:
    """The files by name that a disk may have after these operations.

    Args:
        log: the operations.
        kept: how much of an operation that was not synced has reached the disk, from 0 to 1; also shuffles them.
    """
    contents: dict[int, bytearray] = {}
    writes: dict[int, list[Operation]] = {}
    names: dict[str, int] = {}
    changes: list[Operation] = []
    for operation in log:
        if operation.what == "write":
            writes.setdefault(operation.number, []).append(operation)
        elif operation.what == "fsync":
            for write in writes.pop(operation.number, []):
                _write(contents, write, 1)
        elif operation.what in ("create", "rename", "unlink"):
            changes.append(operation)
        elif operation.what == "fsync directory":
            for change in changes:
                _change(names, change)
            changes.clear()
    for pending in writes.values():
        for write in sorted(pending, key=lambda _: kept()):
            _write(contents, write, kept())
    for change in changes:
        if kept() >= 0.5:
            _change(names, change)
    return {name: bytes(contents.get(number, b"")) for name, number in names.items()}


def fates(count: int) -> list[Callable[[], float]]:
    """Ways for operations to be kept: all, none, and `count` others."""
    return [lambda: 1.0, lambda: 0.0, *(_Fate(seed) for seed in range(count))]


class _Fate:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self) -> float:
        """All, nothing, or a part."""
        return self._random.choice([0.0, 1.0, self._random.random()])


def _write(contents: dict[int, bytearray], write: Operation, kept: float) -> None:
    data = write.data[: round(kept * len(write.data))]
    if not data:
        return
    content = contents.setdefault(write.number, bytearray())
    content.extend(bytes(max(0, write.offset + len(data) - len(content))))
    content[write.offset : write.offset + len(data)] = data


def _change(names: dict[str, int], change: Operation) -> None:
    if change.what == "create":
        names[change.name] = change.number
    else:
        names.pop(change.name, None)
    if change.what == "rename":
        names[change.data.decode()] = change.number
