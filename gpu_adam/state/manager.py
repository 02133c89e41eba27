"""When to save: files by number of steps in one directory, of which the newest whole one is restored."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, CheckpointError, CheckpointWarning
from gpu_adam.held_signals import HeldSignals
from gpu_adam.rules import Rule, is_whole, real_number, shown
from gpu_adam.state import checkpoint
from gpu_adam.state.atomic_file import make_directory

_SECONDS = Rule("must be > 0 and finite", lambda x: 0 < x < float("inf"), "pass the seconds between two saves")
_NAME = re.compile(r"step-(\d{9,})(?:-(\d+))?\.npz")


class Saveable(Protocol):
    """What the manager knows of an optimizer."""

    @property
    def iterations(self) -> Any:
        """The counter of steps done."""

    def save(self, path: Path, *, variables: bool, asynchronous: bool) -> Any:
        """Begin to write the state to a file; what is returned has `done`, and `wait()`, which raises what failed."""

    def load(self, path: Path, *, variables: bool) -> None:
        """Read what `save` wrote."""


class _File(NamedTuple):
    """A checkpoint of the directory; files are ordered by their steps, and those of one step by their number."""

    step: int
    number: int
    path: Path


class _Pending(NamedTuple):
    """A file that is being written, and what tells when it is."""

    file: _File
    save: Any


class CheckpointManager:
    """Saves an optimizer and its variables where it is time, and restores the newest file that is whole.

    After step 1000 the file is `step-000001000.npz`; where that exists, a damaged one perhaps, `step-000001000-1.npz`.
    No file is overwritten.

    Args:
        directory: of the files; it is made where it does not exist. Files of other names in it are left alone.
        optimizer: an `Adam` of one process, with its variables built where a file is to be restored.
        variables: whether the variables are saved and restored, too.
        every_steps: >= 1; save when a multiple of it was reached or passed since the last save. None: not by steps.
        every_seconds: > 0; save when so much time has passed since the last save began. None: not by time.
        keep: >= 1; how many files are kept. Older ones are removed once a newer one is durable; files with a higher
            number of steps than the one just written, and files that were skipped as damaged, neither count nor go.
            None: all are kept.

    Files are written while the next steps run. A save that becomes due before the last file is written waits for that.

    Steps that may be left out (`skip_nonfinite`, `loss_scale`) are counted on the device: `step` asks for the count,
    which waits for the device, only where a save would be due if no step had been left out.

    Raises:
        ArgumentTypeError, ArgumentValueError: a number of the wrong kind, or outside its range; an optimizer with a
            communicator, whose ranks would not save at the same time.
        OSError: the directory cannot be made.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        optimizer: Saveable,
        variables: bool = True,
        every_steps: int | None = None,
        every_seconds: float | None = None,
        keep: int | None = None,
    ) -> None:
        if hasattr(optimizer, "communicator"):
            rule, remedy = "must be of one process", "call its save on all ranks, every so many steps"
            raise ArgumentValueError("optimizer", rule, type(optimizer).__name__, remedy)
        self._every_steps = _whole_number("every_steps", every_steps)
        self._every_seconds = every_seconds
        if every_seconds is not None:
            _SECONDS.check("every_seconds", real_number("every_seconds", every_seconds))
        self._keep = _whole_number("keep", keep)
        self._directory = Path(directory)
        make_directory(self._directory)
        self._optimizer, self._variables = optimizer, variables
        self._most_steps = optimizer.iterations  # by itself it holds the largest number of steps that may be done
        self._begun_step, self._begun_time = int(self._most_steps), time.monotonic()
        self._last: _File | None = None  # the one written or restored last
        self._pending: _Pending | None = None
        self._skipped: set[Path] = set()
        self._held = HeldSignals()

    def step(self) -> Path | None:
        """Save if it is time; to be called after each step. Inside of `guard`, end on a signal that came meanwhile.

        Returns:
            The file that is being written from now on, or None.

        Raises:
            OSError: the file before could not be written.
            ArgumentValueError: gradients were accumulated that wait for their step.
        """
        if self._held.received is not None:
            self.save()
            self._held.raise_again()
        if self._pending is not None and self._pending.save.done:
            self.wait()
        if not self._is_due():
            return None
        self.wait()
        return self._begin()

    def save(self) -> Path:
        """Save now, whether it is time or not, and wait for the file.

        Returns:
            The file: where no step was done since the last one, that one.

        Raises:
            As `step`.
        """
        self.wait()
        if self._last is None or self._last.step != int(self._optimizer.iterations):
            self._begin()
            self.wait()
        assert self._last is not None
        return self._last.path

    def wait(self) -> None:
        """Return when the file being written is durable and older ones are removed.

        Raises:
            OSError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.save.wait()
            self._last = pending.file
            self._remove_older(pending.file)

    def restore_latest(self) -> Path | None:
        """Load the newest whole file, by number of steps. Each damaged file that is newer is a CheckpointWarning.

        Returns:
            The file, or None where there is none that is whole; then nothing has changed.

        Raises:
            CheckpointError: the newest whole file is one of other variables, dtypes or another `complex_mode`.
        """
        self.wait()
        for file in reversed(self._files()):
            try:
                self._optimizer.load(file.path, variables=self._variables)
            except (CheckpointError, OSError) as error:
                if _is_whole(file.path):
                    raise
                self._skipped.add(file.path)
                warnings.warn(f"a checkpoint is skipped: {error}", CheckpointWarning, stacklevel=2)
            else:
                self._last, self._begun_step, self._begun_time = file, file.step, time.monotonic()
                return file.path
        return None

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """A block in which SIGTERM and Ctrl-C wait for the end of a step.

        The `step` after the signal saves, waits for the file, and has the signal handled as before the block: Ctrl-C
        is a KeyboardInterrupt, SIGTERM ends the process unless it has a handler. Where the block ends without another
        `step`, the end does so. A second signal does at once what it always did. At its end the block waits for the
        last file.

        Raises:
            ArgumentValueError: outside of the main thread.
            OSError: in place of the signal, if the file cannot be written.
        """
        with HeldSignals(signal.SIGTERM, signal.SIGINT) as self._held:
            try:
                yield
            finally:  # also after an exception: a signal may have ended what the block depends on
                if self._held.received is None:
                    self.wait()
                else:
                    self.save()
                    self._held.raise_again()

    def _is_due(self) -> bool:
        if self._every_seconds is not None and time.monotonic() - self._begun_time >= self._every_seconds:
            return int(self._optimizer.iterations) != self._begun_step
        return self._has_passed(self._most_steps) and self._has_passed(self._optimizer.iterations)

    def _has_passed(self, steps: Any) -> bool:
        every = self._every_steps
        return every is not None and int(steps) // every != self._begun_step // every

    def _begin(self) -> Path:
        step = int(self._optimizer.iterations)
        number = max((file.number + 1 for file in self._files() if file.step == step), default=0)
        path = self._directory / f"step-{step:09}{f'-{number}' if number else ''}.npz"
        save = self._optimizer.save(path, variables=self._variables, asynchronous=True)
        self._pending = _Pending(_File(step, number, path), save)
        self._begun_step, self._begun_time = step, time.monotonic()
        return path

    def _files(self) -> list[_File]:
        """The checkpoints of the directory, from the oldest to the newest."""
        found = ((_NAME.fullmatch(path.name), path) for path in self._directory.iterdir())
        return sorted(_File(int(match[1]), int(match[2] or 0), path) for match, path in found if match)

    def _remove_older(self, newest: _File) -> None:
        older = [file for file in self._files() if file <= newest and file.path not in self._skipped]
        for file in older[: -self._keep] if self._keep is not None else []:
            try:
                file.path.unlink(missing_ok=True)
            except OSError as error:
                warnings.warn(f"a checkpoint cannot be removed: {error}", CheckpointWarning, stacklevel=3)


def _whole_number(argument: str, value: Any) -> int | None:
    if value is None:
        return None
    if not is_whole(value):
        raise ArgumentTypeError(argument, "must be a whole number or None", shown(value), "pass an int")
    if value < 1:
        raise ArgumentValueError(argument, "must be >= 1", value, "pass None for none")
    return int(value)


def _is_whole(path: Path) -> bool:
    try:
        checkpoint.read(path)
    except (CheckpointError, OSError):
        return False
    return True
