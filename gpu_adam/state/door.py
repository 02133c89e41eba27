"""One call of an optimizer at a time."""

from __future__ import annotations

import sys
import threading
import time
from types import CodeType
from typing import Any

from gpu_adam.errors import ConcurrentStepError

_Call = tuple[int, int, CodeType, list[Any], bool]
"""A function that was let in: its thread, the id of its frame, its code, the calls that ask to take its place, and
whether it leaves at once.

An ordinary lock that an interrupt left locked would stay locked for ever. Here a function that an interrupt has ended
can be told from one at work, because the ended one is on no thread's stack. The frame itself is not kept: a kept frame
would keep the caller's arrays alive, where the id of the frame keeps nothing.
"""

_WALKS = 20
"""How often a stack is walked over before the function is taken for ended: see `_is_running`."""


class Door:
    """Lets one call of an optimizer in.

    Args:
        name: the optimizer's.

    A call that finds another one inside is refused rather than kept waiting: that it came is a mistake, and the caller
    is to hear of it. The dict has one key, for `dict.setdefault` is atomic.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._inside: dict[str, _Call] = {}

    def __call__(self, *, is_brief: bool = False) -> Door:
        """A context that the calling function is let in to; leaving the context lets it out.

        Args:
            is_brief: whether the function leaves at once, so that other threads wait for it.

        Raises:
            ConcurrentStepError: another call is inside.
        """
        frame = sys._getframe(1)
        call: _Call = (threading.get_ident(), id(frame), frame.f_code, [], is_brief)
        if self._inside.setdefault("call", call) is not call:
            self._take_over(call)
        return self

    def _take_over(self, call: _Call) -> None:
        """Let `call` in where an interrupt has ended the call inside before that one could leave; else raise."""
        while True:
            inside = self._inside.setdefault("call", call)
            if inside is call:
                return
            if inside[:2] != call[:2] and _is_running(inside):
                if inside[4] and inside[0] != call[0]:  # another thread's, which leaves at once
                    continue
                break
            if self._inside.get("call") is inside:
                claims = inside[3]
                claims.append(call)
                while claims[0] is not call and not _is_running(claims[0]):
                    claims.pop(0)  # interrupted, too
                if claims[0] is not call:  # another thread has come to the same conclusion
                    break
                self._inside["call"] = call
                return
        raise ConcurrentStepError(
            f"optimizer {self._name!r}",
            "must be used by one call at a time",
            "a call while another one is at work",
            "give each thread an optimizer of its own, or put a lock around the calls",
        )

    def __enter__(self) -> None:
        """Nothing: the call is inside already."""

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._inside.pop("call", None)


def _is_running(call: _Call) -> bool:
    """Whether the function is on its thread's stack.

    Another thread goes on while its stack is walked over, and a generator of it that yields in the meantime has no
    caller: then the walk ends too early. A function that has ended is found by no walk, a running one by most.
    """
    for _ in range(_WALKS):
        if _is_found(*call[:3]):
            return True
        time.sleep(0)
    return False


def _is_found(thread: int, frame_id: int, code: CodeType) -> bool:
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if id(frame) == frame_id and frame.f_code is code:
            return True
        frame = frame.f_back
    return False
