"""What a client reads is whole: as it was between two steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from gpu_adam.devices.sharing import HostSharedMemory
from gpu_adam.service import remote_optimizer as remote_module
from gpu_adam.service.sequence import NBYTES, StepSequence
from service.running import InThread

Serve = Callable[..., InThread]

LARGE = """
[optimizer.main]
config = {learning_rate = 1.0}
[optimizer.main.variables]
w = {shape = [300_000]}
b = {shape = [2]}
"""


@pytest.mark.parametrize("by", ["client", "server"])
def test_whole_while_steps_are_made(serve: Serve, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "server":
        monkeypatch.setattr(StepSequence, "whole", lambda self, copy, seconds: None)
    service = serve(LARGE)
    reading, stepping = service.optimizer(), service.optimizer()
    is_over = threading.Event()

    def step() -> None:
        while not is_over.is_set():
            with stepping.gradients() as given:
                given["w"][...], given["b"][...] = 1, 1

    thread = threading.Thread(target=step)
    thread.start()
    try:
        seen, end = set(), time.monotonic() + 0.8
        while time.monotonic() < end:
            with reading.snapshot() as done:
                w, b = reading.variables["w"].numpy(), reading.variables["b"].numpy()
            seen.add(done)
            assert (w == b[0]).all(), "both are of the same step, and whole"
            alone = reading.variables["w"].numpy()
            assert (alone == alone[0]).all()
    finally:
        is_over.set()
        thread.join()
    assert len(seen) > 3


def test_values_are_copies_that_stay(serve: Serve) -> None:
    service = serve()
    main = service.optimizer()
    b = main.variables["b"]
    before = b.value
    assert b.value is before, "no step, no copy"
    with pytest.raises(ValueError, match="read-only"):
        before += 1
    own = b.numpy()
    own += 1
    main.apply_gradients([(np.ones(4, np.float32), b)])
    assert not before.any()
    assert (b.value < 0).all()
    np.testing.assert_array_equal(b.live, b.value)
    assert not b.live.flags.writeable


def test_it_computes_like_a_local_variable(serve: Serve) -> None:
    main = serve().optimizer()
    w, b = main.variables["w"], main.variables["b"]
    main.apply_gradients([(np.ones((6, 4), np.float32), w), (np.ones(4, np.float32), b)])
    local_w, local_b = w.numpy(), b.numpy()
    np.testing.assert_array_equal(w + 2 * b, local_w + 2 * local_b)
    np.testing.assert_array_equal(np.exp(w).sum(0), np.exp(local_w).sum(0))
    np.testing.assert_array_equal(w[1:3, 0], local_w[1:3, 0])
    np.testing.assert_array_equal(w.gather([2, 2]), local_w[[2, 2]])
    np.testing.assert_array_equal(np.asarray(w.T @ w), local_w.T @ local_w)
    assert (w.name, w.shape, w.dtype, w.size, len(w)) == ("w", (6, 4), np.float32, 24, 6)


def test_a_snapshot_does_not_change_in_its_block(serve: Serve) -> None:
    service = serve()
    main, other = service.optimizer(), service.optimizer()
    b = main.variables["b"]
    with main.snapshot() as done:
        assert done == 0
        other.apply_gradients([(np.ones(4, np.float32), other.variables["b"])])
        assert not b.numpy().any()
        assert main.iterations == 1
    assert b.numpy().any()


def test_a_snapshot_inside_of_another_is_the_same(serve: Serve) -> None:
    service = serve()
    main, other = service.optimizer(), service.optimizer()
    b, c = main.variables["b"], other.variables["b"]
    with main.snapshot():
        other.apply_gradients([(np.ones(4, np.float32), c)])
        with main.snapshot() as done:
            assert done == 0
        main.minimize(lambda: (b * b).sum() + b.sum(), [b])
        assert not b.numpy().any()
    assert main.staleness == 1
    assert b.numpy().any()


def test_a_reader_that_finds_no_time_has_the_service_copy(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    service = serve()
    main = service.optimizer()
    main.apply_gradients([(np.ones(4, np.float32), main.variables["b"])])
    monkeypatch.setattr(remote_module, "_READ_SECONDS", 0.001)
    words = service.server.optimizers["main"]._sequence._words
    words[0] += np.uint64(1)  # as if a step never ended
    np.testing.assert_allclose(main.variables["b"].numpy(), -0.01, rtol=1e-4)
    words[0] += np.uint64(1)


def test_the_sequence_counter() -> None:
    memory = HostSharedMemory(NBYTES, read_only=False)
    writer, reader = StepSequence(memory.array), StepSequence(memory.array)
    assert reader.whole(lambda: "x", 0) == ("x", 0, 0)
    writer.begin()
    assert reader.whole(lambda: "x", 0.001) is None
    writer.end(7)
    assert reader.whole(lambda: "x", 0) == ("x", 7, 2)
    copies = iter(range(3))

    def disturbed() -> int:
        number = next(copies)
        if number < 2:
            writer.begin()
            writer.end(7)
        return number

    assert reader.whole(disturbed, 10) == (2, 7, 6)
