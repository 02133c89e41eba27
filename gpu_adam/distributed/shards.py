"""What ranks exchange in a step: gradients on their way to the rank that owns them, norms, and updated parameters."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from gpu_adam.communicators import Communicator, Pending, sum_dtype
from gpu_adam.devices import Array, Device
from gpu_adam.devices.pair_reader import ExpectedPairs
from gpu_adam.distributed.agreement import agree
from gpu_adam.distributed.gathered import joining
from gpu_adam.distributed.layout import Bucket
from gpu_adam.kernels import CHUNK
from gpu_adam.state.adam_state import AdamState
from gpu_adam.uninterrupted import Call
from gpu_adam.variables import IndexedSlices, Variable


class Shard(ABC):
    """A bucket's memory on this rank.

    The variables of the bucket lie in one array, `parameters`, from now on. This rank's part of that array is what the
    optimizer updates.

    Args:
        bucket: how the variables lie.
        variables: all of the optimizer, by number.
        communicator: of the ranks.

    Attributes:
        bucket: as above.
        pieces: variables over what this rank owns of each variable.
        parameters: all of the bucket's.
        lacks: the numbers of the variables whose gradients have not been handed over for the next step.
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
        self._arrays = {number: variables[number]._storage for number in bucket.variables}
        self.own = bucket.pieces[communicator.rank]
        self.pieces = [
            Variable.over(
                self._shaped(self.parameters[piece.offset : piece.offset + piece.size], variables[piece.variable]),
                device,
                variables[piece.variable].name,
            )
            for piece in self.own
        ]
        self.lacks = set(bucket.variables)
        self._name, self._is_agreed = first.name, False
        self._departing: Pending | None = None

    def _shaped(self, array: Array, variable: Variable) -> Array:
        """A piece of a variable as the optimizer sees it."""
        return array

    def has(self, number: int, variable: Variable) -> bool:
        """Whether a variable of the bucket lies where it was put: another optimizer may have moved it since."""
        return variable._storage is self._arrays[number]

    @property
    def gradient_dtype(self) -> np.dtype | None:
        """The dtype of the gradients, where it is to stay; None before there are some."""
        return None

    def follow(self, number: int, variable: Variable, master: Variable) -> None:
        """Let a master of what this rank owns of a variable follow what is assigned to the variable, rounded."""
        piece, of_piece = self.piece_of(number), weakref.ref(master)

        def copy() -> None:
            slot = of_piece()
            if slot is not None and piece is not None:
                slot._storage[...] = piece._storage

        variable._changed = copy

    def piece_of(self, number: int) -> Variable | None:
        """What this rank owns of a variable of the bucket."""
        for piece, variable in zip(self.own, self.pieces, strict=True):
            if piece.variable == number and piece.size:
                return variable
        return None

    @abstractmethod
    def push(self, gradients: Mapping[int, Any]) -> None:
        """Take the gradients of some variables, by number, for the next step."""

    @abstractmethod
    def begin(self, *, ordered: bool, joins: bool) -> None:
        """Let the gradients, which are all there, begin to travel.

        Args:
            ordered: whether they are added in the order of ranks.
            joins: whether a norm is taken of them.
        """

    def _agree(self, dtype: np.dtype) -> None:
        """At the first step, raise DistributedError where other ranks' gradients have another dtype.

        An engine would take their bits for numbers of this one.
        """
        if not self._is_agreed:
            agree(self._communicator, [f"gradients of {dtype.name} for variable {self._name!r}"])
            self._is_agreed = True

    @abstractmethod
    def gradients(self) -> list[Any]:
        """The gradient of each piece, to be read when `arrive` has been called, until `taken` is."""

    @abstractmethod
    def arrive(self) -> None:
        """Wait for the gradients."""

    def taken(self) -> None:
        """Lack all gradients: a step has taken them."""
        self.lacks = set(self.bucket.variables)

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


class ArrayShard(Shard):
    """A bucket of variables whose gradients are arrays. Each rank receives the sum of its part of them."""

    def __init__(self, bucket: Bucket, variables: Sequence[Variable], communicator: Communicator) -> None:
        super().__init__(bucket, variables, communicator)
        self._to_send: Array | None = None
        self._received: Array | None = None
        self._targets: dict[int, Array] = {}
        self._sums: list[Array] = []
        self._arriving: Pending | None = None

    @property
    def gradient_dtype(self) -> np.dtype | None:
        """See `Shard`."""
        return None if self._to_send is None else self._to_send.dtype

    def push(self, gradients: Mapping[int, Array]) -> None:
        """See `Shard`: they are copied beside each other."""
        if self._to_send is None:
            self._make_room(next(iter(gradients.values())).dtype)
        self._device.copy_call([self._targets[number] for number in gradients], list(gradients.values()))()
        self.lacks -= gradients.keys()

    def _make_room(self, dtype: np.dtype) -> None:
        shard, communicator = self.bucket.shard, self._communicator
        self._to_send = sent = self._device.zeros((communicator.size * shard,), dtype)
        self._targets = {n: sent[place].reshape(self._arrays[n].shape) for n, place in self._places.items()}
        self._received = received = self._device.zeros((shard,), sum_dtype(dtype))
        begins = [piece.offset - communicator.rank * shard for piece in self.own]
        self._sums = [received[begin : begin + piece.size] for begin, piece in zip(begins, self.own, strict=True)]

    def begin(self, *, ordered: bool, joins: bool) -> None:
        """See `Shard`."""
        assert self._to_send is not None
        assert self._received is not None
        self._agree(self._to_send.dtype)
        self._arriving = self._communicator.reduce_scatter(self._to_send, self._received, ordered=ordered)

    def gradients(self) -> list[Array]:
        """See `Shard`: the same arrays at every step."""
        return self._sums

    def arrive(self) -> None:
        """See `Shard`."""
        pending, self._arriving = self._arriving, None
        if pending is not None:
            pending.wait()


class WholeShard(Shard):
    """A bucket of variables whose gradients are arrays, on the only rank: its own gradients are read where they lie."""

    def __init__(self, bucket: Bucket, variables: Sequence[Variable], communicator: Communicator) -> None:
        super().__init__(bucket, variables, communicator)
        self._dtype: np.dtype | None = None
        self._gradients: dict[int, Array] = {}

    @property
    def gradient_dtype(self) -> np.dtype | None:
        """See `Shard`."""
        return self._dtype

    def push(self, gradients: Mapping[int, Array]) -> None:
        """See `Shard`."""
        if self._dtype is None:
            self._dtype = next(iter(gradients.values())).dtype
        self._gradients.update(gradients)
        self.lacks -= gradients.keys()

    def begin(self, *, ordered: bool, joins: bool) -> None:
        """See `Shard`: they are where they are read."""

    def gradients(self) -> list[Array]:
        """See `Shard`."""
        return [self._gradients[piece.variable].reshape(-1) for piece in self.own]

    def arrive(self) -> None:
        """See `Shard`."""

    def taken(self) -> None:
        """See `Shard`. Whose gradients they are may free them."""
        super().taken()
        self._gradients.clear()

    def depart(self) -> None:
        """See `Shard`: there are no others."""


class RepeatedGradients:
    """Gradients for the variables of an earlier step, in its order, which are recognised and handed over all at once.

    Args:
        shards: all of the optimizer.
        pairs: of the earlier step, one for each variable.
        checked: for each pair the variable's number, and its gradient as it was handed over.
        device: of the arrays.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        pairs: Sequence[tuple[Any, Variable]],
        checked: Sequence[tuple[int, Array]],
        device: Device,
    ) -> None:
        self._device, count = device, len(pairs)
        arrays = [array for _, array in checked]
        targets, shapes = [variable for _, variable in pairs], [array.shape for array in arrays]
        expected = ExpectedPairs(targets, [None] * count, [None] * count, shapes, [array.dtype for array in arrays])
        self._read, self._arrays = device.pair_reader(expected), [variable._storage for variable in targets]
        place_of = {number: place for place, (number, _) in enumerate(checked)}
        self._shards = [(shard, {number: place_of[number] for number in shard.bucket.variables}) for shard in shards]

    @classmethod
    def of(
        cls,
        shards: Sequence[Shard],
        pairs: Sequence[tuple[Any, Variable]],
        checked: Sequence[tuple[int, Any]],
        device: Device,
    ) -> RepeatedGradients | None:
        """What recognises such a step; None where gradients were no arrays of the device, as they will not be again."""
        are_arrays = not any(isinstance(shard, TableShard) for shard in shards)
        as_given = all(array is gradient for (_, array), (gradient, _) in zip(checked, pairs, strict=True))
        return cls(shards, pairs, checked, device) if are_arrays and as_given else None

    def take(self, pairs: Sequence[Any]) -> bool:
        """Hand the gradients over; False, and nothing has changed, where they are not such ones."""
        addresses = self._read(pairs)
        if addresses is None or not addresses.all():
            return False
        gradients = [gradient for gradient, _ in pairs]
        kind = self._device.xp.ndarray  # tensors of torch have addresses, too
        has_begun = any(len(shard.lacks) < len(shard.bucket.variables) for shard, _ in self._shards)
        if has_begun or not all(type(gradient) is kind for gradient in gradients):
            return False
        if not all(variable._storage is array for (_, variable), array in zip(pairs, self._arrays, strict=True)):
            return False  # another optimizer has moved some
        for shard, places in self._shards:
            shard.push({number: gradients[place] for number, place in places.items()})
        return True


class TableShard(Shard):
    """A variable whose gradients are `IndexedSlices`. Each rank owns some of its rows, and receives their gradients.

    The slices of all ranks arrive joined in the order of ranks, as if one process had concatenated them. How many go
    where, the host must know: on a GPU it waits for these numbers.

    With deferred updates no rank hands its rows on after a step: the variable is `Behind` (gpu_adam/behind.py) this
    object, which fetches the rows that are read from their owners. All ranks read at the same time then.

    Args:
        bucket, variables, communicator: as of `Shard`; the bucket has one variable.
        state: of the optimizer, if the variable's updates are deferred.
    """

    def __init__(
        self,
        bucket: Bucket,
        variables: Sequence[Variable],
        communicator: Communicator,
        state: AdamState | None = None,
    ) -> None:
        self._whole = variables[bucket.variables[0]]
        self._row = self._whole.shape[1:]
        self._row_size = int(np.prod(self._row, dtype=np.int64))
        self._rows_each = bucket.shard // max(1, self._row_size)
        super().__init__(bucket, variables, communicator)
        self._slices: IndexedSlices | None = None
        self._dtype: np.dtype | None = None
        self._received: IndexedSlices | None = None
        self._arriving: list[Pending] = []
        self._owner = None if state is None else weakref.ref(state)
        self._is_behind = False
        if state is not None:
            self._whole._behind = self

    def _shaped(self, array: Array, variable: Variable) -> Array:
        return array.reshape(array.size // max(1, self._row_size), *self._row)

    @property
    def gradient_dtype(self) -> np.dtype | None:
        """See `Shard`."""
        return self._dtype

    def push(self, gradients: Mapping[int, IndexedSlices]) -> None:
        """See `Shard`."""
        (self._slices,) = gradients.values()
        self._dtype = self._slices.values.dtype
        self.lacks.clear()

    def begin(self, *, ordered: bool, joins: bool) -> None:
        """See `Shard`."""
        slices, self._slices = self._slices, None
        assert slices is not None
        self._agree(slices.values.dtype)
        device, communicator = self._device, self._communicator
        with device.activate():
            sorted_rows, order, counts = self._by_owner(slices.indices)
            numbers = self._counts_of_all(counts)
            received = numbers[:, communicator.rank].tolist()
            indices = device.empty(sum(received), np.dtype(np.int64))
            values = device.empty(sum(received) * self._row_size, slices.values.dtype).reshape(-1, *self._row)
            sent = numbers[communicator.rank].tolist()
            self._arriving = [
                communicator.all_to_all(send, recv, sent, received)
                for send, recv in ((sorted_rows, indices), (slices.values[order], values))
            ]
            self._received = IndexedSlices(values, indices)
            if joins:  # what one process would take the norm of
                self._received._joined = joining(communicator, slices.values, numbers.sum(1).tolist())()

    def _by_owner(self, indices: Array) -> tuple[Array, Array, Array]:
        """Row numbers as their owners count them, owner after owner; in which order; and how many each gets."""
        xp, ranks, each = self._device.xp, self._communicator.size, self._rows_each
        rows = indices.astype(np.int64)
        owners = xp.clip(rows // max(1, each), 0, ranks - 1)  # a row out of range is out of range there, too
        order = xp.argsort(owners, kind="stable") if owners.size else owners  # which CuPy sorts at address 0
        # Not by bincount, for which CuPy lets the host wait.
        counts = xp.diff(xp.searchsorted(owners[order], xp.arange(ranks + 1))).astype(np.int64)
        return (rows - owners * each)[order], order, counts

    def _counts_of_all(self, counts: Array) -> np.ndarray:
        """How many slices each rank (row) sends to each (column). The host waits."""
        ranks = self._communicator.size
        everything = self._device.zeros((ranks * ranks,), np.dtype(np.int64))
        self._communicator.all_gather(counts, everything).wait()
        return self._device.numpy(everything).reshape(ranks, ranks)

    def gradients(self) -> list[IndexedSlices]:
        """See `Shard`. They are waited for: a step looks at row numbers first."""
        self.arrive()
        assert self._received is not None
        return [self._received]

    def arrive(self) -> None:
        """See `Shard`."""
        pending, self._arriving = self._arriving, []
        for each in pending:
            each.wait()

    def depart(self) -> None:
        """See `Shard`."""
        if self._owner is None:
            super().depart()
        self._is_behind = self._owner is not None

    # As what the variable is `Behind`.

    def owner(self) -> AdamState | None:
        """The state of the optimizer."""
        return None if self._owner is None else self._owner()

    def settle(self) -> None:
        """Bring every row of the variable up to date, on all ranks, each of which calls this."""
        if self._is_behind:
            self._is_behind = False
            (piece,) = self.pieces
            if piece._behind is not None:
                piece._behind.settle()
            super().depart()
            self.finish()

    def bring_up_to_date(self, rows: Array) -> None:
        """Bring rows of the variable up to date: each rank asks their owners for those that it names."""
        if not self._is_behind:
            return
        device, communicator, (piece,) = self._device, self._communicator, self.pieces
        with device.activate():
            rows = rows[(rows >= 0) & (rows < len(self._whole))].astype(np.int64)
            asked_for, order, counts = self._by_owner(rows)
            numbers = self._counts_of_all(counts)
            sent, received = numbers[communicator.rank].tolist(), numbers[:, communicator.rank].tolist()
            asked = device.empty(sum(received), np.dtype(np.int64))
            communicator.all_to_all(asked_for, asked, sent, received).wait()
            if piece._behind is not None:
                piece._behind.bring_up_to_date(asked)
            answer = device.xp.ascontiguousarray(piece._storage[asked])
            fetched = device.empty(len(rows) * self._row_size, answer.dtype).reshape(-1, *self._row)
            communicator.all_to_all(answer, fetched, received, sent).wait()
            self._whole._storage[rows[order]] = fetched


class RankSums:
    """The partial sums of a norm over all ranks: see `gpu_adam.step.exchange.SharedSums`.

    Args:
        communicator: of the ranks.
        shards: of the parts whose gradients are summed up, in order.
        chunks_of: for a dtype and a number of elements, how many partial sums they have.
    """

    def __init__(self, communicator: Communicator, shards: Sequence[Shard], chunks_of: Any) -> None:
        self._communicator, self._shards, self._chunks_of = communicator, list(shards), chunks_of
        self._counts: list[int] | None = None
        empty = communicator.device.empty(0, np.dtype(np.float64))
        self.own = self.whole = self._mine = self._all = empty
        self.begins: list[tuple[int, int]] = []

    def bind(self, counts: Sequence[int]) -> bool:
        """See `SharedSums`. Which chunks the other ranks have follows from the layout."""
        if list(counts) == self._counts:
            return False
        ranks, own_rank, device = self._communicator.size, self._communicator.rank, self._communicator.device
        begun = [0] * ranks
        places: dict[int, list[np.ndarray]] = {}  # of each variable: where its sums are, among all ranks' own
        owned: list[int] = []
        found: list[tuple[int, int, np.ndarray]] = []
        for shard, count in zip(self._shards, counts, strict=True):
            for rank, pieces in enumerate(shard.bucket.pieces):
                for piece in pieces:
                    # Every rank has the sums of all slices; each takes its own.
                    chunks = count if isinstance(shard, TableShard) else self._chunks_of(shard, piece.size)
                    if not isinstance(shard, TableShard) or rank == own_rank:
                        found.append((rank, piece.variable, begun[rank] + np.arange(chunks)))
                    begun[rank] += chunks
                    if rank == own_rank and (piece.size or isinstance(shard, TableShard)):
                        owned.append(piece.variable)
        width = max(1, *begun)
        for rank, variable, place in found:
            places.setdefault(variable, []).append(rank * width + place)
        order: list[np.ndarray] = []
        ranges: dict[int, tuple[int, int]] = {}
        end = 0
        for variable in (number for shard in self._shards for number in shard.bucket.variables):
            begin, parts = end, places.get(variable, [])
            order += parts
            end += sum(map(len, parts))
            ranges[variable] = begin, end
        self._all = device.zeros((ranks * width,), np.dtype(np.float64))
        self.own = self._mine = self._all[own_rank * width : (own_rank + 1) * width]
        self.whole = device.zeros((end,), np.dtype(np.float64))
        self._order = device.array(np.concatenate(order))
        self.begins = [ranges[number] for number in owned]
        self._counts = list(counts)
        return True

    def calls(self) -> list[Call]:
        """See `SharedSums`."""
        return [partial(self._collect)]

    def _collect(self) -> None:
        device = self._communicator.device
        self._communicator.all_gather(self._mine, self._all).wait()
        with device.activate():
            device.xp.take(self._all, self._order, out=self.whole)


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
        self._begun = 0  # so many shards' gradients travel, or have arrived

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
        """See `Exchange`."""
        return RankSums(self._communicator, [self.shards[part] for part in parts], self._chunks_of)

    def _chunks_of(self, shard: Shard, size: int) -> int:
        return int(-(-size * self._parts_of(shard.parameters.dtype) // CHUNK))

    def begin_complete(self, *, ordered: bool, joins: bool) -> None:
        """Let the buckets begin to travel whose gradients are all there, the last one first, as backward passes go.

        All ranks begin in the same order, in whichever order their gradients come.
        """
        while self._begun < len(self.shards) and not self.shards[-1 - self._begun].lacks:
            self.shards[-1 - self._begun].begin(ordered=ordered, joins=joins)
            self._begun += 1

    def all_arrived(self) -> None:
        """To be called when a step has taken all gradients: it may be made anew until then, where it has failed."""
        self._begun = 0
        for shard in self.shards:
            shard.taken()
