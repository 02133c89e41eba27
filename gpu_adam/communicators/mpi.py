"""MPI: one process for each rank, started by ``mpiexec`` or Slurm; arrays of GPUs travel through host memory."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from gpu_adam.communicators.base import Communicator, Finish, offsets
from gpu_adam.devices import Array, Device, find_device
from gpu_adam.devices.host import host_device
from gpu_adam.errors import ArgumentValueError, DeviceError, DistributedError

TIMEOUT = 600.0
"""Seconds that a rank waits for the others by default."""

_EAGER_SECONDS = 0.05  # how long a waiting rank asks without a pause


def mpi_module() -> Any:
    """``mpi4py.MPI``, which initialises MPI when it is first imported.

    Raises:
        DeviceError: mpi4py or an MPI is missing; the message names the extra.
    """
    try:
        return importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:  # no mpi4py; no MPI, or one that is another than mpi4py wants
        raise _missing(error) from error


def mpi_version() -> str:
    """Which mpi4py and which MPI there are, found out by another process: MPI can be initialised once in each.

    Raises:
        DeviceError: as `mpi_module`.
    """
    code = (
        "import mpi4py, mpi4py.MPI as m; print('mpi4py', mpi4py.__version__, m.Get_library_version().splitlines()[0])"
    )
    environment = {**os.environ, "MPI4PY_RC_INITIALIZE": "0"}
    asked = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if asked.returncode:
        raise _missing((asked.stderr.strip().splitlines() or [f"status {asked.returncode}"])[-1])
    return " ".join(asked.stdout.split())


def _missing(what: object) -> DeviceError:
    remedy = 'pip install "gpu-adam[mpi]", or install mpi4py beside the MPI of your machine'
    return DeviceError("a communicator of MPI", "needs mpi4py and an MPI", what, remedy)


def local_rank(comm: Any = None) -> int:
    """Number of this process among those of its machine, from 0: which of the machine's GPUs is its own.

    Every rank calls it.

    Args:
        comm: an mpi4py communicator; None for all processes of the job.
    """
    mpi = mpi_module()
    neighbours = (mpi.COMM_WORLD if comm is None else comm).Split_type(mpi.COMM_TYPE_SHARED)
    try:
        return int(neighbours.Get_rank())
    finally:
        neighbours.Free()


class Mpi(Communicator):
    """A communicator of MPI, by mpi4py.

    A script is started by ``mpiexec -n 4 python -m mpi4py script.py``; without ``-m mpi4py`` a rank that raises outside
    of ``with communicator:`` leaves the others waiting. Every rank makes its communicators in the same order.

    MPI reads and writes host memory, and moves arrays while some rank is in a call of MPI. On the host it works on the
    arrays themselves. On CUDA an operation waits until its input is there, copied to pinned memory, before it returns;
    `Pending.wait` waits for the ranks, and enqueues the copy to the device.

    Args:
        comm: an mpi4py communicator, of which this one has a duplicate, so that messages do not mix; None for all
            processes of the job.
        device: a device or its name; None for the default one. One GPU for each rank: ``f"cuda:{local_rank()}"``.
        cuda_aware: whether MPI is given addresses of device memory. The MPI must be built for that, and those that pip
            installs are not: they would crash. The stream is synchronised before every call.
        timeout: seconds that a rank waits for the others before it raises a DistributedError; > 0.

    Raises:
        DeviceError: mpi4py or an MPI is missing.
    """

    def __init__(
        self,
        comm: Any = None,
        device: str | Device | None = None,
        *,
        cuda_aware: bool = False,
        timeout: float = TIMEOUT,
    ) -> None:
        if not timeout > 0:
            raise ArgumentValueError("timeout", "must be above 0 seconds", timeout, "pass a larger number")
        self._mpi = mpi_module()
        self._comm = (self._mpi.COMM_WORLD if comm is None else comm).Dup()
        self._timeout = timeout
        super().__init__(self._comm.Get_rank(), self._comm.Get_size(), find_device(device))
        self._is_direct = cuda_aware
        self._memory: Device = self.device if cuda_aware else host_device()  # which MPI is given arrays of

    def barrier(self) -> None:
        """Wait until all ranks are here, and before that for the device."""
        self.device.synchronize()
        self._complete(self._comm.Ibarrier())

    def abort(self) -> None:
        """End all processes of the communicator; MPI's launcher ends the whole job."""
        self._comm.Abort(1)

    def close(self) -> None:
        """Wait for what has begun, and free the duplicate."""
        super().close()
        if self._comm != self._mpi.COMM_NULL:
            self._comm.Free()

    def _reduce_scatter(self, send: Array, recv: Array) -> Finish:
        return self._run(self._comm.Ireduce_scatter_block, send, recv)

    def _all_reduce(self, send: Array, recv: Array) -> Finish:
        return self._run(self._comm.Iallreduce, send, recv)

    def _all_gather(self, send: Array, recv: Array) -> Finish:
        return self._run(self._comm.Iallgather, send, recv, self.rank * send.nbytes)

    def _all_to_all(self, send: Array, recv: Array, send_counts: list[int], recv_counts: list[int]) -> Finish:
        def begin(send: Any, recv: Any) -> Any:
            there, here = (send_counts, offsets(send_counts)), (recv_counts, offsets(recv_counts))
            return self._comm.Ialltoallv([send, there], [recv, here])

        return self._run(begin, send, recv)

    def _broadcast(self, array: Array, root: int) -> Finish:
        begin = partial(self._comm.Ibcast, root=root)
        if self.rank == root:
            sent = self._outgoing(array)
            return partial(self._complete, begin(sent))
        return self._run(lambda _, recv: begin(recv), array[:0], array)

    def _run(self, begin: Callable[[Any, Any], Any], send: Array, recv: Array, own_part: int = 0) -> Finish:
        """Begin an operation.

        Args:
            begin: of MPI: takes two arrays, or IN_PLACE and an array, and returns a request.
            send: what it reads.
            recv: what it writes.
            own_part: where in `recv` this rank's input begins, in bytes, if it is there.
        """
        sent = self._outgoing(send)
        landing = None if self._is_direct else self.device.landing(recv)
        target = recv if landing is None else landing.array
        is_inside = self._memory.address(sent) == self._memory.address(target) + own_part
        request = begin(self._mpi.IN_PLACE if is_inside and target.size else sent, target)

        def finish() -> None:
            self._complete(request)
            if landing is not None:
                landing.land()

        return finish

    def _outgoing(self, array: Array) -> Array:
        """An array's contents where MPI may read them, once they are there."""
        if self._is_direct:
            self.device.synchronize()
            return array
        return self.device.snapshot([array], lasting=False).read()[0]

    def _complete(self, request: Any) -> None:
        """Wait for a request. MPI's own wait knows no end, and hears of no signal."""
        begin = time.monotonic()
        try:
            while not request.Test():
                waited = time.monotonic() - begin
                if waited > self._timeout:
                    raise DistributedError(
                        f"rank {self.rank} of {self.size}",
                        f"must hear from the others within {self._timeout:g} s",
                        f"{waited:.0f} s",
                        "look for a rank that is stopped, slow or at another operation, or raise timeout",
                    )
                # MPI moves messages only while it is asked; ranks that share a processor let each other work.
                os.sched_yield() if waited < _EAGER_SECONDS else time.sleep(1e-4)
        except self._mpi.Exception as error:
            raise DistributedError("MPI", "must move messages", error, "look for a rank that has died") from error
