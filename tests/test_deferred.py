"""Deferred updates give the bits of updates of all rows, whatever rows have missed, and whoever looks when."""

from typing import Any

import numpy as np
import pytest
from twins import Twins, numbers, touches

from gpu_adam import LossScale, Variable, kernels
from gpu_adam.devices import Device

KINDS = ("uniform", "zipf", "adversarial")
ROWS = 40


def special(rows: int, columns: int, dtype: str) -> np.ndarray:
    """Values among which are zeros of both signs, denormal and huge numbers, infinities and NaN, a row of each."""
    rng = np.random.default_rng(1)
    values = numbers(rng, (rows, columns), dtype)
    limits = np.finfo(np.dtype("float32" if dtype == "bfloat16" else dtype))
    tiny = float(limits.tiny)
    for row, value in enumerate((0.0, -0.0, tiny, tiny / 8, -tiny / 8, float(limits.max) / 2, np.inf, np.nan, 1.0)):
        if row + 4 < rows:
            values[row + 4] = value
    return values


def program(twins: Twins, kind: str, steps: int = 90, *, bad: bool = False, seed: int = 2) -> None:
    """Sparse steps of variable 0, with reads in between; with `bad`, some gradients are not finite."""
    rng = np.random.default_rng(seed)
    variable = twins.variables[0][0]
    (rows, *row), dtype = variable.shape, variable.dtype.name
    was_behind = False
    for step in range(steps):
        indices = touches("empty" if step % 17 == 5 else kind, rng, rows, step)
        values = numbers(rng, (len(indices), *row), dtype)
        if bad and step % 13 == 4 and len(indices):
            values[0] = np.inf
        twins.step(((values, indices), 0))
        was_behind |= step % 30 == 25 and twins.behind > 0
        if step % 30 == 29:
            twins.check(f"after step {step}")
    twins.check()
    assert was_behind or rows < 8


FLAVOURS: dict[str, dict[str, Any]] = {
    "plain": {},
    "large steps": {"learning_rate": 10.0},
    "negative rate": {"learning_rate": -0.05},
    "tiny epsilon": {"epsilon": 1.5e-38},
    "no epsilon": {"epsilon": lambda: 0.0},
    "huge epsilon": {"epsilon": 1e10},
    "betas of 0": {"beta_1": 0.0, "beta_2": 0.0},
    "short memory": {"beta_1": 0.1, "beta_2": 0.5},
    "long memory": {"beta_1": 0.999, "beta_2": 0.99999},
    "paper": {"epsilon_form": "paper"},
    "deferral 1": {"max_deferral": 1},
    "deferral 2": {"max_deferral": 2},
    "deferral 13": {"max_deferral": 13},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "weight_decay": {"weight_decay": 0.02},
    "strong decay": {"weight_decay": 15.0},
    "growth": {"weight_decay": 0.1, "learning_rate": -0.05},
    "l2": {"l2": 0.03},
    "both decays": {"l2": 0.03, "weight_decay": 0.02},
    "clipvalue": {"clipvalue": 0.5},
    "clipnorm": {"clipnorm": 0.7},
    "global_clipnorm": {"global_clipnorm": 0.7},
    "ema": {"use_ema": True, "ema_momentum": 0.9},
    "ema that overwrites": {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 7},
    "skip_nonfinite": {"skip_nonfinite": True},
    "loss_scale": {"loss_scale": LossScale(8.0, 5)},
    "many": {
        "amsgrad": True,
        "weight_decay": 0.02,
        "use_ema": True,
        "skip_nonfinite": True,
        "clipnorm": 0.7,
        "maximize": True,
    },
    "bfloat16 slots": {"slot_dtype": "bfloat16"},
}
QUICK = ("plain", "no epsilon", "betas of 0", "deferral 2")
HALF_FLAVOURS: dict[str, dict[str, Any]] = {
    **{name: FLAVOURS[name] for name in ("plain", "weight_decay", "many", "bfloat16 slots")},
    "master": {"master_weights": True},
    "decayed master": {"master_weights": True, "weight_decay": 0.02, "use_ema": True, "ema_overwrite_frequency": 7},
    "stochastic": {"stochastic_rounding": True, "seed": 5},
    "decayed stochastic": {"stochastic_rounding": True, "weight_decay": 0.02, "use_ema": True},
    "stochastic, short": {"stochastic_rounding": True, "slot_dtype": "bfloat16", "amsgrad": True},
}
OTHERS = ("plain", "weight_decay", "many")


def cases() -> list[Any]:
    found = []
    for name, config in FLAVOURS.items():
        marks = () if name in QUICK else (pytest.mark.thorough,)
        found.append(pytest.param("float32", config, id=f"float32-{name}", marks=marks))
    for dtype in ("float64", "complex64", "complex128"):
        for mode in ("abs2", "real_imag") if dtype.startswith("c") else ("abs2",):
            for name in OTHERS:
                config, mark = {**FLAVOURS[name], "complex_mode": mode}, pytest.mark.thorough
                found.append(pytest.param(dtype, config, id=f"{dtype}-{mode}-{name}", marks=mark))
    for dtype in kernels.HALVES:
        for name, config in HALF_FLAVOURS.items():
            if "stochastic" not in name or dtype == "bfloat16":
                found.append(pytest.param(dtype, config, id=f"{dtype}-{name}", marks=pytest.mark.thorough))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "config"), cases())
def test_the_bits_are_those_of_updates_of_all_rows(
    device: Device, dtype: str, config: dict[str, Any], kind: str
) -> None:
    is_bad = "skip_nonfinite" in config or "loss_scale" in config
    program(Twins(device, [special(ROWS, 5, dtype)], **config), kind, bad=is_bad)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 16, 63, 64, 65, 100, 127, 128, 129, 1000, 5000])
def test_rows_of_every_size(device: Device, dtype: str, columns: int) -> None:
    initial = numbers(np.random.default_rng(3), (max(3, min(200, 3000 // columns)), columns), dtype)
    program(Twins(device, [initial], beta_1=0.3, beta_2=0.7), "adversarial", 45 if columns < 500 else 12)


@pytest.mark.parametrize("shape", [(7,), (30,), (5, 2, 3), (1, 5), (1,), (2, 1, 1, 2)], ids=str)
def test_shapes(device: Device, shape: tuple[int, ...]) -> None:
    program(Twins(device, [numbers(np.random.default_rng(4), shape, "float32")]), "zipf", 40)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)], ids=str)
def test_variables_without_elements(device: Device, shape: tuple[int, ...]) -> None:
    twins, count = Twins(device, [np.zeros(shape, np.float32)], max_deferral=2), min(shape[0], 2)
    for _ in range(5):
        twins.step(((np.zeros((count, *shape[1:]), np.float32), np.arange(count)), 0))
    twins.check()


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_variables_at_any_address(device: Device, offset: int) -> None:
    initial = numbers(np.random.default_rng(5), (30, 7), "float32")
    twins = Twins(device, [initial])
    for variables in twins.variables:
        memory = device.array(np.zeros(initial.size + offset, np.float32))
        variables[0] = Variable.over(memory[offset:].reshape(initial.shape), device, "w0")
        variables[0].assign(initial)
    program(twins, "zipf", 60)


def slices(rng: np.random.Generator, count: int, rows: int, columns: int = 5) -> tuple[np.ndarray, np.ndarray]:
    return numbers(rng, (count, columns), "float32"), rng.integers(0, rows, count)


def table(rows: int = ROWS, columns: int = 5, seed: int = 6) -> np.ndarray:
    return numbers(np.random.default_rng(seed), (rows, columns), "float32")


def test_many_indices(device: Device) -> None:
    rng, twins = np.random.default_rng(7), Twins(device, [table(300, 2)])
    for count in (3, 0, kernels.SORT_RUN + 1, 1, 2 * kernels.SORT_RUN + 7, 50):
        twins.step((slices(rng, count, 300, 2), 0))
    twins.check()


@pytest.mark.parametrize("order", ["sds", "ssd", "dss", "sss", "dd"])
def test_a_variable_that_comes_several_times_in_a_step(device: Device, order: str) -> None:
    rng, twins = np.random.default_rng(8), Twins(device, [table()])
    for step in range(12):
        kinds = order if step % 3 == 1 else "s"
        twins.step(*((slices(rng, 4, ROWS) if kind == "s" else table(seed=step), 0) for kind in kinds))
        if step % 5 == 4:
            twins.check(f"after step {step}")
    twins.check()


def test_dense_and_sparse_gradients_by_turns_and_late_variables(device: Device) -> None:
    rng, twins = np.random.default_rng(9), Twins(device, [table(), table(60, 3), table(9, 1)])
    for step in range(40):
        gradients: list[Any] = [(slices(rng, 4, ROWS) if step % 4 else table(seed=step), 0)]
        if step > 10:
            gradients.append((slices(rng, 3, 60, 3), 1))
        if step > 20 and step % 2:
            gradients.append((slices(rng, 2, 9, 1), 2))
        twins.step(*gradients)
        if step % 13 == 12:
            twins.check(f"after step {step}")
    twins.check()


@pytest.mark.thorough
def test_noise_of_the_second_variable(device: Device) -> None:
    """It depends on the variable's place among the others."""
    rng, initial = np.random.default_rng(13), [numbers(np.random.default_rng(s), (ROWS, 5), "bfloat16") for s in (1, 2)]
    twins = Twins(device, initial, stochastic_rounding=True, seed=3)
    for _ in range(20):
        gradients = [(numbers(rng, (3, 5), "bfloat16"), rng.integers(0, ROWS, 3)) for _ in initial]
        twins.step(*((gradient, number) for number, gradient in enumerate(gradients)))
    twins.check()


def test_hyperparameters_that_change(device: Device) -> None:
    """Each step is replayed with the numbers that it had."""
    rng, now = np.random.default_rng(10), [0]
    rates = [0.1, 5.0, 0.0, 0.0, 0.0, -0.1, 1e-30, 0.01]
    twins = Twins(
        device,
        [special(ROWS, 5, "float32")],
        learning_rate=lambda: rates[now[0] // 9 % len(rates)],
        beta_1=lambda: 0.9 if now[0] < 30 else 0.5 + 0.4 * (now[0] % 3) / 3,
        beta_2=lambda: 0.5 if now[0] % 40 < 20 else 0.9 - 0.01 * (now[0] % 7),
        epsilon=lambda: 10.0 ** -(now[0] % 9),
        weight_decay=0.01,
    )
    for step in range(120):
        now[0] = step
        twins.step((slices(rng, 3, ROWS), 0))
        if step % 29 == 28:
            twins.check(f"after step {step}")
    twins.check()


@pytest.mark.thorough
def test_assigned_hyperparameters_groups_and_counters(device: Device) -> None:
    rng, twins = np.random.default_rng(11), Twins(device, [table()], decay=0.01)
    changes: dict[int, Any] = {
        7: lambda o, v: setattr(o, "learning_rate", 0.5),
        13: lambda o, v: setattr(o, "weight_decay", 0.1),
        19: lambda o, v: setattr(o, "beta_1", 0.5),
        23: lambda o, v: o.set_group(v, weight_decay=0.0, beta_2=0.9, learning_rate_multiplier=0.3),
        27: lambda o, v: setattr(o, "iterations", 1000),
        31: lambda o, v: o.set_group(v, weight_decay=None, beta_2=None, epsilon=0.1),
        37: lambda o, v: setattr(o, "weight_decay", 0.0),
        41: lambda o, v: setattr(o, "amsgrad", True),
        47: lambda o, v: setattr(o, "l2", 0.1),
        53: lambda o, v: setattr(o, "amsgrad", False),
        59: lambda o, v: setattr(o, "clipnorm", 0.3),
        61: lambda o, v: setattr(o, "epsilon", 1.0),
    }
    for step in range(70):
        if step in changes:
            twins.both(changes[step])
        twins.step((slices(rng, 3, ROWS), 0))
    twins.check()


@pytest.mark.thorough
def test_scaled_and_accumulated_gradients(device: Device) -> None:
    rng, twins = np.random.default_rng(12), Twins(device, [table()])
    for step in range(20):
        if step % 3 == 2:
            gradient = twins.gradient(slices(rng, 3, ROWS))
            for optimizer, (variable,) in twins.pairs:
                optimizer.accumulate([(gradient, variable)])
                optimizer.accumulate([(gradient, variable)])
                optimizer.apply_gradients()
        else:
            twins.step((slices(rng, 3, ROWS), 0), grad_scale=4.0)
    twins.check()
