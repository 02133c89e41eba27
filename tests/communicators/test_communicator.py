"""The interface: results of one rank, arguments that do not fit, sums in the order of ranks, contexts."""

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gpu_adam
from gpu_adam.communicators import Alone, Communicator, ordered_sum, sum_dtype
from gpu_adam.devices import Device, HostDevice
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.kernels import CHUNK, DTYPES, dtype_named

from . import operations

FLOAT32 = np.dtype(np.float32)


class Three(Alone):
    """Believes that there are two ranks more, for what is checked before anything moves."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.size, self.ended = 3, False

    def abort(self) -> None:
        """End nothing, but say so."""
        self.ended = True


def test_alone(device: Device) -> None:
    with Alone(device) as communicator:
        assert (communicator.rank, communicator.size, communicator.device) == (0, 1, device)
        operations.check(communicator, (0, 1, 5000) if device.name == "host" else (0, 300))
        assert repr(communicator) == f"<gpu_adam Alone: rank 0 of 1, {device.name}>"


def test_a_device_by_name() -> None:
    assert Alone("host").device is gpu_adam.get_device()


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("count", [1, 2, 5])
def test_sums_in_order_are_those_of_accumulated_gradients(device: Device, dtype: str, count: int) -> None:
    """With the same bits, denormal numbers and infinities too, on every device."""
    variable_dtype, size = dtype_named(dtype), CHUNK + 7
    rows = np.stack([operations.values(rank, size, variable_dtype) for rank in range(count)])
    real = np.finfo(np.float32 if sum_dtype(variable_dtype) == FLOAT32 else rows.real.dtype)
    rows[:, 1:4] = np.array([real.tiny / 4, -np.inf, real.tiny]).astype(variable_dtype)
    rows[-1, 3] = -rows[0, 3] * np.array(0.75, variable_dtype)
    total = device.empty(size, sum_dtype(variable_dtype))
    ordered_sum(device, device.array(rows), total)

    variable = gpu_adam.Variable(np.zeros(size, variable_dtype), device=device)
    adam = gpu_adam.Adam()
    for row in rows:
        adam.accumulate([(device.array(row), variable)])
    accumulated = adam._accumulator._sums[variable].value
    assert device.numpy(total).tobytes() == device.numpy(accumulated).tobytes()


@pytest.mark.parametrize("launch", [HostDevice(threads=3), HostDevice(threads=1, block_size=32)], ids=["3", "faithful"])
def test_sums_in_order_whatever_runs_them(launch: HostDevice) -> None:
    rows = np.stack([operations.values(rank, CHUNK + 7, FLOAT32) for rank in range(4)])
    memory = launch.empty(CHUNK + 8, FLOAT32)
    ordered_sum(launch, rows, total := memory[1:])  # at another offset from a 16-byte boundary than the rows
    assert total.tobytes() == operations.summed(list(rows)).tobytes()


def test_the_sum_of_nothing_launches_nothing(device: Device) -> None:
    total = device.empty(0, FLOAT32)
    ordered_sum(device, device.empty(0, FLOAT32).reshape(3, 0), total)


Call = Callable[[Communicator, Callable[..., Any], Any], object]

BAD: dict[str, tuple[str, Call]] = {  # what the message says; a call with three ranks, zeros(size, dtype) and zeros(6)
    "no array": ("send must be an array of", lambda c, zeros, x: c.all_reduce([1.0], x)),
    "truth values": ("send must have one of the dtypes", lambda c, zeros, x: c.all_gather(zeros(2, "?"), x)),
    "strided": ("recv must be C-contiguous", lambda c, zeros, x: c.all_reduce(zeros(3), x[::2])),
    "another dtype": ("recv must have the dtype of send", lambda c, zeros, x: c.all_gather(zeros(2, "f8"), x)),
    "rounded sum": ("of sums of float16, float32", lambda c, zeros, x: c.all_reduce(zeros(1, "f2"), zeros(1, "f2"))),
    "reduce_scatter": ("send must have 9 elements", lambda c, zeros, x: c.reduce_scatter(x, zeros(3))),
    "all_reduce": ("recv must have 6 elements", lambda c, zeros, x: c.all_reduce(x, zeros(5))),
    "all_gather": ("recv must have 6 elements", lambda c, zeros, x: c.all_gather(zeros(2), zeros(5))),
    "overlap": ("recv must not overlap send", lambda c, zeros, x: c.reduce_scatter(x, x[:2])),
    "in part": ("recv must not overlap send", lambda c, zeros, x: c.all_reduce(x[:4], x[1:5])),
    "another's part": ("recv must not overlap send", lambda c, zeros, x: c.all_gather(x[2:4], x)),
    "in place": ("recv must not overlap send", lambda c, zeros, x: c.all_to_all(x, x)),
    "shape": ("recv must have the shape of send", lambda c, zeros, x: c.all_to_all(zeros(6).reshape(3, 2), x)),
    "odd": ("send_counts must be 3 lengths", lambda c, zeros, x: c.all_to_all(zeros(7), x)),
    "sum": ("recv_counts must be 3 .* up to 6", lambda c, zeros, x: c.all_to_all(zeros(6), x, None, [1, 2, 4])),
    "negative": ("none negative", lambda c, zeros, x: c.all_to_all(zeros(6), x, [7, -1, 0])),
    "few": ("send_counts must be 3 lengths", lambda c, zeros, x: c.all_to_all(zeros(6), x, [6])),
    "root": ("root must be one of 3 ranks", lambda c, zeros, x: c.broadcast(x, 3)),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_arguments_begin_nothing(device: Device, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message, call = BAD[name]
    begun: list[object] = []
    for engine in ("_reduce_scatter", "_all_reduce", "_all_gather", "_all_to_all", "_broadcast"):
        monkeypatch.setattr(Three, engine, lambda *arguments: begun.append(arguments))
    communicator = Three(device)

    def zeros(size: int, dtype: str = "f4") -> Any:
        return device.zeros((size,), np.dtype(dtype))

    with pytest.raises((ArgumentTypeError, ArgumentValueError), match=message):
        call(communicator, zeros, zeros(6))
    assert not begun
    assert not communicator._under_way


def test_what_lies_on_another_device_is_refused(gpu: Device) -> None:
    with pytest.raises(
        ArgumentTypeError, match=re.escape("send must be an array of the communicator's device, cuda:0")
    ):
        Alone(gpu).all_reduce(np.zeros(1), gpu.zeros((1,), np.dtype(np.float64)))


def test_a_pending_operation_keeps_its_arrays_and_closing_waits_for_it() -> None:
    communicator, finished = Alone("host"), list[int]()
    pending = communicator.begun(functools.partial(finished.append, 1))
    assert communicator._under_way
    communicator.close()
    assert finished == [1]
    pending.wait()
    assert finished == [1]
    assert not communicator._under_way


def test_an_operation_that_fails_is_still_under_way() -> None:
    communicator = Alone("host")
    pending = communicator.begun(functools.partial(int, "x"))
    for _ in range(2):
        with pytest.raises(ValueError, match="invalid literal"):
            pending.wait()
    assert list(communicator._under_way) == [pending]


ENDINGS = [(ValueError("mine"), True), (KeyboardInterrupt(), True), (SystemExit(3), True), (SystemExit(0), False)]


@pytest.mark.parametrize(("error", "ends"), ENDINGS)
def test_a_context_ends_the_job(error: BaseException, ends: bool, capsys: pytest.CaptureFixture[str]) -> None:
    communicator = Three(gpu_adam.get_device())
    with pytest.raises(type(error)), communicator:
        raise error
    assert communicator.ended == ends
    printed = capsys.readouterr().err
    assert printed.endswith("Rank 0 of 3 ends the job.\n") == ends
    assert ("in test_a_context_ends_the_job" in printed) == ends


def test_alone_a_context_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Alone, "abort", lambda self: pytest.fail("a process alone has nobody to wake"))
    with pytest.raises(ValueError, match="mine"), Alone("host"):
        raise ValueError("mine")
