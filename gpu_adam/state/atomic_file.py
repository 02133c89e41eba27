"""Files that are replaced as a whole: a reader finds the old file or the new one, also after a kill or a power failure.

    a temporary file beside the target, locked         ".state.npz.<16 hexadecimal digits>.tmp"
    write, fsync                                       the content is durable before the target's name leads to it
    rename over the target, fsync of the directory     the name is durable before the call returns

The lock tells the temporary file of a writer at work from one that a killed writer has left, which the next write to
the same target removes: the kernel frees a lock (`flock`) at its holder's death. The number of the holder's process
would tell less, because containers that share a directory have numbers of their own, and numbers come again.

A target that is replaced keeps its mode, and its owner and group where this user may give files to them. Otherwise the
file becomes this user's, because a checkpoint of another owner is worth more than none; where the group cannot be kept,
the new group may do what everybody may. Access control lists, extended attributes and the other hard links of a file
are not kept.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, CheckpointError

PathOrFile = str | os.PathLike[str] | BinaryIO

_BUFFER = 1 << 20  # bytes
_LABEL = 100  # bytes of the target's name in a temporary's: the rest of it fits where names end at 143 bytes, too
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES}
"""How file systems refuse to sync a directory, and directories that this user may not read to be opened for it."""


def written(target: PathOrFile) -> AbstractContextManager[BinaryIO]:
    """A seekable binary file to write to. Where the block ends its content takes the target's place; if it raises, not.

    Args:
        target: a path. Where a regular file is, or nothing, a file is put, whose directory must exist and be writable;
            a symbolic link stays one, and the file that it points to is replaced. A FIFO or a device gets the bytes
            written into it, as does a binary file object, at its position: at the end of the block, out of memory.

    Raises:
        ArgumentTypeError: neither a path nor a binary file object.
        ArgumentValueError: a directory.
        OSError: the system refuses: PermissionError also for a file that this user may not write, though the directory
            would let it be replaced. The target is as before, unless it was the directory that could not be synced.
    """
    path = _path(target, "write")
    if path is None:
        return _poured(lambda: contextlib.nullcontext(target))
    try:
        old = os.stat(path)
    except FileNotFoundError:
        old = None
    if old is None or stat.S_ISREG(old.st_mode):
        return _replaced(os.path.realpath(path), old)
    if stat.S_ISDIR(old.st_mode):
        raise ArgumentValueError("path", "must be a file", f"the directory {path}", "add a file's name to it")
    return _poured(lambda: open(path, "wb", opener=_open_what_is_there))


def opened(source: PathOrFile) -> AbstractContextManager[BinaryIO]:
    """A seekable binary file to read from, whose end is known.

    Args:
        source: the path of a regular file, or a seekable binary file object, which is read from its first byte on
            wherever its position is, and stays open.

    Raises:
        ArgumentTypeError: neither a path nor a seekable binary file object.
        CheckpointError: a directory, a FIFO or a device, which may never end.
        OSError: the system refuses; FileNotFoundError where there is no such file.
    """
    path = _path(source, "seek")
    if path is not None:
        return open(path, "rb", _BUFFER, opener=_open_regular)
    assert not isinstance(source, (str, os.PathLike))
    if not source.seekable():
        raise ArgumentTypeError("path", "must be seekable where it is a file object", repr(source), "read it into one")
    source.seek(0)
    return contextlib.nullcontext(source)


def make_directory(path: str | os.PathLike[str]) -> None:
    """Make a directory, and those above it, unless they are there. Their names are durable when the call returns."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(os.path.abspath(path))
    make_directory(parent)
    os.makedirs(path, exist_ok=True)
    sync_directory(parent)


def name_of(file: PathOrFile) -> str:
    """What messages call a file."""
    return os.fsdecode(file) if isinstance(file, (str, os.PathLike)) else f"the file object {file!r}"


def _path(file: Any, method: str) -> str | None:
    """The path, or None for a binary file object that has the method."""
    if isinstance(file, (str, bytes, os.PathLike)):
        return os.fsdecode(file)
    if isinstance(file, io.TextIOBase) or not hasattr(file, method):
        raise ArgumentTypeError("path", "must be a path or a binary file object", repr(file), "pass one of them")
    return None


@contextlib.contextmanager
def _poured(open_sink: Callable[[], AbstractContextManager[Any]]) -> Iterator[BinaryIO]:
    content = io.BytesIO()
    yield content
    with open_sink() as sink:
        rest = content.getbuffer()
        while rest:
            count = sink.write(rest)  # files without a buffer may take a part
            rest = rest[len(rest) if count is None else count :]


@contextlib.contextmanager
def _replaced(target: str, old: os.stat_result | None) -> Iterator[BinaryIO]:
    if old is not None:
        os.close(os.open(target, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))  # the one check that knows every rule
    directory, name = os.path.split(target)
    label = os.fsencode(name)[:_LABEL].decode(errors="ignore")
    sweep(directory, re.escape(label))
    file = _locked_file(os.path.join(directory, f".{label}"), mode=0o666 if old is None else 0o600)
    try:
        with file:
            yield file
            file.flush()
            if old is not None:
                _give(file.fileno(), old)
            os.fsync(file.fileno())
            os.replace(file.name, target)  # before the file is closed, which ends the lock
    finally:
        with contextlib.suppress(OSError):
            os.unlink(file.name)
    sync_directory(directory)


def _locked_file(prefix: str, mode: int) -> BinaryIO:
    """A new file whose lock tells that its writer is at work."""
    while True:
        path = f"{prefix}.{os.urandom(8).hex()}.tmp"
        file = open(path, "xb", _BUFFER, opener=functools.partial(os.open, mode=mode))  # noqa: SIM115  # returned
        with contextlib.suppress(OSError):  # a file system without locks: nobody sweeps there
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(path):
            return file
        file.close()  # another writer has swept it away before it was locked


def sweep(directory: str, names: str) -> None:
    """Remove the temporary files of writers that are no more: those that nobody has locked.

    Args:
        directory: where they are.
        names: a pattern of the names of the files, of at most 100 bytes, that they were to become.
    """
    pattern = re.compile(rf"\.(?:{names})\.[0-9a-f]{{16}}\.tmp")
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name):
                _remove_unless_locked(entry.path)


def _remove_unless_locked(path: str) -> None:
    with contextlib.suppress(OSError):
        # For writing, because NFS gives no lock otherwise.
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        finally:
            os.close(descriptor)


def _give(descriptor: int, old: os.stat_result) -> None:
    """Give a file the owner, the group and the mode of the one that it replaces."""
    new, mode = os.fstat(descriptor), stat.S_IMODE(old.st_mode) & 0o777
    if new.st_gid != old.st_gid:
        try:
            os.fchown(descriptor, -1, old.st_gid)
        except OSError:
            mode = mode & 0o707 | (mode & 0o007) << 3
    if stat.S_IMODE(new.st_mode) != mode:
        os.fchmod(descriptor, mode)
    if new.st_uid != old.st_uid:  # at last: what is another's cannot be changed any more
        with contextlib.suppress(OSError):
            os.fchown(descriptor, old.st_uid, -1)


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Make the names in a directory durable, as far as the file system lets us."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _open_what_is_there(path: str, flags: int) -> int:
    return os.open(path, flags & ~(os.O_CREAT | os.O_TRUNC) | os.O_NOCTTY)


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)  # or the open of a FIFO waits for a writer
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    kind = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO"}.get(stat.S_IFMT(mode), "a device")
    raise CheckpointError(path, "must be a regular file", kind, "copy what it gives into a file, and pass that")
