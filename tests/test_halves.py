"""Variables of 16 bits: float16 and bfloat16, their masters, slots of 16 bits, stochastic rounding, mixed gradients."""

import copy
import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from reference import Array, assert_same_bits

import gpu_adam
from gpu_adam import Adam, IndexedSlices, Variable
from gpu_adam.devices import Device, HostDevice
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HALVES = {"float16": np.dtype(np.float16), "bfloat16": BFLOAT16}
MIXING = {**HALVES, "float32": np.dtype(np.float32)}


def same(actual: Any, expected: Array, what: str = "") -> None:
    """The same bits; NaN is NaN."""
    actual = actual.numpy() if isinstance(actual, Variable) else np.asarray(actual)
    assert actual.dtype == expected.dtype, what
    if actual.dtype.itemsize == 2:
        actual, expected = actual.astype(np.float32), expected.astype(np.float32)
    assert_same_bits(actual, expected, what)


def check(optimizer: Adam, variables: list[Variable], oracle: reference.Adam) -> None:
    """Variables and slots are the oracle's."""
    expected = {"m": oracle.m, "v": oracle.v, "vhat": oracle.vhat, "average": oracle.average, "master": oracle.masters}
    for k, variable in enumerate(variables):
        same(variable, oracle.variables[k], f"variable {k}")
        for name in optimizer.get_slot_names():
            if optimizer._state.has_slot(variable, name):
                arrays = expected[name]
                assert arrays is not None
                same(optimizer.get_slot(variable, name), arrays[k], f"{name} of variable {k}")


def all_numbers(dtype: np.dtype) -> Array:
    """Every number of 16 bits."""
    return np.arange(2**16, dtype=np.uint16).view(dtype)


_EVERY: dict[str, Any] = {"weight_decay": 0.5, "maximize": True, "amsgrad": True}
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of Adam, and of the oracle
    "plain": ({}, {}),
    "amsgrad": ({"amsgrad": True}, {"amsgrad": True}),
    "master": ({"master_weights": True}, {"masters": True}),
    "slots of bfloat16": ({"slot_dtype": "bfloat16", "amsgrad": True}, {"slot_dtype": BFLOAT16, "amsgrad": True}),
    "everything": (
        {"master_weights": True, "slot_dtype": "bfloat16", "use_ema": True, **_EVERY, "epsilon_form": "paper"},
        {"masters": True, "slot_dtype": BFLOAT16, "ema": 0.99, **_EVERY, "paper": True},
    ),
    "average": ({"use_ema": True, "ema_momentum": 0.75}, {"ema": 0.75}),
}


# Each is a compilation: every configuration for one dtype, and each dtype and gradient in a few.
CASES = [
    *(("bfloat16", "bfloat16", config) for config in CONFIGS),
    *(("float16", "float16", config) for config in ("plain", "master", "everything", "average")),
    ("float32", "float32", "slots of bfloat16"),
    *(("bfloat16", "float32", config) for config in ("plain", "everything")),
    ("bfloat16", "float16", "plain"),
    ("float16", "float32", "master"),
    *(("float32", gradient, "plain") for gradient in HALVES),
]


@pytest.mark.parametrize(("dtype", "gradient", "config"), CASES)
def test_computed_in_float32_and_rounded_once(dtype: str, gradient: str, config: str, device: Device) -> None:
    """Dense variables of sizes around a pack of 16 bytes, at odd places."""
    ours, theirs = CONFIGS[config]
    rng = np.random.default_rng(1)
    initial = [rng.standard_normal(size).astype(MIXING[dtype]) for size in (1, 7, 8, 9, 70)]
    memory = device.array(np.zeros(400, MIXING[dtype]))
    variables, begin = [], 1
    for values in initial:
        place = memory[begin : begin + values.size]
        place[...] = device.array(values)
        variables.append(Variable.over(place, device))
        begin += values.size + 3
    optimizer = Adam(0.01, **ours)
    oracle = reference.Adam(initial, 0.01, **theirs)
    if dtype == "float32":
        oracle.masters = None  # a variable of float32 is not rounded
    for _ in range(3):
        gradients = [rng.standard_normal(values.size).astype(MIXING[gradient]) for values in initial]
        optimizer.apply_gradients(list(zip(map(device.array, gradients), variables, strict=True)))
        oracle.step(gradients)
    check(optimizer, variables, oracle)


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_as_gradient_and_as_variable(dtype: str, master: bool, device: Device) -> None:
    """Denormal numbers of float16 are numbers; those of bfloat16 are zeros, as those of float32 are."""
    numbers = all_numbers(HALVES[dtype])[:: 1 if device.name == "host" else 61]
    initial = [numbers, np.ones_like(numbers), np.zeros_like(numbers)]
    gradients = [np.ones_like(numbers), numbers, numbers[::-1].copy()]
    variables, optimizer = [Variable(x, device=device) for x in initial], Adam(0.5, epsilon=1e-3, master_weights=master)
    oracle = reference.Adam(initial, 0.5, epsilon=1e-3, masters=master)
    for _ in range(2):
        optimizer.apply_gradients(list(zip(map(device.array, gradients), variables, strict=True)))
        oracle.step(gradients)
    check(optimizer, variables, oracle)
    smallest = Variable(all_numbers(HALVES[dtype])[1:2], device=device)
    Adam(0.0).apply_gradients([(device.array(np.zeros(1, HALVES[dtype])), smallest)])
    assert (smallest.numpy()[0] > 0) == (dtype == "float16")


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_at_the_ends_of_the_range(dtype: str, device: Device) -> None:
    """What lies half way between two neighbours goes to the even one; what lies beyond the last becomes infinite."""
    kind = HALVES[dtype]
    largest = float(ml_dtypes.finfo(kind).max)
    step = float(np.float32(largest) - all_numbers(kind)[(0x7BFE if dtype == "float16" else 0x7F7E)].astype(np.float32))
    smallest = float(ml_dtypes.finfo(kind).smallest_normal)
    targets = [largest + step / 2 - step / 128, largest + step / 2, 1 + 2.0**-8 + 2.0**-20, smallest, 65504.0, 65520.0]
    if dtype == "float16":
        targets += [2.0**-24, 2.0**-25, 1.5 * 2.0**-24, 3 * 2.0**-25, 2.0**-26, 1023.75 * 2.0**-24]
    targets += [-target for target in targets]
    w = Variable(np.zeros(len(targets), kind), device=device)
    optimizer = Adam(0.0, master_weights=True)
    optimizer.build([w])
    optimizer.get_slot(w, "master").assign(np.array(targets, np.float32))
    optimizer.apply_gradients([(device.array(np.zeros(len(targets), np.float32)), w)])
    with np.errstate(over="ignore"):
        same(w, np.array(targets, np.float32).astype(kind))


def noise(seed: int, t: int, place: int, index: Array) -> Any:
    """What cuda/noise.cuh says, in NumPy."""

    def mixed(number: int) -> int:
        number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
        return number ^ number >> 31

    golden = 0x9E3779B97F4A7C15
    of_step = mixed((mixed((seed + golden) % 2**64) + t + golden) % 2**64)
    own = mixed((of_step + place * golden) % 2**64)
    low, high = index.astype(np.uint32), (index >> 32).astype(np.uint32)
    x: Array = low ^ np.uint32(own % 2**32)
    x = (x ^ x >> 16) * np.uint32(0x85EBCA6B) + np.uint32(own >> 32) + high
    x = (x ^ x >> 13) * np.uint32(0xC2B2AE35)
    return x ^ x >> 16


def stochastically(x: Array, random: Array) -> Array:
    """float32 numbers rounded by the lower 16 bits of the noise."""
    rounded: Array = (x.view(np.uint32) + (random & 0xFFFF)) >> 16
    halves: Array = rounded.astype(np.uint16).view(BFLOAT16)
    return halves


@pytest.mark.parametrize("sparse", [False, True])
def test_stochastic_rounding_is_a_hash_of_seed_step_place_and_element(sparse: bool, device: Device) -> None:
    rng = np.random.default_rng(2)
    initial = [rng.standard_normal((40, 3)).astype(BFLOAT16) for _ in range(3)]
    variables = [Variable(values, device=device) for values in initial]
    optimizer = Adam(0.01, stochastic_rounding=True, seed=11)
    oracle = reference.Adam(initial, 0.01)
    for t in (1, 2, 3):
        gradients = [rng.standard_normal((40, 3)).astype(BFLOAT16) for _ in initial]
        rows = np.arange(40)[::-1].copy()
        pairs: list[Any] = list(zip(map(device.array, gradients), variables, strict=True))
        if sparse:
            pairs[1] = IndexedSlices(device.array(gradients[1][rows]), device.array(rows)), variables[1]
        optimizer.apply_gradients(pairs)
        oracle.masters = [reference.widened(variable) for variable in oracle.variables]
        oracle.step(gradients)
        for place, unrounded in enumerate(oracle.masters):
            random = noise(11, t, place, np.arange(120).reshape(40, 3))
            oracle.variables[place] = stochastically(unrounded, random)
            same(variables[place], oracle.variables[place], f"variable {place}, step {t}")


@pytest.mark.thorough
def test_stochastic_rounding_is_unbiased() -> None:
    """The mean over 4096 seeds lies within 5 standard errors of the number; each result is one of its neighbours."""
    start = np.array([1.0, -3.0, 1000.0, 1e-20], np.float32).astype(BFLOAT16)
    gradient = np.array([1.0, -1.0, 1.0, 1e-10], np.float32)
    exact = Variable(start.astype(np.float32))
    Adam(1e-3).apply_gradients([(gradient, exact)])
    seen = []
    for seed in range(4096):
        w = Variable(start)
        Adam(1e-3, stochastic_rounding=True, seed=seed).apply_gradients([(gradient, w)])
        seen.append(w.numpy().astype(np.float64))
    results, expected = np.array(seen), exact.numpy().astype(np.float64)
    for element in range(len(start)):
        found = np.unique(results[:, element])
        assert found.size == 2
        assert found[0] <= expected[element] <= found[1]
        error = results[:, element].std() / 64
        assert abs(results[:, element].mean() - expected[element]) < 5 * error


def test_noise_of_neighbours_steps_and_variables_is_independent() -> None:
    """Correlations of 65,536 pairs of noise lie within 5 standard errors of none."""
    index = np.arange(2**16)
    base = noise(0, 1, 0, index)
    others = [noise(0, 1, 0, index + 1), noise(0, 2, 0, index), noise(0, 1, 1, index), noise(1, 1, 0, index)]
    others += [noise(0, 1, 0, index + 2**32), base >> 16]
    for other in others:
        one, another = ((x & 0xFFFF).astype(np.float64) for x in (base, other))
        assert abs(np.corrcoef(one, another)[0, 1]) < 5 / 256


def test_stochastic_rounding_does_not_depend_on_the_launch() -> None:
    """Blocks, threads, a restart in the middle, and the order in which variables come to a step."""
    rng = np.random.default_rng(3)
    initial = [rng.standard_normal(size).astype(BFLOAT16) for size in (5000, 17)]
    gradients = [[rng.standard_normal(x.size).astype(np.float32) for x in initial] for _ in range(4)]
    results = []
    for device in (HostDevice(threads=1), HostDevice(threads=2, max_blocks=1), HostDevice(block_size=32)):
        variables = [Variable(x, device=device) for x in initial]
        optimizer = Adam(0.01, stochastic_rounding=True)
        for step, of_step in enumerate(gradients):
            if step == 2:
                state, config = optimizer.export(), optimizer.get_config()
                optimizer = Adam.from_config(config)
                optimizer.build(variables)
                optimizer.restore(state)
            pairs = list(zip(of_step, variables, strict=True))
            optimizer.apply_gradients(pairs[:: -1 if step == 3 else 1])
        results.append([variable.numpy() for variable in variables])
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            same(one, other)


_TOGETHER: list[Any] = [
    ("bfloat16", "bfloat16", {"slot_dtype": "bfloat16"}),
    ("bfloat16", "bfloat16", {"slot_dtype": "bfloat16", "stochastic_rounding": True}),
    ("float16", "float16", {}),
    ("float16", "float16", {"master_weights": True, "slot_dtype": "bfloat16"}),
    ("float16", "float32", {"clipvalue": 2.0}),
    ("float32", "float16", {"amsgrad": True}),
    ("float16", "float16", {"use_ema": True, "clipnorm": 3.0}),
    pytest.param("bfloat16", "float16", {"use_ema": True, "telemetry": True}, marks=pytest.mark.thorough),
    pytest.param("float16", "bfloat16", {"telemetry": True}, marks=pytest.mark.thorough),
]


@pytest.mark.parametrize(("dtype", "gradient", "config"), _TOGETHER)
def test_elements_that_the_host_moves_or_converts_together(dtype: str, gradient: str, config: dict[str, Any]) -> None:
    """They begin anywhere, are of any size; other devices move and convert single ones. Every NaN is the same one."""
    rng = np.random.default_rng(11)
    offsets, sizes = (0, 1, 2, 3), (1, 2, 3, 17, 65, 4099)
    starts = [(offset, rng.standard_normal(size).astype(MIXING[dtype])) for offset in offsets for size in sizes]
    gradients = [rng.standard_normal(x.size).astype(MIXING[gradient]) for _, x in starts]
    for values in gradients[::2]:
        values[::7], values[3::9] = -np.nan, np.inf
    table = rng.standard_normal((9, 5)).astype(MIXING[dtype])
    results = []
    for device in (HostDevice(threads=1), HostDevice(block_size=96)):
        arrays = [device.empty(offset + x.size, x.dtype)[offset:] for offset, x in starts]
        for array, (_, x) in zip(arrays, starts, strict=True):
            array[...] = x
        variables, rows = [Variable.over(array, device) for array in arrays], Variable(table, device=device)
        optimizer = Adam(0.01, **config)
        for turn in range(3):  # a gradient lies as its variable does, or not
            memory = [device.empty(x.size + turn, x.dtype)[turn:] for x in gradients]
            for place, values in zip(memory, gradients, strict=True):
                place[...] = values
            slices = IndexedSlices(table[:3].astype(MIXING[gradient]), [7, 1, 7])
            optimizer.apply_gradients([*zip(memory, variables, strict=True), (slices, rows)])
        results.append([*arrays, rows.numpy(), *(slot.numpy() for slot in optimizer.weights[1:])])
    for one, other in zip(*results, strict=True):
        same(one, other)
        if one.dtype.itemsize == 2:
            assert one.tobytes() == other.tobytes()


@pytest.mark.thorough
@pytest.mark.parametrize("gradient", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", HALVES)
def test_any_launch_gives_the_same_bits(dtype: str, gradient: str) -> None:
    """Chunks and tiles that begin anywhere; one thread a block, and blocks of many threads that move packs."""
    rng = np.random.default_rng(9)
    initial = [rng.standard_normal(shape).astype(HALVES[dtype]) for shape in (4097, (1000, 9), 5)]
    dense = [rng.standard_normal(x.shape).astype(MIXING[gradient]) for x in initial]
    rows = rng.integers(0, 1000, 300)
    config = CONFIGS["everything"][0]
    results = []
    for device in (HostDevice(threads=2), HostDevice(block_size=32, max_blocks=3), HostDevice(block_size=96)):
        memory = [device.empty(x.size + 3, x.dtype) for x in initial]
        arrays = [place[3:].reshape(x.shape) for place, x in zip(memory, initial, strict=True)]
        for array, x in zip(arrays, initial, strict=True):
            array[...] = x
        variables = [Variable.over(array, device) for array in arrays]
        optimizer = Adam(0.01, **config, global_clipnorm=1.0)
        for _ in range(2):
            pairs: list[Any] = list(zip(dense, variables, strict=True))
            pairs[1] = IndexedSlices(dense[1][:300], rows), variables[1]
            optimizer.apply_gradients(pairs)
        results.append([*(v.numpy() for v in variables), *(slot.numpy() for slot in optimizer.weights[1:])])
    for result in results[1:]:
        for number, (one, other) in enumerate(zip(result, results[0], strict=True)):
            same(one, other, f"array {number}")


# Sparse gradients.


@pytest.mark.parametrize(
    ("dtype", "gradient", "config"),
    [
        *(("bfloat16", "bfloat16", config) for config in ("plain", "everything")),
        ("float16", "float16", "master"),
        ("bfloat16", "float32", "plain"),
    ],
)
def test_sparse_is_dense(dtype: str, gradient: str, config: str, device: Device) -> None:
    rng = np.random.default_rng(4)
    initial = rng.standard_normal((50, 5)).astype(MIXING[dtype])
    one, other = Variable(initial, device=device), Variable(initial, device=device)
    first, second = Adam(0.01, **CONFIGS[config][0]), Adam(0.01, **CONFIGS[config][0])
    for _ in range(2):
        rows = rng.permutation(50)[:20]
        values = rng.standard_normal((20, 5)).astype(MIXING[gradient])
        dense = np.zeros((50, 5), MIXING[gradient])
        dense[rows] = values
        first.apply_gradients([(IndexedSlices(device.array(values), device.array(rows)), one)])
        second.apply_gradients([(device.array(dense), other)])
    same(one, other.numpy())
    for name in second.get_slot_names():
        same(first.get_slot(one, name), second.get_slot(other, name).numpy(), name)


def test_repeated_rows_are_added_in_float32(device: Device) -> None:
    """In bfloat16 the sum of 1 and a thousand times 2^-9 would be 1."""
    values = np.full((1001, 1), 2.0**-9, BFLOAT16)
    values[0] = 1
    w = Variable(np.zeros((2, 1), BFLOAT16), device=device)
    optimizer = Adam(beta_1=0.0)
    optimizer.apply_gradients([(IndexedSlices(device.array(values), device.array(np.zeros(1001, np.int64))), w)])
    assert optimizer.get_slot(w, "m").numpy()[0, 0] == 1 + 1000 * 2.0**-9


@pytest.mark.parametrize("clip", [{"clipnorm": 2.0}, {"global_clipnorm": 2.0}, {"clipvalue": 0.5}])
def test_clipping(clip: dict[str, Any], device: Device) -> None:
    """Clipped like the same numbers in float32."""
    gradient = (np.arange(9) - 4).astype(BFLOAT16)
    half, full = Variable(np.zeros(9, BFLOAT16), device=device), Variable(np.zeros(9, np.float32), device=device)
    optimizers = Adam(0.5, **clip), Adam(0.5, **clip)
    optimizers[0].apply_gradients([(device.array(gradient), half)])
    optimizers[1].apply_gradients([(device.array(gradient.astype(np.float32)), full)])
    for name in "mv":
        same(optimizers[0].get_slot(half, name), optimizers[1].get_slot(full, name).numpy())
    same(half, full.numpy().astype(BFLOAT16))


# Gradients of another dtype.


def test_a_gradient_may_change_its_dtype_from_step_to_step(device: Device) -> None:
    """Each as it is, without a copy; also of slices, and of torch's tensors."""
    rng = np.random.default_rng(5)
    initial = [rng.standard_normal((6, 2)).astype(BFLOAT16) for _ in range(2)]
    variables, optimizer, oracle = (
        [Variable(x, device=device) for x in initial],
        Adam(0.01),
        reference.Adam(initial, 0.01),
    )
    rows = device.array(np.arange(6))
    for dtype in ("bfloat16", "float32", "float32", "float16", "bfloat16"):
        gradients = [rng.standard_normal((6, 2)).astype(MIXING[dtype]) for _ in range(2)]
        arrays = [device.array(gradient) for gradient in gradients]
        optimizer.apply_gradients([(arrays[0], variables[0]), (IndexedSlices(arrays[1], rows), variables[1])])
        oracle.step(gradients)
    check(optimizer, variables, oracle)


def test_dtypes_mixed_in_one_step(device: Device) -> None:
    kinds = [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16"), ("float32", "float16")]
    initial = [np.ones(5, MIXING[kind]) for kind, _ in kinds]
    gradients = [np.arange(5).astype(MIXING[kind]) for _, kind in kinds]
    variables, oracle, optimizer = [Variable(x, device=device) for x in initial], reference.Adam(initial), Adam()
    for _ in range(3):
        optimizer.apply_gradients(list(zip(map(device.array, gradients), variables, strict=True)))
        oracle.step(gradients)
    check(optimizer, variables, oracle)


@pytest.mark.parametrize("dtype", ["float64", "complex64", "int32"])
def test_gradients_that_do_not_mix(dtype: str, device: Device) -> None:
    w = Variable(np.ones(3, BFLOAT16), name="w", device=device)
    optimizer = Adam()
    message = rf"gradient of variable 'w' must have dtype float32 or float16 or bfloat16 \(got {dtype}\)"
    with pytest.raises(ArgumentValueError, match=message):
        optimizer.apply_gradients([(device.array(np.ones(3, dtype)), w)])
    assert optimizer.iterations == 0
    assert optimizer.get_slot_names() == []


def test_numbers_and_lists_are_read_in_the_variables_dtype(device: Device) -> None:
    w, scalar = Variable(np.zeros(2, BFLOAT16), device=device), Variable(np.float16(0), device=device)
    Adam(1.0, beta_1=0.0, beta_2=0.0).apply_gradients([([1.0, -1.0], w), (1, scalar)])
    same(w, np.array([-1, 1], BFLOAT16))
    assert scalar.numpy() == -1


# Masters.


def test_a_master_is_a_float32_run(device: Device) -> None:
    """The variable is at every step the rounding of the run in float32 with the same gradients."""
    rng = np.random.default_rng(6)
    initial = rng.standard_normal(20).astype(BFLOAT16)
    half, full = Variable(initial, device=device), Variable(initial.astype(np.float32), device=device)
    optimizers = Adam(1e-4, master_weights=True), Adam(1e-4)
    for _ in range(20):
        gradient = device.array(rng.standard_normal(20).astype(np.float32))
        optimizers[0].apply_gradients([(gradient, half)])
        optimizers[1].apply_gradients([(gradient, full)])
        same(half, full.numpy().astype(BFLOAT16))
    same(optimizers[0].get_slot(half, "master"), full.numpy())


def test_what_is_assigned_to_a_variable_is_assigned_to_its_master(device: Device) -> None:
    w = Variable(np.zeros(4, BFLOAT16), device=device)
    optimizer = Adam(0.0, master_weights=True)
    optimizer.build([w])
    master = optimizer.get_slot(w, "master")
    third = np.float32(1) / np.float32(3)
    for write, expected in (
        (lambda: w.assign(np.full(4, third)), [third] * 4),
        (lambda: w.assign_add(np.full(4, third)), [third + third] * 4),
        (lambda: w.assign_sub(np.full(4, third)), [third + third - third] * 4),
        (lambda: w.__setitem__(slice(0, 2), 0.1), [np.float32(0.1)] * 2 + [third] * 2),
        (lambda: w.__imul__(2), [np.float32(0.2)] * 2 + [2 * third] * 2),
        (lambda: w.__iadd__(1), [np.float32(0.2) + np.float32(1)] * 2 + [2 * third + np.float32(1)] * 2),
    ):
        write()
        same(master, np.array(expected, np.float32))
        same(w, np.array(expected, np.float32).astype(BFLOAT16))
    optimizer.apply_gradients([(device.array(np.zeros(4, np.float32)), w)])
    same(w, np.array(expected, np.float32).astype(BFLOAT16))
    with pytest.raises(ArgumentValueError, match="shape"):
        w.assign(np.zeros(3))
    same(master, np.array(expected, np.float32))


def test_what_does_not_fit_the_variable_is_not_assigned_to_the_master() -> None:
    w = Variable(np.zeros(1, np.float16), device="host")
    optimizer = Adam(master_weights=True)
    optimizer.build([w])
    with pytest.raises(ArgumentValueError, match="must lie in the range of float16"):
        w.assign([1e6])
    assert optimizer.get_slot(w, "master").numpy() == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_have_masters_of_their_own(copied: Any, device: Device) -> None:
    w = Variable(np.zeros(2, BFLOAT16), device=device)
    optimizer = Adam(master_weights=True)
    optimizer.build([w])
    twin, other = copied((optimizer, w))
    other.assign(np.ones(2))
    assert twin.get_slot(other, "master").numpy().tolist() == [1, 1]
    assert optimizer.get_slot(w, "master").numpy().tolist() == w.numpy().tolist() == [0, 0]


def test_a_variable_outlives_its_optimizer(device: Device) -> None:
    w = Variable(np.zeros(2, BFLOAT16), device=device)
    optimizer = Adam(master_weights=True)
    optimizer.build([w])
    before = w._has_master
    del optimizer
    assert (before, w._has_master) == (True, False)
    assert w.assign(np.ones(2)).numpy().tolist() == [1, 1]


def test_a_variable_that_takes_anothers_place_has_its_master(device: Device) -> None:
    old, new = (Variable(np.full(3, x, BFLOAT16), device=device) for x in (1, 2))
    optimizer = Adam(master_weights=True)
    optimizer.build([old])
    optimizer.replace(old, new)
    new.assign(np.full(3, 5))
    assert optimizer.get_slot(new, "master").numpy().tolist() == [5, 5, 5]


def test_averages_take_the_place_of_masters_too(device: Device) -> None:
    w = Variable(np.zeros(3, BFLOAT16), device=device)
    optimizer = Adam(0.1, master_weights=True, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2)
    gradient = device.array(np.array([1, -2, 3], np.float32))
    for _ in range(2):
        optimizer.apply_gradients([(gradient, w)])
    average = optimizer.get_slot(w, "average").numpy()
    assert average.dtype == np.float32
    same(optimizer.get_slot(w, "master"), average)
    same(w, average.astype(BFLOAT16))
    optimizer.apply_gradients([(gradient, w)])
    optimizer.overwrite_by_averages()
    same(w, optimizer.get_slot(w, "average").numpy().astype(BFLOAT16))


# State.


@pytest.mark.parametrize(
    ("dtype", "config"), [("bfloat16", config) for config in CONFIGS] + [("float16", "everything")]
)
def test_a_file_continues_a_run(dtype: str, config: str, device: Device, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    initial = rng.standard_normal(9).astype(HALVES[dtype])
    gradients = [device.array(rng.standard_normal(9).astype(HALVES[dtype])) for _ in range(4)]
    w = Variable(initial, device=device)
    optimizer = Adam(0.01, **CONFIGS[config][0])
    for gradient in gradients[:2]:
        optimizer.apply_gradients([(gradient, w)])
    optimizer.save(tmp_path / "file.npz")
    other = Variable(w.numpy(), device=device)
    again = Adam.from_config(optimizer.get_config())
    again.build([other])
    again.load(tmp_path / "file.npz")
    for gradient in gradients[2:]:
        optimizer.apply_gradients([(gradient, w)])
        again.apply_gradients([(gradient, other)])
    same(other, w.numpy())
    for name, array in optimizer.export().items():
        same(again.export()[name], array, name)


def test_dtypes_of_slots(device: Device) -> None:
    variables = [Variable(np.zeros(2, kind), device=device) for kind in MIXING.values()]
    plain, small = Adam(amsgrad=True, use_ema=True, master_weights=True), Adam(use_ema=True, slot_dtype="bfloat16")
    for optimizer in (plain, small):
        optimizer.build(variables)
    for k, variable in enumerate(variables):
        for name in ("m", "v", "vhat", "average"):
            assert plain.get_slot(variable, name).dtype == np.float32
        assert plain._state.has_slot(variable, "master") == (k < 2)
        assert [str(small.get_slot(variable, name).dtype) for name in ("m", "v", "average")] == [
            *("bfloat16", "bfloat16", "float32")
        ]


def test_config_has_what_is_not_the_default() -> None:
    assert not {"slot_dtype", "master_weights", "stochastic_rounding", "seed"} & set(Adam().get_config())
    config = Adam(slot_dtype="bfloat16", stochastic_rounding=True, seed=np.int64(5)).get_config()
    assert (config["slot_dtype"], config["stochastic_rounding"], config["seed"]) == ("bfloat16", True, 5)
    assert Adam.from_config(config).get_config() == config


# What is refused.


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"slot_dtype": "float16"}, ArgumentValueError, r"slot_dtype must be one of bfloat16 \(got 'float16'\)"),
        ({"slot_dtype": np.float32}, ArgumentValueError, "slot_dtype must be one of bfloat16"),
        ({"master_weights": "yes"}, ArgumentTypeError, "master_weights must be True or False"),
        ({"stochastic_rounding": None}, ArgumentTypeError, "stochastic_rounding must be True or False"),
        ({"seed": -1}, ArgumentValueError, r"seed must be a whole number in \[0, 2\^64\) \(got -1\)"),
        ({"seed": 2**64}, ArgumentValueError, "seed must be a whole number"),
        ({"seed": 0.5}, ArgumentValueError, "seed must be a whole number"),
        ({"seed": "1"}, ArgumentValueError, "seed must be a whole number"),
        (
            {"master_weights": True, "stochastic_rounding": True},
            ArgumentValueError,
            "stochastic_rounding must not be set together with master_weights",
        ),
    ],
)
def test_configurations_that_are_refused(config: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Adam(**config)


@pytest.mark.parametrize(
    ("config", "dtype", "fitting"),
    [
        ({"master_weights": True}, "float64", "float32 or float16 or bfloat16 with master_weights"),
        ({"master_weights": True}, "complex64", "float32 or float16 or bfloat16 with master_weights"),
        ({"slot_dtype": "bfloat16"}, "float64", "float32 or float16 or bfloat16 with slot_dtype"),
        ({"stochastic_rounding": True}, "float32", "bfloat16 with stochastic_rounding"),
        ({"stochastic_rounding": True}, "float16", "bfloat16 with stochastic_rounding"),
    ],
)
def test_variables_that_do_not_fit(config: dict[str, Any], dtype: str, fitting: str, device: Device) -> None:
    good = Variable(np.zeros(2, BFLOAT16), device=device)
    bad = Variable(np.zeros(2, dtype), name="bad", device=device)
    optimizer = Adam(**config)
    gradients = [device.array(np.ones(2, np.float32)), device.array(np.ones(2, dtype))]
    message = rf"variable 'bad' must have dtype {fitting} \(got {dtype}\); update it by an optimizer without"
    with pytest.raises(ArgumentValueError, match=message):
        optimizer.apply_gradients(list(zip(gradients, [good, bad], strict=True)))
    with pytest.raises(ArgumentValueError, match=message):
        optimizer.build([bad])
    assert len(optimizer.weights) == 0
    assert good.numpy().tolist() == [0, 0]


# Arrays of others.


def test_tensors_of_torch() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(8)
    initial = rng.standard_normal(11).astype(np.float32)
    for dtype in (torch.bfloat16, torch.float16):
        w = torch.tensor(initial).to(dtype).requires_grad_()
        twin = Variable(w.detach().float().numpy().astype(HALVES[str(dtype).removeprefix("torch.")]), device="host")
        optimizers = Adam(0.01), Adam(0.01)
        for kind in (dtype, torch.float32, dtype):
            gradient = rng.standard_normal(11).astype(np.float32)
            tensor = torch.tensor(gradient).to(kind)
            version = w._version
            optimizers[0].apply_gradients([(tensor, w)])
            assert w._version > version
            optimizers[1].apply_gradients([(tensor.float().numpy(), twin)])
        assert w.detach().float().numpy().tolist() == twin.numpy().astype(np.float32).tolist()


def test_arrays_of_jax() -> None:
    jnp = pytest.importorskip("jax.numpy")
    w = Variable(np.zeros(3, BFLOAT16), device="host")
    gpu_adam.Adam(1.0, beta_1=0.0, beta_2=0.0).apply_gradients([(jnp.ones(3, jnp.bfloat16), w)])
    assert w.numpy().tolist() == [-1, -1, -1]


def test_a_loss_of_bfloat16_variables(device: Device) -> None:
    """NumPy's functions know bfloat16 by ml_dtypes."""
    w = Variable(np.array([1, 2, 3], BFLOAT16), device=device)
    optimizer = Adam(0.5, master_weights=True)
    for _ in range(3):
        optimizer.minimize(lambda: np.sum(w * w), [w])
    assert (abs(w.numpy().astype(np.float32)) < [1, 1, 2]).all()
