"""A client, as the server knows it, and what is its own: regions, bindings, an event."""

from __future__ import annotations

import itertools
import os
import socket
import struct
from typing import Any, NamedTuple

from gpu_adam.devices import Array, Device
from gpu_adam.devices.base import SharedEvent, SharedMemory
from gpu_adam.errors import ArgumentValueError, GpuAdamError, ServiceError
from gpu_adam.service.served import ServedOptimizer
from gpu_adam.variables import Variable

MOST_REGIONS = MOST_BINDINGS = 1024
"""Of one client."""

_UCRED = struct.Struct("3i")  # process, user, group


class Binding(NamedTuple):
    """Gradients in a client's region, which have been checked.

    Attributes:
        optimizer: whose.
        pairs: (gradient, variable) pairs.
        region: where they are.
    """

    optimizer: ServedOptimizer
    pairs: list[tuple[Any, Variable]]
    region: int


class Connection:
    """A client.

    Args:
        end: its socket.
        device: of the service.

    Attributes:
        socket: as above.
        user: the number of its user, from the kernel.
        name: "" until it has said hello.
        refusal: what its hello is going to be refused by, or None.
        ready: the event that stands for what it has enqueued; from its hello on.
        bindings: by number.
        attached: the names of the optimizers that it uses.
        is_waiting: whether it waits for the answer to a push; until then only its end is of interest.
        is_muted: whether the server's loop has been told so.
    """

    ready: SharedEvent

    def __init__(self, end: socket.socket, device: Device) -> None:
        self.socket, self.name, self._device = end, "", device
        self.refusal: GpuAdamError | None = None
        _, self.user, _ = _UCRED.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        self._regions: dict[int, SharedMemory] = {}
        self.bindings: dict[int, Binding] = {}
        self.attached: set[str] = set()
        self._numbers = itertools.count(1)
        self.is_waiting = self.is_muted = False

    def begin(self, name: str) -> None:
        """Be known by a name."""
        self.ready = self._device.share_event()
        self.name = name

    @property
    def used(self) -> int:
        """Bytes of its regions."""
        return sum(int(region.handle["bytes"]) for region in self._regions.values())

    def new_region(self, nbytes: int, most: int) -> tuple[int, SharedMemory]:
        """A new region, with its number.

        Raises:
            ServiceError: the client has more than `most` bytes then, or too many regions.
        """
        if self.used + nbytes > most or len(self._regions) == MOST_REGIONS:
            rule = f"must take at most {most} bytes together, and be at most {MOST_REGIONS}"
            got = f"{self.used + nbytes} bytes, {len(self._regions) + 1} regions"
            raise ServiceError("the regions of a client", rule, got, "free others, or raise client_memory")
        region = self._device.share_memory(nbytes, read_only=False)
        number = next(self._numbers)
        self._regions[number] = region
        return number, region

    def memory(self, number: int) -> Array:
        """The memory of a region.

        Raises:
            ArgumentValueError: it is none of this client's own.
        """
        if number not in self._regions:
            remedy = "ask for a region first"
            raise ArgumentValueError("the region", "must be one of this client's own", number, remedy)
        return self._regions[number].array

    def free(self, number: int) -> None:
        """Give a region back, with the bindings in it."""
        self.memory(number)
        for key in [key for key, binding in self.bindings.items() if binding.region == number]:
            del self.bindings[key]
        self._regions.pop(number).close()

    def new_binding(self) -> int:
        """The number of a new binding.

        Raises:
            ServiceError: the client has too many.
        """
        if len(self.bindings) == MOST_BINDINGS:
            rule, remedy = f"must be at most {MOST_BINDINGS}", "unbind others"
            raise ServiceError("the bindings of a client", rule, MOST_BINDINGS + 1, remedy)
        return next(self._numbers)

    def binding(self, number: int) -> Binding:
        """A binding.

        Raises:
            ArgumentValueError: it is none of this client's own.
        """
        if number not in self.bindings:
            raise ArgumentValueError("the binding", "must be one of this client's own", number, "bind first")
        return self.bindings[number]

    def close(self) -> None:
        """Give back everything."""
        self.socket.close()
        self.bindings.clear()
        for region in self._regions.values():
            region.close()
        self._regions.clear()
        if self.name:
            self.ready.close()


def close_descriptor(region: SharedMemory) -> None:
    """Close a region's descriptor once it was sent: the mapping stays, and so a client costs one descriptor."""
    if region.descriptor >= 0:
        os.close(region.descriptor)
        region.descriptor = -1
