"""Steps that rows have missed, made up for: every phase of replay.cuh, at its borders.

Slots and variables get numbers of all sizes, and rows are touched by gradients of zeros, which leave them alone.
"""

from typing import Any

import numpy as np
import pytest
from twins import Twins

from gpu_adam.devices import Device
from gpu_adam.kernels import dtype_named

REALS, OTHERS = ("float32", "float64"), ("float64", "bfloat16", "float16")


def spread(rng: np.random.Generator, shape: Any, dtype: str, low: float, high: float) -> np.ndarray:
    """Powers of two with exponents in [low, high], times numbers in [1, 2); some are exact powers, zeros, denormals."""
    exponents = rng.uniform(low, high, shape)
    values = np.where(rng.random(shape) < 0.2, 2.0 ** np.round(exponents), 2.0**exponents)
    tiny = float(np.finfo(dtype).tiny)
    special = np.array([0.0, 0.0, tiny, tiny / 4, tiny * 3])
    mixed: np.ndarray = np.where(rng.random(shape) < 0.1, rng.choice(special, shape), values)
    return mixed.astype(dtype)


def signed(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    with_signs: np.ndarray = np.copysign(values, rng.choice([-1.0, 1.0], values.shape))
    return with_signs.astype(values.dtype)


class Table:
    """Twins of one variable whose rows are left to themselves.

    Args:
        device, config: of the twins.
        theta, m, v: what variable and slots are at the beginning.
    """

    def __init__(self, device: Device, theta: np.ndarray, m: np.ndarray, v: np.ndarray, **config: Any) -> None:
        self.twins, self.shape, self.dtype = Twins(device, [theta], **config), theta.shape, theta.dtype
        for optimizer, variables in self.twins.pairs:
            optimizer.build(variables)
            optimizer.get_slot(variables[0], "m").assign(m)
            optimizer.get_slot(variables[0], "v").assign(v)

    def touch(self, *rows: int) -> None:
        """A step whose gradient has zeros for these rows."""
        values = np.zeros((len(rows), *self.shape[1:]), self.dtype)
        self.twins.step(((values, np.array(rows, np.int64)), 0))

    def leave_alone(self, steps: int, seed: int = 0) -> None:
        """So many steps, which now and then touch a row, the first of which never; then compare."""
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            self.touch(*rng.integers(1, self.shape[0], 2) if rng.random() < 0.1 else ())
        self.twins.check()


BETAS = [
    *((0.5, 0.5), (0.9, 0.5), (0.5, 0.9), (0.0, 0.9), (0.9, 0.0), (0.9, 0.999), (0.3, 0.99)),
    *((0.99, 0.9), (0.999, 0.5), (0.9999, 0.9999)),  # in the first two of these steps grow where v shrinks
]
RATES = [1e-30, 1e-3, -1.0, 1e10]
DECAYS = [0.0, 1e-4, 0.01, 0.5, 1.5]


def check_phases(
    device: Device, dtype: str, rate: float, decay: float, columns: int, steps: int, **config: Any
) -> None:
    exponent = 120 if dtype != "float64" else 1000
    real = "float32" if dtype not in REALS else dtype
    for number, (beta_1, beta_2) in enumerate(BETAS):
        rng, shape = np.random.default_rng(number), (16, columns)
        with np.errstate(over="ignore"):
            theta = signed(rng, spread(rng, shape, real, -exponent, 30)).astype(dtype_named(dtype))
        m = signed(rng, spread(rng, shape, real, -exponent, 10))
        v = spread(rng, shape, real, -exponent, 10)
        for row, gap in enumerate((-1, 0, 1, 22, 24, 26, 52, 54, 56)):  # close to what moves theta
            m[row] = (np.abs(theta[row].astype(real)) * 2.0**-gap * rng.uniform(0.4, 2.1, columns)).astype(real)
        Table(
            device,
            *(theta, m, v),
            learning_rate=rate,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=1.0 if number % 2 else 1e-20,
            **{"weight_decay": 0.0 if decay == 0 else decay / abs(rate), **config},
        ).leave_alone(steps, number)


@pytest.mark.parametrize("decay", DECAYS[::2])
@pytest.mark.parametrize("rate", RATES[1:3])
def test_phases(device: Device, rate: float, decay: float) -> None:
    check_phases(device, "float32", rate, decay, 3, 12 if device.name != "host" else 200)


MORE: list[Any] = [
    *(("float32", rate, decay, (1, 5), {}) for rate in RATES for decay in DECAYS),
    *(("float32", rate, 0.01, (3,), config) for rate in RATES for config in ({"amsgrad": True}, {"use_ema": True})),
    ("float32", 1e-3, 0.01, (3,), {"l2": 1e-3}),
    *((dtype, rate, decay, (3,), {}) for dtype in OTHERS for rate in RATES[1:3] for decay in DECAYS[::2]),
]


@pytest.mark.long
@pytest.mark.thorough
@pytest.mark.parametrize(("dtype", "rate", "decay", "columns", "config"), MORE, ids=str)
def test_more_phases(
    device: Device, dtype: str, rate: float, decay: float, columns: tuple[int, ...], config: dict[str, Any]
) -> None:
    for number in columns:
        check_phases(device, dtype, rate, decay, number, 200, **config)


def borders(exponent: int) -> tuple[np.ndarray, np.ndarray]:
    """Thetas at powers of two and beside them, and quotients about 2^exponent times as large."""
    rng = np.random.default_rng(1)
    thetas = np.array([1.0, 1.5, 2.0, np.nextafter(1, 2), np.nextafter(1, 0), -1.0, -4.0, 1.999], np.float32)
    factors = np.array([0.25, 0.5, 0.99, 1.0, 1.01, 1.5, 1.99, 2.0, 2.01, 4.0, 4.1, 8.0])
    theta = np.repeat(thetas[:, None], len(factors), axis=1)
    quotients = np.abs(theta) * factors * 2.0**exponent
    return theta, signed(rng, quotients)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("beta_1", [0.0, 0.5, 0.97, 0.9999])
def test_what_is_too_small_to_move_theta(device: Device, dtype: str, beta_1: float) -> None:
    """With v = 0 and epsilon 1 the quotient is alpha m; alpha is 1 with the paper's epsilon and t = 10^9."""
    theta, quotients = borders(-25 if dtype == "float32" else -54)
    table = Table(
        device,
        *(theta.astype(dtype), quotients.astype(dtype), np.zeros(theta.shape, dtype)),
        learning_rate=1.0,
        beta_1=beta_1,
        beta_2=0.5,
        epsilon=1.0,
    )
    table.twins.both(lambda optimizer, variables: setattr(optimizer, "iterations", 10**9))
    table.leave_alone(60)


def test_steps_grow_where_v_shrinks_faster_than_m(device: Device) -> None:
    """Quotients grow by 1.04 a step: what moves nothing at first does later."""
    theta, quotients = borders(-31)
    shape, v = theta.shape, np.ones(theta.shape, np.float32)
    table = Table(device, theta, quotients.astype(np.float32), v, learning_rate=1.0, beta_1=0.99, beta_2=0.9)
    table.twins.both(lambda optimizer, variables: setattr(optimizer, "iterations", 10**9))
    assert shape[0] > 2
    table.leave_alone(150)


def test_theta_that_decays_is_moved_by_less(device: Device) -> None:
    """Theta loses 1 % a step, the quotient nothing."""
    theta, quotients = borders(-27)
    table = Table(
        device,
        *(theta, quotients.astype(np.float32), np.zeros(theta.shape, np.float32)),
        learning_rate=1.0,
        weight_decay=0.01,
        beta_1=0.99999,
        beta_2=0.5,
        epsilon=1.0,
    )
    table.twins.both(lambda optimizer, variables: setattr(optimizer, "iterations", 10**9))
    table.leave_alone(200)


@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_the_sign_of_zero(device: Device, decay: float) -> None:
    """-0 - 0 is -0, and -0 - (-0) is 0: the sign of a quotient that is zero matters, and rates may change theirs.

    A negative theta may decay to -0.
    """
    thetas = [-0.0, 0.0, -(2.0**-110), 2.0**-110, -1.005 * 2.0**-126, 1.02 * 2.0**-126, -1.0]
    theta = np.array(thetas, np.float32)[:, None].repeat(4, axis=1)
    m = np.array([2.0**-120, -(2.0**-120), 0.0, -0.0], np.float32)[None].repeat(len(theta), axis=0)
    now = [0]
    for turn in (20, 100):
        table = Table(
            device,
            *(theta, m, np.ones(theta.shape, np.float32)),
            learning_rate=lambda turn=turn: -1e-10 if now[0] > turn else 1e-10,
            weight_decay=decay / 1e-10,
            beta_2=0.99999,
        )
        for step in range(60):
            now[0] = step
            table.touch()
        table.twins.check()


@pytest.mark.parametrize(
    "change", [("epsilon", 1e-9), ("learning_rate", 1e3), ("weight_decay", 0.7), ("l2", 0.5)], ids=str
)
def test_numbers_of_some_missed_steps(device: Device, change: tuple[str, float]) -> None:
    """What later steps are bounded by holds for all of them, not for the last one alone."""
    theta, quotients = borders(-30)
    (name, value), before = change, {"learning_rate": 1.0, "epsilon": 1.0, "weight_decay": 1e-5, "l2": 0.0}
    table = Table(
        device,
        *(theta, quotients.astype(np.float32), np.zeros(theta.shape, np.float32)),
        learning_rate=1.0,
        beta_1=0.99,
        epsilon=1.0,
        weight_decay=1e-5,
    )
    table.twins.both(lambda optimizer, variables: setattr(optimizer, "iterations", 10**9))
    for step in range(60):
        for optimizer in table.twins.optimizers:
            if step in (30, 33):
                setattr(optimizer, name, value if step == 30 else before[name])
        table.touch()
    table.twins.check()


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 8, 33])
def test_rows_that_have_missed_different_numbers_of_steps(device: Device, columns: int) -> None:
    rng = np.random.default_rng(3)
    shape = (21, columns)
    theta, m, v = rng.standard_normal(shape), 1e-3 * rng.standard_normal(shape), 1e-4 * rng.random(shape)
    table = Table(device, *(x.astype(np.float32) for x in (theta, m, v)), beta_1=0.4, beta_2=0.6)
    for step in range(60):
        table.touch(*([step % 20] if step % 3 else []), *([20] if step > 55 else []))
    for row in (19, 3, 20):
        table.touch(row, row - 1)
    table.twins.check()


@pytest.mark.parametrize("when", [1, 16, 17, 40])
def test_betas_that_change_once(device: Device, when: int) -> None:
    """Rows that were touched before missed steps of two kinds, others of one."""
    rng = np.random.default_rng(4)
    shape = (12, 3)
    theta, m, v = rng.standard_normal(shape), rng.standard_normal(shape), rng.random(shape)
    table = Table(device, *(x.astype(np.float32) for x in (theta, m, v)))
    for step in range(60):
        if step == when:
            for optimizer in table.twins.optimizers:
                optimizer.beta_1, optimizer.beta_2 = 0.3, 0.8
        table.touch(*([step // 5] if step % 5 == 0 else []))
    table.twins.check()


@pytest.mark.long
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("steps", "config"),
    [
        (100_000, {"max_deferral": 2**17}),
        (70_000, {}),
        (20_000, {"weight_decay": 1e-3}),
        (20_000, {"beta_1": 0.999, "beta_2": 0.99999, "learning_rate": 1e-3}),
    ],
    ids=str,
)
def test_rows_left_alone_for_very_long(device: Device, steps: int, config: dict[str, Any]) -> None:
    """Row k is touched 2^k steps before the end for the last time, the first one never."""
    rng = np.random.default_rng(5)
    twins = Twins(device, [rng.standard_normal((20, 3)).astype(np.float32)], **config)
    gradients = [
        twins.gradient((rng.standard_normal((count, 3)).astype(np.float32), np.arange(1, 1 + count)))
        for count in range(18)
    ]
    for step in range(steps):
        count = (steps - step).bit_length() - 1  # rows 1 to count are still to be touched
        gradient = gradients[min(count, 17) if step % 50 == 0 or step > steps - 20 else 0]
        for optimizer, (variable,) in twins.pairs:
            optimizer.apply_gradients([(gradient, variable)])
    twins.check()
