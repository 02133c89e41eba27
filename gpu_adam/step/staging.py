"""Steps in graphs that the user captured, not `Adam.capture`: each launch takes the scalars that were staged last.

Such a graph repeats the step of its capture until something is staged. When it is launched nobody is told, so that a
step is counted when its scalars are staged; what became of one that the device may leave out, the next call asks for.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpu_adam.errors import ArgumentValueError
from gpu_adam.state.adam_state import AdamState
from gpu_adam.step.candidates import ROOM
from gpu_adam.step.guard import GUARDING, Guard
from gpu_adam.step.plan import Plan
from gpu_adam.step.replays import CapturedStep, Counting, Stepper, refuse_in_capture
from gpu_adam.uninterrupted import make_all


class StagedSteps:
    """The steps of one optimizer in graphs of the user's.

    Args:
        state: what the steps change.
    """

    def __init__(self, state: AdamState) -> None:
        self._state = state
        self._captured: dict[Plan, CapturedStep] = {}
        # Captures have counted the steps behind the first of these numbers up to the second one; none of them has run.
        self._promised: tuple[int, int] | None = None

    def note(self, step: CapturedStep, done: int) -> None:
        """Note a step that has been captured, and counted as step done + 1."""
        self._captured[step.plan] = step
        follows = self._promised is not None and self._promised[1] == done
        self._promised = (self._promised[0] if follows and self._promised else done, done + 1)

    def forget(self) -> None:
        """Take it that the steps that captures have counted are done: another step is, behind them."""
        self._promised = None

    def stage(self, stepper: Stepper) -> int | None:
        """Write the scalars of the next step to where the graphs read them, and count it.

        Args:
            stepper: the optimizer, of which no other call is at work.

        Returns:
            The steps done; None where the host does not know.
        """
        state, guards = self._state, stepper.guards
        # Where some graphs fit no more, the user has captured others.
        rule, _, clip = stepper.configuration()
        steps = self._steps()
        fitting = [step for step in steps if step.misfit(rule, clip, state.layout) is None] or steps[-1:]
        guard, guarded = _decided(fitting)
        promised = self._promised[0] if self._promised and self._promised[1] == state.steps_done else None
        # What a guard learns of earlier steps stays, whatever happens; before a promised step it has nothing to learn.
        with Counting([state] if guard is None or promised is not None else []) as counting:
            if promised is not None:
                state.counter._storage.fill(promised)
            guards.begin(guard, [] if guarded is None else guarded.plan.cohorts)
            with guards.evaluating():
                asked = stepper.next_step()
            counts = range(state.steps_done, state.steps_done + 1)
            if guard is None:
                asked.be_counted()
            else:
                counts = guard.counts(state.counter, ROOM)
            scalars = [step.scalars(asked, counts) for step in fitting]
            if any(stepper.flavour.overwrites_at(count + 1) for count in counts):
                raise overwriting_in_graph()
            for step, own in zip(fitting, scalars, strict=True):
                step.launches.stage(own)
            ending = [call for step in fitting if step is not guarded for call in step.written_calls]
            if guarded is not None:
                ending += guarded.done_calls(state, counts[-1] + 1, is_launched=False)
            make_all([*ending, counting.done])
        self._promised = None
        return None if guards.is_unsure else state.steps_done

    def _steps(self) -> Sequence[CapturedStep]:
        """What has been captured.

        Raises:
            ArgumentValueError: nothing; a capture is going on.
        """
        steps = list(self._captured.values())
        if not steps:
            rule = "must follow the capture of a step in a graph, as by torch.cuda.graph or stream.begin_capture"
            raise ArgumentValueError("stage", rule, "none", "capture a step, or call the replay() of a capture")
        for device in {device for step in steps for device in step.plan.devices}:
            refuse_in_capture(device, "stage")
        return steps


def _decided(steps: Sequence[CapturedStep]) -> tuple[Guard | None, CapturedStep | None]:
    """What decides about captured steps, and one about which it does; nothing where no device does.

    Raises:
        ArgumentValueError: several devices decide, each of which has a count of its own.
    """
    guarded = {step.guard: step for step in steps if step.guard is not None}
    if len(guarded) > 1:
        places = sorted(guard.device.name for guard in guarded)
        rule, remedy = f"must find steps with {GUARDING} on one device", "take one optimizer for each"
        raise ArgumentValueError("stage", rule, places, remedy)
    return next(iter(guarded.items()), (None, None))


def overwriting_in_graph() -> ArgumentValueError:
    """What is wrong with a step at whose end averages take the variables' places."""
    rule = "must not overwrite variables by their averages, as every replay would do again"
    remedy = "use Adam.capture, or leave ema_overwrite_frequency out and call overwrite_by_averages()"
    return ArgumentValueError("a step captured in a graph", rule, "such a step", remedy)
