"""Trainings that every rank knows: what it does itself, and what one process does with the gradients of all."""

from typing import Any

import numpy as np

import gpu_adam
from gpu_adam import Adam, IndexedSlices, Variable
from gpu_adam.communicators import Communicator, sum_dtype
from gpu_adam.devices import Device
from gpu_adam.distributed import DataParallelAdam
from gpu_adam.kernels import dtype_named

Array = np.ndarray[Any, np.dtype[Any]]

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "float32": [(7,), (3, 5), (), (0, 2)],
    "float64": [(11,)],
    "complex64": [(4,)],
    "bfloat16": [(9,), (2, 2)],
}
TABLE = (4, 3)  # so few rows that several ranks have gradients for the same one
LARGE = (2**20 + 3,)  # a bucket of its own

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"global_clipnorm": 0.1, "amsgrad": True, "weight_decay": 0.01},
    "each clipped": {"clipnorm": 0.2, "clipvalue": 0.1, "l2": 0.1, "use_ema": True},
    "masters": {"master_weights": True},
    "skips": {"skip_nonfinite": True, "global_clipnorm": 0.1},
}


def variables(device: Device, large: bool = False, kinds: tuple[str, ...] = tuple(SHAPES)) -> list[Variable]:
    """The variables of a model, the last one a table."""
    shapes = [(dtype, shape) for dtype in kinds for shape in SHAPES[dtype]]
    shapes += [("float32", LARGE)] * large
    made = [
        Variable(np.full(shape, 0.5 + place).astype(dtype_named(dtype)), name=f"{dtype}_{place}", device=device)
        for place, (dtype, shape) in enumerate(shapes)
    ]
    return [*made, Variable(np.ones(TABLE, np.float32), name="table", device=device)]


def gradients(rank: int, step: int, of: list[Variable]) -> list[Any]:
    """A rank's gradients for a step; with numbers that are not finite in step 2 of rank 1."""
    rng = np.random.default_rng([rank, step])
    found: list[Any] = []
    for variable in of[:-1]:
        numbers = rng.standard_normal(variable.shape) + (1j if variable.dtype.kind == "c" else 0)
        found.append((numbers if (rank, step) != (1, 2) else numbers * np.inf).astype(variable.dtype))
    count = int(rng.integers(0, 6)) if step else 0  # no rows in the first step
    values = rng.standard_normal((count, *TABLE[1:])).astype(np.float32)
    return [*found, IndexedSlices(values, rng.integers(0, TABLE[0], count).astype(np.int32))]


def on_device(gradient: Any, device: Device) -> Any:
    """A gradient in the device's memory."""
    if isinstance(gradient, IndexedSlices):
        return IndexedSlices(device.array(gradient.values), device.array(gradient.indices))
    return device.array(gradient)


def together(gradient: list[Any]) -> Any:
    """One gradient of all ranks': the sum in their order, or their slices behind each other."""
    if isinstance(gradient[0], IndexedSlices):
        return IndexedSlices(
            np.concatenate([each.values for each in gradient]), np.concatenate([each.indices for each in gradient])
        )
    total = gradient[0].astype(sum_dtype(gradient[0].dtype))
    for each in gradient[1:]:
        total = total + each
    return total


def steps_of_ranks(adam: Adam, rank: int, of: list[Variable], steps: int) -> list[Array]:
    """What the variables are after steps by a rank's own gradients."""
    for step in range(steps):
        own = [on_device(gradient, of[0].device) for gradient in gradients(rank, step, of)]
        adam.apply_gradients(list(zip(own, of, strict=True)))
    return [variable.numpy() for variable in of]


def steps_of_one(adam: Adam, ranks: int, of: list[Variable], steps: int) -> list[Array]:
    """The same by all ranks' gradients in one process."""
    for step in range(steps):
        with np.errstate(invalid="ignore"):
            all_of_them = zip(*(gradients(rank, step, of) for rank in range(ranks)), strict=True)
            added = [on_device(together(list(each)), of[0].device) for each in all_of_them]
        adam.apply_gradients(list(zip(added, of, strict=True)), grad_scale=ranks)
    return [variable.numpy() for variable in of]


def same(found: list[Array], expected: list[Array], what: object) -> None:
    """Raise where arrays have other bits."""
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.tobytes() == other.tobytes(), (what, number, one, other)


def check(communicator: Communicator, steps: int = 6, large: bool = False) -> None:
    """Train with every configuration; raise where the bits are not those of one process."""
    device = communicator.device
    for name, config in CONFIGS.items():
        kinds = ("float32", "bfloat16") if "master_weights" in config else tuple(SHAPES)
        mine, theirs = variables(device, large, kinds), variables(device, large, kinds)
        adam = DataParallelAdam(communicator, 0.1, deterministic=True, **config)
        found = steps_of_ranks(adam, communicator.rank, mine, steps)
        alone = Adam(0.1, **config)
        same(found, steps_of_one(alone, communicator.size, theirs, steps), name)
        assert int(adam.iterations.numpy()) == int(alone.iterations.numpy()), name
        same(list(adam.export().values()), list(alone.export().values()), name)


def check_default(communicator: Communicator) -> None:
    """Train by sums of the engine's order: the same bits in all ranks, near those of one process."""
    device, ranks = communicator.device, communicator.size
    mine, theirs = variables(device), variables(device)
    found = steps_of_ranks(DataParallelAdam(communicator, 0.1), communicator.rank, mine, 2)
    for one, other in zip(found, steps_of_one(Adam(0.1), ranks, theirs, 2), strict=True):
        np.testing.assert_allclose(one.astype(complex), other.astype(complex), rtol=1e-4, atol=1e-4)
    for variable in mine:
        copy = device.array(variable.value)
        communicator.broadcast(copy).wait()
        assert device.numpy(copy).tobytes() == variable.numpy().tobytes(), variable.name


def check_accumulated(communicator: Communicator, **config: Any) -> None:
    """Accumulate in every rank, then step."""
    device, ranks = communicator.device, communicator.size
    mine, theirs = (variables(device)[:-1] for _ in range(2))
    adam = DataParallelAdam(communicator, 0.1, deterministic=True, **config)
    alone = Adam(0.1, **config)
    scale = 2 * ranks if config.get("accumulation", "mean") == "mean" else None
    for steps in ((3, 4), (5, 6)):
        every = [[gradients(rank, step, [*mine, mine[0]])[:-1] for step in steps] for rank in range(ranks)]
        for of_step in every[communicator.rank]:
            adam.accumulate(zip(map(device.array, of_step), mine, strict=True))
        adam.apply_gradients()
        sums = [[together(list(each)) for each in zip(*of_rank, strict=True)] for of_rank in every]
        added = [device.array(together(list(each))) for each in zip(*sums, strict=True)]
        alone.apply_gradients(list(zip(added, theirs, strict=True)), grad_scale=scale)
    same([variable.numpy() for variable in mine], [variable.numpy() for variable in theirs], "accumulated")


def check_loss_scale(communicator: Communicator) -> None:
    """A scale that follows what all ranks see."""
    device = communicator.device
    weights = Variable(np.ones(3, np.float32), device=device)
    adam = DataParallelAdam(communicator, 0.1, loss_scale=gpu_adam.LossScale(2.0**15, growth_interval=2))
    for step in range(4):
        gradient = np.full(
            3, np.inf if (communicator.rank, step) == (communicator.size - 1, 1) else 2.0**15, np.float32
        )
        adam.apply_gradients([(device.array(gradient), weights)])
    assert adam.loss_scale is not None
    assert (adam.skipped_steps, adam.loss_scale.value) == (1, 2.0**15)
    expected = Variable(np.ones(3, np.float32), device=device)
    alone = Adam(0.1)
    for scale in (1, 2, 2):  # of gradients, the scale being halved after the step that was left out
        alone.apply_gradients([(device.array(np.full(3, scale, np.float32)), expected)])
    assert weights.numpy().tobytes() == expected.numpy().tobytes()
