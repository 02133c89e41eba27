"""Adam beside the optimizers of Keras 3: numbers over many steps, values that Keras's own tests have, and differences.

How far two right implementations may be apart after some steps with given gradients, u being half the distance from 1
to its neighbour, where they compute the same means: each step rounds a variable once, by up to u |θ|, and its update by
the rounding of beta^t, of which 1 - beta^t makes up to 16 times as much at EXACT. Decay rounds θ twice more, and an
average three times. A norm of up to 1100 elements, which is summed in different orders, makes each gradient differ by
up to 16 u, and a step by three times that, by both means and their quotient. Two implementations may err in opposite
directions. Means are the same where numbers such as EXACT have few digits; else 1 - beta_2 in one implementation is
that of Python's number, in the other of the rounded one: apart by u / (1 - beta_2), by half of which the root of v
differs.

Keras computes with NumPy here, where it takes its steps at once; it has no float64 there, nor with JAX.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpu_adam import Adam, CosineDecay, LossScale, Variable

# Keras 3.15's own variables, under NumPy 2.5.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

STEPS = 100
LR = 2.0**-7
EXACT: dict[str, Any] = {"beta_1": 0.875, "beta_2": 0.9375}
NAMES = ["scale", "bias", "kernel", "table"]
SHAPES: list[tuple[int, ...]] = [(), (7,), (3, 5), (1100,)]
Arrays = list[np.ndarray]


def initial() -> Arrays:
    rng = np.random.default_rng(0)
    return [np.asarray(rng.standard_normal(shape), np.float32) for shape in SHAPES]


def gradients(step: int) -> Arrays:
    """Of one size, so that neither mean cancels by much, nor vanishes beside its rounding."""
    rng = np.random.default_rng(1 + step)
    return [np.asarray(rng.standard_normal(shape) + 0.5, np.float32) for shape in SHAPES]


def bound(values: Arrays, of_theta: float = 1, of_update: float = 16, steps: int = STEPS) -> float:
    """So many roundings of variables and of their updates in each step: see above."""
    largest = max(float(np.abs(value).max()) for value in values)
    return float(np.finfo(np.float32).eps) * steps * (of_theta * largest + of_update * LR)


class Pair:
    """The same variables for Keras, the module, and for us."""

    def __init__(self, keras: Any) -> None:
        self.theirs = [keras.Variable(value, name=name) for name, value in zip(NAMES, initial(), strict=True)]
        self.ours = [Variable(value, name=name) for name, value in zip(NAMES, initial(), strict=True)]

    def pairs(self, grads: Arrays) -> tuple[list[Any], list[Any]]:
        """(gradient, variable) pairs, Keras's first."""
        return list(zip(grads, self.theirs, strict=True)), list(zip(grads, self.ours, strict=True))

    def assert_near(self, of_theta: float = 1, of_update: float = 16) -> None:
        """The variables are as near as so many roundings allow, and far from where they began."""
        values = [np.asarray(variable.value) for variable in self.theirs]
        allowed = bound(values, of_theta, of_update)
        for name, value, variable, start in zip(NAMES, values, self.ours, initial(), strict=True):
            assert variable.dtype == value.dtype == np.float32
            apart = np.abs(variable.numpy() - value).max()
            assert apart <= allowed, f"{name}: {apart} apart, {allowed} allowed"
            assert np.abs(value - start).max() > 0.05, name


NORM, DECAY, DEFAULTS = 16 + 3 * 16, 1 + 2, 16 + 0.5 / (1 - 0.999)
BESIDE: dict[str, tuple[str, dict[str, Any], float, float]] = {  # the configuration, roundings of θ and of its update
    "defaults": ("Adam", {}, 1, DEFAULTS),
    "defaults of AdamW": ("AdamW", {"weight_decay": 0.004}, DECAY, DEFAULTS),
    "plain": ("Adam", EXACT, 1, 16),
    "amsgrad": ("Adam", {**EXACT, "amsgrad": True, "epsilon": 2.0**-10}, 1, 16),
    "clipvalue": ("Adam", {**EXACT, "clipvalue": 0.5}, 1, 16),
    "clipnorm": ("Adam", {**EXACT, "clipnorm": 0.75}, 1, NORM),
    "global_clipnorm": ("Adam", {**EXACT, "global_clipnorm": 0.75}, 1, NORM),
    "weight decay": ("AdamW", {**EXACT, "weight_decay": 0.25}, DECAY, 16),
    "weight decay, clipped": ("AdamW", {**EXACT, "weight_decay": 0.25, "amsgrad": True, "clipnorm": 0.75}, DECAY, NORM),
}


@pytest.mark.parametrize("choice", BESIDE)
def test_beside_keras(keras: Any, choice: str) -> None:
    kind, config, of_theta, of_update = BESIDE[choice]
    both = Pair(keras)
    theirs, ours = getattr(keras.optimizers, kind)(LR, **config), Adam(LR, **config)
    for step in range(STEPS):
        grads = gradients(step)
        # Steps of other sizes, where only clipping makes the sizes equal.
        grads = [np.asarray(g * np.float32(1 + step % 3)) for g in grads] if "clip" in choice else grads
        for optimizer, pairs in zip((theirs, ours), both.pairs(grads), strict=True):
            optimizer.apply_gradients(pairs)
    both.assert_near(of_theta, of_update)
    assert int(theirs.iterations) == ours.iterations == STEPS


@pytest.mark.parametrize("by", ["names", "list", "both"])
def test_variables_that_do_not_decay(keras: Any, by: str) -> None:
    """Names are searched for regular expressions: "ia" is in "bias", and "e$" ends two."""
    both, free = Pair(keras), Pair(keras)
    theirs, ours = keras.optimizers.AdamW(LR, weight_decay=0.5, **EXACT), Adam(LR, weight_decay=0.5, **EXACT)
    undecayed = Adam(LR, **EXACT)
    for optimizer, variables in ((theirs, both.theirs), (ours, both.ours)):
        names, listed = ["ia", "e$"] if by != "list" else None, [variables[2]] if by != "names" else None
        optimizer.exclude_from_weight_decay(var_list=listed, var_names=names)
    for step in range(STEPS):
        grads = gradients(step)
        for optimizer, pairs in zip((theirs, ours), both.pairs(grads), strict=True):
            optimizer.apply_gradients(pairs)
        undecayed.apply_gradients(free.pairs(grads)[1])
    both.assert_near(DECAY)
    same = [x.numpy().tobytes() == y.numpy().tobytes() for x, y in zip(both.ours, free.ours, strict=True)]
    assert same == {"names": [True, True, False, True], "list": [False, False, True, False]}.get(by, [True] * 4)


def test_a_second_call_adds_where_keras_forgets_the_first(keras: Any) -> None:
    both = Pair(keras)
    theirs, ours = keras.optimizers.AdamW(LR, weight_decay=0.5), Adam(LR, weight_decay=0.5)
    for optimizer, variables in ((theirs, both.theirs), (ours, both.ours)):
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        optimizer.exclude_from_weight_decay(var_list=[variables[3]])
        optimizer.apply_gradients(
            [(np.zeros(shape, np.float32), v) for shape, v in zip(SHAPES, variables, strict=True)]
        )
    stayed = [
        [bool((np.asarray(v.value) == x).all()) for v, x in zip(side, initial(), strict=True)]
        for side in (both.theirs, both.ours)
    ]
    assert stayed == [[False, False, False, True], [False, True, False, True]]


@pytest.mark.parametrize("frequency", [None, 10])
def test_averages_that_begin_after_the_first_step(keras: Any, frequency: int | None) -> None:
    """Keras's begin there, ours one step before, with the variables as they were."""
    both = Pair(keras)
    config: dict[str, Any] = {
        "use_ema": True,
        "ema_momentum": 0.75,
        "ema_overwrite_frequency": frequency,
        "weight_decay": 0.25,
    }
    theirs, ours = keras.optimizers.AdamW(LR, **EXACT, **config), Adam(LR, **EXACT, **config)
    for step in range(STEPS):
        for optimizer, pairs in zip((theirs, ours), both.pairs(gradients(step)), strict=True):
            optimizer.apply_gradients(pairs)
        if step == 0:
            averages = [ours.get_slot(variable, "average") for variable in both.ours]
            for k, their_average in enumerate(theirs._model_variables_moving_average):
                np.testing.assert_array_equal(np.asarray(their_average.value), np.asarray(both.theirs[k].value))
                mean = 0.75 * initial()[k] + 0.25 * both.ours[k].numpy()
                np.testing.assert_allclose(averages[k].numpy(), mean, rtol=1e-6)
                averages[k].assign(both.ours[k])
    both.assert_near(DECAY + 3)
    theirs.finalize_variable_values(both.theirs)
    ours.overwrite_by_averages()
    both.assert_near(DECAY + 3)


@pytest.mark.parametrize(
    ("config", "roundings"),
    [
        ({"epsilon": 0.125}, (1, 16)),
        ({"epsilon": 0.125, "weight_decay": 0.25, "global_clipnorm": 24.0}, (DECAY, NORM)),
    ],
    ids=["plain", "clipped"],
)
def test_accumulated_gradients(keras: Any, config: dict[str, Any], roundings: tuple[float, float]) -> None:
    """Their mean, which a large epsilon tells from a sum, and of which the norm is bounded. Both add them in order."""
    both, calls = Pair(keras), 4
    theirs = keras.optimizers.Adam(LR, gradient_accumulation_steps=calls, **EXACT, **config)
    ours = Adam(LR, **EXACT, **config)
    for step in range(STEPS):
        for call in range(calls):
            their_pairs, our_pairs = both.pairs(gradients(calls * step + call))
            theirs.apply_gradients(their_pairs)
            assert ours.accumulate(our_pairs) == call + 1
        ours.apply_gradients()
    both.assert_near(*roundings)
    assert int(theirs.iterations) == ours.iterations == STEPS


def test_a_schedule_sees_steps_where_keras_counts_calls(keras: Any) -> None:
    """Keras computes schedules in float32, which has a few roundings more."""
    both, calls = Pair(keras), 2
    of_calls = keras.optimizers.schedules.CosineDecay(LR, decay_steps=40)
    theirs = keras.optimizers.Adam(of_calls, gradient_accumulation_steps=calls, **EXACT)
    # Keras's schedule knows the call that makes the step, the last one: 1, 3, 5, ...
    ours: Adam = Adam(lambda: CosineDecay(LR, decay_steps=40)(2 * int(ours.iterations) + 1), **EXACT)
    for step in range(20):
        for call in range(calls):
            their_pairs, our_pairs = both.pairs(gradients(calls * step + call))
            theirs.apply_gradients(their_pairs)
            ours.accumulate(our_pairs)
        ours.apply_gradients()
    for x, y in zip(both.theirs, both.ours, strict=True):
        value = np.asarray(x.value)
        assert np.abs(value - y.numpy()).max() <= bound([value], of_update=16 + 8, steps=20)


def test_averages_see_steps_where_keras_counts_calls(keras: Any) -> None:
    """Each call moves Keras's averages, those between steps too."""
    both = Pair(keras)
    theirs = keras.optimizers.Adam(LR, use_ema=True, ema_momentum=0.75, gradient_accumulation_steps=2)
    ours, path = Adam(LR, use_ema=True, ema_momentum=0.75), [initial()[1]]
    for step in range(3):
        for call in range(2):
            their_pairs, our_pairs = both.pairs(gradients(2 * step + call))
            theirs.apply_gradients(their_pairs)
            ours.accumulate(our_pairs)
        ours.apply_gradients()
        path.append(both.ours[1].numpy())

    def average(first: np.ndarray, *others: np.ndarray) -> np.ndarray:
        for other in others:
            first = 0.75 * first + 0.25 * other
        return first

    start, one, two, three = path
    found = np.asarray(theirs._model_variables_moving_average[1].value)
    np.testing.assert_allclose(found, average(one, one, two, two, three), rtol=1e-5)
    found = ours.get_slot(both.ours[1], "average").numpy()
    np.testing.assert_allclose(found, average(start, one, two, three), rtol=1e-6)
    assert np.abs(average(one, one, two, two, three) - average(one, two, three)).min() > 1e-4


def test_a_gradient_that_is_missing_in_a_call(keras: Any) -> None:
    """Counts as 0 in ours. Keras forgets all of a variable whose last gradient is missing, and leaves it as it is."""
    both = Pair(keras)
    theirs, ours = keras.optimizers.Adam(LR, gradient_accumulation_steps=2, **EXACT), Adam(LR, **EXACT)
    first, second = gradients(0), gradients(1)
    their_pairs, our_pairs = both.pairs(first)
    theirs.apply_gradients(their_pairs)
    ours.accumulate(our_pairs)
    their_pairs, our_pairs = both.pairs(second)
    with pytest.warns(UserWarning, match="do not exist for variables"):
        theirs.apply_gradients([*their_pairs[:3], (None, both.theirs[3])])
    ours.accumulate(our_pairs[:3])
    ours.apply_gradients()
    assert np.asarray(both.theirs[3].value).tolist() == initial()[3].tolist()
    assert np.asarray(theirs._accumulated_gradients[3].value).tolist() == [0.0] * 1100
    mean = ours.get_slot(both.ours[3], "m").numpy() / 0.125
    np.testing.assert_allclose(mean, first[3] / 2, rtol=1e-6)
    assert np.abs(both.theirs[0].value - both.ours[0].numpy()) <= bound(initial(), steps=1)


def test_loss_scales_beside_keras(keras: Any) -> None:
    """Infinite gradients now and then, in one variable: the same steps are left out, and the scales are the same."""
    both, scale, growth = Pair(keras), 2.0**10, 6
    theirs = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(LR, **EXACT), initial_scale=scale, dynamic_growth_steps=growth
    )
    ours = Adam(LR, loss_scale=LossScale(scale, growth), **EXACT)
    theirs.build(both.theirs)
    bad, scales = {0, 1, 20, 26, 27, 77}, set()
    for step in range(STEPS + len(bad)):
        now = float(theirs.dynamic_scale.value)
        grads = [np.asarray(g * np.float32(now)) for g in gradients(step)]
        if step in bad:
            grads[step % 4][...] = [np.inf, -np.inf, np.nan][step % 3]
        their_pairs, our_pairs = both.pairs(grads)
        theirs.apply([gradient for gradient, _ in their_pairs], both.theirs)
        ours.apply_gradients(our_pairs)
        assert ours.loss_scale is not None
        assert ours.loss_scale.value == float(theirs.dynamic_scale.value), f"after call {step}"
        scales.add(now)
    assert min(scales) < scale < max(scales)
    assert ours.skipped_steps == len(bad)
    assert ours.iterations == int(theirs.iterations) == STEPS
    both.assert_near()


# What Keras's own tests ask of Keras, to their precision.


def stepped(start: Any, grads: list[Any], optimizer: Adam) -> Arrays:
    x = Variable(np.array(start, np.float32), name="x")
    values = []
    for g in grads:
        optimizer.apply_gradients([(np.array(g, np.float32), x)])
        values.append(x.numpy())
    return values


_TEN = np.arange(0.1, 1.1, 0.1)[:10]
_GRADS = [np.full(10, 0.01), *[_TEN] * 4]
GOLDEN: dict[str, tuple[Callable[[], Adam], Any, list[Any], Any, float]] = {
    "adam_test, single step": (
        lambda: Adam(0.5),
        [1, 2, 3, 4],
        [[1, 6, 7, 2]],
        [[0.5, 1.5, 2.5, 3.5]],
        1e-4,
    ),
    "adamw_test, single step": (
        lambda: Adam(0.5, weight_decay=0.004),  # AdamW's default
        [1, 2, 3, 4],
        [[1, 6, 7, 2]],
        [[0.498, 1.496, 2.494, 3.492]],
        1e-4,
    ),
    "adamw_test, decay alone": (
        lambda: Adam(1.0, weight_decay=0.004),
        2.0,
        [0.0] * 3,
        [1.992, 1.984032, 1.9760959],
        1e-6,
    ),
    "adam_test, golden": (
        lambda: Adam(amsgrad=True),
        np.ones(10),
        _GRADS,
        np.tile([[0.999], [0.9982], [0.9974], [0.9965], [0.9955]], (1, 10)),
        5e-4,
    ),
    "adamw_test, golden": (
        lambda: Adam(1.0, weight_decay=0.5, epsilon=2),
        np.ones(10),
        _GRADS,
        [
            [0.4998] * 10,
            [0.2486, 0.2475, 0.2463, 0.2451, 0.2440, 0.2428, 0.2417, 0.2405, 0.2394, 0.2382],
            [0.1223, 0.1198, 0.1174, 0.1149, 0.1124, 0.1100, 0.1075, 0.1051, 0.1027, 0.1003],
            [0.0586, 0.0549, 0.0512, 0.0475, 0.0439, 0.0402, 0.0366, 0.0330, 0.0294, 0.0258],
            [0.0263, 0.0215, 0.0167, 0.0120, 0.0073, 0.0026, -0.0021, -0.0067, -0.0113, -0.0159],
        ],
        5e-4,
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_values_of_keras_own_tests(case: str) -> None:
    make, start, grads, expected, precision = GOLDEN[case]
    np.testing.assert_allclose(stepped(start, grads, make()), expected, rtol=precision, atol=precision)


@pytest.mark.parametrize(
    ("clip", "gradient", "clipped"),
    [
        ("clipnorm", [100.0, 100.0], [2**0.5 / 2] * 2),
        ("clipvalue", [100.0, 100.0], [1.0, 1.0]),
        ("global_clipnorm", [50.0, 100.0], [0.2**0.5, 0.8**0.5]),
    ],
)
def test_clipped_gradients_of_keras_own_tests(clip: str, gradient: list[float], clipped: list[float]) -> None:
    bounds: dict[str, Any] = {clip: 1.0}
    x, optimizer = Variable(np.zeros(2)), Adam(beta_1=0.0, **bounds)
    optimizer.apply_gradients([(np.array(gradient), x)])
    np.testing.assert_allclose(optimizer.get_slot(x, "m").numpy(), clipped, rtol=1e-6)


@pytest.mark.parametrize(
    ("scale", "growth", "gradient", "steps", "expected"), [(400.0, 2000, np.inf, 4, 25.0), (2.0, 2, 1.0, 8, 32.0)]
)
def test_loss_scales_of_keras_own_tests(
    scale: float, growth: int, gradient: float, steps: int, expected: float
) -> None:
    optimizer = Adam(0.5, loss_scale=LossScale(scale, growth))
    stepped([1, 2, 3, 4], [[gradient] * 4] * steps, optimizer)
    assert optimizer.loss_scale is not None
    assert optimizer.loss_scale.value == expected
