"""A prepared step: which launches update a set of variables, in which order, with which memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any, NamedTuple

from gpu_adam import kernels
from gpu_adam.dense import DenseUpdate
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentValueError
from gpu_adam.gradients import NormClipping
from gpu_adam.hyperparameters import Clip, Scalars
from gpu_adam.memory import Interval, Intervals, memory_of
from gpu_adam.slots import Slots
from gpu_adam.sparse import IndexErrors, SparseUpdate
from gpu_adam.trace import stage
from gpu_adam.variables import Variable


class Mode(NamedTuple):
    """What chooses kernels, as opposed to what they are given.

    Attributes:
        complex_mode: one of kernels.COMPLEX_MODES.
        amsgrad: AMSGrad's update.
        clip_value, clip_norm, clip_global_norm: which clipping is on.
    """

    complex_mode: str
    amsgrad: bool
    clip_value: bool
    clip_norm: bool
    clip_global_norm: bool

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped in any way."""
        return self.clip_value or self.clip_norm or self.clip_global_norm


class Plan:
    """The launches of a step: one per dtype and device for all dense gradients, one per sparse gradient.

    A variable that comes several times is updated that often, in order: its second gradient waits for a second round of
    launches, so that no launch has two threads at one element.

    Args:
        variables: of each pair, in order.
        sparse: whether each pair's gradient names rows.
        mode: which kernels.
        errors_of: the note of rows out of range of a variable.

    Attributes:
        captured: whether a graph holds the plan's launches, so that its memory must stay.
    """

    def __init__(
        self,
        variables: Sequence[Variable],
        sparse: Sequence[bool],
        mode: Mode,
        errors_of: Callable[[Variable], IndexErrors],
    ) -> None:
        self.variables, self.sparse, self.mode = list(variables), list(sparse), mode
        rounds: dict[Variable, int] = {}
        members: dict[Any, list[int]] = {}
        for number, variable in enumerate(variables):
            turn = rounds[variable] = rounds.get(variable, -1) + 1
            key = (turn, number) if sparse[number] else (turn, variable.device.name, variable.dtype.name)
            members.setdefault(key, []).append(number)
        self._members = sorted(members.values(), key=lambda numbers: rounds_before(variables, numbers[0]))
        self._updates = [self._update([variables[n] for n in m], sparse[m[0]], errors_of) for m in self._members]
        self._real_dtypes = [kernels.DTYPES[update.dtype].real_dtype for update in self._updates]
        self._devices = {update.device for update in self._updates}
        self._norms: NormClipping | None = None
        self.captured = False
        self._memory_of_graphs: list[Any] = []

    def _update(
        self, variables: list[Variable], sparse: bool, errors_of: Callable[[Variable], IndexErrors]
    ) -> DenseUpdate | SparseUpdate:
        complex_mode, amsgrad, clip = self.mode.complex_mode, self.mode.amsgrad, self.mode.clips
        if sparse:
            (variable,) = variables
            errors = errors_of(variable)
            return SparseUpdate(variable, errors, complex_mode=complex_mode, amsgrad=amsgrad, clip=clip)
        return DenseUpdate(variables, complex_mode=complex_mode, amsgrad=amsgrad, clip=clip)

    def check(self, gradients: Sequence[Any]) -> list[Any]:
        """The gradients, ready to bind. Raises on the first that does not fit; nothing has changed then."""
        with self._memory_for_copies():
            return [
                update.check([gradients[n] for n in numbers])
                for update, numbers in zip(self._updates, self._members, strict=True)
            ]

    def _memory_for_copies(self) -> ExitStack:
        """Where gradients that need it are copied to. A graph does so at every replay: its memory is nobody else's."""
        stack = ExitStack()
        for device in self._devices:
            if device.is_capturing():
                memory, context = device.own_memory()
                self._memory_of_graphs.append(memory)
                stack.enter_context(context)
        return stack

    def allocate(self, slots: Slots) -> None:
        """Prepare the launches, once the slots exist."""
        written: dict[Device, list[Interval]] = {}
        for update in self._updates:
            update.allocate(slots)
            written.setdefault(update.device, []).extend(update.written(slots))
        self._written = {device: Intervals(intervals) for device, intervals in written.items()}
        if self.mode.clip_norm or self.mode.clip_global_norm:
            self._norms = NormClipping(self._updates, global_norm=self.mode.clip_global_norm)

    def bind(self, checked: list[Any]) -> bool:
        """Use these gradients. A gradient in memory that the step writes is copied first: it may be another's variable.

        Returns:
            Whether a step with the same objects may skip check and bind.
        """
        repeatable = []
        for update, bound in zip(self._updates, checked, strict=True):
            overlapped = self._written[update.device].overlapped(*update.read(bound))
            if overlapped is not None:
                with self._memory_for_copies():
                    for index in overlapped:
                        bound = update.copied(bound, int(index))  # noqa: PLW2901
            repeatable.append(update.bind(bound))
        return all(repeatable)

    @stage("read")
    def steps(self, scalars: Scalars, clip: Clip) -> list[tuple[Any, ...]]:
        """The scalars that each launch gets, in its dtype. Raises where they break a rule in that dtype."""
        by_dtype = {dtype: (*scalars.for_real(dtype), clip.value_in(dtype)) for dtype in set(self._real_dtypes)}
        return [by_dtype[dtype] for dtype in self._real_dtypes]

    @stage("update")
    def enqueue(self, steps: list[tuple[Any, ...]], clip: Clip) -> None:
        """Enqueue the whole step with the gradients bound last."""
        if any(device.is_capturing() for device in self._devices):
            self._enqueue_captured(steps, clip)
        else:
            self._enqueue(steps, clip)

    def _enqueue_captured(self, steps: list[tuple[Any, ...]], clip: Clip) -> None:
        self.captured = True
        try:
            for update in self._updates:
                update.begin_capture()
            self._enqueue(steps, clip)
        finally:
            for update in self._updates:
                update.end_capture()

    def _enqueue(self, steps: list[tuple[Any, ...]], clip: Clip) -> None:
        if self._norms is not None:
            self._norms.enqueue(clip)
        for update, step in zip(self._updates, steps, strict=True):
            update.enqueue(step)


def rounds_before(variables: Sequence[Variable], number: int) -> int:
    """How often the variable of pair `number` comes before it."""
    return sum(variable is variables[number] for variable in variables[:number])


def check_overlap(variables: Sequence[Variable]) -> None:
    """ArgumentValueError if two different variables share memory."""
    distinct = list(dict.fromkeys(variables))
    for device in {variable.device for variable in distinct}:
        placed = [(memory_of(device, v.value), v) for v in distinct if v.device is device and v.size]
        placed.sort(key=lambda pair: pair[0])
        for ((_, end), one), ((begin, _), other) in pairwise(placed):
            if begin < end:
                raise ArgumentValueError(
                    f"variables {one.name!r} and {other.name!r}",
                    "must not overlap in memory",
                    f"{end - begin} shared bytes",
                    "pass arrays that own their memory, or one variable for both",
                )
