"""A stand-in for cupy.cuda.nccl: writes every call down, and does the work of ranks that all have the same arrays.

The work is enqueued on the stream that it is given: an event that is missing shows where a driver takes its time.
"""

import threading
from collections.abc import Callable
from typing import Any

from gpu_adam.kernels import dtype_named

Entry = tuple[Any, ...]

ID = bytes(range(128))
_NAMES = {0: "int8", 1: "uint8", 2: "int32", 4: "int64", 5: "uint64", 7: "float32", 8: "float64"}


class NcclError(RuntimeError):
    """An error of NCCL."""


class _Stream:
    """A stream by its address, in the protocol that CuPy reads."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


class Nccl:
    """The module.

    Args:
        cupy: CuPy.

    Attributes:
        log: the calls: name and arguments.
        error: raised by the next call, if there is one.
        asynchronous_error: raised when it is asked for.
        blocking: the name of a call that does not return before `returns` is set.
        returns: lets it.
    """

    available = True
    NCCL_UINT8, NCCL_INT32, NCCL_INT64, NCCL_UINT64, NCCL_FLOAT32, NCCL_FLOAT64 = 1, 2, 4, 5, 7, 8
    NCCL_SUM = 0
    NcclError = NcclError

    def __init__(self, cupy: Any) -> None:
        self.cupy, self.log = cupy, list[Entry]()
        self.error: str | None = None
        self.asynchronous_error: str | None = None
        self.blocking, self.returns = "", threading.Event()
        self.group: list[Entry] | None = None
        self.size, self.rank = 0, 0

    def get_version(self) -> int:
        """2.27.7."""
        return 22707

    def note(self, name: str, *arguments: Any) -> None:
        """Write a call down, and return late where it is to block."""
        self.log.append((name, *arguments))
        if name == self.blocking:
            assert self.returns.wait(30)

    def get_unique_id(self) -> bytes:
        """The id of a new communicator."""
        self.note("get_unique_id")
        return ID

    def groupStart(self) -> None:  # noqa: N802  (NCCL's name)
        """Begin calls that belong together."""
        self.note("groupStart")
        self.group = []

    def groupEnd(self) -> None:  # noqa: N802
        """Make them. Every rank sends what this one sends: what comes from one is what this one has for itself."""
        self.note("groupEnd")
        moves, self.group = self.group or [], None
        sent = {peer: (pointer, count) for name, pointer, count, _, peer, _ in moves if name == "send"}
        for name, pointer, count, number, _peer, stream in moves:
            if name == "recv":
                source, length = sent[self.rank]
                assert length == count
                self.enqueue(
                    stream, lambda target, own: target.__setitem__(..., own), number, (pointer, count), (source, count)
                )

    def NcclCommunicator(self, size: int, identity: bytes, rank: int) -> "Communicator":  # noqa: N802
        """A communicator."""
        self.note("NcclCommunicator", size, identity, rank)
        self.size, self.rank = size, rank
        return Communicator(self)

    def enqueue(self, stream: int, work: Callable[..., object], number: int, *places: tuple[int, int]) -> None:
        """Work on arrays at these addresses, of these lengths, on a stream."""
        cupy, dtype = self.cupy, dtype_named(_NAMES[number])
        arrays = []
        for pointer, count in places:
            memory = cupy.cuda.UnownedMemory(pointer, count * dtype.itemsize, self)
            arrays.append(cupy.ndarray(count, dtype, cupy.cuda.MemoryPointer(memory, 0)))
        with cupy.cuda.Stream.from_external(_Stream(stream)):
            work(*arrays)


class Communicator:
    """A communicator of the module."""

    def __init__(self, nccl: Nccl) -> None:
        self._nccl = nccl

    def _called(self, name: str, *arguments: Any) -> None:
        self._nccl.note(name, *arguments)
        if self._nccl.error is not None:
            raise NcclError(self._nccl.error)

    def allReduce(self, send: int, recv: int, count: int, number: int, op: int, stream: int) -> None:  # noqa: N802
        """Every rank's array, added."""
        self._called("allReduce", send, recv, count, number, op, stream)
        size = self._nccl.size
        self._nccl.enqueue(stream, lambda a, b: b.__setitem__(..., a * size), number, (send, count), (recv, count))

    def reduceScatter(self, send: int, recv: int, count: int, number: int, op: int, stream: int) -> None:  # noqa: N802
        """This rank's part of the sum."""
        self._called("reduceScatter", send, recv, count, number, op, stream)
        size, width = self._nccl.size, dtype_named(_NAMES[number]).itemsize
        own = send + self._nccl.rank * count * width
        self._nccl.enqueue(stream, lambda a, b: b.__setitem__(..., a * size), number, (own, count), (recv, count))

    def allGather(self, send: int, recv: int, count: int, number: int, stream: int) -> None:  # noqa: N802
        """Every rank's array, one behind the other."""
        self._called("allGather", send, recv, count, number, stream)
        size, cupy = self._nccl.size, self._nccl.cupy
        places = (send, count), (recv, count * size)
        self._nccl.enqueue(stream, lambda a, b: b.__setitem__(..., cupy.tile(a, size)), number, *places)

    def send(self, pointer: int, count: int, number: int, peer: int, stream: int) -> None:
        """For the group's end."""
        self._called("send", pointer, count, number, peer, stream)
        assert self._nccl.group is not None
        self._nccl.group.append(("send", pointer, count, number, peer, stream))

    def recv(self, pointer: int, count: int, number: int, peer: int, stream: int) -> None:
        """For the group's end."""
        self._called("recv", pointer, count, number, peer, stream)
        assert self._nccl.group is not None
        self._nccl.group.append(("recv", pointer, count, number, peer, stream))

    def bcast(self, pointer: int, count: int, number: int, root: int, stream: int) -> None:
        """The others have the same array."""
        self._called("bcast", pointer, count, number, root, stream)

    def check_async_error(self) -> None:
        """What went wrong since."""
        if self._nccl.asynchronous_error is not None:
            raise NcclError(self._nccl.asynchronous_error)

    def abort(self) -> None:
        """Stop the kernels."""
        self._nccl.note("abort")

    def destroy(self) -> None:
        """Give everything back."""
        self._nccl.note("destroy")


class Comm:
    """An mpi4py communicator, as far as it is used."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.asked = rank, size, list[Any]()

    def bcast(self, obj: Any, root: int) -> Any:
        """What rank 0 has."""
        self.asked.append((obj, root))
        return ID

    def Abort(self, status: int) -> None:  # noqa: N802
        """End nothing, but say so."""
        self.asked.append(status)
