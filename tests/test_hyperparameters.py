"""Hyperparameters: numbers, 0-d arrays, variables, callables and schedules; their rules wherever a value comes from."""

import copy
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import reference
from reference import assert_same_bits
from snapshots import unchanged

import gpu_adam
from gpu_adam import ExponentialDecay, LearningRateSchedule, PiecewiseConstantDecay, Variable
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, GpuAdamError

MAY_BE_CALLABLE = ["learning_rate", "beta_1", "beta_2", "epsilon"]
ALL = [*MAY_BE_CALLABLE, "decay", "clipvalue", "clipnorm", "global_clipnorm"]
GOOD = dict.fromkeys(ALL, 0.5)
NAN, INF = math.nan, math.inf
BAD = [
    *(("learning_rate", value, "must be finite") for value in (NAN, INF, -INF)),
    *((beta, value, r"must lie in \[0, 1\)") for beta in ("beta_1", "beta_2") for value in (1, 1.5, -0.1, NAN, INF)),
    *(("epsilon", value, "must be >= 0") for value in (-1e-7, -INF, NAN)),
    *(("decay", value, "must be >= 0 and finite") for value in (-0.1, NAN, INF)),
    *((clip, value, "must be > 0") for clip in ALL[5:] for value in (0, -1, NAN, -INF)),
]


class Calls:
    """A callable that counts its calls and returns what it is told."""

    def __init__(self, value: Any) -> None:
        self.value, self.count = value, 0

    def __call__(self) -> Any:
        """Count, and return it."""
        self.count += 1
        return self.value


def adam_with(name: str, value: Any) -> gpu_adam.Adam:
    """An optimizer with this value of a hyperparameter."""
    arguments: dict[str, Any] = {name: value}
    return gpu_adam.Adam(**arguments)


def run(device: Device, optimizer: gpu_adam.Adam, variable: Variable, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.apply_gradients([(device.array(np.arange(1, 4).astype(variable.dtype)), variable)])


def bits_of_constant(device: Device, steps: int, **config: Any) -> reference.Array:
    """The variable that `run` gives with plain numbers."""
    variable, optimizer = Variable(np.ones(3, np.float32)), gpu_adam.Adam(**config)
    run(device, optimizer, variable, steps)
    return variable.numpy()


# What a value may be.


@pytest.mark.parametrize("name", MAY_BE_CALLABLE)
def test_callables_are_called_once_per_step(device: Device, name: str) -> None:
    """However many variables, dtypes and launches there are."""
    calls = Calls(0.25)
    optimizer = adam_with(name, calls)
    assert calls.count == 0
    variables = [Variable(np.ones(3, dtype)) for dtype in ("float32", "float64", "float32")]
    gradients = [device.array(np.ones(3, v.dtype)) for v in variables]
    for step in range(1, 5):
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        assert calls.count == step
    optimizer.apply_gradients([(gradients[0], variables[0]), (gradients[0], variables[0])])
    assert calls.count == 5
    assert getattr(optimizer, name) == 0.25
    assert optimizer.get_config()[name] == 0.25
    assert calls.count == 7


@pytest.mark.parametrize("name", MAY_BE_CALLABLE)
@pytest.mark.parametrize(
    "kind", [lambda: 0.25, lambda: np.float32(0.25), lambda: np.array(0.25), lambda: Variable(0.25)], ids=range(4)
)
def test_what_a_callable_may_return(device: Device, name: str, kind: Any) -> None:
    variable, optimizer = Variable(np.ones(3, np.float32)), adam_with(name, kind)
    run(device, optimizer, variable, 3)
    assert_same_bits(variable.numpy(), bits_of_constant(device, 3, **{name: 0.25}))


def test_a_callable_may_change_from_step_to_step(device: Device) -> None:
    rates = iter([0.5, 0.0, -0.25, 1])
    variable = Variable(np.ones(3))
    optimizer, oracle = gpu_adam.Adam(lambda: next(rates)), reference.Adam([np.ones(3)])
    for rate in (0.5, 0.0, -0.25, 1):
        run(device, optimizer, variable)
        oracle.learning_rate = rate
        oracle.step([np.arange(1, 4.0)])
        assert_same_bits(variable.numpy(), oracle.variables[0])


class Recording(LearningRateSchedule):
    """A schedule that notes the steps it was asked for."""

    def __init__(self) -> None:
        self.steps: list[Any] = []

    def __call__(self, step: Any) -> float:
        """Rate and note."""
        self.steps.append(step)
        return 0.5 / (1 + float(step))


def test_a_callable_may_read_the_counter(device: Device) -> None:
    """Of its own optimizer, also in the first step, which creates the counter."""
    optimizer, variable = gpu_adam.Adam(), Variable(np.zeros(2, np.float32))
    optimizer.learning_rate = lambda: 1 / (1 + int(optimizer.iterations))
    g = device.array(np.ones(2, np.float32))
    for step in (1, 2):
        assert optimizer.apply_gradients([(g, variable)]) == step
    np.testing.assert_allclose(variable.numpy(), -1.5, rtol=1e-5)
    assert [weight.name for weight in optimizer.weights] == ["Adam/iter", "Adam/Variable/m", "Adam/Variable/v"]


def test_schedules_get_the_steps_done(device: Device) -> None:
    schedule = Recording()
    optimizer, oracle = gpu_adam.Adam(schedule, decay=0.5), reference.Adam([np.ones(3)], decay=0.5)
    assert optimizer.learning_rate is schedule
    variables = [Variable(np.ones(3)), Variable(np.ones(3, np.float32))]
    for step in range(3):
        optimizer.apply_gradients([(device.array(np.ones(3, v.dtype)), v) for v in variables])
        oracle.learning_rate = 0.5 / (1 + step)
        oracle.step([np.ones(3)])
    optimizer.iterations = 9
    run(device, optimizer, Variable(np.ones(3)))
    assert schedule.steps == [0, 1, 2, 9]
    assert_same_bits(variables[0].numpy(), oracle.variables[0])


@pytest.mark.parametrize("name", MAY_BE_CALLABLE)
@pytest.mark.parametrize(
    "make", [np.array, lambda x: Variable(x, dtype="float64"), np.float32], ids=["0-d", "Variable", "np"]
)
def test_arrays_and_variables(device: Device, name: str, make: Any) -> None:
    value = make(0.25)
    variable, optimizer = Variable(np.ones(3, np.float32)), adam_with(name, value)
    run(device, optimizer, variable, 2)
    assert_same_bits(variable.numpy(), bits_of_constant(device, 2, **{name: 0.25}))
    assert float(getattr(optimizer, name)) == 0.25


def test_an_array_on_the_device_as_hyperparameter(device: Device) -> None:
    value = device.array(np.float64(0.25))
    variable, optimizer = Variable(np.ones(3, np.float32)), gpu_adam.Adam(value)
    run(device, optimizer, variable)
    value[...] = 0.5
    run(device, optimizer, variable)
    expected, other = Variable(np.ones(3, np.float32)), gpu_adam.Adam(0.25)
    run(device, other, expected)
    other.learning_rate = 0.5
    run(device, other, expected)
    assert_same_bits(variable.numpy(), expected.numpy())


@pytest.mark.parametrize("name", MAY_BE_CALLABLE)
def test_a_variable_is_shared_and_written_into(name: str) -> None:
    """Assigning a number writes it into the variable that was given; anything else takes its place."""
    shared = Variable(np.float64(0.25), device="host")
    optimizer = adam_with(name, shared)
    assert getattr(optimizer, name) is shared
    setattr(optimizer, name, 0.5)
    assert getattr(optimizer, name) is shared
    assert float(shared) == 0.5
    shared.assign(0.125)
    assert optimizer.get_config()[name] == 0.125
    setattr(optimizer, name, lambda: 0.75)
    assert getattr(optimizer, name) == 0.75
    assert float(shared) == 0.125
    setattr(optimizer, name, 0.5)
    assert getattr(optimizer, name) == 0.5
    assert float(shared) == 0.125


@pytest.mark.parametrize("name", ALL)
def test_numbers_are_read_as_floats(name: str) -> None:
    for value in (np.float32(0.5), np.array(0.5), np.float16(0.5)):
        optimizer = adam_with(name, value)
        assert float(getattr(optimizer, name)) == 0.5
        assert type(optimizer.get_config()[name]) is float
    optimizer = gpu_adam.Adam(learning_rate=1)
    assert isinstance(optimizer.learning_rate, float)
    optimizer.lr = 0.5
    assert optimizer.learning_rate == optimizer.lr == 0.5


@pytest.mark.parametrize("name", ["lr", "learning_rate", "beta_1", "beta_2", "epsilon", "decay"])
def test_a_value_is_assigned_as_the_references_variables_are(name: str) -> None:
    optimizer = gpu_adam.Adam()
    for value in (0.25, 0, np.float32(0.5), np.array(0.75), gpu_adam.Variable(0.125)):
        got = getattr(optimizer, name).assign(value)
        assert got == getattr(optimizer, name) == getattr(optimizer, name).numpy() == float(value)
        assert type(getattr(optimizer, name).numpy()) is np.float64
    refused: list[Any] = [math.nan, "0.1", None, [0.1], lambda: 0.1]
    for value in refused:
        with pytest.raises((ArgumentTypeError, ArgumentValueError), match=f"^({name}|learning_rate) must "):
            getattr(optimizer, name).assign(value)
    assert float(getattr(optimizer, name)) == 0.125


def test_a_value_is_a_float_to_everybody_else() -> None:
    """What is kept or handed on is a plain float, without the optimizer behind it."""
    optimizer = gpu_adam.Adam(0.1)
    value = optimizer.lr
    assert (repr(value), f"{value:.2f}", json.dumps(value), value + 1) == ("0.1", "0.10", "0.1", 1.1)
    for copied in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value)), value * 1):
        assert type(copied) is float
        assert copied == 0.1
    other = gpu_adam.Adam(value)
    optimizer.lr = 0.2
    assert (value, other.lr, optimizer.lr) == (0.1, 0.1, 0.2)
    assert type(other._hyper["learning_rate"]) is float


def test_a_callables_value_is_assigned_over_the_callable() -> None:
    optimizer = gpu_adam.Adam(lambda: 0.5)
    optimizer.lr.assign(0.25)
    assert optimizer.get_config()["learning_rate"] == 0.25


def test_every_kind_may_follow_every_other(device: Device) -> None:
    """And lr and learning_rate are one attribute."""
    kinds = [
        0.5,
        lambda: 0.5,
        np.array(0.5),
        Variable(np.float64(0.5)),
        PiecewiseConstantDecay([1], [0.5, 0.5]),
        np.float32(0.5),
    ]
    variable, optimizer = Variable(np.ones(3, np.float32)), gpu_adam.Adam()
    steps = 0
    for first in kinds:
        for second in kinds:
            optimizer.lr = first
            optimizer.learning_rate = second
            run(device, optimizer, variable)
            steps += 1
    assert_same_bits(variable.numpy(), bits_of_constant(device, steps, learning_rate=0.5))


def test_assigned_values_take_effect(device: Device) -> None:
    variable = Variable(np.ones(3))
    optimizer, oracle = gpu_adam.Adam(), reference.Adam([np.ones(3)])
    for name, value in [
        ("learning_rate", 0.5), ("beta_1", 0.5), ("beta_2", 0.25), ("epsilon", 0.125), ("decay", 2), ("epsilon", 0),
        ("decay", 0), ("learning_rate", -1),
    ]:  # fmt: skip
        setattr(optimizer, name, value)
        setattr(oracle, name, value)
        run(device, optimizer, variable)
        oracle.step([np.arange(1, 4.0)])
        assert_same_bits(variable.numpy(), oracle.variables[0], name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_decay(device: Device, dtype: str) -> None:
    """On top of a schedule too, by the steps done before."""
    variable, decay = Variable(np.ones(3, dtype)), 0.3
    optimizer = gpu_adam.Adam(ExponentialDecay(0.5, 1, 0.5), decay=decay)
    oracle = reference.Adam([np.ones(3, dtype)], decay=decay)
    for step in range(4):
        oracle.learning_rate = 0.5 * 0.5**step
        run(device, optimizer, variable)
        oracle.step([np.arange(1, 4).astype(dtype)])
        assert_same_bits(variable.numpy(), oracle.variables[0])


def test_float64_variables_see_full_precision(device: Device) -> None:
    variable = Variable(np.ones(3))
    run(device, gpu_adam.Adam(0.1, 0.9), variable)
    oracle = reference.Adam([np.ones(3)], 0.1, 0.9)
    oracle.step([np.arange(1, 4.0)])
    assert_same_bits(variable.numpy(), oracle.variables[0])
    rounded = reference.Adam([np.ones(3)], float(np.float32(0.1)), float(np.float32(0.9)))
    rounded.step([np.arange(1, 4.0)])
    assert (variable.numpy() != rounded.variables[0]).all()


# What it may not be.


@pytest.mark.parametrize(("name", "value", "rule"), BAD)
def test_values_outside_their_rule(name: str, value: float, rule: str) -> None:
    message = rf"^{name} {rule} \(got {float(value)}\); "
    with pytest.raises(ArgumentValueError, match=message):
        adam_with(name, value)
    optimizer = adam_with(name, GOOD[name])
    for wrong in (value, np.float64(value), np.array(value)):
        with pytest.raises(ArgumentValueError, match=message):
            setattr(optimizer, name, wrong)
        assert optimizer.get_config() == adam_with(name, GOOD[name]).get_config()


@pytest.mark.parametrize(("name", "value", "rule"), [case for case in BAD if case[0] in MAY_BE_CALLABLE])
def test_values_outside_their_rule_at_the_step(device: Device, name: str, value: float, rule: str) -> None:
    """What a callable, a variable or an array gives is checked when it is used; such a step changes nothing."""
    message = rf"^{name} {rule} \(got {float(value)}\); "
    for steps in (0, 1, 2):
        calls, shared, array = Calls(0.5), Variable(np.float64(0.5)), np.array(0.5)
        for given in (calls, shared, array):
            variable, optimizer = Variable(np.ones(3, np.float32)), adam_with(name, given)
            run(device, optimizer, variable, steps)
            calls.value = array[...] = value
            shared.assign(value)
            for _ in range(2):
                with unchanged(optimizer, variable), pytest.raises(ArgumentValueError, match=message):
                    run(device, optimizer, variable)
            with pytest.raises(ArgumentValueError, match=message):
                optimizer.get_config()
            calls.value = array[...] = 0.5
            shared.assign(0.5)
            run(device, optimizer, variable)
            assert_same_bits(variable.numpy(), bits_of_constant(device, steps + 1, **{name: 0.5}))


def test_a_schedule_outside_its_rule_at_the_step(device: Device) -> None:
    class Growing(LearningRateSchedule):
        def __call__(self, step: Any) -> float:
            return 0.5 if step < 2 else math.inf

    variable, optimizer = Variable(np.ones(3)), gpu_adam.Adam(Growing())
    run(device, optimizer, variable, 2)
    with (
        unchanged(optimizer, variable),
        pytest.raises(ArgumentValueError, match=r"learning_rate must be finite \(got inf\)"),
    ):
        run(device, optimizer, variable)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", ["0.1", b"0.1", [0.1], np.array([0.1, 0.2]), {}, ..., 1j, np.array("x")], ids=repr)
def test_what_is_no_number(name: str, value: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=rf"^{name} must be a real number"):
        adam_with(name, value)
    optimizer = gpu_adam.Adam()
    with pytest.raises(ArgumentTypeError, match=rf"^{name} must be a real number"):
        setattr(optimizer, name, value)
    assert optimizer.get_config() == gpu_adam.Adam().get_config()


@pytest.mark.parametrize(
    "name", [name for name in ALL if name not in ("epsilon", "clipvalue", "clipnorm", "global_clipnorm")]
)
def test_none_is_no_number(name: str) -> None:
    with pytest.raises(ArgumentTypeError, match=rf"^{name} must be a real number.*\(got None\)"):
        adam_with(name, None)
    with pytest.raises(ArgumentTypeError, match=rf"^{name} must be a real number.*\(got None\)"):
        setattr(gpu_adam.Adam(), name, None)


@pytest.mark.parametrize("name", ["decay", "clipvalue", "clipnorm", "global_clipnorm"])
def test_not_every_number_may_be_callable(name: str) -> None:
    with pytest.raises(ArgumentTypeError, match=rf"^{name} must be a real number \(got function"):
        adam_with(name, lambda: 0.5)


@pytest.mark.parametrize("name", [name for name in ALL if name != "learning_rate"])
def test_only_a_learning_rate_may_be_a_schedule(name: str) -> None:
    with pytest.raises(ArgumentTypeError, match=rf"^{name} must be a real number"):
        adam_with(name, ExponentialDecay(0.1, 1, 0.5))


@pytest.mark.parametrize("name", MAY_BE_CALLABLE)
@pytest.mark.parametrize("value", [None, "0.1", [0.1], np.ones(2), len, 1j], ids=repr)
def test_a_callable_that_returns_no_number(device: Device, name: str, value: Any) -> None:
    variable, optimizer = Variable(np.ones(3)), adam_with(name, lambda: value)
    with unchanged(optimizer, variable), pytest.raises(ArgumentTypeError, match=rf"^{name} must be a real number"):
        run(device, optimizer, variable)


def test_a_callable_that_fails(device: Device) -> None:
    """Its own error comes out, after one call, and nothing has changed."""

    def failing() -> float:
        raise KeyError("the caller's own")

    variable, optimizer = Variable(np.ones(3)), gpu_adam.Adam()
    for _ in range(2):
        for wrong in (failing, lambda x: x):
            optimizer.beta_2 = wrong
            with unchanged(optimizer, variable), pytest.raises((KeyError, TypeError)):
                run(device, optimizer, variable)
        optimizer.beta_2 = 0.5
        run(device, optimizer, variable)


# In float32 a value may round to one that breaks its rule.


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("beta_1", 1 - 1e-9, "must be below 1 after rounding to float32"),
        ("beta_2", 1 - 2**-25, "must be below 1 after rounding to float32"),
        ("epsilon", 1e-39, "must be 0 or at least 1.18e-38"),
        ("epsilon", 1e-50, "must be 0 or at least 1.18e-38"),
        ("learning_rate", 1e39, "must be finite"),
        ("learning_rate", -1e300, "must be finite"),
        ("epsilon", 1e39, "epsilon"),
        ("clipvalue", 1e-39, "clipvalue must be"),
        ("clipvalue", 1e-50, "clipvalue must be"),
        ("decay", 1e39, "decay"),
    ],
)
def test_values_that_float32_does_not_hold(device: Device, name: str, value: float, rule: str) -> None:
    """They are fine for float64 variables, and refused for float32 ones, before anything changes."""
    optimizer, double, single = adam_with(name, value), Variable(np.ones(3)), Variable(np.ones(3, np.float32))
    run(device, optimizer, double, 2)
    for _ in range(2):
        with unchanged(optimizer, single, double), pytest.raises(GpuAdamError, match=rule):
            run(device, optimizer, single)
        with unchanged(optimizer, single, double), pytest.raises(GpuAdamError, match=rule):
            optimizer.apply_gradients([(device.array(np.ones(3, v.dtype)), v) for v in (double, single)])


@pytest.mark.parametrize(
    ("name", "value"),
    [("beta_1", 1 - 2**-24), ("beta_2", 1 - 2**-24), ("epsilon", 1.1754944e-38), ("learning_rate", 3e38)],
)
def test_values_that_float32_just_holds(device: Device, name: str, value: float) -> None:
    variable, optimizer = Variable(np.ones(3, np.float32)), adam_with(name, value)
    config: dict[str, Any] = {name: value}
    oracle = reference.Adam([np.ones(3, np.float32)], **config)
    run(device, optimizer, variable)
    oracle.step([np.arange(1, 4).astype(np.float32)])
    assert_same_bits(variable.numpy(), oracle.variables[0])


def test_a_large_clipvalue_bounds_nothing_in_float32(device: Device) -> None:
    variable, optimizer = Variable(np.ones(3, np.float32)), gpu_adam.Adam(clipvalue=1e300)
    run(device, optimizer, variable, 2)
    assert_same_bits(variable.numpy(), bits_of_constant(device, 2))


@pytest.mark.parametrize(
    ("bounds", "norm", "limit", "switch"),
    [
        ({}, None, None, 0),
        ({"clipvalue": 0.5}, None, None, 2),
        ({"clipnorm": 2}, "each", 2.0, 1),
        ({"clipvalue": 0.5, "global_clipnorm": 3}, "global", 3.0, 2),
    ],
    ids=str,
)
def test_what_is_clipped(bounds: dict[str, Any], norm: str | None, limit: float | None, switch: int) -> None:
    optimizer = gpu_adam.Adam(**bounds)
    assert (optimizer._clip.norm, optimizer._clip.limit, optimizer._rule().clip) == (norm, limit, switch)


# True and False.


@pytest.mark.parametrize("value", ["False", "", None, 2, 1.0, [], np.ones(2)], ids=repr)
def test_what_is_neither_true_nor_false(value: Any) -> None:
    """The truth of something else would be an accident: "False" is true."""
    optimizer = gpu_adam.Adam()
    other: Any = "False" if value is None else value  # None stands for the default there
    for use in (
        lambda: gpu_adam.Adam(amsgrad=value),
        lambda: setattr(optimizer, "amsgrad", value),
        lambda: gpu_adam.Variable(1.0, trainable=value),
        lambda: optimizer.add_weight("w", (), trainable=other),
    ):
        with pytest.raises(ArgumentTypeError, match=r"^(amsgrad|trainable) must be True or False \(got "):
            use()
    assert optimizer.amsgrad is False


@pytest.mark.parametrize("value", [True, np.True_, 1], ids=repr)
def test_what_is_true(value: Any) -> None:
    optimizer = gpu_adam.Adam(amsgrad=value)
    assert optimizer.amsgrad is True
    assert optimizer.get_config()["amsgrad"] is True
    optimizer.amsgrad = np.False_
    assert optimizer.amsgrad is False
