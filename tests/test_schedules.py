"""The six schedules against recorded rates, their own equations at the edges, and every rule of their arguments."""

import copy
import doctest
import itertools
import json
import math
import pickle
from typing import Any

import golden
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpu_adam
from gpu_adam import schedules
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.schedules import (
    STANDARD,
    CosineDecay,
    CosineDecayRestarts,
    ExponentialDecay,
    InverseTimeDecay,
    LearningRateSchedule,
    LinearCosineDecay,
    PiecewiseConstantDecay,
    PolynomialDecay,
)

EXAMPLES = [
    ExponentialDecay(0.1, 7, 0.9, True, "e"),
    PiecewiseConstantDecay([2, 9], [0.1, 0.2, 0.3], "p"),
    PolynomialDecay(0.1, 30, 0.01, 2.0, True, "o"),
    InverseTimeDecay(0.1, 5, 0.3, True, "i"),
    CosineDecay(0.1, 40, 0.05, "c", 0.5, 10),
    CosineDecayRestarts(0.1, 8, 1.5, 0.8, 0.05, "r"),
    LinearCosineDecay(0.1, 40, 2.0, 0.1, 0.05, "l"),
]
IDS = [type(example).__name__ for example in EXAMPLES]
RECORDED = [
    (case, outputs)
    for case, _, outputs, _ in golden.load()
    if "__schedule__" in json.dumps(case["config"]) and "decay" not in case["config"]
]
# The reference computes in float32 with its own pow and cos, and rounds the result to the variable's dtype.
TOLERANCE = {"float16": 2.0**-11 + 5e-6, "float32": 5e-6, "float64": 5e-6}


class Halving(LearningRateSchedule):
    """The least a user has to write."""

    def __call__(self, step: Any) -> float:
        """Half as much at every step."""
        return float(0.1 * 0.5**step)


class Constant(Halving):
    """One that can be saved."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"rate": self.rate}


def test_there_are_recorded_rates_of_every_schedule() -> None:
    assert {case["config"]["learning_rate"]["__schedule__"]["class_name"] for case, _ in RECORDED} == (
        set(STANDARD) - {"LinearCosineDecay"}  # an experimental one of TensorFlow 2.0, which 2.15 has no more
    )


@pytest.mark.parametrize(("case", "outputs"), RECORDED, ids=[case["name"] for case, _ in RECORDED])
def test_recorded_rates_and_configs(case: dict[str, Any], outputs: dict[str, Any]) -> None:
    schedule = schedules.deserialize(case["config"]["learning_rate"]["__schedule__"])
    (key,) = (key for key in outputs if key.startswith("lr_t/"))
    rates = [schedule(step) for step in range(case["steps"])]
    np.testing.assert_allclose(rates, outputs[key], rtol=TOLERANCE[key.removeprefix("lr_t/")])
    recorded = case["final_config"]["learning_rate"]
    config = schedules.serialize(schedule)
    assert config["class_name"] == recorded["class_name"]
    assert config["config"].items() >= recorded["config"].items()


@pytest.mark.parametrize("schedule", EXAMPLES, ids=IDS)
def test_a_config_builds_an_equal_schedule(schedule: LearningRateSchedule) -> None:
    config = json.loads(json.dumps(schedules.serialize(schedule)))
    before = copy.deepcopy(config)
    again = schedules.deserialize(config)
    assert config == before
    assert again == schedule
    assert [again(step) for step in range(50)] == [schedule(step) for step in range(50)]
    assert type(schedule).from_config(schedule.get_config()) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == copy.deepcopy(schedule) == schedule
    assert config["config"]["name"] == "epoicrl"[IDS.index(config["class_name"])]


@pytest.mark.parametrize("schedule", EXAMPLES, ids=IDS)
def test_a_step_may_be_any_number(schedule: LearningRateSchedule) -> None:
    assert type(schedule(3)) is float
    assert schedule(3) == schedule(3.0) == schedule(np.int64(3)) == schedule(np.array(3))


@pytest.mark.parametrize("schedule", EXAMPLES, ids=IDS)
def test_arguments_may_be_numpy_numbers(schedule: LearningRateSchedule) -> None:
    config = {k: np.float64(v) if type(v) is float else v for k, v in schedule.get_config().items()}
    config |= {k: np.array(v) for k, v in config.items() if type(v) is int}
    again = type(schedule).from_config(config)
    assert again == schedule
    json.dumps(again.get_config())


@pytest.mark.parametrize("schedule", EXAMPLES, ids=IDS)
@given(step=st.integers(0, 2**62))
def test_rates_stay_between_their_ends(schedule: LearningRateSchedule, step: int) -> None:
    assert 0 <= schedule(step) <= 0.5


def test_exponential_and_inverse_time_equations() -> None:
    assert ExponentialDecay(0.5, 4, 0.25)(2) == 0.25
    assert [ExponentialDecay(0.5, 2, 0.5, staircase=True)(t) for t in range(5)] == [0.5, 0.5, 0.25, 0.25, 0.125]
    assert ExponentialDecay(1, 1, 0)(0) == 1
    assert ExponentialDecay(1, 1, 0)(1) == 0
    assert ExponentialDecay(1, 1, 10.0)(400) == math.inf
    assert InverseTimeDecay(0.5, 4, 2.0)(2) == 0.25
    assert [InverseTimeDecay(1, 2, 1, staircase=True)(t) for t in range(5)] == [1, 1, 0.5, 0.5, 1 / 3]


def test_piecewise_constant_boundaries_belong_to_the_interval_before() -> None:
    schedule = PiecewiseConstantDecay((1, 3.5), (3, 2, 1))
    assert [schedule(t) for t in range(6)] == [3, 3, 2, 2, 1, 1]
    assert schedule.get_config() == {"boundaries": [1, 3.5], "values": [3, 2, 1], "name": None}


def test_polynomial_ends_or_cycles() -> None:
    assert [PolynomialDecay(1.0, 2, 0.5)(t) for t in range(4)] == [1, 0.75, 0.5, 0.5]
    # At t = 2 the first cycle ends; at t = 3 the second, of 4 updates, has a quarter left.
    assert [PolynomialDecay(1.0, 2, 0.0, cycle=True)(t) for t in range(5)] == [1, 0.5, 0, 0.25, 0]
    assert PolynomialDecay(1.0, 2, 0.25, power=0)(9) == 1


def test_cosine_warms_up_in_a_straight_line() -> None:
    schedule = CosineDecay(0.0, 4, alpha=0.25, warmup_target=1.0, warmup_steps=2)
    np.testing.assert_allclose([schedule(t) for t in range(8)], [
        0, 0.5, 1, 0.75 * (0.5 + math.sqrt(0.125)) + 0.25, 0.625, 0.75 * (0.5 - math.sqrt(0.125)) + 0.25, 0.25, 0.25,
    ], rtol=1e-15)  # fmt: skip
    assert CosineDecay(1.0, 4, warmup_steps=3)(0) == 1


@pytest.mark.parametrize("t_mul", [1.0, 1.5, 2.0, 3.0, 10.0])
def test_restarts_are_at_whole_periods(t_mul: float) -> None:
    """Also where log(t_mulⁱ) / log(t_mul) is not a whole number in floating point (3⁵, 10³)."""
    first, step = 2**10, 0.0
    schedule = CosineDecayRestarts(1.0, first, t_mul, m_mul=0.5)
    for period in range(8):
        assert schedule(step) == 0.5**period
        assert schedule(step + first / 2) < schedule(step)
        step += first * t_mul**period
        assert schedule(step - 1) < 1e-4


NUMBERS = {
    *("initial_learning_rate", "end_learning_rate", "decay_steps", "first_decay_steps", "decay_rate", "power", "alpha"),
    *("beta", "num_periods", "t_mul", "m_mul", "warmup_target", "warmup_steps"),
}
"""The arguments that are numbers, of all schedules."""


@pytest.mark.parametrize("schedule", EXAMPLES, ids=IDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_arguments_that_are_not_finite(schedule: LearningRateSchedule, value: float) -> None:
    for name in schedule.get_config().keys() & NUMBERS:
        with pytest.raises(ArgumentValueError) as caught:
            type(schedule).from_config(schedule.get_config() | {name: value})
        assert str(caught.value).startswith(f"{type(schedule).__name__}({name}) must be finite (got {value}); ")


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (
            CosineDecay(0.0, decay_steps=0, warmup_target=10.0, warmup_steps=100),
            {0: 0.0, 50: 5.0, 99: 9.9, 100: NAN, 150: NAN},
        ),
        (CosineDecay(1.0, decay_steps=-10), {0: 0.0, 5: 0.0, 20: 0.0}),
        (CosineDecay(1.0, decay_steps=0), {0: NAN, 5: NAN, 20: NAN}),
        (CosineDecay(1.0, decay_steps=10, warmup_target=2.0, warmup_steps=-3), {0: 1.58779, 5: 0.190983, 20: 0.0}),
        (
            CosineDecayRestarts(1.0, first_decay_steps=10, t_mul=0.5),
            {
                0: 1.0,
                5: 0.5,
                9: 0.0244718,
                10: 1.0,
                12: 0.654508,
                15: 1.0,
                17: 0.0954913,
                19: 0.654509,
                20: NAN,
                25: NAN,
            },
        ),
        (
            CosineDecayRestarts(1.0, first_decay_steps=10, t_mul=2.0, m_mul=-0.5),
            {0: 1.0, 5: 0.5, 9: 0.0244718, 11: -0.496922, 12: -0.487764, 15: -0.426777, 31: 0.249615, 35: 0.240485},
        ),
        (CosineDecayRestarts(1.0, first_decay_steps=10, t_mul=0.0), {0: 1.0, 5: 0.5, 15: NAN}),
        (CosineDecayRestarts(1.0, first_decay_steps=10, t_mul=-1.0), {0: NAN, 5: NAN, 15: NAN}),
        (CosineDecayRestarts(1.0, first_decay_steps=0), {0: NAN, 5: NAN}),
        (CosineDecayRestarts(1.0, first_decay_steps=-10.0), {0: 1.0, 5: 1.0, 15: NAN}),
        (PolynomialDecay(0.1, decay_steps=10, power=-1.0), {0: 0.1, 5: 0.1999, 9: 0.9991, 10: INF, 15: INF}),
        (PolynomialDecay(0.1, decay_steps=-10), {0: 0.0001, 5: 0.0001, 15: 0.0001}),
        (PolynomialDecay(0.1, decay_steps=0), {0: NAN, 5: NAN}),
        (PolynomialDecay(0.1, decay_steps=0, cycle=True), {0: NAN, 5: NAN}),
        (PolynomialDecay(0.1, decay_steps=-10, cycle=True), {0: 0.1, 5: -INF, 10: 0.0001, 15: -0.04985}),
        (PolynomialDecay(0.1, decay_steps=10, cycle=True, power=-0.5), {0: 0.1, 5: 0.14138, 10: INF, 15: 0.1999}),
        (
            ExponentialDecay(0.1, decay_steps=1, decay_rate=-0.5, staircase=True),
            {0: 0.1, 1: -0.05, 2: 0.025, 3: -0.0125},
        ),
        (ExponentialDecay(0.1, decay_steps=2, decay_rate=-0.5), {0: 0.1, 1: NAN, 2: -0.05, 3: NAN}),
        (ExponentialDecay(0.1, decay_steps=0, decay_rate=0.5), {0: NAN, 1: 0.0}),
        (ExponentialDecay(0.1, decay_steps=-2, decay_rate=0.5), {0: 0.1, 1: 0.141421, 2: 0.2}),
        (ExponentialDecay(0.1, decay_steps=0, decay_rate=0.5, staircase=True), {0: NAN, 1: 0.0}),
        (InverseTimeDecay(0.1, decay_steps=1, decay_rate=-1.0), {0: 0.1, 1: INF, 2: -0.1}),
        (InverseTimeDecay(0.1, decay_steps=0, decay_rate=1.0), {0: NAN, 1: 0.0, 2: 0.0}),
    ],
    ids=repr,
)
def test_arguments_outside_of_all_sense(schedule: LearningRateSchedule, rates: dict[int, float]) -> None:
    """What TensorFlow 2.15.1 gives for them."""
    np.testing.assert_allclose([schedule(step) for step in rates], list(rates.values()), rtol=1e-5)


def test_huge_arguments() -> None:
    """Rates as IEEE arithmetic has them, where Python's raises."""
    assert math.isnan(LinearCosineDecay(1.0, decay_steps=10, num_periods=1e308)(5))
    restarts = CosineDecayRestarts(1.0, first_decay_steps=10, t_mul=1e308)
    np.testing.assert_allclose([restarts(step) for step in (0, 5, 10)], [1.0, 0.5, 1.0])


@pytest.mark.parametrize("name", ["staircase", "cycle"])
def test_arguments_that_are_true_or_false(name: str) -> None:
    having = [schedule for schedule in EXAMPLES if name in schedule.get_config()]
    for schedule in having:
        assert getattr(type(schedule).from_config(schedule.get_config() | {name: np.True_}), name) is True
        with pytest.raises(ArgumentTypeError, match=rf"\({name}\) must be True or False \(got 'False'\)"):
            type(schedule).from_config(schedule.get_config() | {name: "False"})
    assert having


def test_a_rate_that_is_no_number_is_refused_by_the_step() -> None:
    schedule = CosineDecay(0.0, 0, warmup_target=10.0, warmup_steps=1)
    optimizer, variable = gpu_adam.Adam(schedule), gpu_adam.Variable(np.ones(2, np.float32), device="host")
    pairs = [(np.ones(2, np.float32), variable)]
    optimizer.apply_gradients(pairs)
    with pytest.raises(ArgumentValueError, match=r"^learning_rate must be finite \(got nan\)"):
        optimizer.apply_gradients(pairs)
    assert int(optimizer.iterations) == 1


@pytest.mark.parametrize("schedule", EXAMPLES, ids=IDS)
@pytest.mark.parametrize("value", ["0.1", True, [1.0], np.ones(1), 1j, {}, np.ma.masked])
def test_arguments_that_are_no_numbers(schedule: LearningRateSchedule, value: object) -> None:
    names = [name for name in schedule.get_config() if name in NUMBERS]
    for name in names:
        with pytest.raises(ArgumentTypeError, match=rf"\({name}\) must be a real number"):
            type(schedule).from_config(schedule.get_config() | {name: value})
    assert names or isinstance(schedule, PiecewiseConstantDecay)


@pytest.mark.parametrize(
    ("boundaries", "values", "error", "message"),
    [
        ([], [1], ArgumentValueError, "boundaries.* must not be empty"),
        ([1], [1], ArgumentValueError, r"must be 1 shorter than values \(got 1 boundaries, 1 values\)"),
        ([2, 1], [1, 2, 3], ArgumentValueError, r"must increase \(got \[2, 1\]\)"),
        ([1], [1, math.nan], ArgumentValueError, r"values\)\[1\] must be finite"),
        (["1"], [1, 2], ArgumentTypeError, r"boundaries\)\[0\] must be a real number"),
        (3, [1, 2], ArgumentTypeError, "boundaries.* must be a sequence"),
        (np.array(3.0), [1, 2], ArgumentTypeError, "boundaries.* must be a sequence"),
        ([3], "12", ArgumentTypeError, "values.* must be a sequence"),
    ],
)
def test_piecewise_constant_arguments(boundaries: Any, values: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PiecewiseConstantDecay(boundaries, values)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=IDS)
def test_a_schedule_is_a_frozen_value(schedule: LearningRateSchedule) -> None:
    again = type(schedule).from_config(schedule.get_config())
    other = type(schedule).from_config(schedule.get_config() | {"name": "other"})
    assert hash(schedule) == hash(again)
    assert len({schedule, again, other}) == 2
    assert eval(repr(schedule)) == schedule
    for name in schedule.get_config():
        with pytest.raises(AttributeError, match=f"cannot assign {name}: a {type(schedule).__name__} is frozen"):
            setattr(schedule, name, 1)
    assert schedule == again


def test_a_custom_schedule_needs_only_a_call() -> None:
    assert Halving()(2) == 0.025
    with pytest.raises(NotImplementedError, match="Learning rate schedule must override get_config"):
        Halving().get_config()
    with pytest.raises(NotImplementedError, match="Learning rate schedule must override get_config"):
        schedules.serialize(Halving())
    with pytest.raises(TypeError, match="abstract"):
        LearningRateSchedule()  # type: ignore[abstract]


def test_custom_objects_are_found_by_name() -> None:
    config = schedules.serialize(Constant(0.25))
    assert config == {"class_name": "Constant", "config": {"rate": 0.25}}
    again = schedules.deserialize(config, {"Constant": Constant})
    assert isinstance(again, Constant)
    assert again.rate == 0.25
    other = schedules.deserialize({"class_name": "CosineDecay", "config": {"rate": 1.0}}, {"CosineDecay": Constant})
    assert isinstance(other, Constant)


def test_configs_that_name_no_schedule() -> None:
    with pytest.raises(ArgumentValueError, match=r"one of ExponentialDecay, .*LinearCosineDecay \(got 'Nope'\)"):
        schedules.deserialize({"class_name": "Nope", "config": {}})
    with pytest.raises(ArgumentValueError, match='must have the key "class_name"'):
        schedules.deserialize({"config": {}})
    with pytest.raises(ArgumentTypeError, match="must be a mapping"):
        schedules.deserialize("ExponentialDecay")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="decay_setps"):
        schedules.deserialize({"class_name": "CosineDecay", "config": {"decay_setps": 3}})


def test_all_standard_schedules_are_tested_here() -> None:
    assert list(STANDARD) == IDS
    assert all(a != b for a, b in itertools.combinations(EXAMPLES, 2))


def test_docstring_examples() -> None:
    assert doctest.testmod(schedules).attempted
    assert doctest.testmod(schedules).failed == 0
