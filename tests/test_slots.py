"""Weights, slots and the iteration counter: their order, names and values, and what may be put into them."""

from typing import Any

import numpy as np
import pytest
import reference
from reference import assert_same_bits
from snapshots import unchanged

import gpu_adam
from gpu_adam import Variable
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, GpuAdamError, SlotNotFoundError

SHAPES = [(3, 2), (5,), ()]


def started(device: Device, *, amsgrad: bool = False, steps: int = 1) -> tuple[gpu_adam.Adam, list[Variable]]:
    rng = np.random.default_rng(1)
    variables = [Variable(np.ones(shape, np.float32), name=name) for name, shape in zip("abc", SHAPES, strict=True)]
    optimizer = gpu_adam.Adam(0.1, amsgrad=amsgrad)
    for _ in range(steps):
        optimizer.apply_gradients(
            [(device.array(rng.standard_normal(v.shape).astype(np.float32)), v) for v in variables]
        )
    return optimizer, variables


@pytest.mark.parametrize("amsgrad", [False, True])
def test_order_and_names(device: Device, amsgrad: bool) -> None:
    optimizer, variables = started(device, amsgrad=amsgrad, steps=0)
    assert optimizer.weights == []
    assert optimizer.get_slot_names() == []
    assert optimizer.get_weights() == []
    names = ["m", "v", *(["vhat"] if amsgrad else [])]
    optimizer, variables = started(device, amsgrad=amsgrad)
    assert optimizer.get_slot_names() == names
    assert [w.name for w in optimizer.weights] == ["Adam/iter", *(f"Adam/{x}/{slot}" for slot in names for x in "abc")]
    assert [w.shape for w in optimizer.weights] == [(), *SHAPES * len(names)]
    assert not any(weight.trainable for weight in optimizer.weights)
    assert optimizer.weights[1] is optimizer.get_slot(variables[0], "m")
    assert [str(weight.device.name) for weight in optimizer.weights] == ["host", *[device.name] * 3 * len(names)]


def test_lists_are_live(device: Device) -> None:
    optimizer, variables = started(device, steps=0)
    weights, names = optimizer.weights, optimizer.get_slot_names()
    assert optimizer.variables() is weights
    optimizer.build(variables)
    assert len(weights) == 7
    assert names == ["m", "v"]
    assert optimizer.weights is weights
    assert optimizer.get_slot_names() is names


def test_names_need_not_differ(device: Device) -> None:
    a, b = Variable(np.ones(2)), Variable(np.ones(2))
    optimizer = gpu_adam.Adam(name="Mine")
    optimizer.apply_gradients([(device.array(np.ones(2)), a), (device.array(np.zeros(2)), b)])
    assert [weight.name for weight in optimizer.weights[1:]] == [f"Mine/Variable/{slot}" for slot in "mmvv"]
    assert optimizer.get_slot(a, "m").numpy().tolist() != optimizer.get_slot(b, "m").numpy().tolist()


def test_slots_of_dead_variables_stay(device: Device) -> None:
    optimizer, variables = started(device)
    del variables
    other = Variable(np.ones(2))
    optimizer.apply_gradients([(device.array(np.ones(2)), other)])
    assert len(optimizer.weights) == 9


def test_a_slot_that_does_not_exist(device: Device) -> None:
    optimizer, variables = started(device)
    with pytest.raises(
        SlotNotFoundError, match=r"slot 'vhat' of variable 'a' must exist \(got slots \['m', 'v'\]\); call build"
    ):
        optimizer.get_slot(variables[0], "vhat")
    with pytest.raises(SlotNotFoundError, match=r"slot 'm' of variable 'new' .*slots \[\]"):
        optimizer.get_slot(Variable(np.ones(2), name="new"), "m")
    for other in (None, "a", 3, [1.0]):
        with pytest.raises(ArgumentTypeError, match="var must be a Variable or a writeable device array"):
            optimizer.get_slot(other, "m")


# Iterations.


def test_iterations_count_steps(device: Device) -> None:
    optimizer, _ = started(device, steps=3)
    counter = optimizer.iterations
    assert isinstance(counter, Variable)
    assert (counter.dtype.name, counter.shape, counter.trainable, counter.device.name) == ("int64", (), False, "host")
    assert int(counter) == 3
    assert counter is optimizer.iterations is optimizer.weights[0]
    fresh = gpu_adam.Adam()
    assert int(fresh.iterations) == 0
    assert [weight.name for weight in fresh.weights] == ["Adam/iter"]


@pytest.mark.parametrize("how", ["property", "assign", "numpy"])
def test_iterations_may_be_set(device: Device, how: str) -> None:
    optimizer, variables = started(device)
    counter = optimizer.iterations
    if how == "assign":
        counter.assign(41)
    else:
        optimizer.iterations = 41 if how == "property" else np.int32(41)
    assert optimizer.iterations is counter
    variable = Variable(np.ones(2))
    assert optimizer.apply_gradients([(device.array(np.full(2, 3.0)), variable)]) == 42
    assert int(counter) == 42
    oracle = reference.Adam([np.ones(2)], 0.1, iterations=41)
    oracle.step([np.full(2, 3.0)])
    assert_same_bits(variable.numpy(), oracle.variables[0])
    assert len(variables) == 3


def test_iterations_that_are_no_number_of_steps(device: Device) -> None:
    optimizer, variables = started(device)
    for value in (2.5, "3", None, True, [1], np.array(3), np.timedelta64(3, "s")):
        with unchanged(optimizer, *variables), pytest.raises(ArgumentTypeError, match="iterations must be an int"):
            optimizer.iterations = value
    with (
        unchanged(optimizer, *variables),
        pytest.raises(ArgumentValueError, match=r"iterations must lie in \[0, 2\^63 - 1\) \(got -1\)"),
    ):
        optimizer.iterations = -1


def test_a_counter_of_the_callers_own(device: Device) -> None:
    counter = Variable(np.int64(7), name="steps", device="host")
    optimizer, variable = gpu_adam.Adam(), Variable(np.ones(2))
    optimizer.iterations = counter
    assert optimizer.apply_gradients([(device.array(np.ones(2)), variable)]) == 8
    assert optimizer.iterations is counter is optimizer.weights[0]
    assert int(counter) == 8
    with (
        unchanged(optimizer, variable),
        pytest.raises(ArgumentValueError, match="must be set before the counter exists"),
    ):
        optimizer.iterations = Variable(np.int64(0), device="host")
    for wrong in (Variable(np.int32(0), device="host"), Variable(np.zeros(1, np.int64), device="host"), Variable(0.0)):
        fresh = gpu_adam.Adam()
        with unchanged(fresh), pytest.raises(ArgumentValueError, match="must be an int64 scalar on the host"):
            fresh.iterations = wrong


# Weights as a whole.


def test_weights_round_trip(device: Device) -> None:
    optimizer, variables = started(device, amsgrad=True, steps=3)
    weights = optimizer.get_weights()
    assert type(weights[0]) is np.int64
    assert weights[0] == 3
    kept = [np.array(weight) for weight in weights]
    for variable in variables:
        variable.assign(np.ones(variable.shape))
    again, others = started(device, amsgrad=True, steps=0)
    again.build(others)
    again.set_weights(weights)
    g = [device.array(np.full(shape, 2, np.float32)) for shape in SHAPES]
    assert optimizer.apply_gradients(zip(g, variables, strict=True)) == 4
    assert again.apply_gradients(zip(g, others, strict=True)) == 4
    for one, other in zip([*variables, *optimizer.weights], [*others, *again.weights], strict=True):
        assert_same_bits(one.numpy(), other.numpy())
    for weight, old in zip(weights, kept, strict=True):
        assert_same_bits(weight, old, "what get_weights returned is a copy")


def test_weights_of_every_kind(device: Device) -> None:
    """Lists and tuples of arrays, numbers and Variables; cast to the slots' dtypes, written in place."""
    variable = Variable(np.zeros(2, np.float32))
    optimizer = gpu_adam.Adam()
    optimizer.build([variable])
    m = optimizer.get_slot(variable, "m")
    place = device.address(m.value)
    optimizer.set_weights((np.float64(3.0), np.array([1.5, 2], np.float64), Variable(np.array([3, 4], np.int64))))
    assert int(optimizer.iterations) == 3
    assert m.numpy().tolist() == [1.5, 2]
    assert m.dtype == np.float32
    assert device.address(m.value) == place
    optimizer.set_weights([5, [0.0, 0.0], device.array(np.ones(2, np.float32))])
    assert int(optimizer.iterations) == 5
    assert optimizer.get_slot(variable, "v").numpy().tolist() == [1, 1]


def test_weights_that_do_not_fit(device: Device) -> None:
    optimizer, variables = started(device)
    good = [weight + 1 for weight in optimizer.get_weights()]
    others = good[::-1]
    for wrong, message in (
        ([], r"weights must hold 7 arrays for optimizer 'Adam' \(got 0\); call build\(variables\) first"),
        (good[:-1], r"must hold 7 arrays for optimizer 'Adam' \(got 6\)"),
        ([*good, good[-1]], r"must hold 7 arrays"),
        ([*good[:5], good[5][:-1], good[6]], r"weights\[5\] must have shape \(5,\) for 'Adam/b/v' \(got \(4,\)\)"),
        (others, r"weights\[0\] must be a whole number"),
        ([good[0], *others[:-1]], r"weights\[1\] must have shape \(3, 2\) for 'Adam/a/m' \(got \(\)\)"),
        ([*good[:6], np.array("x")], "numbers"),
        ([*good[:5], np.array(["x"] * 5), good[6]], "numbers"),
        ([*good[:5], np.array([None, *"abcd"], object), good[6]], "numbers"),
    ):
        with unchanged(optimizer, *variables), pytest.raises((ArgumentValueError, ArgumentTypeError), match=message):
            optimizer.set_weights(wrong)
    for wrong in (
        [*good[:5], [[1.0], [1.0, 2.0]], good[6]],
        [*good[:6], None],
        [*good[:6], object()],
        [*good[:6], "x"],
    ):
        with unchanged(optimizer, *variables), pytest.raises(ArgumentTypeError, match="must consist of numbers"):
            optimizer.set_weights(wrong)
    fresh = gpu_adam.Adam()
    for wrong in (good, [np.int64(3)]):
        with unchanged(fresh), pytest.raises(ArgumentValueError, match="must hold 0 arrays"):
            fresh.set_weights(wrong)
    fresh.set_weights([])


def test_the_weights_of_amsgrad_fit_without_it(device: Device) -> None:
    """Only where the list has vhat for each of the variables: 3n + 1 arrays."""
    weights = started(device, amsgrad=True, steps=2)[0].get_weights()
    optimizer, variables = started(device, steps=0)
    optimizer.build(variables)
    optimizer.set_weights(weights)
    for weight, expected in zip(optimizer.get_weights(), weights[:7], strict=True):
        assert_same_bits(weight, expected)
    with unchanged(optimizer), pytest.raises(ArgumentValueError, match="must hold 7 arrays"):
        optimizer.set_weights(weights[:8])
    # One variable with two slots of the caller's own: as many weights as of two variables, and still one.
    single, variable = gpu_adam.Adam(), Variable(np.ones(2))
    single.build([variable])
    single.add_slot(variable, "x")
    single.add_slot(variable, "y")
    with unchanged(single), pytest.raises(ArgumentValueError, match="must hold 5 arrays"):
        single.set_weights([np.int64(1), *[np.ones(2)] * 6])
    # With vhat of its own, nothing is cut off.
    both, four = gpu_adam.Adam(amsgrad=True), [Variable(np.ones(2)) for _ in range(4)]
    both.build(four)
    assert len(both.weights) == 13
    with unchanged(both), pytest.raises(ArgumentValueError, match="must hold 13 arrays"):
        both.set_weights([np.int64(1), *[np.ones(2)] * 18])


# Building and adding.


def test_build(device: Device) -> None:
    optimizer, variables = started(device, steps=0)
    optimizer.build(iter(variables))
    assert len(optimizer.weights) == 7
    assert all(not weight.numpy().any() for weight in optimizer.weights)
    before = list(optimizer.weights)
    optimizer.build(variables[0])
    optimizer.build(variables[:2])
    assert all(one is other for one, other in zip(optimizer.weights, before, strict=True))
    optimizer.apply_gradients([(device.array(np.ones(5, np.float32)), variables[1])])
    assert all(one is other for one, other in zip(optimizer.weights, before, strict=True))
    built = gpu_adam.Adam(amsgrad=True)
    built.build(variables)
    assert built.get_slot_names() == ["m", "v", "vhat"]


def test_what_cannot_be_built(device: Device) -> None:
    optimizer, variables = started(device)
    with unchanged(optimizer), pytest.raises(ArgumentTypeError, match=r"var_list\[1\] must be a Variable"):
        optimizer.build([Variable(np.ones(2)), "x"])
    with unchanged(optimizer), pytest.raises(ArgumentValueError, match="variable 'n' must have one of the dtypes"):
        optimizer.build([Variable(np.ones(2)), Variable(np.ones(2, np.int32), name="n")])
    with unchanged(optimizer), pytest.raises(TypeError):
        optimizer.build(3)  # type: ignore[arg-type]
    assert len(variables) == 3


@pytest.mark.parametrize(
    ("initializer", "expected"),
    [
        ("zeros", np.zeros((3, 2))),
        ("ones", np.ones((3, 2))),
        (np.arange(6).reshape(3, 2), np.arange(6).reshape(3, 2)),
        ([[1, 2], [3, 4], [5, 6]], np.arange(1, 7).reshape(3, 2)),
        (lambda shape, dtype: np.full(shape, 7, dtype), np.full((3, 2), 7)),
        (Variable(np.full((3, 2), 3.0), device="host"), np.full((3, 2), 3)),
        (2.5, np.array(2.5)),
        (np.ones(4), np.ones(4)),
    ],
    ids=["zeros", "ones", "array", "list", "callable", "Variable", "number", "other shape"],
)
def test_add_slot(device: Device, initializer: Any, expected: Any) -> None:
    optimizer, variables = started(device)
    slot = optimizer.add_slot(variables[0], "note", initializer)
    assert_same_bits(slot.numpy(), expected.astype(np.float32))
    assert slot.name == "Adam/a/note"
    assert slot.trainable is False
    assert slot.device is device
    assert optimizer.weights[-1] is slot is optimizer.get_slot(variables[0], "note")
    assert optimizer.get_slot_names() == ["m", "v", "note"]
    assert optimizer.add_slot(variables[0], "note", "ones") is slot
    assert_same_bits(slot.numpy(), expected.astype(np.float32))
    assert optimizer.add_slot(variables[1], "note").numpy().tolist() == [0] * 5
    assert optimizer.get_slot_names() == ["m", "v", "note"]


def test_a_slot_made_ahead_is_used(device: Device) -> None:
    variable, start = Variable(np.zeros(3, np.float32)), np.array([1, 2, 3], np.float32)
    optimizer, oracle = gpu_adam.Adam(0.1), reference.Adam([np.zeros(3, np.float32)], 0.1)
    slot = optimizer.add_slot(variable, "m", start)
    oracle.m[0] = start
    optimizer.apply_gradients([(device.array(start), variable)])
    oracle.step([start])
    assert_same_bits(variable.numpy(), oracle.variables[0])
    assert [weight.name for weight in optimizer.weights] == ["Adam/Variable/m", "Adam/iter", "Adam/Variable/v"]
    assert optimizer.weights[0] is slot
    assert int(optimizer.iterations) == 1


def test_slots_of_a_shape_of_their_own(device: Device) -> None:
    optimizer, variable = gpu_adam.Adam(), Variable(np.ones((2, 3), np.float32))
    assert optimizer.add_slot(variable, "rows", shape=2).shape == (2,)
    assert optimizer.add_slot(variable, "one", "ones", shape=()).numpy() == 1
    made = optimizer.add_slot(variable, "made", lambda shape, dtype: np.full(shape, 7, dtype), (4, 1))
    assert_same_bits(made.numpy(), np.full((4, 1), 7, np.float32))
    with pytest.raises(ArgumentValueError, match=r"must give the variable's shape \(2, 3\) \(got \(2,\)\)"):
        optimizer.add_slot(variable, "m", shape=2)
    for shape in (-1, (2, -1), 1.5, "23", (None, 2)):
        with pytest.raises(ArgumentTypeError, match=r"^shape must be a number >= 0, or a tuple of such"):
            optimizer.add_slot(variable, "other", shape=shape)
    assert optimizer.get_slot_names() == ["rows", "one", "made"]


def test_slots_that_cannot_be_added(device: Device) -> None:
    optimizer, variables = started(device)
    other = Variable(np.ones((3, 2), np.float32), name="other")
    cases: list[tuple[Any, str, Any, str]] = [
        (
            variables[0],
            "note",
            "bogus",
            r"initializer must be one of \['zeros', 'ones'\] \(got unknown initializer 'bogus'\)",
        ),
        (variables[0], "note", None, r"initializer must make an array \(got None\)"),
        (variables[0], "note", object(), "initializer must consist of numbers"),
        (variables[0], "note", [[1], [1, 2]], "initializer must consist of numbers"),
        (
            other,
            "m",
            np.ones(3),
            r"slot 'm' for variable 'other' must give the variable's shape \(3, 2\) \(got \(3,\)\)",
        ),
        (other, "vhat", 1.0, r"slot 'vhat' for variable 'other' must give the variable's shape"),
        ("x", "note", "zeros", "var must be a Variable"),
    ]
    for variable, name, initializer, message in cases:
        with unchanged(optimizer, *variables), pytest.raises(GpuAdamError, match=message):
            optimizer.add_slot(variable, name, initializer)


def test_add_weight(device: Device) -> None:
    optimizer = gpu_adam.Adam()
    weight = optimizer.add_weight("note", (2, 3))
    assert (weight.name, weight.shape, weight.dtype.name, weight.trainable) == ("note", (2, 3), "float32", True)
    assert weight.device is device
    assert not weight.numpy().any()
    assert optimizer.add_weight("note", 4, np.float64, "ones").numpy().tolist() == [1] * 4
    assert optimizer.add_weight("n", (), "int64", 3, trainable=False).numpy()[()] == 3
    assert optimizer.add_weight("n", [2], initializer=[1, 2]).numpy().tolist() == [1, 2]
    made = optimizer.add_weight("n", (2,), "float64", lambda shape, dtype: np.full(shape, 5, dtype))
    assert made.numpy().tolist() == [5, 5]
    assert optimizer.add_weight("n", 1, synchronization="on_read").trainable is False
    assert (
        optimizer.add_weight("n", 1, synchronization="VariableSynchronization.ON_READ", trainable=False).trainable
        is False
    )
    assert optimizer.weights == []
    with pytest.raises(
        ArgumentValueError, match="synchronization must be 'auto', 'none' or 'on_write' for a trainable"
    ):
        optimizer.add_weight("n", 1, trainable=True, synchronization="on_read")
    with pytest.raises(ArgumentValueError, match=r"initializer must give shape \(2,\) \(got \(3,\)\)"):
        optimizer.add_weight("n", 2, initializer=np.ones(3))
    with pytest.raises(ArgumentTypeError, match="dtype"):
        optimizer.add_weight("n", 2, dtype="bogus")


def test_waiting_and_checking(device: Device) -> None:
    """Also with nothing to wait for."""
    fresh = gpu_adam.Adam()
    fresh.synchronize()
    fresh.check_errors()
    optimizer, _ = started(device, steps=2)
    optimizer.synchronize()
    optimizer.check_errors()
    assert int(optimizer.iterations) == 2
