"""Signals that wait for the end of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from gpu_adam.errors import ArgumentValueError


class HeldSignals:
    """Notes the first of some signals while a block runs, in place of handling it at once.

    From then on they are handled as before the block, so that a second Ctrl-C does not wait. What was ignored before
    stays ignored, and what is not Python's to handle is left alone.

    Args:
        numbers: which signals.

    Attributes:
        received: the number of the one that came, or None.
    """

    def __init__(self, *numbers: signal.Signals) -> None:
        self.received: int | None = None
        self._numbers = numbers
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> HeldSignals:
        if threading.current_thread() is not threading.main_thread():
            rule = "must be held in the main thread, where Python handles them"
            raise ArgumentValueError("signals", rule, threading.current_thread().name, "enter the block there")
        for number in self._numbers:
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def raise_again(self) -> None:
        """Have the signal handled as if it came now."""
        if self.received is not None:
            number, self.received = self.received, None
            signal.raise_signal(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
