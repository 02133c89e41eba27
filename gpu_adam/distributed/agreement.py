"""Whether all ranks mean the same: what they are told apart by, and the first difference."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_adam.communicators import Communicator
from gpu_adam.errors import ArgumentTypeError


def check_communicator(communicator: Any) -> None:
    """Raise ArgumentTypeError for what is no communicator."""
    if not isinstance(communicator, Communicator):
        got, remedy = type(communicator).__name__, "pass gpu_adam.communicators.Mpi(), say"
        raise ArgumentTypeError("communicator", "must be a Communicator", got, remedy)


def gpu_adam_version() -> str:
    """The version of this package; "unknown" where it is not installed."""
    try:
        return importlib.metadata.version("gpu_adam")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def first_difference(communicator: Communicator, facts: Sequence[str]) -> tuple[int, str, str] | None:
    """The first fact in which another rank differs from this one; all ranks find a difference where there is one.

    Args:
        communicator: of the ranks, each of which calls this.
        facts: short texts, in an order.

    Returns:
        The first such rank, its fact and this rank's, "nothing" where one has fewer; None where all have the same.
    """
    lists = [text.split("\0") for text in gathered(communicator, "\0".join(facts))]
    own = lists[communicator.rank]
    for rank, theirs in enumerate(lists):
        longest = max(len(theirs), len(own))
        padded = [[*each, *["nothing"] * (longest - len(each))] for each in (theirs, own)]
        for one, other in zip(*padded, strict=True):
            if one != other:
                return rank, one, other
    return None


def gathered(communicator: Communicator, text: str) -> list[str]:
    """The texts of all ranks, in their order."""
    device, own = communicator.device, text.encode()
    lengths = device.zeros((communicator.size,), np.dtype(np.int64))
    communicator.all_gather(device.array(np.array([len(own)], np.int64)), lengths).wait()
    counts = device.numpy(lengths)
    width = -(-int(counts.max()) // 8)
    padded = device.array(np.frombuffer(own.ljust(8 * width, b"\0"), np.uint64))
    everything = device.zeros((communicator.size * width,), np.dtype(np.uint64))
    communicator.all_gather(padded, everything).wait()
    rows = device.numpy(everything).reshape(communicator.size, width)
    return [row.tobytes()[:count].decode() for row, count in zip(rows, counts.tolist(), strict=True)]
