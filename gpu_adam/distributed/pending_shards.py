"""Saves of several ranks that go on while these train: a thread of each rank writes, and the ranks agree at the end.

No thread makes a call of the communicator: MPI and NCCL take the calls of one thread, in one order. So nobody tells
rank 0's thread that the other ranks' files are there; it looks for them in the directory, where a file has its name
once it is whole. What a thread has raised the ranks tell each other when they wait.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from gpu_adam.communicators import Communicator
from gpu_adam.distributed.agreement import together
from gpu_adam.state.pending_save import PendingSave

Told = SimpleQueue[bool]
"""What rank 0's thread is told when the ranks wait: that all files are there, or that one will not come."""


class PendingShards(PendingSave):
    """A save of several ranks that may still be at work. `wait` and `join` are calls that all ranks make.

    The next save is one, too, and so is the end of ``with communicator:``, or `Communicator.close`. What has ended the
    save on one rank is raised on all of them.

    Args:
        communicator: of the ranks, each of which makes such an object.
        write: writes this rank's file.
        commit: what this rank does once it is written: on rank 0, makes the save the one that is loaded when all files
            are there, or nothing where it is told that one will not come.
    """

    def __init__(
        self, communicator: Communicator, write: Callable[[], object], commit: Callable[[Told], object]
    ) -> None:
        self._communicator = communicator
        self._file, self._told = file, told = Future[None](), Told()

        def work() -> None:
            try:
                write()
            except BaseException as error:
                file.set_exception(error)
                raise
            file.set_result(None)
            commit(told)

        super().__init__(work)
        self._ended = communicator.begun(self._end)

    def join(self) -> None:
        """Wait until the save has ended on all ranks, well or with an error."""
        self._ended.wait()

    def _end(self) -> None:
        try:
            together(self._communicator, self._file.result)
            self._told.put(True)
            together(self._communicator, self._end_thread)
        except Exception as error:
            self._told.put(False)
            super().join()
            self._outcome.error = error

    def _end_thread(self) -> None:
        super().join()
        if self._outcome.error is not None:
            raise self._outcome.error
