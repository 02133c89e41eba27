"""Gradients on their way in: their scale, steps that are left out, the loss scale that follows, and telemetry."""

import copy
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Array, assert_same_bits, flushed
from snapshots import contents, snapshot, unchanged

import gpu_adam
from gpu_adam import Adam, IndexedSlices, LossScale, Variable, kernels
from gpu_adam.devices import Device, HostDevice
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, CheckpointError
from gpu_adam.step.gradients import Incoming

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "value": {"clipvalue": 0.5},
    "each norm": {"clipnorm": 1.5},
    "value and global norm": {"clipvalue": 0.5, "global_clipnorm": 1.5},
    "adjusted": {"maximize": True, "l2": 0.1, "weight_decay": 0.1, "amsgrad": True},
}


def cases(names: Iterable[str], quick: Iterable[str]) -> list[Any]:
    """Each name as a case; thorough but for the quick ones, for each has kernels of its own to compile."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.thorough) for name in names]


QUICK = ("plain", "value and global norm", "averages")


class Job:
    """Variables and gradients of several steps: dense ones of two dtypes, some rows of a third.

    Args:
        device: where they lie.
        config: of the optimizer.
        dtypes: of the dense variables.
    """

    def __init__(
        self, device: Device, config: dict[str, Any], dtypes: tuple[str, ...] = ("float32", "float64")
    ) -> None:
        rng = np.random.default_rng(7)
        self.device, self.dtypes = device, dtypes
        shapes = [(kernels.CHUNK + 3,), (5, 3), (9, 4)]
        kinds = [*dtypes, dtypes[0]][-3:] if len(dtypes) > 1 else [dtypes[0]] * 3
        self.variables = [
            Variable(numbers(rng, shape, dtype), name=f"v{n}", device=device)
            for n, (shape, dtype) in enumerate(zip(shapes, kinds, strict=True))
        ]
        self.optimizer = Adam(0.01, **config)

    def gradients(self, step: int, scale: float = 1.0) -> list[Array]:
        """The gradients of a step in host memory; the last one's are the values of three rows, one of them twice."""
        rng = np.random.default_rng(100 + step)
        *dense, table = self.variables
        shapes = [variable.shape for variable in dense] + [(3, *table.shape[1:])]
        dtypes = [variable.dtype.name for variable in self.variables]
        return [parts_times(numbers(rng, s, d), scale) for s, d in zip(shapes, dtypes, strict=True)]

    def pairs(self, gradients: list[Array]) -> list[tuple[Any, Variable]]:
        """What `apply_gradients` takes for these gradients."""
        *dense, values = [self.device.array(gradient) for gradient in gradients]
        slices = IndexedSlices(values, self.device.array(np.array([4, 1, 4])), self.variables[-1].shape)
        return list(zip([*dense, slices], self.variables, strict=True))

    def state(self) -> list[Any]:
        """Everything that a step may change."""
        return snapshot(self.optimizer, *self.variables)

    def values(self) -> dict[str, Array]:
        """Every array of the state and every variable, in host memory."""
        exported = self.optimizer.export()
        return {**exported, **{variable.name: variable.numpy() for variable in self.variables}}


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    values, kind = rng.standard_normal(shape), kernels.dtype_named(dtype)
    return np.asarray(values + 1j * rng.standard_normal(shape) if kind.kind == "c" else values, kind)


def parts_times(array: Array, factor: float) -> Array:
    """The real and imaginary parts times a factor of their own dtype, each product rounded once."""
    real = array.real.dtype.type
    times: Array = (array.reshape(-1).view(real) * real(factor)).view(array.dtype).reshape(array.shape)
    return times


def assert_same_state(one: Job, other: Job) -> None:
    expected = other.values()
    for name, value in one.values().items():
        if name in expected:
            assert_same_bits(value, expected[name], name)


# The scale.

SCALE = 3072.0  # float16 holds it, and no dtype its reciprocal
KINDS: dict[str, Callable[[Device], Any]] = {
    "int": lambda device: int(SCALE),
    "float": lambda device: SCALE,
    "NumPy's float64": lambda device: np.float64(SCALE),
    "0-d float16 on the host": lambda device: np.array(SCALE, np.float16),
    "variable": lambda device: Variable(np.float32(SCALE), device=device),
    "0-d float16": lambda device: device.array(np.array(SCALE, np.float16)),
    "0-d float32": lambda device: device.array(np.array(SCALE, np.float32)),
    "0-d float64": lambda device: device.array(np.array(SCALE, np.float64)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_every_kind(device: Device, kind: str) -> None:
    check_scaled_gradients(device, kind, "value and global norm")


@pytest.mark.parametrize("kind", ["float", "0-d float32"])
@pytest.mark.parametrize("config", cases(CONFIGS, QUICK))
def test_scaled_gradients_give_the_bits_of_unscaled_ones(device: Device, kind: str, config: str) -> None:
    check_scaled_gradients(device, kind, config)


def check_scaled_gradients(device: Device, kind: str, config: str) -> None:
    """By 1 / scale, rounded to the dtype, before clipping and before rows that occur twice are summed."""
    scaled, manual = (Job(device, CONFIGS[config]) for _ in range(2))
    for step in range(3):
        gradients = scaled.gradients(step, scale=1000.0)
        done = scaled.optimizer.apply_gradients(scaled.pairs(gradients), grad_scale=KINDS[kind](device))
        assert done == step + 1
        manual.optimizer.apply_gradients(manual.pairs([parts_times(g, 1.0 / SCALE) for g in gradients]))
    assert_same_state(scaled, manual)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("mode", ["abs2", "real_imag"])
@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_scaled_complex_gradients(device: Device, dtype: str, mode: str, on_device: bool) -> None:
    config = {"complex_mode": mode, "clipvalue": 0.7}
    scaled, manual = (Job(device, config, (dtype,)) for _ in range(2))
    scale = device.array(np.float32(SCALE)) if on_device else SCALE
    gradients = scaled.gradients(0, scale=1000.0)
    scaled.optimizer.apply_gradients(scaled.pairs(gradients), grad_scale=scale)
    manual.optimizer.apply_gradients(manual.pairs([parts_times(g, 1.0 / SCALE) for g in gradients]))
    assert_same_state(scaled, manual)


def test_a_scale_on_the_device_is_read_when_the_step_runs(device: Device) -> None:
    """The same array with another number in it, beside steps without a scale and with settings of variables' own."""
    job, manual = (Job(device, {}) for _ in range(2))
    for each in (job, manual):
        each.optimizer.set_group(each.variables[:1], learning_rate_multiplier=2.0, beta_1=0.5)
    scale = Variable(np.float32(1), device=device)
    for step, number in enumerate((2.0, None, 7.0, 7.0, None, 0.3)):
        gradients = job.gradients(step)
        if number is not None:
            scale.assign(np.float32(number))
        job.optimizer.apply_gradients(job.pairs(gradients), grad_scale=None if number is None else scale)
        divisor = 1.0 if number is None else float(np.float32(number))
        manual.optimizer.apply_gradients(manual.pairs([parts_times(g, 1.0 / divisor) for g in gradients]))
    assert_same_state(job, manual)


def test_a_scale_and_a_flag_of_torch() -> None:
    """As GradScaler has them: 0-d tensors."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    g = np.array([1, 2, 3], np.float32)
    tensors, variable = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)], Variable(np.ones(3, np.float32))
    scaled, flagged, plain = Adam(), Adam(), Adam()
    for flag in (0.0, 1.0, 0.0):
        scale, gradient = torch.tensor(SCALE, dtype=torch.float64), torch.tensor(g * np.float32(SCALE))
        rule = flagged._rule(1.0, is_guarded=True)
        found, pairs = torch.tensor(flag), [(gradient * float(np.float32(1 / SCALE)), tensors[1])]
        flagged._controller.step(pairs, rule, flagged._hyper, flagged._clip, Incoming(1.0, found))
        if not flag:
            scaled.apply_gradients([(gradient, tensors[0])], grad_scale=scale)
            plain.apply_gradients([(parts_times(g * np.float32(SCALE), 1.0 / SCALE), variable)])
    for tensor in tensors:
        assert_same_bits(tensor.detach().numpy(), variable.numpy())
    assert int(flagged.iterations) == 2


BAD_SCALES: list[tuple[Any, type[Exception], str]] = [
    (0, ArgumentValueError, "grad_scale must be > 0 and finite (got 0.0)"),
    (-8.0, ArgumentValueError, "must be > 0 and finite (got -8.0)"),
    (float("nan"), ArgumentValueError, "must be > 0 and finite (got nan)"),
    (float("inf"), ArgumentValueError, "must be > 0 and finite (got inf)"),
    (np.array(-1.0), ArgumentValueError, "must be > 0 and finite (got -1.0)"),
    ("8", ArgumentTypeError, "grad_scale must be a number or a 0-d array (got '8')"),
    (True, ArgumentTypeError, "must be a number or a 0-d array (got True)"),
    (np.ones(1), ArgumentTypeError, "must be a number or a 0-d array"),
    (1e-40, ArgumentValueError, "must have a reciprocal that float32 holds"),
    (1e39, ArgumentValueError, "must have a reciprocal that float32 holds"),
]


@pytest.mark.parametrize("config", [{}, {"skip_nonfinite": True}, {"loss_scale": LossScale()}])
@pytest.mark.parametrize(("scale", "error", "words"), BAD_SCALES)
def test_a_scale_that_is_none(scale: Any, error: type[Exception], words: str, config: dict[str, Any]) -> None:
    job = Job(gpu_adam.get_device(), config)
    pairs = job.pairs(job.gradients(0))
    with unchanged(job.optimizer, *job.variables), pytest.raises(error) as caught:
        job.optimizer.apply_gradients(pairs, grad_scale=scale)
    assert words in str(caught.value)
    job.optimizer.apply_gradients(pairs, grad_scale=8.0)
    with unchanged(job.optimizer, *job.variables), pytest.raises(error):
        job.optimizer.apply_gradients(pairs, grad_scale=scale)


# Steps that are left out.

BAD = {1: np.nan, 4: np.inf, 5: -np.inf, 8: np.nan}
"""In which steps what stands in a gradient; step 0 below is bad too."""


def spoilt(gradients: list[Array], step: int) -> list[Array]:
    """The gradients with one element that is not finite, in another gradient from step to step."""
    gradients = [gradient.copy() for gradient in gradients]
    flat = gradients[step % len(gradients)].reshape(-1)
    flat[-1 - step % 2] = BAD[step]
    return gradients


class Rates:
    """A learning rate that is called."""

    def __init__(self) -> None:
        self.now, self.calls = 0.01, 0

    def __call__(self) -> float:
        """The rate now."""
        self.calls += 1
        return self.now


SKIPPING: dict[str, dict[str, Any]] = {
    **CONFIGS,
    "averages": {"use_ema": True, "amsgrad": True, "epsilon_form": "paper"},
    "decay": {"decay": 0.5},
}


def learning_rates() -> dict[str, Callable[[], Any]]:
    return {"number": lambda: 0.01, "schedule": lambda: gpu_adam.ExponentialDecay(0.1, 3, 0.5), "callable": Rates}


@pytest.mark.parametrize("config", cases(SKIPPING, (*QUICK, "decay")))
def test_a_bad_step_changes_nothing(device: Device, config: str) -> None:
    """The state is that of an optimizer that never saw the bad steps, t included."""
    check_bad_steps(device, config, "schedule")


@pytest.mark.parametrize(("config", "rate"), [("plain", "number"), ("value and global norm", "callable")])
def test_a_bad_step_changes_nothing_whatever_the_rate(device: Device, config: str, rate: str) -> None:
    check_bad_steps(device, config, rate)


def check_bad_steps(device: Device, config: str, rate: str) -> None:
    skipping, other = Job(device, {**SKIPPING[config], "skip_nonfinite": True}), Job(device, SKIPPING[config])
    rates = [learning_rates()[rate]() for _ in range(2)]
    skipping.optimizer.learning_rate, other.optimizer.learning_rate = rates
    for step in range(10):
        if isinstance(rates[0], Rates):
            rates[0].now = rates[1].now = 0.01 / (step + 1)
        gradients = skipping.gradients(step)
        given = spoilt(gradients, step) if step in BAD else gradients
        assert skipping.optimizer.apply_gradients(skipping.pairs(given)) is None
        if step not in BAD:
            other.optimizer.apply_gradients(other.pairs(gradients))
    assert_same_state(skipping, other)
    assert int(skipping.optimizer.iterations) == 10 - len(BAD)
    assert skipping.optimizer.skipped_steps == len(BAD)
    if isinstance(rates[0], Rates):
        assert rates[0].calls == 10


@pytest.mark.parametrize("config", ["plain", "value and global norm"])
def test_a_bad_step_beside_the_state_before_it(device: Device, config: str) -> None:
    """The first step too, which creates slots of zeros; read after each step, so that the host knows every count."""
    job = Job(device, {**CONFIGS[config], "skip_nonfinite": True})
    before = None
    for step in (1, 0, 4, 5, 2, 8):
        gradients = job.gradients(step)
        job.optimizer.apply_gradients(job.pairs(spoilt(gradients, step) if step in BAD else gradients))
        after = job.state()
        assert (after == before) == (step in BAD) or before is None
        if before is None:
            assert all(not np.any(slot.numpy()) for slot in job.optimizer.weights)
        before = after
    assert int(job.optimizer.iterations) == 2


@pytest.mark.thorough
@pytest.mark.parametrize("launch", [HostDevice(threads=2), HostDevice(block_size=96, max_blocks=2)])
def test_with_real_barriers(launch: HostDevice) -> None:
    job = Job(launch, {"skip_nonfinite": True, "clipvalue": 0.5, "telemetry": True})
    for step in (0, 1, 2):
        gradients = job.gradients(step)
        job.optimizer.apply_gradients(job.pairs(spoilt(gradients, step) if step in BAD else gradients))
    expected = Job(gpu_adam.get_device(), {"clipvalue": 0.5})
    for step in (0, 2):
        expected.optimizer.apply_gradients(expected.pairs(expected.gradients(step)))
    assert_same_state(job, expected)
    assert job.optimizer.skipped_steps == 1


def test_large_finite_gradients_are_no_bad_step(device: Device) -> None:
    """Squares whose sum is infinite, in float64; and what clipping by value hides is bad nevertheless."""
    for value, bound, done in ((1e200, None, 1), (-np.inf, 1.0, 0)):
        variable = Variable(np.ones(10), device=device)
        optimizer = Adam(skip_nonfinite=True, clipvalue=bound)
        optimizer.apply_gradients([(device.array(np.full(10, value)), variable)])
        assert int(optimizer.iterations) == done


def test_a_variable_twice_and_an_empty_one(device: Device) -> None:
    """Both updates of the variable are left out where one of the gradients is bad."""
    variable, empty = Variable(np.ones(3, np.float32)), Variable(np.ones((0, 2), np.float32))
    optimizer = Adam(skip_nonfinite=True)
    good, bad, none = (device.array(np.array(g, np.float32)) for g in ([1, 2, 3], [1, np.nan, 3], np.zeros((0, 2))))
    optimizer.apply_gradients([(good, variable), (bad, variable), (none, empty)])
    assert int(optimizer.iterations) == 0
    assert_same_bits(variable.numpy(), np.ones(3, np.float32))
    optimizer.apply_gradients([(good, variable), (good, variable), (none, empty)])
    assert int(optimizer.iterations) == 1
    assert variable.numpy()[0] < 1


def test_constraints_meet_what_is_there(device: Device) -> None:
    variable = Variable(np.full(3, 2.0, np.float32), constraint=lambda v: np.minimum(v.numpy(), np.float32(1)))
    optimizer = Adam(skip_nonfinite=True)
    optimizer.apply_gradients([(device.array(np.full(3, np.nan, np.float32)), variable)])
    assert_same_bits(variable.numpy(), np.ones(3, np.float32))
    assert int(optimizer.iterations) == 0


def test_the_counter_may_be_set_at_any_time(device: Device) -> None:
    """By assignment, through the variable, by a callable that reads it; the steps go on from there."""
    job, other = Job(device, {"skip_nonfinite": True}), Job(device, {})
    counts = itertools.cycle([0.01])
    seen: list[int] = []

    def rate() -> float:
        seen.append(int(job.optimizer.iterations))
        return next(counts)

    counter = job.optimizer.iterations
    for step in range(8):
        gradients = job.gradients(step)
        if step in (2, 3):
            job.optimizer.iterations = other.optimizer.iterations = 40 + step
        if step == 4:
            counter.assign(7)
            other.optimizer.iterations = 7
        if step == 6:
            job.optimizer.learning_rate = rate
        for bad in (True, False):
            given = spoilt(gradients, 1) if bad else gradients
            job.optimizer.apply_gradients(job.pairs(given))
        other.optimizer.apply_gradients(other.pairs(gradients))
    assert seen == [9, 9, 10, 10]
    assert int(job.optimizer.iterations) == int(other.optimizer.iterations) == 11
    assert_same_state(job, other)


def test_several_devices_are_refused() -> None:
    one, two = HostDevice(threads=1), HostDevice(threads=2)
    pairs = [(np.ones(3, np.float32), Variable(np.ones(3, np.float32), device=each)) for each in (one, two)]
    optimizer = Adam(skip_nonfinite=True)
    variables = [variable for _, variable in pairs]
    with unchanged(optimizer, *variables), pytest.raises(ArgumentValueError, match="must lie on one device for a step"):
        optimizer.apply_gradients(pairs)
    for pair in pairs:  # one after the other they count on
        optimizer.apply_gradients([pair])
    optimizer.apply_gradients([(np.full(3, np.nan, np.float32), variables[0])])
    optimizer.apply_gradients(pairs[1:])
    assert (int(optimizer.iterations), optimizer.skipped_steps) == (3, 1)


def test_a_flag_of_another_search(device: Device) -> None:
    """GradScaler of torch says by a number on the device whether its gradients were finite."""
    job, other = Job(device, {}), Job(device, {})
    scale = device.array(np.float32(8))
    optimizer = job.optimizer
    for step, flag in enumerate((0.0, 1.0, 0.0, None, 1.0)):
        gradients = job.gradients(step)
        pairs, rule = job.pairs(gradients), optimizer._rule(scale, is_guarded=True)
        found = None if flag is None else device.array(np.float32(flag))
        done = optimizer._controller.step(pairs, rule, optimizer._hyper, optimizer._clip, Incoming(scale, found))
        assert done is None or device.name == "host" or flag is None
        if not flag:
            other.optimizer.apply_gradients(other.pairs(gradients), grad_scale=8.0)
    optimizer.apply_gradients(job.pairs(job.gradients(9)))  # without a guard, for which the last count is waited
    other.optimizer.apply_gradients(other.pairs(job.gradients(9)))
    assert_same_state(job, other)
    assert int(optimizer.iterations) == 4


AVERAGES = {"use_ema": True, "ema_momentum": 0.75}
OVERWRITING: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "float32, float64": ({}, ("float32", "float64")),
    "complex64, complex128": ({"amsgrad": True}, ("complex64", "complex128")),
    "real and imaginary parts": ({"complex_mode": "real_imag"}, ("complex64",)),
    "masters": ({"master_weights": True}, ("float16",)),
    "chance": ({"stochastic_rounding": True, "slot_dtype": "bfloat16"}, ("bfloat16",)),
}


@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize("name", cases(OVERWRITING, ("float32, float64", "real and imaginary parts", "masters")))
def test_averages_overwrite_where_steps_are_left_out(device: Device, name: str, frequency: int) -> None:
    """By the number of steps that were done; rows and other elements without a gradient are overwritten too."""
    config, dtypes = OVERWRITING[name]
    config = {**config, **AVERAGES, "ema_overwrite_frequency": frequency}
    job, other = Job(device, {**config, "skip_nonfinite": True}, dtypes), Job(device, config, dtypes)
    for step in range(10):
        gradients = job.gradients(step)
        if step in (0, 3, 4, 9):
            gradients[step % 3].reshape(-1)[-1] = np.nan
        else:
            other.optimizer.apply_gradients(other.pairs(gradients))
        job.optimizer.apply_gradients(job.pairs(gradients))
    assert job.optimizer.skipped_steps == 4
    assert_same_state(job, other)
    overwritten = [variable.numpy() for variable in job.variables]
    averages = [job.optimizer.get_slot(variable, "average").numpy() for variable in job.variables]
    for variable, average in zip(overwritten, averages, strict=True):
        assert_same_bits(variable, average.astype(variable.dtype))


@pytest.mark.parametrize("kind", ["found_inf", "grad_scale", "accumulated", "several"])
def test_other_steps_that_end_with_averages(device: Device, kind: str) -> None:
    """Whatever makes the device decide, for a part of the variables too, and where the count is assigned."""
    config = {**AVERAGES, "ema_overwrite_frequency": 2}
    other = Job(device, config)
    job = Job(device, config if kind in ("found_inf", "grad_scale") else {**config, "skip_nonfinite": True})
    flag, scale = (device.array(np.float32(number)) for number in (0, 1))
    for step in range(9):
        is_bad, places = step in (1, 4), slice(step % 2, None) if kind == "several" else slice(None)
        gradients = job.gradients(step)
        own, others = job.pairs(gradients)[places], other.pairs(gradients)[places]
        if kind == "several":
            own, others = [*own, *own[:1]], [*others, *others[:1]]
        if step == 6:
            job.optimizer.iterations = other.optimizer.iterations = 11
        if kind == "found_inf":
            flag[...] = is_bad
            rule = job.optimizer._rule(is_guarded=True)
            job.optimizer._controller.step(own, rule, job.optimizer._hyper, job.optimizer._clip, Incoming(None, flag))
        elif kind == "grad_scale":  # every other step is decided on the host
            is_bad = False
            job.optimizer.apply_gradients(own, grad_scale=scale if step % 3 else None)
        else:
            if is_bad:
                own[0][0].reshape(-1)[-1:] = np.inf
            if kind == "accumulated":
                job.optimizer.accumulate(own)
            job.optimizer.apply_gradients(None if kind == "accumulated" else own)
        if not is_bad:
            other.optimizer.apply_gradients(others)
    assert_same_state(job, other)
    assert job.optimizer.iterations == other.optimizer.iterations


# The loss scale.


class Oracle:
    """A loss scale in NumPy."""

    def __init__(self, initial: float, interval: int) -> None:
        self.scale, self.good, self.interval = np.float32(initial), 0, interval

    def step(self, is_bad: bool) -> None:
        """Follow a step."""
        self.good = 0 if is_bad else self.good + 1
        if is_bad:
            self.scale = max(self.scale / np.float32(2), np.finfo(np.float32).tiny)
        elif self.good == self.interval:
            self.good = 0
            if self.scale <= 2.0**125:
                self.scale = self.scale * np.float32(2)


@pytest.mark.parametrize(
    ("initial", "interval", "share"), [(2.0**15, 5, 0.1), (2.0**126, 2, 0.1), (2.0**-125, 50, 0.7), (3.0, 1, 0.5)]
)
def test_the_loss_scale_follows(device: Device, initial: float, interval: int, share: float) -> None:
    """200 steps, some of them bad: the scale, the good steps, and the variable to the bit."""
    rng = np.random.default_rng(3)
    optimizer = Adam(0.01, loss_scale=LossScale(initial, interval))
    plain, oracle = Adam(0.01), Oracle(initial, interval)
    variable, other = (Variable(np.ones(4, np.float32), device=device) for _ in range(2))
    scales, bad_steps = [], 0
    for step in range(200):
        gradient, is_bad = rng.standard_normal(4).astype(np.float32), rng.random() < share
        exact = np.float32(oracle.scale)
        with np.errstate(over="ignore"):
            given = flushed(gradient * exact)
        if is_bad:
            given[step % 4] = np.inf
        is_bad = not np.isfinite(given).all()
        bad_steps += is_bad
        optimizer.apply_gradients([(device.array(given), variable)])
        if not is_bad:
            inverse = np.float32(1.0 / float(exact))
            plain.apply_gradients([(device.array(given * inverse), other)])
        oracle.step(is_bad)
        if step % 20 == 19:
            loss_scale = optimizer.loss_scale
            assert loss_scale is not None
            scales.append(loss_scale.value)
            assert loss_scale.value == oracle.scale
            assert optimizer.export()["good_steps"] == oracle.good
    assert_same_bits(variable.numpy(), other.numpy())
    assert optimizer.skipped_steps == bad_steps
    assert int(optimizer.iterations) == 200 - bad_steps
    assert {initial} < {initial, *scales}


def test_what_the_loss_is_multiplied_by(device: Device) -> None:
    """A live array of the device, there before the first step, which a step changes in place."""
    optimizer = Adam(loss_scale=LossScale(8.0, 2))
    assert optimizer.loss_scale is not None
    array = optimizer.loss_scale.array
    assert (array.shape, array.dtype, float(array)) == ((), np.float32, 8.0)
    variable = Variable(np.ones(2, np.float32))
    for _ in range(2):
        optimizer.apply_gradients([(device.array(np.ones(2, np.float32)) * array, variable)])
    assert float(array) == optimizer.loss_scale.value == 16.0
    assert Adam().loss_scale is None


def test_minimize_multiplies_the_loss(device: Device) -> None:
    """A scale that is a power of two changes no bit, and gradients that are not multiplied would."""
    values = np.linspace(-1, 1, 5).astype(np.float32)
    results = []
    for loss_scale in (None, LossScale(2.0**10, 2)):
        variable = Variable(values, device=device)
        optimizer = Adam(0.1, epsilon=1e-3, loss_scale=loss_scale)

        def loss(variable: Any = variable) -> Any:
            return (variable * variable).sum()

        for grad_loss in (None, 0.5):
            optimizer.minimize(loss, [variable], grad_loss)
        optimizer.get_updates(loss, [variable])
        assert_same_bits(device.numpy(optimizer.get_gradients(loss, [variable])[0]), 2 * variable.numpy())
        factor = np.float32(1 if loss_scale is None else 2 * 1024)  # which has doubled
        assert optimizer.loss_scale is None or optimizer.loss_scale.value == factor
        gradient = device.array(values * factor)
        optimizer.minimize(None, [variable], grad_fn=[gradient].copy)
        results.append([variable.numpy(), *optimizer.get_weights()[-2:]])
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


def test_a_scale_of_the_caller_comes_in_place_of_the_loss_scale(device: Device) -> None:
    variables = [Variable(np.ones(3, np.float32)) for _ in range(2)]
    gradient = np.array([1, 2, 3], np.float32)
    scaled, plain = Adam(loss_scale=LossScale(8.0)), Adam()
    scaled.apply_gradients([(device.array(32 * gradient), variables[0])], grad_scale=32)
    plain.apply_gradients([(device.array(gradient), variables[1])])
    assert_same_bits(variables[0].numpy(), variables[1].numpy())


def going_on(job: Job, steps: range) -> None:
    for step in steps:
        gradients = job.gradients(step, scale=4.0)
        job.optimizer.apply_gradients(job.pairs(spoilt(gradients, step) if step in BAD else gradients))


@pytest.mark.parametrize("way", ["export", "weights", "file", "copy"])
def test_the_state_goes_on_elsewhere(device: Device, way: str, tmp_path: Path) -> None:
    """Between bad steps, with a scale that has moved and good steps counted."""
    config = {"loss_scale": LossScale(64.0, 3), "use_ema": True}
    whole, first = Job(device, config), Job(device, config)
    going_on(whole, range(10))
    going_on(first, range(7))
    if way == "copy":
        second = copy.deepcopy(first)
    else:
        second = Job(device, {**config, "loss_scale": LossScale(2.0, 3)})
        for mine, its in zip(second.variables, first.variables, strict=True):
            mine.assign(its)
        second.optimizer.build(second.variables)
        if way == "export":
            second.optimizer.restore(first.optimizer.export())
        elif way == "weights":
            second.optimizer.set_weights(first.optimizer.get_weights())
        else:
            first.optimizer.save(tmp_path / "a.npz")
            second.optimizer.load(tmp_path / "a.npz")
    going_on(second, range(7, 10))
    assert_same_state(second, whole)
    assert set(second.values()) == set(whole.values()) >= {"iterations", "loss_scale", "good_steps"}
    assert [contents(weight)[0] for weight in second.optimizer.weights[:3]] == ["<i8", "<f4", "<i8"]


def test_a_file_without_a_loss_scale(tmp_path: Path) -> None:
    job, scaled = Job(gpu_adam.get_device(), {}), Job(gpu_adam.get_device(), {"loss_scale": LossScale()})
    for each in (job, scaled):
        each.optimizer.build(each.variables)
    job.optimizer.save(tmp_path / "a.npz")
    with unchanged(scaled.optimizer), pytest.raises(CheckpointError, match="nothing for 'loss_scale'"):
        scaled.optimizer.load(tmp_path / "a.npz")


@pytest.mark.parametrize("scale", [0.0, -8.0, np.nan, np.inf])
def test_a_state_with_a_scale_that_is_none(device: Device, scale: float) -> None:
    job = Job(device, {"loss_scale": LossScale()})
    job.optimizer.build(job.variables)
    state = {**job.optimizer.export(), "loss_scale": np.float32(scale)}
    with unchanged(job.optimizer), pytest.raises(ArgumentValueError, match=r"must lie in \[2\^-126, 2\^126\]"):
        job.optimizer.restore(state)


def test_amsgrads_weights_fit_without_amsgrad_beside_a_loss_scale(device: Device) -> None:
    jobs = [Job(device, {"amsgrad": amsgrad, "loss_scale": LossScale()}) for amsgrad in (True, False)]
    for job in jobs:
        job.optimizer.build(job.variables)
    going_on(jobs[0], range(3))
    jobs[1].optimizer.set_weights(jobs[0].optimizer.get_weights())
    for mine, its in zip(jobs[1].optimizer.weights, jobs[0].optimizer.weights, strict=False):
        assert contents(mine) == contents(its)


def test_the_configuration_knows_them() -> None:
    config = {"skip_nonfinite": True, "telemetry": True, "loss_scale": {"initial": 8.0, "growth_interval": 3}}
    optimizer = Adam(skip_nonfinite=True, telemetry=True, loss_scale=LossScale(8, 3))
    found = optimizer.get_config()
    assert {name: found[name] for name in config} == config
    assert Adam.from_config(found).flavour == optimizer.flavour
    assert not set(config) & set(Adam().get_config())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (8.0, "loss_scale must be a LossScale or None (got 8.0)"),
        (LossScale(0.0), "loss_scale's initial must lie in"),
        (LossScale(float("nan")), "loss_scale's initial must lie in"),
        (LossScale(1e39), "loss_scale's initial must lie in"),
        (LossScale("8"), "loss_scale's initial must be a real number"),  # type: ignore[arg-type]
        (LossScale(8.0, 0), "loss_scale's growth_interval must be a whole number >= 1 (got 0)"),
        (LossScale(8.0, 2.5), "loss_scale's growth_interval must be a whole number"),  # type: ignore[arg-type]
        ({"initial": 8.0, "growth": 2}, "loss_scale's 'growth' must be one of initial, growth_interval"),
    ],
)
def test_settings_that_are_none(value: Any, words: str) -> None:
    with pytest.raises((ArgumentTypeError, ArgumentValueError)) as caught:
        Adam(loss_scale=value)
    assert words in str(caught.value)


def test_a_loss_scale_stays_where_it_is() -> None:
    optimizer = Adam(loss_scale=LossScale())
    assert optimizer.loss_scale is not None  # which creates it on the default device
    elsewhere = Variable(np.ones(2, np.float32), device=HostDevice(threads=1))
    with unchanged(optimizer, elsewhere), pytest.raises(ArgumentValueError, match="as the scale does"):
        optimizer.apply_gradients([(np.ones(2, np.float32), elsewhere)])


# Telemetry.


@pytest.mark.parametrize("config", cases(CONFIGS, QUICK))
def test_telemetry(device: Device, config: str) -> None:
    """Of the last step: the norm before it is clipped, of what is left of clipping by value."""
    job = Job(device, {**CONFIGS[config], "telemetry": True, "loss_scale": LossScale(4.0, 2)})
    optimizer = job.optimizer
    assert optimizer.read_telemetry() is None
    scale, skipped = 4.0, 0
    for step in (0, 1, 2, 3, 0):
        gradients = job.gradients(step, scale=10.0)
        optimizer.apply_gradients(job.pairs(spoilt(gradients, step) if step in BAD else gradients))
        skipped += step in BAD
        optimizer.synchronize()
        found = optimizer.read_telemetry()
        assert found is not None
        numbers = int(optimizer.iterations), 0.0, int(step in BAD), skipped, scale
        assert found._replace(grad_norm=0.0)[:5] == numbers
        if step not in BAD:
            bound = CONFIGS[config].get("clipvalue", np.inf)
            sums = [np.sum(np.clip(g.astype(np.float64) / scale, -bound, bound) ** 2) for g in gradients]
            np.testing.assert_allclose(found.grad_norm, np.sqrt(np.sum(sums)), rtol=1e-6)
        scale = {0: 4.0, 1: 2.0, 2: 2.0, 3: 4.0}[step]
    assert optimizer.skipped_steps == 1


MEASURED: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    **{name: (("float32", "float64"), config) for name, config in CONFIGS.items()},
    "averages": (("float32", "float64"), {"use_ema": True}),
    "complex": (("complex64", "complex128"), {"clipvalue": 0.5}),
    "complex, by parts": (("complex64", "complex128"), {"complex_mode": "real_imag"}),
    "masters": (("float16", "float32"), {"master_weights": True}),
    "masters and averages": (("bfloat16", "float16"), {"master_weights": True, "use_ema": True}),
}


def kept_numbers(job: Job) -> list[Array]:
    """What the next step goes on from: variables of 32 bits or more, and the masters of others."""
    return [
        (job.optimizer.get_slot(variable, "master") if variable.dtype.itemsize == 2 else variable).numpy()
        for variable in job.variables
    ]


def norm_of(arrays: list[Array]) -> float:
    parts = [array.reshape(-1).view(array.real.dtype).astype(np.float64) for array in arrays]
    return float(np.sqrt(sum(np.sum(part**2) for part in parts)))


def assert_norms_of_steps(job: Job, steps: tuple[int, ...]) -> None:
    """The norms of update and variables are those of what lies in memory, which is bad in some of these steps.

    float64 sums of n squares in two orders differ by less than 2 n 2^-53, and the roots by half as much.
    """
    job.optimizer.apply_gradients(job.pairs(job.gradients(0)))
    count = sum(2 * variable.size for variable in job.variables)
    for step in steps:
        before, gradients = kept_numbers(job), job.gradients(step, scale=1.0 + step)
        job.optimizer.apply_gradients(job.pairs(spoilt(gradients, step) if step in BAD else gradients))
        job.optimizer.synchronize()
        found, after = job.optimizer.read_telemetry(), kept_numbers(job)
        assert found is not None
        moved = [one - other for one, other in zip(after, before, strict=True)]  # rounded as the kernels round it
        assert (found.update_norm == 0) == (step in BAD)
        np.testing.assert_allclose(found.update_norm, norm_of(moved), rtol=count * 2.0**-53, atol=0)
        np.testing.assert_allclose(found.param_norm, norm_of(after), rtol=count * 2.0**-53, atol=0)


@pytest.mark.parametrize("kind", cases(MEASURED, ("plain", "averages", "complex", "masters")))
def test_norms_of_updates_and_variables(device: Device, kind: str) -> None:
    dtypes, config = MEASURED[kind]
    assert_norms_of_steps(Job(device, {**config, "telemetry": True, "skip_nonfinite": True}, dtypes), (2, 1, 3, 4, 6))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "launch",
    [HostDevice(threads=1, max_blocks=1), HostDevice(block_size=1), HostDevice(block_size=96, max_blocks=2)],
    ids=["one block", "blocks of 1", "blocks of 96"],
)
def test_norms_in_every_launch_shape(launch: HostDevice) -> None:
    assert_norms_of_steps(Job(launch, {"telemetry": True, "skip_nonfinite": True}), (2, 1))


@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        *(("bfloat16", config) for config in ({}, {"stochastic_rounding": True}, {"use_ema": True})),
        pytest.param("float16", {}, marks=pytest.mark.thorough),
        ("float16", {"use_ema": True}),
    ],
)
def test_norms_of_variables_that_are_rounded(device: Device, dtype: str, config: dict[str, Any]) -> None:
    """The variable as it lies in memory, the update before that: by the rate, though few elements land elsewhere.

    Adam's first step moves what has a gradient g by the rate / (1 + 1e-7 / sqrt(0.001) |g|).
    """
    job = Job(device, {**config, "telemetry": True}, (dtype,))
    for step in (0, 2):
        job.optimizer.apply_gradients(job.pairs(job.gradients(step)))
        job.optimizer.synchronize()
        found = job.optimizer.read_telemetry()
        assert found is not None
        values = [variable.numpy().astype(np.float64) for variable in job.variables]
        np.testing.assert_allclose(found.param_norm, norm_of(values), rtol=kernels.CHUNK * 2.0**-52)
        if step == 0:
            elements = sum(variable.size for variable in job.variables[:-1]) + 2 * job.variables[-1].shape[1]
            np.testing.assert_allclose(found.update_norm, 0.01 * np.sqrt(elements), rtol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("dtypes", "config"),
    [
        (("float32", "float64"), {"amsgrad": True, "use_ema": True, "clipvalue": 0.5}),
        (("complex64", "complex128"), {}),
        (("float16", "bfloat16"), {}),
        (("float16", "bfloat16"), {"master_weights": True, "use_ema": True}),
        (("bfloat16",), {"stochastic_rounding": True, "seed": 3}),
    ],
)
def test_measuring_changes_no_bit(device: Device, dtypes: tuple[str, ...], config: dict[str, Any]) -> None:
    measured, plain = Job(device, {**config, "telemetry": True}, dtypes), Job(device, config, dtypes)
    for step in range(3):
        for job in (measured, plain):
            job.optimizer.apply_gradients(job.pairs(job.gradients(step)))
    assert_same_state(measured, plain)


def test_norms_before_the_first_step_that_is_not_left_out(device: Device) -> None:
    variable = Variable(np.full(3, 2.0, np.float32), device=device)
    optimizer = Adam(skip_nonfinite=True, telemetry=True)
    found = []
    for number in (np.nan, 1.0, np.inf):
        optimizer.apply_gradients([(device.array(np.full(3, number, np.float32)), variable)])
        optimizer.synchronize()
        read = optimizer.read_telemetry()
        assert read is not None
        found.append(read)
    assert [read.update_norm > 0 for read in found] == [False, True, False]
    assert np.isnan(found[0].param_norm)
    assert found[1].param_norm == found[2].param_norm == pytest.approx(2.0 * np.sqrt(3), rel=1e-2)


def test_telemetry_alone_leaves_no_step_out(device: Device) -> None:
    variable = Variable(np.ones(3, np.float32))
    optimizer = Adam(telemetry=True)
    gradient = device.array(np.array([3, np.nan, np.inf], np.float32))
    assert optimizer.apply_gradients([(gradient, variable)]) == 1
    optimizer.synchronize()
    found = optimizer.read_telemetry()
    assert found is not None
    assert (found.step, found.nonfinite, found.skipped, found.loss_scale) == (1, 2, 0, 1.0)
    assert np.isnan(variable.numpy()[1])


def test_telemetry_is_asked_for_at_construction() -> None:
    with pytest.raises(ArgumentValueError, match="construct the optimizer with telemetry=True"):
        Adam().read_telemetry()
