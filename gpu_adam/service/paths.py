"""Where a service's socket is when nobody says so."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from gpu_adam.errors import ServiceError

_NAME = "gpu-adam.sock"


def default_socket() -> Path:
    """`GPU_ADAM_SOCKET`, or a name in the user's runtime directory, or in one of the user's own in /tmp."""
    if given := os.environ.get("GPU_ADAM_SOCKET"):
        return Path(given)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / _NAME
    return Path("/tmp") / f"gpu-adam-{os.getuid()}" / _NAME


def make_default_directory() -> None:
    """Make the directory of the default socket, for this user alone.

    Raises:
        ServiceError: another user has made it.
    """
    directory = default_socket().parent
    if directory != Path("/tmp") / f"gpu-adam-{os.getuid()}":
        return
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        remedy = "name another socket with --socket"
        raise ServiceError(str(directory), "must be a directory of this user alone", "another one", remedy)
