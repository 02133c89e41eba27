"""The seam between a step and other processes: what happens between the launches of a step that ranks do together.

An optimizer whose variables are parts of what several ranks have (gpu_adam/distributed) has an `Exchange`. A step asks
it for the calls that wait for the gradients of a part, take a norm over all ranks, and hand updated parts on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from gpu_adam.devices import Array
from gpu_adam.uninterrupted import Call
from gpu_adam.variables import Variable


class SharedSums(Protocol):
    """Partial sums of one norm pass over the gradients of all ranks.

    Attributes:
        own: where this rank's sums go, in the order of its launches, float64.
        whole: the sums of all ranks, each variable's after the other's, in order of chunks.
        begins: where the sums of the variable that each of this rank's tensors is a part of begin in `whole`, and one
            more: two numbers for each tensor.
    """

    own: Array
    whole: Array
    begins: Sequence[tuple[int, int]]

    def bind(self, counts: Sequence[int]) -> bool:
        """Be those of the next step.

        Args:
            counts: how many sums each of this rank's launches has; of one with slices they may change.

        Returns:
            Whether `begins`, or where the arrays lie, is other than it was.
        """

    def calls(self) -> list[Call]:
        """The calls that make `whole` of what is in `own` on each rank."""


class Exchange(Protocol):
    """What ranks do together within a step. Every rank makes the same steps, so asks for the same in the same order."""

    def part_of(self, variable: Variable) -> int:
        """The part that a variable belongs to. Parts are updated one after the other, by launches of their own."""

    def arriving(self, parts: Sequence[int]) -> list[Call]:
        """The calls after which the gradients of these parts are there."""

    def departing(self, part: int) -> list[Call]:
        """The calls that begin to hand an updated part to the other ranks."""

    def finishing(self, parts: Sequence[int]) -> list[Call]:
        """The calls after which all variables of these parts are on all ranks."""

    def sums(self, parts: Sequence[int]) -> SharedSums:
        """Partial sums of a norm over the gradients of these parts.

        Of slices every rank has those of all ranks, joined, and sums up all of them.
        """

    def adding(self, numbers: Array) -> list[Call]:
        """The calls that add a device's uint64 numbers up over all ranks, in place."""
