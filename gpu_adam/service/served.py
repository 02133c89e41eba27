"""An optimizer that a service owns: its variables in shared memory, its steps and checkpoints, and what is said of it.

Its methods are called in the server's thread, while its device is current.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_adam.devices import Array, Device
from gpu_adam.devices.sharing import HostSharedMemory
from gpu_adam.errors import ArgumentValueError, ServiceError, SparseIndexError
from gpu_adam.service import sequence
from gpu_adam.service.config import OptimizerConfig
from gpu_adam.service.layout import placed
from gpu_adam.service.messages import SETTABLE, refusal
from gpu_adam.service.policies import Push
from gpu_adam.service.sequence import StepSequence
from gpu_adam.state.manager import CheckpointManager
from gpu_adam.variables import Variable

_log = logging.getLogger("gpu_adam")

_PACE_STEPS = 100


class ServedOptimizer:
    """An optimizer with its variables.

    Args:
        name: by which clients know it.
        config: what it is.
        device: where it lies.
        resume: whether to continue from the newest checkpoint, if there is one.

    Attributes:
        name, adam, variables, policy: what it is.
        places, nbytes: of the variables in `parameters`.
        parameters: the variables' memory, which clients may read.
        layout, status: host memory that clients may read: the variables' names and places as JSON, and `StepSequence`.
        done: an event: what was enqueued of the last step, and of copies.
        pushes: how many pushes have become part of steps.
        last_loss: what the last client that said so said, or None.
        counts_exactly: whether clients see how many steps are done, also where the device may leave steps out.
        durations: how long the last steps took the host, in seconds.
        observe_step: called with the seconds of each step.

    Raises:
        ArgumentValueError: without `resume`, the directory has checkpoints.
        CheckpointError, OSError: they do not fit, or cannot be read.
    """

    def __init__(self, name: str, config: OptimizerConfig, device: Device, *, resume: bool) -> None:
        _check_directory(name, config.checkpoint, resume=resume)
        self.name, self.adam, self.policy, self._device = name, config.adam, config.policy, device
        sizes = [(value.shape, value.dtype.name) for value in config.values.values()]
        self.places, self.nbytes = placed(sizes)
        self.parameters = device.share_memory(self.nbytes, read_only=True)
        self.variables: dict[str, Variable] = {}
        for place, (key, value) in zip(self.places, config.values.items(), strict=True):
            variable = Variable.over(place.view(self.parameters.array), device, key)
            self.variables[key] = variable.assign(value)
        self.adam.build(self.variables.values())
        self.done = device.share_event()
        self.status = HostSharedMemory(sequence.NBYTES, read_only=True)
        self._sequence = StepSequence(self.status.array)
        text = json.dumps([[key, *place.to_json()] for key, place in zip(self.variables, self.places, strict=True)])
        self.layout = HostSharedMemory(len(text.encode()), read_only=True)
        self.layout.array[:] = memoryview(text.encode())

        self.pushes = 0
        self.last_loss: float | None = None
        self.observe_step: Callable[[float], object] = float
        self.durations: deque[float] = deque(maxlen=_PACE_STEPS)
        self._ends: deque[float] = deque(maxlen=_PACE_STEPS)
        self._staleness: deque[int] = deque(maxlen=_PACE_STEPS)
        self._reported = self._nonfinite = 0
        # Where the host can look at once, it does; a device is not waited for.
        self.counts_exactly = device.checks_indices or not config.adam.flavour.skips
        self._has_sums, self._is_paused = False, False
        self._held: list[Push | str] = []  # what came while it was paused, in order: pushes, and names of lost clients
        self._manager: CheckpointManager | None = None
        self._owned = -1  # a descriptor of the directory, locked
        self._last_save: float | None = None
        with contextlib.ExitStack() as failed:
            failed.callback(self.close)
            if config.checkpoint is not None:
                self._manager = CheckpointManager(optimizer=self.adam, **config.checkpoint)
                self._owned = _own(name, config.checkpoint["directory"])
                if resume and self._manager.restore_latest() is not None:
                    self._last_save = time.monotonic()
            self._first_step = self.iterations
            self.done.record()
            self._sequence.begin()
            self._sequence.end(self.iterations)
            failed.pop_all()

    @property
    def iterations(self) -> int:
        """The steps done. Waits for the device where it may leave steps out."""
        return int(self.adam.iterations)

    @property
    def deadline(self) -> float | None:
        """When `tick` is to be called, by `time.monotonic`; None for never."""
        return None if self._is_paused else self.policy.deadline

    # What clients ask for.

    def push(self, push: Push) -> None:
        """Take gradients, or keep them until the optimizer is no longer paused."""
        if self._is_paused:
            self._held.append(push)
        else:
            self.policy.take(push, self)

    def lose(self, client: str) -> None:
        """Take note that a client is gone: what it pushed and no step has used is left out."""
        if not self._is_paused:
            self.policy.lose(client, self)
            return
        self._held = [each for each in self._held if isinstance(each, str) or each.client != client]
        if client not in self._held and self.policy.needs(client):
            self._held.append(client)

    def tick(self) -> None:
        """Make the step that is due."""
        self.policy.tick(self)

    @property
    def waiting(self) -> int:
        """How many pushes wait for their step."""
        return len(self.policy.waiting) + sum(isinstance(each, Push) for each in self._held)

    def copy_to(self, memory: Array, offset: int) -> tuple[int, int]:
        """Enqueue a copy of all variables into a client's memory, at their places from `offset` on.

        Returns:
            The steps done, and the sequence counter.
        """
        targets = [place._replace(offset=place.offset + offset).view(memory) for place in self.places]
        self._device.copy_call(targets, [variable.value for variable in self.variables.values()])()
        self.done.record()
        return self._sequence.step, self._sequence.version

    def get(self, name: str) -> Any:
        """A hyperparameter, as JSON has it."""
        self._check_settable(name)
        config = self.adam.get_config()
        return config[name] if name in config else getattr(self.adam, name)

    def set(self, name: str, value: Any) -> None:
        """Assign a hyperparameter: a number, or a schedule's configuration."""
        self._check_settable(name)
        if isinstance(value, dict):
            value = type(self.adam).from_config({name: value}).learning_rate if name == "learning_rate" else value
        setattr(self.adam, name, value)

    def _check_settable(self, name: str) -> None:
        if name not in SETTABLE:
            rule = f"must be one of {', '.join(SETTABLE)}"
            raise ArgumentValueError("the hyperparameter", rule, repr(name), "pass one of them")

    def check(self) -> None:
        """Wait for the device and raise what that could not say earlier, as `Adam.check_errors`."""
        self.adam.check_errors()

    def _log_errors(self) -> None:
        """Wait for the device, and log what nobody has asked for: the error of each variable."""
        while True:
            try:
                return self.check()
            except SparseIndexError as error:
                _log.warning("optimizer %r was pushed rows that it does not have: %s", self.name, error)

    def save(self) -> Path:
        """Write a checkpoint now, and wait for it; of sums that wait for their step the step is made before.

        Raises:
            ServiceError: there are no checkpoints, or such sums while the optimizer is paused.
        """
        if self._manager is None:
            rule, remedy = "must have an entry checkpoint in the configuration", "add one, with a directory"
            raise ServiceError(f"optimizer {self.name!r}", rule, "none", remedy)
        if self._is_paused and self._has_sums:
            rule, remedy = "must not be paused while gradients wait for their step", "resume it first"
            raise ServiceError(f"optimizer {self.name!r}", rule, "a pause", remedy)
        self.step_of_sums()
        self._log_errors()
        path = self._manager.save()
        self._last_save = time.monotonic()
        return path

    def pause(self) -> None:
        """Keep pushes from now on, and make no step, until `resume`."""
        self._is_paused = True

    def resume(self) -> None:
        """Take the pushes that were kept, in their order, and those to come."""
        self._is_paused = False
        held, self._held = self._held, []
        for each in held:
            if isinstance(each, str):
                self.policy.lose(each, self)
            else:
                self.policy.take(each, self)

    def finish(self) -> None:
        """Refuse what waits, make the steps that were promised, wait for the device, and save if anything was done."""
        self._is_paused = False
        waiting = [each for each in [*self._held, *self.policy.waiting.values()] if isinstance(each, Push)]
        self._held, self.policy.waiting = [], {}
        for push in waiting:
            push.answer({"draining": True})
        self.policy.finish(self)
        self.adam.synchronize()
        self._log_errors()
        if self._manager is not None and (self._last_save is not None or self.iterations != self._first_step):
            self.save()

    # What the policy asks for.

    def step(self, pushes: Sequence[Push]) -> None:
        """Make one step of the mean of these gradients, and answer."""
        if len(pushes) == 1:
            push = pushes[0]
            self._step(pushes, lambda: self.adam.apply_gradients(push.pairs, grad_scale=push.scale))
        else:
            self._step(pushes, lambda: self._step_of_all(pushes))

    def _step_of_all(self, pushes: Sequence[Push]) -> int | None:
        try:
            for push in pushes:
                self.adam.accumulate(push.pairs, push.scale)
            return self.adam.apply_gradients()
        except Exception:
            self.adam.discard_accumulated()
            raise

    def add(self, push: Push) -> None:
        """Add gradients to the sums."""
        try:
            push.ready()
            self.adam.accumulate(push.pairs, push.scale)
            self.done.record()
        except Exception as error:  # whatever it is, it is this client's
            push.answer(refusal(error))
            return
        self._has_sums = True
        self._answer([push], self._sequence.step + 1)

    def step_of_sums(self) -> None:
        """Make the step of the sums, if there are any."""
        if self._has_sums:
            self._has_sums = False
            self._step([], self._apply_sums)

    def _apply_sums(self) -> int | None:
        try:
            return self.adam.apply_gradients()
        except Exception as error:  # nobody waits for an answer that would say so
            _log.error("a step of optimizer %r that pushes were promised was not made: %s", self.name, error)
            self.adam.discard_accumulated()
            raise

    def refuse(self, push: Push, error: ServiceError) -> None:
        """Answer that the push is part of no step."""
        push.answer(refusal(error))

    def _step(self, pushes: Sequence[Push], function: Callable[[], int | None]) -> None:
        start, sequence = time.perf_counter(), self._sequence
        now = before = sequence.step
        sequence.begin()
        try:
            for push in pushes:
                push.ready()
            done = function()
            now = self._count(before) if done is None else done
            self.done.record()
        except Exception as error:  # whatever it is, it is these clients', and none waits for ever
            answer = refusal(error)
            for push in pushes:
                push.answer(answer)
            return
        finally:
            sequence.end(now)
        end = time.perf_counter()
        self._answer(pushes, done)  # before all that they need not wait for
        self.durations.append(end - start)
        self._ends.append(end)
        try:
            self.observe_step(end - start)
            self._look_at_gradients()
        except Exception:  # the step is done, and has been answered; a device that failed says so again
            _log.exception("step %s of optimizer %r could not be looked at", done, self.name)
        self._save_if_due()

    def _count(self, before: int) -> int:
        """The steps done after one that may have been left out; on a device one more, for the host does not wait."""
        return self.iterations if self.counts_exactly else before + 1

    def _answer(self, pushes: Sequence[Push], step: int | None) -> None:
        for push in pushes:
            self.pushes += 1
            if push.loss is not None:
                self.last_loss = push.loss
            staleness = None
            if push.read is not None and step is not None:
                staleness = step - 1 - push.read
                self._staleness.append(staleness)
            push.answer({"step": step, "staleness": staleness})

    def _save_if_due(self) -> None:
        if self._manager is None or self._has_sums:
            return
        try:
            if self._manager.step() is not None:
                self._last_save = time.monotonic()
        except Exception:  # the step is done, and has been answered
            _log.exception("a checkpoint of optimizer %r could not be written", self.name)

    # What is said of it.

    def description(self) -> dict[str, Any]:
        """What can be said at once, as JSON has it."""
        return {
            "name": self.name,
            "policy": self.policy.text,
            "steps": self._sequence.step,
            "pushes": self.pushes,
            "paused": self._is_paused,
            "waiting": self.waiting,
            "steps_per_second": self._pace(),
            "step_seconds": max(self.durations, default=None),
            "staleness": max(self._staleness, default=None),
            "loss": self.last_loss,
            "learning_rate": self._learning_rate(),
            "parameter_bytes": self.nbytes,
            "checkpoint_age_seconds": self.checkpoint_age,
            "nonfinite_steps": self.nonfinite_steps,
            "telemetry": self._telemetry(),
        }

    @property
    def checkpoint_age(self) -> float | None:
        """Seconds since the newest checkpoint was written, or was restored; None before the first one."""
        return None if self._last_save is None else time.monotonic() - self._last_save

    @property
    def nonfinite_steps(self) -> int | None:
        """How many steps had gradients that were not all finite, as far as the device has told. Never waits.

        None where the optimizer does not look: it has neither `telemetry` nor `skip_nonfinite` nor `loss_scale`. With
        `telemetry` alone a device that lags behind may have had more.
        """
        flavour = self.adam.flavour
        if flavour.skips:
            report = self.adam._controller.guards.telemetry()
            return 0 if report is None else report.skipped
        return self._nonfinite if flavour.telemetry else None

    def _look_at_gradients(self) -> None:
        """Count the newest report where nothing else counts it; of a device that lags behind it may be seen again."""
        if self.adam.flavour.telemetry and not self.adam.flavour.skips:
            report = self.adam.read_telemetry()
            if report is not None and report.step != self._reported:
                self._reported = report.step
                self._nonfinite += report.nonfinite > 0

    def _learning_rate(self) -> float:
        """That of the next step."""
        rate = self.adam.learning_rate
        return float(rate(self._sequence.step) if callable(rate) else rate)

    def _pace(self) -> float:
        ends = self._ends
        if len(ends) < 2:
            return 0.0
        seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
        return 0.0 if time.perf_counter() - ends[-1] > max(2.0, 3 * seconds) else 1 / seconds

    def _telemetry(self) -> dict[str, float] | None:
        if not self.adam.flavour.telemetry:
            return None
        found = self.adam.read_telemetry()
        if found is None:
            return None
        return {name: value for name, value in found._asdict().items() if math.isfinite(value)}

    def close(self) -> None:
        """Give the shared memory back, and the directory of checkpoints."""
        if self._owned >= 0:
            os.close(self._owned)
            self._owned = -1
        for memory in (self.parameters, self.status, self.layout, self.done):
            memory.close()


def _own(name: str, directory: Path) -> int:
    """A descriptor that keeps other services from a directory, for as long as it is open.

    Raises:
        ArgumentValueError: another service has it.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        rule, got = "must be no other service's", f"{directory}, which one writes to"
        remedy = "end that one, or name another directory"
        raise ArgumentValueError(f"optimizer {name!r}'s checkpoint.directory", rule, got, remedy) from None
    return descriptor


def _check_directory(name: str, checkpoint: Mapping[str, Any] | None, *, resume: bool) -> None:
    """Refuse to begin anew where there are checkpoints, and to resume where there can be none."""
    if checkpoint is None:
        if resume:
            rule, remedy = "must have an entry checkpoint to resume from", "add one, or leave --resume out"
            raise ArgumentValueError(f"optimizer {name!r}", rule, "none", remedy)
        return
    directory: Path = checkpoint["directory"]
    if not resume and directory.is_dir() and any(directory.glob("step-*.npz")):
        rule, remedy = "must have no checkpoints without --resume", "pass --resume, or name another directory"
        raise ArgumentValueError(f"optimizer {name!r}'s checkpoint.directory", rule, directory, remedy)
