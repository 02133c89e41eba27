"""Elements that an index names several times: their gradients are summed in order of occurrence, on every device."""

from typing import Any

import numpy as np
import pytest
from autodiff.cases import random

from gpu_adam import Variable
from gpu_adam.arrays import add_at
from gpu_adam.autodiff import value_and_grad
from gpu_adam.devices import Device

ROWS, COLUMNS = (np.array(numbers) for numbers in ([2, 0, 2, -1, 2, 0, 2], [1, 3, 1, 0, 1, -1, -3]))
KEYS: dict[str, Any] = {
    "rows": ROWS,
    "grid": ROWS[:6].reshape(2, 3),
    "pairs": (ROWS, COLUMNS),
    "columns": (slice(None), COLUMNS),
    "last": (..., ROWS),
    "apart": (ROWS, slice(None), ROWS % 2),
    "new axis": (None, ROWS, slice(1, 3)),
    "reversed": (slice(None, None, -1), COLUMNS),
    "mask and rows": (np.array([True, False, True]), ROWS[:2]),
    "mask of two axes": (np.arange(12).reshape(3, 4) % 5 == 0, ROWS[:3]),
    "one": (ROWS, 2),
    "none": (np.zeros(0, np.int64), np.zeros(0, np.int64)),
}
DTYPES = (np.float32, np.float64, np.complex64, np.complex128)


def moved(key: Any, device: Device) -> Any:
    """The index with its arrays on the device."""
    parts = key if isinstance(key, tuple) else (key,)
    return tuple(device.array(part) if isinstance(part, np.ndarray) else part for part in parts)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_every_index_means_what_it_means_to_numpy(device: Device, key: Any, order: Any) -> None:
    total = np.asarray(random((3, 4, 3)), order=order)
    values = random(total[key].shape)
    found = device.xp.asarray(total, order=order)
    add_at(found, moved(key, device), device.array(values))
    np.add.at(total, key, values)
    np.testing.assert_array_equal(device.numpy(found), total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_adding_one_after_the_other(device: Device, dtype: Any) -> None:
    generator = np.random.default_rng(5)
    # So many of so different a size that another order would give other bits.
    rows = generator.integers(0, 5, 3000)
    values = (random((3000, 2), np.dtype(dtype).kind == "c") * 10.0 ** generator.integers(-6, 6, (3000, 1))).astype(
        dtype
    )
    total = np.ones((5, 2), dtype)
    found = device.array(total)
    add_at(found, device.array(rows), device.array(values))
    for row, value in zip(rows, values, strict=True):
        total[row] += value
    np.testing.assert_array_equal(device.numpy(found), total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_elements_taken_many_times(device: Device, dtype: Any) -> None:
    generator = np.random.default_rng(6)
    rows, columns = generator.integers(0, 3, (2, 500))
    factors = random((500,), np.dtype(dtype).kind == "c").astype(dtype)
    c, there = Variable(np.ones((3, 3), dtype)), [device.array(a) for a in (rows, columns, factors)]
    _, gradient = value_and_grad(lambda: np.sum((c[there[0], there[1]] * there[2]).real), c)
    expected = np.zeros((3, 3), dtype)
    np.add.at(expected, (rows, columns), np.conj(factors))
    np.testing.assert_array_equal(device.numpy(gradient), expected)
