"""Saves whose file is written by a thread while the program goes on."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable

from gpu_adam.errors import ConcurrentStepError


class PendingSave:
    """A save that may still be at work.

    Its error is raised by `wait`; where nobody calls that, by the optimizer's next save or step; where there is none
    either, it is shown as the interpreter exits. The interpreter does not exit before the file is there.

    Args:
        write: writes the file.
    """

    def __init__(self, write: Callable[[], object]) -> None:
        self._outcome = outcome = _Outcome()
        # No daemon: the interpreter waits for such a thread before it exits.
        self._thread = threading.Thread(target=outcome.of, args=(write,), name="gpu_adam save", daemon=False)
        weakref.finalize(self, outcome.show_untold)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether the save has ended, well or with an error. Never waits."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the file is there.

        Raises:
            OSError: the file system has refused; the old file is unchanged. And whatever else has ended the save.
        """
        self.join()
        self._outcome.is_told = True
        if self._outcome.error is not None:
            raise self._outcome.error

    def join(self) -> None:
        """Wait until the save has ended, well or with an error."""
        self._thread.join()

    def raise_untold(self) -> None:
        """Raise the error of a save that has ended, unless it was raised before."""
        if not self._outcome.is_told:
            self.wait()


def second_save() -> ConcurrentStepError:
    """What a save raises that must not wait for another one."""
    rule, remedy = "must not be called while a save is at work", "wait for that one, or pass on_busy='wait'"
    return ConcurrentStepError("save", rule, "a second one", remedy)


class _Outcome:
    """How a save has ended. The thread has this object alone, so that a save that nobody holds can be told of."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.is_told = False

    def of(self, write: Callable[[], object]) -> None:
        try:
            write()
        except BaseException as error:  # whatever it is, another thread raises it
            self.error = error

    def show_untold(self) -> None:
        if self.error is not None and not self.is_told:
            sys.excepthook(type(self.error), self.error, self.error.__traceback__)
