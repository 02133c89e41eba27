"""Graphs: what a captured step is refused, and what a graph keeps alive.

A graph runs at every replay what was enqueued while it was captured. Its launches therefore have tables, buffers and
copies of gradients of their own, which later steps leave alone, in memory that nobody else is given. The optimizer
keeps that memory, and so does the graph where it is CuPy's: replays are safe as long as one of the two lives.

The addresses of dense gradients are such a table. Where the step before had the same gradients, the graph takes over
the table that the device has of that step, and has no copy among its nodes. Where they are new, the graph copies the
table at every replay: a copy outside of the graph would have to be waited for, which a capture may forbid.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any

from gpu_adam.conversion import IN_HOST_MEMORY
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError


class Graph:
    """One captured step.

    Attributes:
        kept: the launches, with all memory that they read and write at replays.
        pools: where their memory comes from.
    """

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.pools: list[Any] = []


def check_capturable(pairs: Sequence[Any], *, is_first: bool) -> None:
    """Refuse what a graph would do anew at every replay.

    Raises:
        ArgumentValueError: the first step of its kind, whose slots of zeros every replay would create again.
        ArgumentTypeError: a gradient in host memory, which is gone at the replays.
    """
    if is_first:
        raise ArgumentValueError(
            "a step captured in a graph",
            "must have been done before, with these variables, kinds of gradients and clipping",
            "a first one",
            "do one such step, then capture the next",
        )
    for number, (gradient, _) in enumerate(pairs):
        parts = (gradient.values, gradient.indices) if hasattr(gradient, "indices") else (gradient,)
        for part in parts:
            if isinstance(part, IN_HOST_MEMORY):
                raise ArgumentTypeError(
                    f"the gradient of grads_and_vars[{number}]",
                    "must be an array while a graph is captured",
                    type(part).__name__,
                    "copy it to the device before",
                )


def refused_in_capture(what: str) -> ArgumentValueError:
    """What is wrong with a call while work on a device is captured."""
    rule = "must not be called while a graph is captured"
    return ArgumentValueError(what, rule, "a call inside of a capture", "end the capture first")


class Graphs:
    """The captured graphs of an optimizer, whose memory lives at least as long as the optimizer."""

    def __init__(self) -> None:
        self._graphs: list[Graph] = []

    def step(self, devices: Collection[Device]) -> AbstractContextManager[Graph | None]:
        """The context of a step on these devices: a graph where one of them is being captured, else None."""
        for device in devices:
            if device.is_capturing():
                return _CapturedStep(self._graphs, [each for each in devices if each.is_capturing()])
        return _NOT_CAPTURED


class _CapturedStep:
    def __init__(self, graphs: list[Graph], devices: Sequence[Device]) -> None:
        self._graphs, self._devices, self._stack = graphs, devices, ExitStack()
        self._graph = Graph()

    def __enter__(self) -> Graph:
        for device in self._devices:
            pool, memory = device.private_pool()
            self._graph.pools.append(pool)
            device.keep_with_graph(self._graph)
            self._stack.enter_context(memory)
        return self._graph

    def __exit__(self, *error: Any) -> None:
        if self._graph.kept:  # of a failed step too, some of whose launches may be in a graph nevertheless
            self._graphs.append(self._graph)
        self._stack.__exit__(*error)


class _NotCaptured:
    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


_NOT_CAPTURED = _NotCaptured()
