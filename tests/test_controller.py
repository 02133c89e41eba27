"""apply_gradients: what counts as pairs, gradients and variables, in which order they are used, what is refused."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import reference
from reference import assert_same_bits
from snapshots import unchanged

import gpu_adam
from gpu_adam import IndexedSlices, Variable, kernels
from gpu_adam.devices import Device
from gpu_adam.devices.recording import RecordingDevice
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError

RNG = np.random.default_rng(1)
A, B, C = (RNG.standard_normal(shape).astype(np.float32) for shape in ((3, 2), (5,), ()))
GRADIENTS = [RNG.standard_normal(x.shape).astype(np.float32) for x in (A, B, C)]


def stepped(device: Device, steps: int = 1) -> tuple[gpu_adam.Adam, list[Variable], list[Any]]:
    """An optimizer, its variables and gradients, after some steps."""
    optimizer, variables = (
        gpu_adam.Adam(0.1),
        [Variable(x, name=name) for name, x in zip("abc", (A, B, C), strict=True)],
    )
    gradients = [device.array(g) for g in GRADIENTS]
    for _ in range(steps):
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
    return optimizer, variables, gradients


def oracle_after(steps: int) -> reference.Adam:
    oracle = reference.Adam([A, B, C], 0.1)
    for _ in range(steps):
        oracle.step(GRADIENTS)
    return oracle


def assert_variables(variables: list[Variable], oracle: reference.Adam) -> None:
    for variable, expected in zip(variables, oracle.variables, strict=True):
        assert_same_bits(variable.numpy(), expected, variable.name)


def test_pairs_may_be_any_iterable(device: Device) -> None:
    optimizer, variables, gradients = stepped(device, 0)
    pairs = list(zip(gradients, variables, strict=True))

    def generated() -> Iterator[Any]:
        yield from pairs

    by_name = dict(zip("abc", pairs, strict=True))
    kinds: list[Any] = [pairs, tuple(pairs), iter(pairs), generated(), [list(pair) for pair in pairs], by_name.values()]
    for step, kind in enumerate(kinds, 1):
        done = optimizer.apply_gradients(kind, name="ignored")
        assert type(done) is int
        assert done == step == optimizer.iterations
        assert_variables(variables, oracle_after(step))


def test_order_of_pairs_is_free(device: Device) -> None:
    optimizer, variables, gradients = stepped(device)
    optimizer.apply_gradients(list(zip(gradients, variables, strict=True))[::-1])
    assert_variables(variables, oracle_after(2))
    assert [weight.name for weight in optimizer.weights[1:4]] == ["Adam/a/m", "Adam/b/m", "Adam/c/m"]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (None, r"grads_and_vars must be given where no gradients have been accumulated \(got None\); pass a list"),
        (3, r"must be an iterable of .* \(got int\)"),
        ("ab", r"grads_and_vars must be an iterable of .* \(got str\)"),
        (np.array(1.0), r"grads_and_vars must be an iterable of .* \(got ndarray\)"),
        ([None], r"grads_and_vars\[0\] must be a .* pair \(got NoneType\)"),
        ([()], r"\(got tuple of length 0\)"),
        ([(np.ones(1),)], r"\(got tuple of length 1\)"),
        ([(np.ones(1), np.ones(1), 3)], r"\(got tuple of length 3\)"),
        ({"a": 1}, r"\(got str of length 1\)"),
        (np.ones((2, 2)), r"\(got ndarray of length 2\)"),
        ([(np.ones(1), None)], r"the variable of grads_and_vars\[0\] must be a Variable or a writeable device array"),
        ([(np.ones(1), 1.0)], r"\(got float\); wrap the value in gpu_adam.Variable"),
        ([(np.ones(1), [1.0])], r"\(got list\)"),
        ([(np.ones(1), np.float64(1))], r"\(got float64\)"),
        ([(np.ones(1), "w")], r"\(got str\)"),
    ],
)
def test_malformed_pairs(device: Device, pairs: Any, message: str) -> None:
    optimizer, variables, gradients = stepped(device)
    with unchanged(optimizer, *variables), pytest.raises(ArgumentTypeError, match=message):
        optimizer.apply_gradients(pairs)
    if isinstance(pairs, list):
        message = message.replace(r"\[0\]", r"\[1\]")
        with unchanged(optimizer, *variables), pytest.raises(ArgumentTypeError, match=message):
            optimizer.apply_gradients([(gradients[0], variables[0]), *pairs])


def test_a_swapped_pair(device: Device) -> None:
    optimizer, variables, gradients = stepped(device)
    message = r"grads_and_vars\[0\] must be \(gradient, variable\), in this order .*; swap the two"
    with unchanged(optimizer, *variables), pytest.raises(ArgumentTypeError, match=message):
        optimizer.apply_gradients([(variables[0], gradients[0])])
    with unchanged(optimizer, *variables), pytest.raises(ArgumentTypeError, match=message):
        optimizer.apply_gradients([(variables[0], None)])


def test_an_iterator_that_raises(device: Device) -> None:
    optimizer, variables, gradients = stepped(device)

    def failing() -> Iterator[Any]:
        yield gradients[0], variables[0]
        raise KeyError("the caller's own")

    with unchanged(optimizer, *variables), pytest.raises(KeyError, match="the caller's own"):
        optimizer.apply_gradients(failing())


def test_no_gradients(device: Device) -> None:
    for optimizer, variables, _ in (stepped(device, 0), stepped(device)):
        with (
            unchanged(optimizer, *variables),
            pytest.raises(ArgumentValueError, match=r"at least one .* \(got no pairs\)"),
        ):
            optimizer.apply_gradients([])
        with (
            unchanged(optimizer, *variables),
            pytest.raises(ArgumentValueError, match=r"got none for \['a', 'b', 'c'\]"),
        ):
            optimizer.apply_gradients([(None, variable) for variable in variables])


def test_some_gradients_none(device: Device) -> None:
    """They are named in one warning; their variables get no slots and no step."""
    optimizer, variables, gradients = stepped(device, 0)
    a, b, c = variables
    oracle = oracle_after(0)
    for step in (1, 2):
        with pytest.warns(UserWarning, match=r"no gradient for the variables \['a', 'c'\]") as warnings:
            assert optimizer.apply_gradients([(None, a), (gradients[1], b), (None, c)]) == step
        assert len(warnings) == 1
        assert warnings[0].filename == __file__
        oracle.step([None, GRADIENTS[1], None])
        assert_variables(variables, oracle)
    assert [weight.name for weight in optimizer.weights] == ["Adam/iter", "Adam/b/m", "Adam/b/v"]
    optimizer.apply_gradients(zip(gradients, variables, strict=True))
    oracle.step(GRADIENTS)
    assert_variables(variables, oracle)


def test_a_warning_turned_into_an_error_changes_nothing(device: Device) -> None:
    optimizer, variables, gradients = stepped(device)
    with unchanged(optimizer, *variables), pytest.raises(UserWarning):
        optimizer.apply_gradients([(None, variables[0]), (gradients[1], variables[1])])


def test_variables_that_come_later(device: Device) -> None:
    """They use the optimizer's t, and their slots follow the others."""
    optimizer, variables, gradients = stepped(device, 0)
    oracle = oracle_after(0)
    for count in (1, 1, 3, 2, 3):
        optimizer.apply_gradients(zip(gradients[:count], variables[:count], strict=True))
        oracle.step([*GRADIENTS[:count], *[None] * (3 - count)])
        assert_variables(variables, oracle)
    assert [weight.name for weight in optimizer.weights] == [
        f"Adam/{name}" for name in ("iter", "a/m", "a/v", "b/m", "c/m", "b/v", "c/v")
    ]


def test_the_same_variable_twice(device: Device) -> None:
    """Two updates in order, with the same t; the step counts once."""
    optimizer, variables, _ = stepped(device, 0)
    oracle = oracle_after(0)
    first, second = (np.full((3, 2), x, np.float32) for x in (1, -3))
    a, b, _ = variables
    for step in (1, 2, 3):
        pairs = [(first, 0), (GRADIENTS[1], 1), (second, 0), (first, 0)]
        oracle.step_pairs(pairs)
        assert optimizer.apply_gradients([(device.array(g), (a, b)[k]) for g, k in pairs]) == step
        assert_variables(variables, oracle)
    assert len(optimizer.weights) == 5


def test_no_launch_has_a_variable_twice(device: Device) -> None:
    """Two updates of one element in one launch could run in any order, or at once. Each variable here has one block."""
    recording = RecordingDevice(device)
    a, b, c = (Variable(x, device=recording) for x in (A, B, C))
    g, h, k = (device.array(gradient) for gradient in GRADIENTS)
    recording.events.clear()
    gpu_adam.Adam().apply_gradients([(g, a), (h, b), (g, a), (k, c), (k, c), (g, a)])
    launches = [event for event in recording.events if event.kind == "launch"]
    assert [(event.name, event.amount) for event in launches] == [("dense", 3), ("dense", 2), ("dense", 1)]


@pytest.mark.parametrize("reuse", [False, True])
def test_many_steps_with_the_same_or_with_new_arrays(device: Device, reuse: bool) -> None:
    """What is kept from the last step is not taken for this one's: contents, sets of variables and settings change."""
    optimizer, variables, gradients = stepped(device, 0)
    oracle = oracle_after(0)
    rng = np.random.default_rng(3)
    for step in range(20):
        numbers = [rng.standard_normal(g.shape).astype(np.float32) for g in GRADIENTS]
        if reuse:
            for gradient, values in zip(gradients, numbers, strict=True):
                gradient[...] = device.array(values)
        else:
            gradients = [device.array(values) for values in numbers]
        optimizer.amsgrad = oracle.amsgrad = step >= 12
        optimizer.learning_rate = oracle.learning_rate = 0.1 / (step + 1)
        used = [k for k in range(3) if step % 4 != k]
        optimizer.apply_gradients([(gradients[k], variables[k]) for k in used])
        oracle.step([numbers[k] if k in used else None for k in range(3)])
        assert_variables(variables, oracle)


def test_more_sets_of_variables_than_are_kept(device: Device) -> None:
    rng = np.random.default_rng(4)
    initial = [rng.standard_normal(3) for _ in range(12)]
    variables, oracle, optimizer = [Variable(x) for x in initial], reference.Adam(initial), gpu_adam.Adam()
    for step in range(30):
        k = step % 12
        g = rng.standard_normal(3)
        optimizer.apply_gradients([(device.array(g), variables[k])])
        oracle.step_pairs([(g, k)])
    assert_variables(variables, oracle)


def test_gradients_are_not_kept_alive(device: Device) -> None:
    optimizer, variables, _ = stepped(device)
    gradients = [device.array(g) for g in GRADIENTS]
    optimizer.apply_gradients(zip(gradients, variables, strict=True))
    optimizer.apply_gradients(zip(gradients, variables, strict=True))
    watched = [weakref.ref(g) for g in gradients]
    del gradients
    gc.collect()
    assert [ref() for ref in watched] == [None] * 3


def test_what_a_rejected_call_brought_is_not_kept_alive(device: Device) -> None:
    optimizer, variables, gradients = stepped(device)
    raw = device.array(A)
    watched = weakref.ref(raw)
    with pytest.raises(ArgumentValueError, match="must have shape"):
        optimizer.apply_gradients([(gradients[0], raw), (gradients[0], variables[1])])
    with pytest.raises(ArgumentTypeError, match="must be a Variable"):
        optimizer.build([raw, "x"])
    del raw
    gc.collect()
    assert watched() is None


def test_dtypes_mixed_in_one_step(device: Device) -> None:
    rng = np.random.default_rng(5)
    initial = [rng.standard_normal(4).astype(dtype) for dtype in ("float32", "float64", "float32", "float64")]
    variables, oracle, optimizer = [Variable(x) for x in initial], reference.Adam(initial, 0.1), gpu_adam.Adam(0.1)
    for _ in range(3):
        gradients = [rng.standard_normal(4).astype(x.dtype) for x in initial]
        optimizer.apply_gradients(zip(map(device.array, gradients), variables, strict=True))
        oracle.step(gradients)
        assert_variables(variables, oracle)
    assert [str(weight.dtype) for weight in optimizer.weights] == ["int64", *["float32", "float64"] * 4]


@pytest.mark.parametrize("dtype", ["float16", "int32", "int64", "bool", "uint8", "complex64"])
def test_dtypes_that_are_not_computed_with(device: Device, dtype: str) -> None:
    if dtype in kernels.DTYPES:
        assert gpu_adam.Adam().apply_gradients([(device.array(np.ones(2, dtype)), Variable(np.ones(2, dtype)))]) == 1
        return
    optimizer, variables, gradients = stepped(device)
    other = Variable(np.ones(2, dtype), name="other")
    message = rf"variable 'other' must have one of the dtypes float32, .* \(got {dtype}\)"
    with unchanged(optimizer, other, *variables), pytest.raises(ArgumentValueError, match=message):
        optimizer.apply_gradients([(gradients[0], variables[0]), (device.array(np.ones(2, dtype)), other)])


def test_shapes_without_elements_and_without_axes(device: Device) -> None:
    empty, scalar = Variable(np.zeros((0, 3), np.float32)), Variable(np.float32(1))
    optimizer, oracle = gpu_adam.Adam(), reference.Adam([np.float32(1)])
    for _ in range(3):
        pairs = [(device.array(np.zeros((0, 3), np.float32)), empty), (device.array(np.float32(2)), scalar)]
        optimizer.apply_gradients(pairs)
        oracle.step([np.float32(2)])
    assert_same_bits(scalar.numpy(), oracle.variables[0])
    assert optimizer.get_slot(empty, "m").shape == (0, 3)
    assert gpu_adam.Adam().apply_gradients([(device.array(np.zeros((0, 3), np.float32)), empty)]) == 1


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (
            np.ones((2, 3), np.float32),
            r"gradient of variable 'a' must have shape \(3, 2\) \(got \(2, 3\)\); reshape it",
        ),
        (np.ones((3, 1), np.float32), r"must have shape \(3, 2\) \(got \(3, 1\)\)"),
        (np.ones(2, np.float32), r"must have shape \(3, 2\) \(got \(2,\)\)"),
        (np.ones((1, 3, 2), np.float32), r"must have shape \(3, 2\) \(got \(1, 3, 2\)\)"),
        (np.float32(1), r"must have shape \(3, 2\) \(got \(\)\)|must lie on"),
        (
            np.ones((3, 2), np.float64),
            r"gradient of variable 'a' must have dtype float32.* \(got float64\); cast it",
        ),
        (np.ones((3, 2), np.int32), r"must have dtype float32.* \(got int32\)"),
        (np.ones((3, 2), ">f4"), r"must have dtype float32|must lie on"),
    ],
)
def test_gradients_that_do_not_fit(device: Device, gradient: Any, message: str) -> None:
    for steps in (0, 1, 2):
        optimizer, variables, gradients = stepped(device, steps)
        unfit = device.array(gradient) if gradient.dtype.isnative and gradient.ndim else gradient
        with unchanged(optimizer, *variables), pytest.raises(ArgumentValueError, match=message):
            optimizer.apply_gradients(zip([unfit, *gradients[1:]], variables, strict=True))
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        assert_variables(variables, oracle_after(steps + 1))


@pytest.mark.parametrize("gradient", ["abc", ..., {"a": 1}, ["a", "b"], [[1.0], [2.0, 3.0]]], ids=repr)
def test_gradients_that_are_no_array(device: Device, gradient: Any) -> None:
    optimizer, variables, _ = stepped(device)
    with unchanged(optimizer, *variables), pytest.raises(ArgumentTypeError, match="gradient of variable 'a'"):
        optimizer.apply_gradients([(gradient, variables[0])])


class Elsewhere:
    """An array of a device that nobody has."""

    dtype, shape, device = np.dtype(np.float32), (3, 2), "elsewhere"

    def __dlpack_device__(self) -> tuple[int, int]:
        return 4, 0

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("not here")


def test_arrays_of_another_device(device: Device) -> None:
    """NumPy's arrays on a CUDA device too: nothing is copied without being asked for."""
    optimizer, variables, gradients = stepped(device)
    foreign = Elsewhere() if device.name == "host" else A
    error = ArgumentTypeError if device.name == "host" else ArgumentValueError
    message = "gradient of variable 'a' must"
    with unchanged(optimizer, *variables), pytest.raises(error, match=message):
        optimizer.apply_gradients(zip([foreign, *gradients[1:]], variables, strict=True))
    rows, indices = device.array(A[:1]), device.array(np.array([1]))
    with unchanged(optimizer, *variables), pytest.raises(error, match="values of variable 'a' must"):
        optimizer.apply_gradients([(IndexedSlices(foreign, indices), variables[0])])
    foreign_indices = Elsewhere() if device.name == "host" else np.array([1])
    with unchanged(optimizer, *variables), pytest.raises(error, match="indices of variable 'a' must"):
        optimizer.apply_gradients([(IndexedSlices(rows, foreign_indices), variables[0])])


def test_untrainable_variables_move_too(device: Device) -> None:
    """What is passed is updated; `trainable` is the caller's own mark."""
    variable = Variable(A, trainable=False)
    gpu_adam.Adam().apply_gradients([(device.array(GRADIENTS[0]), variable)])
    assert (variable.numpy() != A).all()


def test_variables_stay_where_they_are(device: Device) -> None:
    optimizer, variables, gradients = stepped(device)
    places = [device.address(variable.value) for variable in (*variables, *optimizer.weights[1:])]
    arrays = [variable.value for variable in variables]
    with unchanged(gpu_adam.Adam(), *gradients):
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
    assert [device.address(variable.value) for variable in (*variables, *optimizer.weights[1:])] == places
    assert all(variable.value is array for variable, array in zip(variables, arrays, strict=True))


def test_several_optimizers_of_one_variable(device: Device) -> None:
    variable, g = Variable(A), device.array(GRADIENTS[0])
    first, second = gpu_adam.Adam(0.1), gpu_adam.Adam(0.1)
    first.apply_gradients([(g, variable)])
    between = variable.numpy()
    second.apply_gradients([(g, variable)])
    assert_same_bits(first.get_slot(variable, "m").numpy(), second.get_slot(variable, "m").numpy())
    oracle = reference.Adam([between], 0.1)
    oracle.step([GRADIENTS[0]])
    assert_variables([variable], oracle)


def test_a_callable_that_counts_gives_the_step_of_that_count(device: Device) -> None:
    """alpha_t and the counter are those of one t."""
    x, y = (Variable(np.ones(3, np.float32)) for _ in range(2))
    one, other = gpu_adam.Adam(0.1), gpu_adam.Adam(0.1)

    def rate() -> float:
        one.iterations.assign(41)
        return 0.1

    for optimizer, variable in ((one, x), (other, y)):
        optimizer.build([variable])
    one.learning_rate = rate
    other.iterations = 41
    for optimizer, variable in ((one, x), (other, y)):
        optimizer.apply_gradients([(device.array(np.ones(3, np.float32)), variable)])
        assert int(optimizer.iterations) == 42
    assert_same_bits(x.numpy(), y.numpy())
