"""NCCL between GPUs, by CuPy's ``NcclCommunicator``: each operation on a stream of its own, beside the updates."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from gpu_adam.communicators.base import Communicator, Finish, offsets
from gpu_adam.communicators.mpi import TIMEOUT
from gpu_adam.devices import Array, Device, find_device
from gpu_adam.errors import ArgumentValueError, DeviceError, DistributedError

_POLL_SECONDS = 1.0
_DONE: Finish = partial(int)


def nccl_module() -> Any:
    """CuPy's module for NCCL.

    Raises:
        DeviceError: CuPy or NCCL is missing; the message names the extra.
    """

    def missing(what: object, remedy: str) -> DeviceError:
        return DeviceError("a communicator of NCCL", "needs CuPy and NCCL", what, remedy)

    install = 'pip install "gpu-adam[nccl13]" (or [nccl12] for CUDA 12)'
    try:
        from gpu_adam.devices import cuda  # noqa: PLC0415  (imports CuPy, which may be missing)
    except ImportError as error:
        raise missing(f"CuPy does not import: {error}", install) from error
    module = cuda.nccl_module()
    if not module.available:
        raise missing("no NCCL", install)
    return module


def nccl_version() -> str:
    """Version of NCCL.

    Raises:
        DeviceError: as `nccl_module`.
    """
    number = int(nccl_module().get_version())  # 22707, say
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


class Nccl(Communicator):
    """A communicator of NCCL: one process and one GPU for each rank.

    Operations run in order on one stream, behind what the current stream holds when they begin. `Pending.wait` lets the
    current stream wait for one of them; the host goes on.

    A thread looks every second whether NCCL has met an error, or an operation is overdue, or a call that the host has
    made to reach the other ranks: for NCCL's id, for the communicator, at the end of a group. Kernels of NCCL wait for
    the other ranks without end, and the host with them wherever it waits for the device, and so do these calls, which
    CuPy makes in NCCL's blocking mode. Nothing can be raised there: the thread prints what happened and ends the job.

    Args:
        comm: hands NCCL's id from rank 0 to the others, and says which rank this is: an mpi4py communicator, or any
            object with ``rank``, ``size`` and ``bcast(object, root)``. Where it has ``Abort(status)``, that ends the
            job; else this process ends, and the others hear of it from NCCL or their launcher.
        device: a CUDA device or its name; None for the default one. Two ranks must not share a GPU.
        timeout: seconds after which a call, or an operation that has begun, is overdue; > 0.

    Raises:
        ArgumentValueError: the device is no CUDA device, or the timeout is not above 0.
        DeviceError: CuPy or NCCL is missing.
        DistributedError: NCCL cannot reach the other ranks.
    """

    def __init__(self, comm: Any, device: str | Device | None = None, *, timeout: float = TIMEOUT) -> None:
        if not timeout > 0:
            raise ArgumentValueError("timeout", "must be above 0 seconds", timeout, "pass a larger number")
        super().__init__(int(comm.rank), int(comm.size), find_device(device))
        if not hasattr(self.device.xp, "cuda"):
            raise ArgumentValueError(
                "device", "must be a CUDA device", self.device.name, "pass 'cuda:0', say, or use Mpi"
            )
        self._module = nccl = nccl_module()
        self._types = {
            "float32": nccl.NCCL_FLOAT32,
            "float64": nccl.NCCL_FLOAT64,
            "int32": nccl.NCCL_INT32,
            "int64": nccl.NCCL_INT64,
            "uint64": nccl.NCCL_UINT64,
        }
        self._comm, self._timeout = comm, timeout
        self._in_flight = deque[tuple[Any, float]]()  # events behind operations, and when these began
        self._called_at: float | None = None  # when the call began in which the host is
        self._is_closed, self._lock = threading.Event(), threading.Lock()
        self._nccl: Any = None
        threading.Thread(target=self._watch, name="gpu_adam: NCCL", daemon=True).start()
        try:
            identity = self._called(nccl.get_unique_id) if self.rank == 0 else None
            identity = self._called(comm.bcast, identity, root=0)
            with self.device.activate():
                self._nccl = self._called(nccl.NcclCommunicator, self.size, identity, self.rank)
                self._stream = self.device.xp.cuda.Stream(non_blocking=True)
                self._flag = self.device.xp.zeros(1, "int32")
        except BaseException:
            self._is_closed.set()
            raise

    def barrier(self) -> None:
        """Wait until all ranks are here. The host waits, and for what the current stream holds."""
        self._all_reduce(self._flag, self._flag)
        with self._lock:  # the thread that watches takes out what is done
            event = self._in_flight[-1][0] if self._in_flight else None
        with self.device.activate():
            while event is not None and not event.done:
                if (trouble := self._trouble()) is not None:
                    raise self._failed(trouble)
                time.sleep(1e-4)

    def abort(self) -> None:
        """End all ranks by the launcher, or this one, which the others hear of."""
        if hasattr(self._comm, "Abort"):
            self._comm.Abort(1)
        self._is_closed.set()
        if self._nccl is not None and self._called_at is None:  # or it would free what a call works with
            self._nccl.abort()
        os._exit(1)

    def close(self) -> None:
        """Wait for what has begun, and for the device, and give NCCL's resources back."""
        super().close()
        if self._nccl is not None:
            self.barrier()
            with self._lock:  # the thread that watches asks it no more
                nccl, self._nccl = self._nccl, None
            self._called(nccl.destroy)
            self._is_closed.set()

    def _reduce_scatter(self, send: Array, recv: Array) -> Finish:
        number = self._types[recv.dtype.name]
        arguments = send.data.ptr, recv.data.ptr, recv.size, number, self._module.NCCL_SUM
        return self._enqueued(recv.size, partial(self._nccl.reduceScatter, *arguments), send, recv)

    def _all_reduce(self, send: Array, recv: Array) -> Finish:
        number = self._types[recv.dtype.name]
        arguments = send.data.ptr, recv.data.ptr, recv.size, number, self._module.NCCL_SUM
        return self._enqueued(recv.size, partial(self._nccl.allReduce, *arguments), send, recv)

    # What is only moved are bytes: NCCL has no complex numbers, and no integers of 16 bits.

    def _all_gather(self, send: Array, recv: Array) -> Finish:
        arguments = send.data.ptr, recv.data.ptr, send.nbytes, self._module.NCCL_UINT8
        return self._enqueued(send.size, partial(self._nccl.allGather, *arguments), send, recv)

    def _all_to_all(self, send: Array, recv: Array, send_counts: list[int], recv_counts: list[int]) -> Finish:
        byte = self._module.NCCL_UINT8
        calls = []
        for move, array, counts in ((self._nccl.send, send, send_counts), (self._nccl.recv, recv, recv_counts)):
            for peer, (begin, count) in enumerate(zip(offsets(counts), counts, strict=True)):
                if count:
                    width = array.itemsize
                    calls.append(partial(move, array.data.ptr + begin * width, count * width, byte, peer))

        def move_all(stream: int) -> None:
            self._module.groupStart()
            try:
                for call in calls:
                    call(stream)
            finally:
                self._module.groupEnd()

        return self._enqueued(len(calls), move_all, send, recv)

    def _broadcast(self, array: Array, root: int) -> Finish:
        arguments = array.data.ptr, array.nbytes, self._module.NCCL_UINT8, root
        return self._enqueued(array.size, partial(self._nccl.bcast, *arguments), array)

    def _enqueued(self, size: int, call: Callable[[int], object], *arrays: Array) -> Finish:
        """Enqueue an operation behind the current stream's work, and return how the stream waits for it.

        Args:
            size: 0 where nothing is moved.
            call: the operation, which takes the address of a stream.
            arrays: what it works on; alive until the stream waits.
        """
        if not size:
            return _DONE
        with self.device.activate():
            cuda = self.device.xp.cuda
            is_there, is_done = cuda.Event(disable_timing=True), cuda.Event(disable_timing=True)
            is_there.record(cuda.get_current_stream())
            self._stream.wait_event(is_there)
            self._called(call, self._stream.ptr)
            is_done.record(self._stream)
        if not self.device.is_capturing():  # an event of a graph has no time of its own
            self._in_flight.append((is_done, time.monotonic()))
        return partial(self._join, is_done, arrays)

    def _join(self, event: Any, arrays: tuple[Array, ...]) -> None:
        with self.device.activate():
            self.device.xp.cuda.get_current_stream().wait_event(event)

    def _called(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        self._called_at = time.monotonic()
        try:
            return function(*arguments, **keywords)
        except self._module.NcclError as error:
            raise self._failed(str(error)) from error
        finally:
            self._called_at = None

    def _failed(self, trouble: str) -> DistributedError:
        argument = f"NCCL in rank {self.rank} of {self.size}"
        remedy = "look for a rank that has died, is stopped or at another operation, or set NCCL_DEBUG=INFO"
        return DistributedError(argument, "must reach the other ranks", trouble, remedy)

    def _trouble(self) -> str | None:
        """What is wrong; None where nothing is. Asked by two threads."""
        began, now = self._called_at, time.monotonic()
        if began is not None and now - began > self._timeout:
            return f"a call that has not returned for {now - began:.0f} s"
        with self._lock, self.device.activate():
            if self._nccl is None:
                return None
            try:
                self._nccl.check_async_error()
            except self._module.NcclError as error:
                return str(error)
            while self._in_flight and self._in_flight[0][0].done:
                self._in_flight.popleft()
            waited = time.monotonic() - self._in_flight[0][1] if self._in_flight else 0.0
            return None if waited <= self._timeout else f"no answer for {waited:.0f} s"

    def _watch(self) -> None:
        while not self._is_closed.wait(_POLL_SECONDS):
            if (trouble := self._trouble()) is not None:
                print(
                    f"{self._failed(trouble)}\nRank {self.rank} of {self.size} ends the job.",
                    file=sys.stderr,
                    flush=True,
                )
                self.abort()
