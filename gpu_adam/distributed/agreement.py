"""Whether all ranks train the same thing: a mistake in one rank's program is named, instead of made by all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from gpu_adam.communicators import Communicator
from gpu_adam.devices import Array
from gpu_adam.errors import ArgumentTypeError, DistributedError


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
    rule, remedy = f"must train what rank 0 does, {first}", "run the same program with the same arguments in all ranks"
    raise DistributedError(f"rank {rank}", rule, other, remedy)


def gathered(communicator: Communicator, text: str) -> list[str]:
    """The texts of all ranks, in their order. The host waits. Every rank calls it."""
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = _gathered(communicator, np.array([own.size], np.int64))[:, 0]
    padded = np.zeros(-(-int(sizes.max()) // 8) * 8, np.uint8)
    padded[: own.size] = own
    texts = _gathered(communicator, padded.view(np.uint64)).view(np.uint8)
    return [bytes(row[: int(size)]).decode() for row, size in zip(texts, sizes, strict=True)]


def _gathered(communicator: Communicator, row: np.ndarray) -> np.ndarray:
    """Every rank's array, which has the same size in all, as the rows of one."""
    device = communicator.device
    rows: Array = device.zeros((communicator.size, row.size), row.dtype)
    communicator.all_gather(device.array(row), rows).wait()
    return device.numpy(rows)
