"""Compiled kernels on disk: where they lie, who may have written them, whether they are whole.

Loading a library runs it. So one is loaded only from a directory that this user or root owns and nobody else can write
to, if the same is true of the file, and if the file ends in the digest of its name and of all that stands before: a
file cut short by a power failure, or with a changed bit, would end the process. A file that does not fit is deleted and
built again. Where the cache cannot be used, a private temporary directory takes its place, with a warning.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gpu_adam.devices import compiler
from gpu_adam.errors import DeviceError, KernelCompileError

_WORKSHOP = "gpu_adam-compiling-"
_ROOM = 4 << 20  # bytes, for a library and what the compiler writes on the way
_DIGEST = hashlib.sha256().digest_size

_warned = False


def directory() -> Path:
    """The cache: ``GPU_ADAM_CACHE``, or gpu_adam in the user's cache directory; made where it is missing.

    Raises:
        OSError: it cannot be made, or is not this user's alone.
    """
    given = Path(os.environ.get("GPU_ADAM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "gpu_adam"))
    try:
        place = given.expanduser().resolve()
    except RuntimeError as error:  # without HOME and without an entry in the system's list of users
        raise FileNotFoundError(errno.ENOENT, str(error).rstrip("."), str(given)) from error
    for path in (*reversed(place.parents), place):
        path.mkdir(0o755, exist_ok=True)  # this mode, whatever the umask lets others do
    if not _is_private(place.stat()):
        raise PermissionError(errno.EPERM, "Others own it or can write to it", str(place))
    return _without_swaps(place)


def described() -> str:
    """The cache's path, or why there is none."""
    try:
        return str(directory())
    except OSError as error:
        return f"a temporary directory, because of {_reason(error)}"


def load(text: str, what: str, kind: Callable[[str], Any] = ctypes.CDLL) -> Any:
    """The library of a source text, from the cache or compiled into it.

    Args:
        text: what `compiler.compile_library` takes.
        what: the text, in an error's words.
        kind: how to load it: ``ctypes.CDLL`` or ``ctypes.PyDLL``.

    Raises:
        KernelCompileError: it does not compile, or what the compiler makes does not load.
        DeviceError: there is no compiler, or no directory for it to work in.
    """
    name = f"host-{hashlib.sha256(compiler.identity(text)).hexdigest()[:32]}.so"
    path = None
    try:
        path = directory() / name
    except OSError as error:
        _warn(error)
    if path is not None:
        with suppress(OSError):  # it cannot be read, or is for another C library, say: it is built again
            library = _whole(path)
            if library is not None:
                return _loaded(path, library, kind)
        try:
            return _built(path.parent, path, text, what, kind)
        except OSError as error:
            _warn(error)
    try:
        return _built(_temporary(), None, text, what, kind)
    except OSError as error:
        rule = "needs a directory in which to compile"
        raise DeviceError(what, rule, _reason(error), "set GPU_ADAM_CACHE or TMPDIR to one with room") from error


def _temporary() -> Path:
    return _without_swaps(Path(tempfile.gettempdir()).resolve())


def _without_swaps(place: Path) -> Path:
    """The directory, where nobody can put another one in its place between a look at it and its use."""
    for path in (place, *place.parents):
        # The group's writing is let pass: with a umask of 002 homes are open to a group that has no other member.
        if path.stat().st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
            raise PermissionError(errno.EPERM, "Others can rename what lies in it", str(path))
    return place


def _is_private(status: os.stat_result) -> bool:
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _digest(name: str, library: bytes) -> bytes:
    return hashlib.sha256(name.encode() + library).digest()


def _whole(path: Path) -> bytes | None:
    """The library that `_keep` wrote there; None where there is none, or another file, which is deleted."""
    try:
        with open(path, "rb") as file:
            private, content = _is_private(os.fstat(file.fileno())), file.read()
    except FileNotFoundError:
        return None
    library = content[:-_DIGEST]
    if private and content[-_DIGEST:] == _digest(path.name, library):
        return library
    path.unlink(missing_ok=True)
    return None


def _keep(library: bytes, path: Path, work: Path) -> None:
    """Put a library into the cache, of which others find the whole or nothing, also after a power failure."""
    partial = work / path.name
    with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, 0o644)) as file:
        file.write(library + _digest(path.name, library))  # loaders look at the beginning
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _built(place: Path, path: Path | None, text: str, what: str, kind: Callable[[str], Any]) -> Any:
    """Compile a library inside the directory `place`, load it, and keep it at `path`, unless that is None."""
    with _workshop(place) as work:
        file = compiler.compile_library(text, what, work, work if path is None else place)
        library = file.read_bytes()
        try:
            loaded = _loaded(file, library, kind)
        except OSError as error:
            remedy = f"{compiler.ANOTHER}, or TMPDIR to a directory from which code may run"
            raise KernelCompileError(what, "must become a library that loads", _reason(error), remedy) from error
        if path is not None:
            try:
                _keep(library, path, work)
            except OSError as error:
                _warn(error)
        return loaded


def _loaded(file: Path, library: bytes, kind: Callable[[str], Any]) -> Any:
    """Load a file, or where that fails, as on mounts from which no code may run, a copy in a temporary directory."""
    try:
        return kind(str(file))
    except OSError as error:
        with _workshop(_temporary()) as work:
            copy = work / file.name
            copy.write_bytes(library)
            loaded = kind(str(copy))  # stays when the file goes
        _warn(error)
        return loaded


@contextmanager
def _workshop(place: Path) -> Iterator[Path]:
    """A new directory inside `place`, for this user alone; what ended processes left of theirs is removed.

    It is locked by the process that works in it, which is how another one sees that nobody does any more.
    """
    for left in place.glob(f"{_WORKSHOP}*"):
        _sweep(left)
    work = Path(tempfile.mkdtemp(prefix=_WORKSHOP, dir=place))
    lock = os.open(work, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks, on which `_sweep` gets none either
            fcntl.flock(lock, fcntl.LOCK_SH)
        # A compiler that runs out of space says so in words of its own, this in the system's.
        room = work / "room"
        room.write_bytes(bytes(_ROOM))
        room.unlink()
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _sweep(left: Path) -> None:
    try:
        lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_uid == os.geteuid() and os.listdir(lock):  # an empty one may be about to be locked
            shutil.rmtree(left, ignore_errors=True)
    except OSError:
        pass  # somebody works in it
    finally:
        os.close(lock)


def _warn(error: OSError) -> None:
    """Say once what a program loses whose kernels are not kept."""
    global _warned  # noqa: PLW0603  (once per process)
    if not _warned:
        rule = "must be a directory that only you can write to, and from which code may run"
        remedy = "set GPU_ADAM_CACHE to one; a temporary directory takes its place"
        warnings.warn(str(DeviceError("the kernel cache", rule, _reason(error), remedy)), RuntimeWarning, stacklevel=3)
        _warned = True


def _reason(error: OSError) -> str:
    return f"{error.strerror}: {error.filename}" if error.filename else str(error)
