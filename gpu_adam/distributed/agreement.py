"""Whether all ranks train the same thing, and what fails on one of them: a mistake is named, instead of made by all."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np

from gpu_adam import errors
from gpu_adam.adam import KEYWORDS, Adam
from gpu_adam.communicators import Communicator
from gpu_adam.devices import Array
from gpu_adam.errors import ArgumentTypeError, DistributedError, GpuAdamError

T = TypeVar("T")

_MARK = 0x6770755F6164616D
"""Begins what ranks tell each other, so that it is not taken for what another operation sends."""


def check_communicator(communicator: Any) -> None:
    """Raise ArgumentTypeError for what is no communicator."""
    if not isinstance(communicator, Communicator):
        got, remedy = type(communicator).__name__, "pass gpu_adam.communicators.Mpi(), say"
        raise ArgumentTypeError("communicator", "must be a Communicator", got, remedy)


def agree(communicator: Communicator, what: Sequence[str]) -> None:
    """Compare descriptions over all ranks. The host waits. Every rank calls it.

    Args:
        communicator: of the ranks.
        what: a line for each thing that must be the same in all ranks.

    Raises:
        DistributedError: a rank has others; in every rank, with the first line that differs.
    """
    text = "\n".join(what)
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint64)
    digests = _gathered(communicator, digest)
    if (digests == digests[0]).all():
        return
    lines = [each.split("\n") for each in gathered(communicator, text)]
    rank = next(rank for rank in range(communicator.size) if lines[rank] != lines[0])
    first, other = next(pair for pair in zip_longest(lines[0], lines[rank], fillvalue="nothing") if pair[0] != pair[1])
    rule, remedy = f"must do what rank 0 does, {first}", "run the same program with the same arguments in all ranks"
    raise DistributedError(f"rank {rank}", rule, other, remedy)


def described(optimizer: Adam) -> list[str]:
    """What must be the same in all ranks of an optimizer, whatever its variables; lines for `agree`."""
    optimizer._controller.guards.settle()  # how many steps are done, each rank may have heard at another time
    # All keywords, so that one that a rank lacks does not move the others.
    config = {**dict.fromkeys(KEYWORDS), **optimizer.get_config()}
    version, done = sys.modules["gpu_adam"].__version__, optimizer._state.steps_done
    lines = [f"{key} = {value!r}" for key, value in sorted(config.items())]
    return [f"gpu_adam {version}", f"iterations = {done}", *lines]


def gathered(communicator: Communicator, text: str) -> list[str]:
    """The texts of all ranks, in their order. The host waits. Every rank calls it."""
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = _gathered(communicator, np.array([own.size], np.int64))[:, 0]
    padded = np.zeros(-(-int(sizes.max()) // 8) * 8, np.uint8)
    padded[: own.size] = own
    texts = _gathered(communicator, padded.view(np.uint64)).view(np.uint8)
    return [bytes(row[: int(size)]).decode() for row, size in zip(texts, sizes, strict=True)]


def _gathered(communicator: Communicator, row: np.ndarray) -> np.ndarray:
    """Every rank's array of 64-bit numbers, which has the same size in all, as the rows of one.

    Raises:
        DistributedError: another rank is at something else, which engines do not see.
    """
    device = communicator.device
    marked = np.concatenate([np.array([_MARK], np.uint64), row.view(np.uint64)])
    rows: Array = device.zeros((communicator.size, marked.size), marked.dtype)
    communicator.all_gather(device.array(marked), rows).wait()
    found = device.numpy(rows)
    if (strangers := np.flatnonzero(found[:, 0] != _MARK)).size:
        rule, got = "must make the same calls as the others", f"another one than rank {communicator.rank}"
        remedy = "call build, set_group and the like on all ranks, in the same order"
        raise DistributedError(f"rank {strangers[0]}", rule, got, remedy)
    return np.ascontiguousarray(found[:, 1:]).view(row.dtype)


def together(communicator: Communicator, work: Callable[[], T]) -> T:
    """What a function gives that may fail on some rank: all ranks go on, or all raise the same kind of error.

    Args:
        communicator: of the ranks, each of which calls this.
        work: does nothing that ranks do together.

    Raises:
        Exception: what `work` has raised on the first rank where it has. The other ranks raise a copy of an error of
            this package or of the system, so that a program which catches one goes on alike on all ranks.
        DistributedError: on the other ranks, for any other error.
    """
    error: Exception | None = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    told = gathered(communicator, "" if error is None else json.dumps(_told(error)))
    rank = next((rank for rank, text in enumerate(told) if text), None)
    if rank is None:
        return result
    if error is None or rank != communicator.rank:
        raise _copy_of(json.loads(told[rank]), rank) from error
    raise error


def _told(error: Exception) -> list[Any]:
    if isinstance(error, GpuAdamError):
        return [type(error).__name__, error.argument, error.rule, str(error.got), error.remedy]
    if isinstance(error, OSError) and error.errno is not None:
        return ["OSError", error.errno, error.strerror, None if error.filename is None else str(error.filename)]
    return ["", f"{type(error).__name__}: {error}"]


def _copy_of(told: list[Any], rank: int) -> Exception:
    kind, first, *rest = told
    if kind == "OSError":  # of the class that belongs to its number
        return OSError(first, f"{rest[0]} (rank {rank})", rest[1])
    if kind:
        made: Exception = getattr(errors, kind)(f"{first} (rank {rank})", *rest)
        return made
    return DistributedError(f"rank {rank}", "must go on as the others do", first, "see what it has raised")
