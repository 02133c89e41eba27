"""set_weights, load and the counter: convert and check everything, then write. What is refused has changed nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from reference import assert_same_bits
from snapshots import contents, unchanged

import gpu_adam
from gpu_adam import CheckpointError, GpuAdamError, Variable
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.state import checkpoint

X = np.linspace(-1, 1, 3, dtype=np.float32)
LAST = 2**63 - 1


def started(device: Device, steps: int = 2, dtype: str = "float32", **config: Any) -> tuple[gpu_adam.Adam, Variable]:
    optimizer, x = gpu_adam.Adam(0.1, **config), Variable(X.astype(dtype), name="x")
    for number in range(steps):
        optimizer.apply_gradients([(device.array(np.cos(X + number).astype(dtype)), x)])
    return optimizer, x


# export and restore


def test_a_loss_overwrites_nothing(device: Device) -> None:
    """Not the state, whose arrays a loss is shown to be looked at."""
    x, optimizer = Variable(X.astype(np.float64)), gpu_adam.Adam(0.05)
    optimizer.apply_gradients([(device.array(np.ones(3)), x)])
    weights, named = [weight + 1 for weight in optimizer.get_weights()], optimizer.export()
    calls: list[Callable[[], Any]] = [
        lambda: optimizer.set_weights(weights),
        lambda: optimizer.restore(named),
        lambda: setattr(optimizer, "iterations", 5),
    ]
    for call in calls:

        def loss(call: Callable[[], Any] = call) -> Any:
            value = (x * x).sum()
            call()
            return value

        with (
            unchanged(optimizer, x),
            pytest.raises(ArgumentValueError, match="must not be called or set while a loss is being differentiated"),
        ):
            gpu_adam.value_and_grad(loss, [x])


def test_a_state_by_name(device: Device) -> None:
    """Another optimizer with the same variables goes on to the same bits."""
    one, x = started(device)
    state = one.export()
    assert list(state) == ["iterations", "x/m", "x/v"]
    assert all(type(array) is np.ndarray for array in state.values())
    other, y = gpu_adam.Adam(0.1), Variable(x.numpy(), name="x")
    other.build([y])
    other.restore(dict(reversed(state.items())))
    for optimizer, variable in ((one, x), (other, y)):
        optimizer.apply_gradients([(device.array(X), variable)])
    assert other.iterations == 3
    assert_same_bits(x.numpy(), y.numpy())


@pytest.mark.parametrize("bad", ["missing", "besides", "shape", "text", "count", "list"])
def test_a_state_that_does_not_fit(device: Device, bad: str) -> None:
    optimizer, x = started(device)
    state: Any = {name: array + 1 for name, array in optimizer.export().items()}
    names = {"missing": "x/v", "besides": "y/m", "shape": "x/v", "text": "x/v", "count": "iterations"}
    if bad == "missing":
        del state["x/v"]
    elif bad == "list":
        state = list(state.values())
    else:
        state[names[bad]] = {"besides": X, "shape": X[:2], "text": np.array(["a"] * 3), "count": -1}[bad]
    with unchanged(optimizer, x), pytest.raises((ArgumentTypeError, ArgumentValueError)) as raised:
        optimizer.restore(state)
    assert names.get(bad, "list") in str(raised.value)


# set_weights


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros(3, "V8"),
        np.zeros(3, [("a", "f4")]),
        np.array(["a", "b", "c"]),
        np.array([None, 1, 2]),
        np.zeros(3, "M8[s]"),
        [1.0, [2.0], 3.0],
        ["a", "b", "c"],
        None,
        "abc",
        np.zeros(4),
        np.zeros((3, 1)),
        np.float32(1),
    ],
    ids=repr,
)
@pytest.mark.parametrize("place", [1, 2])
def test_a_bad_array_anywhere_changes_nothing(device: Device, bad: Any, place: int) -> None:
    optimizer, x = started(device)
    weights: list[Any] = [9, *(weight.numpy() * 5 for weight in optimizer.weights[1:])]
    weights[place] = bad
    with unchanged(optimizer, x), pytest.raises(GpuAdamError):
        optimizer.set_weights(weights)


def test_an_array_that_raises_as_it_is_read(device: Device) -> None:
    class Failing:
        shape, dtype = (3,), np.dtype(np.float32)

        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            raise RuntimeError("the caller's own")

    optimizer, x = started(device)
    with unchanged(optimizer, x), pytest.raises((GpuAdamError, RuntimeError)):
        optimizer.set_weights([9, np.ones(3, np.float32), Failing()])


@pytest.mark.parametrize("live", ["variables", "arrays", "views"])
def test_live_arrays_may_be_swapped(device: Device, live: str) -> None:
    """What is passed is read before anything is written."""
    optimizer, _ = started(device)
    _, m, v = optimizer.weights
    expected = [v.numpy(), m.numpy()]
    passed: dict[str, list[Any]] = {
        "variables": [v, m],
        "arrays": [v.value, m.value],
        "views": [v.value[:], m.value[::-1][::-1]],
    }
    optimizer.set_weights([9, *passed[live]])
    assert optimizer.iterations == 9
    assert_same_bits(m.numpy(), expected[0])
    assert_same_bits(v.numpy(), expected[1])


def test_a_slot_reversed_onto_itself(device: Device) -> None:
    optimizer, _ = started(device)
    _, m, v = optimizer.weights
    expected = [m.numpy()[::-1], v.numpy()]
    optimizer.set_weights([9, m.value[::-1], v.value])
    assert_same_bits(m.numpy(), expected[0])
    assert_same_bits(v.numpy(), expected[1])


def test_weights_keep_their_objects_and_memory(device: Device) -> None:
    optimizer, _ = started(device)
    weights = list(optimizer.weights)
    places = [device.address(weight.value) for weight in weights[1:]]
    optimizer.set_weights([weight * 2 for weight in optimizer.get_weights()])
    assert list(map(id, optimizer.weights)) == list(map(id, weights))
    assert [device.address(weight.value) for weight in weights[1:]] == places


# The counter

BAD_COUNTS: list[Any] = [
    -1,
    np.int64(-5),
    1.5,
    np.float32(0.25),
    float("nan"),
    float("inf"),
    -float("inf"),
    1e19,
    float(2**63),
    1 + 2j,
    np.complex64(3j),
    LAST,
    2**63,
    2**64,
    2**70,
    np.uint64(2**63),
    np.uint64(LAST),
    "3",
    None,
    [1],
    np.array([1, 2]),
]


@pytest.mark.parametrize("count", BAD_COUNTS, ids=repr)
@pytest.mark.parametrize("steps", [0, 2])
def test_counts_that_are_refused(device: Device, count: Any, steps: int) -> None:
    """By assignment and by set_weights, whether there were steps or only a build."""
    optimizer, x = started(device, steps)
    optimizer.build([x])
    weights = [count, *(weight + 1 for weight in optimizer.get_weights()[1:])]
    with unchanged(optimizer, x), pytest.raises((ArgumentTypeError, ArgumentValueError)):
        optimizer.set_weights(weights)
    with unchanged(optimizer, x), pytest.raises((ArgumentTypeError, ArgumentValueError)):
        optimizer.iterations = count
    fresh = gpu_adam.Adam()
    with unchanged(fresh), pytest.raises((ArgumentTypeError, ArgumentValueError)):
        fresh.iterations = count


@pytest.mark.parametrize(
    "count", [0, 7, np.int32(7), np.uint8(200), np.uint64(12), np.int64(LAST - 1), LAST - 1], ids=repr
)
def test_counts_that_are_accepted(device: Device, count: Any) -> None:
    optimizer, _ = started(device)
    optimizer.iterations = count
    assert int(optimizer.iterations) == int(count)
    optimizer.iterations = 1
    optimizer.set_weights([count, *optimizer.get_weights()[1:]])
    assert int(optimizer.iterations) == int(count)
    assert optimizer.get_weights()[0].dtype == np.int64


@pytest.mark.parametrize("count", [-1, -(2**63), LAST])
def test_a_counter_of_the_callers_own(device: Device, count: int) -> None:
    """Refused where it is given; where it changes later, by the step."""
    optimizer, x = gpu_adam.Adam(), Variable(X)
    counter = Variable(np.int64(count), device="host")
    with unchanged(optimizer, counter), pytest.raises(ArgumentValueError):
        optimizer.iterations = counter
    counter.assign(3)
    optimizer.iterations = counter
    assert optimizer.apply_gradients([(device.array(X), x)]) == 4
    assert int(counter) == 4
    counter.assign(count)
    with unchanged(optimizer, x), pytest.raises(ArgumentValueError):
        optimizer.apply_gradients([(device.array(X), x)])


@pytest.mark.parametrize("count", [-1, -(2**63), LAST])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_step_at_a_count_out_of_range(device: Device, count: int, steps: int) -> None:
    """The counter is a live variable, so it can be anything when a step begins: then the step raises, and all stays."""
    optimizer, x = started(device, steps)
    optimizer.build([x])
    optimizer.iterations.assign(np.int64(count))
    pairs = [(device.array(X), x)]
    for _ in range(3):
        with unchanged(optimizer, x), pytest.raises(ArgumentValueError):
            optimizer.apply_gradients(pairs)
    optimizer.iterations.assign(5)
    assert optimizer.apply_gradients(pairs) == 6


def test_the_last_step(device: Device) -> None:
    optimizer, x = started(device)
    optimizer.iterations = LAST - 1
    assert optimizer.apply_gradients([(device.array(X), x)]) == LAST
    with unchanged(optimizer, x), pytest.raises(ArgumentValueError):
        optimizer.apply_gradients([(device.array(X), x)])
    assert np.isfinite(x.numpy()).all()


def test_a_counter_out_of_range_in_a_first_step(device: Device) -> None:
    optimizer, x = gpu_adam.Adam(), Variable(X)
    optimizer.iterations.assign(np.int64(-3))
    with unchanged(optimizer, x), pytest.raises(ArgumentValueError):
        optimizer.apply_gradients([(device.array(X), x)])
    assert len(optimizer.weights) == 1


def test_arithmetic_in_place(device: Device) -> None:
    """`optimizer.iterations += 10` hands the counter itself back."""
    optimizer, x = started(device)
    counter = optimizer.iterations
    optimizer.iterations += 10
    assert optimizer.iterations is counter
    assert optimizer.weights[0] is counter
    assert int(counter) == 12
    optimizer.iterations -= 2
    assert optimizer.apply_gradients([(device.array(X), x)]) == 11
    optimizer.iterations = counter
    assert len(optimizer.weights) == 3
    with unchanged(optimizer, x), pytest.raises(ArgumentValueError):
        optimizer.iterations = Variable(np.int64(3), device="host")
    fresh = gpu_adam.Adam()
    fresh.iterations += 4
    assert fresh.apply_gradients([(device.array(X), x)]) == 5


# load


def saved(device: Device, path: Path, dtype: str = "float32", **config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    optimizer, _ = started(device, 3, dtype, **config)
    optimizer.save(path)
    return checkpoint.read(path)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int32", "int64", "complex64", "bool"])
def test_a_file_with_another_dtype(device: Device, tmp_path: Path, number: int, dtype: str) -> None:
    """Each array must have its weight's dtype: nothing is rounded on the way in."""
    arrays, meta = saved(device, tmp_path / "state")
    optimizer, x = started(device)
    name = list(arrays)[number]
    if arrays[name].dtype == dtype:
        optimizer.load(tmp_path / "state")
        assert_same_bits(optimizer.weights[number].numpy(), np.asarray(arrays[name]))
        return
    checkpoint.write(tmp_path / "state", arrays | {name: np.asarray(arrays[name]).astype(dtype)}, meta)
    with unchanged(optimizer, x), pytest.raises(CheckpointError):
        optimizer.load(tmp_path / "state")


def test_a_file_of_variables_of_another_dtype(device: Device, tmp_path: Path) -> None:
    saved(device, tmp_path / "state", "float64")
    optimizer, x = started(device)
    with unchanged(optimizer, x), pytest.raises(CheckpointError):
        optimizer.load(tmp_path / "state")


@pytest.mark.parametrize(("written", "read"), [("abs2", "real_imag"), ("real_imag", "abs2")])
@pytest.mark.parametrize("same_dtypes", [False, True])
def test_a_file_of_another_complex_mode(
    device: Device, tmp_path: Path, written: str, read: str, same_dtypes: bool
) -> None:
    """Its v means something else, and would move imaginary parts by whole multiples of the rate."""
    path = tmp_path / "state"
    arrays, meta = saved(device, path, "complex64", complex_mode=written)
    optimizer, x = started(device, dtype="complex64", complex_mode=read)
    if same_dtypes:
        arrays["x/v"] = arrays["x/v"].real.astype(optimizer.weights[2].dtype)
        checkpoint.write(path, arrays, meta)
    with unchanged(optimizer, x), pytest.raises(CheckpointError):
        optimizer.load(path)
    again, _ = started(device, dtype="complex64", complex_mode=written)
    saved(device, path, "complex64", complex_mode=written)
    again.load(path)
    assert int(again.iterations) == 3


@pytest.mark.parametrize("count", [-1, -(2**63), LAST])
def test_a_file_with_a_bad_count(device: Device, tmp_path: Path, count: int) -> None:
    arrays, meta = saved(device, tmp_path / "state")
    checkpoint.write(tmp_path / "state", arrays | {"iterations": np.array(count, np.int64)}, meta)
    optimizer, x = started(device)
    with unchanged(optimizer, x), pytest.raises(CheckpointError):
        optimizer.load(tmp_path / "state")


MALFORMED: dict[str, Any] = {
    "no config": {"kind": "Adam"},
    "config is None": {"kind": "Adam", "config": None},
    "config is a list": {"kind": "Adam", "config": ["complex_mode"]},
    "config is a word": {"kind": "Adam", "config": "complex_mode"},
    "another kind": {"kind": ["Adam"], "config": {}},
    "names is None": {"kind": "Adam", "config": {}, "names": None},
    "names is a word": {"kind": "Adam", "config": {}, "names": "Adam/iter"},
    "names is a dict": {"kind": "Adam", "config": {}, "names": {"Adam/iter": 1}},
    "names of numbers": {"kind": "Adam", "config": {}, "names": [1, 2, 3]},
    "names of lists": {"kind": "Adam", "config": {}, "names": [[], [], []]},
    "names of others": {"kind": "Adam", "config": {}, "names": ["Adam/iter", "Adam/x/m", "Adam/x/v"]},
    "meta is empty": {},
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_metadata(device: Device, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "state"
    arrays, _ = saved(device, path)
    checkpoint.write(path, arrays, MALFORMED[kind])
    optimizer, x = started(device)
    with unchanged(optimizer, x), pytest.raises(CheckpointError):
        optimizer.load(path)
    with pytest.raises(CheckpointError):
        gpu_adam.Adam().load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x/m": "other/m"}, "nothing for 'x/m' and also 'other/m'"),
        ({"x/m": None, "x/v": None}, "nothing for 'x/m', 'x/v'"),
        ({"x/v": "x/vhat"}, "nothing for 'x/v' and also 'x/vhat'"),
        ({"iterations": None}, "nothing for 'iterations'"),
    ],
)
def test_a_message_names_what_is_missing_or_left_over(
    device: Device, tmp_path: Path, change: dict[str, str | None], message: str
) -> None:
    path = tmp_path / "state"
    arrays, meta = saved(device, path)
    names = {name: change.get(name, name) for name in arrays}
    checkpoint.write(path, {new: arrays[name] for name, new in names.items() if new}, meta)
    optimizer, x = started(device)
    with unchanged(optimizer, x), pytest.raises(CheckpointError) as caught:
        optimizer.load(path)
    assert message in str(caught.value)
    assert "build" in str(caught.value)


def test_messages_about_many_variables_are_short(device: Device, tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    optimizer, x = started(device)
    optimizer.save(small)
    many = gpu_adam.Adam()
    many.build([Variable(np.zeros((), np.float32), name=f"layer_{number}/kernel") for number in range(20_000)])
    many.save(large)
    for target, path in ((many, small), (optimizer, large), (gpu_adam.Adam(), large)):
        with pytest.raises(CheckpointError) as caught:
            target.load(path)
        assert len(str(caught.value)) < 1000
    with pytest.raises(ArgumentValueError) as refused:
        many.set_weights([np.zeros(())] * 7)
    assert len(str(refused.value)) < 1000
    assert contents(x)[1] == (3,)


def test_a_file_still_goes_on_to_the_same_bits(device: Device, tmp_path: Path) -> None:
    optimizer, x = started(device, 3)
    optimizer.save(tmp_path / "state")
    other, y = started(device, 0)
    y.assign(x.numpy())
    other.build([y])
    other.load(tmp_path / "state")
    oracle = reference.Adam([X], 0.1)
    for number in range(5):
        oracle.step([np.cos(X + number)])
        if number >= 3:
            other.apply_gradients([(device.array(np.cos(X + number)), y)])
    assert_same_bits(y.numpy(), oracle.variables[0])
