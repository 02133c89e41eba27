"""Functions captured by `Adam.capture`: a replay is a step like any other.

A capture calls the function once, and the graph gets what the function enqueues. The steps in it run nothing and count
nothing: each only notes what a replay needs. A replay evaluates the hyperparameters for the next step, writes the
scalars to where the graph reads them, launches the graph and counts. The writes come before the launch on the same
stream, so that neither the host nor the graph waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpu_adam.autodiff_seam import refuse_in_loss
from gpu_adam.devices import Device, get_device
from gpu_adam.devices.base import Capture, StagedArray
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.hyperparameters import Clip, Flavour
from gpu_adam.kernels import UpdateRule
from gpu_adam.state.adam_state import AdamState
from gpu_adam.state.counter import check_countable
from gpu_adam.state.transaction import Transaction
from gpu_adam.step.arguments import Writer
from gpu_adam.step.candidates import ROOM
from gpu_adam.step.capture import refused_in_capture
from gpu_adam.step.guard import GUARDING, Aim, Guard, Guards
from gpu_adam.step.launches import Launches, LaunchScalars, make_ready
from gpu_adam.step.plan import Plan
from gpu_adam.step.scalars import Scalars
from gpu_adam.uninterrupted import Call, make_all
from gpu_adam.variables import Variable

Configuration = tuple[UpdateRule, dict[str, Any], Clip]
"""Which update an optimizer's present configuration asks for, its stored hyperparameters, its clipping."""


class Promises(Protocol):
    """Steps that captures of the user's have counted, and nobody has done."""

    def forget(self) -> None:
        """Take it that they are done: another step is, behind them."""


class Stepper(NamedTuple):
    """An optimizer as its captured steps see it, and keep it alive.

    Attributes:
        state: what its steps change.
        flavour: what they do besides plain Adam.
        configuration: gives the present one.
        guards: what is known of its guarded steps.
        staged: its steps in graphs of the user's.
    """

    state: AdamState
    flavour: Flavour
    configuration: Callable[[], Configuration]
    guards: Guards
    staged: Promises

    def next_step(self) -> NextStep:
        """What the optimizer is to do next, its hyperparameters each evaluated once.

        Raises:
            ArgumentTypeError, ArgumentValueError: a value breaks its rule, or no step can be counted.
        """
        rule, hyper, clip = self.configuration()
        now = Scalars(hyper, check_countable(self.state.counter), self.flavour)
        return NextStep(self.state, rule, hyper["learning_rate"], now, clip)


class NextStep(NamedTuple):
    """What an optimizer is to do next.

    Attributes:
        state: of the optimizer.
        rule: which update.
        rate: the stored learning rate.
        now: the hyperparameters' values.
        clip: the bounds.
    """

    state: AdamState
    rule: UpdateRule
    rate: Any
    now: Scalars
    clip: Clip

    def be_counted(self) -> None:
        """Count the step."""
        counter = self.state.counter
        self.now.iterations = done = check_countable(counter)  # a callable may have set the counter
        counter._storage.fill(done + 1)


class CapturedStep(NamedTuple):
    """A step within graphs.

    Attributes:
        plan: which variables it updates.
        launches: has the memory where the graphs find their scalars.
        written_calls: to be made with each replay, see `written_calls` of gpu_adam.devices.torch_tensors.
        clip: the bounds, which the kernels of a norm have as part of a graph.
        divisor: by which the gradients are divided.
        layout: of the state, while a graph fits it.
        aim: of a guarded step.
    """

    plan: Plan
    launches: Launches
    written_calls: Sequence[Call]
    clip: Clip
    divisor: float
    layout: object
    aim: Aim | None = None

    @property
    def guard(self) -> Guard | None:
        """Decides about a guarded step."""
        return None if self.aim is None else self.aim.guard

    def misfit(self, rule: UpdateRule, clip: Clip, layout: object) -> ArgumentValueError | None:
        """What is wrong where the kernels of a graph are not those that are asked for.

        Kernels that clip by value or adjust are given neutral numbers where that is no longer asked for.

        Args:
            rule: which update the optimizer is to make.
            clip: its bounds.
            layout: of its state.
        """
        own = self.plan.rule
        if rule is own and clip == self.clip and layout is self.layout:
            return None
        covered = rule._replace(
            adjusts=rule.adjusts or own.adjusts,
            bounded=rule.bounded or own.bounded,
            scaled=own.scaled,
            guarded=own.guarded,
        )
        changed = [name for name, one, other in zip(own._fields, own, covered, strict=True) if one != other]
        if own.norm is not None and clip != self.clip:
            changed.append("bounds")
        if self.layout is not layout:
            changed.append("variables, slots or groups")
        if not changed:
            return None
        rule_of_replays = "must be replayed with the variables and the kind of update that it was captured with"
        return ArgumentValueError("a captured step", rule_of_replays, f"other {', '.join(changed)}", "capture it again")

    def scalars(self, asked: NextStep, counts: range | None = None) -> LaunchScalars:
        """The scalars of the next step, ready to be staged: of one that has been counted, unless it is a guarded one.

        Args:
            asked: the step.
            counts: of a guarded one, the numbers of steps that may be done before it; those of now by default.

        Raises:
            ArgumentValueError: the graph does not fit; a value breaks its rule in some dtype.
        """
        wrong = self.misfit(asked.rule, asked.clip, asked.state.layout)
        if wrong is not None:
            raise wrong
        if self.guard is None:
            return self.plan.scalars(asked.now, asked.clip, self.divisor)
        counts = counts or self.guard.counts(asked.state.counter, ROOM)
        return self.plan.candidates(asked.now, asked.rate, asked.clip, self.divisor, counts)

    def done_calls(self, state: AdamState, number: int, *, is_launched: bool = True) -> list[Call]:
        """The calls that end step t, to be made with the launch.

        Args:
            state: of the optimizer.
            number: t, if no step before it was left out.
            is_launched: whether the launch is made with them, or is left to the user.
        """
        aim = self.aim
        report = [] if aim is None else aim.guard.done_calls(self.plan.cohorts, aim, is_launched=is_launched)
        return [*report, *self.written_calls, *self.launches.counts, partial(state.counter._storage.fill, number)]


class Counting:
    """A context of steps that are counted before they are done: the counters are set back unless `done` was called.

    Args:
        states: whose counters.

    Attributes:
        done: the call.
    """

    def __init__(self, states: Iterable[AdamState]) -> None:
        self._back = [partial(state.counter._storage.fill, state.steps_done) for state in states]
        self._is_done: list[bool] = []
        self.done: Call = partial(self._is_done.append, True)

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._is_done:
            make_all(self._back)


class Recording:
    """A function under capture.

    Args:
        capture: of the device.
        device: where the function's steps must have their variables.

    Attributes:
        steps: those that the function has made so far.
        kept: what else the graph reads and writes.
        undoing: a context that undoes, after an error, what the steps had to create.
    """

    def __init__(self, capture: Capture, device: Device) -> None:
        self._capture, self._device = capture, device
        self.steps: list[tuple[Stepper, CapturedStep]] = []
        self.kept: list[Launches] = []
        self.undoing = ExitStack()
        self._noted: list[AdamState] = []

    def check(self, plan: Plan, stepper: Stepper | None) -> None:
        """Raise ArgumentValueError for a step that cannot be captured.

        Args:
            plan: of the step.
            stepper: the optimizer; None for a call that adds to sums.
        """
        places = [device.name for device in plan.devices]
        if places != [self._device.name] or not self._device.is_capturing():
            rule = f"must be enqueued on the stream of {self._device.name} that is current when the function is called"
            raise ArgumentValueError(
                "a captured step", rule, f"one on {', '.join(places)}", "capture steps of other streams apart"
            )
        if stepper is None:
            return
        before = self._made_by(stepper)
        # Whether a guarded step is left out shows when the graph runs: too late for what is computed for the second.
        is_guarded = any(each.rule.guarded for each in (plan, *(step.plan for step in before)))
        overwrites = stepper.flavour.ema_overwrite_frequency is not None
        if before and (is_guarded or overwrites):
            rule = f"must make one step of an optimizer with {'ema_overwrite_frequency' if overwrites else GUARDING}"
            raise ArgumentValueError("the captured function", rule, "a second one", "capture each step apart")

    def check_deferred(self, state: AdamState, variables: Iterable[Variable]) -> None:
        """Raise ArgumentValueError for a first deferred step: who read its variable before is not known."""
        for variable in variables:
            if variable not in state.deferred:
                raise ArgumentValueError(
                    f"a captured step that defers rows of variable {variable.name!r}",
                    "must have been done before",
                    "a first one",
                    "do one such step, then capture",
                )

    def _made_by(self, stepper: Stepper) -> list[CapturedStep]:
        return [step for other, step in self.steps if other.state is stepper.state]

    def note(self, state: AdamState, forget: Callable[[], None]) -> None:
        """Let an error undo what is created in this state from now on; `forget` is what is told then."""
        if not any(state is noted for noted in self._noted):
            self._noted.append(state)
            self.undoing.push(lambda kind, error, trace: None if kind is None else forget())
            self.undoing.enter_context(Transaction(state)).guard()

    def add(self, stepper: Stepper, step: CapturedStep) -> int:
        """Note a step; the number that it has in the first replay."""
        self.steps.append((stepper, step))
        return stepper.state.steps_done + len(self._made_by(stepper))

    def outside(self) -> AbstractContextManager[Any]:
        """A context in which one works as if there were no capture."""
        return self._capture.outside()

    @property
    def write_outside(self) -> Writer:
        """Gives an array of the graph contents that stay. It does not keep this object: the launches keep it."""
        return partial(_write_outside, self._capture)


def _write_outside(capture: Capture, array: StagedArray, values: np.ndarray) -> None:
    with capture.outside():
        array.write(values)


class Sums(Protocol):
    """Sums of the gradients of several calls."""

    @property
    def calls(self) -> int:
        """Over how many calls the sums go that no step has used yet."""


own_sums: ContextVar[dict[AdamState, Any] | None] = ContextVar("own_sums", default=None)
"""The sums of the captured function that is called, by optimizer: it begins them, and uses them."""


def _call(function: Callable[[], object], sums: dict[AdamState, Sums]) -> None:
    """Call a function that has sums of its own.

    Raises:
        ArgumentValueError: it leaves some of them unused.
        And whatever the function raises.
    """
    token = own_sums.set(sums)
    try:
        function()
        for state, each in sums.items():
            if each.calls:
                rule = f"must use the gradients that it accumulates for optimizer {state.name!r}"
                got = f"sums over {each.calls} calls that no step uses"
                raise ArgumentValueError("the captured function", rule, got, "call apply_gradients() at its end")
    except BaseException:
        sums.clear()
        raise
    finally:
        own_sums.reset(token)


current_recording: ContextVar[Recording | None] = ContextVar("current_recording", default=None)
"""What the steps of this thread are captured for; None outside of `Adam.capture`."""


class Replayable(Protocol):
    """What `Adam.capture` gives."""

    def replay(self) -> int | None:
        """Do what the function does; the optimizer's steps done, None where the host does not know."""


class CapturedFunction:
    """A function as a graph of a device. It keeps alive what the graph uses: also optimizers that are gone otherwise.

    Args:
        capture: has the graph.
        recording: the steps in it.
        device: where it runs.
        stepper: whose count a replay returns.
        sums: those of the function.
    """

    def __init__(
        self, capture: Capture, recording: Recording, device: Device, stepper: Stepper, sums: Mapping[AdamState, Sums]
    ) -> None:
        self._capture, self._steps, self._device, self._stepper = capture, recording.steps, device, stepper
        self._guards = {stepper.state: stepper.guards for stepper, _ in recording.steps}
        self._kept = recording.kept, sums

    def replay(self) -> int | None:
        """Do all of the function's steps on the current stream, as calls of the function would.

        Learning rates and other hyperparameters are those of now: numbers, schedules and callables, each evaluated
        once per step, before the graph is launched. Every optimizer that made a step in the function counts. The host
        waits for nothing, but where 64 steps or more may have been left out of which it has not heard.

        Returns:
            The steps done by the optimizer that captured, these included; None where the device may have left out one
            of them, as by `apply_gradients`.

        Raises:
            ArgumentTypeError, ArgumentValueError: as `apply_gradients` for hyperparameters; `amsgrad`, groups, the
                memory of variables or, where gradients are clipped by norm, a bound changed since the capture; weights
                decay or values are clipped now, and were not; a replay inside of a capture. Nothing has changed then.
            ConcurrentStepError: another call of one of the optimizers is at work.
        """
        refuse_in_loss("replay")
        refuse_in_capture(self._device, "replay")
        for state in self._guards:
            state.raise_error_of_save()
        with ExitStack() as inside:
            for state in self._guards:
                inside.enter_context(state.alone())
            for stepper, step in self._steps:
                stepper.guards.begin(step.guard, step.plan.cohorts)
            # What a guard has learned of the steps before this one stays, whatever happens.
            with Counting(stepper.state for stepper, step in self._steps if step.guard is None) as counting:
                scalars, numbers = self._next_steps()
                make_ready(step.launches for _, step in self._steps)
                for (_, step), own in zip(self._steps, scalars, strict=True):
                    step.launches.stage(own)
                ending, overwriting = list[Call](), list[CapturedStep]()
                for (stepper, step), number in zip(self._steps, numbers, strict=True):
                    ending += step.done_calls(stepper.state, number)
                    if step.guard is None and stepper.flavour.overwrites_at(number):
                        ending += stepper.state.overwriting_calls(step.plan.variables)
                        overwriting.append(step)
                make_all([self._capture.launch_call(), *ending, counting.done])
            for stepper, _ in self._steps:
                stepper.staged.forget()
            for step in overwriting:
                step.plan.constrain()
            return None if self._stepper.guards.is_unsure else self._stepper.state.steps_done

    def _next_steps(self) -> tuple[list[LaunchScalars], list[int]]:
        """The scalars of each step, and its number t; guarded ones are not counted yet."""
        scalars, numbers = list[LaunchScalars](), list[int]()
        with ExitStack() as evaluating:
            for guards in self._guards.values():
                evaluating.enter_context(guards.evaluating())
            for stepper, step in self._steps:
                asked = stepper.next_step()
                if step.guard is None:
                    asked.be_counted()
                scalars.append(step.scalars(asked))
                numbers.append(stepper.state.steps_done + (step.guard is not None))
        return scalars, numbers


class CalledFunction:
    """A function where nothing can be captured: a replay calls it.

    Args:
        function: the function.
        stepper: whose count a replay returns.
    """

    def __init__(self, function: Callable[[], object], stepper: Stepper) -> None:
        self._function, self._stepper, self._sums = function, stepper, dict[AdamState, Sums]()

    def replay(self) -> int | None:
        """Call the function.

        Returns:
            The steps done by the optimizer that captured, these included; None as by `apply_gradients`.

        Raises:
            ArgumentValueError: the function made no step, or did not use gradients that it accumulated.
            And whatever the function raises.
        """
        state, guards = self._stepper.state, self._stepper.guards
        before = state.steps_done, guards.made
        _call(self._function, self._sums)
        if (state.steps_done, guards.made) == before:
            raise _without_step(state)
        return None if guards.is_unsure else state.steps_done


def captured(function: Any, stepper: Stepper) -> Replayable:
    """Capture a function; see `Adam.capture`."""
    if not callable(function):
        got = type(function).__name__
        raise ArgumentTypeError("function", "must be a callable without arguments", got, "pass a function")
    devices = {variable.device for variable in stepper.state.variables} or {get_device()}
    captures = [(device, capture) for device in devices for capture in (device.capture(),) if capture is not None]
    if not captures:
        return CalledFunction(function, stepper)
    if len(captures) > 1:
        places = sorted(device.name for device, _ in captures)
        rule = "must have its variables on one device to capture steps"
        raise ArgumentValueError(f"optimizer {stepper.state.name!r}", rule, places, "take one optimizer for each")
    ((device, capture),) = captures
    refuse_in_capture(device, "capture")
    recording, sums = Recording(capture, device), dict[AdamState, Sums]()
    with recording.undoing:
        token = current_recording.set(recording)
        try:
            capture.run(partial(_call, function, sums))
        finally:
            current_recording.reset(token)
        if not any(other.state is stepper.state for other, _ in recording.steps):
            raise _without_step(stepper.state)
    return CapturedFunction(capture, recording, device, stepper, sums)


def refuse_in_capture(device: Device, method: str) -> None:
    """Raise ArgumentValueError for a call while work on a device is captured."""
    if current_recording.get() is not None or device.is_capturing():
        raise refused_in_capture(method)


def _without_step(state: AdamState) -> ArgumentValueError:
    rule = f"must make a step of optimizer {state.name!r}"
    return ArgumentValueError("the captured function", rule, "none", "call apply_gradients or minimize in it")
