"""Adam as its user sees it: arguments, the bits of its steps beside the oracle, AMSGrad, configuration."""

import copy
import inspect
import json
import math
from typing import Any

import numpy as np
import pytest
import reference
from reference import assert_same_bits

import gpu_adam
from gpu_adam import ExponentialDecay, LearningRateSchedule, Variable
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError

SHAPES = [(), (1,), (7,), (3, 5), (0, 3), (4097,)]
REAL = ["float32", "float64"]


def start(dtype: str) -> tuple[np.random.Generator, list[reference.Array]]:
    rng = np.random.default_rng(1)
    return rng, [np.asarray(rng.standard_normal(shape), dtype) for shape in SHAPES]


def assert_as_reference(optimizer: gpu_adam.Adam, variables: list[Variable], oracle: reference.Adam) -> None:
    for k, variable in enumerate(variables):
        assert_same_bits(variable.numpy(), oracle.variables[k], f"variable {k}")
        assert_same_bits(optimizer.get_slot(variable, "m").numpy(), oracle.m[k], f"m of variable {k}")
        assert_same_bits(optimizer.get_slot(variable, "v").numpy(), oracle.v[k], f"v of variable {k}")
        if oracle.amsgrad:
            assert_same_bits(optimizer.get_slot(variable, "vhat").numpy(), oracle.vhat[k], f"vhat of variable {k}")


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"learning_rate": 0.1, "amsgrad": True},
        {"learning_rate": -0.1, "beta_1": 0.0, "beta_2": 0.0},
        {"learning_rate": 3.0, "beta_1": 0.99, "beta_2": 0.9, "epsilon": 1.0, "decay": 0.5},
    ],
    ids=str,
)
def test_steps_have_the_bits_of_the_equations(device: Device, dtype: str, config: dict[str, Any]) -> None:
    rng, initial = start(dtype)
    variables = [Variable(value) for value in initial]
    optimizer, oracle = gpu_adam.Adam(**config), reference.Adam(initial, **config)
    for scale in (1.0, 0.5, 100.0, 0.0):
        gradients = [np.asarray(scale * rng.standard_normal(shape), dtype) for shape in SHAPES]
        done = optimizer.apply_gradients(
            [(device.array(g), variable) for g, variable in zip(gradients, variables, strict=True)]
        )
        oracle.step(gradients)
        assert done == oracle.iterations
        assert_as_reference(optimizer, variables, oracle)


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_numbers_at_the_ends_of_the_range(device: Device, dtype: str, amsgrad: bool) -> None:
    """Denormals count as zero; an infinite g² leaves the variable where it is; NaN stays where it came in."""
    info = np.finfo(dtype)
    tiny, huge = float(info.tiny), float(info.max)
    numbers = [0, -0.0, tiny / 4, -tiny, math.sqrt(tiny) / 2, 1e-7, math.sqrt(huge) * 2, huge, np.inf, np.nan]
    # One after the other, the first and the last make an m that is denormal: 1.5 and then -0.15 times tiny.
    gradient = np.array([15 * tiny, *numbers, -15 * tiny])
    initial = np.append(np.full(11, tiny / 2), 1)
    gradients = [gradient.astype(dtype), gradient[::-1].astype(dtype), np.zeros(12, dtype)]
    variable = Variable(initial.astype(dtype))
    optimizer = gpu_adam.Adam(0.1, amsgrad=amsgrad)
    oracle = reference.Adam([variable.numpy()], 0.1, amsgrad=amsgrad)
    for g in gradients:
        optimizer.apply_gradients([(device.array(g), variable)])
        oracle.step([g])
        assert_as_reference(optimizer, [variable], oracle)


@pytest.mark.parametrize("done", [1, 1000, 2**24 + 1, 10**12])
def test_late_steps(device: Device, done: int) -> None:
    """The bias correction of step t comes from the counter, wherever it stands."""
    rng, initial = start("float32")
    variables = [Variable(value) for value in initial]
    optimizer, oracle = gpu_adam.Adam(0.1, 0.99, 0.9999), reference.Adam(initial, 0.1, 0.99, 0.9999, iterations=done)
    optimizer.iterations = done
    gradients = [np.asarray(rng.standard_normal(shape), np.float32) for shape in SHAPES]
    assert optimizer.apply_gradients(zip(map(device.array, gradients), variables, strict=True)) == done + 1
    oracle.step(gradients)
    assert_as_reference(optimizer, variables, oracle)


def test_arguments_by_position() -> None:
    optimizer = gpu_adam.Adam(0.1, 0.2, 0.3, 0.4, True, "Six")
    config = {"learning_rate": 0.1, "beta_1": 0.2, "beta_2": 0.3, "epsilon": 0.4, "amsgrad": True, "name": "Six"}
    assert optimizer.get_config() == {**config, "decay": 0.0}
    assert [str(p) for p in inspect.signature(gpu_adam.Adam).parameters.values()] == [
        "learning_rate: 'Any' = 0.001",
        "beta_1: 'Any' = 0.9",
        "beta_2: 'Any' = 0.999",
        "epsilon: 'Any' = 1e-07",
        "amsgrad: 'Any' = False",
        "name: 'str | None' = 'Adam'",
        "**kwargs: 'Any'",
    ]
    with pytest.raises(TypeError, match="positional"):
        gpu_adam.Adam(0.1, 0.2, 0.3, 0.4, True, "Six", 7)  # type: ignore[call-arg]


def test_keywords() -> None:
    optimizer = gpu_adam.Adam(clipnorm=1, clipvalue=np.float32(0.5), decay=np.array(0.25))
    assert (optimizer.clipnorm, optimizer.clipvalue, optimizer.global_clipnorm, optimizer.decay) == (1, 0.5, None, 0.25)
    assert gpu_adam.Adam(global_clipnorm=2).global_clipnorm == 2.0
    assert gpu_adam.Adam(clipnorm=None, clipvalue=None, global_clipnorm=None, lr=None).clipnorm is None
    with pytest.raises(
        ArgumentTypeError, match=r"keyword 'momentum' must be one of clipnorm, clipvalue, global_clipnorm, lr"
    ):
        gpu_adam.Adam(momentum=0.9)
    with pytest.raises(
        ArgumentValueError, match=r"clipnorm must not be set together with global_clipnorm \(got 1.0 and 2.0"
    ):
        gpu_adam.Adam(clipnorm=1, global_clipnorm=2)
    with pytest.raises(ArgumentTypeError, match=r"decay must be a real number \(got None\)"):
        gpu_adam.Adam(decay=None)


def test_an_argument_that_means_nothing_here(device: Device) -> None:
    x, y = Variable(np.ones(2, np.float32)), Variable(np.ones(2, np.float32))
    gradient = device.array(np.ones(2, np.float32))
    gpu_adam.Adam().apply_gradients([(gradient, x)], experimental_aggregate_gradients=False)
    gpu_adam.Adam().apply_gradients([(gradient, y)], "name", True)
    assert_same_bits(x.numpy(), y.numpy())


def test_lr_is_an_old_name() -> None:
    with pytest.warns(DeprecationWarning, match="use learning_rate") as warnings:
        optimizer = gpu_adam.Adam(0.5, lr=0.25)
    assert warnings[0].filename == __file__
    assert optimizer.learning_rate == optimizer.lr == 0.25
    with (
        pytest.warns(DeprecationWarning, match="lr"),
        pytest.raises(ArgumentValueError, match=r"lr must be >= 0 \(got -1.0\)"),
    ):
        gpu_adam.Adam(lr=-1.0)
    with pytest.warns(DeprecationWarning, match="lr"):
        assert gpu_adam.Adam(lr=0).lr == 0


@pytest.mark.parametrize("epsilon", [None, 0, 0.0, np.float32(0)])
def test_no_epsilon_is_the_default(epsilon: Any) -> None:
    optimizer = gpu_adam.Adam(epsilon=epsilon)
    assert optimizer.epsilon == 1e-7
    optimizer.epsilon = 0  # assigned, it is what it says
    assert optimizer.epsilon == 0


def test_names() -> None:
    class Mine(gpu_adam.Adam):
        pass

    assert gpu_adam.Adam().name == "Adam"
    assert gpu_adam.Adam(name="").name == gpu_adam.Adam(name=None).name == "Adam"
    assert Mine(name=None).name == "Mine"
    assert gpu_adam.Adam(name="a/b").name == "a/b"
    for name in (1, b"Adam", ["Adam"]):
        with pytest.raises(ArgumentTypeError, match=r"name must be a str \(got"):
            gpu_adam.Adam(name=name)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        gpu_adam.Adam().name = "other"  # type: ignore[misc]


def test_optimizers_are_equal_to_themselves_only() -> None:
    optimizer = gpu_adam.Adam()
    assert optimizer == optimizer  # noqa: PLR0124
    assert optimizer != gpu_adam.Adam()
    assert len({optimizer, gpu_adam.Adam()}) == 2


def test_amsgrad_switched_on_and_off(device: Device) -> None:
    """The slot vhat begins at zero with the step that needs it, and stays as it is when none does any more."""
    rng = np.random.default_rng(2)
    initial = [rng.standard_normal(5), rng.standard_normal((2, 3))]
    variables = [Variable(value) for value in initial]
    optimizer, oracle = gpu_adam.Adam(0.1), reference.Adam(initial, 0.1)
    for amsgrad, count in [(False, 5), (True, 7), (1, 7), (False, 7), (0, 7), (np.True_, 7)]:
        optimizer.amsgrad = amsgrad
        oracle.amsgrad = bool(amsgrad)
        gradients = [rng.standard_normal(variable.shape) for variable in variables]
        optimizer.apply_gradients(zip(map(device.array, gradients), variables, strict=True))
        oracle.step(gradients)
        assert len(optimizer.weights) == count
        assert_as_reference(optimizer, variables, oracle)
    assert [weight.name for weight in optimizer.weights[5:]] == ["Adam/Variable/vhat"] * 2
    assert optimizer.get_slot_names() == ["m", "v", "vhat"]


class Halving(LearningRateSchedule):
    """A schedule of the caller's own."""

    def __init__(self, first: float) -> None:
        self.first = first

    def __call__(self, step: Any) -> float:
        """Half as much at every step."""
        return float(self.first * 0.5 ** float(step))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"first": self.first}


class Nameless(Halving):
    """One that cannot be saved."""

    def get_config(self) -> dict[str, Any]:
        """As the base class."""
        return LearningRateSchedule.get_config(self)


CONFIGS: list[dict[str, Any]] = [
    {},
    {"learning_rate": 1, "beta_1": 0, "beta_2": 0.5, "epsilon": 1, "amsgrad": True, "name": "Other", "decay": 1},
    {"learning_rate": -0.5, "clipnorm": 2, "clipvalue": 1},
    {"global_clipnorm": np.float32(0.1), "clipvalue": np.array(3)},
    {"learning_rate": lambda: np.float32(0.25), "beta_1": lambda: 0, "epsilon": lambda: 1e-3},
    {"learning_rate": np.array(0.25), "beta_2": np.float64(0.5), "beta_1": np.array(0, np.int32)},
    {"learning_rate": ExponentialDecay(0.1, 7, 0.9, staircase=True)},
]


@pytest.mark.parametrize("arguments", CONFIGS, ids=lambda config: ",".join(config) or "default")
def test_a_config_builds_an_equal_optimizer(arguments: dict[str, Any]) -> None:
    config = gpu_adam.Adam(**arguments).get_config()
    read = json.loads(json.dumps(config))
    assert read == config
    again = gpu_adam.Adam.from_config(read)
    assert read == config, "from_config leaves its argument as it is"
    assert again.get_config() == config
    assert again.get_config() is not again.get_config()
    for name, value in arguments.items():
        if not callable(value):
            assert config[name] == (float(value) if not isinstance(value, (str, bool)) else value)
    for name, value in config.items():
        assert type(value) in (str, bool, float, dict), f"{name} is a {type(value)}"


def test_order_of_a_config() -> None:
    assert list(gpu_adam.Adam(clipvalue=1, clipnorm=1).get_config()) == [
        "name", "clipnorm", "clipvalue", "learning_rate", "decay", "beta_1", "beta_2", "epsilon", "amsgrad",
    ]  # fmt: skip


def test_a_config_of_a_stepped_optimizer(device: Device) -> None:
    rate = Variable(np.float32(0.5))
    optimizer = gpu_adam.Adam(rate, amsgrad=True)
    optimizer.apply_gradients([(device.array(np.ones(3)), Variable(np.ones(3)))])
    rate.assign(0.25)
    optimizer.beta_1 = 0.5
    again = gpu_adam.Adam.from_config(optimizer.get_config())
    assert again.learning_rate == 0.25
    assert again.beta_1 == 0.5
    assert again.amsgrad is True
    assert again.weights == []
    again.learning_rate = 1


def test_schedules_in_a_config() -> None:
    standard = gpu_adam.Adam(ExponentialDecay(0.1, 7, 0.9)).get_config()
    arguments = {"initial_learning_rate": 0.1, "decay_steps": 7, "decay_rate": 0.9, "staircase": False, "name": None}
    assert standard["learning_rate"] == {"class_name": "ExponentialDecay", "config": arguments}
    assert gpu_adam.Adam.from_config(standard).learning_rate == ExponentialDecay(0.1, 7, 0.9)

    own = gpu_adam.Adam(Halving(0.5)).get_config()
    before = copy.deepcopy(own)
    rate = gpu_adam.Adam.from_config(own, custom_objects={"Halving": Halving}).learning_rate
    assert isinstance(rate, Halving)
    assert rate.first == 0.5
    assert own == before
    with pytest.raises(ArgumentValueError, match=r"class_name must be one of .* \(got 'Halving'\); add your own class"):
        gpu_adam.Adam.from_config(own)
    with pytest.raises(NotImplementedError, match="get_config"):
        gpu_adam.Adam(Nameless(0.5)).get_config()


def test_configs_of_other_makers() -> None:
    """Old names, missing and unknown keys."""
    config = {"lr": 0.5, "learning_rate": 0.25}
    assert gpu_adam.Adam.from_config(config).learning_rate == 0.5
    assert config == {"lr": 0.5, "learning_rate": 0.25}
    assert gpu_adam.Adam.from_config({}).get_config() == gpu_adam.Adam().get_config()
    with pytest.raises(ArgumentTypeError, match="keyword 'rho' must be one of"):
        gpu_adam.Adam.from_config({"rho": 1})
    with pytest.raises(ArgumentValueError, match='must have the key "class_name"'):
        gpu_adam.Adam.from_config({"learning_rate": {"config": {}}})


def test_a_subclass_builds_its_own_kind() -> None:
    class Mine(gpu_adam.Adam):
        pass

    assert type(Mine.from_config(gpu_adam.Adam().get_config())) is Mine
    assert type(copy.deepcopy(Mine())) is Mine


def test_unknown_attributes() -> None:
    optimizer = gpu_adam.Adam()
    with pytest.raises(AttributeError, match="'Adam' object has no attribute 'momentum'"):
        print(optimizer.momentum)  # type: ignore[attr-defined]
    optimizer.note = "anything"  # type: ignore[attr-defined]
    assert optimizer.note == "anything"  # type: ignore[attr-defined]
