"""Copies of an optimizer: deepcopy stays bound to the variables, pickle carries them; both go on to the same bits."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from reference import assert_same_bits
from snapshots import unchanged

import gpu_adam
from gpu_adam import ExponentialDecay, IndexedSlices, Variable
from gpu_adam.devices import Device

ROWS = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
VECTOR = np.linspace(-1, 1, 5)


def step(optimizer: gpu_adam.Adam, device: Device, table: Any, vector: Any) -> None:
    slices = IndexedSlices(device.array(ROWS), device.array(np.array([3, 0, 3])))
    optimizer.apply_gradients([(slices, table), (device.array(VECTOR), vector)])


def started(device: Device) -> tuple[gpu_adam.Adam, Variable, Variable]:
    optimizer = gpu_adam.Adam(0.1, amsgrad=True, clipnorm=3.0)
    table, vector = Variable(np.ones((4, 2), np.float32), name="table"), Variable(np.ones(5), trainable=False)
    step(optimizer, device, table, vector)
    step(optimizer, device, table, vector)
    return optimizer, table, vector


def assert_same_weights(one: gpu_adam.Adam, other: gpu_adam.Adam) -> None:
    assert [weight.name for weight in one.weights] == [weight.name for weight in other.weights]
    for weight, expected in zip(one.weights, other.weights, strict=True):
        assert_same_bits(weight.numpy(), expected.numpy(), weight.name)


def test_a_deepcopy_has_its_own_state(device: Device) -> None:
    optimizer, table, vector = started(device)
    copied = copy.deepcopy(optimizer)
    assert copied.get_config() == optimizer.get_config()
    assert_same_weights(copied, optimizer)
    assert not set(map(id, copied.weights)) & set(map(id, optimizer.weights))
    assert copied.weights[0] is copied.iterations
    assert copied.get_slot(table, "m") is copied.weights[1]
    values = [table.numpy(), vector.numpy()]
    with unchanged(optimizer):
        step(copied, device, table, vector)
        copied.learning_rate = 0.5
        copied.clipnorm = None
        copied.add_slot(table, "note")
    assert optimizer.learning_rate == 0.1
    assert optimizer.clipnorm == 3.0
    moved = [table.numpy(), vector.numpy()]
    table.assign(values[0])
    vector.assign(values[1])
    step(optimizer, device, table, vector)
    assert_same_bits(table.numpy(), moved[0])
    assert_same_bits(vector.numpy(), moved[1])


def test_a_fresh_optimizer_is_copied_too(device: Device) -> None:
    for copied in (copy.deepcopy(gpu_adam.Adam(0.1)), pickle.loads(pickle.dumps(gpu_adam.Adam(0.1)))):
        assert copied.weights == []
        assert copied.get_config() == gpu_adam.Adam(0.1).get_config()
        step(copied, device, Variable(np.ones((4, 2), np.float32)), Variable(np.ones(5)))
        assert int(copied.iterations) == 1


def test_hyperparameters_of_copies(device: Device) -> None:
    """A schedule is a value; a variable or 0-d array given as hyperparameter stays shared in a deepcopy."""
    rate, beta = Variable(np.float64(0.5)), np.array(0.25)
    optimizer = gpu_adam.Adam(rate, beta)
    copied = copy.deepcopy(optimizer)
    assert copied.learning_rate is rate
    assert copied.beta_1 is beta
    read = pickle.loads(pickle.dumps(optimizer))
    assert float(read.learning_rate) == 0.5
    assert read.beta_1 == 0.25
    rate.assign(0.125)
    assert float(copied.learning_rate) == 0.125
    assert float(read.learning_rate) == 0.5
    assert copy.deepcopy(gpu_adam.Adam(ExponentialDecay(0.1, 7, 0.9))).learning_rate == ExponentialDecay(0.1, 7, 0.9)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_copies_of_an_optimizer_of_raw_arrays_at_any_address(device: Device, offset: int) -> None:
    """The slots' places must go with their variable's, also in a copy."""
    memory = device.array(np.ones(offset + 40, np.float32))
    raw, g = memory[offset:], device.array(np.linspace(-1, 1, 40, dtype=np.float32))
    optimizer = gpu_adam.Adam(0.1)
    optimizer.apply_gradients([(g, raw)])
    copied = copy.deepcopy(optimizer)
    values = device.numpy(raw)
    optimizer.apply_gradients([(g, raw)])
    expected = device.numpy(raw)
    raw[...] = device.array(values)
    copied.apply_gradients([(g, raw)])
    assert_same_bits(device.numpy(raw), expected)
    copied, again = pickle.loads(pickle.dumps((optimizer, raw)))
    copied.apply_gradients([(g, again)])
    optimizer.apply_gradients([(g, raw)])
    assert_same_bits(device.numpy(again), device.numpy(raw))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_carries_the_variables(device: Device, protocol: int) -> None:
    optimizer, table, vector = started(device)
    model = {"optimizer": optimizer, "table": table, "vector": vector}
    read = pickle.loads(pickle.dumps(model, protocol))
    again, other_table, other_vector = read.values()
    assert again.get_config() == optimizer.get_config()
    assert_same_weights(again, optimizer)
    assert (other_table.name, other_table.trainable, other_vector.trainable) == ("table", True, False)
    assert other_table.device.name == device.name
    with unchanged(optimizer, table, vector):
        step(again, device, other_table, other_vector)
    step(optimizer, device, table, vector)
    assert_same_weights(again, optimizer)
    assert_same_bits(other_table.numpy(), table.numpy())
    assert_same_bits(other_vector.numpy(), vector.numpy())
    assert again.get_slot(other_table, "m") is again.weights[1]


def test_a_pickle_of_raw_arrays(device: Device) -> None:
    """In one pickle with its optimizer an array is the variable still: it moves, and has its slots."""
    table, vector = device.array(np.ones((4, 2), np.float32)), device.array(np.ones(5))
    optimizer = gpu_adam.Adam(0.1)
    step(optimizer, device, table, vector)
    again, other_table, other_vector = pickle.loads(pickle.dumps((optimizer, table, vector)))
    step(again, device, other_table, other_vector)
    step(optimizer, device, table, vector)
    assert_same_weights(again, optimizer)
    assert_same_bits(device.numpy(other_table), device.numpy(table))
    assert_same_bits(device.numpy(other_vector), device.numpy(vector))


def test_raw_arrays_are_recognised_by_memory_after_unpickling(device: Device) -> None:
    table, vector = device.array(np.ones((4, 2), np.float32)), device.array(np.ones(5))
    optimizer = gpu_adam.Adam(0.1)
    step(optimizer, device, table, vector)
    again, other_table, other_vector = pickle.loads(pickle.dumps((optimizer, table, vector)))
    step(again, device, other_table[:], other_vector[:])
    step(optimizer, device, table, vector)
    assert_same_weights(again, optimizer)


class Holder:
    """An object that is no array, but has one's interface."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self.values = values

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return dict(self.values.__array_interface__)


def test_a_pickle_of_objects_with_an_array_interface() -> None:
    holder, g = Holder(np.ones(3)), np.array([1.0, 2, 3])
    optimizer = gpu_adam.Adam(0.1)
    optimizer.apply_gradients([(g, holder)])
    again, other = pickle.loads(pickle.dumps((optimizer, holder)))
    again.apply_gradients([(g, other)])
    optimizer.apply_gradients([(g, holder)])
    assert_same_weights(again, optimizer)
    assert_same_bits(other.values, holder.values)


def test_unpickled_and_new_variables_in_one_step(device: Device) -> None:
    """They are on one device still, which finds overlaps among all of them."""
    memory = device.array(np.arange(6, dtype=np.float32))
    optimizer, old, read_memory = pickle.loads(
        pickle.dumps((gpu_adam.Adam(), Variable(np.ones(6, np.float32)), memory))
    )
    new = Variable(np.ones(6, np.float32))
    assert old.device.name == new.device.name
    before = [old.numpy(), new.numpy()]
    assert optimizer.apply_gradients([(new.value, old), (old.value, new)]) == 1
    one, other = gpu_adam.Adam(), [Variable(x) for x in before]
    one.apply_gradients([(device.array(before[1]), other[0]), (device.array(before[0]), other[1])])
    assert_same_bits(old.numpy(), other[0].numpy())
    assert_same_bits(new.numpy(), other[1].numpy())
    view = read_memory[2:]
    with pytest.raises(ValueError, match="must not overlap"):
        optimizer.apply_gradients([(old.value, read_memory), (new.value[:4], view)])


def test_an_unpickled_variable_takes_part_in_overlap_checks(device: Device) -> None:
    """Its memory, given again as a raw array, is the same variable's."""
    variable = pickle.loads(pickle.dumps(Variable(np.ones(4, np.float32))))
    g = device.array(np.ones(4, np.float32))
    optimizer = gpu_adam.Adam()
    optimizer.apply_gradients([(g, variable)])
    optimizer.apply_gradients([(g, variable.value)])
    assert len(optimizer.weights) == 3
    with pytest.raises(ValueError, match="must not overlap"):
        gpu_adam.Adam().apply_gradients([(g, variable), (g[:3], variable.value[1:])])
