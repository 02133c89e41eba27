"""Any shapes, values and mistakes: steps have the oracle's bits, and what raises has changed nothing."""

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference import Array, assert_same_bits, densified
from snapshots import snapshot

import gpu_adam
from gpu_adam import IndexedSlices, Variable, kernels, schedules
from gpu_adam.devices import Device, find_device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, GpuAdamError, SparseIndexError

REAL = ["float32", "float64"]
# The fixture only says where: nothing is left over in it from one example to the next.
SETTINGS = settings(
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)

BORDERS = [0, 1, 2, 3, 4, 5, 15, 16, 17, kernels.CHUNK - 1, kernels.CHUNK, kernels.CHUNK + 1, 2 * kernels.CHUNK + 3]
SHAPES = st.one_of(
    st.sampled_from([(), (0, 3), (3, 0), *((size,) for size in BORDERS)]),
    hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=7),
)
BETAS = st.floats(0, 0.999, allow_subnormal=False)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "learning_rate": st.floats(-10, 10, allow_subnormal=False),
        "beta_1": BETAS,
        "beta_2": BETAS,
        "epsilon": st.one_of(st.just(1e-7), st.floats(1e-12, 10)),
        "decay": st.floats(0, 10, allow_subnormal=False),
        "amsgrad": st.booleans(),
    },
)


def drawn(seed: int, shape: tuple[int, ...], dtype: str) -> Array:
    """Numbers of very different sizes, now and then zero, not finite or denormal."""
    rng = np.random.default_rng(seed)
    values = np.asarray(rng.standard_normal(shape) * 10.0 ** rng.integers(-9, 9, shape), dtype)
    special = np.array([0, -0.0, np.nan, np.inf, -np.inf, np.finfo(dtype).tiny / 2, np.finfo(dtype).max], dtype)
    return np.where(rng.random(shape) < 0.02, rng.choice(special, shape), values).astype(dtype)


def memory_of(device: Device, values: Array, offset: int) -> Any:
    """An array that begins `offset` elements behind the start of its memory."""
    memory = device.array(np.zeros(values.size + offset, values.dtype))
    raw = memory[offset:].reshape(values.shape)
    raw[...] = device.array(values)
    return raw


def assert_as_oracle(device: Device, variables: list[Any], optimizer: gpu_adam.Adam, oracle: reference.Adam) -> None:
    for k, variable in enumerate(variables):
        found = variable.numpy() if isinstance(variable, Variable) else device.numpy(variable)
        assert_same_bits(found, oracle.variables[k], f"variable {k}")
        for name, kept in (("m", oracle.m), ("v", oracle.v)):
            assert_same_bits(optimizer.get_slot(variable, name).numpy(), kept[k], f"{name} of variable {k}")


@SETTINGS
@given(
    kinds=st.lists(
        st.tuples(SHAPES, st.sampled_from(REAL), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=5
    ),
    config=CONFIGS,
    seed=st.integers(0, 2**32),
    steps=st.integers(1, 3),
)
def test_steps_have_the_bits_of_the_equations(
    device: Device, kinds: list[Any], config: dict[str, Any], seed: int, steps: int
) -> None:
    """Of any shapes and dtypes together, wherever arrays and gradients begin in memory."""
    initial = [
        np.where(np.isfinite(x := drawn(seed + k, shape, dtype)), x, 1) for k, (shape, dtype, *_) in enumerate(kinds)
    ]
    initial = [np.asarray(x, dtype) for x, (_, dtype, *_) in zip(initial, kinds, strict=True)]
    variables = [memory_of(device, x, offset) for x, (_, _, offset, _) in zip(initial, kinds, strict=True)]
    optimizer, oracle = gpu_adam.Adam(**config), reference.Adam(initial, **config)
    for step in range(steps):
        gradients = [drawn(seed + 100 * step + k, shape, dtype) for k, (shape, dtype, *_) in enumerate(kinds)]
        placed = [memory_of(device, g, offset) for g, (*_, offset) in zip(gradients, kinds, strict=True)]
        assert optimizer.apply_gradients(zip(placed, variables, strict=True)) == step + 1
        oracle.step(gradients)
        assert_as_oracle(device, variables, optimizer, oracle)


@SETTINGS
@given(
    shape=hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=9),
    dtype=st.sampled_from(REAL),
    wide=st.booleans(),
    amsgrad=st.booleans(),
    offset=st.integers(0, 3),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_slices_have_the_bits_of_the_dense_gradient(
    device: Device,
    shape: tuple[int, ...],
    dtype: str,
    wide: bool,
    amsgrad: bool,
    offset: int,
    seed: int,
    data: st.DataObject,
) -> None:
    initial = np.where(np.isfinite(x := drawn(seed, shape, dtype)), x, 1).astype(dtype)
    raw = memory_of(device, initial, offset)
    optimizer, oracle = gpu_adam.Adam(0.1, amsgrad=amsgrad), reference.Adam([initial], 0.1, amsgrad=amsgrad)
    for step in range(3):
        indices = np.array(
            data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=20)), np.int64 if wide else np.int32
        )
        values = reference.flushed(drawn(seed + 1 + step, (len(indices), *shape[1:]), dtype)).astype(dtype)
        optimizer.apply_gradients([(IndexedSlices(device.array(values), device.array(indices)), raw)])
        with np.errstate(all="ignore"):
            oracle.step([densified(values, indices, initial)])
        assert_as_oracle(device, [raw], optimizer, oracle)


@SETTINGS
@given(
    size=st.sampled_from([1, 4, 5, 100, kernels.CHUNK + 1]),
    places=st.lists(st.integers(0, 120), min_size=2, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_gradients_anywhere_in_the_variables_memory(device: Device, size: int, places: list[int], seed: int) -> None:
    """A gradient that overlaps any variable counts as it was before the step; variables that overlap are refused."""
    theta, other, *gradient_places = places
    gradient_places = [*gradient_places, theta, other][:2]
    memory = device.array(np.random.default_rng(seed).standard_normal(size + 120).astype(np.float32))
    first, second = memory[theta : theta + size], memory[other : other + size]
    gradients = [memory[place : place + size] for place in gradient_places]
    optimizer = gpu_adam.Adam(0.1)
    if abs(theta - other) < size and theta != other:
        before = snapshot(optimizer, memory)
        with pytest.raises(ArgumentValueError, match="must not overlap"):
            optimizer.apply_gradients(zip(gradients, (first, second), strict=True))
        assert snapshot(optimizer, memory) == before
        return
    variables = [first] if theta == other else [first, second]
    oracle = reference.Adam([device.numpy(variable) for variable in variables], 0.1)
    for _ in range(2):
        oracle.step_pairs([(device.numpy(g), k % len(variables)) for k, g in enumerate(gradients)])
        optimizer.apply_gradients(zip(gradients, (first, second), strict=True))
        assert_as_oracle(device, variables, optimizer, oracle)


RATES = st.one_of(
    st.floats(-100, 100),
    st.builds(schedules.ExponentialDecay, st.floats(-1, 1), st.integers(1, 100), st.floats(0, 2), st.booleans()),
    st.builds(schedules.CosineDecayRestarts, st.floats(-1, 1), st.floats(1, 100), st.floats(1, 3), st.floats(0, 2)),
    st.builds(
        schedules.InverseTimeDecay, st.floats(-1, 1), st.floats(0.5, 100), st.floats(0, 2), name=st.none() | st.text()
    ),
)
LIMITS = st.none() | st.floats(0, exclude_min=True, allow_infinity=False)


@SETTINGS
@given(
    config=st.fixed_dictionaries(
        {},
        optional={
            "learning_rate": RATES,
            "beta_1": st.floats(0, 1, exclude_max=True),
            "beta_2": st.floats(0, 1, exclude_max=True),
            "epsilon": st.floats(0, 1e300),
            "decay": st.floats(0, 1e300),
            "amsgrad": st.booleans(),
            "name": st.text(min_size=1),
            "clipvalue": LIMITS,
            "clipnorm": LIMITS,
        },
    )
)
def test_configs_round_trip(config: dict[str, Any]) -> None:
    optimizer = gpu_adam.Adam(**config)
    first = optimizer.get_config()
    kept = copy.deepcopy(first)
    again = gpu_adam.Adam.from_config(json.loads(json.dumps(first)))
    assert again.get_config() == first == kept
    for name, value in config.items():
        found = getattr(again, name)
        assert found == value if (name, value) != ("epsilon", 0) else found == 1e-7


# Mistakes.

A = np.arange(6, dtype=np.float32).reshape(3, 2)
B = np.arange(4.0)
MISTAKES = 29


def mistakes(device: Device, a: Variable, b: Variable) -> list[Any]:
    """Pairs that no step may take, by kind of mistake."""
    g, h, rows = device.array(A), device.array(B), device.array(np.array([0, 2]))
    return [
        [(g, a), (g, b)],
        [(h, b), (h, a)],
        [(g, a), (g, a), (g.T, a)],
        [(g, a), (h[:3], b)],
        [(g, a), (h.astype(np.float32), b)],
        [(g.astype(np.float64), a), (h, b)],
        [(g, a), (a, h)],
        [(g, a), (h,)],
        [(g, a), (h, b, b)],
        [(g, a), (h, "b")],
        [(g, a), (h, None)],
        [(g, a), ("h", b)],
        [(g, a), ([[1.0], [2.0, 3.0]], b)],
        [(g, a), (h, Variable(np.zeros(4, np.int32)))],
        [(g, a), (h, Variable(np.zeros(4))), (h, h[::-1]), (h[::2], h[::2])],
        [(g, a), (h, b), (g, a.value[1:])],
        [(g, a), (h[:3], b.value[1:]), (h, b)],
        [(h, b), (IndexedSlices(g, rows), a)],
        [(h, b), (IndexedSlices(g[:2, :1], rows), a)],
        [(h, b), (IndexedSlices(g[:2].astype(np.float64), rows), a)],
        [(h, b), (IndexedSlices(g[:2], rows.astype(np.float32)), a)],
        [(h, b), (IndexedSlices(g[:2], None), a)],
        [(h, b), (IndexedSlices("x", rows), a)],
        [(None, a), (None, b)],
        [],
        None,
        7,
        [(g, a), 7],
        [(g, a), (h, b), (None, 7)],
    ]


@settings(SETTINGS, max_examples=4)
@pytest.mark.parametrize("number", range(MISTAKES))
@given(
    steps=st.integers(0, 2),
    amsgrad=st.booleans(),
    limits=st.sampled_from([{}, {"clipnorm": 1.0}, {"global_clipnorm": 1.0, "clipvalue": 0.5}]),
)
def test_a_step_that_raises_has_changed_nothing(
    device: Device, number: int, steps: int, amsgrad: bool, limits: dict[str, Any]
) -> None:
    """And the next good step is what it would have been without."""
    results = []
    for mistaken in (False, True):
        a, b = Variable(A), Variable(B)
        optimizer = gpu_adam.Adam(0.1, **limits)
        good = [(device.array(A), a), (device.array(B), b)]
        for _ in range(steps):
            optimizer.apply_gradients(good)
        optimizer.amsgrad = amsgrad
        if mistaken:
            pairs = mistakes(device, a, b)[number]
            before = snapshot(optimizer, a, b)
            with pytest.raises((ArgumentTypeError, ArgumentValueError, SparseIndexError)):
                optimizer.apply_gradients(pairs)
            assert snapshot(optimizer, a, b) == before
        optimizer.apply_gradients(good)
        results.append([bits[1:] for bits in snapshot(optimizer, a, b)[0]] + snapshot(optimizer, a, b)[1:])
    assert results[0] == results[1]


def test_the_list_of_mistakes_is_whole() -> None:
    host = find_device("host")
    assert len(mistakes(host, Variable(A, device=host), Variable(B, device=host))) == MISTAKES


JUNK = st.one_of(
    st.none(), st.text(max_size=3), st.binary(max_size=3), st.just(math.nan), st.complex_numbers(), st.just(object()),
    st.dictionaries(st.text(max_size=1), st.integers(), max_size=1), st.lists(st.floats(), max_size=3),
    st.floats(max_value=-1e-300),
    hnp.arrays(np.float64, st.sampled_from([(1,), (2,), (0,)])),
)  # fmt: skip


@SETTINGS
@given(name=st.sampled_from(["beta_1", "beta_2", "epsilon", "decay"]), value=JUNK)
def test_any_junk_as_hyperparameter(name: str, value: Any) -> None:
    """Refused by name where it is given, and the value before stays."""
    optimizer = gpu_adam.Adam()
    with pytest.raises((ArgumentTypeError, ArgumentValueError), match=f"^{name} must"):
        setattr(optimizer, name, value)
    assert optimizer.get_config() == gpu_adam.Adam().get_config()


@SETTINGS
@given(target=st.sampled_from(["iterations", "slot", "variable"]), value=JUNK)
def test_any_junk_as_contents(device: Device, target: str, value: Any) -> None:
    variable, optimizer = Variable(A), gpu_adam.Adam()
    optimizer.build([variable])
    places: dict[str, Any] = {
        "iterations": optimizer.iterations,
        "slot": optimizer.get_slot(variable, "m"),
        "variable": variable,
    }
    if target == "iterations" and np.ndim(value) == 0 and isinstance(value, (float, complex)):
        return  # a number is a number
    before = snapshot(optimizer, variable)
    with pytest.raises(GpuAdamError):
        places[target].assign(value)
    assert snapshot(optimizer, variable) == before
