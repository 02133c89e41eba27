"""Ctrl-C while a loss is being differentiated: no tracer stays set, no variable changes, and the next call works.

A tracer that stayed set would have every later step refused, and every variable record itself on a dead tape.
"""

import contextlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import gpu_adam
from gpu_adam import Variable
from gpu_adam.autodiff import gradients, value_and_grad
from gpu_adam.autodiff_seam import current_tracer
from gpu_adam.errors import ArgumentTypeError

PLACES = (str(Path(gpu_adam.__file__).parent), contextlib.__file__)


class Interrupts:
    """Counts the events of a kind in the package's frames and in contextlib's, and interrupts one of them.

    Args:
        at: number of the event to interrupt, from 0; -1 for none.
        interrupt: what to do there.
        event: "line" or "opcode".
    """

    def __init__(self, at: int, interrupt: Callable[[], None], event: str) -> None:
        self.count, self.done = 0, False
        self._at, self._interrupt, self._event = at, interrupt, event

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        """The trace function."""
        if not frame.f_code.co_filename.startswith(PLACES):
            return None
        frame.f_trace_opcodes = self._event == "opcode"
        if event == self._event:
            self.count += 1
            if self.count == self._at + 1:
                self.done = True
                self._interrupt()
        return self

    def during(self, function: Callable[[], Any]) -> None:
        """Call the function; its KeyboardInterrupt ends here."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            function()
        except KeyboardInterrupt:
            assert self.done
        finally:
            sys.settrace(before)


def raised() -> None:
    raise KeyboardInterrupt


def signalled() -> None:
    signal.raise_signal(signal.SIGINT)


def differentiations(w: Variable, optimizer: gpu_adam.Adam) -> dict[str, Callable[[], Any]]:
    """What to interrupt, by name."""

    def loss() -> Any:
        return np.sum(2 * w * w) + np.sum(w[np.array([1, 1])])

    def failing() -> None:
        with pytest.raises(ArgumentTypeError):
            value_and_grad(lambda: [w * w, None], w)

    return {
        "value_and_grad": lambda: value_and_grad(loss, {"w": [w]}),
        "get_gradients": lambda: optimizer.get_gradients(loss, [w]),
        "callable variables": lambda: gradients(loss, lambda: [w], 2.0),
        "an error": failing,
    }


def dense(result: Any) -> Any:
    """A result with every array as a list, so that two can be compared."""
    if isinstance(result, dict):
        return {key: dense(value) for key, value in result.items()}
    if isinstance(result, (list, tuple)):
        return [dense(value) for value in result]
    return result.tolist() if hasattr(result, "tolist") else None


@pytest.mark.parametrize("name", ["value_and_grad", "get_gradients", "callable variables", "an error"])
@pytest.mark.parametrize(
    ("interrupt", "event"),
    [(raised, "line"), (signalled, "line"), pytest.param(raised, "opcode", marks=pytest.mark.thorough)],
    ids=["raised", "signal", "opcode"],
)
def test_no_tracer_stays_set(name: str, interrupt: Callable[[], None], event: str) -> None:
    """Whichever line, or instruction of Python's, an interrupt comes before."""
    start = np.arange(6, dtype=np.float32).reshape(3, 2)
    w, optimizer = Variable(start, name="w"), gpu_adam.Adam(0.1)
    function = differentiations(w, optimizer)[name]
    expected = dense(function())
    counting = Interrupts(-1, interrupt, event)
    counting.during(function)
    assert counting.count > 50
    for at in range(counting.count):
        interrupting = Interrupts(at, interrupt, event)
        interrupting.during(function)
        assert interrupting.done
        assert current_tracer.get() is None, f"before {event} {at} of {counting.count}"
        assert dense(function()) == expected
    assert w.numpy().tolist() == start.tolist()
    assert optimizer.minimize(lambda: np.sum(w * w), [w]) == 1
