"""The scalars of a step: the bits of the plain formula in each dtype, and each hyperparameter read once."""

import ctypes
import ctypes.util
import math
import random
import warnings
from typing import Any

import numpy as np
import pytest
from reference import assert_same_bits

from gpu_adam.step.scalars import Scalars

_powf = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6").powf
_powf.argtypes, _powf.restype = (ctypes.c_float, ctypes.c_float), ctypes.c_float


def expected(hyper: dict[str, Any], iterations: int, dtype: str) -> np.ndarray:
    """The formula, every operation one of NumPy's scalars."""
    real = np.dtype(dtype).type
    rate, beta_1, beta_2, epsilon, decay = (
        real(hyper[name]) for name in ("learning_rate", "beta_1", "beta_2", "epsilon", "decay")
    )
    power, one, t = (_powf if dtype == "float32" else math.pow), real(1), float(iterations + 1)
    if decay > 0:
        rate = rate / (one + decay * real(iterations))
    root = np.sqrt(one - real(power(float(beta_2), t)))
    alpha = (rate * root) / (one - real(power(float(beta_1), t)))
    return np.array([alpha, one - beta_1, one - beta_2, epsilon], dtype)


def some_beta(draw: random.Random) -> float:
    special = [0.0, 0.5, 0.9, 0.999, 1 - 2**-24, 1e-40, 5e-324]
    return draw.choice([draw.choice(special), draw.random(), 1 - 10 ** draw.uniform(-7, 0)])


NONE = {"weight_decay": 0.0, "l2": 0.0}


def some_count(draw: random.Random, *betas: float) -> int:
    """Steps done: any number, and often one near which a power of a beta stops to matter."""
    beta = draw.choice(betas)
    if draw.random() < 0.5 and beta > 1e-300:
        return max(0, int(-draw.uniform(23, 27) / math.log2(beta)) + draw.randint(-3, 2))
    return int(10 ** draw.uniform(0, 18)) - 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bits_of_the_plain_formula(dtype: str) -> None:
    draw = random.Random(8)
    for _ in range(20_000):
        beta_1, beta_2 = some_beta(draw), some_beta(draw)
        hyper = {
            "learning_rate": draw.choice([1, -1]) * 10 ** draw.uniform(-44, 30),
            "beta_1": beta_1,
            "beta_2": beta_2,
            "epsilon": draw.choice([0.0, 10 ** draw.uniform(-37, 3)]),
            "decay": draw.choice([0.0, 10 ** draw.uniform(-10, 3)]),
            **NONE,
        }
        count = some_count(draw, beta_1, beta_2)
        noise, *found, sign, l2, scale, _, _ = Scalars(hyper, count).for_real(dtype)
        assert (noise, sign, l2, scale) == (0, 1, 0, 1)
        assert_same_bits(np.array(found, dtype), expected(hyper, count, dtype), f"{hyper} after {count} steps")
        assert all(type(number) is float for number in found)
        assert [float(np.dtype(dtype).type(number)) for number in found] == list(found)


@pytest.mark.parametrize("decay", [0.0, 1e38])
def test_an_overflow_warns(decay: float) -> None:
    """alpha_t beyond float32's range is infinite as in float32 arithmetic, and so is what decay divides by."""
    hyper = {"learning_rate": 3e38, "beta_1": 0.9, "beta_2": 0.0, "epsilon": 1e-7, "decay": decay, **NONE}
    with pytest.warns(RuntimeWarning, match="overflow"):
        alpha = Scalars(hyper, 5).for_real("float32")[1]
    assert alpha == (0.0 if decay else math.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_bits(np.float32(alpha), expected(hyper, 5, "float32")[0])


def test_each_value_is_read_once() -> None:
    calls: list[str] = []

    def reading(name: str) -> Any:
        def read() -> float:
            calls.append(name)
            return 0.5

        return read

    names = ["learning_rate", "beta_1", "beta_2", "epsilon"]
    scalars = Scalars({**{name: reading(name) for name in names}, "decay": 0.0, **NONE}, 3)
    assert scalars.for_real("float32") == scalars.for_real("float32")
    scalars.for_real("float64")
    assert calls == names
