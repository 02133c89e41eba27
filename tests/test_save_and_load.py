"""Adam.save and Adam.load: what continues from a file has the bits of what never stopped; other files are refused."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import assert_same_bits
from snapshots import unchanged

import gpu_adam
from gpu_adam import ExponentialDecay, IndexedSlices, Variable
from gpu_adam.devices import Device
from gpu_adam.errors import CheckpointError
from gpu_adam.state import checkpoint

SHAPES = [(3, 2), (0, 3), ()]


class Training:
    """Three variables whose gradients depend on the step."""

    def __init__(self, device: Device, start: list[Any] | None = None, **config: Any) -> None:
        values = [np.ones(shape, dtype) for shape, dtype in zip(SHAPES, ("float32", "float64", "float64"), strict=True)]
        self.device, self.optimizer = device, gpu_adam.Adam(**config)
        self.variables = [Variable(v, name=name) for v, name in zip(start or values, "abc", strict=True)]

    def step(self) -> None:
        """Take the next step, every other one with slices."""
        t = int(self.optimizer.iterations)
        rng = np.random.default_rng(t)
        pairs: list[Any] = [
            (self.device.array(np.asarray(rng.standard_normal(v.shape), v.dtype)), v) for v in self.variables
        ]
        if t % 2:
            rows = self.device.array(np.array([2, 0, 2]))
            values = self.device.array(rng.standard_normal((3, 2)).astype(np.float32))
            pairs[0] = (IndexedSlices(values, rows), self.variables[0])
        self.optimizer.apply_gradients(pairs)


CONFIGS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True, "learning_rate": ExponentialDecay(0.1, 3, 0.5), "clipnorm": 1.0, "decay": 0.1},
]


@pytest.mark.parametrize("config", CONFIGS, ids=["default", "amsgrad"])
def test_training_continues_from_a_file(device: Device, tmp_path: Path, config: dict[str, Any]) -> None:
    training = Training(device, **config)
    for _ in range(3):
        training.step()
    training.optimizer.save(tmp_path / "state.npz")
    resumed = Training(device, [variable.numpy() for variable in training.variables], **config)
    resumed.optimizer.build(resumed.variables)
    resumed.optimizer.load(str(tmp_path / "state.npz"))
    assert int(resumed.optimizer.iterations) == 3
    for _ in range(3):
        training.step()
        resumed.step()
    ours = [*training.variables, *training.optimizer.weights]
    theirs = [*resumed.variables, *resumed.optimizer.weights]
    for one, other in zip(ours, theirs, strict=True):
        assert_same_bits(other.numpy(), one.numpy(), one.name)


def test_what_is_in_the_file(device: Device, tmp_path: Path) -> None:
    training = Training(device, **CONFIGS[1])
    training.step()
    path = tmp_path / "a file without a suffix"
    training.optimizer.save(path)
    assert os.listdir(tmp_path) == [path.name]
    arrays, meta = checkpoint.read(path)
    names = [weight.name for weight in training.optimizer.weights]
    assert meta == {"kind": "Adam", "names": names, "config": json.loads(json.dumps(training.optimizer.get_config()))}
    assert len(names) == 10
    for number, weight in enumerate(training.optimizer.get_weights()):
        assert_same_bits(arrays[f"weights/{number}"], np.asarray(weight))
    with np.load(path) as archive:
        assert archive["weights/0"] == 1
    again = gpu_adam.Adam.from_config(meta["config"])
    assert again.get_config() == training.optimizer.get_config()


def test_hyperparameters_stay_as_they_are(device: Device, tmp_path: Path) -> None:
    training = Training(device, learning_rate=0.5, clipvalue=1)
    training.step()
    training.optimizer.save(tmp_path / "state")
    other = Training(device, learning_rate=0.25)
    other.optimizer.build(other.variables)
    other.optimizer.load(tmp_path / "state")
    assert other.optimizer.learning_rate == 0.25
    assert other.optimizer.clipvalue is None


def test_a_fresh_optimizer_is_saved_too(tmp_path: Path) -> None:
    gpu_adam.Adam().save(tmp_path / "state")
    assert checkpoint.read(tmp_path / "state")[1]["names"] == []


def test_files_of_others(device: Device, tmp_path: Path) -> None:
    training = Training(device)
    training.step()
    training.optimizer.save(tmp_path / "good")
    arrays, meta = checkpoint.read(tmp_path / "good")
    arrays = {name: array + 1 for name, array in arrays.items()}  # what is read in part would be seen
    path = tmp_path / "bad"
    cut = {**arrays, "weights/4": arrays["weights/4"][:1]}
    words = {**arrays, "weights/6": np.array("x")}
    fewer = dict(list(arrays.items())[:-1])
    for bad_arrays, bad_meta, message in (
        (arrays, {**meta, "kind": "Other"}, "must be written by Adam.save"),
        (arrays, {}, "must be written by Adam.save"),
        (arrays, {**meta, "names": meta["names"][:-1]}, r"must hold this optimizer's weights .*6 weights, not 7"),
        (arrays, {**meta, "names": ["Adam/iter", *meta["names"][:0:-1]]}, "call build"),
        (fewer, meta, r"must hold 7 weights \(got no weights/6\)"),
        (cut, meta, r"must fit this optimizer .*weights/4 must have shape"),
        (words, meta, "must fit this optimizer"),
    ):
        checkpoint.write(path, bad_arrays, bad_meta)
        with unchanged(training.optimizer), pytest.raises(CheckpointError, match=message):
            training.optimizer.load(path)
    path.write_bytes((tmp_path / "good").read_bytes()[:-100])
    with unchanged(training.optimizer), pytest.raises(CheckpointError, match="must be a whole gpu_adam checkpoint"):
        training.optimizer.load(path)
    with unchanged(training.optimizer), pytest.raises(FileNotFoundError):
        training.optimizer.load(tmp_path / "none")
    fresh = gpu_adam.Adam()
    with unchanged(fresh), pytest.raises(CheckpointError, match=r"none: no variable is known yet.*call build"):
        fresh.load(tmp_path / "good")
    with pytest.raises(FileNotFoundError):
        training.optimizer.save(tmp_path / "none" / "state")
