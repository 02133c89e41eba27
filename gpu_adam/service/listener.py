"""The socket at which clients find a service: made without a race, and removed by the one who made it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from gpu_adam.errors import ArgumentValueError

_PATH_BYTES = 107  # of a Unix socket's name
_BACKLOG = 128


class Listener:
    """A socket at a path, for this user alone from its first moment on; or for all, whom the server then checks.

    Args:
        path: of the socket. That of a service that was killed is replaced.
        is_open: whether other users may connect.

    Attributes:
        path, socket: as above; the socket listens, and does not wait.

    Raises:
        ArgumentValueError: another service answers at the path, something else is there, or no socket can be made.
    """

    def __init__(self, path: Path, *, is_open: bool) -> None:
        name = os.fsencode(path)
        if len(name) > _PATH_BYTES:
            rule = f"must have at most {_PATH_BYTES} bytes, as a socket's name"
            raise ArgumentValueError("--socket", rule, f"{len(name)} bytes: {path}", "choose a shorter path")
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self.socket.setblocking(False)
        try:
            # Linux gives the path the mode of the socket. A umask would be that of other threads' files, too.
            os.fchmod(self.socket.fileno(), 0o600)
            with _alone_in(path.parent):
                _make_way(path)
                self.socket.bind(name)
                if is_open:
                    os.chmod(path, 0o666)
                self.socket.listen(_BACKLOG)  # from now on another service finds this one; clients wait to be served
            self._file: int | None = os.lstat(path).st_ino
        except OSError as error:
            self.socket.close()
            rule = "must be a path where a socket can be made"
            raise ArgumentValueError("--socket", rule, error, "choose another") from error
        except BaseException:
            self.socket.close()
            raise

    def close(self) -> None:
        """Remove the socket, unless somebody has put another one there, and close it."""
        file, self._file = self._file, None
        with contextlib.suppress(OSError), _alone_in(self.path.parent):
            # While the socket is open, no other one can have its number.
            if file is not None and os.lstat(self.path).st_ino == file:
                os.unlink(self.path)
        self.socket.close()


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """A block in which no other service makes or removes a socket in a directory. The lock leaves no file."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make_way(path: Path) -> None:
    """Remove the socket of a service that was killed.

    Raises:
        ArgumentValueError: the service answers, or it is no socket that is there.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        got = f"another file: {path}"
        raise ArgumentValueError("--socket", "must be free, or an old socket's", got, "choose another")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fsencode(path))
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # it listens, and many wait
            pass
    got = f"another service answers at {path}"
    raise ArgumentValueError("--socket", "must be free", got, "end it, or choose another")
