"""Arrays that share memory: gradients count as they were before a step, variables must lie apart."""

import numpy as np
import pytest
import reference
from reference import assert_same_bits
from snapshots import unchanged

import gpu_adam
from gpu_adam import IndexedSlices, Variable, kernels
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentValueError


def assert_variables(variables: list[Variable], oracle: reference.Adam) -> None:
    for k, (variable, expected) in enumerate(zip(variables, oracle.variables, strict=True)):
        assert_same_bits(variable.numpy(), expected, f"variable {k}")


def test_a_gradient_in_memory_that_the_step_writes(device: Device) -> None:
    """It counts as it was before the step: another variable, the variable itself, a part of it, a slot."""
    x = np.arange(1, 9, dtype=np.float32)
    for step in range(2):
        a, b = Variable(x), Variable(x[::-1])
        optimizer, oracle = gpu_adam.Adam(0.1), reference.Adam([x, x[::-1]], 0.1)
        if step:
            optimizer.apply_gradients([(device.array(x), a), (device.array(x), b)])
            oracle.step([x, x])
        for _ in range(2):
            before = [a.numpy(), b.numpy()]
            optimizer.apply_gradients([(b.value, a), (a, b)])
            oracle.step(before[::-1])
            assert_variables([a, b], oracle)
        itself = a.numpy()
        optimizer.apply_gradients([(a.value, a), (a.value, b)])
        oracle.step([itself, itself])
        assert_variables([a, b], oracle)
        slot = optimizer.get_slot(a, "m")
        mean = slot.numpy()
        optimizer.apply_gradients([(slot, a), (slot.value, b)])
        oracle.step([mean, mean])
        assert_variables([a, b], oracle)


def test_a_gradient_that_overlaps_its_variable(device: Device) -> None:
    """Both are parts of one array, shifted: an update in place would read what it has just written."""
    size = 3 * kernels.CHUNK
    values = np.random.default_rng(6).standard_normal(size + 8).astype(np.float32)
    for shift in (0, 1, 4, 8):
        memory = device.array(values)
        theta, g = memory[8 - shift : 8 - shift + size], memory[:size]
        oracle = reference.Adam([values[8 - shift : 8 - shift + size]], 0.1)
        optimizer = gpu_adam.Adam(0.1)
        for _ in range(2):
            oracle.step([device.numpy(g)])
            optimizer.apply_gradients([(g, theta)])
            assert_same_bits(device.numpy(theta), oracle.variables[0], f"shift {shift}")


def test_slices_in_memory_that_the_step_writes(device: Device) -> None:
    x, rows = np.arange(12, dtype=np.float32).reshape(6, 2), np.array([4, 0, 4])
    memory = device.array(x)
    table, values = memory[:4], memory[2:5]
    optimizer, oracle = gpu_adam.Adam(0.1), reference.Adam([x[:4]], 0.1)
    for _ in range(2):
        before = device.numpy(values)
        optimizer.apply_gradients([(IndexedSlices(values, device.array(rows % 4)), table)])
        oracle.step([reference.densified(before, rows % 4, x[:4])])
        assert_same_bits(device.numpy(table), oracle.variables[0])


def test_variables_that_overlap(device: Device) -> None:
    memory = device.array(np.zeros(10, np.float32))
    g = device.array(np.ones(5, np.float32))
    optimizer = gpu_adam.Adam()
    for pair in ((memory[:5], memory[4:9]), (memory[4:9], memory[:5]), (memory[:5], memory[:3])):
        with (
            unchanged(optimizer, memory),
            pytest.raises(ArgumentValueError, match=r"must not overlap in memory \(got \d+ shared"),
        ):
            optimizer.apply_gradients([(g[: len(x)], x) for x in pair])
        with unchanged(optimizer, memory), pytest.raises(ArgumentValueError, match="must not overlap in memory"):
            optimizer.build(pair)
    assert optimizer.apply_gradients([(g, memory[:5]), (g, memory[5:])]) == 1
    assert len(optimizer.weights) == 5


def test_one_memory_under_two_names_is_one_variable(device: Device) -> None:
    memory = device.array(np.zeros(5, np.float32))
    optimizer, oracle = gpu_adam.Adam(), reference.Adam([np.zeros(5, np.float32)])
    g = np.ones(5, np.float32)
    for _ in range(2):
        optimizer.apply_gradients([(device.array(g), memory[:]), (device.array(g), memory)])
        oracle.step_pairs([(g, 0), (g, 0)])
    assert_same_bits(device.numpy(memory), oracle.variables[0])
    assert len(optimizer.weights) == 3
