"""Adam.save and Adam.load: what continues from a file has the bits of what never stopped; other files are refused."""

import io
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
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, CheckpointError
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
    a, b, _ = training.variables
    training.optimizer.set_group([a], learning_rate_multiplier=0.5, beta_1=0.8)
    training.optimizer.exclude_from_weight_decay([b], ["bias$"])
    path = tmp_path / "a file without a suffix"
    training.optimizer.save(path)
    assert os.listdir(tmp_path) == [path.name]
    arrays, meta = checkpoint.read(path)
    assert list(arrays) == ["iterations", *(f"{name}/{slot}" for slot in ("m", "v", "vhat") for name in "abc")]
    for name, array in training.optimizer.export().items():
        assert_same_bits(arrays[name], array)
    with np.load(path) as archive:
        assert archive["iterations"] == 1
    config = meta.pop("config")
    assert meta == {
        "kind": "Adam",
        "groups": {"a": {"learning_rate_multiplier": 0.5, "beta_1": 0.8}},
        "never_decayed": ["b"],
        "never_decayed_names": ["bias$"],
    }
    assert config.items() >= {"seed": 0, "complex_mode": "abs2", "slot_dtype": None, "maximize": False}.items()
    assert config.items() >= json.loads(json.dumps(training.optimizer.get_config())).items()
    again = gpu_adam.Adam.from_config(config)
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
    assert checkpoint.read(tmp_path / "state")[0] == {}
    gpu_adam.Adam().load(tmp_path / "state")


def test_files_of_others(device: Device, tmp_path: Path) -> None:
    training = Training(device)
    training.step()
    training.optimizer.save(tmp_path / "good")
    arrays, meta = checkpoint.read(tmp_path / "good")
    arrays = {name: array + 1 for name, array in arrays.items()}  # what is read in part would be seen
    path = tmp_path / "bad"
    cut = {**arrays, "a/v": arrays["a/v"][:1]}
    rounded = {**arrays, "b/v": arrays["b/v"].astype(np.float32)}
    fewer = dict(list(arrays.items())[:-1])
    for bad_arrays, bad_meta, message in (
        (arrays, {**meta, "kind": "Other"}, "must be written by Adam.save"),
        (arrays, {}, "must be written by Adam.save"),
        (fewer, meta, r"must hold the 7 arrays of optimizer 'Adam' \(got nothing for 'c/v'\)"),
        ({**arrays, "d/m": cut["a/v"]}, meta, r"\(got also 'd/m'\)"),
        (cut, meta, r"'a/v' in .*bad must have shape \(3, 2\)"),
        (rounded, meta, r"'b/v' in .*bad must have dtype float64"),
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
    with unchanged(fresh), pytest.raises(CheckpointError, match=r"must hold the 0 arrays .*also 'iterations'.* build"):
        fresh.load(tmp_path / "good")
    with pytest.raises(FileNotFoundError):
        training.optimizer.save(tmp_path / "none" / "state")


# By name.


def test_variables_come_in_any_order(device: Device, tmp_path: Path) -> None:
    one, other = Training(device), Training(device)
    one.step()
    one.optimizer.save(tmp_path / "state")
    other.optimizer.build(other.variables[::-1])
    other.optimizer.load(tmp_path / "state")
    for name, array in one.optimizer.export().items():
        assert_same_bits(other.optimizer.export()[name], array, name)


def twins(device: Device) -> tuple[gpu_adam.Adam, list[Variable]]:
    """Three variables of one name, and one of the name that the second gets in a file."""
    names = ["w", "w", "w_1", "w"]
    variables = [Variable(np.full(2, number, np.float32), name=name) for number, name in enumerate(names)]
    optimizer = gpu_adam.Adam(0.5)
    optimizer.apply_gradients([(device.array(np.full(2, n + 1, np.float32)), v) for n, v in enumerate(variables)])
    return optimizer, variables


def test_variables_of_one_name(device: Device, tmp_path: Path) -> None:
    optimizer, variables = twins(device)
    optimizer.save(tmp_path / "state", variables=True)
    arrays, _ = checkpoint.read(tmp_path / "state")
    assert [name for name in arrays if name.endswith("/value")] == ["w/value", "w_2/value", "w_1/value", "w_3/value"]
    before = [variable.numpy() for variable in variables]
    for variable in variables:
        variable.assign(np.zeros(2, np.float32))
    optimizer.load(tmp_path / "state", variables=True)
    for variable, value in zip(variables, before, strict=True):
        assert_same_bits(variable.numpy(), value)


def test_a_slot_must_not_hide_another_array(device: Device) -> None:
    optimizer, x = gpu_adam.Adam(), Variable(np.zeros(2, np.float32))
    optimizer.build([x])
    for name in ("value", "m/v", "/"):
        with unchanged(optimizer, x), pytest.raises(ArgumentValueError, match="slot_name must not be 'value'"):
            optimizer.add_slot(x, name)


# With the variables.


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_training_is_one_file(device: Device, tmp_path: Path, suffix: str) -> None:
    """Float16 with masters, averages and all: a new program has nothing but the file."""
    config: dict[str, Any] = {"master_weights": True, "use_ema": True, "loss_scale": gpu_adam.LossScale(4.0, 2)}
    path = tmp_path / f"run.{suffix}"

    def begun(value: float) -> tuple[gpu_adam.Adam, list[Variable]]:
        halves = [
            Variable(np.full(3, value), name=f"v{n}", dtype=dtype) for n, dtype in enumerate(("float16", "float32"))
        ]
        optimizer = gpu_adam.Adam(0.1, **config)
        optimizer.build(halves)
        return optimizer, halves

    def step(optimizer: gpu_adam.Adam, variables: list[Variable], number: int) -> None:
        grads = [device.array(np.full(3, 0.3 + number, v.dtype)) for v in variables]
        optimizer.apply_gradients(list(zip(grads, variables, strict=True)))

    one, ones = begun(1.0)
    for number in range(3):
        step(one, ones, number)
    one.save(path, variables=True)
    other, others = begun(7.0)
    other.load(path, variables=True)
    for number in range(3, 6):
        step(one, ones, number)
        step(other, others, number)
    for a, b in zip([*ones, *one.weights], [*others, *other.weights], strict=True):
        assert_same_bits(b.numpy(), a.numpy(), a.name)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_what_the_caller_adds_to_the_file(device: Device, tmp_path: Path, suffix: str) -> None:
    training, path = Training(device), tmp_path / f"state.{suffix}"
    training.step()
    training.optimizer.save(path)
    assert "user" not in checkpoint.read(path)[1]
    training.optimizer.save(path, user={"epoch": 3, "losses": (0.5, 0.25), "none": None})
    assert checkpoint.read(path)[1]["user"] == {"epoch": 3, "losses": [0.5, 0.25], "none": None}
    state = training.optimizer.export()
    training.step()
    training.optimizer.load(path)
    for name, array in training.optimizer.export().items():
        assert_same_bits(array, state[name], name)
    before = path.read_bytes()
    for wrong in ({"epoch": object()}, {"state": np.ones(2)}, {(1, 2): 3}, 3):
        for asynchronous in (False, True):
            with pytest.raises(ArgumentTypeError, match=r"user must be JSON-serialisable \(got .*\); pass numbers"):
                training.optimizer.save(path, user=wrong, asynchronous=asynchronous)  # type: ignore[arg-type]
    assert path.read_bytes() == before


def test_variables_are_left_where_nobody_asks_for_them(device: Device, tmp_path: Path) -> None:
    training = Training(device)
    training.step()
    training.optimizer.save(tmp_path / "state", variables=True)
    state = training.optimizer.export()
    training.step()
    after = [variable.numpy() for variable in training.variables]
    training.optimizer.load(tmp_path / "state")
    for variable, value in zip(training.variables, after, strict=True):
        assert_same_bits(variable.numpy(), value)
    for name, array in training.optimizer.export().items():
        assert_same_bits(array, state[name], name)


def test_variables_that_the_file_does_not_have(device: Device, tmp_path: Path) -> None:
    training = Training(device)
    training.step()
    training.optimizer.save(tmp_path / "state")
    with (
        unchanged(training.optimizer, *training.variables),
        pytest.raises(CheckpointError, match="nothing for 'a/value', 'b/value', 'c/value'"),
    ):
        training.optimizer.load(tmp_path / "state", variables=True)


def test_raw_arrays_are_variables_too(device: Device, tmp_path: Path) -> None:
    array = device.array(np.ones(3, np.float32))
    optimizer = gpu_adam.Adam(0.5)
    optimizer.apply_gradients([(device.array(np.ones(3, np.float32)), array)])
    optimizer.save(tmp_path / "state", variables=True)
    expected = device.numpy(array)
    with device.activate():
        array[...] = 0
    optimizer.load(tmp_path / "state", variables=True)
    assert_same_bits(device.numpy(array), expected)


# File objects, accumulated gradients, version 1.


def test_a_file_object(device: Device) -> None:
    training, file = Training(device), io.BytesIO()
    training.step()
    training.optimizer.save(file, variables=True)
    state = training.optimizer.export()
    training.step()
    training.optimizer.load(file, variables=True)
    for name, array in training.optimizer.export().items():
        assert_same_bits(array, state[name], name)


def test_accumulated_gradients_are_not_lost_in_silence(device: Device, tmp_path: Path) -> None:
    training = Training(device)
    training.step()
    optimizer, path = training.optimizer, tmp_path / "state"
    optimizer.save(path)
    pairs = [(device.array(np.ones(v.shape, v.dtype)), v) for v in training.variables]
    optimizer.accumulate(pairs)
    with pytest.raises(ArgumentValueError, match=r"save must come before gradients are accumulated \(got 1 calls"):
        optimizer.save(path)
    optimizer.load(path)  # to the state between two steps, in which nothing is accumulated
    with pytest.raises(ArgumentTypeError, match="no gradients have been accumulated"):
        optimizer.apply_gradients()
    optimizer.save(path)


VERSION_1 = Path(__file__).parent / "data" / "checkpoint_v1.npz"
"""Of an optimizer called "Own" with AMSGrad, averages and a loss scale, after three steps of the variables below."""


@pytest.mark.parametrize("reverse", [False, True])
def test_a_file_of_version_1(device: Device, reverse: bool) -> None:
    variables = [
        Variable(np.zeros(4, np.float32), name="w"),
        Variable(np.zeros((2, 1), np.complex64), name="w"),
        Variable(np.zeros(3), name="half/bias", dtype="bfloat16"),
    ]
    optimizer = gpu_adam.Adam(0.1, amsgrad=True, use_ema=True, loss_scale=gpu_adam.LossScale(1.0))
    if reverse:
        variables = [variables[2], *variables[:2]]
    optimizer.build(variables)
    optimizer.load(VERSION_1)
    state = optimizer.export()
    with np.load(VERSION_1) as archive:
        names = json.loads(archive["meta.json"])["meta"]["names"]
        recorded = [archive[f"weights/{number}"] for number in range(len(names))]
    by_name = dict(zip(names, recorded, strict=True))
    assert (int(state["iterations"]), float(state["loss_scale"]), int(state["good_steps"])) == (3, 8.0, 1)
    for slot in ("m", "v", "vhat", "average"):
        first = names.index(f"Own/w/{slot}")
        assert_same_bits(state[f"w/{slot}"], recorded[first])
        assert_same_bits(state[f"w_1/{slot}"], recorded[first + 1])
        assert_same_bits(state[f"half/bias/{slot}"], by_name[f"Own/half/bias/{slot}"])
