"""Guarded steps: their scalars are chosen on the device, which alone knows the gradients' scale and how many are done.

A guarded step is the ordinary one with two short kernels around its pass over the gradients (guard.cu). They choose the
scalars among those of every number of steps that may have been done, and say whether the step is applied. The host
waits for none of it: it learns from reports, which the device copies to pinned memory, how many steps were left out.
The further the host runs ahead, the more rows of scalars it computes for a step, so that it slows down by itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu_adam import kernels
from gpu_adam.conversion import place_of
from gpu_adam.devices import Array, Device
from gpu_adam.devices.base import StagedArray
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.hyperparameters import Cohort, Flavour, counting
from gpu_adam.loss_scale import LossScale
from gpu_adam.rules import Rule, real_number
from gpu_adam.state.adam_state import GOOD_STEPS, SCALE
from gpu_adam.step.arguments import UpdateArguments
from gpu_adam.step.gradients import Incoming, on_device
from gpu_adam.step.norms import NormPass
from gpu_adam.uninterrupted import Call, make_all
from gpu_adam.variables import Variable

_SCALE = Rule("must be > 0 and finite", lambda x: 0 < x < float("inf"), "pass what the loss was multiplied by")

GUARDING = "skip_nonfinite, loss_scale, telemetry or a grad_scale on the device"
"""What makes a step a guarded one, in the words of messages."""

Candidates = Sequence[Sequence[Sequence[tuple[Any, ...]]]]
"""Scalars for each number of steps that may have been done, for each update, for each of its settings."""


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
        state, known, first, scale, wide, number, skips, found_inf, loss: arguments of the kernels.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        initial = np.zeros(1, kernels.GUARD)
        initial["theta_squares"] = np.nan
        self._memory = device.array(initial.view(np.uint8))
        self._reports = device.read_back(self._memory)
        self.report: Any = np.zeros(1, kernels.GUARD)[0]
        # The count was `_count` after guarded step number `_since`; `_read` reports were read of `_enqueued` steps, of
        # which number `_unsure` is the last one that may have been left out.
        self._count = self._since = self._read = self._enqueued = self._unsure = 0
        self.state = kernels.pointer(device.address(self._memory))
        self.known, self.first = kernels.scalar(-1), kernels.scalar(0)
        self.scale, self.wide, self.number = kernels.pointer(0), kernels.scalar(0), kernels.scalar(1, np.float64)
        self.skips, self.found_inf = kernels.scalar(0), kernels.pointer(0)
        self.loss = kernels.struct(kernels.LOSS_SCALE, 0, 0, 1)
        self.measures = self._follows = False
        self.cohorts: Sequence[Cohort] = ()
        self._loss_scale: LossScale | None = None
        self._kept: tuple[Array | None, ...] = ()

    def address(self, field: str) -> int:
        """Where a field of kernels.GUARD lies on the device."""
        fields = kernels.GUARD.fields
        assert fields is not None
        return int(self.state[0]) + fields[field][1]

    @property
    def update_totals(self) -> list[int]:
        """Where the sums of squares of updates and of variables lie on the device."""
        return [self.address("update_squares"), self.address("theta_squares")]

    @property
    def telemetry(self) -> Telemetry | None:
        """The last report's numbers; None before the first one."""
        if not self._read:
            return None
        report = self.report
        step, skipped, nonfinite = (int(report[name]) for name in ("count", "skipped", "not_finite"))
        update, theta = (math.sqrt(report[name]) for name in ("update_squares", "theta_squares"))
        return Telemetry(step, float(report["norm"]), nonfinite, skipped, float(report["scale"]), update, theta)

    @property
    def is_unsure(self) -> bool:
        """Whether fewer steps may be done than the counter says."""
        return self._unsure > self._since

    def bounds(self, counter: Variable, *, waits: bool = False) -> tuple[int, int]:
        """How many steps are done, at least and at most, by the reports that have come; the counter then says the most.

        Args:
            counter: of the optimizer.
            waits: whether to wait for all reports, after which the two numbers are one.
        """
        done, most = int(counter._value.item()), self._most()
        number, contents = self._reports.read(waits=waits)
        if number and counter._value.flags.writeable:  # else the next step is refused
            report, read = contents.view(kernels.GUARD)[0], self._read + number
            assign = functools.partial(functools.partial, setattr, self)
            changes = [assign("_read", read), assign("report", report)]
            if read > self._since and done == most:
                count = int(report["count"])
                done = count + self._enqueued - read
                fill = functools.partial(counter._value.fill, done)
                changes += [assign("_count", count), assign("_since", read), fill]
                if done != most:
                    changes += counting(self.cohorts, done - most)
            make_all([*self._reports.forget(number), *changes])
            most = self._most()
        if done != most:  # somebody has set the counter
            self._count, self._since = done, self._enqueued
        return self._count if self.is_unsure else done, done

    def _most(self) -> int:
        return self._count + self._enqueued - self._since

    def aim(self, counter: Variable, incoming: Incoming, flavour: Flavour) -> Target:
        """Let the kernels' next launches be those of a step.

        Args:
            counter: of the optimizer.
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
        if flag is not None and flavour.ema_overwrite_frequency is not None:
            rule = "must be left out with ema_overwrite_frequency, as the host does not know the number of steps"
            raise ArgumentValueError("found_inf", rule, "an array", "call overwrite_by_averages() where it is wanted")
        self.number[0] = incoming.divisor
        self.scale[0] = 0 if array is None else self.device.address(array)
        self.wide[0] = array is not None and array.dtype.itemsize == 8
        self.found_inf[0] = 0 if flag is None else self.device.address(flag)
        self.skips[0], self.measures = flavour.skips, flavour.telemetry
        self._kept, self._follows = (array, flag), incoming.scale is None
        self._loss_scale = flavour.loss_scale
        first, most = self.bounds(counter)
        self.known[0], self.first[0] = most if first == most else -1, first
        return Target(incoming.divisor, first, most)

    def report_calls(self, own: Mapping[str, Variable], cohorts: Sequence[Cohort]) -> list[Call]:
        """The calls that count the step aimed at and enqueue its report; to be made with its launches.

        Args:
            own: the loss scale's numbers, where the optimizer has one.
            cohorts: among the step's variables.
        """
        if self._loss_scale is not None:
            scale, good = (self.device.address(own[name]._value) for name in (SCALE, GOOD_STEPS))
            self.loss[0] = scale, good, self._loss_scale.growth_interval
            if self._follows:
                self.scale[0] = scale
        number = self._enqueued + 1
        assign = functools.partial(functools.partial, setattr, self)
        calls = [*self._reports.calls(), assign("_enqueued", number), assign("cohorts", cohorts)]
        if self.skips[0] or self.found_inf[0]:
            calls.append(assign("_unsure", number))
        return calls


class Target(NamedTuple):
    """A guarded step.

    Attributes:
        number: what its gradients are divided by; 1 where the device knows.
        first, most: how many steps are done before it, at least and at most.
    """

    number: float
    first: int
    most: int

    @property
    def counts(self) -> range:
        """The numbers of steps that may be done before it."""
        return range(self.first, self.most + 1)


class GuardedScalars:
    """The scalars of guarded updates: rows of candidates, and the row on the device that the updates read.

    Args:
        guard: chooses the row.
        updates: the updates' arguments, which are told where their scalars lie.
        searched: whether elements that are not finite are counted.
    """

    def __init__(self, guard: Guard, updates: Sequence[UpdateArguments], *, searched: bool) -> None:
        self._guard, device = guard, guard.device
        parts = np.dtype([(str(n), (u.scalars_dtype, (u.settings,))) for n, u in enumerate(updates)], align=True)
        fields = parts.fields
        assert fields is not None
        offsets = [fields[name][1] for name in fields]
        words = -(-parts.itemsize // 8)
        formats = [fields[name][0] for name in fields]
        self._dtype = np.dtype({"names": list(fields), "formats": formats, "offsets": offsets, "itemsize": 8 * words})
        self._row = device.array(np.zeros(words, np.int64))
        places = np.concatenate([_places(update, offset) for update, offset in zip(updates, offsets, strict=True)])
        self._places = device.array(places.view(np.uint8))
        row, table = device.address(self._row), device.address(self._places)
        self._rows = kernels.struct(kernels.GUARD_ROWS, 0, row, table, words, len(places))
        for update, offset in zip(updates, offsets, strict=True):
            update.staged[0] = row + offset
            update.found[0] = guard.address("found") if searched else 0
        self._have_room_for(1)
        self._begin = device.prepare(
            kernels.guard("guard_begin"),
            [guard.state, self._rows, guard.known, guard.first, guard.scale, guard.wide, guard.number],
        )
        self._end = device.prepare(
            kernels.guard("guard_end"), [guard.state, self._rows, guard.skips, guard.found_inf, guard.loss]
        )

    def _have_room_for(self, rows: int) -> None:
        self._candidates = np.zeros(rows, self._dtype)
        self._table: StagedArray = self._guard.device.staged(rows, self._dtype)
        self._rows["candidates"] = self._table.address

    def write(self, candidates: Candidates) -> None:
        """Let the next step's scalars be chosen among these."""
        if len(candidates) > len(self._candidates):
            self._have_room_for(2 * len(candidates))
        for number, name in enumerate(self._dtype.names or ()):
            column = self._candidates[name]
            column[: len(candidates)] = [scalars[number] for scalars in candidates]
        self._table.write(self._candidates)

    def begin(self) -> list[Call]:
        """The calls that enqueue the choice of a step's scalars."""
        return [self._begin.call(1)]

    def end(self, norms: Sequence[NormPass]) -> list[Call]:
        """The calls that enqueue the decision, behind the passes over the gradients."""
        calls: list[Call] = []
        if self._guard.measures:
            for norm in norms:
                calls += norm.total(self._guard.address("square_sum"))
        return [*calls, self._end.call(1)]


def _places(update: UpdateArguments, offset: int) -> np.ndarray:
    """Where the members of an update's StepScalars lie in a row: one GUARD_PLACE for each of its settings."""
    fields = update.scalars_dtype.fields
    assert fields is not None
    places = np.zeros(update.settings, kernels.GUARD_PLACE)
    begins = offset + update.scalars_dtype.itemsize * np.arange(update.settings)
    for name in ("unscale", "apply"):
        places[name] = begins + fields[name][1]
    places["size"] = fields["apply"][0].itemsize
    return places
