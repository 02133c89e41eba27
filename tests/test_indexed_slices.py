"""IndexedSlices written out: shape, dense, numpy and norm."""

from typing import Any

import numpy as np
import pytest
from reference import assert_same_bits

from gpu_adam import IndexedSlices, Variable
from gpu_adam.autodiff import value_and_grad
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, SparseIndexError

DTYPES = (np.float32, np.float64, np.complex64, np.complex128)


def some(dtype: Any, count: int = 3000, rows: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows named many times, with values of so different sizes that each order of summing has bits of its own."""
    generator = np.random.default_rng(3)
    indices = generator.integers(0, rows - 1, count)  # the last row is named by none
    values = generator.standard_normal((count, 2)) * 10.0 ** generator.integers(-6, 6, (count, 1))
    values = values.astype(dtype) * (1 + 1j if np.dtype(dtype).kind == "c" else 1)
    values = values.astype(dtype)
    total = np.zeros((rows, 2), dtype)
    for row, value in zip(indices, values, strict=True):
        total[row] += value
    return values, indices, total


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_rows_are_summed_in_order_of_occurrence(device: Device, dtype: Any) -> None:
    values, indices, total = some(dtype)
    slices = IndexedSlices(device.array(values), device.array(indices.astype(np.int32)), [7, 2])
    assert slices.shape == (7, 2)
    assert isinstance(slices.dense(), device.xp.ndarray)
    assert_same_bits(device.numpy(slices.dense()), total)
    assert_same_bits(slices.numpy(), total)
    assert isinstance(slices.numpy(), np.ndarray)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [None, (7, 2)])
def test_norm_is_that_of_the_dense_gradient(device: Device, dtype: Any, shape: Any) -> None:
    values, indices, total = some(dtype)
    norm = IndexedSlices(device.array(values), device.array(indices), shape).norm()
    assert isinstance(norm, device.xp.ndarray)
    assert (norm.shape, norm.dtype) == ((), total.real.dtype)
    np.testing.assert_allclose(device.numpy(norm), np.linalg.norm(total), rtol=4 * np.finfo(dtype).eps)


def test_norm_of_squares_beyond_the_range(device: Device) -> None:
    slices = IndexedSlices(device.array(np.array([3e30, 4e30], np.float32)), device.array(np.array([5, 2])))
    np.testing.assert_allclose(device.numpy(slices.norm()), 5e30, rtol=1e-6)


def test_no_rows(device: Device) -> None:
    slices = IndexedSlices(device.array(np.zeros((0, 2), np.float32)), [], (3, 2))
    assert slices.numpy().tolist() == np.zeros((3, 2)).tolist()
    assert float(slices.norm()) == 0
    assert IndexedSlices(device.array(np.zeros((0, 2))), [], (0, 2)).numpy().shape == (0, 2)


def test_lists_variables_and_indices_in_host_memory(device: Device) -> None:
    values, rows = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), [2, 0, 2]
    for slices in (
        IndexedSlices(values.tolist(), rows),
        IndexedSlices(device.array(values), rows),
        IndexedSlices(device.array(values), np.array(rows, np.uint8)),
        IndexedSlices(Variable(values), Variable(np.array(rows))),
    ):
        assert slices.shape is None
        assert slices.numpy((3, 2)).tolist() == [[3, 4], [0, 0], [6, 8]]
        np.testing.assert_allclose(float(slices.norm()), np.sqrt(125))


def test_of_a_loss(device: Device) -> None:
    table = Variable(np.arange(8.0).reshape(4, 2))
    rows = device.array(np.array([1, 3, 1]))
    _, gradient = value_and_grad(lambda: np.sum(table[rows] ** 2), table)
    assert gradient.shape == (4, 2)
    assert gradient.numpy().tolist() == [[0, 0], [8, 12], [0, 0], [12, 14]]


def test_nothing_is_written_to(device: Device) -> None:
    values, indices = device.array(np.ones((2, 2))), device.array(np.array([1, 1]))
    slices = IndexedSlices(values, indices, (3, 2))
    for _ in range(2):
        slices.dense()
        slices.norm()
    assert (slices.values is values, slices.indices is indices) == (True, True)
    assert device.numpy(values).tolist() == [[1, 1], [1, 1]]
    assert device.numpy(indices).tolist() == [1, 1]


def test_the_shape_may_be_an_array(device: Device) -> None:
    """As TensorFlow's is; also of a single number, which Python takes for an index."""
    slices = IndexedSlices(device.array(np.ones((1, 2))), [0], device.array(np.array([3, 2])))
    assert slices.shape == (3, 2)
    assert IndexedSlices([1.0], [0], np.array([4])).shape == IndexedSlices([1.0], [0], np.array(4)).shape == (4,)
    for bad in (np.array([1.0, 2.0]), np.array([[3, 2]]), np.array([3, -2]), "32"):
        with pytest.raises(ArgumentTypeError, match=r"^shape must be a number >= 0, or a tuple of such"):
            IndexedSlices([[1.0, 2.0]], [0], bad).dense()


def test_an_unknown_shape_is_an_error_that_says_what_to_pass(device: Device) -> None:
    slices = IndexedSlices(device.array(np.ones((1, 2))), [0])
    for call in (slices.dense, slices.numpy):
        with pytest.raises(ArgumentValueError, match=r"must be known \(got no dense_shape\); pass .*dense\(variable"):
            call()


@pytest.mark.parametrize(
    ("values", "indices", "shape", "kind", "words"),
    [
        (
            [[1.0, 2.0]],
            [0],
            (3, 3),
            ArgumentValueError,
            r"shape \(1, 3\) \(got shape \(1, 2\) for a variable",
        ),
        ([[1.0, 2.0]], [0, 1], (3, 2), ArgumentValueError, r"must have shape \(2, 2\)"),
        ([1.0], [0], (), ArgumentValueError, "must have a dimension for the rows"),
        ([[1.0]], [[0]], (3, 1), ArgumentValueError, "must be one-dimensional"),
        ([1.0], [0.0], (3,), ArgumentTypeError, "must be whole numbers"),
        ([1.0], [True], (3,), ArgumentTypeError, "must be whole numbers"),
        ([None], [0], (3,), ArgumentTypeError, "must consist of numbers"),
        ([1.0], ["0"], (3,), ArgumentTypeError, "must consist of numbers"),
        ([1.0], [0], "3", ArgumentTypeError, "must be a number >= 0"),
    ],
)
def test_what_does_not_fit_is_refused(values: Any, indices: Any, shape: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        IndexedSlices(values, indices).dense(shape)
    with pytest.raises(kind, match=words):
        IndexedSlices(values, indices, shape).norm()


@pytest.mark.parametrize("row", [-1, 3])
def test_rows_out_of_range(device: Device, row: int) -> None:
    """Refused where looking costs no wait, else left out, as by an update."""
    slices = IndexedSlices(device.array(np.ones((3, 2))), device.array(np.array([1, row, 1])), (3, 2))
    if device.checks_indices:
        for call in (slices.dense, slices.norm):
            with pytest.raises(SparseIndexError, match=rf"indices\[1\] must lie in \[0, 3\) \(got {row}\)"):
                call()
    else:
        assert slices.numpy().tolist() == [[0, 0], [2, 2], [0, 0]]
        np.testing.assert_allclose(float(slices.norm()), np.sqrt(8))
