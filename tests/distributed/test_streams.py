"""One rank on each device, and what NCCL is asked for in a step: in which order, on which stream, behind what."""

from typing import Any

import numpy as np
import pytest
from communicators.test_nccl import Library, nccl

from gpu_adam import Variable
from gpu_adam.communicators import Alone, Communicator
from gpu_adam.communicators import nccl as nccl_module
from gpu_adam.devices import Device
from gpu_adam.distributed import ShardedAdam

from . import equality

__all__ = ["nccl"]

SHAPES = [(100, 70), (5,), (5000,), (), (17, 300)]
BUCKET_BYTES = 20_000
"""Which makes three buckets."""


@pytest.fixture(autouse=True)
def _nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """At streams from another thread, while a driver that is emulated goes through them."""
    monkeypatch.setattr(nccl_module, "_POLL_SECONDS", 1000.0)


def check(communicator: Communicator, name: str) -> None:
    """A case, whose rank is alone, has the bits of a process that is alone."""
    digests, slots, expected, (expected_slots,) = equality.compare(communicator, [name])[name]
    assert len(digests) > 2
    assert digests == expected
    assert slots == expected_slots


@pytest.mark.parametrize(
    "name", [n if n in equality.SOME else pytest.param(n, marks=pytest.mark.thorough) for n in equality.CASES]
)
def test_one_rank(device: Device, name: str) -> None:
    check(Alone(device), name)


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize("name", ["clipped together", "masters", "mixed, skipped", "averages", "any order", "added"])
def test_one_rank_of_nccl_whatever_the_driver_does_first(
    nccl: Library, emulation: Any, name: str, seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equality, "FEW", 5)
    communicator = nccl.communicator(rank=0, size=1)
    with emulation.asynchronous(seed=seed):
        check(communicator, name)
    communicator.close()


def training(communicator: Communicator, **options: Any) -> tuple[ShardedAdam, list[Any]]:
    """An optimizer that has made two steps, and its pairs."""
    device = communicator.device
    optimizer = ShardedAdam(communicator, 0.1, bucket_bytes=BUCKET_BYTES, **options)
    arrays = [equality.numbers([number], shape, "float32") for number, shape in enumerate(SHAPES)]
    pairs = [(device.array(array), Variable(array, device=device)) for array in arrays]
    for _ in range(2):
        optimizer.apply_gradients(pairs)
    return optimizer, pairs


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ({}, []),
        ({"clipvalue": 1.0}, []),
        ({"global_clipnorm": 1.0}, ["allGather"]),
        ({"clipnorm": 1.0}, ["allGather"] * 3),
        ({"skip_nonfinite": True, "global_clipnorm": 1.0}, ["allGather", "allReduce"]),
    ],
)
def test_the_calls_of_a_step(nccl: Library, rank: int, options: dict[str, Any], measured: list[str]) -> None:
    """Gradients of the last bucket first; what is measured over all; each bucket's parameters, once it is updated."""
    gpu, log = nccl.gpu, nccl.fake.log
    communicator = nccl.communicator(rank=rank)
    optimizer, pairs = training(communicator, **options)
    shards: list[Any] = list(optimizer._shards.shards)
    stream = communicator._stream.ptr
    assert len(shards) == 3
    log.clear()
    optimizer.apply_gradients(pairs)
    arrive = [
        ("reduceScatter", gpu.address(x._to_send), gpu.address(x._received), x.bucket.shard, 7, 0, stream)
        for x in reversed(shards)
    ]
    depart = []
    for shard in shards:
        begin, nbytes = gpu.address(shard.parameters), 4 * shard.bucket.shard
        depart.append(("allGather", begin + rank * nbytes, begin, nbytes, 1, stream))
    assert log[:3] == arrive
    assert [entry[0] for entry in log[3:-3]] == measured
    assert all(entry[-1] == stream for entry in log)
    assert log[-3:] == depart


def test_a_bucket_travels_when_its_last_gradient_and_those_of_later_ones_are_here(nccl: Library) -> None:
    communicator = nccl.communicator()
    optimizer, pairs = training(communicator)
    log = nccl.fake.log
    begun = []
    log.clear()
    for number in (0, 1, 3, 4, 2):  # the buckets are [0], [1, 2] and [3, 4]
        optimizer.push_gradient(pairs[number][1], pairs[number][0])
        begun.append(len(log))
    assert begun == [0, 0, 0, 1, 3]
    assert optimizer.apply_gradients() == 3
    assert [entry[0] for entry in log] == ["reduceScatter"] * 3 + ["allGather"] * 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_clipnorm": 1.0},
        {"clipnorm": 1.0, "use_ema": True},
        {"skip_nonfinite": True},
        {"deterministic": True, "global_clipnorm": 1.0},
    ],
)
def test_a_step_waits_for_nothing(nccl: Library, emulation: Any, options: dict[str, Any]) -> None:
    """Nor does it ask for memory, but where the sums are ordered."""
    optimizer, pairs = training(nccl.communicator(), **options)
    nccl.gpu.synchronize()
    nccl.fake.log.clear()
    emulation.reset()
    with emulation.asynchronous():
        optimizer.apply_gradients(pairs)
        counters = emulation.counters
        assert counters.syncs == []
        assert counters.d2h == 0
        if "deterministic" not in options:
            assert counters.allocations == len(nccl.fake.log), "those of the stand-in, one for each call"
            assert counters.h2d <= ("skip_nonfinite" in options)  # the scalars of a step that may be left out
    nccl.gpu.synchronize()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("is_other", [False, True])
def test_others_parameters_come_before_what_is_enqueued_next(
    nccl: Library, emulation: Any, seed: int, ordered: bool, is_other: bool
) -> None:
    """On the null stream or another one, with gradients that the caller overwrites at once."""
    xp, gpu = nccl.gpu.xp, nccl.gpu

    def outcome() -> list[bytes]:
        with xp.cuda.Stream(non_blocking=True) if is_other else xp.cuda.Stream.null:
            optimizer, pairs = training(nccl.communicator(), deterministic=ordered, global_clipnorm=1.0)
            for _ in range(2):
                optimizer.apply_gradients(pairs)
                copies = [variable.value + np.float32(0) for _, variable in pairs]
                for gradient, variable in pairs:
                    gradient[...] = gradient * np.float32(0.5)
                    variable.assign(variable.value * np.float32(0.5))
            return [gpu.numpy(array).tobytes() for array in copies]

    expected = outcome()
    with emulation.asynchronous(seed=seed):
        assert outcome() == expected
