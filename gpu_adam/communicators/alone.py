"""One rank: copies."""

from __future__ import annotations

import os
from functools import partial

from gpu_adam.communicators.base import Communicator, Finish
from gpu_adam.devices import Array, Device, find_device

_DONE = partial(int)


class Alone(Communicator):
    """A communicator of one rank, for programs that also run without others.

    Args:
        device: a device or its name; None for the default one.
    """

    def __init__(self, device: str | Device | None = None) -> None:
        super().__init__(0, 1, find_device(device))

    def barrier(self) -> None:
        """Wait for the device."""
        self.device.synchronize()

    def abort(self) -> None:
        """End the process at once."""
        os._exit(1)

    def _copied(self, send: Array, recv: Array) -> Finish:
        self.device.copy_call([recv], [send])()
        return _DONE

    def _reduce_scatter(self, send: Array, recv: Array) -> Finish:
        return self._copied(send, recv)

    def _all_reduce(self, send: Array, recv: Array) -> Finish:
        return self._copied(send, recv)

    def _all_gather(self, send: Array, recv: Array) -> Finish:
        return self._copied(send, recv)

    def _all_to_all(self, send: Array, recv: Array, send_counts: list[int], recv_counts: list[int]) -> Finish:
        return self._copied(send, recv)

    def _broadcast(self, array: Array, root: int) -> Finish:
        return _DONE
