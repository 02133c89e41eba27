"""What ranks can do together. Distributed optimizers know the engines between ranks by this interface alone."""

from __future__ import annotations

import functools
import itertools
import math
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeVar

import numpy as np

from gpu_adam.communicators.ordered_sum import ordered_sum
from gpu_adam.devices import Array, Device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.kernels import DTYPES, HALVES, dtype_named

Finish = Callable[[], object]
"""What remains to be done of an operation that has begun."""

SUMMED = (*DTYPES, "int32", "int64", "uint64")
"""The dtypes of arrays that a communicator takes."""

Self = TypeVar("Self", bound="Communicator")


class Pending:
    """An operation that has begun.

    Until `wait` has returned, nobody may write the arrays that the operation reads, or touch those that it writes.
    """

    def __init__(self, finish: Finish, others: dict[Pending, None]) -> None:
        self._finish, self._others = finish, others
        others[self] = None  # keeps the arrays alive, whatever becomes of the caller's reference

    def wait(self) -> None:
        """Let what is enqueued on the current stream from now on see the result, on a host device the caller.

        The current stream is to be the one on which the operation began. To wait again does nothing. With `Nccl` the
        stream waits and the host goes on; with `Mpi` the host waits for the other ranks.

        Raises:
            DistributedError: the engine failed, or the other ranks did not answer in time.
        """
        if self in self._others:
            self._finish()
            del self._others[self]
            self._finish = int  # lets go of the arrays


class Communicator(ABC):
    """A group of processes, the ranks, each with one device, whose arrays they exchange and add.

    Every rank calls the same operations in the same order, with arrays that fit together, and may begin several before
    it waits for one. An operation returns when it has begun: see `Pending`. It reads and writes arrays after what is
    enqueued on the current stream so far.

    Arrays are C-contiguous, of the communicator's device, and of any shape; float32, float64, complex64, complex128,
    float16, bfloat16, int32, int64 or uint64. What an operation reads and what it writes must not overlap, but where it
    says so.

    Sums. Numbers of 16 bits travel as they are and are added in float32, in the order of ranks, so that their sum is an
    array of float32: engines would round each addition to 16 bits, and MPI has no such numbers. Other sums are added by
    the engine in an order of its own, which may depend on the number of ranks and the size. With ``ordered=True`` they
    are added in the order of ranks, ((x_0 + x_1) + x_2) + ..., with the bits that one process has which accumulates the
    gradients: the same bytes between ranks, for the time of the operation as much memory again as the rank receives.
    Sums of integers wrap around, in any order.

    As a context, ``with communicator:``, it ends the whole job when the body raises in one rank: the others would wait
    for it, and no MPI lets them know. On the way out it waits for what has begun, and closes.

    Attributes:
        rank: number of this process, from 0.
        size: number of ranks.
        device: whose arrays are moved.
    """

    rank: int
    size: int
    device: Device

    def __init__(self, rank: int, size: int, device: Device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._under_way = dict[Pending, None]()  # in the same order in every rank

    def __repr__(self) -> str:
        return f"<gpu_adam {type(self).__name__}: rank {self.rank} of {self.size}, {self.device.name}>"

    def reduce_scatter(self, send: Array, recv: Array, *, ordered: bool = False) -> Pending:
        """Add the arrays of all ranks; each rank keeps its part: ``recv = sum over ranks of send[rank's part]``.

        Args:
            send: size times as many elements as `recv`; rank r's part is the r-th of equal parts. Left as it is.
            recv: of the sum's dtype, apart from `send`.
            ordered: whether to add in the order of ranks.
        """
        self._check_sum(send, recv)
        self._check_sizes("send", send.size, "recv", recv.size * self.size)
        self._check_apart(send, recv)
        if not _added_by_us(send, ordered):
            return self.begun(self._reduce_scatter(_numbers(send), _numbers(recv)))
        return self.begun(self._ordered_sums(send, [recv.size] * self.size, recv.reshape(-1)))

    def all_reduce(self, send: Array, recv: Array, *, ordered: bool = False) -> Pending:
        """Add the arrays of all ranks: ``recv = sum over ranks of send``, in every rank the same bits.

        Args:
            send: left as it is, unless it is `recv`.
            recv: as many elements, of the sum's dtype: `send` itself, or apart from it.
            ordered: whether to add in the order of ranks. Each rank then adds one part, and its sums begin to travel
                when it waits: ranks wait for such operations in the same order.
        """
        self._check_sum(send, recv)
        self._check_sizes("recv", recv.size, "send", send.size)
        if not self._is_same(send, recv):
            self._check_apart(send, recv)
        if not _added_by_us(send, ordered):
            return self.begun(self._all_reduce(_numbers(send), _numbers(recv)))
        part = -(-send.size // self.size)
        counts = [max(0, min(part, send.size - rank * part)) for rank in range(self.size)]
        fits = part * self.size == recv.size
        whole = recv.reshape(-1) if fits else self.device.empty(part * self.size, recv.dtype)
        mine = whole[self.rank * part : (self.rank + 1) * part]
        add = self._ordered_sums(send, counts, mine[: counts[self.rank]])

        def finish() -> None:
            add()
            self._all_gather(_bits(mine), _bits(whole))()
            if not fits:
                self.device.copy_call([recv.reshape(-1)], [whole[: recv.size]])()

        return self.begun(finish)

    def all_gather(self, send: Array, recv: Array) -> Pending:
        """Give every rank the arrays of all: ``recv = [send of rank 0, send of rank 1, ...]``.

        Args:
            send: left as it is: the rank's own part of `recv`, ``recv[rank * n : (rank + 1) * n]``, by which nothing
                moves within the rank; or apart from it.
            recv: size times as many elements, of the same dtype.
        """
        self._check_alike(send, recv)
        self._check_sizes("recv", recv.size, "send", send.size * self.size)
        if not self._is_same(send, recv, self.rank * send.nbytes):
            self._check_apart(send, recv)
        return self.begun(self._all_gather(_bits(send), _bits(recv)))

    def all_to_all(
        self,
        send: Array,
        recv: Array,
        send_counts: Sequence[int] | None = None,
        recv_counts: Sequence[int] | None = None,
    ) -> Pending:
        """Give every rank a part of this rank's array: ``recv = [rank 0's part for this rank, rank 1's, ...]``.

        Args:
            send: the parts for the ranks in their order. Left as it is.
            recv: of the same dtype and, but for the first axis, shape; apart from `send`.
            send_counts: the parts' lengths along the first axis, 0 for a rank that gets nothing; default: equal ones.
            recv_counts: those of what the ranks send here: rank r's send_counts[rank].
        """
        self._check_alike(send, recv)
        self._check_apart(send, recv)
        if send.shape[1:] != recv.shape[1:] or not send.ndim or not recv.ndim:
            rule = f"must have the shape of send, {send.shape}, but for the first axis"
            raise ArgumentValueError("recv", rule, recv.shape, "reshape it")
        numbers = [
            self._counts(name, counts, array)
            for name, counts, array in (("send_counts", send_counts, send), ("recv_counts", recv_counts, recv))
        ]
        return self.begun(self._exchange(send, recv, *numbers))

    def broadcast(self, array: Array, root: int = 0) -> Pending:
        """Give every rank the array of one, in place.

        Args:
            array: read in rank `root`, written in the others.
            root: the rank that has it.
        """
        self._check_array("array", array)
        if not 0 <= root < self.size:
            raise ArgumentValueError("root", f"must be one of {self.size} ranks", root, "count ranks from 0")
        return self.begun(self._broadcast(_bits(array), root))

    def begun(self, finish: Finish) -> Pending:
        """Something that has begun, of more than one operation perhaps. `close` waits for it.

        Args:
            finish: what remains to be done of it, by all ranks.
        """
        return Pending(finish, self._under_way)

    @abstractmethod
    def barrier(self) -> None:
        """Wait until all ranks are here. The host waits, and for the device too.

        Raises:
            DistributedError: the engine failed, or the other ranks did not answer in time.
        """

    @abstractmethod
    def abort(self) -> None:
        """End all ranks at once, this one too, with a status that is not 0. Nothing is saved, nothing is closed."""

    def close(self) -> None:
        """Wait for what has begun, and give back what the engine holds. Every rank calls it; it may be called again."""
        for pending in list(self._under_way):
            pending.wait()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            try:
                self.close()
                return
            except BaseException as raised:
                if self.size == 1:
                    raise
                kind, error, trace = type(raised), raised, raised.__traceback__
        if self.size > 1:
            # Printed here: the process ends before its own hook could.
            text = "".join(traceback.format_exception(kind, error, trace))
            print(f"{text}Rank {self.rank} of {self.size} ends the job.", file=sys.stderr, flush=True)
            self.abort()

    # What an engine does, each of them: begin an operation on one-dimensional arrays, and return what remains to be
    # done. Arrays are checked; sums are of real numbers, and what is only moved is unsigned integers of its width.

    @abstractmethod
    def _reduce_scatter(self, send: Array, recv: Array) -> Finish: ...

    @abstractmethod
    def _all_reduce(self, send: Array, recv: Array) -> Finish: ...

    @abstractmethod
    def _all_gather(self, send: Array, recv: Array) -> Finish: ...

    @abstractmethod
    def _all_to_all(self, send: Array, recv: Array, send_counts: list[int], recv_counts: list[int]) -> Finish: ...

    @abstractmethod
    def _broadcast(self, array: Array, root: int) -> Finish: ...

    def _exchange(self, send: Array, recv: Array, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Finish:
        """An all-to-all of arrays as they are, by counts along the first axis."""
        width = math.prod(send.shape[1:]) * (send.itemsize // min(8, send.itemsize))
        counts = ([count * width for count in each] for each in (send_counts, recv_counts))
        return self._all_to_all(_bits(send), _bits(recv), *counts)

    def _ordered_sums(self, send: Array, counts: list[int], total: Array) -> Finish:
        """The sum in order of ranks of this rank's part of `send`, of which rank r's has counts[r] elements."""
        own = counts[self.rank]
        rows = self.device.empty(self.size * own, send.dtype)
        exchanged = self._exchange(send.reshape(-1), rows, counts, [own] * self.size)

        def finish() -> None:
            exchanged()
            ordered_sum(self.device, rows.reshape(self.size, own), total)

        return finish

    def _check_array(self, argument: str, array: Array) -> None:
        if not isinstance(array, self.device.xp.ndarray) or self.device.view(array) is None:
            rule = f"must be an array of the communicator's device, {self.device.name}"
            raise ArgumentTypeError(argument, rule, type(array).__name__, "copy it with communicator.device.array")
        if _name(array.dtype) not in SUMMED:
            rule = f"must have one of the dtypes {', '.join(SUMMED)}"
            raise ArgumentValueError(argument, rule, array.dtype.name, "cast it, or pass its view")
        if not array.flags.c_contiguous:
            raise ArgumentValueError(argument, "must be C-contiguous", f"strides {array.strides}", "pass a copy")

    def _check_alike(self, send: Array, recv: Array) -> None:
        self._check_array("send", send)
        self._check_array("recv", recv)
        if recv.dtype != send.dtype:
            raise ArgumentValueError("recv", f"must have the dtype of send, {send.dtype.name}", recv.dtype.name, "cast")

    def _check_sum(self, send: Array, recv: Array) -> None:
        self._check_array("send", send)
        self._check_array("recv", recv)
        if recv.dtype != sum_dtype(send.dtype):
            rule = f"must have the dtype of sums of {send.dtype.name}, {sum_dtype(send.dtype).name}"
            raise ArgumentValueError("recv", rule, recv.dtype.name, "pass another array")

    def _check_sizes(self, argument: str, size: int, other: str, wanted: int) -> None:
        if size != wanted:
            rule = f"must have {wanted} elements, as {other} and {self.size} ranks want it"
            raise ArgumentValueError(argument, rule, size, "pad the arrays to equal parts")

    def _check_apart(self, send: Array, recv: Array) -> None:
        if not (send.size and recv.size):
            return
        first, second = self.device.address(send), self.device.address(recv)
        if first < second + recv.nbytes and second < first + send.nbytes:
            raise ArgumentValueError("recv", "must not overlap send", "arrays that do", "pass another array")

    def _is_same(self, send: Array, recv: Array, offset: int = 0) -> bool:
        return self.device.address(send) == self.device.address(recv) + offset

    def _counts(self, argument: str, counts: Sequence[int] | None, array: Array) -> list[int]:
        length = len(array)
        numbers = [length // self.size] * self.size if counts is None else [int(count) for count in counts]
        if len(numbers) != self.size or min(numbers) < 0 or sum(numbers) != length:
            rule = f"must be {self.size} lengths, none negative, that add up to {length}"
            raise ArgumentValueError(argument, rule, numbers, "pass one for each rank")
        return numbers


def sum_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of sums over ranks: float32 for numbers of 16 bits, else the same."""
    name = _name(dtype)
    return dtype_named(DTYPES[name].wide_dtype) if name in HALVES else dtype


@functools.lru_cache(64)  # a dtype of NumPy makes its name anew each time
def _name(dtype: np.dtype) -> str:
    return str(dtype.name)


def offsets(counts: Sequence[int]) -> list[int]:
    """Where parts of these lengths begin."""
    return [0, *itertools.accumulate(counts)][: len(counts)]


def _added_by_us(send: Array, ordered: bool) -> bool:
    name = _name(send.dtype)
    return name in HALVES or (ordered and name in DTYPES)


def _numbers(array: Array) -> Array:
    """An array as one-dimensional real numbers: complex ones are added by their parts."""
    flat = array.reshape(-1)
    return flat.view(np.dtype(f"f{flat.itemsize // 2}")) if flat.dtype.kind == "c" else flat


def _bits(array: Array) -> Array:
    """An array as one-dimensional unsigned integers of its width, 64 bits at most."""
    flat = array.reshape(-1)
    return flat.view(np.dtype(f"u{min(8, flat.itemsize)}"))
