"""Variables with a constraint: projected after each update, on their device."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import reference
from reference import assert_same_bits
from snapshots import unchanged

import gpu_adam
from gpu_adam import IndexedSlices, Variable
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError

START = np.array([0.3, -0.2, 0.1], np.float32)
G = np.array([5, -5, 1], np.float32)


def not_negative(variable: Any) -> Any:
    return np.maximum(variable, 0)


def unit_modulus(variable: Any) -> Any:
    return variable / np.abs(variable)


def test_the_update_is_projected_each_time(device: Device) -> None:
    """The next step begins at the projected value; slots know nothing of it."""
    x, free = Variable(START, name="x", constraint=not_negative), Variable(START, name="free")
    optimizer, oracle = gpu_adam.Adam(0.25), reference.Adam([START, START], 0.25)
    for number in range(5):
        g = G * np.float32(np.cos(number))
        optimizer.apply_gradients([(device.array(g), x), (device.array(g), free)])
        oracle.step([g, g])
        np.maximum(oracle.variables[0], 0, out=oracle.variables[0])
        assert_same_bits(x.numpy(), oracle.variables[0], f"step {number}")
        assert_same_bits(free.numpy(), oracle.variables[1], f"step {number}")
    assert_same_bits(optimizer.get_slot(x, "m").numpy(), oracle.m[0])


def test_a_complex_variable_that_is_all_phase(device: Device) -> None:
    x = Variable(np.exp(1j * START.astype(np.float64)), constraint=unit_modulus)
    optimizer = gpu_adam.Adam(0.1)
    for _ in range(3):
        optimizer.minimize(lambda: np.sum(np.abs(x - 2j) ** 2), x)
    np.testing.assert_allclose(np.abs(x.numpy()), 1, rtol=1e-15)
    assert np.all(np.angle(x.numpy()) > START)


def test_the_function_sees_the_variable_on_its_device(device: Device) -> None:
    seen: list[Any] = []

    def constraint(variable: Variable) -> Any:
        seen.append(variable)
        return variable.value * 0

    x = Variable(START, constraint=constraint)
    assert x.constraint is constraint
    gpu_adam.Adam().apply_gradients([(device.array(G), x)])
    assert seen == [x]
    assert not x.numpy().any()
    with pytest.raises(AttributeError):
        x.constraint = None  # type: ignore[misc]


@pytest.mark.parametrize("bad", ["shape", "text", "complex", "raises"])
def test_a_constraint_that_fails(device: Device, bad: str) -> None:
    """The step is done and counted; the variable has been updated and not constrained."""
    x = Variable(START, name="x", constraint=lambda v: values[bad]())
    values: dict[str, Any] = {
        "shape": lambda: START[:2],
        "text": lambda: "x",
        "complex": lambda: START * 1j,
        "raises": lambda: 1 / 0,
    }
    optimizer, oracle = gpu_adam.Adam(), reference.Adam([START])
    oracle.step([G])
    error = ZeroDivisionError if bad == "raises" else (ArgumentTypeError, ArgumentValueError)
    with pytest.raises(error, match="zero" if bad == "raises" else "^the constraint's value for variable 'x' must"):
        optimizer.apply_gradients([(device.array(G), x)])
    assert_same_bits(x.numpy(), oracle.variables[0])
    assert int(optimizer.iterations) == 1


def test_what_a_constrained_variable_does_not_take(device: Device) -> None:
    x = Variable(np.ones((4, 2), np.float32), name="x", constraint=not_negative)
    optimizer, g = gpu_adam.Adam(), device.array(np.ones((4, 2), np.float32))
    optimizer.build([x])
    slices = IndexedSlices(g[:1], device.array(np.array([2])))
    rule = r"^gradient of variable 'x' must be a single dense one, for the variable has a constraint \(got "
    with unchanged(optimizer, x):
        with pytest.raises(ArgumentValueError, match=rule + "IndexedSlices"):
            optimizer.apply_gradients([(slices, x)])
        with pytest.raises(ArgumentValueError, match=rule + "2 gradients"):
            optimizer.apply_gradients([(g, x), (g, x)])
    with pytest.raises(ArgumentTypeError, match=r"^constraint must be a callable of the variable \(got str\)"):
        Variable(1.0, constraint="nonneg")


def test_copies_are_constrained_too(device: Device) -> None:
    x = Variable(START, constraint=not_negative)
    for twin in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert twin.constraint is not_negative
        gpu_adam.Adam().apply_gradients([(device.array(G), twin)])
        assert twin.numpy().min() == 0
    assert x.numpy().min() < 0


def test_those_after_one_that_fails_are_not_constrained(device: Device) -> None:
    first, failing, last = (
        Variable(START, constraint=constraint) for constraint in (not_negative, lambda v: 1 / 0, not_negative)
    )
    optimizer, oracle = gpu_adam.Adam(), reference.Adam([START])
    oracle.step([G])
    with pytest.raises(ZeroDivisionError):
        optimizer.apply_gradients([(device.array(G), variable) for variable in (first, failing, last)])
    assert_same_bits(first.numpy(), np.maximum(oracle.variables[0], 0))
    for variable in (failing, last):
        assert_same_bits(variable.numpy(), oracle.variables[0])


class Projection:
    """A constraint that knows its variable."""

    def __init__(self) -> None:
        self.variable = Variable(START, constraint=self)

    def __call__(self, variable: Variable) -> Any:
        """The variable without negative elements, if it is the one that was made here."""
        assert variable is self.variable
        return np.maximum(variable, 0)


def test_a_copy_is_known_to_its_constraint(device: Device) -> None:
    x = Projection().variable
    for twin in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        twin.constrain()
        assert twin.numpy().min() == 0
