"""When the gradients that clients push become steps.

on_push     each push is a step
all_of=N    N clients push, and the mean of their gradients, added in the order of the clients' names, is a step
every=T     what was pushed is added up, and every T seconds the mean of it, where there is any, is a step
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, ServiceError
from gpu_adam.rules import shown

LOSSES = ("fail", "continue")
"""What becomes of a step of several clients when one of them is lost."""

Answer = Callable[[dict[str, Any]], None]


class Push(NamedTuple):
    """Gradients of one client.

    Attributes:
        client: its name.
        pairs: (gradient, variable) pairs.
        scale: what the gradients are to be divided by, or None.
        read: after how many steps the client read the variables, as far as that is known.
        loss: what it says that its loss was, or None.
        ready: makes the device wait until the client has written the gradients.
        answer: gives the client the answer to its push, a refusal perhaps.
    """

    client: str
    pairs: Sequence[Any]
    scale: float | None
    read: int | None
    loss: float | None
    ready: Callable[[], None]
    answer: Answer


class Steps(Protocol):
    """What a policy asks of an optimizer."""

    def step(self, pushes: Sequence[Push]) -> None:
        """Make one step of the mean of these gradients, and answer."""

    def add(self, push: Push) -> None:
        """Add the gradients to sums, and answer with the number of the step that they are going to be part of."""

    def step_of_sums(self) -> None:
        """Make the step of the sums, if there are any."""

    def refuse(self, push: Push, error: ServiceError) -> None:
        """Answer that the push is part of no step."""


class Policy(ABC):
    """When pushes become steps.

    Attributes:
        text: as a configuration has it.
        deadline: the time, of `time.monotonic`, at which `tick` is to be called; None for never.
        waiting: pushes whose step has not come yet.
    """

    text: str
    deadline: float | None = None

    def __init__(self) -> None:
        self.waiting: dict[str, Push] = {}

    @abstractmethod
    def take(self, push: Push, steps: Steps) -> None:
        """Take a push."""

    def needs(self, client: str) -> bool:
        """Whether it matters that a client is gone."""
        return False

    def lose(self, client: str, steps: Steps) -> None:  # noqa: B027  # most wait for nobody
        """Take note that a client is gone."""

    def tick(self, steps: Steps) -> None:  # noqa: B027  # most know no time
        """Do what is due at the deadline."""

    def finish(self, steps: Steps) -> None:  # noqa: B027  # most owe no step
        """Make the steps of what clients have been told is going to be part of one."""


class OnPush(Policy):
    """Each push is a step."""

    text = "on_push"

    def take(self, push: Push, steps: Steps) -> None:
        """Make the step."""
        steps.step([push])


class AllOf(Policy):
    """A step is the mean of what `number` clients push, each once.

    The first `number` clients that push take part in all steps. One that is lost makes room for another.

    Args:
        number: of clients.
        lost: "fail": where a client is lost, the pushes that wait are refused, and the next step needs `number` clients
            again. "continue": the step goes on without it, and so do those that follow until another client joins; once
            all are gone, the next step needs `number` clients again.
    """

    def __init__(self, number: int, lost: str) -> None:
        super().__init__()
        self.text = f"all_of={number}"
        self._number, self._goes_on = number, lost == "continue"
        self._members: set[str] = set()
        self._is_complete = False  # whether `number` clients have been there

    def take(self, push: Push, steps: Steps) -> None:
        """Keep the push until the others are there."""
        members = self._members
        if push.client not in members:
            if len(members) == self._number:
                rule = f"must be one of the {self._number} clients that push: {', '.join(sorted(members))}"
                remedy = "let one of them end, or raise all_of"
                steps.refuse(push, ServiceError(f"client {push.client!r}", rule, "another one", remedy))
                return
            members.add(push.client)
        self._is_complete |= len(members) == self._number
        self.waiting[push.client] = push
        self._step_if_all_are_there(steps)

    def needs(self, client: str) -> bool:
        """Whether it is one of those that push."""
        return client in self._members

    def lose(self, client: str, steps: Steps) -> None:
        """Go on without it, or refuse the others, where it was one of those that push."""
        if client not in self._members:
            return
        self._members.discard(client)
        self.waiting.pop(client, None)
        self._is_complete &= self._goes_on and bool(self._members)
        if self._goes_on:
            self._step_if_all_are_there(steps)
            return
        waiting, self.waiting = self.waiting, {}
        for push in waiting.values():
            rule, remedy = "must stay until the step is made", "push again"
            steps.refuse(push, ServiceError(f"client {client!r}", rule, "it is gone, and the step with it", remedy))

    def _step_if_all_are_there(self, steps: Steps) -> None:
        if self._is_complete and self.waiting and len(self.waiting) == len(self._members):
            waiting, self.waiting = self.waiting, {}
            steps.step([waiting[client] for client in sorted(waiting)])


class Every(Policy):
    """A step is the mean of what was pushed within a time.

    Args:
        seconds: > 0; how long that is.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.text = f"every={seconds:g}"
        self._seconds = seconds
        self.deadline = time.monotonic() + seconds

    def take(self, push: Push, steps: Steps) -> None:
        """Add it up."""
        steps.add(push)

    def tick(self, steps: Steps) -> None:
        """Make the step, and begin anew."""
        steps.step_of_sums()
        self.deadline = time.monotonic() + self._seconds

    def finish(self, steps: Steps) -> None:
        """Make the step of what is there."""
        steps.step_of_sums()


def policy_named(argument: str, text: Any, lost: str) -> Policy:
    """The policy of a configuration's text.

    Raises:
        ArgumentTypeError, ArgumentValueError: there is none.
    """
    rule, remedy = 'must be "on_push", "all_of=N" or "every=SECONDS"', "correct it"
    if not isinstance(text, str):
        raise ArgumentTypeError(argument, rule, shown(text), remedy)
    if text == "on_push":
        return OnPush()
    if (match := re.fullmatch(r"all_of=([1-9]\d{0,8})", text)) is not None:
        return AllOf(int(match[1]), lost)
    if (match := re.fullmatch(r"every=(\d+\.?\d*|\.\d+)", text)) is not None and float(match[1]) > 0:
        return Every(float(match[1]))
    raise ArgumentValueError(argument, rule, shown(text), remedy)
