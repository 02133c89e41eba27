"""A training that is resumed from a file at any step ends with the bits of the one that never stopped."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from snapshots import snapshot

import gpu_adam
from gpu_adam import ExponentialDecay, IndexedSlices, LossScale, Variable
from gpu_adam.devices import Device, find_device

STEPS = 50
SHAPES: dict[str, tuple[int, ...]] = {"table": (4, 2), "half": (5,), "brain": (3,), "vector": (2,)}
MIXED = {"table": "float32", "half": "float16", "brain": "bfloat16", "vector": "float32"}
CONFIGS: dict[str, dict[str, Any]] = {
    "masters, averages, scale": {
        "learning_rate": ExponentialDecay(0.1, 7, 0.8),
        "master_weights": True,
        "use_ema": True,
        "loss_scale": LossScale(4.0, 3),
        "clipnorm": 2.0,
        "weight_decay": 0.01,
    },
    "noise, amsgrad, overwriting": {
        "learning_rate": lambda: 0.05,
        "amsgrad": True,
        "stochastic_rounding": True,
        "seed": 11,
        "slot_dtype": "bfloat16",
        "use_ema": True,
        "ema_overwrite_frequency": 6,
        "decay": 0.01,
    },
}


class Training:
    """Dense and sparse variables, with groups; every fourth step takes accumulated gradients."""

    def __init__(self, device: Device, config: dict[str, Any]) -> None:
        self.device, self.optimizer = device, gpu_adam.Adam(**config)
        dtypes = dict.fromkeys(SHAPES, "bfloat16") if self.optimizer.flavour.stochastic_rounding else MIXED
        self.variables = [
            Variable(
                np.linspace(-1, 1, int(np.prod(shape))).reshape(shape), name=name, dtype=dtypes[name], device=device
            )
            for name, shape in SHAPES.items()
        ]
        self.optimizer.build(self.variables)
        self.optimizer.set_group(self.variables[2:], learning_rate_multiplier=0.5, beta_1=0.8)
        self.optimizer.exclude_from_weight_decay(self.variables[:1])

    def _pairs(self, dice: np.random.Generator, scale: float) -> list[Any]:
        gradients = [(dice.standard_normal(v.shape) * scale).astype(v.dtype) for v in self.variables]
        pairs: list[Any] = [(self.device.array(g), v) for g, v in zip(gradients, self.variables, strict=True)]
        rows = self.device.array(dice.integers(0, 4, size=3))
        values = self.device.array((dice.standard_normal((3, 2)) * scale).astype(self.variables[0].dtype))
        pairs[0] = (IndexedSlices(values, rows), self.variables[0])
        return pairs

    def step(self, number: int) -> None:
        """Do step `number`, which the host counts; with a loss scale every ninth is left out for an infinity."""
        dice = np.random.default_rng(number)
        scale = 4.0
        if number % 4 == 0:
            for _ in range(3):
                self.optimizer.accumulate(self._pairs(dice, scale))
            self.optimizer.apply_gradients()
            return
        pairs = self._pairs(dice, scale)
        if number % 9 == 0 and self.optimizer.flavour.skips:
            pairs[3] = (self.device.array(np.full(2, np.inf, np.float32)), self.variables[3])
        self.optimizer.apply_gradients(pairs)

    def everything(self) -> list[Any]:
        """Variables and state, to the bit."""
        weights, slots, variables = snapshot(self.optimizer, *self.variables)
        return [[contents for _, _, contents in weights], slots, variables]


@pytest.mark.long
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_step_may_be_the_last_of_a_program(device: Device, tmp_path: Path, name: str, asynchronous: bool) -> None:
    """One training goes on; after each of its steps another one begins from its file, and does the step after."""
    config, path = CONFIGS[name], tmp_path / "run.npz"
    one, resumed = Training(device, config), Training(device, config)
    for number in range(1, STEPS + 1):
        pending = one.optimizer.save(path, variables=True, asynchronous=asynchronous)
        one.step(number)
        if pending is not None:
            pending.wait()
        resumed = Training(device, config)
        resumed.optimizer.load(path, variables=True)
        resumed.step(number)
        assert resumed.everything() == one.everything(), number


@pytest.mark.parametrize("name", CONFIGS)
def test_a_program_that_is_stopped_now_and_then(device: Device, tmp_path: Path, name: str) -> None:
    """The resumed training is the one that is resumed again."""
    config, path = CONFIGS[name], tmp_path / "run.safetensors"
    one, other = Training(device, config), Training(device, config)
    for number in range(1, 14):
        one.step(number)
        other.step(number)
        if number in (1, 4, 5, 9, 12):
            other.optimizer.save(path, variables=True)
            other = Training(device, config)
            other.optimizer.load(path, variables=True)
    assert other.everything() == one.everything()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_moves_between_devices(gpu: Device, tmp_path: Path, name: str) -> None:
    """From the GPU to the host and back: the bits of a training that stays."""
    config, path = CONFIGS[name], tmp_path / "run.npz"
    host = find_device("host")
    stays, moves = Training(gpu, config), Training(gpu, config)
    for number, place in ((1, host), (2, gpu), (3, host), (4, gpu)):
        stays.step(number)
        moves.step(number)
        moves.optimizer.save(path, variables=True)
        moves = Training(place, config)
        moves.optimizer.load(path, variables=True)
    assert moves.everything() == stays.everything()
