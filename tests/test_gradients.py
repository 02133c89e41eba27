"""Gradients: their forms, and clipping by value, by each norm, by the norm over all, on the raw values of slices."""

import math
from typing import Any

import numpy as np
import pytest
import reference
from reference import Array, assert_same_bits, clipped_by_global_norm, clipped_by_norm, densified
from snapshots import unchanged

import gpu_adam
from gpu_adam import IndexedSlices, Variable, kernels
from gpu_adam.devices import Device, find_device
from gpu_adam.errors import ArgumentValueError

REAL = ["float32", "float64"]
SHAPES = [(), (3,), (5, 7), (0, 3), (kernels.CHUNK - 1,), (kernels.CHUNK + 1,), (3, kernels.CHUNK)]
# Multiplier, divisor, product and quotient round once in the dtype. In float64 so do the squares and their sums, here
# in lanes of a chunk and two binary trees and in the oracle in NumPy's order; the root halves that.
ROUNDINGS = {"float32": 4, "float64": 4 + 20}


def numbers(seed: int, dtype: str, scale: float = 1.0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [np.asarray(scale * rng.standard_normal(shape), dtype) for shape in SHAPES]


def used(device: Device, gradients: list[Any], **config: Any) -> list[Array]:
    """What the gradients are after clipping: m after one step with beta_1 = 0."""
    variables = [Variable(np.zeros(g.shape, g.dtype)) for g in gradients]
    optimizer = gpu_adam.Adam(beta_1=0.0, **config)
    optimizer.apply_gradients([(device.array(g), v) for g, v in zip(gradients, variables, strict=True)])
    return [optimizer.get_slot(variable, "m").numpy() for variable in variables]


def assert_close(actual: Array, expected: Array) -> None:
    """Within the roundings of one element."""
    assert actual.shape == expected.shape
    tolerance = ROUNDINGS[actual.dtype.name] * float(np.finfo(actual.dtype).eps) / 2
    np.testing.assert_allclose(actual.astype(np.float64), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", REAL)
def test_by_value(device: Device, dtype: str) -> None:
    gradients = numbers(1, dtype)
    for bound in (0.5, 1e-3, 100.0):
        for g, clipped in zip(gradients, used(device, gradients, clipvalue=bound), strict=True):
            assert_same_bits(clipped, np.clip(g, -np.dtype(dtype).type(bound), np.dtype(dtype).type(bound)))


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("limit", [1e-3, 1.0, 1.5, 50.0, 1e6])
def test_by_each_norm(device: Device, dtype: str, limit: float) -> None:
    gradients = numbers(2, dtype)
    for g, clipped in zip(gradients, used(device, gradients, clipnorm=limit), strict=True):
        assert_close(clipped, clipped_by_norm(g, limit))


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("limit", [1e-3, 1.0, 50.0, 1e6])
def test_by_the_norm_over_all(device: Device, dtype: str, limit: float) -> None:
    gradients = numbers(3, dtype)
    for actual, expected in zip(
        used(device, gradients, global_clipnorm=limit), clipped_by_global_norm(gradients, limit), strict=True
    ):
        assert_close(actual, expected)


@pytest.mark.parametrize("dtype", REAL)
def test_by_value_first(device: Device, dtype: str) -> None:
    gradients = numbers(4, dtype)
    real = np.dtype(dtype).type
    bounded = [np.clip(g, -real(0.5), real(0.5)) for g in gradients]
    for g, clipped in zip(bounded, used(device, gradients, clipvalue=0.5, clipnorm=1.5), strict=True):
        assert_close(clipped, clipped_by_norm(g, 1.5))
    for actual, expected in zip(
        used(device, gradients, clipvalue=0.5, global_clipnorm=1.5), clipped_by_global_norm(bounded, 1.5), strict=True
    ):
        assert_close(actual, expected)


def test_the_norm_over_all_dtypes_and_slices(device: Device) -> None:
    """One norm over float32 and float64, whole gradients and raw values of slices, in which a row may come twice."""
    rng = np.random.default_rng(5)
    single, double = rng.standard_normal((9, 4)).astype(np.float32), rng.standard_normal(5000)
    values, indices = rng.standard_normal((700, 6)).astype(np.float32), rng.integers(0, 90, 700)
    more, rows = rng.standard_normal(2), np.array([2, 2])
    gradients: list[Any] = [single, IndexedSlices(device.array(values), device.array(indices)), double]
    gradients.append(IndexedSlices(device.array(more), device.array(rows)))
    shapes: list[Any] = [(9, 4), (90, 6), (5000,), (4,)]
    dtypes = ["float32", "float32", "float64", "float64"]
    variables = [Variable(np.zeros(shape, dtype)) for shape, dtype in zip(shapes, dtypes, strict=True)]
    for limit in (2.0, 1e5):
        optimizer = gpu_adam.Adam(beta_1=0.0, global_clipnorm=limit)
        pairs = [
            (g if isinstance(g, IndexedSlices) else device.array(g), v)
            for g, v in zip(gradients, variables, strict=True)
        ]
        optimizer.apply_gradients(pairs)
        clipped = clipped_by_global_norm([single, values, double, more], limit)
        for k in (0, 2):
            assert_close(optimizer.get_slot(variables[k], "m").numpy(), clipped[k])
        for k, where in ((1, indices), (3, rows)):
            expected = densified(clipped[k], where, np.zeros(shapes[k]))
            summed = densified(np.abs(clipped[k]), where, np.zeros(shapes[k]))
            # The sum of a row rounds once more for each of its occurrences.
            eps = float(np.finfo(dtypes[k]).eps) * (np.bincount(where).max() + ROUNDINGS[dtypes[k]])
            assert (np.abs(optimizer.get_slot(variables[k], "m").numpy() - expected) <= eps * summed).all()


@pytest.mark.parametrize("dtype", REAL)
def test_slices_are_clipped_before_they_are_summed(device: Device, dtype: str) -> None:
    """Two equal rows of norm 1: the raw values have the norm √2, their sum would have 2."""
    values = np.array([[0.6, 0.8], [0.6, 0.8]], dtype)
    root = math.sqrt(2)
    cases: list[tuple[dict[str, Any], float]] = [
        ({"clipnorm": 1.0}, 2 / root), ({"clipnorm": 1.5}, 2.0), ({"global_clipnorm": 1.0}, 2 / root),
    ]  # fmt: skip
    for config, factor in cases:
        variable, optimizer = Variable(np.zeros((3, 2), dtype)), gpu_adam.Adam(beta_1=0.0, **config)
        optimizer.apply_gradients([(IndexedSlices(device.array(values), device.array(np.array([1, 1]))), variable)])
        m = optimizer.get_slot(variable, "m").numpy()
        np.testing.assert_allclose(m[1], factor * values[0], rtol=4 * float(np.finfo(dtype).eps))
        assert not m[[0, 2]].any()
    variable, optimizer = Variable(np.zeros((3, 2), dtype)), gpu_adam.Adam(beta_1=0.0, clipvalue=0.7)
    optimizer.apply_gradients([(IndexedSlices(device.array(values), device.array(np.array([1, 1]))), variable)])
    bounded = np.minimum(values[0], np.dtype(dtype).type(0.7))
    assert_same_bits(optimizer.get_slot(variable, "m").numpy()[1], bounded + bounded)


def test_a_norm_that_float32_cannot_hold(device: Device) -> None:
    """The sum of squares is float64: 1e30 squared, and 1e-30 squared, too. Nor need the factor be a normal float32."""
    for size, limit in ((1e30, 1.0), (1e-30, 1e-30), (1e-30, 1e-6), (3e38, 1.0), (3e38, 1e-9)):
        g = np.full(4, size, np.float32)
        (clipped,) = used(device, [g], clipnorm=limit)
        assert_close(clipped, clipped_by_norm(g, limit))
        (clipped,) = used(device, [g], global_clipnorm=limit)
        assert_close(clipped, clipped_by_norm(g, limit))


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("kind", ["clipnorm", "global_clipnorm"])
def test_zeros_stay_zeros(device: Device, dtype: str, kind: str) -> None:
    limit: dict[str, Any] = {kind: 1.0}
    gradients = [np.zeros(5, dtype), np.zeros((0, 3), dtype)]
    for clipped in used(device, gradients, **limit):
        assert not clipped.any()
    for g in gradients:
        used(device, [g], **limit)
    variable, optimizer = Variable(np.ones((4, 2), dtype)), gpu_adam.Adam(**limit)
    slices = IndexedSlices(device.array(np.zeros((0, 2), dtype)), device.array(np.zeros(0, np.int64)))
    optimizer.apply_gradients([(slices, variable)])
    assert variable.numpy().tolist() == np.ones((4, 2)).tolist()


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_norms_that_are_not_finite_make_nan(device: Device, dtype: str, bad: float) -> None:
    """Of every element that the norm covers, and of no other."""
    broken, whole = np.array([1, bad, 2], dtype), np.array([3, 4], dtype)
    each = used(device, [broken, whole], clipnorm=1.0)
    assert np.isnan(each[0]).all()
    assert_close(each[1], clipped_by_norm(whole, 1.0))
    for clipped in used(device, [whole, broken], global_clipnorm=1.0):
        assert np.isnan(clipped).all()
    slices = IndexedSlices(device.array(broken), device.array(np.array([0, 1, 1])))
    variable, other = Variable(np.zeros(3, dtype)), Variable(np.zeros(2, dtype))
    optimizer = gpu_adam.Adam(beta_1=0.0, clipnorm=1.0)
    optimizer.apply_gradients([(slices, variable), (device.array(whole), other)])
    assert np.isnan(optimizer.get_slot(variable, "m").numpy()).tolist() == [True, True, False]
    assert np.isfinite(other.numpy()).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(device: Device, bad: float) -> None:
    """A clipvalue bounds infinity and keeps NaN; a norm after it sees what it left."""
    g = np.array([bad, 0.5, -9], np.float32)
    bounded = np.clip(g, np.float32(-1), np.float32(1))
    assert_same_bits(used(device, [g], clipvalue=1)[0], bounded)
    clipped = used(device, [g], clipvalue=1, clipnorm=1)[0]
    if math.isnan(bad):
        assert np.isnan(clipped).all()
    else:
        assert_close(clipped, clipped_by_norm(bounded, 1.0))


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("kind", ["clipvalue", "clipnorm", "global_clipnorm"])
@pytest.mark.parametrize("limit", [math.inf, 1e38, 1e300])
def test_a_limit_beyond_all_gradients_changes_little(device: Device, dtype: str, kind: str, limit: float) -> None:
    """An infinite limit may be refused; a gradient within the limit must not become NaN or zero."""
    g = np.array([3.0, -40.0, 1e-3], dtype)
    try:
        (clipped,) = used(device, [g], **{kind: limit})
    except ArgumentValueError as error:
        assert math.isinf(limit)
        assert error.argument == kind  # noqa: PT017
    else:
        assert_close(clipped, g.astype(np.float64))


def test_steps_with_clipping_have_the_bits_of_clipped_gradients(device: Device) -> None:
    """Over several steps, with AMSGrad: nothing but the gradient is another."""
    initial, config = numbers(6, "float32"), {"learning_rate": 0.1, "amsgrad": True}
    variables = [Variable(x) for x in initial]
    optimizer, oracle = gpu_adam.Adam(clipvalue=0.25, **config), reference.Adam(initial, **config)  # type: ignore[arg-type]
    for step in range(3):
        gradients = numbers(7 + step, "float32")
        optimizer.apply_gradients([(device.array(g), v) for g, v in zip(gradients, variables, strict=True)])
        oracle.step([np.clip(g, np.float32(-0.25), np.float32(0.25)) for g in gradients])
    for variable, expected in zip(variables, oracle.variables, strict=True):
        assert_same_bits(variable.numpy(), expected)


def test_gradients_are_left_as_they_are(device: Device) -> None:
    variable, g = Variable(np.zeros(3)), device.array(np.array([3.0, 4, 5]))
    configs: list[dict[str, Any]] = [{"clipvalue": 1}, {"clipnorm": 1}, {"global_clipnorm": 1}]
    for config in configs:
        with unchanged(gpu_adam.Adam(), g):
            gpu_adam.Adam(**config).apply_gradients([(g, variable)])


def test_clipping_is_switched_from_step_to_step(device: Device) -> None:
    """Also for the same arrays, of which nothing is looked at anew."""
    g, h = np.array([3.0, 4.0]), np.array([6.0, 8.0, 0.0])
    a, b = Variable(np.zeros(2)), Variable(np.zeros(3))
    pairs = [(device.array(g), a), (device.array(h), b)]
    optimizer = gpu_adam.Adam(beta_1=0.0)
    settings: list[tuple[dict[str, Any], float, float]] = [
        ({}, 1, 1), ({"clipnorm": 1}, 1 / 5, 1 / 10), ({"clipnorm": 2}, 2 / 5, 2 / 10), ({"clipnorm": None}, 1, 1),
        ({"global_clipnorm": 1}, 1 / math.sqrt(125), 1 / math.sqrt(125)), ({"global_clipnorm": None}, 1, 1),
    ]  # fmt: skip
    for setting, factor, other_factor in settings:
        for name, value in setting.items():
            setattr(optimizer, name, value)
        for _ in range(2):
            optimizer.apply_gradients(pairs)
            np.testing.assert_allclose(optimizer.get_slot(a, "m").numpy(), factor * g, rtol=1e-15)
            np.testing.assert_allclose(optimizer.get_slot(b, "m").numpy(), other_factor * h, rtol=1e-15)


def test_the_number_of_values_may_grow_and_shrink(device: Device) -> None:
    """Partial sums of an earlier step must not count."""
    table, optimizer = Variable(np.zeros((40, 16))), gpu_adam.Adam(beta_1=0.0, global_clipnorm=1.0)
    for count in (1, 3 * kernels.CHUNK // 16, 2, 0, kernels.CHUNK // 16):
        values, indices = np.ones((count, 16)), np.arange(count) % 40
        optimizer.apply_gradients([(IndexedSlices(device.array(values), device.array(indices)), table)])
        norm = max(math.sqrt(16 * count), 1.0)
        expected = np.repeat(np.bincount(indices, minlength=40)[:, None], 16, axis=1) / norm
        np.testing.assert_allclose(optimizer.get_slot(table, "m").numpy(), expected, rtol=1e-13)


def test_one_variable_twice_with_norms(device: Device) -> None:
    """Each of its gradients has its own norm."""
    variable, optimizer = Variable(np.zeros(2)), gpu_adam.Adam(beta_1=0.0, clipnorm=1.0)
    g, h = np.array([3.0, 4.0]), np.array([0.0, 0.5])
    optimizer.apply_gradients([(device.array(g), variable), (device.array(h), variable)])
    np.testing.assert_allclose(optimizer.get_slot(variable, "m").numpy(), h, rtol=1e-15)
    optimizer.clipnorm, optimizer.global_clipnorm = None, 1.0
    optimizer.apply_gradients([(device.array(g), variable), (device.array(h), variable)])
    np.testing.assert_allclose(optimizer.get_slot(variable, "m").numpy(), h / math.sqrt(25.25), rtol=1e-15)


def test_no_norm_over_several_devices(device: Device) -> None:
    """Each device's variables are a step of their own; on one device there is nothing to refuse."""
    here, host = Variable(np.ones(2)), Variable(np.ones(2), device="host")
    optimizer = gpu_adam.Adam(global_clipnorm=1.0)
    pairs = [(device.array(np.ones(2)), here), (find_device("host").array(np.ones(2)), host)]
    if device.name == "host":
        assert optimizer.apply_gradients(pairs) == 1
        return
    with unchanged(optimizer, here, host), pytest.raises(ArgumentValueError, match="must be taken over one device"):
        optimizer.apply_gradients(pairs)
    optimizer.global_clipnorm = None
    assert optimizer.apply_gradients(pairs) == 1


def test_one_kind_of_norm_at_a_time() -> None:
    optimizer = gpu_adam.Adam(clipnorm=1.0)
    with pytest.raises(ArgumentValueError, match="clipnorm must not be set together with global_clipnorm"):
        optimizer.global_clipnorm = 2.0
    assert optimizer.global_clipnorm is None
    assert optimizer.clipnorm == 1.0
    optimizer.clipnorm = None
    optimizer.global_clipnorm = 2.0
    with pytest.raises(ArgumentValueError, match="clipnorm must not be set together with global_clipnorm"):
        optimizer.clipnorm = 1.0
    optimizer.clipvalue = 3
    assert (optimizer.clipnorm, optimizer.global_clipnorm, optimizer.clipvalue) == (None, 2.0, 3.0)


# What counts as a gradient.

RNG = np.random.default_rng(1)
A, C = (RNG.standard_normal(shape).astype(np.float32) for shape in ((3, 2), ()))
G = RNG.standard_normal((3, 2)).astype(np.float32)


def assert_variables(variables: list[Variable], oracle: reference.Adam) -> None:
    for k, (variable, expected) in enumerate(zip(variables, oracle.variables, strict=True)):
        assert_same_bits(variable.numpy(), expected, f"variable {k}")


def test_forms_of_a_gradient(device: Device) -> None:
    """Lists, numbers, Variables, strided arrays and subclasses count as what they hold."""
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    base = device.array(values)
    transposed = device.array(np.ascontiguousarray(values[:, ::2].T)).T
    forms = [
        values[:, ::2].tolist(),
        tuple(map(tuple, values[:, ::2].tolist())),
        base[:, ::2],
        transposed,
        device.array(values[::-1, ::2])[::-1],
        Variable(values[:, ::2]),
        device.array(values[:, ::2]),
    ]
    for form in forms:
        variable, scalar = Variable(A), Variable(C)
        optimizer, oracle = gpu_adam.Adam(), reference.Adam([A, C])
        for _ in range(3):
            optimizer.apply_gradients([(form, variable), (2, scalar)])
            oracle.step([values[:, ::2], np.float32(2)])
        assert_variables([variable, scalar], oracle)


class Subclass(np.ndarray[Any, Any]):
    """As masked arrays and units are."""


def test_a_gradient_as_a_numpy_subclass() -> None:
    variable, scalar = Variable(A, device="host"), Variable(C, device="host")
    optimizer, oracle = gpu_adam.Adam(), reference.Adam([A, C])
    for kind in (Subclass, np.ndarray, np.ma.MaskedArray):
        optimizer.apply_gradients([(G.view(kind), variable), (np.float32(2), scalar)])
        oracle.step([G, np.float32(2)])
        assert_variables([variable, scalar], oracle)


def test_a_gradient_at_an_odd_address() -> None:
    memory = np.zeros(4 * A.size + 1, np.uint8)
    gradient = memory[1:].view(np.float32).reshape(A.shape)
    gradient[...] = G
    variable, oracle = Variable(A, device="host"), reference.Adam([A])
    optimizer = gpu_adam.Adam()
    for _ in range(2):
        optimizer.apply_gradients([(gradient, variable)])
        oracle.step([G])
    assert_variables([variable], oracle)
