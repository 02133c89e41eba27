"""An optimizer on several ranks for tests: variables of all kinds, whose gradients every rank knows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import gpu_adam
from gpu_adam import Variable
from gpu_adam.communicators import Communicator
from gpu_adam.devices import Device
from gpu_adam.distributed import ShardedAdam
from gpu_adam.kernels import dtype_named

Kind = tuple[str, tuple[int, ...], str]

MIXED: tuple[Kind, ...] = (
    ("w", (100, 70), "float32"),
    ("b", (5,), "float32"),
    ("empty", (0, 3), "float32"),
    ("w", (3000, 11), "float32"),  # in several buckets' worth of pieces, and of the same name
    ("scalar", (), "float64"),
    ("field", (5000,), "complex64"),
)
HALF: tuple[Kind, ...] = (("matrix", (5000, 3), "bfloat16"), ("bias", (7,), "bfloat16"), ("scale", (11,), "float32"))
TABLES: tuple[Kind, ...] = (("table", (3000, 3), "float32"), ("b", (5,), "float32"), ("table", (2, 3), "float64"))
"""What is called "table" gets gradients of some of its rows. Of the second one not every rank owns a row."""


class Work(NamedTuple):
    """An optimizer and its variables."""

    optimizer: Any
    variables: list[Variable]

    def step(self, steps: Sequence[int], rank: int = 0) -> None:
        """Take the steps of these numbers."""
        for number in steps:
            rng = np.random.default_rng([number, rank])
            self.optimizer.apply_gradients([(_gradient(rng, variable), variable) for variable in self.variables])

    def values(self) -> list[bytes]:
        """The bytes of all variables."""
        return [variable.numpy().tobytes() for variable in self.variables]

    def state(self) -> dict[str, bytes]:
        """The bytes of what this rank has."""
        return {name: array.tobytes() for name, array in self.optimizer.export().items() if array.size}


def _gradient(rng: np.random.Generator, variable: Variable) -> Any:
    device, dtype = variable.device, variable.dtype
    if variable.name != "table":
        return device.array(np.asarray(rng.standard_normal(variable.shape)).astype(dtype))
    rows = rng.integers(len(variable), size=4)
    return gpu_adam.IndexedSlices(device.array(rng.standard_normal((4, 3)).astype(dtype)), device.array(rows))


def variables_of(kinds: Sequence[Kind], value: float, device: Device | str) -> list[Variable]:
    """Variables whose elements begin at a value."""
    return [
        Variable(np.full(shape, value).astype(dtype_named(dtype)), name=name, device=device)
        for name, shape, dtype in kinds
    ]


def sharded(communicator: Communicator, kinds: Sequence[Kind] = MIXED, value: float = 1.0, **config: Any) -> Work:
    """An optimizer of this rank, with its slots."""
    work = Work(
        ShardedAdam(communicator, 0.01, deterministic=True, bucket_bytes=40_000, **config),
        variables_of(kinds, value, communicator.device),
    )
    work.optimizer.build(work.variables, [variable for variable in work.variables if variable.name == "table"])
    return work


def alone(kinds: Sequence[Kind] = MIXED, value: float = 1.0, device: Device | str = "host", **config: Any) -> Work:
    """An optimizer by itself, with its slots."""
    work = Work(gpu_adam.Adam(0.01, **config), variables_of(kinds, value, device))
    work.optimizer.build(work.variables)
    return work
