"""What ranks exchange in a step: gradients on their way to the rank that owns them, norms, and updated parameters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from gpu_adam.communicators import Communicator, Pending, sum_dtype
from gpu_adam.devices import Array, Device
from gpu_adam.distributed.layout import Bucket
from gpu_adam.kernels import CHUNK
from gpu_adam.uninterrupted import Call
from gpu_adam.variables import Variable


class Shard:
    """A bucket's memory on this rank.

    The variables of the bucket lie in one array, `parameters`, from now on. This rank's part of that array is what the
    optimizer updates, by the part of the gradients' sum that lies in `received`.

    Args:
        bucket: how the variables lie.
        variables: all of the optimizer, by number.
        communicator: of the ranks.

    Attributes:
        bucket: as above.
        pieces: variables over what this rank owns of each variable.
        parameters: all of the bucket's.
    """

    def __init__(self, bucket: Bucket, variables: Sequence[Variable], communicator: Communicator) -> None:
        self.bucket, self._communicator, device = bucket, communicator, communicator.device
        self._device: Device = device
        first = variables[bucket.variables[0]]
        self.parameters = device.zeros((communicator.size * bucket.shard,), first.dtype)
        self._places = {
            number: slice(offset, offset + variables[number].size)
            for number, offset in zip(bucket.variables, bucket.offsets, strict=True)
        }
        for number, place in self._places.items():
            variable = variables[number]
            device.copy_call([self.parameters[place].reshape(variable.shape)], [variable.value])()
            variable._move_to(self.parameters[place].reshape(variable.shape))
        own = bucket.pieces[communicator.rank]
        arrays = [self.parameters[piece.offset : piece.offset + piece.size] for piece in own]
        names = [variables[piece.variable].name for piece in own]
        self.pieces = [Variable.over(array, device, name) for array, name in zip(arrays, names, strict=True)]
        self._own, self._waiting = own, set(bucket.variables)
        self._to_send: Array | None = None
        self._received: Array | None = None
        self._arriving: Pending | None = None
        self._departing: Pending | None = None

    def piece_of(self, number: int) -> Variable | None:
        """What this rank owns of a variable of the bucket."""
        for piece, variable in zip(self._own, self.pieces, strict=True):
            if piece.variable == number and piece.size:
                return variable
        return None

    @property
    def lacks(self) -> set[int]:
        """The numbers of the variables whose gradients have not been handed over for the next step."""
        return self._waiting if self._arriving is None else set()

    def begin(self, dtype: np.dtype) -> None:
        """Have memory for gradients of a dtype, which stays."""
        if self._to_send is None:
            device, ranks = self._device, self._communicator.size
            self._to_send = device.zeros((ranks * self.bucket.shard,), dtype)
            self._received = device.zeros((self.bucket.shard,), sum_dtype(dtype))

    def push(self, number: int, gradient: Array, *, ordered: bool) -> None:
        """Take a variable's gradient; after the last one of the bucket they all begin to travel."""
        self.begin(gradient.dtype)
        place = self._places[number]
        assert self._to_send is not None
        assert self._received is not None
        self._device.copy_call([self._to_send[place]], [gradient.reshape(-1)])()
        self._waiting.discard(number)
        if not self._waiting:
            self._arriving = self._communicator.reduce_scatter(self._to_send, self._received, ordered=ordered)

    def gradients(self) -> list[Array]:
        """Where the sum of the ranks' gradients comes to lie, for each piece."""
        assert self._received is not None
        first = self._communicator.rank * self.bucket.shard
        return [self._received[piece.offset - first : piece.offset - first + piece.size] for piece in self._own]

    def arrive(self) -> None:
        """Wait for the gradients."""
        pending, self._arriving = self._arriving, None
        if pending is not None:
            pending.wait()
            self._waiting = set(self.bucket.variables)

    def depart(self) -> None:
        """Begin to give this rank's parameters to the others."""
        shard, rank = self.bucket.shard, self._communicator.rank
        self._departing = self._communicator.all_gather(
            self.parameters[rank * shard : (rank + 1) * shard], self.parameters
        )

    def finish(self) -> None:
        """Wait for the others' parameters."""
        pending, self._departing = self._departing, None
        if pending is not None:
            pending.wait()


class RankSums:
    """The partial sums of a norm over all ranks: see `gpu_adam.step.exchange.SharedSums`.

    Args:
        communicator: of the ranks.
        width: sums that each rank sends, as many as the one that has most.
        order: where the sums of each variable, chunk after chunk, lie among those of all ranks one after the other.
        begins: see `SharedSums`.
    """

    def __init__(
        self, communicator: Communicator, width: int, order: np.ndarray, begins: Sequence[tuple[int, int]]
    ) -> None:
        device, float64 = communicator.device, np.dtype(np.float64)
        self._communicator, self.begins = communicator, begins
        self._all = device.zeros((communicator.size * width,), float64)
        self._mine = self._all[communicator.rank * width : (communicator.rank + 1) * width]
        self.own, self.whole = self._mine, device.zeros((len(order),), float64)
        self._order = device.array(order)

    def calls(self) -> list[Call]:
        """See `SharedSums`."""
        return [partial(self._collect)]

    def _collect(self) -> None:
        communicator = self._communicator
        communicator.all_gather(self._mine, self._all).wait()
        with communicator.device.activate():
            communicator.device.xp.take(self._all, self._order, out=self.whole)


class Shards:
    """All of an optimizer's buckets: its `gpu_adam.step.exchange.Exchange`.

    Args:
        communicator: of the ranks.
        parts_of: for a dtype, how many real elements the kernels see in one of its elements.
    """

    def __init__(self, communicator: Communicator, parts_of: Any) -> None:
        self._communicator, self._parts_of = communicator, parts_of
        self.shards: list[Shard] = []
        self._part_of: dict[Variable, int] = {}

    def add(self, shard: Shard) -> None:
        """Have one more bucket."""
        self._part_of.update(dict.fromkeys(shard.pieces, len(self.shards)))
        self.shards.append(shard)

    def part_of(self, variable: Variable) -> int:
        """See `Exchange`: the number of its bucket."""
        return self._part_of[variable]

    def arriving(self, parts: Sequence[int]) -> list[Call]:
        """See `Exchange`."""
        return [partial(self.shards[part].arrive) for part in parts]

    def departing(self, part: int) -> list[Call]:
        """See `Exchange`."""
        return [partial(self.shards[part].depart)]

    def finishing(self, parts: Sequence[int]) -> list[Call]:
        """See `Exchange`."""
        return [partial(self.shards[part].finish) for part in parts]

    def adding(self, numbers: Array) -> list[Call]:
        """See `Exchange`."""
        return [partial(self._add, numbers)]

    def _add(self, numbers: Array) -> None:
        self._communicator.all_reduce(numbers, numbers).wait()

    def sums(self, parts: Sequence[int]) -> RankSums:
        """See `Exchange`. Which chunks the other ranks have follows from the layout."""
        ranks, own_rank = self._communicator.size, self._communicator.rank
        counts = [0] * ranks
        places: dict[int, list[tuple[int, np.ndarray]]] = {}  # of each variable: ranks, and where their sums are there
        owned: list[int] = []
        for part in parts:
            shard = self.shards[part]
            times = self._parts_of(shard.parameters.dtype)
            for rank, pieces in enumerate(shard.bucket.pieces):
                for piece in pieces:
                    chunks = -(-piece.size * times // CHUNK)
                    places.setdefault(piece.variable, []).append((rank, counts[rank] + np.arange(chunks)))
                    counts[rank] += chunks
                    if rank == own_rank and piece.size:
                        owned.append(piece.variable)
        width = max(1, *counts)
        order: list[np.ndarray] = []
        ranges: dict[int, tuple[int, int]] = {}
        end = 0
        for variable in (number for part in parts for number in self.shards[part].bucket.variables):
            begin = end
            for rank, place in places.get(variable, ()):
                order.append(rank * width + place)
                end += len(place)
            ranges[variable] = begin, end
        return RankSums(self._communicator, width, np.concatenate(order), [ranges[number] for number in owned])
