"""Ranks that are threads of one process: a communicator for tests, without MPI."""

import itertools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from gpu_adam.communicators import Communicator
from gpu_adam.devices import find_device

T = TypeVar("T")
SECONDS = 30


class Board:
    """Where ranks leave their arrays for each other."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=SECONDS)
        self.arrays: list[Any] = [None] * size


class Threads(Communicator):
    """One rank. An operation is done when it has begun."""

    def __init__(self, board: Board, rank: int) -> None:
        super().__init__(rank, board.size, find_device("host"))
        self._board = board

    def barrier(self) -> None:
        """Wait for all threads."""
        self._board.barrier.wait()

    def abort(self) -> None:
        """Let the others hear of it."""
        self._board.barrier.abort()

    def _done(self, own: Any, take: Callable[[list[Any]], Any], recv: Any) -> Callable[[], object]:
        self._board.arrays[self.rank] = own
        self.barrier()
        result = take(self._board.arrays)
        self.barrier()  # nobody writes before all have read
        recv[...] = result
        return int

    def _reduce_scatter(self, send: Any, recv: Any) -> Any:
        part = slice(self.rank * recv.size, (self.rank + 1) * recv.size)
        return self._done(send, lambda all_of: np.sum([each[part] for each in all_of], 0), recv)

    def _all_reduce(self, send: Any, recv: Any) -> Any:
        return self._done(send, lambda all_of: np.sum(all_of, 0), recv)

    def _all_gather(self, send: Any, recv: Any) -> Any:
        return self._done(send, np.concatenate, recv)

    def _all_to_all(self, send: Any, recv: Any, send_counts: list[int], recv_counts: list[int]) -> Any:
        begins = np.cumsum([0, *send_counts])
        parts = [send[begin:end] for begin, end in itertools.pairwise(begins)]
        return self._done(parts, lambda all_of: np.concatenate([each[self.rank] for each in all_of]), recv)

    def _broadcast(self, array: Any, root: int) -> Any:
        return self._done(array, lambda all_of: all_of[root].copy(), array)


def on_ranks(size: int, work: Callable[[Communicator], T]) -> list[T]:
    """What a function returns on each of so many ranks; the first error is raised, on whichever rank it comes."""
    board, results = Board(size), list[Any]([None] * size)
    errors: list[Exception] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Threads(board, rank))
        except Exception as error:
            errors.append(error)
            board.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not errors
    return results
