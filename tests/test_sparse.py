"""IndexedSlices give the bits of the same gradient written out, whatever the rows; what does not fit is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from reference import Array, assert_same_bits, densified
from snapshots import unchanged

import gpu_adam
from gpu_adam import IndexedSlices, Variable, kernels
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, SparseIndexError

DTYPES = [name for name in kernels.DTYPES if name not in kernels.HALVES]  # tests/test_halves.py has those
REAL = [dtype for dtype in DTYPES if np.dtype(dtype).kind == "f"]
Slices = tuple[Array, Array]


def numbers(rng: np.random.Generator, shape: Any, dtype: str) -> Array:
    values: Array = rng.standard_normal(shape)
    if np.dtype(dtype).kind == "c":
        values = values + 1j * rng.standard_normal(shape)
    return values.astype(dtype)


def on(device: Device, values: Any, indices: Any) -> IndexedSlices:
    return IndexedSlices(device.array(values), device.array(indices))


def assert_equals_dense(
    device: Device, initial: Array, steps: list[Slices], clipvalue: float | None = None, **config: Any
) -> None:
    """Step with slices and with the same gradient written out, and compare variable and slots after every step."""
    sparse, dense = Variable(initial, device=device), Variable(initial, device=device)
    by_rows, whole = gpu_adam.Adam(0.1, clipvalue=clipvalue, **config), gpu_adam.Adam(0.1, **config)
    for number, (values, indices) in enumerate(steps):
        by_rows.apply_gradients([(on(device, values, indices), sparse)])
        bounded = values if clipvalue is None else np.clip(values, -clipvalue, clipvalue).astype(values.dtype)
        whole.apply_gradients([(device.array(densified(bounded, indices, initial)), dense)])
        assert_same_bits(sparse.numpy(), dense.numpy(), f"variable after step {number}")
        for weight, expected, slot in zip(by_rows.get_weights(), whole.get_weights(), by_rows.weights, strict=True):
            assert_same_bits(weight, expected, f"{slot.name} after step {number}")


def rows_of(kind: str, rows: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    makers: dict[str, Callable[[], npt.NDArray[np.int64]]] = {
        "one": lambda: np.array([rows - 1]),
        "one, often": lambda: np.full(9, rows // 2),
        "all": lambda: np.arange(rows),
        "all, backwards": lambda: np.arange(rows)[::-1],
        "some": lambda: rng.permutation(rows)[: max(1, rows // 2)],
        "some, often": lambda: rng.integers(0, rows, 3 * rows),
        "none": lambda: np.zeros(0, np.int64),
    }
    return makers[kind]()


KINDS = ["one", "one, often", "all", "all, backwards", "some", "some, often", "none"]


@pytest.mark.parametrize("shape", [(7,), (6, 3), (5, 2, 3), (1, 5), (1,), (2, 1, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_kind(device: Device, dtype: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    steps = []
    for kind in [*KINDS, "some, often"]:
        indices = rows_of(kind, shape[0], rng)
        steps.append((numbers(rng, (len(indices), *shape[1:]), dtype), indices))
    assert_equals_dense(device, numbers(rng, shape, dtype), steps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_step_without_rows_moves_nothing(device: Device, dtype: str) -> None:
    rng = np.random.default_rng(2)
    initial = numbers(rng, (4, 3), dtype)
    variable = Variable(initial)
    gpu_adam.Adam().apply_gradients([(on(device, np.zeros((0, 3), dtype), np.zeros(0, np.int32)), variable)])
    assert_same_bits(variable.numpy(), initial)


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize(
    "config", [{"amsgrad": True}, {"clipvalue": 0.5}, {"amsgrad": True, "clipvalue": 0.25}], ids=str
)
def test_variants(device: Device, dtype: str, config: dict[str, Any]) -> None:
    """With clipvalue every occurrence of a row is bounded by itself, and their sum is not."""
    rng = np.random.default_rng(3)
    steps = []
    for scale in (3, 1, 0.1):
        indices = rows_of("some, often", 6, rng)
        steps.append((numbers(rng, (len(indices), 5), dtype) * np.dtype(dtype).type(scale), indices))
    assert_equals_dense(device, numbers(rng, (6, 5), dtype), steps, **config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beyond", [-1, 0, 1, 5])
@pytest.mark.parametrize("tiles", [1, 2])
def test_rows_as_long_as_tiles(device: Device, dtype: str, tiles: int, beyond: int) -> None:
    rng = np.random.default_rng(4)
    size = tiles * kernels.tile_size(dtype) + beyond
    indices = np.array([2, 0, 2])
    assert_equals_dense(device, numbers(rng, (3, size), dtype), [(numbers(rng, (3, size), dtype), indices)] * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_size", [1, 3, 500])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_as_many_rows_as_fit_into_tiles(device: Device, dtype: str, row_size: int, beyond: int) -> None:
    rng = np.random.default_rng(5)
    fitting = kernels.tile_size(dtype) // row_size
    whole_packs = fitting - fitting % 16 if fitting > 16 else fitting
    for rows in (fitting + beyond, whole_packs + beyond, 2 * whole_packs + beyond, 2 * fitting + beyond):
        borders = np.array([0, rows - 1, rows // 2, fitting - 1, fitting, whole_packs - 1, whole_packs, 0, rows - 1])
        indices = borders[borders < rows]
        values = numbers(rng, (len(indices), row_size), dtype)
        assert_equals_dense(device, numbers(rng, (rows, row_size), dtype), [(values, indices)])


@pytest.mark.parametrize("rows", [1, 2, 127, 128, 129, 16383, 16384, 65537])
def test_every_number_of_sorting_passes(device: Device, rows: int) -> None:
    rng = np.random.default_rng(6)
    indices = np.concatenate([rng.integers(0, rows, 40), [0, rows - 1, 0, rows - 1]])
    assert_equals_dense(device, numbers(rng, rows, "float32"), [(numbers(rng, 44, "float32"), indices)])


@pytest.mark.parametrize(
    "count", [kernels.SORT_RUN - 1, kernels.SORT_RUN, kernels.SORT_RUN + 1, 2 * kernels.SORT_RUN + 7]
)
@pytest.mark.parametrize("rows", [5, 300])
def test_many_indices(device: Device, count: int, rows: int) -> None:
    rng = np.random.default_rng(7)
    indices = rng.integers(0, rows, count)
    assert_equals_dense(device, numbers(rng, (rows, 2), "float32"), [(numbers(rng, (count, 2), "float32"), indices)])


def test_the_number_of_indices_may_change_from_step_to_step(device: Device) -> None:
    rng = np.random.default_rng(8)
    steps: list[Slices] = []
    for count in (3, 0, 50, 2, kernels.SORT_RUN + 1, 1, 51, 0):
        kind = (np.int32, np.int64)[len(steps) % 2]
        steps.append((numbers(rng, (count, 2), "float32"), rng.integers(0, 20, count).astype(kind)))
    assert_equals_dense(device, numbers(rng, (20, 2), "float32"), steps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
def test_both_index_dtypes(device: Device, dtype: str, index_dtype: str) -> None:
    rng = np.random.default_rng(9)
    indices = rng.integers(0, 9, 30).astype(index_dtype)
    assert_equals_dense(device, numbers(rng, (9, 4), dtype), [(numbers(rng, (30, 4), dtype), indices)] * 3)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_variables_at_any_address(device: Device, offset: int) -> None:
    """Raw arrays that begin between two 16-byte boundaries, and so do their rows."""
    rng = np.random.default_rng(10)
    initial, values = numbers(rng, (30, 7), "float32"), numbers(rng, (20, 7), "float32")
    indices = rng.integers(0, 30, 20)
    memory = device.array(np.zeros(initial.size + offset, np.float32))
    raw = memory[offset:].reshape(initial.shape)
    raw[...] = device.array(initial)
    expected = Variable(initial)
    optimizer = gpu_adam.Adam(0.1)
    for _ in range(2):
        pairs = [(on(device, values, indices), raw), (device.array(densified(values, indices, initial)), expected)]
        optimizer.apply_gradients(pairs)
    assert_same_bits(device.numpy(raw), expected.numpy())


def test_duplicates_are_summed_in_order_of_occurrence(device: Device) -> None:
    """In float32 (1e8 + 1) - 1e8 is 0 and (1e8 - 1e8) + 1 is 1."""
    for values, total in (([1e8, 1, -1e8], 0), ([1e8, -1e8, 1], 1)):
        variable = Variable(np.zeros(2, np.float32))
        optimizer = gpu_adam.Adam(beta_1=0.0)
        optimizer.apply_gradients([(on(device, np.array(values, np.float32), np.array([1, 1, 1])), variable)])
        assert optimizer.get_slot(variable, "m").numpy().tolist() == [0, total]


def test_rows_without_gradient_move_by_their_momentum(device: Device) -> None:
    variable = Variable(np.zeros((3, 2), np.float32))
    optimizer = gpu_adam.Adam(0.1)
    optimizer.apply_gradients([(on(device, np.ones((1, 2), np.float32), np.array([1])), variable)])
    first = variable.numpy()
    optimizer.apply_gradients([(on(device, np.ones((1, 2), np.float32), np.array([0])), variable)])
    second = variable.numpy()
    assert (second[1] < first[1]).all()
    assert (first[[0, 2]] == 0).all()
    assert (second[0] < 0).all()
    assert (second[2] == 0).all()


def test_not_finite_values_stay_in_their_rows(device: Device) -> None:
    variable = Variable(np.zeros((4, 2), np.float32))
    values = np.array([[np.nan, 1], [np.inf, 1], [1, 1]], np.float32)
    gpu_adam.Adam().apply_gradients([(on(device, values, np.array([1, 3, 0])), variable)])
    assert np.isfinite(variable.numpy()).tolist() == [[True, True], [False, True], [True, True], [False, True]]


def test_several_sparse_and_dense_gradients_in_one_step(device: Device) -> None:
    """One variable twice, once by rows and once as a whole: two updates in order with the same t."""
    rng = np.random.default_rng(11)
    initial, other = numbers(rng, (5, 3), "float32"), numbers(rng, (4,), "float64")
    values, whole = numbers(rng, (7, 3), "float32"), numbers(rng, (5, 3), "float32")
    double = numbers(rng, (2,), "float64")
    indices = np.array([4, 0, 4, 4, 1, 0, 2])
    written = densified(values, indices, initial)
    results = []
    for by_rows in (False, True):
        a, b = Variable(initial), Variable(other)
        optimizer = gpu_adam.Adam(0.1)
        for _ in range(3):
            first = on(device, values, indices) if by_rows else device.array(written)
            last = on(device, double, np.array([3, 3])) if by_rows else densified(double, [3, 3], other)
            pairs: list[Any] = [(first, a), (device.array(whole), a), (first, a)]
            optimizer.apply_gradients([*pairs, (last if by_rows else device.array(last), b)])
        results.append([a.numpy(), b.numpy(), *optimizer.get_weights()])
    for dense, sparse in zip(*results, strict=True):
        assert_same_bits(sparse, dense)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)], ids=str)
def test_variables_without_elements(device: Device, shape: tuple[int, ...]) -> None:
    variable = Variable(np.zeros(shape, np.float32))
    optimizer = gpu_adam.Adam()
    count = min(shape[0], 2)
    slices = on(device, np.zeros((count, *shape[1:]), np.float32), np.arange(count))
    assert optimizer.apply_gradients([(slices, variable)]) == 1
    assert optimizer.get_slot(variable, "m").shape == shape


def test_slices_are_left_as_they_are(device: Device) -> None:
    values, indices = device.array(np.ones((2, 2), np.float32)), device.array(np.array([2, 2]))
    slices, variable = IndexedSlices(values, indices, dense_shape=(3, 2)), Variable(np.zeros((3, 2), np.float32))
    with unchanged(gpu_adam.Adam(), values, indices):
        gpu_adam.Adam(clipvalue=0.1).apply_gradients([(slices, variable)])
    assert slices.values is values
    assert slices.indices is indices
    assert slices.dense_shape == (3, 2)
    assert repr(slices).startswith("IndexedSlices(values=")


def test_what_may_be_passed(device: Device) -> None:
    """Arrays, strided arrays, lists and Variables."""
    base = np.arange(12, dtype=np.float32).reshape(6, 2)
    rows = np.array([1, 9, 0, 9, 1, 9])
    expected: Any = None
    for slices in (
        on(device, base[::2], rows[::2]),
        IndexedSlices(device.array(base)[::2], device.array(rows)[::2]),
        IndexedSlices(base[::2].tolist(), rows[::2].tolist()),
        IndexedSlices(Variable(base[::2]), Variable(rows[::2])),
        IndexedSlices(tuple(map(tuple, base[::2].tolist())), tuple(rows[::2].tolist())),
    ):
        variable = Variable(np.zeros((2, 2), np.float32))
        gpu_adam.Adam().apply_gradients([(slices, variable)])
        expected = variable.numpy() if expected is None else expected
        assert_same_bits(variable.numpy(), expected)
    empty = IndexedSlices(device.array(np.zeros((0, 2), np.float32)), [])
    assert gpu_adam.Adam().apply_gradients([(empty, variable)]) == 1


ONES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("values", "indices", "error", "message"),
    [
        (ONES[:1], [0, 1], ArgumentValueError, r"values of variable 'table' must have shape \(2, 3\) \(got \(1, 3\)\)"),
        (ONES[:, :2], [0, 1], ArgumentValueError, r"must have shape \(2, 3\) \(got \(2, 2\)\)"),
        (ONES[:, 0], [0, 1], ArgumentValueError, r"must have shape \(2, 3\) \(got \(2,\)\)"),
        (ONES[..., None], [0, 1], ArgumentValueError, r"must have shape \(2, 3\)"),
        (
            ONES.astype(np.float64),
            [0, 1],
            ArgumentValueError,
            r"must have dtype float32.* \(got float64\)",
        ),
        (
            ONES.astype(np.int32),
            [0, 1],
            ArgumentValueError,
            r"must have dtype float32.* \(got int32\)",
        ),
        (ONES, np.array([0, 1], np.int16), ArgumentValueError, r"indices of variable 'table' must have dtype int32 or"),
        (ONES, np.array([0, 1], np.uint64), ArgumentValueError, r"must have dtype int32 or int64 \(got uint64\)"),
        (ONES, np.array([0.0, 1.0]), ArgumentValueError, r"must have dtype int32 or int64 \(got float64\)"),
        (ONES, np.array([True, False]), ArgumentValueError, r"must have dtype int32 or int64 \(got bool\)"),
        (ONES, np.array([[0, 1]]), ArgumentValueError, r"must be one-dimensional \(got shape \(1, 2\)\)"),
        (ONES, np.array(0), ArgumentValueError, r"must be one-dimensional \(got shape \(\)\)"),
    ],
)
def test_slices_that_do_not_fit(device: Device, values: Any, indices: Any, error: Any, message: str) -> None:
    variable = Variable(np.zeros((4, 3), np.float32), name="table")
    other = Variable(np.zeros(2, np.float32))
    optimizer = gpu_adam.Adam()
    good = on(device, ONES, np.array([0, 1]))
    for _ in range(2):  # a fresh optimizer, and one that has stepped
        with unchanged(optimizer, variable, other), pytest.raises(error, match=message):
            optimizer.apply_gradients(
                [(device.array(np.ones(2, np.float32)), other), (on(device, values, indices), variable)]
            )
        optimizer.apply_gradients([(device.array(np.ones(2, np.float32)), other), (good, variable)])


@pytest.mark.parametrize("indices", [None, "rows", ..., 1, [[0], [1, 2]], ["a", "b"]], ids=repr)
def test_indices_that_are_no_array(device: Device, indices: Any) -> None:
    variable, optimizer = Variable(np.zeros((4, 3), np.float32)), gpu_adam.Adam()
    with (
        unchanged(optimizer, variable),
        pytest.raises((ArgumentTypeError, ArgumentValueError), match="indices of variable"),
    ):
        optimizer.apply_gradients([(IndexedSlices(device.array(ONES), indices), variable)])


@pytest.mark.parametrize("values", [None, "rows", ..., [[0.0], [1.0, 2.0]], ["a", "b"]], ids=repr)
def test_values_that_are_no_array(device: Device, values: Any) -> None:
    variable, optimizer = Variable(np.zeros((4, 3), np.float32)), gpu_adam.Adam()
    slices = IndexedSlices(values, device.array(np.array([0, 1])))
    with unchanged(optimizer, variable), pytest.raises(ArgumentTypeError, match="values of variable"):
        optimizer.apply_gradients([(slices, variable)])


def test_a_variable_without_rows_takes_no_slices(device: Device) -> None:
    variable, optimizer = Variable(np.float32(1), name="scale"), gpu_adam.Adam()
    slices = on(device, np.ones(1, np.float32), np.array([0]))
    with unchanged(optimizer, variable), pytest.raises(ArgumentValueError, match=r"'scale' must be dense"):
        optimizer.apply_gradients([(slices, variable)])


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1, -(2**31), 2**62])
def test_indices_out_of_range(device: Device, bad: int) -> None:
    """Refused where that can be seen without waiting; elsewhere such rows are left out, and the next wait tells."""
    variable = Variable(np.zeros((4, 3), np.float32), name="table")
    optimizer = gpu_adam.Adam()
    good = on(device, ONES, np.array([0, 3]))
    optimizer.apply_gradients([(good, variable)])
    values = np.concatenate([ONES, 5 * ONES[:1], ONES[:1]])
    indices = np.array([0, 3, bad, 1], np.int64 if abs(bad) > 2**31 else np.int32)
    message = rf"indices\[2\] of variable 'table' must lie in \[0, 4\) \(got {bad}\)"
    if device.checks_indices:
        with unchanged(optimizer, variable), pytest.raises(SparseIndexError, match=message):
            optimizer.apply_gradients([(on(device, values, indices), variable)])
    else:
        expected, reference = Variable(np.zeros((4, 3), np.float32)), gpu_adam.Adam()
        reference.apply_gradients([(good, expected)])
        reference.apply_gradients([(on(device, values[[0, 1, 3]], indices[[0, 1, 3]]), expected)])
        optimizer.apply_gradients([(on(device, values, indices), variable)])
        with pytest.raises(SparseIndexError, match=message):
            optimizer.check_errors()
        assert_same_bits(variable.numpy(), expected.numpy())
    optimizer.check_errors()
    optimizer.get_weights()


def test_the_first_index_out_of_range_is_named(device: Device) -> None:
    """The one that comes first in the gradient, however many there are and wherever they run."""
    count, rows = kernels.SORT_RUN + 100, 50
    indices = np.arange(count) % rows
    indices[[700, 300, count - 1]] = (50, -7, 51)
    variable = Variable(np.zeros(rows, np.float32))
    optimizer = gpu_adam.Adam()

    def step_and_wait() -> None:
        optimizer.apply_gradients([(on(device, np.ones(count, np.float32), indices), variable)])
        optimizer.get_weights()

    others = "" if device.checks_indices else " and 2 more"
    with pytest.raises(SparseIndexError, match=rf"indices\[300\] .*\(got -7{others}\)"):
        step_and_wait()


def test_no_index_fits_a_variable_without_rows(device: Device) -> None:
    variable, optimizer = Variable(np.zeros((0, 3), np.float32)), gpu_adam.Adam()
    slices = on(device, np.ones((1, 3), np.float32), np.array([0]))

    def step_and_wait() -> None:
        optimizer.apply_gradients([(slices, variable)])
        optimizer.check_errors()

    with pytest.raises(SparseIndexError, match=r"must lie in \[0, 0\)"):
        step_and_wait()
