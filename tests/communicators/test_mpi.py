"""MPI: real processes on the host, jobs that fail, and what CUDA's arrays go through."""

import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_adam.communicators import Mpi, mpi_version
from gpu_adam.communicators import mpi as module
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentValueError, DeviceError, DistributedError
from gpu_adam.kernels import dtype_named

from . import jobs, operations

OPERATIONS = """
from communicators import operations
from gpu_adam.communicators import Mpi, local_rank
with Mpi() as communicator:
    assert local_rank() == communicator.rank, "all processes are on one machine"
    operations.check(communicator)
print("done", communicator.rank, flush=True)
"""

FAILING = """
import os, signal, sys, time
import numpy as np
from gpu_adam.communicators import Mpi
x = np.ones(100_000, np.float32)
with Mpi(timeout={timeout}) as communicator:
    print("process", os.getpid(), flush=True)
    for step in range(10**9):
        if step == 20 and communicator.rank == 1:
            {fails}
        communicator.all_reduce(x, x).wait()
        x[:] = 1
"""


@pytest.mark.parametrize("ranks", [1, 3, *(pytest.param(ranks, marks=pytest.mark.thorough) for ranks in (2, 4, 7))])
def test_operations(ranks: int, tmp_path: Path) -> None:
    ended = jobs.run(tmp_path, ranks, OPERATIONS)
    assert ended.status == 0, ended
    assert sorted(ended.out.split()) == sorted([*map(str, range(ranks)), *["done"] * ranks]), ended


@pytest.mark.parametrize(
    ("fails", "timeout", "words"),
    [
        ("raise ValueError('of its own')", 600, ["ValueError: of its own", "Rank 1 of 3 ends the job."]),
        ("sys.exit(3)", 600, ["SystemExit: 3", "Rank 1 of 3 ends the job."]),
        ("os.kill(os.getpid(), signal.SIGKILL)", 600, []),
        ("os.kill(os.getpid(), signal.SIGSTOP)", 1, ["must hear from the others within 1 s", "ends the job."]),
        ("time.sleep(10**4)", 1, ["must hear from the others within 1 s", "ends the job."]),
    ],
    ids=["raises", "exits", "is killed", "is stopped", "sleeps"],
)
def test_a_rank_that_fails_ends_the_job(fails: str, timeout: float, words: list[str], tmp_path: Path) -> None:
    begin = time.monotonic()
    ended = jobs.run(tmp_path, 3, FAILING.format(fails=fails, timeout=timeout))
    assert time.monotonic() - begin < jobs.SECONDS / 2
    assert ended.status != 0
    assert all(word in ended.err for word in words), ended
    if timeout > 1:
        assert ended.err.count("Traceback") == len(words) // 2, "only the rank that failed says so"
    found = [int(process) for process in re.findall(r"process (\d+)", ended.out)]
    assert len(found) == 3
    deadline = time.monotonic() + 10
    while any(map(jobs.is_alive, found)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(jobs.is_alive, found)), "a process is left behind"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    with pytest.raises(DeviceError, match=r'needs mpi4py and an MPI .*pip install "gpu-adam\[mpi\]"'):
        Mpi()


def test_the_version_is_found_out_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.launcher()
    assert re.match(r"mpi4py \d+\.\d+\S* \S.*\d", mpi_version())
    (tmp_path / "mpi4py.py").write_text("raise ImportError('libmpi.so: cannot open')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DeviceError, match=r"got ImportError: libmpi.so: cannot open\); pip install"):
        mpi_version()


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_is_above_zero(timeout: float) -> None:
    with pytest.raises(ArgumentValueError, match="timeout must be above 0"):
        Mpi(timeout=timeout)


# What MPI is given: by a fake that says so, and does the work of one rank.


class Request:
    """Done at the third question."""

    def __init__(self, log: list[tuple[Any, ...]]) -> None:
        self._log, self._questions = log, 0

    def Test(self) -> bool:  # noqa: N802  (MPI's name)
        """Whether it is done."""
        self._questions += 1
        if self._questions == 3:
            self._log.append(("done",))
        return self._questions >= 3


class Comm:
    """One rank of MPI, with a log."""

    def __init__(self, log: list[tuple[Any, ...]], copies: bool) -> None:
        self.log, self._copies = log, copies

    def Dup(self) -> "Comm":  # noqa: N802
        """Itself."""
        return self

    def Get_rank(self) -> int:  # noqa: N802
        """The only one."""
        return 0

    def Get_size(self) -> int:  # noqa: N802
        """One."""
        return 1

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Request:
            arrays = [argument[0] if isinstance(argument, list) else argument for argument in arguments]
            self.log.append((name, *arrays, *options.items()))
            if self._copies and len(arrays) == 2 and not isinstance(arrays[0], str):
                arrays[1][...] = arrays[0]
            return Request(self.log)

        return call


class MpiError(Exception):
    """An error of MPI."""


class Module:
    """What is used of mpi4py.MPI."""

    IN_PLACE, COMM_NULL, Exception = "in place", None, MpiError


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    monkeypatch.setattr(module, "mpi_module", lambda: Module)
    return []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex128", "int64"])
def test_arrays_of_the_device_travel_through_host_memory(
    device: Device, dtype: str, log: list[tuple[Any, ...]]
) -> None:
    communicator = Mpi(Comm(log, copies=True), device)
    values = operations.values(0, 500, dtype_named(dtype))
    send, recv = device.array(values), device.zeros((500,), values.dtype)
    pending = communicator.all_gather(send, recv)
    assert [entry[0] for entry in log] == ["Iallgather"], "begun, and not waited for"
    assert all(isinstance(array, np.ndarray) for array in log[0][1:])
    assert log[0][1].tobytes() == values.tobytes()
    pending.wait()
    assert [entry[0] for entry in log] == ["Iallgather", "done"]
    assert device.numpy(recv).tobytes() == values.tobytes()
    if device.name == "host":
        assert np.shares_memory(log[0][2], recv), "MPI works on the array itself"


def test_many_operations_take_pinned_memory_only_while_they_are_under_way(
    device: Device, log: list[tuple[Any, ...]]
) -> None:
    communicator = Mpi(Comm(log, copies=True), device)
    arrays = [device.array(operations.values(k, 300, np.dtype(np.float32))) for k in range(20)]
    targets = [device.zeros((300,), np.dtype(np.float32)) for _ in arrays]
    for send, recv in zip(arrays, targets, strict=True):
        communicator.all_to_all(send, recv).wait()
    for send, recv in zip(arrays, targets, strict=True):
        assert device.numpy(recv).tobytes() == device.numpy(send).tobytes()


def test_on_the_host_what_is_in_place_stays_there(log: list[tuple[Any, ...]]) -> None:
    communicator, x = Mpi(Comm(log, copies=True), "host"), np.ones(3)
    communicator.all_reduce(x, x).wait()
    communicator.all_gather(x, x).wait()
    assert [entry[:2] for entry in log if entry[0] != "done"] == [
        ("Iallreduce", "in place"),
        ("Iallgather", "in place"),
    ]


def test_an_mpi_that_knows_cuda_is_given_device_memory_behind_the_stream(
    gpu: Device, log: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    communicator = Mpi(Comm(log, copies=False), gpu, cuda_aware=True)
    monkeypatch.setattr(gpu, "synchronize", lambda: log.append(("synchronize",)), raising=False)
    send, recv = gpu.zeros((4,), np.dtype(np.complex64)), gpu.zeros((4,), np.dtype(np.complex64))
    communicator.reduce_scatter(send, recv).wait()
    communicator.all_reduce(recv, recv).wait()
    communicator.broadcast(send).wait()
    assert [entry[0] for entry in log] == [
        *("synchronize", "Ireduce_scatter_block", "done"),
        *("synchronize", "Iallreduce", "done"),
        *("synchronize", "Ibcast", "done"),
    ]
    scatter, reduce, broadcast = (entry for entry in log if entry[0].startswith("I"))
    assert [gpu.address(array) for array in scatter[1:]] == [gpu.address(send), gpu.address(recv)]
    assert [array.dtype.name for array in scatter[1:]] == ["float32", "float32"], "complex numbers are added by parts"
    assert (reduce[1], gpu.address(reduce[2])) == ("in place", gpu.address(recv))
    assert gpu.address(broadcast[1]) == gpu.address(send)
    assert broadcast[2] == ("root", 0)


def test_an_error_of_mpi_is_one_of_ours(log: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Request) -> bool:
        raise MpiError("process failed")

    monkeypatch.setattr(Request, "Test", fail)
    communicator = Mpi(Comm(log, copies=True), "host")
    with pytest.raises(DistributedError, match=r"MPI must move messages \(got process failed\)"):
        communicator.barrier()
