"""An optimizer that moves all rows at each step, and one that defers them, side by side."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from reference import Array, assert_same_bits

import gpu_adam
from gpu_adam import IndexedSlices, Variable
from gpu_adam.devices import Device
from gpu_adam.kernels import dtype_named

UPDATES = ("dense", "deferred")


class Twins:
    """Two optimizers that agree in all but `sparse_update`, each with variables of its own.

    Args:
        device: where.
        initial: the variables' values.
        learning_rate, config: of both optimizers.

    Attributes:
        variables: of the two optimizers.
    """

    def __init__(self, device: Device, initial: Sequence[Array], learning_rate: Any = 0.05, **config: Any) -> None:
        limits = {key: config.pop(key) for key in ("max_deferral",) if key in config}
        self.device = device
        self.optimizers = [
            gpu_adam.Adam(learning_rate, sparse_update=update, **config, **(limits if update == "deferred" else {}))
            for update in UPDATES
        ]
        self.variables = [
            [Variable(value, device=device, name=f"w{number}") for number, value in enumerate(initial)] for _ in UPDATES
        ]

    @property
    def pairs(self) -> list[tuple[gpu_adam.Adam, list[Variable]]]:
        """Each optimizer with its variables."""
        return list(zip(self.optimizers, self.variables, strict=True))

    def both(self, action: Callable[[gpu_adam.Adam, list[Variable]], Any]) -> list[Any]:
        """Do the same to both."""
        return [action(optimizer, variables) for optimizer, variables in self.pairs]

    def gradient(self, gradient: Any) -> Any:
        """An array as it is, (values, indices) as slices, on the device."""
        if isinstance(gradient, tuple):
            return IndexedSlices(*map(self.device.array, gradient))
        return self.device.array(gradient)

    def step(self, *gradients: tuple[Any, int], **options: Any) -> None:
        """A step of (gradient, number of the variable) pairs; a gradient is an array or (values, indices)."""
        ready = [(self.gradient(gradient), number) for gradient, number in gradients]
        done = self.both(lambda o, v: o.apply_gradients([(g, v[number]) for g, number in ready], **options))
        assert done[0] == done[1]

    @property
    def behind(self) -> int:
        """How many rows lack steps."""
        states: list[Any] = [variable._behind for variable in self.variables[1] if variable._behind is not None]
        missing = 0
        for behind in states:
            count = int(self.device.numpy(behind._log)[:8].view(np.int64)[0])
            missing += int((self.device.numpy(behind._last_step) < count).sum())
        return missing

    def check(self, what: str = "") -> None:
        """Compare all variables and weights to the bit."""
        for dense, deferred in zip(*self.variables, strict=True):
            assert_same_bits(deferred.numpy(), dense.numpy(), f"{dense.name} {what}")
        dense, deferred = (optimizer.export() for optimizer in self.optimizers)
        assert list(deferred) == list(dense)
        for name, weight in dense.items():
            assert_same_bits(deferred[name], weight, f"{name} {what}")


def numbers(rng: np.random.Generator, shape: Any, dtype: str) -> Array:
    """Normal ones; complex ones in a complex dtype."""
    values: Array = rng.standard_normal(shape)
    if np.dtype(dtype_named(dtype)).kind == "c":
        values = values + 1j * rng.standard_normal(shape)
    return values.astype(dtype_named(dtype))


def touches(kind: str, rng: np.random.Generator, rows: int, step: int) -> Array:
    """The rows with a gradient at a step; of the last kind: row 0 never, row 1 always, row 2 every 50th time."""
    if kind == "uniform":
        return rng.integers(0, rows, 4)
    if kind == "zipf":
        return np.minimum(rng.zipf(1.3, 6), rows) - 1
    if kind == "empty":
        return np.zeros(0, np.int64)
    assert kind == "adversarial"
    others = list(rng.integers(3, rows, step % 4)) if rows > 3 else []
    return np.array([1 % rows, *others, *([2 % rows] if step % 50 == 0 else []), 1 % rows])
