"""Guarded steps: their scalars are chosen on the device, which alone knows the gradients' scale and how many are done.

A guarded step is the ordinary one with two short kernels around its pass over the gradients (guard.cu). They choose the
scalars among those of every number of steps that may have been done (candidates.py), and say whether the step is
applied. The host waits for none of it: it learns from reports, which the device copies to pinned memory, how many steps
were left out. The further the host runs ahead, the more rows of scalars it computes for a step, so that it slows down
by itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np

from gpu_adam import kernels
from gpu_adam.conversion import place_of
from gpu_adam.devices import Array, Device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, ConcurrentStepError
from gpu_adam.hyperparameters import Cohort, Flavour, counting
from gpu_adam.loss_scale import LossScale
from gpu_adam.rules import Rule, real_number
from gpu_adam.state.adam_state import GOOD_STEPS, SCALE, AdamState
from gpu_adam.step.capture import refused_in_capture
from gpu_adam.step.gradients import Incoming, on_device
from gpu_adam.uninterrupted import Call, make_all
from gpu_adam.variables import Variable

_SCALE = Rule("must be > 0 and finite", lambda x: 0 < x < float("inf"), "pass what the loss was multiplied by")

GUARDING = "skip_nonfinite, loss_scale, telemetry or a grad_scale on the device"
"""What makes a step a guarded one, in the words of messages."""


def checked_scale(value: Any) -> Any:
    """The scale of gradients: a float, or an array on a CUDA device as it is, which nobody waits for.

    Raises:
        ArgumentTypeError, ArgumentValueError: no real number; one that is not positive and finite.
    """
    value = value.value if isinstance(value, Variable) else value
    place = place_of(value)
    if place is not None and place.xp is not np:
        return value
    number = float(real_number("grad_scale", value, kind="a number or a 0-d array", remedy=_SCALE.remedy))
    _SCALE.check("grad_scale", number)
    return number


def device_scalar(value: Any, device: Device, argument: str) -> Array:
    """A floating-point number in a device's memory, as a 0-d float32 or float64 array.

    Raises:
        ArgumentTypeError, ArgumentValueError: no array; one of another device, shape or kind of dtype.
    """
    array = on_device(value, device, argument, None)
    if array.shape != ():
        raise ArgumentValueError(argument, "must be a 0-d array", f"shape {tuple(array.shape)}", "take one element")
    if array.dtype not in (np.float16, np.float32, np.float64):
        rule = "must have dtype float16, float32 or float64"
        raise ArgumentTypeError(argument, rule, array.dtype, "cast it with astype")
    with device.activate():
        return array.astype(np.float32) if array.dtype == np.float16 else array


class Telemetry(NamedTuple):
    """Numbers of a step.

    Attributes:
        step: how many steps were done after it.
        grad_norm: the L2 norm over all its gradients, divided by their scale and clipped by value, not yet by norm.
        nonfinite: how many elements of its gradients were not finite.
        skipped: how many steps were left out so far, this one included if it was.
        loss_scale: what its gradients were divided by.
        update_norm: the L2 norm over all its variables of theta_t - theta_{t-1}, as computed, before a variable of 16
            bits is rounded; 0 for a step that was left out.
        param_norm: the L2 norm over all its variables after the update, of the masters where variables have them; for a
            step that was left out that of the step before, NaN where there was none.

    Update and variables are measured by the update's own pass, before constraints and averages overwrite a variable. A
    variable that comes several times in a step counts as often. These two norms, unlike all else, may differ in their
    last bits between devices.
    """

    step: int
    grad_norm: float
    nonfinite: int
    skipped: int
    loss_scale: float
    update_norm: float
    param_norm: float


class Owed(NamedTuple):
    """What is still to be reported of steps that the user launches.

    Attributes:
        is_due: whether no report was enqueued since the last one was staged.
        resumed: gives the context of the stream where that was; None where nothing is owed.
    """

    is_due: bool
    resumed: Callable[[], AbstractContextManager[Any]] | None


_NOTHING_OWED = Owed(False, None)


class Guard:
    """What a device knows of an optimizer's steps, and what the host has learned of it.

    The optimizer's counter, on the host, holds the largest number of steps that may have been done; `bounds` corrects
    it, and the counts of cohorts with it. Whoever writes another number into it sets it.

    Args:
        device: where the steps are done.

    Attributes:
        device: as above.
        report: the last report, of kernels.GUARD; zeros before the first one.
        measures: whether the report is to have the norm of the gradients.
        cohorts: those of the last step, and of all steps of which it is not known whether they were left out.
        state, scale, wide, number, skips, found_inf, loss: arguments of the kernels, which a graph has as they are when
            it is captured.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        initial = np.zeros(1, kernels.GUARD)
        initial["theta_squares"] = np.nan
        self._memory = device.array(initial.view(np.uint8))
        self._reports = device.read_back(self._memory)
        self.report: Any = np.zeros(1, kernels.GUARD)[0]
        # After guarded step number `_since` the count was `_count`. There are `_enqueued` such steps so far, of which
        # `_unsure` is the last one that may be left out.
        self._count = self._since = self._enqueued = self._unsure = 0
        self._owed = _NOTHING_OWED
        self.state = kernels.pointer(device.address(self._memory))
        self.scale, self.wide, self.number = kernels.pointer(0), kernels.scalar(0), kernels.scalar(1, np.float64)
        self.skips, self.found_inf = kernels.scalar(0), kernels.pointer(0)
        self.loss = kernels.struct(kernels.LOSS_SCALE, 0, 0, 1)
        self.measures = self._follows = False
        self.cohorts: Sequence[Cohort] = ()
        self._loss_scale: LossScale | None = None
        self._kept: Sequence[Array | None] = ()
        self._numbers: Sequence[Array] = ()

    def address(self, field: str) -> int:
        """Where a field of kernels.GUARD lies on the device."""
        fields = kernels.GUARD.fields
        assert fields is not None
        return int(self.state[0]) + fields[field][1]

    @property
    def found(self) -> Array:
        """The number of elements of a step's gradients that are not finite, on the device: one uint64."""
        begin = self.address("found") - int(self.state[0])
        return self._memory[begin : begin + 8].view(np.uint64)

    @property
    def update_totals(self) -> list[int]:
        """Where the sums of squares of updates and of variables lie on the device."""
        return [self.address("update_squares"), self.address("theta_squares")]

    @property
    def telemetry(self) -> Telemetry | None:
        """The last report's numbers; None before the first step."""
        report = self.report
        if not report["number"]:
            return None
        step, skipped, nonfinite = (int(report[name]) for name in ("count", "skipped", "not_finite"))
        update, theta = (math.sqrt(report[name]) for name in ("update_squares", "theta_squares"))
        return Telemetry(step, float(report["norm"]), nonfinite, skipped, float(report["scale"]), update, theta)

    @property
    def is_unsure(self) -> bool:
        """Whether fewer steps may be done than the counter says."""
        return self._unsure > self._since

    @property
    def made(self) -> int:
        """How many steps were enqueued, or staged for graphs of the user's."""
        return self._enqueued

    def bounds(self, counter: Variable, *, waits: bool = False) -> tuple[int, int]:
        """How many steps are done, at least and at most, by the reports that have come; the counter then says the most.

        A report has the number of the last step that has begun. What was staged before that step, and not launched, has
        not been done; what was staged since still may be.

        Args:
            counter: of the optimizer.
            waits: whether to wait for all reports. The two numbers are one then, unless something is staged that the
                user has not launched.
        """
        done, most = int(counter._storage.item()), self._most()
        self.ask(again=waits)
        made, contents = self._reports.read(waits=waits)
        if made and counter._storage.flags.writeable:  # else the next step is refused
            report = contents.view(kernels.GUARD)[0]
            assign, number = functools.partial(functools.partial, setattr, self), int(report["number"])
            changes = [assign("report", report)]
            if number > self._since and done == most:
                count = int(report["count"])
                done = count + self._enqueued - number
                fill = functools.partial(counter._storage.fill, done)
                changes += [assign("_count", count), assign("_since", number), fill]
                if done != most:
                    changes += counting(self.cohorts, done - most)
            if number == self._enqueued:
                changes.append(assign("_owed", _NOTHING_OWED))
            make_all([*self._reports.forget(made), *changes])
            most = self._most()
        if done != most:  # somebody has set the counter
            self._count, self._since = done, self._enqueued
        return self._count if self.is_unsure else done, done

    def ask(self, *, again: bool) -> None:
        """Enqueue a report of what the user may have launched since it was staged, on the stream where it was staged.

        Args:
            again: whether also where one was asked for before, which may have been too early.
        """
        is_due, resumed = self._owed
        if not is_due and not (again and resumed is not None):
            return
        assert resumed is not None
        with resumed():
            if not self.device.is_capturing():
                changes = functools.partial(setattr, self, "_owed", Owed(False, resumed))
                make_all([*self._reports.calls(), changes])

    def refuse_capture(self, what: str) -> None:
        """Raise ArgumentValueError where one would wait for the device in a capture."""
        if self.device.is_capturing():
            raise refused_in_capture(what)

    def _most(self) -> int:
        return self._count + self._enqueued - self._since

    def counts(self, counter: Variable, room: int | None = None) -> range:
        """The numbers of steps that may be done before the next one.

        Args:
            counter: of the optimizer.
            room: for how many of them there is memory; where there are more, the host waits for the device.
        """
        first, most = self.bounds(counter)
        if room is not None and most - first >= room:
            first, most = self.bounds(counter, waits=True)
        return range(first, most + 1)

    def aim(self, incoming: Incoming, flavour: Flavour) -> Aim:
        """Let the kernels' next launches be those of a step.

        Args:
            incoming: what its gradients are multiples of.
            flavour: of the optimizer.

        Raises:
            ArgumentTypeError, ArgumentValueError: an array of another device, shape or dtype.
        """
        array = flag = None
        if incoming.scale is not None and type(incoming.scale) is not float:
            array = device_scalar(incoming.scale, self.device, "grad_scale")
        if incoming.found_inf is not None:
            flag = device_scalar(incoming.found_inf, self.device, "found_inf").astype(np.float32, copy=False)
        self.number[0] = incoming.divisor
        self.scale[0] = 0 if array is None else self.device.address(array)
        self.wide[0] = array is not None and array.dtype.itemsize == 8
        self.found_inf[0] = 0 if flag is None else self.device.address(flag)
        self.skips[0], self.measures = flavour.skips, flavour.telemetry
        self._follows, self._loss_scale = incoming.scale is None, flavour.loss_scale
        aim = Aim(self, incoming.divisor, flavour.skips or flag is not None, (array, flag))
        self._kept = aim.kept
        return aim

    def find_loss_scale(self, own: Mapping[str, Variable]) -> None:
        """Let the kernels of the step aimed at read the loss scale, where the optimizer has one, and change it.

        Args:
            own: has its numbers, which exist by now.
        """
        if self._loss_scale is None:
            return
        self._numbers = [own[name]._storage for name in (SCALE, GOOD_STEPS)]  # kept with the guard, by graphs too
        scale, good = map(self.device.address, self._numbers)
        self.loss[0] = scale, good, self._loss_scale.growth_interval
        if self._follows:
            self.scale[0] = scale

    def done_calls(self, cohorts: Sequence[Cohort], aim: Aim, *, is_launched: bool = True) -> list[Call]:
        """The calls that count a step and enqueue its report; to be made with its launches.

        Args:
            cohorts: among its variables.
            aim: of the step.
            is_launched: whether its launches are enqueued with them. If not, the user is going to launch them on the
                current stream, and the report is asked for when this guard is next used.
        """
        number = self._enqueued + 1
        assign = functools.partial(functools.partial, setattr, self)
        report = self._reports.calls() if is_launched else [assign("_owed", Owed(True, self.device.resumed()))]
        calls = [*report, assign("_enqueued", number), assign("cohorts", cohorts)]
        if aim.may_be_left_out:
            calls.append(assign("_unsure", number))
        return calls


class Aim(NamedTuple):
    """How a guarded step is decided.

    Attributes:
        guard: decides.
        number: what its gradients are divided by, besides a scale that the device knows.
        may_be_left_out: whether the device may find that the step changes nothing.
        kept: arrays that the kernels read when they run.
    """

    guard: Guard
    number: float
    may_be_left_out: bool
    kept: Sequence[Array | None]


class Guards:
    """What is known of an optimizer's guarded steps: a guard for each device, and which one had the last step.

    Args:
        state: of the optimizer.

    Attributes:
        last: the guard of the last step, if that was a guarded one.
    """

    def __init__(self, state: AdamState) -> None:
        self._state = state
        self._by_device: dict[Device, Guard] = {}
        self.last: Guard | None = None
        self._is_evaluating = False

    def of(self, device: Device) -> Guard:
        """The guard of steps on a device."""
        if device not in self._by_device:
            self._by_device[device] = Guard(device)
        return self._by_device[device]

    def begin(self, guard: Guard | None, cohorts: Sequence[Cohort]) -> None:
        """Let the next step be one of this guard, or of none.

        The steps that may have been left out are waited for where another guard had the last step, or where the cohorts
        are other ones: all that took part in such steps are corrected alike.
        """
        last = self.last
        if last is not None and last.is_unsure and (last is not guard or last.cohorts != cohorts):
            last.bounds(self._state.counter, waits=True)
        self.last = guard
        if guard is not None:
            guard.bounds(self._state.counter)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A context, within a call of the optimizer, of callable hyperparameters, which may ask for `iterations`."""
        self._is_evaluating = True
        try:
            yield
        finally:
            self._is_evaluating = False

    @property
    def is_unsure(self) -> bool:
        """Whether fewer steps may be done than the counter says."""
        return self.last is not None and self.last.is_unsure

    @property
    def made(self) -> int:
        """How many guarded steps were made, those that were left out among them."""
        return sum(guard.made for guard in self._by_device.values())

    def settle(self) -> None:
        """Let the counter hold the number of steps done. Waits for the device where it has not told yet."""
        if not self.is_unsure:
            return
        if self._is_evaluating:
            self.settle_inside()
        else:
            with self._state.alone(is_brief=True):
                self.settle_inside()

    def settle_inside(self) -> None:
        """The same for a call of the optimizer that is at work."""
        if self.last is not None and self.last.is_unsure:
            self.last.refuse_capture("iterations")
            self.last.bounds(self._state.counter, waits=True)

    def skipped(self) -> int:
        """How many steps were left out. Waits for the device."""
        with self._state.alone():
            for guard in self._by_device.values():
                guard.refuse_capture("skipped_steps")
                guard.bounds(self._state.counter, waits=True)
            return sum(int(guard.report["skipped"]) for guard in self._by_device.values())

    def ask(self) -> None:
        """Enqueue the reports of what the user has launched, for a call that is about to wait for the device.

        Nothing happens while another call of the optimizer is at work.
        """
        with suppress(ConcurrentStepError), self._state.alone(is_brief=True):
            for guard in self._by_device.values():
                guard.ask(again=True)

    def telemetry(self) -> Telemetry | None:
        """The numbers of the last guarded step that the device has finished; None before there is one. Never waits."""
        with self._state.alone(is_brief=True):
            if self.last is None:
                return None
            if not self.last.device.is_capturing():  # where nobody may ask what has come
                self.last.bounds(self._state.counter)
            return self.last.telemetry
