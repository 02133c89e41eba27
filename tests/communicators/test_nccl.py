"""NCCL: which calls it gets, on which stream, behind what, and what happens when it fails."""

import functools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import pytest

from gpu_adam.communicators import Nccl, nccl_version, ordered_sum, sum_dtype
from gpu_adam.communicators import nccl as module
from gpu_adam.communicators.base import SUMMED
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentValueError, DeviceError, DistributedError
from gpu_adam.kernels import dtype_named

from . import fake_nccl, operations

TYPES = {"float32": 7, "float64": 8, "complex64": 7, "complex128": 8, "int32": 2, "int64": 4, "uint64": 5}
"""NCCL's numbers of the types that it adds."""


class Library:
    """NCCL as the tests see it.

    Args:
        gpu: the device.
        fake: the module that takes CuPy's place.
    """

    def __init__(self, gpu: Device, fake: fake_nccl.Nccl) -> None:
        self.gpu, self.fake, self._made = gpu, fake, list[Nccl]()

    def communicator(self, rank: int = 1, size: int = 3, **options: Any) -> Nccl:
        """A new one, whose calls alone are in the log."""
        self._made.append(made := Nccl(fake_nccl.Comm(rank, size), self.gpu, **options))
        self.fake.log.clear()
        return made

    def close(self) -> None:
        """End the threads."""
        for made in self._made:
            made._is_closed.set()


@pytest.fixture
def nccl(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    from gpu_adam.devices import cuda  # noqa: PLC0415  (imports CuPy)

    fake = fake_nccl.Nccl(gpu.xp)
    monkeypatch.setattr(cuda, "nccl_module", lambda: fake)
    library = Library(gpu, fake)
    yield library
    library.close()


def test_one_rank(nccl: Library) -> None:
    """With which the stand-in is no stand-in."""
    with nccl.communicator(rank=0, size=1) as communicator:
        operations.check(communicator, (0, 1, 300))
    assert nccl.fake.log[-1] == ("destroy",)
    communicator.close()
    assert nccl.fake.log.count(("destroy",)) == 1
    nccl.fake.asynchronous_error = "asked after the end"
    assert communicator._trouble() is None


@pytest.mark.parametrize("rank", [0, 1])
def test_the_id_comes_from_rank_0(nccl: Library, rank: int) -> None:
    comm = fake_nccl.Comm(rank, 2)
    communicator = Nccl(comm, nccl.gpu)
    communicator._is_closed.set()
    own = [("get_unique_id",)] if rank == 0 else []
    assert nccl.fake.log == [*own, ("NcclCommunicator", 2, fake_nccl.ID, rank)]
    assert comm.asked == [(fake_nccl.ID if rank == 0 else None, 0)]


def moved(communicator: Nccl, send: Any, recv: Any, size: int) -> list[fake_nccl.Entry]:
    """The calls that exchange equal parts of `size` bytes between three ranks."""
    stream, address = communicator._stream.ptr, communicator.device.address
    sends = [("send", address(send) + peer * size, size, 1, peer, stream) for peer in range(3)]
    recvs = [("recv", address(recv) + peer * size, size, 1, peer, stream) for peer in range(3)]
    return [("groupStart",), *sends, *recvs, ("groupEnd",)]


@pytest.mark.parametrize("dtype", SUMMED)
def test_calls(nccl: Library, dtype: str) -> None:
    """Pointers, counts, types and the stream of every operation."""
    gpu, log = nccl.gpu, nccl.fake.log
    communicator, element = nccl.communicator(), dtype_named(dtype)
    stream, width = communicator._stream.ptr, element.itemsize
    assert stream not in (0, gpu.xp.cuda.get_current_stream().ptr)
    wide, part = gpu.zeros((3, 5), element), gpu.zeros((5,), element)
    to, own = gpu.address(wide), gpu.address(part)

    communicator.all_gather(part, wide).wait()
    assert log == [("allGather", own, to, 5 * width, 1, stream)]
    log.clear()
    communicator.all_gather(wide[1], wide).wait()
    assert log == [("allGather", to + 5 * width, to, 5 * width, 1, stream)]
    log.clear()
    communicator.broadcast(part, 2).wait()
    assert log == [("bcast", own, 5 * width, 1, 2, stream)]
    log.clear()
    other = gpu.zeros((3, 5), element)
    communicator.all_to_all(wide, other).wait()
    assert log == moved(communicator, wide, other, 5 * width)
    log.clear()

    total = gpu.zeros((5,), sum_dtype(element))
    communicator.reduce_scatter(wide, total).wait()
    whole = gpu.zeros((3, 5), sum_dtype(element))
    if dtype in TYPES:
        numbers = 5 * (2 if element.kind == "c" else 1)
        assert log == [("reduceScatter", to, gpu.address(total), numbers, TYPES[dtype], 0, stream)]
        log.clear()
        communicator.all_reduce(wide, whole).wait()
        assert log == [("allReduce", to, gpu.address(whole), 3 * numbers, TYPES[dtype], 0, stream)]
    else:  # numbers of 16 bits travel as they are, and are added here
        sends = [("send", to + peer * 10, 10, 1, peer, stream) for peer in range(3)]
        assert [entry for entry in log if entry[0] == "send"] == sends
        assert [entry[0] for entry in log] == ["groupStart", *["send"] * 3, *["recv"] * 3, "groupEnd"]
        log.clear()
        communicator.all_reduce(wide, whole).wait()
        last = gpu.address(whole)
        assert [entry for entry in log if entry[0] == "send"] == sends
        assert log[-1] == ("allGather", last + 20, last, 20, 1, stream)


def test_all_to_all_by_counts_leaves_empty_parts_out(nccl: Library) -> None:
    gpu, log = nccl.gpu, nccl.fake.log
    communicator = nccl.communicator()
    stream = communicator._stream.ptr
    send, recv = gpu.array(np.arange(12, dtype=np.float32).reshape(6, 2)), gpu.zeros((6, 2), np.dtype(np.float32))
    communicator.all_to_all(send, recv, [4, 2, 0], [2, 2, 2]).wait()
    begin, end = gpu.address(send), gpu.address(recv)
    assert log == [
        ("groupStart",),
        *[("send", begin, 32, 1, 0, stream), ("send", begin + 32, 16, 1, 1, stream)],
        *[("recv", end + 16 * peer, 16, 1, peer, stream) for peer in range(3)],
        ("groupEnd",),
    ]
    assert gpu.numpy(recv).tolist() == [[8, 9], [10, 11]] * 3


def test_nothing_is_moved_by_no_call(nccl: Library) -> None:
    communicator = nccl.communicator()
    for dtype in map(dtype_named, SUMMED):
        nothing, total = nccl.gpu.zeros((0,), dtype), nccl.gpu.zeros((0,), sum_dtype(dtype))
        communicator.all_gather(nothing, nothing).wait()
        communicator.all_to_all(nothing, nothing).wait()
        communicator.broadcast(nothing).wait()
        for ordered in (False, True):
            communicator.reduce_scatter(nothing, total, ordered=ordered).wait()
            communicator.all_reduce(nothing, total, ordered=ordered).wait()
    assert nccl.fake.log == []


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("is_other", [False, True])
def test_operations_come_behind_what_is_enqueued_and_before_what_waits(
    nccl: Library, emulation: Any, seed: int, is_other: bool
) -> None:
    """Whatever the driver does first: on the current stream, the default one or another."""
    gpu, xp, float32 = nccl.gpu, nccl.gpu.xp, np.dtype(np.float32)
    communicator = nccl.communicator()
    with emulation.asynchronous(seed=seed), xp.cuda.Stream(non_blocking=True) if is_other else xp.cuda.Stream.null:
        send, part, whole = gpu.zeros((300,), float32), gpu.zeros((100,), float32), gpu.zeros((300,), float32)
        summed, gathered = gpu.zeros((100,), float32), gpu.zeros((300,), float32)
        send += 2
        begun = [communicator.reduce_scatter(send, part), communicator.all_reduce(send, whole, ordered=True)]
        for pending in begun:
            pending.wait()
        send -= 7  # what was read is free
        ordered_sum(gpu, xp.stack([part, whole[:100]]), summed)
        communicator.all_gather(summed, gathered).wait()
        gathered += send
        assert gpu.numpy(gathered).tolist() == [7.0] * 300


@pytest.mark.parametrize("ordered", [False, True])
def test_waiting_does_not_hold_up_the_host(nccl: Library, emulation: Any, ordered: bool) -> None:
    communicator = nccl.communicator()
    x = nccl.gpu.zeros((300,), np.dtype(np.float32))
    communicator.all_reduce(x, x, ordered=ordered).wait()  # compiles
    emulation.reset()
    communicator.all_reduce(x, x, ordered=ordered).wait()
    assert not emulation.counters.syncs


def test_an_error_of_a_call_is_one_of_ours(nccl: Library) -> None:
    communicator, x = nccl.communicator(), nccl.gpu.zeros((3, 3), np.dtype(np.float32))
    nccl.fake.error = "unhandled system error"
    for begin in (functools.partial(communicator.all_reduce, x), functools.partial(communicator.all_to_all, x)):
        with pytest.raises(DistributedError, match=r"NCCL in rank 1 of 3 must reach .* \(got unhandled system error\)"):
            begin(nccl.gpu.zeros((3, 3), np.dtype(np.float32)))
    assert nccl.fake.group is None, "the group is ended"
    assert not communicator._under_way


def test_a_barrier_meets_errors_and_ends_in_time(nccl: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    class NeverDone:
        done = False

    communicator = nccl.communicator(timeout=0.2)
    communicator.barrier()
    begin = time.monotonic()
    monkeypatch.setattr(communicator, "_all_reduce", lambda *_: communicator._in_flight.append((NeverDone(), begin)))
    with pytest.raises(DistributedError, match=r"\(got no answer for \d+ s\)"):
        communicator.barrier()
    assert time.monotonic() - begin >= 0.2
    communicator._timeout, nccl.fake.asynchronous_error = 600, "remote process exited"
    with pytest.raises(DistributedError, match=r"\(got remote process exited\)"):
        communicator.barrier()


def test_a_thread_ends_the_job_where_the_host_waits(
    nccl: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    ended = threading.Event()

    def abort(self: Nccl) -> None:
        self._is_closed.set()
        ended.set()

    monkeypatch.setattr(Nccl, "abort", abort)
    nccl.communicator()
    assert not ended.wait(0.1)
    nccl.fake.asynchronous_error = "remote process exited"
    assert ended.wait(10)
    assert capsys.readouterr().err.endswith("set NCCL_DEBUG=INFO.\nRank 1 of 3 ends the job.\n")


BLOCKING: dict[str, Callable[[Nccl, Any], object]] = {
    "get_unique_id": lambda communicator, x: None,
    "NcclCommunicator": lambda communicator, x: None,
    "groupEnd": lambda communicator, x: communicator.all_to_all(x, x.copy()).wait(),
    "allReduce": lambda communicator, x: communicator.all_reduce(x, x).wait(),
    "destroy": lambda communicator, x: communicator.close(),
}
"""Calls of NCCL in which the host waits for the other ranks, and what makes them."""


@pytest.mark.parametrize("name", BLOCKING)
def test_a_call_that_does_not_return_ends_the_job(
    nccl: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """And frees nothing that it works with."""
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    statuses, fake, comm = list[int](), nccl.fake, fake_nccl.Comm(0, 1)

    def leave(status: int) -> None:
        statuses.append(status)
        fake.returns.set()

    monkeypatch.setattr(os, "_exit", leave)
    fake.blocking = name
    communicator = Nccl(comm, nccl.gpu, timeout=0.1)
    BLOCKING[name](communicator, nccl.gpu.zeros((3,), np.dtype(np.float32)))
    assert fake.returns.is_set()
    assert communicator._is_closed.wait(10)
    assert statuses == [1]
    assert 1 in comm.asked, "the launcher is told"
    assert ("abort",) not in fake.log
    words = r"NCCL in rank 0 of 1 must reach the other ranks \(got a call that has not returned for 0 s\); look for"
    assert re.match(words, capsys.readouterr().err)


def test_a_launcher_that_does_not_hand_on_the_id(
    nccl: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    ended, comm = threading.Event(), fake_nccl.Comm(1, 2)
    monkeypatch.setattr(os, "_exit", lambda status: ended.set())
    monkeypatch.setattr(comm, "bcast", lambda obj, root: (ended.wait(30), fake_nccl.ID)[1])
    Nccl(comm, nccl.gpu, timeout=0.1)
    assert ended.is_set()
    assert "NCCL in rank 1 of 2 must reach the other ranks (got a call that has" in capsys.readouterr().err


def test_nobody_watches_what_could_not_be_made(nccl: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> NoReturn:
        raise fake_nccl.NcclError("no such network")

    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(nccl.fake, "NcclCommunicator", fail)
    before = threading.active_count()
    with pytest.raises(DistributedError, match=r"\(got no such network\)"):
        Nccl(fake_nccl.Comm(1, 2), nccl.gpu)
    end = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_the_launcher_ends_the_job_or_else_this_process_ends(nccl: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(status: int) -> NoReturn:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    communicator = nccl.communicator()
    with pytest.raises(SystemExit, match="1"):
        communicator.abort()
    assert communicator._comm.asked[-1] == 1
    assert nccl.fake.log == [("abort",)]


def test_what_is_missing_is_named(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_adam.devices import cuda  # noqa: PLC0415  (imports CuPy)

    fake = fake_nccl.Nccl(gpu.xp)
    fake.available = False
    monkeypatch.setattr(cuda, "nccl_module", lambda: fake)
    with pytest.raises(DeviceError, match=r'needs CuPy and NCCL \(got no NCCL\); pip install "gpu-adam\[nccl13\]"'):
        Nccl(fake_nccl.Comm(0, 1), gpu)


def test_the_version(nccl: Library) -> None:
    assert nccl_version() == "2.27.7"


def test_the_module_is_found_or_says_that_it_is_not(gpu: Device) -> None:
    from gpu_adam.devices import cuda  # noqa: PLC0415  (imports CuPy)

    found = cuda.nccl_module()
    assert found.available in (False, True)
    if found.available:
        names = [name for name in vars(fake_nccl.Nccl) if name.startswith("NCCL_")]
        assert [getattr(found, name) for name in names] == [getattr(fake_nccl.Nccl, name) for name in names]


def test_arguments() -> None:
    with pytest.raises(ArgumentValueError, match=r"device must be a CUDA device .*got host"):
        Nccl(fake_nccl.Comm(0, 1), "host")
    with pytest.raises(ArgumentValueError, match="timeout must be above 0"):
        Nccl(fake_nccl.Comm(0, 1), "host", timeout=0)
