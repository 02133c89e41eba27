"""Optimizers to exchange, and how far one further step may be apart on both sides.

Both sides begin that step with the same bits, and compute the same equations in another order. Let u be half the
distance from 1 to its neighbour. m and v take up to four roundings on each side, of numbers no larger than the largest
of m, v, g and g². The variable takes one, and its update up to 20 (those of m and v, the root, the quotient and the
scalars, of which 1 - beta^t makes up to 4 times as much at EXACT after STEPS), each of up to u times the largest step,
as the gradients are of one size. Two sides may err in opposite directions, which makes 2 u, the dtype's eps, of each u.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

import gpu_adam
from gpu_adam import Adam, Variable

STEPS = 5
LR = 2.0**-7
EXACT: dict[str, Any] = {"beta_1": 0.875, "beta_2": 0.9375}
"""Numbers of few digits, of which every dtype has the complement too."""
SHAPES: dict[str, tuple[int, ...]] = {"scale": (), "bias": (7,), "kernel": (3, 5)}
Arrays = list[np.ndarray]


def arrays(seed: int, dtype: Any = np.float32, offset: float = 0.0) -> Arrays:
    """One array for each shape."""
    rng = np.random.default_rng(seed)
    made = []
    for shape in SHAPES.values():
        values = rng.standard_normal(shape) + offset
        if np.dtype(dtype).kind == "c":
            values = values + 1j * (rng.standard_normal(shape) + offset)
        made.append(np.asarray(values).astype(dtype))
    return made


def gradients(step: int, dtype: Any = np.float32) -> Arrays:
    """Of one size, so that neither mean vanishes beside its rounding."""
    return arrays(100 + step, dtype, offset=0.5)


def built(dtype: Any = np.float32, values: Arrays | None = None, **config: Any) -> tuple[Adam, list[Variable]]:
    """An optimizer that has made no step, and its variables, on the default device."""
    values = arrays(0, dtype) if values is None else values
    variables = [Variable(value, name=name) for name, value in zip(SHAPES, values, strict=True)]
    adam = Adam(LR, **{"epsilon": 2.0**-20, **EXACT, **config})
    adam.build(variables)
    return adam, variables


def stepped(dtype: Any = np.float32, steps: int = STEPS, **config: Any) -> tuple[Adam, list[Variable]]:
    """An optimizer that has made steps, and its variables."""
    adam, variables = built(dtype, **config)
    for step in range(steps):
        step_on(adam, variables, gradients(step, dtype))
    return adam, variables


def step_on(adam: Adam, variables: Sequence[Variable], grads: Arrays) -> None:
    """Make a step on gradients in host memory."""
    device = gpu_adam.get_device()
    adam.apply_gradients([(device.array(g), v) for g, v in zip(grads, variables, strict=True)])


def slots(adam: Adam, variables: Sequence[Variable], name: str) -> Arrays:
    return [adam.get_slot(variable, name).numpy() for variable in variables]


def assert_same(found: Sequence[Any], expected: Sequence[Any]) -> None:
    """The same dtypes, shapes and bits."""
    for one, other in zip(found, expected, strict=True):
        one, other = np.asarray(one), np.asarray(other)  # noqa: PLW2901
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def assert_near(found: Sequence[Any], expected: Sequence[Any], before: Sequence[Any], roundings: float = 20) -> None:
    """Variables after the further step: see above."""
    eps = eps_of(expected)
    update = max(float(np.abs(y - x).max()) for x, y in zip(before, expected, strict=True))
    assert update > LR / 8, "the step must be one"
    for one, other in zip(found, expected, strict=True):
        apart, allowed = np.abs(one - other), eps * (np.abs(other) + roundings * update)
        assert (apart <= allowed).all(), f"{apart.max()} apart, {allowed.min()} allowed"


def assert_slots_near(found: Sequence[Any], expected: Sequence[Any], grads: Arrays, roundings: float = 4) -> None:
    """Slots after the further step: see above."""
    largest = max(float(np.abs(each).max()) for each in (*expected, *grads))
    for one, other in zip(found, expected, strict=True):
        apart, allowed = float(np.abs(one - other).max()), eps_of(expected) * roundings * max(largest, largest**2)
        assert apart <= allowed, f"{apart} apart, {allowed} allowed"


def eps_of(values: Sequence[Any]) -> float:
    return float(np.finfo(values[0].dtype).eps)
