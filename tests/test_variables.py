"""Variable: an array whose memory stays, which behaves as its array does."""

import copy
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from reference import assert_same_bits

import gpu_adam
from gpu_adam import Variable
from gpu_adam.devices import Device, find_device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError

X = np.arange(1, 7, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (1.5, None, np.float32(1.5)),
        (3, None, np.int32(3)),
        (True, None, np.bool_(True)),
        (1j, None, np.complex128(1j)),
        ([1.0, 2], None, np.array([1, 2], np.float32)),
        ([[1], [2]], None, np.array([[1], [2]], np.int32)),
        ((1, 2.5), None, np.array([1, 2.5], np.float32)),
        ([], None, np.zeros(0, np.float32)),
        (np.float64(1.5), None, np.float64(1.5)),
        (np.arange(3), None, np.arange(3)),
        (X, None, X),
        (X, "float64", X.astype(np.float64)),
        ([1, 2], np.float64, np.array([1.0, 2.0])),
        (2, np.dtype("float64"), np.float64(2)),
        (np.ma.masked_array(X, mask=False), None, X),
        (X.T, None, X.T),
        (X[:, ::2], None, X[:, ::2]),
        (np.zeros((0, 3)), None, np.zeros((0, 3))),
        (lambda: [1.0, 2.0], None, np.array([1, 2], np.float32)),
        (lambda: X, "float64", X.astype(np.float64)),
    ],
)
def test_initial_values(device: Device, value: Any, dtype: Any, expected: Any) -> None:
    variable = Variable(value, dtype=dtype)
    assert_same_bits(variable.numpy(), expected)
    assert variable.shape == np.shape(expected)
    assert variable.dtype == np.asarray(expected).dtype
    assert variable.ndim == np.ndim(expected)
    assert variable.size == np.size(expected)
    assert variable.value.flags.c_contiguous
    assert variable.device is device


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i8"])
def test_bytes_in_this_processors_order(device: Device, dtype: str) -> None:
    """Numbers of the other byte order are converted: kernels read this one's."""
    variable = Variable(np.arange(3, dtype=dtype), device=device)
    assert variable.dtype.isnative
    assert variable.numpy().tolist() == [0, 1, 2]


def test_defaults_and_attributes(device: Device) -> None:
    variable = Variable(X)
    assert (variable.name, variable.trainable) == ("Variable", True)
    named = Variable(X, False, "w", "float64", device)
    assert (named.name, named.trainable, named.dtype.name, named.device) == ("w", False, "float64", device)
    assert Variable(X, name="").name == ""
    assert repr(named) == f"<Variable 'w' shape=(2, 3) dtype=float64 device={device.name}>"
    assert type(variable.value) is device.xp.ndarray
    with pytest.raises(AttributeError):
        variable.name = "other"  # type: ignore[misc]
    with pytest.raises(AttributeError, match="has no attribute 'gradient'"):
        print(variable.gradient)


def test_the_initial_value_is_copied(device: Device) -> None:
    array = device.array(X)
    variable, other = Variable(array), Variable(Variable(array))
    array[...] = 0
    assert_same_bits(variable.numpy(), X)
    assert_same_bits(other.numpy(), X)
    variable.assign(X + 1)
    assert_same_bits(other.numpy(), X)


NO_NUMBERS = [
    None, "abc", b"abc", ..., ["a", "b"], [[1], [2, 3]], {"a": 1}, [None], np.array(["a"]),
    np.array("2020", "M8[Y]"),
]  # fmt: skip


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_makes_no_variable(device: Device, value: Any) -> None:
    with pytest.raises((ArgumentTypeError, ArgumentValueError), match="initial_value must"):
        Variable(value, device=device)


@pytest.mark.parametrize(
    ("argument", "value", "error", "rule"),
    [
        ("name", 3, ArgumentTypeError, "must be a str"),
        ("name", b"w", ArgumentTypeError, "must be a str"),
        ("dtype", "bogus", ArgumentTypeError, "must be a NumPy dtype"),
        ("dtype", 3, ArgumentTypeError, "must be a NumPy dtype"),
        ("device", 3, ArgumentTypeError, "must be a name or a device"),
        ("device", "tpu", ArgumentValueError, "must be 'auto', 'host', 'cuda' or 'cuda:N'"),
    ],
)
def test_arguments_that_break_their_rule(device: Device, argument: str, value: Any, error: Any, rule: str) -> None:
    with pytest.raises(error, match=f"^{argument} {rule}"):
        Variable(X, **{"device": device, argument: value})


def test_device_argument(device: Device) -> None:
    host = find_device("host")
    assert Variable(X, device="host").device is host
    assert Variable(X, device=device.name).device is device
    assert Variable(X, device=device).device is device
    there = device.array(X)
    gpu_adam.set_device("host")
    assert Variable(there).device is device, "an array keeps its device, whatever the default is"
    assert Variable(X).device is host


def test_numpy_is_a_copy_and_value_is_not(device: Device) -> None:
    variable = Variable(X)
    copied = variable.numpy()
    copied[...] = 0
    assert_same_bits(variable.numpy(), X)
    assert variable.value is variable.value
    variable.value[0] = 0
    assert variable.numpy()[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["list", "host array", "array", "Variable", "other dtype", "strided"])
def test_assign(device: Device, kind: str) -> None:
    """In place, cast to the variable's dtype; returns the variable."""
    variable = Variable(X)
    place, array = device.address(variable.value), variable.value
    values: dict[str, Any] = {
        "list": (X + 1).tolist(),
        "host array": X + 1,
        "array": device.array(X + 1),
        "Variable": Variable(X + 1),
        "other dtype": device.array((X + 1).astype(np.int64)),
        "strided": device.array(np.ascontiguousarray((X + 1).T)).T,
    }
    value = values[kind]
    assert variable.assign(value) is variable
    assert_same_bits(variable.numpy(), X + 1)
    assert variable.assign_add(value) is variable
    assert_same_bits(variable.numpy(), 2 * (X + 1))
    assert variable.assign_sub(value) is variable
    assert_same_bits(variable.numpy(), X + 1)
    assert variable.value is array
    assert device.address(array) == place


def test_assign_itself_and_scalars(device: Device) -> None:
    variable, scalar = Variable(X), Variable(1.0)
    variable.assign(variable).assign_add(variable)
    assert_same_bits(variable.numpy(), X + X)
    assert float(scalar.assign(3).assign_sub(0.5)) == 2.5
    empty = Variable(np.zeros((0, 3)))
    assert empty.assign(np.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("method", ["assign", "assign_add", "assign_sub"])
@pytest.mark.parametrize("value", [1.0, [1.0, 2, 3], X.T, X[None], "abc", None, ..., [["a"] * 3] * 2], ids=repr)
def test_what_cannot_be_assigned(device: Device, method: str, value: Any) -> None:
    """No broadcasting, no text; nothing has changed then."""
    variable = Variable(X, name="w")
    with pytest.raises((ArgumentTypeError, ArgumentValueError), match=rf"^{method}'s (value|delta) .*variable 'w'"):
        getattr(variable, method)(value)
    assert_same_bits(variable.numpy(), X)


TAKEN_FOR_NUMBERS: dict[str, Any] = {
    "texts": ["1", "2"],
    "text": "12",
    "bytes": [b"1", b"2"],
    "missing": [None, 1.0],
    "truth values": [True, False],
    "truth values in an array": np.array([True, False]),
    "dates": np.array(["2020-01-01", "2020-01-02"], "datetime64[D]"),
    "durations": np.array([1, 2], "timedelta64[s]"),
    "objects": np.array([1.0, 2.0], object),
    "fractions": [Fraction(1, 2), Fraction(1, 3)],
    "too large for any float": [10**400, 1],
    "too large for float32": [1e300, 1.0],
    "too large for float32, in an array": np.array([1e300, 1.0]),
    "complex": [1 + 2j, 2],
    "complex array": np.array([1 + 2j, 2]),
    "masked": np.ma.masked_array([1e30, 2.0], mask=[True, False]),
    "records": np.zeros(2, [("a", "f4")]),
    "bare bytes": np.zeros(2, "V4"),
    "ragged": [1.0, [2.0]],
}


@pytest.mark.parametrize("what", TAKEN_FOR_NUMBERS)
@pytest.mark.parametrize("use", ["initial", "assign", "assign_add", "gradient", "slot", "iterations", "initializer"])
@pytest.mark.filterwarnings("error")
def test_what_is_taken_for_numbers_by_numpy_alone(device: Device, what: str, use: str) -> None:
    """Nobody's text, date, mask or imaginary part becomes a number. Nothing has changed then."""
    value = TAKEN_FOR_NUMBERS[what]
    variable, start = Variable(np.ones(2, np.float32), name="w"), np.ones(2, np.float32)
    optimizer = gpu_adam.Adam()
    optimizer.build([variable])

    def do() -> None:
        if use == "initial":
            Variable(value, dtype="float32")
        elif use == "gradient":
            optimizer.apply_gradients([(value, variable)])
        elif use == "slot":
            optimizer.set_weights([0, value, start])
        elif use == "iterations":
            optimizer.iterations = value
        elif use == "initializer":
            optimizer.add_slot(variable, "note", lambda shape, dtype: value)
        else:
            getattr(variable, use)(value)

    with pytest.raises((ArgumentTypeError, ArgumentValueError)) as raised:
        do()
    assert str(raised.value).endswith(".")
    assert_same_bits(variable.numpy(), start)
    assert [weight.name for weight in optimizer.weights] == ["Adam/iter", "Adam/w/m", "Adam/w/v"]
    assert not any(np.any(weight) for weight in optimizer.get_weights())


# As an array.


def plain(device: Device, result: Any) -> Any:
    assert not isinstance(result, Variable)
    return device.numpy(result)


def test_arithmetic(device: Device) -> None:
    v, w, a = Variable(X), Variable(X + 1), device.array(X + 1)
    for result, expected in (
        (v + w, X + (X + 1)), (v - a, X - (X + 1)), (a - v, (X + 1) - X), (2 * v, 2 * X), (v * 2, X * 2),
        (v / w, X / (X + 1)), (1 / v, 1 / X), (v**2, X**2), (-v, -X), (+v, X), (abs(-v), X), (v // 2, X // 2),
        (v % 2, X % 2), (v @ w.value.T, X @ (X + 1).T), (v == w, np.zeros((2, 3), bool)), (v < w, X < X + 1),
        (v != a, np.ones((2, 3), bool)), (v >= 3, X >= 3),
    ):  # fmt: skip
        assert_same_bits(plain(device, result), np.asarray(expected))


def test_operators_in_place_keep_the_variable(device: Device) -> None:
    variable, expected = Variable(X), X.copy()
    same, place = variable, device.address(variable.value)
    variable += 1
    expected += 1
    variable -= Variable(X)
    expected -= X
    variable *= device.array(X)
    expected *= X
    variable /= 2
    expected /= 2
    variable **= 2
    expected **= 2
    variable //= 2
    expected //= 2
    variable %= 3
    expected %= 3
    assert variable is same
    assert device.address(variable.value) == place
    assert_same_bits(variable.numpy(), expected)


def test_indexing(device: Device) -> None:
    v = Variable(X)
    for index in (0, (1, 2), slice(None, 1), (slice(None), -1), ..., None, (slice(None), slice(None, None, -1))):
        assert_same_bits(plain(device, v[index]), np.asarray(X[index]))
    assert_same_bits(plain(device, v[device.array(np.array([1, 0, 1]))]), X[[1, 0, 1]])
    assert_same_bits(plain(device, v[Variable(np.array([1, 0]))]), X[[1, 0]])
    v[0] = 9
    v[:, 1] = Variable(np.array([7, 8], np.float32))
    expected = X.copy()
    expected[0] = 9
    expected[:, 1] = (7, 8)
    assert_same_bits(v.numpy(), expected)
    assert len(v) == 2
    assert [device.numpy(row).tolist() for row in v] == expected.tolist()


def test_numbers(device: Device) -> None:
    assert float(Variable(2.5)) == 2.5
    assert int(Variable(2.5)) == 2
    assert complex(Variable(2.5)) == 2.5
    assert bool(Variable(2.5))
    assert not Variable(0.0)
    assert [10, 20, 30][Variable(1)] == 20
    assert round(float(Variable(2.5) * 2)) == 5
    with pytest.raises(TypeError):
        [10, 20, 30][Variable(1.5)]
    with pytest.raises(ValueError, match="truth value"):
        bool(Variable(X))


def test_universal_functions(device: Device) -> None:
    v, w = Variable(X), Variable(X + 1)
    for function in (np.negative, np.square, np.sqrt, np.isnan):
        assert_same_bits(plain(device, function(v)), function(X))
    assert_same_bits(plain(device, np.add(v, w)), X + (X + 1))
    assert_same_bits(plain(device, np.maximum(v, 3)), np.maximum(X, 3))
    multiply: Any = np.multiply  # NumPy's types know no other `out`
    result = multiply(v, 2, out=w)
    assert not isinstance(result, Variable)
    assert_same_bits(w.numpy(), X * 2)
    both = np.divmod(v, 2)
    assert_same_bits(plain(device, both[0]), X // 2)


def test_array_functions(device: Device) -> None:
    v, w = Variable(X), Variable(X + 1)
    assert float(plain(device, np.sum(v))) == X.sum()
    assert_same_bits(plain(device, np.concatenate([v, w])), np.concatenate([X, X + 1]))
    assert_same_bits(plain(device, np.stack((v, w), axis=1)), np.stack((X, X + 1), axis=1))
    assert_same_bits(plain(device, np.where(v > 2, v, w)), np.where(X > 2, X, X + 1))
    assert_same_bits(plain(device, np.reshape(v, (3, 2))), X.reshape(3, 2))
    assert np.shape(v) == (2, 3)


def test_numpy_arrays_of_a_variable(device: Device) -> None:
    variable = Variable(X)
    assert_same_bits(np.asarray(variable), X)
    assert_same_bits(np.array(variable), X)
    assert_same_bits(np.asarray(variable, np.float64), X.astype(np.float64))
    copied = np.array(variable)
    copied[...] = 0
    assert_same_bits(variable.numpy(), X)
    assert np.shares_memory(np.asarray(variable), variable.value) if device.name == "host" else True
    assert np.array_equal(np.array(variable, dtype=np.float64, copy=True), X)
    with pytest.raises(ValueError, match=r"copy|view"):
        np.array(variable, dtype=np.float64, copy=False)


def test_interfaces_of_the_device(device: Device) -> None:
    """The array interface of its own device, and not the other's."""
    variable, name = Variable(X), "__array_interface__" if device.name == "host" else "__cuda_array_interface__"
    other = {"__array_interface__", "__cuda_array_interface__"} - {name}
    interface = getattr(variable, name)
    assert interface["data"][0] == device.address(variable.value)
    assert interface["shape"] == (2, 3)
    assert not hasattr(variable, other.pop())


def test_dlpack_on_the_host() -> None:
    variable = Variable(X, device="host")
    assert variable.__dlpack_device__() == (1, 0)
    view = np.from_dlpack(variable)
    assert np.shares_memory(view, variable.value)
    assert_same_bits(view, X)


def test_variables_are_told_apart_by_identity() -> None:
    v, w = Variable(X), Variable(X)
    table = {v: "v", w: "w"}
    assert table[v] == "v"
    assert table[w] == "w"
    assert hash(v) != hash(w)


def test_copies(device: Device) -> None:
    variable = Variable(X, False, "w")
    for copied in (copy.deepcopy(variable), pickle.loads(pickle.dumps(variable))):
        assert_same_bits(copied.numpy(), X)
        assert (copied.name, copied.trainable, copied.device.name) == ("w", False, device.name)
        copied.assign(X + 1)
        assert_same_bits(variable.numpy(), X)
    pair = copy.deepcopy([variable, variable])
    assert pair[0] is pair[1]
    scalar, empty = copy.deepcopy((Variable(2.0), Variable(np.zeros((0, 3)))))
    assert float(scalar) == 2.0
    assert empty.shape == (0, 3)


def test_a_number_is_formatted_and_rounded(device: Device) -> None:
    scalar, row = Variable(np.float64(1.256), name="s"), Variable([1.0, 2.0], name="row")
    assert f"{scalar:.2f}" == "1.26"
    assert f"{scalar}" == repr(scalar) == str(scalar)
    assert round(scalar, 2) == 1.26
    assert round(scalar) == 1
    assert f"{row}" == repr(row)
    for use in (lambda: f"{row:.2f}", lambda: round(row, 2)):
        with pytest.raises(ArgumentTypeError, match=r"must be one number \(got <Variable 'row'"):
            use()


def test_memory_that_can_only_be_read_is_refused() -> None:
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    variable = Variable.over(array, find_device("host"), "w")
    optimizer = gpu_adam.Adam()
    with pytest.raises(ArgumentValueError, match="variable 'w' must have memory that can be written"):
        optimizer.apply_gradients([(np.ones(3, np.float32), variable)])
    with pytest.raises(ArgumentValueError, match="wrap a copy"):
        optimizer.build([variable])
    assert not optimizer.weights
    assert not array.any()
