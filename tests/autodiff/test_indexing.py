"""Picking elements, and gradients that stay sparse."""

from typing import Any

import numpy as np
import pytest

from gpu_adam import IndexedSlices, Variable
from gpu_adam.autodiff import value_and_grad
from gpu_adam.autodiff.sparse_cotangent import SparseCotangent
from gpu_adam.devices import Device

from .cases import DerivativeTests, both, case, random, variable
from .duck import DuckArray

ROWS = np.array([[0, 2, 2], [1, 2, -1]])
DISTINCT = np.array([[0.3, -1.0, 2.0, 0.9], [5.0, 1.1, -3.0, 0.2], [0.0, 0.5, 0.6, -2.0]])

KEYS: dict[str, Any] = {
    "integer": 1,
    "negative": -1,
    "slice": slice(None, None, 2),
    "pair": (1, 2),
    "mixed": (slice(1, 3), 0),
    "new-axis": (slice(None), None, slice(None, None, -1)),
    "ellipsis": (..., 1),
    "rows": ROWS,
    "list": [0, 2, 0],
    "rows-and-all": (ROWS, slice(None)),
    "rows-and-ellipsis": (ROWS, ...),
    "columns": (slice(None), ROWS),
    "both": (np.array([0, 2, 0]), np.array([1, 1, 1])),
    "mask": np.array([[True, False, False, True]] * 3),
    "row-mask": np.array([True, False, True]),
    "mask-and-slice": (np.array([True, False, True]), slice(1, 3)),
    "numpy-integer": np.int64(1),
    "empty": np.zeros(0, np.int64),
}


def place(indices: Any, x: Any) -> Any:
    """The indices on the device of x."""
    return np.asarray(indices, like=getattr(x, "value", x))


class TestIndexing(DerivativeTests):
    """Each kind of key, on a variable and on a result."""

    cases = (
        *(
            one
            for label, key in KEYS.items()
            for one in both(
                f"getitem-{label}", lambda np, x, key=key: x[key], (3, 4), hips=label not in ("rows-and-ellipsis",)
            )
        ),
        *(
            one
            for label, key in KEYS.items()
            for one in both(f"getitem-of-result-{label}", lambda np, x, key=key: (x * 2)[key], (3, 4), hips=False)
        ),
        *both("getitem-zero-dimensional", lambda np, x: x[()] * x[..., None], ()),
        *(
            case(f"take-{axis}", lambda np, x, axis=axis: np.take(x, place(ROWS, x), axis=axis), (3, 4, 3), hips=False)
            for axis in (None, 0, 1, -1)
        ),
        *both("take-one", lambda np, x: np.take(x, 2, axis=0) * (x * 2).take(1, axis=0), (3, 4), hips=False),
        *both("take-of-result", lambda np, x: np.take(x * 2, place(ROWS, x), axis=0), (3, 4), hips=False),
        *both("take-and-dense", lambda np, x: np.take(x, [0, 1, 1], axis=0) * x, (3, 4), hips=False),
        case("take-wrap", lambda np, x: np.take(x, [5, -7], axis=0, mode="wrap"), (3, 4), hips=False),
        case("take-clip", lambda np, x: np.take(x, [5, -7], axis=0, mode="clip"), (3, 4), hips=False),
        *both(
            "compress",
            lambda np, x: np.compress([True, False, True], x, 1) * np.compress([True, True], x),
            (2, 4),
            hips=False,
        ),
        case("extract", lambda np, x: np.extract(x > 0.1, x) * np.compress(np.ravel(x > 0.1), x), (3, 4), hips=False),
        case("extract-list", lambda np, x: np.extract([[True, False, True]], x), (3, 4), hips=False),
        *both("take_along_axis", lambda np, x: np.take_along_axis(x, place(ROWS[:, :1], x), 1), (2, 4), hips=False),
        *both("take_along_axis-0", lambda np, x: np.take_along_axis(x, place(ROWS, x), axis=0), (3, 3), hips=False),
        case(
            "take_along_axis-flat",
            lambda np, x: np.take_along_axis(x, place(ROWS.ravel(), x), axis=None),
            (3, 4),
            hips=False,
        ),
        case("sort", lambda np, x: np.sort(x) * np.sort(x, axis=0), DISTINCT, hips=False),
        case("sort-flat", lambda np, x: np.sort(x, axis=None), DISTINCT, hips=False),
        case("sort-hips", lambda np, x: np.sort(x), DISTINCT[0]),
    )


def gather(variable: Any, *keys: Any) -> Any:
    return sum(np.sum(variable[key] ** 2) for key in keys)


@pytest.mark.parametrize("array", [np.array, DuckArray])
def test_gathered_rows_stay_sparse(array: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseCotangent, "dense", None)
    table = variable(array(random((1000, 3))))
    indices = array(np.array([[7, 7], [0, -1]]))
    _, slices = value_and_grad(lambda: np.sum(np.take(table, indices, axis=0) ** 2), table)
    assert isinstance(slices, IndexedSlices)
    assert type(slices.values) is type(slices.indices) is type(table.value)
    host = slices.indices.get() if array is DuckArray else slices.indices
    assert host.tolist() == [7, 7, 0, 999]
    assert slices.values.shape == (4, 3)


def test_several_gathers_join(device: Device) -> None:
    table = Variable(np.arange(10.0).reshape(5, 2))
    _, slices = value_and_grad(lambda: gather(table, np.array([1, 4]), np.array([4], np.int32)), table)
    assert sorted(slices.indices.tolist()) == [1, 4, 4]
    assert slices.values[slices.indices == 4].tolist() == [[16, 18]] * 2


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_indices_of_any_integer_type(device: Device, dtype: type) -> None:
    table = Variable(np.ones((1000, 2)))
    _, slices = value_and_grad(lambda: gather(table, np.array([1, 3], dtype)), table)
    assert slices.indices.tolist() == [1, 3]
    assert slices.indices.dtype in (np.int32, np.int64)


def test_sparse_gradient_of_a_vector(device: Device) -> None:
    _, slices = value_and_grad(lambda: gather(v, np.array([1, 1])), v := Variable(np.arange(3.0)))
    assert (slices.indices.tolist(), slices.values.tolist()) == ([1, 1], [2, 2])


def test_rows_and_slices_are_dense(device: Device) -> None:
    table = Variable(np.ones((3, 2)))
    _, gradient = value_and_grad(lambda: np.sum(table[1:]) + np.sum(table[0]) + gather(table, np.array([0])), table)
    assert gradient.tolist() == [[3, 3], [1, 1], [1, 1]]


def test_many_slices_build_the_dense_gradient_once(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[SparseCotangent] = []
    dense = SparseCotangent.dense

    def counted(self: SparseCotangent) -> Any:
        calls.append(self)
        return dense(self)

    monkeypatch.setattr(SparseCotangent, "dense", counted)
    x = Variable(np.arange(100.0))
    _, gradient = value_and_grad(lambda: sum(np.sum(x[i : i + 3] ** 2) for i in range(98)), x)
    assert len(calls) == 1
    np.testing.assert_array_equal(device.numpy(gradient)[2:-2], 6 * x.numpy()[2:-2])


@pytest.mark.parametrize("order", ["gather first", "gather last"])
def test_gathered_and_dense_is_dense(device: Device, order: str) -> None:
    table = Variable(np.ones((3, 2)))
    rows = np.array([2, 2])
    if order == "gather first":
        _, gradient = value_and_grad(lambda: gather(table, rows) + np.sum(table), table)
    else:
        _, gradient = value_and_grad(lambda: np.sum(table) + gather(table, rows), table)
    assert gradient.tolist() == [[1, 1], [1, 1], [5, 5]]


def test_the_same_dense_gradient_is_not_changed_by_a_gather(device: Device) -> None:
    a, b = Variable(np.ones(3)), Variable(np.ones(3))
    _, (ga, gb) = value_and_grad(lambda: np.sum(a[np.array([0])]) + np.sum(a + b), [a, b])
    assert (ga.tolist(), gb.tolist()) == ([2, 1, 1], [1, 1, 1])


def test_conditions_with_several_axes(device: Device) -> None:
    x = Variable(np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"a condition with 1 axis \(got 2\)"):
        value_and_grad(lambda: np.sum(np.compress([[True, False]], x)), x)
