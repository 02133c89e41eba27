"""Variables whose rows are partly behind: who looks at contents has them brought up to date, gather its rows alone."""

import copy
import importlib
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reference import assert_same_bits

import gpu_adam
from gpu_adam import IndexedSlices, Variable
from gpu_adam.autodiff import value_and_grad
from gpu_adam.devices import Device, device_of
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, SparseIndexError
from gpu_adam.kernels import dtype_named

NOW = np.arange(1, 11, dtype=np.float32).reshape(5, 2)
ALL = "all"
ON_HOST = "torch and JAX may be the ones for the CPU; on a GPU they ask for the array in the same way"


class Late:
    """A `Behind` that knows what the rows of a variable are to be, writes that when asked, and notes what it is asked.

    Until then the variable holds other numbers.
    """

    def __init__(self, variable: Variable, now: Any) -> None:
        self.variable, self.device = variable, variable.device
        self.now, self.asked = self.device.array(np.asarray(now, variable.dtype)), list[Any]()
        self.missing = np.ones(variable.shape[:1], bool)
        with self.device.activate():
            variable._storage.fill(77)
        variable._behind = self

    def owner(self) -> None:
        """See `Behind`: nobody."""

    def settle(self) -> None:
        """See `Behind`."""
        self.asked.append(ALL)
        self._write(np.ones_like(self.missing))

    def bring_up_to_date(self, rows: Any) -> None:
        """See `Behind`."""
        assert device_of(rows) is self.device
        assert (rows.ndim, rows.flags.c_contiguous) == (1, True)
        assert rows.dtype in (np.int32, np.int64)
        numbers = self.device.numpy(rows)
        self.asked.append(sorted(set(numbers.tolist())))
        named = np.zeros_like(self.missing)
        named[numbers[(numbers >= 0) & (numbers < len(named))]] = True
        self._write(named)

    def _write(self, wanted: np.ndarray) -> None:
        written = self.device.array((wanted & self.missing).reshape(-1, *[1] * (self.now.ndim - 1))[()])
        self.missing &= ~wanted
        array, xp = self.variable._storage, self.device.xp
        with self.device.activate():
            array[...] = xp.where(written.reshape(self.missing.shape + (1,) * (array.ndim - 1)), self.now, array)


def late(now: Any = NOW, **options: Any) -> tuple[Variable, Late]:
    """A variable that is behind in all rows, and what brings them up to date."""
    variable = Variable(np.asarray(now), **options)
    return variable, Late(variable, now)


def changed(function: Callable[[Variable], object]) -> Callable[[Variable], Any]:
    """A look at a variable that a function has changed."""

    def look(variable: Variable) -> Any:
        function(variable)
        return variable

    return look


def augmented(name: str) -> Callable[[Variable], Any]:
    return lambda v: getattr(v, f"__{name}__")(3)


def add_into(variable: Any) -> None:
    np.add(variable, 1, out=variable)


def twice(variable: Variable) -> Any:
    return variable * 2


def in_torch(look: Callable[[Any, Variable], Any]) -> Callable[[Variable], Any]:
    return in_framework("torch", "torch", lambda torch, v: look(torch, v).detach())


def in_jax(look: Callable[[Any, Variable], Any]) -> Callable[[Variable], Any]:
    return in_framework("jax", "jax.numpy", look)


def in_framework(name: str, module: str, look: Callable[[Any, Variable], Any]) -> Callable[[Variable], Any]:
    def looked(variable: Variable) -> Any:
        if variable.device.xp is not np:
            pytest.skip(ON_HOST)
        pytest.importorskip(name)
        return np.asarray(look(importlib.import_module(module), variable))

    return looked


LOOKS: dict[str, Callable[[Variable], Any]] = {
    "value": lambda v: v.value,
    "numpy": lambda v: v.numpy(),
    "__array__": np.asarray,
    "another variable": Variable,
    "operator": lambda v: 2 - v,
    "matrix product": lambda v: v @ v.value.T,
    "comparison": lambda v: v > 3,
    "ufunc": np.exp,
    "function": np.sum,
    "in a list": lambda v: np.concatenate([v, v]),
    "as out=": changed(add_into),
    "method": lambda v: v.sum(0),
    "attribute": lambda v: v.T,
    "take of elements": lambda v: np.take(v, [1, 2]),
    "take of columns": lambda v: np.take(v, [1], axis=1),
    "take of rows by a method": lambda v: v.take([1], axis=0),
    "slice": lambda v: v[1:3],
    "row": lambda v: v[2],
    "element": lambda v: v[1, 1],
    "pair of arrays": lambda v: v[[1, 2], [0, 1]],
    "mask": lambda v: v[v.value > 3],
    "iteration": lambda v: np.stack(list(v)),
    "DLPack": lambda v: v.device.xp.from_dlpack(v),
    "array interface": lambda v: v.device.xp.asarray(v),
    "pickle": lambda v: pickle.loads(pickle.dumps(v)),
    "deepcopy": copy.deepcopy,
    "assign": changed(lambda v: v.assign(NOW + 5)),
    "assign of itself": changed(lambda v: Variable(NOW).assign(v)),
    "assign_add": changed(lambda v: v.assign_add(NOW)),
    "assign_sub": changed(lambda v: v.assign_sub(NOW * 3)),
    "item assignment": changed(lambda v: v.__setitem__(1, 5)),
    "constrain": changed(lambda v: v.constrain()),
    **{name: augmented(name) for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")},
    "torch.from_dlpack": in_torch(lambda torch, v: torch.from_dlpack(v)),
    "view of torch": in_torch(lambda torch, v: gpu_adam.autodiff.torch.view(v)),
    "jnp.asarray": in_jax(lambda jnp, v: jnp.asarray(v)),
    "view of JAX": in_jax(lambda jnp, v: gpu_adam.autodiff.jax.view(v)),
    "function of JAX": in_jax(lambda jnp, v: gpu_adam.autodiff.jax.differentiable(jnp.exp)(v)),
    "constant of a loss": lambda v: value_and_grad(lambda: np.sum(v * Variable(NOW)), Variable(1.0))[0],
    "value in a loss": lambda v: value_and_grad(lambda: np.sum(v.value), v)[0],
}
"""Ways to look at the contents of a variable, or to change them."""

NUMBERS: dict[str, Callable[[Variable], Any]] = {
    "float": float,
    "int": int,
    "complex": complex,
    "bool": bool,
    "round": round,
    "round to digits": lambda v: round(v, 1),
    "format": lambda v: float(f"{v:.3f}"),
    "item": lambda v: v.item(),
}


def in_host_memory(found: Any) -> np.ndarray:
    if isinstance(found, Variable):
        return found.numpy()
    place = None if isinstance(found, (np.generic, int, float, complex)) else device_of(found)
    return np.asarray(found) if place is None else place.numpy(found)


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_what_looks_at_contents_finds_them_up_to_date(device: Device, look: Callable[[Variable], Any]) -> None:
    variable, behind = late(constraint=twice)
    always = Variable(NOW, constraint=twice)
    found = look(variable)
    assert ALL in behind.asked
    assert not behind.missing.any()
    assert_same_bits(in_host_memory(found), in_host_memory(look(always)))
    assert_same_bits(device.numpy(variable._storage), always.numpy())


@pytest.mark.parametrize("look", NUMBERS.values(), ids=NUMBERS)
def test_a_number_is_up_to_date(device: Device, look: Callable[[Variable], Any]) -> None:
    variable, behind = late(np.float32(2.25))
    assert look(variable) == look(Variable(np.float32(2.25)))
    assert ALL in behind.asked


def test_an_index_is_up_to_date(device: Device) -> None:
    variable, _ = late(np.int64(3))
    assert list(range(10))[variable] == 3


def test_shape_dtype_and_place_are_no_contents(device: Device) -> None:
    variable, behind = late(name="w")
    assert (variable.shape, variable.ndim, variable.size, len(variable)) == ((5, 2), 2, 10, 5)
    assert variable.dtype == np.float32
    assert (variable.name, variable.device) == ("w", device)
    assert device_of(variable) is device
    assert variable.__dlpack_device__() == variable._storage.__dlpack_device__()
    assert "shape=(5, 2)" in repr(variable)
    assert f"{variable}" == str(variable)
    assert variable in {variable}
    variable.constrain()  # it has no constraint
    assert behind.asked == []


@pytest.mark.parametrize("copied", [lambda v: pickle.loads(pickle.dumps(v)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_copy_is_not_behind(device: Device, copied: Callable[[Variable], Variable]) -> None:
    variable, behind = late()
    own = copied(variable)
    assert own._behind is None
    assert variable._behind is behind
    assert_same_bits(own.numpy(), NOW)


# Optimizers.


def gradients(device: Device) -> list[Any]:
    rows = device.array(np.array([3, 0, 3]))
    return [device.array(NOW), IndexedSlices(device.array(NOW[:3]), rows)]


def test_an_average_begins_at_rows_that_are_up_to_date(device: Device) -> None:
    variable, _ = late()
    optimizer = gpu_adam.Adam(0.1, use_ema=True)
    optimizer.build([variable])
    assert_same_bits(optimizer.get_slot(variable, "average").numpy(), NOW)


def saved(optimizer: gpu_adam.Adam) -> dict[str, np.ndarray]:
    file = io.BytesIO()
    optimizer.save(file, variables=True)
    file.seek(0)
    return dict(np.load(file))


STATES: dict[str, Callable[[gpu_adam.Adam, Variable], Any]] = {
    "get_slot": lambda optimizer, variable: optimizer.get_slot(variable, "m").numpy(),
    "export": lambda optimizer, variable: optimizer.export()["w/m"],
    "get_weights": lambda optimizer, variable: optimizer.get_weights()[1],
    "save": lambda optimizer, variable: saved(optimizer)["w/m"],
    "save of variables": lambda optimizer, variable: saved(optimizer)["w/value"],
    "deepcopy": lambda optimizer, variable: copy.deepcopy(optimizer).weights[1].numpy(),
    "pickle": lambda optimizer, variable: pickle.loads(pickle.dumps(optimizer)).weights[1].numpy(),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_a_state_is_handed_out_up_to_date(device: Device, state: Callable[[gpu_adam.Adam, Variable], Any]) -> None:
    variable, _ = late(name="w")
    optimizer = gpu_adam.Adam(0.1)
    optimizer.build([variable])
    for name in optimizer.get_slot_names():
        Late(optimizer.get_slot(variable, name), NOW)
    assert_same_bits(state(optimizer, variable), NOW)


def test_rows_that_are_handed_to_another_variable_are_up_to_date(device: Device) -> None:
    variable, _ = late()
    optimizer = gpu_adam.Adam(0.1)
    optimizer.build([variable])
    Late(optimizer.get_slot(variable, "m"), NOW)
    fewer = Variable(NOW[:2])
    optimizer.replace(variable, fewer, [4, 1])
    assert_same_bits(optimizer.get_slot(fewer, "m").numpy(), NOW[[4, 1]])


def test_what_was_restored_is_not_written_over(device: Device) -> None:
    """Rows are brought up to date before, so that nothing is left to be done to what comes."""
    optimizer = gpu_adam.Adam(0.1)
    optimizer.build([variable := Variable(NOW, name="w")])
    arrays = optimizer.export()
    Late(slot := optimizer.get_slot(variable, "m"), NOW)
    optimizer.restore({**arrays, "w/m": NOW * 2})
    assert_same_bits(slot.numpy(), NOW * 2)


# Rows.

TAKES: dict[str, Callable[[Variable, Any], Any]] = {
    "gather": lambda v, rows: v.gather(rows),
    "index": lambda v, rows: v[rows],
    "take": lambda v, rows: np.take(v, rows, axis=0),
}

ROWS: dict[str, tuple[Any, list[int]]] = {
    "list": ([3, 1, 3], [1, 3]),
    "int32": (np.array([0, 4], np.int32), [0, 4]),
    "uint8": (np.array([2], np.uint8), [2]),
    "two axes": (np.array([[0, 1], [1, 2]]), [0, 1, 2]),
    "in reverse": (np.arange(5)[:2:-1], [3, 4]),
}


@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
@pytest.mark.parametrize(("rows", "asked"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("is_there", [False, True], ids=["host memory", "device memory"])
def test_rows_alone_are_brought_up_to_date(
    device: Device, take: Callable[[Variable, Any], Any], rows: Any, asked: list[int], is_there: bool
) -> None:
    variable, behind = late()
    given = device.array(np.asarray(rows)) if is_there else rows
    assert_same_bits(device.numpy(take(variable, given)), NOW[rows])
    assert behind.asked == [asked]
    assert (~behind.missing).nonzero()[0].tolist() == asked


@pytest.mark.parametrize("take", TAKES.values(), ids=TAKES)
@pytest.mark.parametrize(("rows", "asked"), ROWS.values(), ids=ROWS)
def test_rows_in_a_loss(device: Device, take: Callable[[Variable, Any], Any], rows: Any, asked: list[int]) -> None:
    variable, behind = late()
    value, gradient = value_and_grad(lambda: np.sum(take(variable, rows) ** 2), variable)
    assert float(value) == np.sum(NOW[rows] ** 2)
    assert isinstance(gradient, IndexedSlices)
    assert gradient.shape == (5, 2)
    assert device.numpy(gradient.indices).tolist() == np.ravel(rows).tolist()
    assert_same_bits(device.numpy(gradient.values), 2 * NOW[rows].reshape(-1, 2))
    assert behind.asked == [asked]


@pytest.mark.parametrize("take", [TAKES["index"], TAKES["take"]], ids=["index", "take"])
def test_rows_from_the_end(device: Device, take: Callable[[Variable, Any], Any]) -> None:
    variable, behind = late()
    assert_same_bits(device.numpy(take(variable, [-1, 0])), NOW[[-1, 0]])
    assert behind.asked == [[0, 4]]
    _, gradient = value_and_grad(lambda: np.sum(take(variable, [-2])), variable)
    assert device.numpy(gradient.indices).tolist() == [3]
    assert behind.asked == [[0, 4], [3]]


def test_minimize_asks_for_rows_alone(device: Device) -> None:
    """Row 0, which has momentum, stays where it is in memory until somebody reads all rows."""
    tables = [Variable(NOW, device=device) for _ in range(2)]
    for table, sparse_update in zip(tables, ("deferred", "dense"), strict=True):
        optimizer = gpu_adam.Adam(0.1, sparse_update=sparse_update)
        for rows in ([0, 3], [1, 3], [1, 3]):
            optimizer.minimize(lambda: np.sum(table.gather(rows) ** 2), [table])  # noqa: B023
    deferred, always = (device.numpy(table._storage) for table in tables)
    assert_same_bits(deferred[[1, 3]], always[[1, 3]])
    assert (deferred[0] != always[0]).all()
    assert_same_bits(tables[0].numpy(), always)


MIXED: dict[str, Callable[[Variable], Any]] = {
    "sum after rows": lambda v: np.sum(v.gather([1]) ** 2) + np.sum(v * 2),
    "rows after a sum": lambda v: np.sum(v * 2) + np.sum(v.gather([1]) ** 2),
    "product": lambda v: np.sum(v.gather([1, 2]) * v[1:3]) * np.sum(v),
    "square": lambda v: np.sum(v.gather([4, 4])) + np.sum(v**2),
    "rows of two kinds": lambda v: np.sum(v.gather([4])) + np.sum(v[[-1, 0]] ** 2),
    "one row by its number": lambda v: np.sum(v.gather([4])) + np.sum(v[0] ** 2),
    "comparison": lambda v: np.sum(v.gather([0]) * (v.gather([4]) > v)),
    "itself": lambda v: [np.sum(v.gather([1])), v],
    "in NumPy's terms": lambda v: np.sum(np.stack([v.gather(2), v.gather(3)]) ** 2),
}


@pytest.mark.parametrize("loss", MIXED.values(), ids=MIXED)
def test_a_loss_that_computes_with_rows_and_with_the_whole(device: Device, loss: Callable[[Variable], Any]) -> None:
    """The tape has the variable's array from the start; what is read of it, in the backward pass too, is up to date."""
    found = []
    for variable in (late()[0], Variable(NOW)):
        value, gradient = value_and_grad(lambda: loss(variable), variable)  # noqa: B023
        values = value if isinstance(value, list) else [value]
        found.append(
            [*map(in_host_memory, values), gradient.numpy() if isinstance(gradient, IndexedSlices) else gradient]
        )
    for one, other in zip(*found, strict=True):
        assert_same_bits(in_host_memory(one), in_host_memory(other))


def test_rows_of_a_variable_that_is_not_differentiated(device: Device) -> None:
    table, behind = late()
    weight = Variable(np.float32(2))
    value, gradient = value_and_grad(lambda: np.sum(table.gather([2]) * weight), weight)
    assert (float(value), float(gradient)) == (22, 11)
    assert behind.asked == [[2]]


FRAMEWORKS = {
    "torch": lambda v: (gpu_adam.autodiff.torch.view(v) ** 2).sum(),
    "jax": lambda v: (gpu_adam.autodiff.jax.view(v) ** 2).sum(),
}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_losses_of_other_frameworks(device: Device, name: str) -> None:
    pytest.importorskip(name)
    if device.xp is not np:
        pytest.skip(ON_HOST)
    importlib.import_module(f"gpu_adam.autodiff.{name}")
    variable, _ = late()
    value, gradient = value_and_grad(lambda: FRAMEWORKS[name](variable), variable)
    assert float(value) == np.sum(NOW**2)
    assert_same_bits(np.asarray(gradient), 2 * NOW)


# What gather gives.


@pytest.mark.parametrize(
    "name", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128", "int32", "bool"]
)
@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 2, 3), (5, 0)], ids=str)
@pytest.mark.parametrize("indices", [3, [], [0], [[4, 4], [0, 1]], [[[2]]]], ids=str)
def test_gathered_rows(device: Device, name: str, shape: tuple[int, ...], indices: Any) -> None:
    numbers = (np.arange(np.prod(shape)).reshape(shape) % 7).astype(dtype_named(name))
    expected = numbers.take(np.asarray(indices, np.int64), axis=0)
    for given in (indices, np.asarray(indices, np.int32), device.array(np.asarray(indices, np.int64))):
        variable = Variable(numbers)
        rows = variable.gather(given)
        variable.assign(np.zeros_like(numbers))  # which the rows, an array of their own, do not show
        assert (rows.shape, rows.dtype) == (expected.shape, numbers.dtype)
        assert_same_bits(in_host_memory(rows), np.asarray(expected))


def test_indices_that_are_a_variable(device: Device) -> None:
    assert_same_bits(device.numpy(Variable(NOW).gather(Variable([4, 0]))), NOW[[4, 0]])


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([1, 5], SparseIndexError, r"gather's indices for variable 'w', at \[1\], must lie in \[0, 5\) \(got 5\)"),
        ([[0, 0], [-1, 0]], SparseIndexError, r"at \[1, 0\], must lie in \[0, 5\) \(got -1\)"),
        (7, SparseIndexError, r"variable 'w' must lie in \[0, 5\) \(got 7\)"),
        (np.array([2**64 - 1], np.uint64), SparseIndexError, r"got 18446744073709551615"),
        ([0.0], ArgumentTypeError, "must be whole numbers"),
        ([True], ArgumentTypeError, "must be whole numbers"),
        (None, ArgumentTypeError, "must consist of numbers"),
        ("1", ArgumentTypeError, "must consist of numbers"),
    ],
    ids=str,
)
def test_indices_that_are_refused(device: Device, indices: Any, error: type[Exception], message: str) -> None:
    variable, behind = late(name="w")
    with pytest.raises(error, match=message):
        variable.gather(indices)
    assert behind.asked == []


def test_a_variable_without_rows(device: Device) -> None:
    with pytest.raises(ArgumentValueError, match=r"variable 'x' must have rows \(got shape \(\)\)"):
        Variable(1.0, name="x").gather(0)
    assert Variable(np.zeros((0, 2))).gather([]).shape == (0, 2)
    with pytest.raises(SparseIndexError, match=r"must lie in \[0, 0\)"):
        Variable(np.zeros((0, 2))).gather([0])


def test_indices_out_of_range_in_device_memory(device: Device) -> None:
    """Nobody waits to look at them: such a row is NaN, and the update leaves it out and notes it."""
    variable, behind = late()
    rows = device.array(np.array([1, 5, -1]))
    optimizer = gpu_adam.Adam(0.1)
    if device.checks_indices:
        with pytest.raises(SparseIndexError):
            variable.gather(rows)
        return
    expected = np.full((3, 2), np.nan, np.float32)
    expected[0] = NOW[1]
    np.testing.assert_array_equal(device.numpy(variable.gather(rows)), expected)
    assert behind.asked == [[-1, 1, 5]]
    assert device.numpy(Variable(np.arange(4)).gather(rows)).tolist() == [1, 0, 0]
    optimizer.minimize(lambda: np.sum(variable.gather(rows)), [variable])
    with pytest.raises(SparseIndexError, match=r"must lie in \[0, 5\) \(got 5 and 1 more\)"):
        optimizer.check_errors()
    assert behind.asked[:2] == [[-1, 1, 5]] * 2
    always = Variable(NOW)
    gpu_adam.Adam(0.1).apply_gradients([(IndexedSlices(device.array(np.ones((1, 2), np.float32)), rows[:1]), always)])
    assert_same_bits(device.numpy(variable._storage)[1], always.numpy()[1])
