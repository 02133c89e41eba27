"""Copies of an optimizer: deepcopy and pickle carry everything along, variables too, and go on to the same bits."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reference import assert_same_bits
from snapshots import contents, unchanged

import gpu_adam
from gpu_adam import ExponentialDecay, IndexedSlices, SlotNotFoundError, Variable
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


def raw_started(device: Device) -> tuple[gpu_adam.Adam, Any, Any]:
    optimizer = gpu_adam.Adam(0.1, amsgrad=True)
    table, vector = device.array(np.ones((4, 2), np.float32)), device.array(np.ones(5))
    step(optimizer, device, table, vector)
    step(optimizer, device, table, vector)
    return optimizer, table, vector


class Model:
    """What a user's class looks like."""

    def __init__(self, optimizer: gpu_adam.Adam, table: Any, vector: Any) -> None:
        self.vector, self.optimizer, self.table = vector, optimizer, table


CONTAINERS: dict[str, tuple[Callable[..., Any], Callable[[Any], tuple[Any, ...]]]] = {
    "variables first": (lambda o, t, v: [t, v, o], lambda copied: (copied[2], copied[0], copied[1])),
    "optimizer first": (lambda o, t, v: [o, t, v], tuple),
    "between": (lambda o, t, v: (t, o, v), lambda copied: (copied[1], copied[0], copied[2])),
    "dict": (lambda o, t, v: {"o": o, "v": v, "t": t}, lambda copied: (copied["o"], copied["t"], copied["v"])),
    "nested": (lambda o, t, v: [{"model": [t, [v]]}, {"o": (o,)}], lambda c: (c[1]["o"][0], *_nested(c[0]["model"]))),
    "object": (Model, lambda copied: (copied.optimizer, copied.table, copied.vector)),
}


def _nested(model: Any) -> tuple[Any, Any]:
    return model[0], model[1][0]


COPIES = pytest.mark.parametrize(
    "copied_by", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
KINDS = pytest.mark.parametrize("start", [started, raw_started], ids=["Variable", "raw"])


@COPIES
@KINDS
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_copy_steps_its_own_variables(
    device: Device, container: str, start: Callable[[Device], Any], copied_by: Callable[[Any], Any]
) -> None:
    """With its own slots; in whatever order the container holds the optimizer and its variables."""
    pack, unpack = CONTAINERS[container]
    optimizer, table, vector = start(device)
    again, other_table, other_vector = unpack(copied_by(pack(optimizer, table, vector)))
    assert again is not optimizer
    assert type(other_table) is type(table)
    assert again.get_config() == optimizer.get_config()
    assert_same_weights(again, optimizer)
    assert not set(map(id, again.weights)) & set(map(id, optimizer.weights))
    assert again.weights[0] is again.iterations
    assert again.get_slot(other_table, "m") is again.weights[1]
    assert again.get_slot(other_table, "m").numpy().any()
    assert contents(other_table) == contents(table)
    with unchanged(optimizer, table, vector):
        step(again, device, other_table, other_vector)
        step(again, device, other_table, other_vector)
    assert len(again.weights) == len(optimizer.weights)
    with unchanged(again, other_table, other_vector):
        step(optimizer, device, table, vector)
        step(optimizer, device, table, vector)
    assert_same_weights(again, optimizer)
    assert contents(other_table) == contents(table)
    assert contents(other_vector) == contents(vector)


@KINDS
def test_a_copy_of_the_optimizer_alone(device: Device, start: Callable[[Device], Any]) -> None:
    """Has variables that nobody else sees: those of the original are strangers to it."""
    optimizer, table, vector = start(device)
    with unchanged(optimizer, table, vector):
        copied = copy.deepcopy(optimizer)
        assert_same_weights(copied, optimizer)
        for stranger in (table, vector):
            with pytest.raises(SlotNotFoundError):
                copied.get_slot(stranger, "m")
        copied.learning_rate = 0.5
        copied.set_weights([weight * 2 for weight in copied.get_weights()])
    assert optimizer.learning_rate == 0.1


@KINDS
def test_settings_and_slots_of_a_copy_are_its_own(device: Device, start: Callable[[Device], Any]) -> None:
    optimizer, table, vector = start(device)
    optimizer.add_slot(table, "note", "ones")
    copied, other = copy.deepcopy([optimizer, table])
    assert copied.get_slot(other, "note").numpy().all()
    assert copied.get_slot_names() == [*optimizer.get_slot_names()]
    with unchanged(optimizer, table, vector):
        copied.learning_rate, copied.clipnorm = 0.5, 7.0
        copied.iterations = 40
        copied.add_slot(other, "another")
        copied.get_slot(other, "note").assign(np.zeros((4, 2)))
    assert optimizer.learning_rate == 0.1
    assert optimizer.get_slot(table, "note").numpy().all()


def test_two_optimizers_of_one_variable(device: Device) -> None:
    """One variable in the original is one variable in the copy."""
    variable, g = Variable(np.ones(5)), device.array(VECTOR)
    one, other = gpu_adam.Adam(0.1), gpu_adam.Adam(0.2)
    for _ in range(2):
        one.apply_gradients([(g, variable)])
        other.apply_gradients([(g, variable)])
    first, second, copied = copy.deepcopy((one, other, variable))
    for optimizer in (first, second):
        optimizer.apply_gradients([(g, copied)])
        assert len(optimizer.weights) == 3
    for optimizer in (one, other):
        optimizer.apply_gradients([(g, variable)])
    assert_same_bits(copied.numpy(), variable.numpy())


def test_a_copy_of_a_copy(device: Device) -> None:
    optimizer, table, vector = started(device)
    again, other_table, other_vector = copy.deepcopy(copy.deepcopy((optimizer, table, vector)))
    step(again, device, other_table, other_vector)
    step(optimizer, device, table, vector)
    assert_same_weights(again, optimizer)
    assert_same_bits(other_table.numpy(), table.numpy())


def test_a_copy_after_many_steps_with_the_same_pairs(device: Device) -> None:
    """What the optimizer remembers of its last step is of the old variables, and must not be the copy's."""
    variable, g = Variable(np.ones(5)), device.array(VECTOR)
    optimizer, pairs = gpu_adam.Adam(0.1), [(g, variable)]
    for _ in range(4):
        optimizer.apply_gradients(pairs)
    again, other_pairs = copy.deepcopy((optimizer, pairs))
    ((_, other),) = other_pairs
    with unchanged(optimizer, variable):
        for _ in range(3):
            again.apply_gradients(other_pairs)
    for _ in range(3):
        optimizer.apply_gradients(pairs)
    assert_same_bits(other.numpy(), variable.numpy())


def test_a_twin_over_the_same_variables(device: Device) -> None:
    """Is made of the configuration and the weights."""
    optimizer, table, vector = started(device)
    twin = gpu_adam.Adam.from_config(optimizer.get_config())
    twin.build([table, vector])
    twin.set_weights(optimizer.get_weights())
    values = [table.numpy(), vector.numpy()]
    step(twin, device, table, vector)
    moved = [table.numpy(), vector.numpy()]
    table.assign(values[0])
    vector.assign(values[1])
    step(optimizer, device, table, vector)
    assert_same_bits(table.numpy(), moved[0])
    assert_same_bits(vector.numpy(), moved[1])


def test_attributes_of_a_subclass(device: Device) -> None:
    """Everything reachable is copied, what a subclass adds included."""
    table = Variable(np.ones((4, 2), np.float32))
    optimizer = Noted(0.1)
    optimizer.notes.append(table)
    copied = copy.deepcopy(optimizer)
    assert type(copied) is Noted
    assert copied.notes is not optimizer.notes
    assert copied.notes[0] is not table
    assert copy.deepcopy((table, optimizer))[1].notes[0].shape == (4, 2)
    both = copy.deepcopy((optimizer, table))
    assert both[0].notes[0] is both[1]


class Noted(gpu_adam.Adam):
    """An optimizer with an attribute of its own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.notes: list[Any] = []


def test_a_fresh_optimizer_is_copied_too(device: Device) -> None:
    for copied in (copy.deepcopy(gpu_adam.Adam(0.1)), pickle.loads(pickle.dumps(gpu_adam.Adam(0.1)))):
        assert copied.weights == []
        assert copied.get_config() == gpu_adam.Adam(0.1).get_config()
        step(copied, device, Variable(np.ones((4, 2), np.float32)), Variable(np.ones(5)))
        assert int(copied.iterations) == 1


@COPIES
def test_hyperparameters_of_copies(device: Device, copied_by: Callable[[Any], Any]) -> None:
    """A variable or 0-d array given as hyperparameter is copied too; one copy where it is met several times."""
    rate, beta = Variable(np.float64(0.5)), np.array(0.25)
    optimizer = gpu_adam.Adam(rate, beta)
    alone = copied_by(optimizer)
    assert alone.learning_rate is not rate
    assert alone.beta_1 is not beta
    for order in (1, -1):
        other_rate, copied, other_beta = copied_by([rate, optimizer, beta][::order])[::order]
        assert copied.learning_rate is other_rate
        assert copied.beta_1 is other_beta
        other_rate.assign(2.0)
        other_beta[...] = 0.75
        assert float(copied.learning_rate) == 2.0
        assert float(copied.beta_1) == 0.75
        assert float(rate) == 0.5
        assert beta == 0.25
    rate.assign(0.125)
    assert float(alone.learning_rate) == 0.5
    schedule = ExponentialDecay(0.1, 7, 0.9)
    assert copied_by(gpu_adam.Adam(schedule)).learning_rate == schedule


@COPIES
def test_a_counter_of_the_callers_own(device: Device, copied_by: Callable[[Any], Any]) -> None:
    counter, optimizer = Variable(np.int64(7), device="host"), gpu_adam.Adam()
    optimizer.iterations = counter
    for copied, other in (copied_by((optimizer, counter)), copied_by((counter, optimizer))[::-1]):
        assert copied.iterations is other
        assert other is not counter
        copied.apply_gradients([(device.array(VECTOR), Variable(np.ones(5)))])
        assert int(other) == 8
    assert int(counter) == 7


@pytest.mark.parametrize("offset", [1, 2, 3])
@COPIES
def test_copies_of_an_optimizer_of_raw_arrays_at_any_address(
    device: Device, offset: int, copied_by: Callable[[Any], Any]
) -> None:
    """The slots' places must go with their variable's, also in a copy."""
    memory = device.array(np.ones(offset + 40, np.float32))
    raw, g = memory[offset:], device.array(np.linspace(-1, 1, 40, dtype=np.float32))
    optimizer = gpu_adam.Adam(0.1)
    optimizer.apply_gradients([(g, raw)])
    for order in (1, -1):
        again, copied = copied_by([raw, optimizer][::order])[::order]
        with unchanged(optimizer, memory):
            copied.apply_gradients([(g, again)])
        twin = gpu_adam.Adam(0.1)
        expected = device.array(np.ones(40, np.float32))
        for _ in range(2):
            twin.apply_gradients([(g, expected)])
        assert_same_bits(device.numpy(again), device.numpy(expected))


@COPIES
@pytest.mark.parametrize("first", ["tensor", "optimizer"])
def test_tensors_of_torch(copied_by: Callable[[Any], Any], first: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    tensor, g = torch.ones(5), torch.linspace(-1, 1, 5)
    optimizer = gpu_adam.Adam(0.1)
    for _ in range(2):
        optimizer.apply_gradients([(g, tensor)])
    packed: list[Any] = [tensor, optimizer] if first == "tensor" else [optimizer, tensor]
    copied, other = sorted(copied_by(packed), key=lambda obj: isinstance(obj, torch.Tensor))
    assert type(other) is torch.Tensor
    with unchanged(optimizer, tensor.numpy()):
        for _ in range(2):
            copied.apply_gradients([(g, other)])
    assert len(copied.weights) == 3
    for _ in range(2):
        optimizer.apply_gradients([(g, tensor)])
    assert_same_weights(copied, optimizer)
    assert torch.equal(other, tensor)


@COPIES
def test_objects_with_an_array_interface(copied_by: Callable[[Any], Any]) -> None:
    holder, g = Holder(np.ones(3)), np.array([1.0, 2, 3])
    optimizer = gpu_adam.Adam(0.1)
    optimizer.apply_gradients([(g, holder)])
    for copied, other in (copied_by((optimizer, holder)), copied_by((holder, optimizer))[::-1]):
        with unchanged(optimizer, holder.values):
            copied.apply_gradients([(g, other)])
        assert len(copied.weights) == 3
        twin, expected = gpu_adam.Adam(0.1), np.ones(3)
        for _ in range(2):
            twin.apply_gradients([(g, expected)])
        assert_same_bits(other.values, expected)


def test_views_of_a_copied_array(device: Device) -> None:
    """A copied raw array is recognised by its memory, as any other."""
    optimizer, table, vector = raw_started(device)
    again, other_table, other_vector = copy.deepcopy((optimizer, table, vector))
    step(again, device, other_table[:], other_vector[:])
    step(optimizer, device, table, vector)
    assert_same_weights(again, optimizer)
    with pytest.raises(SlotNotFoundError):
        again.get_slot(table, "m")


def test_a_copy_keeps_no_original_alive(device: Device) -> None:
    optimizer, table, vector = raw_started(device)
    copied = copy.deepcopy((optimizer, table, vector))
    watched = [weakref.ref(x) for x in (optimizer, table, vector)]
    del optimizer, table, vector
    gc.collect()
    assert [ref() for ref in watched] == [None, None, None]
    step(copied[0], device, copied[1], copied[2])


def test_lost_slots_of_an_array_at_a_used_address(device: Device) -> None:
    """Memory that was an original's and is used again is no variable of the copy."""
    optimizer, table, vector = raw_started(device)
    copied = copy.deepcopy(optimizer)
    count = len(copied.weights)
    step(copied, device, table, vector)
    assert len(copied.weights) == count + 6


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
