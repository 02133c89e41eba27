"""forget and replace: variables that go, and variables that take over the slots of others, row by row."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from reference import Array, assert_same_bits
from snapshots import contents, unchanged

import gpu_adam
from gpu_adam import GpuAdamError, IndexedSlices, SlotNotFoundError, Variable
from gpu_adam.devices import Device

RNG = np.random.default_rng(3)
X, Y = RNG.standard_normal((5, 3)).astype(np.float32), RNG.standard_normal(4)
KINDS = pytest.mark.parametrize("raw", [False, True], ids=["Variable", "raw"])


def made(device: Device, values: Any, raw: bool, name: str = "x") -> Any:
    return device.array(values) if raw else Variable(values, name=name, device=device)


def values_of(device: Device, variable: Any) -> Array:
    return device.numpy(variable.value if isinstance(variable, Variable) else variable)


def gradient(variable: Any, number: int) -> Array:
    """Of step `number`; as large as the variable is now."""
    return np.asarray(np.cos(np.arange(variable.size) * 1.3 + number), variable.dtype).reshape(variable.shape)


def step(optimizer: gpu_adam.Adam, device: Device, variables: list[Any], number: int) -> None:
    optimizer.apply_gradients([(device.array(gradient(variable, number)), variable) for variable in variables])


def started(device: Device, raw: bool, **config: Any) -> tuple[gpu_adam.Adam, Any, Any]:
    """An optimizer of two variables after two steps."""
    optimizer = gpu_adam.Adam(0.1, **config)
    x, y = made(device, X, raw), made(device, Y, raw, "y")
    for number in range(2):
        step(optimizer, device, [x, y], number)
    return optimizer, x, y


# forget


@KINDS
def test_a_forgotten_variable_has_no_slots(device: Device, raw: bool) -> None:
    optimizer, x, y = started(device, raw, amsgrad=True)
    weights = optimizer.weights
    kept = [weights[0], *(optimizer.get_slot(y, name) for name in ("m", "v", "vhat"))]
    before = [contents(array) for array in (x, y, *kept)]
    optimizer.forget(x)
    assert optimizer.weights is weights
    assert list(map(id, weights)) == list(map(id, kept))
    assert [contents(array) for array in (x, y, *kept)] == before
    with pytest.raises(SlotNotFoundError):
        optimizer.get_slot(x, "m")
    optimizer.set_weights(optimizer.get_weights())
    assert [contents(array) for array in (x, y, *kept)] == before


@KINDS
def test_a_forgotten_variable_starts_anew(device: Device, raw: bool) -> None:
    """From slots of zeros, with the optimizer's count; other variables go on."""
    optimizer, x, y = started(device, raw)
    forgotten, kept = reference.Adam([values_of(device, x)], 0.1, iterations=2), reference.Adam([Y], 0.1)
    for number in range(2):
        kept.step([gradient(y, number)])
    optimizer.forget(x)
    for number in (2, 3):
        step(optimizer, device, [x, y], number)
        forgotten.step([gradient(x, number)])
        kept.step([gradient(y, number)])
        assert_same_bits(values_of(device, x), forgotten.variables[0])
        assert_same_bits(values_of(device, y), kept.variables[0])
    assert len(optimizer.weights) == 5
    assert optimizer.weights[3] is optimizer.get_slot(x, "m")


def test_a_forgotten_variable_in_a_repeated_list_of_pairs(device: Device) -> None:
    """The memory of the last step must not be asked for a variable that is gone."""
    x = Variable(X)
    optimizer, oracle = gpu_adam.Adam(0.1), reference.Adam([X], 0.1)
    pairs = [(device.array(gradient(x, 0)), x)]
    for _ in range(3):
        optimizer.apply_gradients(pairs)
        oracle.step([gradient(x, 0)])
    optimizer.forget(x)
    assert len(optimizer.weights) == 1
    anew = reference.Adam(oracle.variables, 0.1, iterations=3)
    for _ in range(3):
        optimizer.apply_gradients(pairs)
        anew.step([gradient(x, 0)])
        assert_same_bits(x.numpy(), anew.variables[0])
        assert_same_bits(optimizer.get_slot(x, "m").numpy(), anew.m[0])


def test_slots_of_the_callers_own_are_forgotten(device: Device) -> None:
    optimizer, x, y = started(device, raw=False)
    optimizer.add_slot(x, "note")
    optimizer.add_slot(y, "note")
    optimizer.forget(x)
    assert [weight.name for weight in optimizer.weights] == ["Adam/iter", "Adam/y/m", "Adam/y/v", "Adam/y/note"]


@KINDS
@pytest.mark.parametrize("after", ["build", "steps", "sparse", "clipnorm"])
def test_what_is_forgotten_is_not_kept_alive(device: Device, raw: bool, after: str) -> None:
    x, y = made(device, X, raw), made(device, Y, raw)
    optimizer = gpu_adam.Adam(clipnorm=1.0 if after == "clipnorm" else None)
    optimizer.build([x, y])
    pairs = [(device.array(gradient(x, 0)), x)]
    if after == "sparse":
        pairs = [(IndexedSlices(device.array(X[:1]), device.array(np.array([2]))), x)]
    if after != "build":
        for _ in range(3):
            optimizer.apply_gradients(pairs)
    watched = [weakref.ref(x), weakref.ref(optimizer.get_slot(x, "m"))]
    del pairs
    optimizer.forget(x)
    del x
    gc.collect()
    assert [ref() is None for ref in watched] == [True, True]


@KINDS
def test_strangers_cannot_be_forgotten(device: Device, raw: bool) -> None:
    optimizer, x, y = started(device, raw)
    stranger = made(device, X, raw)
    watched = weakref.ref(stranger)
    with unchanged(optimizer, x, y), pytest.raises(GpuAdamError):
        optimizer.forget(stranger)
    del stranger
    gc.collect()
    assert watched() is None
    for wrong in (None, 3, "x"):
        with unchanged(optimizer, x, y), pytest.raises(GpuAdamError):
            optimizer.forget(wrong)
    optimizer.forget(x)
    with unchanged(optimizer, x, y), pytest.raises(GpuAdamError):
        optimizer.forget(x)


def test_another_object_over_the_same_memory_is_forgotten(device: Device) -> None:
    optimizer, x, _ = started(device, raw=True)
    optimizer.forget(x[:])
    assert len(optimizer.weights) == 3
    with pytest.raises(SlotNotFoundError):
        optimizer.get_slot(x, "m")


# replace


@KINDS
@pytest.mark.parametrize("index", [[4, 0], [0, 1, 2, 3, 4, 4, 0], [2], [3, 3, 3], []], ids=str)
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_rows_move_to_another_variable(device: Device, raw: bool, index: list[int], dtype: str) -> None:
    optimizer, x, _ = started(device, raw, amsgrad=True)
    weights = optimizer.weights
    names = [weight.name for weight in weights]
    old = {name: optimizer.get_slot(x, name).numpy() for name in ("m", "v", "vhat")}
    places = {name: list(map(id, weights)).index(id(optimizer.get_slot(x, name))) for name in old}
    others = [(id(weight), contents(weight)) for k, weight in enumerate(weights) if k not in places.values()]
    rows = np.array(index, dtype)
    new_values = np.arange(len(index) * 3, dtype=np.float32).reshape(-1, 3)
    new = made(device, new_values, raw)
    optimizer.replace(x, new, device.array(rows))
    assert optimizer.weights is weights
    assert len(weights) == len(names)
    for name, place in places.items():
        assert optimizer.get_slot(new, name) is weights[place]
        assert_same_bits(weights[place].numpy(), old[name][rows], name)
    assert [(id(w), contents(w)) for k, w in enumerate(weights) if k not in places.values()] == others
    assert_same_bits(values_of(device, new), new_values)
    with pytest.raises(SlotNotFoundError):
        optimizer.get_slot(x, "m")


@KINDS
def test_a_whole_variable_moves(device: Device, raw: bool) -> None:
    """Without an index: as merging a LoRA into a new array does."""
    optimizer, x, y = started(device, raw)
    oracle = reference.Adam([X, Y], 0.1)
    for number in range(2):
        oracle.step([gradient(x, number), gradient(y, number)])
    new = made(device, values_of(device, x) + 1, raw)
    optimizer.replace(x, new)
    oracle.variables[0] = oracle.variables[0] + np.float32(1)
    before = values_of(device, x)
    for number in (2, 3, 4):
        step(optimizer, device, [new, y], number)
        oracle.step([gradient(new, number), gradient(y, number)])
        assert_same_bits(values_of(device, new), oracle.variables[0])
        assert_same_bits(values_of(device, y), oracle.variables[1])
    assert_same_bits(values_of(device, x), before)
    assert len(optimizer.weights) == 5


@KINDS
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_gaussians_that_are_cloned_and_pruned(device: Device, raw: bool, sparse: bool) -> None:
    """Densify, go on, prune, go on: as NumPy with rows selected, positions and opacities alike."""
    positions, opacities = RNG.standard_normal((6, 3)).astype(np.float32), RNG.standard_normal(6).astype(np.float32)
    model: list[Any] = [made(device, positions, raw, "xyz"), made(device, opacities, raw, "opacity")]
    optimizer, oracle = gpu_adam.Adam(0.01, epsilon=1e-15), reference.Adam([positions, opacities], 0.01, epsilon=1e-15)
    clone, prune = np.array([0, 1, 2, 3, 4, 5, 1, 1, 4]), np.array([0, 2, 3, 6, 8])
    count = 0

    def steps(number: int) -> None:
        nonlocal count
        for _ in range(number):
            gradients = [gradient(variable, count) for variable in model]
            pairs: list[Any] = [(device.array(g), v) for g, v in zip(gradients, model, strict=True)]
            if sparse:
                rows = np.arange(model[0].shape[0])[::-1].copy()
                pairs[0] = (IndexedSlices(device.array(gradients[0][rows]), device.array(rows)), model[0])
            optimizer.apply_gradients(pairs)
            oracle.step(gradients)
            count += 1
            for variable, expected in zip(model, oracle.variables, strict=True):
                assert_same_bits(values_of(device, variable), expected, f"after {count} steps")

    steps(3)
    for rows in (clone, prune):
        for k, old in enumerate(model):
            model[k] = made(device, values_of(device, old)[rows], raw, ("xyz", "opacity")[k])
            optimizer.replace(old, model[k], device.array(rows))
            for arrays in (oracle.variables, oracle.m, oracle.v):
                arrays[k] = arrays[k][rows]
        steps(3)
    assert optimizer.iterations == 9
    assert len(optimizer.weights) == 5


@pytest.mark.parametrize("complex_mode", ["abs2", "real_imag"])
def test_complex_variables(device: Device, complex_mode: str) -> None:
    """The real v of a complex variable moves as it is."""
    x, new = Variable(np.ones(4, np.complex64)), Variable(np.ones(2, np.complex64))
    optimizer = gpu_adam.Adam(complex_mode=complex_mode)
    optimizer.apply_gradients([(device.array(np.arange(4).astype(np.complex64) * (1 + 2j)), x)])
    m, v = optimizer.get_slot(x, "m").numpy(), optimizer.get_slot(x, "v").numpy()
    optimizer.replace(x, new, device.array(np.array([3, 1])))
    assert_same_bits(optimizer.get_slot(new, "m").numpy(), m[[3, 1]])
    assert_same_bits(optimizer.get_slot(new, "v").numpy(), v[[3, 1]])


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_a_successor_at_any_address(device: Device, offset: int) -> None:
    """Slots lie as far from a 16-byte boundary as their variable, so those of a successor may have to move."""
    values = np.linspace(-1, 1, 40, dtype=np.float32)
    x = Variable(values)
    optimizer, oracle = gpu_adam.Adam(0.1), reference.Adam([values], 0.1)
    step(optimizer, device, [x], 0)
    oracle.step([gradient(x, 0)])
    new = device.array(np.zeros(offset + 40, np.float32))[offset:]
    new[...] = x.value
    optimizer.replace(x, new)
    for number in (1, 2):
        step(optimizer, device, [new], number)
        oracle.step([gradient(x, number)])
    assert_same_bits(device.numpy(new), oracle.variables[0])


def test_slots_of_the_callers_own_move_too(device: Device) -> None:
    optimizer, x, y = started(device, raw=False)
    optimizer.add_slot(x, "age", device.array(np.arange(15, dtype=np.float32).reshape(5, 3)))
    place = len(optimizer.weights) - 1
    optimizer.add_slot(y, "age")
    new = Variable(X[:2])
    optimizer.replace(x, new, device.array(np.array([4, 1])))
    assert optimizer.get_slot(new, "age") is optimizer.weights[place]
    assert optimizer.get_slot(new, "age").numpy().tolist() == [[12, 13, 14], [3, 4, 5]]
    assert optimizer.get_slot_names() == ["m", "v", "age"]


def test_a_variable_that_was_built_only(device: Device) -> None:
    x, new = Variable(X), Variable(X[:3])
    optimizer = gpu_adam.Adam(0.1)
    optimizer.build([x])
    optimizer.replace(x, new, device.array(np.array([0, 1, 2])))
    step(optimizer, device, [new], 0)
    oracle = reference.Adam([X[:3]], 0.1)
    oracle.step([gradient(new, 0)])
    assert_same_bits(new.numpy(), oracle.variables[0])
    assert len(optimizer.weights) == 3


def test_a_chain_of_successors_and_a_way_back(device: Device) -> None:
    """A variable that was replaced is a stranger, which may come back."""
    optimizer, x, _ = started(device, raw=False)
    m = optimizer.get_slot(x, "m").numpy()
    second = Variable(X)
    optimizer.replace(x, second)
    optimizer.replace(second, x)
    assert_same_bits(optimizer.get_slot(x, "m").numpy(), m)
    with pytest.raises(SlotNotFoundError):
        optimizer.get_slot(second, "m")


@KINDS
def test_what_is_replaced_is_not_kept_alive(device: Device, raw: bool) -> None:
    optimizer, x, _ = started(device, raw)
    new = made(device, X, raw)
    watched = [weakref.ref(x), weakref.ref(optimizer.get_slot(x, "m"))]
    optimizer.replace(x, new, device.array(np.array([0, 0, 1, 1, 2])))
    del x
    gc.collect()
    assert [ref() is None for ref in watched] == [True, True]


def test_files_after_a_replacement(device: Device, tmp_path: Path) -> None:
    optimizer, x, y = started(device, raw=False)
    new = Variable(X[:2], name="x")
    optimizer.replace(x, new, device.array(np.array([2, 2])))
    optimizer.save(tmp_path / "state")
    other, variables = gpu_adam.Adam(0.1), [Variable(new.numpy(), name="x"), Variable(y.numpy(), name="y")]
    other.build(variables)
    other.load(tmp_path / "state")
    step(optimizer, device, [new, y], 3)
    step(other, device, variables, 3)
    assert_same_bits(variables[0].numpy(), new.numpy())
    assert_same_bits(variables[1].numpy(), y.numpy())


@KINDS
def test_replacements_that_are_refused(device: Device, raw: bool) -> None:
    optimizer, x, y = started(device, raw)
    good = made(device, X[:2], raw)
    rows = device.array(np.array([0, 1]))
    refused: list[tuple[Any, Any, Any]] = [
        (made(device, X, raw), good, rows),  # old is a stranger
        (x, y, None),  # new has slots
        (x, x, None),
        (x, good, None),  # without an index the shape must be old's
        (x, made(device, X[:3], raw), rows),
        (x, made(device, X[:2, :2], raw), rows),
        (x, made(device, X[0], raw), rows),
        (x, made(device, X[:2].astype(np.float64), raw), rows),
        (x, made(device, X[:2].astype(np.int32), raw), rows),
        (x, good, device.array(np.array([0, 5]))),  # a row that x has not
        (x, good, device.array(np.array([-6, 0]))),
        (x, good, device.array(np.array([0, 2**40]))),
        (x, good, device.array(np.array([0.0, 1.0]))),
        (x, good, device.array(np.array([[0], [1]]))),
        (x, good, "ab"),
        (x, [1.0], rows),
        (x, None, rows),
        (None, good, rows),
    ]
    for old, new, index in refused:
        with unchanged(optimizer, x, y, good), pytest.raises(GpuAdamError):
            optimizer.replace(old, new, index)
    watched = weakref.ref(good)
    del good, refused, old, new
    gc.collect()
    assert watched() is None, "a refused variable must not be kept alive"
    step(optimizer, device, [x, y], 2)
    oracle = reference.Adam([X, Y], 0.1)
    for number in range(3):
        oracle.step([gradient(x, number), gradient(y, number)])
    assert_same_bits(values_of(device, x), oracle.variables[0])
    assert_same_bits(values_of(device, y), oracle.variables[1])


def test_arrays_that_cannot_be_successors(device: Device) -> None:
    optimizer, x, y = started(device, raw=True)
    wide = device.array(np.zeros((5, 6), np.float32))
    bad = [wide[:, ::2]]
    if device.xp is np:
        frozen = X.copy()
        frozen.flags.writeable = False
        bad.append(frozen)
    for new in bad:
        with unchanged(optimizer, x, y), pytest.raises(GpuAdamError):
            optimizer.replace(x, new)


def test_a_scalar_has_no_rows(device: Device) -> None:
    x, new = Variable(np.float32(1)), Variable(np.float32(2))
    optimizer = gpu_adam.Adam()
    step(optimizer, device, [x], 0)
    with unchanged(optimizer, x), pytest.raises(GpuAdamError):
        optimizer.replace(x, new, device.array(np.array([0])))
    optimizer.replace(x, new)
    step(optimizer, device, [new], 1)
    assert optimizer.iterations == 2
