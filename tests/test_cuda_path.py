"""What the CUDA device asks of a GPU: launches, copies, waits, streams and graphs; and the host device's bits.

Needs a GPU, or the emulated one, which also counts, and runs what is enqueued as late or as oddly as CUDA allows.
"""

import contextlib
import copy
import gc
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from reference import Array, assert_same_bits
from snapshots import unchanged

import gpu_adam
from gpu_adam import IndexedSlices, Variable, devices, kernels
from gpu_adam.devices import Device
from gpu_adam.devices.recording import Event, RecordingDevice
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, GpuAdamError, SparseIndexError
from gpu_adam.hyperparameters import NO_CLIPPING, Cohort, Flavour
from gpu_adam.kernels import UpdateRule
from gpu_adam.state.adam_state import AdamState
from gpu_adam.step.controller import Controller
from gpu_adam.step.gradients import Incoming

HOST = devices.HostDevice(threads=1)


def schedules(gpu: Device) -> list[Callable[[], contextlib.AbstractContextManager[None]]]:
    """In what order work runs that may run later: on a real GPU as it comes, emulated as late as can be, or by lot."""
    if not getattr(gpu.xp, "__emulated__", False):
        return [contextlib.nullcontext]
    asynchronous = importlib.import_module("cupy._emulation").asynchronous
    return [asynchronous, lambda: asynchronous(seed=1)]


def numbers(rng: np.random.Generator, shape: Any, dtype: str = "float32") -> Array:
    x: Array = rng.standard_normal(shape)
    return (x + 1j * rng.standard_normal(shape)).astype(dtype) if np.dtype(dtype).kind == "c" else x.astype(dtype)


def counted(emulation: Any, optimizer: gpu_adam.Adam, pairs: Sequence[tuple[Any, Any]]) -> Any:
    """What one step asks of the device; nothing is left to run before it, nor after this."""
    with emulation.uncounted():
        optimizer.synchronize()
    emulation.reset()
    optimizer.apply_gradients(pairs)
    with emulation.uncounted():
        optimizer.synchronize()
    return emulation.counters


SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "dense": ((), (3,), (17, 15), (4097,), (0, 2)),
    "sparse": ((9, 5), (70,)),
}


class Pairs:
    """A few variables of each kind on a device, and gradients for them.

    Args:
        device: where.
        kind: "dense", "sparse" or "both".
        dtype: of the variables.
        offset: how many elements behind a 16-byte boundary the first variable begins; the next one by one more.
    """

    def __init__(self, device: Device, kind: str, dtype: str = "float32", offset: int = 0) -> None:
        self.device, self.dtype = device, np.dtype(dtype)
        rng = np.random.default_rng(1)
        kinds = ("dense", "sparse") if kind == "both" else (kind,)
        self.shapes = [(kind, shape) for kind in kinds for shape in SHAPES[kind]]
        self.variables = [
            Variable.over(self.placed(numbers(rng, shape, dtype), (offset + k) % 4), device, f"{kind} {shape}")
            for k, (kind, shape) in enumerate(self.shapes)
        ]

    def placed(self, values: Array, offset: int) -> Any:
        """The values on the device, so many elements behind a 16-byte boundary."""
        memory = self.device.array(np.zeros(offset + values.size, self.dtype))
        array = memory[offset:].reshape(values.shape)
        array[...] = self.device.array(values)
        return array

    def gradients(self, seed: int, offset: int = 0, count: int = 40) -> list[Any]:
        """New arrays, sparse ones of `count` rows; the same numbers on every device."""
        rng = np.random.default_rng(seed)
        found: list[Any] = []
        for kind, shape in self.shapes:
            if kind == "dense":
                found.append(self.placed(numbers(rng, shape, self.dtype.name), offset))
            else:
                indices = rng.integers(0, shape[0], count).astype(np.int32 if seed % 2 else np.int64)
                values = numbers(rng, (count, *shape[1:]), self.dtype.name)
                found.append(IndexedSlices(self.placed(values, offset), self.device.array(indices)))
        return found

    def pairs(self, seed: int, offset: int = 0, count: int = 40) -> list[tuple[Any, Any]]:
        """New gradients with their variables."""
        return list(zip(self.gradients(seed, offset, count), self.variables, strict=True))


def state(optimizer: gpu_adam.Adam, variables: Sequence[Variable]) -> dict[str, Array]:
    """All variables and weights, waited for."""
    found = {variable.name: variable.numpy() for variable in variables}
    weights = zip(optimizer.weights, optimizer.get_weights(), strict=True)
    return {**found, **{weight.name: np.asarray(array) for weight, array in weights}}


def assert_same_state(actual: dict[str, Array], expected: dict[str, Array]) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert_same_bits(actual[name], array, name)


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "clipvalue": {"clipvalue": 0.5},
    "clipnorm, amsgrad": {"clipnorm": 1.0, "amsgrad": True},
    "clipvalue, global_clipnorm": {"clipvalue": 0.75, "global_clipnorm": 2.0},
}
NORMS = ("clipnorm, amsgrad", "clipvalue, global_clipnorm")


MODES_OF_ALL = ("plain", "clipnorm, amsgrad")


# Launches.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2, 40])
def test_one_launch_for_any_number_of_dense_variables(gpu: Device, emulation: Any, count: int, mode: str) -> None:
    """With clipping by norm one more."""
    variables = [Variable(np.ones(size, np.float32)) for size in range(1, count + 1)]
    gradients = [gpu.array(np.ones(size, np.float32)) for size in range(1, count + 1)]
    optimizer = gpu_adam.Adam(**MODES[mode])
    norms = {"square_sums": 1} if mode in NORMS else {}
    for _ in range(2):
        counters = counted(emulation, optimizer, list(zip(gradients, variables, strict=True)))
        assert dict(counters.kernels) == {"dense": 1, **norms}


def test_one_launch_for_each_dtype(gpu: Device, emulation: Any) -> None:
    variables = [Variable(np.ones(3, dtype)) for dtype in [*kernels.DTYPES, *reversed(kernels.DTYPES)]]
    gradients = [gpu.array(np.ones(3, variable.dtype)) for variable in variables]
    counters = counted(emulation, gpu_adam.Adam(), list(zip(gradients, variables, strict=True)))
    assert dict(counters.kernels) == {"dense": len(kernels.DTYPES)}


@pytest.mark.parametrize("count", [0, 1, kernels.SORT_RUN, kernels.SORT_RUN + 1])
def test_launches_of_a_sparse_update(gpu: Device, emulation: Any, count: int) -> None:
    """A sort of few indices is one launch; of many, three for each digit of the number of rows, and one before."""
    rows = 300
    variable = Variable(np.ones((rows, 1), np.float32))
    indices = gpu.array(np.arange(count) % rows)
    slices = IndexedSlices(gpu.array(np.ones((count, 1), np.float32)), indices)
    counters = counted(emulation, gpu_adam.Adam(), [(slices, variable)])
    sort: dict[str, int] = {"sort_rows": 1} if count else {}
    if count > kernels.SORT_RUN:
        sort = {"sort_keys": 1, "sort_count": 2, "sort_scan": 2, "sort_scatter": 2}
    assert dict(counters.kernels) == {**sort, "sparse": 1}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["dense", "sparse", "both"])
def test_a_step_waits_for_nothing_and_allocates_nothing(gpu: Device, emulation: Any, kind: str, mode: str) -> None:
    """After the first; and it copies nothing but the addresses of dense gradients, only where they are new."""
    work, optimizer = Pairs(gpu, kind), gpu_adam.Adam(**MODES[mode])
    first, second = work.pairs(1), work.pairs(2)
    optimizer.apply_gradients(first)
    for number, pairs in enumerate((first, second, second, first)):
        counters = counted(emulation, optimizer, pairs)
        assert counters.syncs == []
        assert counters.allocations == counters.device_allocations == 0
        new = kind != "sparse" and number in (1, 3)
        assert counters.h2d == (1 if new else 0)
        assert counters.h2d_bytes == (8 * 4 if new else 0)  # for the four variables that are not empty
        assert counters.d2h == counters.d2d == counters.memsets == 0
        assert not counters.array_functions


def test_waiting_is_noticed(gpu: Device, emulation: Any) -> None:
    """The counters above do count."""
    variable, optimizer = Variable(np.ones(3, np.float32)), gpu_adam.Adam()
    optimizer.apply_gradients([(gpu.array(np.ones(3, np.float32)), variable)])
    optimizer.synchronize()
    emulation.reset()
    variable.numpy()
    optimizer.synchronize()
    gpu.array(np.ones(3, np.float32))
    with emulation.uncounted():
        optimizer.synchronize()
    assert len(emulation.counters.syncs) == 2
    assert (emulation.counters.h2d, emulation.counters.d2h, emulation.counters.allocations) == (1, 1, 1)


GUARDED: dict[str, dict[str, Any]] = {
    "skipping": {"skip_nonfinite": True},
    "loss scale, schedule": {
        "loss_scale": gpu_adam.LossScale(8.0, 2),
        "learning_rate": gpu_adam.ExponentialDecay(0.1, 9, 0.5),
    },
    "everything": {
        "loss_scale": gpu_adam.LossScale(8.0, 2),
        "telemetry": True,
        "global_clipnorm": 1.0,
        "clipvalue": 0.5,
        "learning_rate": lambda: 0.1,
    },
    "each norm": {"skip_nonfinite": True, "telemetry": True, "clipnorm": 1.0},
    "a scale on the device": {},
}


@pytest.mark.parametrize("mode", GUARDED)
@pytest.mark.parametrize("kind", ["dense", "both"])
def test_a_guarded_step_waits_for_nothing(gpu: Device, emulation: Any, kind: str, mode: str) -> None:
    """One report comes back, to pinned memory, and one table of scalars goes there; and nothing waits for either.

    While nothing runs that need not, the table grows with the number of steps that may have been left out.
    """
    work, optimizer = Pairs(gpu, kind), gpu_adam.Adam(**GUARDED[mode])
    given = {} if GUARDED[mode] else {"grad_scale": gpu.array(np.float32(8))}
    pairs = work.pairs(1)
    optimizer.apply_gradients(pairs, **given)
    optimizer.apply_gradients(pairs, **given)
    optimizer.synchronize()
    emulation.reset()
    with emulation.asynchronous():
        for _ in range(5):
            done = optimizer.apply_gradients(pairs, **given)
            assert done is None or given
            if optimizer.flavour.telemetry:
                found = optimizer.read_telemetry()
                assert found is not None
                assert found.step >= 2
        counters = emulation.counters
        assert counters.syncs == []
        assert not counters.array_functions
        with emulation.uncounted():
            optimizer.synchronize()
        assert counters.d2h == 5
        assert counters.d2h_bytes == 5 * kernels.GUARD.itemsize
        assert counters.h2d == 5
        assert counters.kernels["guard_begin"] == counters.kernels["guard_end"] == 5
        if optimizer.flavour.telemetry:
            found = optimizer.read_telemetry()
            assert found is not None
            assert found.step == 7
            assert 0 < found.update_norm < found.param_norm
        assert counters.syncs == []
    assert int(optimizer.iterations) == 7


def test_a_guarded_step_of_cohorts_waits_for_nothing(gpu: Device, emulation: Any) -> None:
    """Parameters of torch under GradScaler are such: each group has numbers of its own, and a count."""
    rule, numbers = UpdateRule(guarded=True, scaled=True), dict.fromkeys(("decay", "weight_decay", "l2"), 0.0)
    numbers |= {"learning_rate": 0.1, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8}
    variables, counts = [Variable(np.ones(3, np.float32)) for _ in range(3)], np.zeros(3, np.float32)
    cohorts = [Cohort(counts, np.array(members)) for members in ([0, 2], [1])]
    for cohort in cohorts:
        cohort.hyper = numbers
    controller = Controller(AdamState("Adam", "abs2"), Flavour())
    controller.set_cohorts(variables, rule, [cohorts[0], cohorts[1], cohorts[0]])
    pairs = [(gpu.array(np.ones(3, np.float32)), variable) for variable in variables]
    scale, good, bad = (gpu.array(np.float32(number)) for number in (8, 0, 1))
    for found in (good, good, bad):
        controller.step(pairs, rule, numbers, NO_CLIPPING, Incoming(scale, found))
    controller.guards.settle()
    emulation.reset()
    with emulation.asynchronous():
        for found in (good, bad, bad, good, bad):
            assert controller.step(pairs, rule, numbers, NO_CLIPPING, Incoming(scale, found)) is None
        counters = emulation.counters
        assert counters.syncs == []
        assert not counters.array_functions
        assert counts.tolist() == [7, 7, 7]
        controller.guards.settle()
        assert counts.tolist() == [4, 4, 4]


def test_iterations_wait_for_the_count(gpu: Device, emulation: Any) -> None:
    """Also where the counter is read as a weight, and exported; a copy of the optimizer begins with it."""
    variable = Variable(np.ones(3, np.float32))
    good, bad = (gpu.array(np.array([1, x, 1], np.float32)) for x in (1, np.nan))
    readings: list[Callable[[gpu_adam.Adam], Any]] = [
        lambda optimizer: optimizer.iterations.numpy(),
        lambda optimizer: optimizer.weights[0].numpy(),
        lambda optimizer: optimizer.export()["iterations"],
        lambda optimizer: copy.deepcopy(optimizer)._state.steps_done,
        lambda optimizer: optimizer.skipped_steps - 1,
    ]
    for reading in readings:
        optimizer = gpu_adam.Adam(skip_nonfinite=True)
        with emulation.asynchronous():
            for gradient in (bad, good, bad):
                optimizer.apply_gradients([(gradient, variable)])
            assert optimizer._state.steps_done == 3
            assert reading(optimizer) == 1


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_host_runs_ahead_of_steps_that_are_left_out(gpu: Device, emulation: Any, seed: int) -> None:
    """Whatever comes back when: the state is that of the good steps, by a schedule, with and without reading."""
    work = Pairs(gpu, "both")
    expected = Pairs(gpu, "both")
    rates = [gpu_adam.ExponentialDecay(0.1, 2, 0.5) for _ in range(2)]
    optimizer, other = gpu_adam.Adam(rates[0], skip_nonfinite=True), gpu_adam.Adam(rates[1])
    rng = np.random.default_rng(seed)
    batches = [(work.pairs(k), expected.pairs(k), rng.random() < 0.4) for k in range(12)]
    for pairs, _, is_bad in batches:
        if is_bad:
            pairs[1][0].reshape(-1)[-1] = np.inf
    with emulation.asynchronous(seed=seed):
        for number, (pairs, _, _) in enumerate(batches):
            optimizer.apply_gradients(pairs)
            if number == 7:
                assert int(optimizer.iterations) == sum(not is_bad for *_, is_bad in batches[:8])
        optimizer.synchronize()
    for _, pairs, is_bad in batches:
        if not is_bad:
            other.apply_gradients(pairs)
    assert_same_state(state(optimizer, work.variables), state(other, expected.variables))
    assert optimizer.skipped_steps == sum(is_bad for *_, is_bad in batches) > 0


def test_a_callable_that_waits_for_the_count_beside_a_schedule(gpu: Device, emulation: Any) -> None:
    """The schedule is asked for the count that turns out, although it was asked before the callable."""
    variables = [Variable(np.ones(3, np.float32)) for _ in range(2)]
    good, bad = (gpu.array(np.array([1, x, 1], np.float32)) for x in (1, np.nan))
    rates = [gpu_adam.ExponentialDecay(0.1, 1, 0.5) for _ in range(2)]
    optimizer, other = gpu_adam.Adam(rates[0], skip_nonfinite=True), gpu_adam.Adam(rates[1])
    with emulation.asynchronous():
        optimizer.apply_gradients([(good, variables[0])])
        optimizer.apply_gradients([(bad, variables[0])])
        optimizer.beta_1 = lambda: 0.5 / int(optimizer.iterations)
        optimizer.apply_gradients([(good, variables[0])])
    other.apply_gradients([(good, variables[1])])
    other.beta_1 = 0.5
    other.apply_gradients([(good, variables[1])])
    assert_same_bits(variables[0].numpy(), variables[1].numpy())


def test_a_scale_on_the_device_that_is_none(gpu: Device) -> None:
    variable, gradient = Variable(np.ones(3, np.float32)), gpu.array(np.ones(3, np.float32))
    optimizer = gpu_adam.Adam()
    for scale, words in (
        (gpu.array(np.ones(1, np.float32)), r"must be a 0-d array \(got shape \(1,\)\)"),
        (gpu.array(np.int64(8)), r"must have dtype float16, float32 or float64 \(got int64\)"),
    ):
        with unchanged(optimizer, variable), pytest.raises(GpuAdamError, match=words):
            optimizer.apply_gradients([(gradient, variable)], grad_scale=scale)
    on_host = Variable(np.ones(3, np.float32), device="host")
    with unchanged(optimizer, on_host), pytest.raises(ArgumentValueError, match="must lie on host"):
        optimizer.apply_gradients([(np.ones(3, np.float32), on_host)], grad_scale=gpu.array(np.float32(8)))


def test_a_constraint_does_not_wait(gpu: Device, emulation: Any) -> None:
    variable = Variable(np.array([1, -1], np.float32), constraint=lambda v: np.maximum(v, 0))
    optimizer, pairs = gpu_adam.Adam(), [(gpu.array(np.ones(2, np.float32)), variable)]
    optimizer.apply_gradients(pairs)
    optimizer.synchronize()  # or what the first step copies may be counted as the second one's
    emulation.reset()
    optimizer.apply_gradients(pairs)
    assert not emulation.counters.syncs
    assert emulation.counters.h2d == emulation.counters.d2h == 0
    assert variable.numpy()[1] == 0


# Streams.


@pytest.mark.parametrize("mode", MODES_OF_ALL)
def test_steps_run_on_the_current_stream(gpu: Device, mode: str) -> None:
    """Waiting for that stream alone is enough, and where it is logged, everything ran there."""
    cupy = gpu.xp
    emulated = getattr(cupy, "__emulated__", False)
    expected, host_optimizer = Pairs(HOST, "both"), gpu_adam.Adam(0.1, **MODES[mode])
    for seed in range(3):
        host_optimizer.apply_gradients(expected.pairs(seed))
    for schedule in schedules(gpu):
        stream = cupy.cuda.Stream(non_blocking=True)
        with schedule():
            with stream:
                work, optimizer = Pairs(gpu, "both"), gpu_adam.Adam(0.1, **MODES[mode])
                if emulated:
                    importlib.import_module("cupy._emulation").reset()
                for seed in range(3):
                    optimizer.apply_gradients(work.pairs(seed))
                if emulated:
                    log = importlib.import_module("cupy._emulation").counters.launch_log
                    assert {entry[4] for entry in log} == {stream.ptr}
                actual = state(optimizer, work.variables)
            assert_same_state(actual, state(host_optimizer, expected.variables))


@pytest.mark.parametrize("kind", ["dense", "both"])
def test_gradients_that_change_every_step(gpu: Device, kind: str) -> None:
    """New arrays, released at once, while earlier steps may not have run: their addresses wait in pinned buffers."""
    expected, host_optimizer = Pairs(HOST, kind), gpu_adam.Adam(0.1)
    for seed in range(12):
        host_optimizer.apply_gradients(expected.pairs(seed, seed % 4))
    for schedule in schedules(gpu):
        with schedule():
            work, optimizer = Pairs(gpu, kind), gpu_adam.Adam(0.1)
            for seed in range(12):
                optimizer.apply_gradients(work.pairs(seed, seed % 4))
            assert_same_state(state(optimizer, work.variables), state(host_optimizer, expected.variables))


def test_gradients_that_take_turns(gpu: Device) -> None:
    """Two sets of arrays, with contents that change between steps."""
    expected, host_optimizer = Pairs(HOST, "dense"), gpu_adam.Adam(0.1)
    for seed in range(9):
        host_optimizer.apply_gradients(expected.pairs(seed))
    for schedule in schedules(gpu):
        with schedule():
            work, optimizer = Pairs(gpu, "dense"), gpu_adam.Adam(0.1)
            sets = [work.gradients(0), work.gradients(0)]
            for seed in range(9):
                for array, new in zip(sets[seed % 2], work.gradients(seed), strict=True):
                    array[...] = new
                optimizer.apply_gradients(list(zip(sets[seed % 2], work.variables, strict=True)))
            assert_same_state(state(optimizer, work.variables), state(host_optimizer, expected.variables))


# Graphs. A replay repeats a step with the scalars of the one that was captured, so the host repeats its t.


@contextlib.contextmanager
def captured(stream: Any, graphs: list[Any], mode: int | None = None) -> Iterator[None]:
    """Capture in CUDA's mode of that number: 0 global, 1 thread_local, 2 relaxed, CuPy's default."""
    stream.begin_capture(*(() if mode is None else (mode,)))
    try:
        yield
    finally:
        graphs.append(stream.end_capture())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["dense", "sparse", "both"])
def test_a_captured_step_replays(gpu: Device, kind: str, mode: str) -> None:
    """With gradients whose arrays stay and whose contents change; nothing of it runs while it is captured."""
    config = {"learning_rate": 0.1, **MODES[mode]}
    expected, host_optimizer = Pairs(HOST, kind), gpu_adam.Adam(**config)
    host_gradients = expected.gradients(1)
    work, optimizer = Pairs(gpu, kind), gpu_adam.Adam(**config)
    gradients = work.gradients(1)

    stream, graphs = gpu.xp.cuda.Stream(non_blocking=True), list[Any]()
    gpu.xp.cuda.Device().synchronize()
    with stream:
        for _ in range(2):
            optimizer.apply_gradients(list(zip(gradients, work.variables, strict=True)))
            host_optimizer.apply_gradients(list(zip(host_gradients, expected.variables, strict=True)))
        before = state(optimizer, work.variables)
        with captured(stream, graphs):
            optimizer.apply_gradients(list(zip(gradients, work.variables, strict=True)))
        after = state(optimizer, work.variables)
        assert after.pop("Adam/iter") == 3
        assert before.pop("Adam/iter") == 2
        assert_same_state(after, before)
        for factor in (1, -2, 0.5):
            for array, other in zip(arrays_of(gradients), arrays_of(host_gradients), strict=True):
                array[...] = array * factor
                other[...] = other * factor
            graphs[0].launch()
            host_optimizer.iterations = 2
            host_optimizer.apply_gradients(list(zip(host_gradients, expected.variables, strict=True)))
        assert_same_state(state(optimizer, work.variables), state(host_optimizer, expected.variables))


def arrays_of(gradients: list[Any]) -> list[Any]:
    return [gradient.values if isinstance(gradient, IndexedSlices) else gradient for gradient in gradients]


@pytest.mark.parametrize("mode", MODES_OF_ALL)
@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("seen", [False, True])
def test_steps_between_replays_leave_a_graph_as_it_was(gpu: Device, kind: str, mode: str, seen: bool) -> None:
    """Later steps have other gradients, more rows and other tables, and the graph still uses its own; and they theirs.

    The graph's gradients are `seen` before, so that their addresses need not be copied, or are new to it.
    """
    config = {"learning_rate": 0.1, **MODES[mode]}
    expected, host_optimizer = Pairs(HOST, kind), gpu_adam.Adam(**config)
    work, optimizer = Pairs(gpu, kind), gpu_adam.Adam(**config)
    stream, graphs = gpu.xp.cuda.Stream(non_blocking=True), list[Any]()
    gpu.xp.cuda.Device().synchronize()

    def step(own: gpu_adam.Adam, pairs: list[tuple[Any, Any]], t: int) -> None:
        own.iterations = t
        own.apply_gradients(pairs)

    with stream:
        pairs, host_pairs = work.pairs(1), expected.pairs(1)
        others = {optimizer: work.pairs(2), host_optimizer: expected.pairs(2)}
        step(optimizer, pairs if seen else work.pairs(0), 0)
        step(host_optimizer, host_pairs if seen else expected.pairs(0), 0)
        with captured(stream, graphs):
            step(optimizer, pairs, 1)
        for number, count in enumerate((40, 100, 1000)):
            graphs[0].launch()
            step(host_optimizer, host_pairs, 1)
            for own, at in ((optimizer, work), (host_optimizer, expected)):
                step(own, others[own], 2)  # the same gradients before and after a replay
                step(own, at.pairs(20 + number, count=count)[number % 2 :], 3)  # another set of variables
                step(own, others[own], 4)
        assert_same_state(state(optimizer, work.variables), state(host_optimizer, expected.variables))


@pytest.mark.parametrize("first", ["step", "clipping", "gradient of rows", "list"])
def test_what_a_graph_would_do_anew_at_every_replay_is_refused(gpu: Device, first: str) -> None:
    """Slots and tables are made, and lists copied, before; the steps around a refused one are as if it had not been."""
    stream, graphs = gpu.xp.cuda.Stream(non_blocking=True), list[Any]()
    gpu.xp.cuda.Device().synchronize()
    with stream:
        variable, optimizer = Variable(np.ones((3, 2), np.float32), device=gpu), gpu_adam.Adam(0.1)
        dense: Any = gpu.array(np.ones((3, 2), np.float32))
        if first != "step":
            optimizer.apply_gradients([(dense, variable)])
        if first == "clipping":
            optimizer.clipnorm = 1.0
        gradient = {"list": [[1.0, 2.0]] * 3, "gradient of rows": IndexedSlices(dense, gpu.array(np.arange(3)))}
        with captured(stream, graphs), pytest.raises((TypeError, ValueError), match="captured"):
            optimizer.apply_gradients([(gradient.get(first, dense), variable)])
        assert optimizer.iterations == (first != "step")
        optimizer.clipnorm = None
        optimizer.apply_gradients([(dense, variable)])
        np.testing.assert_allclose(variable.numpy(), 1 - 0.1 * (1 + (first != "step")), rtol=1e-5)


@pytest.mark.parametrize("flavour", [{}, {"use_ema": True, "weight_decay": 0.1, "maximize": True}], ids=str)
def test_a_captured_step_of_groups(gpu: Device, flavour: dict[str, Any]) -> None:
    """Each replay uses the scalars of each group as they were when the step was captured."""
    states = []
    for device in (gpu, HOST):
        variables = [Variable(np.linspace(-1, 1, 5000 + k, dtype=np.float32), device=device) for k in range(4)]
        optimizer, gradients = gpu_adam.Adam(0.05, **flavour), [device.array(v.numpy() * 3) for v in variables]
        for k, variable in enumerate(variables[1:]):
            optimizer.set_group([variable], learning_rate_multiplier=k + 2, beta_1=0.5)
        pairs = list(zip(gradients, variables, strict=True))
        if device is HOST:
            for t in (0, 1, 1, 1):
                optimizer.iterations = t
                optimizer.apply_gradients(pairs)
        else:
            stream, graphs = gpu.xp.cuda.Stream(non_blocking=True), list[Any]()
            gpu.xp.cuda.Device().synchronize()
            with stream:
                optimizer.apply_gradients(pairs)
                with captured(stream, graphs):
                    optimizer.apply_gradients(pairs)
                for _ in range(3):
                    graphs[0].launch(stream)
            stream.synchronize()
        states.append(state(optimizer, variables))
    assert_same_state(*states)


def test_a_step_that_overwrites_by_averages_is_not_captured(gpu: Device) -> None:
    variable, optimizer = Variable(np.ones(3, np.float32)), gpu_adam.Adam(use_ema=True, ema_overwrite_frequency=2)
    pairs, stream = [(gpu.array(np.ones(3, np.float32)), variable)], gpu.xp.cuda.Stream(non_blocking=True)
    gpu.xp.cuda.Device().synchronize()
    with stream:
        optimizer.apply_gradients(pairs)
        with captured(stream, []), pytest.raises(ValueError, match="must not overwrite variables by their averages"):
            optimizer.apply_gradients(pairs)
        stream.synchronize()
    assert int(optimizer.iterations) == 1


def test_a_captured_step_is_constrained_at_each_replay(gpu: Device) -> None:
    start = np.array([0.5, 0.25], np.float32)
    variable = Variable(start, constraint=lambda v: np.maximum(v, 0))
    optimizer, stream, graphs = gpu_adam.Adam(0.2), gpu.xp.cuda.Stream(non_blocking=True), list[Any]()
    host, expected = gpu_adam.Adam(0.2), Variable(start, device="host", constraint=lambda v: np.maximum(v, 0))
    gpu.xp.cuda.Device().synchronize()
    with stream:
        pairs = [(gpu.array(np.ones(2, np.float32)), variable)]
        optimizer.apply_gradients(pairs)
        with captured(stream, graphs):
            optimizer.apply_gradients(pairs)
        for _ in range(3):
            graphs[0].launch(stream)
        stream.synchronize()
    for t in (0, 1, 1, 1):  # a replay repeats the scalars of the step that was captured
        host.iterations = t
        host.apply_gradients([(np.ones(2, np.float32), expected)])
    assert_same_bits(variable.numpy(), expected.numpy())
    assert variable.numpy()[1] == 0


def test_a_failed_capture_leaves_later_steps_alone(gpu: Device) -> None:
    is_failing = False

    def fail(event: Event) -> None:
        if is_failing and event.kind == "launch":
            raise MemoryError

    recording = RecordingDevice(gpu, fail)
    stream, graphs = gpu.xp.cuda.Stream(non_blocking=True), list[Any]()
    gpu.xp.cuda.Device().synchronize()
    with stream:
        variable, optimizer = Variable(np.ones(3, np.float32), device=recording), gpu_adam.Adam(0.1)
        pairs = [(gpu.array(np.ones(3, np.float32)), variable)]
        optimizer.apply_gradients(pairs)
        is_failing = True
        with captured(stream, graphs), pytest.raises(MemoryError):
            optimizer.apply_gradients(pairs)
        is_failing = False
        optimizer.apply_gradients(pairs)
        np.testing.assert_allclose(variable.numpy(), 0.8, rtol=1e-5)


@pytest.mark.parametrize("count", [5, 2000])
@pytest.mark.parametrize("mode", [0, 1])
def test_captures_that_forbid_to_allocate(gpu: Device, mode: int, count: int) -> None:
    """The modes "global" and "thread_local": a normal step has left what one graph needs, for as many rows."""
    config: dict[str, Any] = {"learning_rate": 0.1, "global_clipnorm": 1.0}
    expected, host_optimizer = Pairs(HOST, "both"), gpu_adam.Adam(**config)
    work, optimizer = Pairs(gpu, "both"), gpu_adam.Adam(**config)
    stream, graphs = gpu.xp.cuda.Stream(non_blocking=True), list[Any]()
    gpu.xp.cuda.Device().synchronize()
    with stream:
        pairs = [work.pairs(seed, count=count) for seed in range(4)]
        host_pairs = [expected.pairs(seed, count=count) for seed in range(4)]
        for turn in range(2):
            optimizer.apply_gradients(pairs[2 * turn])
            with captured(stream, graphs, mode):
                optimizer.apply_gradients(pairs[2 * turn + 1])
        for turn in (0, 1, 1, 0):
            graphs[turn].launch()
        for seed, done in ((0, 0), (2, 2), (1, 1), (3, 3), (3, 3), (1, 1)):
            host_optimizer.iterations = done
            host_optimizer.apply_gradients(host_pairs[seed])
        host_optimizer.iterations = 4
        assert_same_state(state(optimizer, work.variables), state(host_optimizer, expected.variables))


def test_a_capture_that_forbids_to_allocate_says_what_it_lacks(gpu: Device) -> None:
    """The second of two captures without a normal step in between; the next one with a step works again."""
    stream, graphs = gpu.xp.cuda.Stream(non_blocking=True), list[Any]()
    gpu.xp.cuda.Device().synchronize()
    with stream:
        work, optimizer = Pairs(gpu, "dense"), gpu_adam.Adam(0.1)
        pairs = work.pairs(1)
        optimizer.apply_gradients(pairs)
        with captured(stream, graphs, 0):
            optimizer.apply_gradients(pairs)
        stream.begin_capture(0)
        with pytest.raises(ArgumentValueError, match=r"need no memory in the capture modes .*; do one such step"):
            optimizer.apply_gradients(pairs)
        with pytest.raises(gpu.xp.cuda.runtime.CUDARuntimeError, match="Invalidated"):
            stream.end_capture()
        assert optimizer.iterations == 2
        optimizer.apply_gradients(pairs)
        with captured(stream, graphs, 0):
            optimizer.apply_gradients(pairs)
        graphs[0].launch()
        graphs[1].launch()
        expected, host_optimizer = Pairs(HOST, "dense"), gpu_adam.Adam(0.1)
        for done in (0, 2, 1, 3):
            host_optimizer.iterations = done
            host_optimizer.apply_gradients(expected.pairs(1))
        assert_same_state(state(optimizer, work.variables), state(host_optimizer, expected.variables))


KERNELS_OF_A_STEP = {  # for each dtype, and once where there are several
    "free": (["dense"], []),
    "clipnorm": (["dense", "square_sums"], []),
    "global_clipnorm": (["dense", "square_sums"], ["clip_by_global_norm"]),
}


@pytest.mark.parametrize("mode", KERNELS_OF_A_STEP)
@pytest.mark.parametrize("dtypes", [["float32"], ["float32", "complex128"]])
def test_nodes_of_a_graph(gpu: Device, emulation: Any, dtypes: list[str], mode: str) -> None:
    """The kernels alone, where the step before had the same gradients; new ones cost a copy of their addresses each."""
    config: dict[str, Any] = {"learning_rate": 0.1} if mode == "free" else {"learning_rate": 0.1, mode: 1.0}
    shapes = [(dtype, 3 + number) for number, dtype in enumerate([*dtypes, *dtypes])]

    def pairs_on(device: Device, variables: list[Variable], seed: int) -> list[tuple[Any, Variable]]:
        rng = np.random.default_rng(seed)
        return [(device.array(numbers(rng, n, dtype)), v) for (dtype, n), v in zip(shapes, variables, strict=True)]

    variables = {each: [Variable(np.ones(n, dtype), device=each) for dtype, n in shapes] for each in (gpu, HOST)}
    same, new = ({each: pairs_on(each, variables[each], seed) for each in (gpu, HOST)} for seed in (1, 2))
    optimizers = {each: gpu_adam.Adam(**config) for each in (gpu, HOST)}
    stream, graphs = gpu.xp.cuda.Stream(non_blocking=True), list[Any]()
    gpu.xp.cuda.Device().synchronize()
    with stream:
        optimizers[gpu].apply_gradients(same[gpu])
        emulation.reset()
        for pairs in (same, same, new):  # the second one finds no table that lies in device memory already
            with captured(stream, graphs):
                optimizers[gpu].apply_gradients(pairs[gpu])
        nodes = [sorted(graph) for graph in emulation.counters.graph_nodes]
        for_each, once = KERNELS_OF_A_STEP[mode]
        assert nodes[0] == sorted(for_each * len(dtypes) + (once if len(dtypes) > 1 else []))
        copy = next(name for name in nodes[1] if name not in nodes[0])
        assert nodes[1] == nodes[2] == sorted([*nodes[0], *[copy] * len(dtypes)])
        optimizers[gpu].apply_gradients(same[gpu])
        optimizers[gpu].apply_gradients(new[gpu])
        for turn in (0, 2, 1, 0):
            graphs[turn].launch()
        stream.synchronize()
    for pairs, done in ((same, 0), (same, 4), (new, 5), (same, 1), (new, 3), (same, 2), (same, 1)):
        optimizers[HOST].iterations = done
        optimizers[HOST].apply_gradients(pairs[HOST])
    optimizers[HOST].iterations = 6
    assert_same_state(state(optimizers[gpu], variables[gpu]), state(optimizers[HOST], variables[HOST]))


@pytest.mark.parametrize("allocator", ["malloc", "malloc_async"])
def test_a_captured_step_allocates_nothing(gpu: Device, emulation: Any, allocator: str) -> None:
    """What CuPy's allocator in stream order gives out under capture, each replay would give out anew."""
    stream, graphs = gpu.xp.cuda.Stream(non_blocking=True), list[Any]()
    gpu.xp.cuda.Device().synchronize()
    allocators = {"malloc": gpu.xp.get_default_memory_pool().malloc, "malloc_async": gpu.xp.cuda.malloc_async}
    with gpu.xp.cuda.using_allocator(allocators[allocator]), stream:
        work, optimizer = Pairs(gpu, "both"), gpu_adam.Adam(0.1, clipnorm=1.0)
        pairs = work.pairs(1)
        optimizer.apply_gradients(pairs)
        emulation.reset()
        with captured(stream, graphs):
            optimizer.apply_gradients(pairs)
        counters = emulation.counters
        assert "dense" in counters.graph_nodes[0]
        assert counters.allocations == counters.device_allocations == 0
        graphs[-1].launch()
        stream.synchronize()
        del work, optimizer, pairs


def test_optimizers_may_be_given_back_in_a_capture(gpu: Device) -> None:
    """They ask nothing of the device then, which would end a capture in the mode "global"."""
    stream, graphs = gpu.xp.cuda.Stream(non_blocking=True), list[Any]()
    gpu.xp.cuda.Device().synchronize()
    with stream:
        work, optimizer = Pairs(gpu, "both"), gpu_adam.Adam(0.1)
        optimizer.apply_gradients(work.pairs(1))
        optimizer.synchronize()
        with captured(stream, graphs, 0):
            del optimizer
            gc.collect()


@pytest.mark.parametrize("gone", ["optimizer", "slots", "variables"])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_graph_of_cupy_keeps_what_its_replays_read_and_write(gpu: Device, kind: str, gone: str) -> None:
    """After the optimizer is gone, or has forgotten the variables; others are given no memory that the graph uses."""
    config: dict[str, Any] = {"learning_rate": 0.1, "clipnorm": 1.0, "amsgrad": True}
    expected, host_optimizer = Pairs(HOST, kind), gpu_adam.Adam(**config)
    host_pairs = expected.pairs(1)
    for _ in range(2):
        host_optimizer.apply_gradients(host_pairs)
    stream, graphs = gpu.xp.cuda.Stream(non_blocking=True), list[Any]()
    gpu.xp.cuda.Device().synchronize()
    with stream:
        work, optimizer = Pairs(gpu, kind), gpu_adam.Adam(**config)
        pairs = work.pairs(1)
        optimizer.apply_gradients(pairs)
        with captured(stream, graphs):
            optimizer.apply_gradients(pairs)
        arrays = [variable.value for variable in work.variables]
        if gone == "slots":
            for variable in work.variables:
                optimizer.forget(variable)
        else:
            del optimizer
        if gone == "variables":
            del work, arrays
            pairs = [gradient for gradient, _ in pairs]  # the arrays that a replay reads are the caller's
        gc.collect()
        sizes = [1, 2, 3, 5, 8, 45, 70, 255, 4097] * 4
        scratch = [gpu.array(np.full(size, np.nan, np.float32)) for size in sizes]
        graphs[0].launch()
        stream.synchronize()
        assert all(np.isnan(gpu.numpy(array)).all() for array in scratch)
        if gone != "variables":
            for array, variable in zip(arrays, expected.variables, strict=True):
                assert_same_bits(gpu.numpy(array), variable.numpy())


@pytest.mark.parametrize("kind", ["strided", "strided slices", "another's variable"])
def test_a_graph_keeps_the_copies_that_it_reads(gpu: Device, kind: str) -> None:
    """Gradients that a step has to copy first: a replay copies them again, to where it did before."""
    stream, graphs = gpu.xp.cuda.Stream(non_blocking=True), list[Any]()
    gpu.xp.cuda.Device().synchronize()
    results = []
    for device, context in ((gpu, stream), (HOST, contextlib.nullcontext())):
        with context:
            one, other = (Variable(np.full((3, 2), x, np.float32), name=str(x), device=device) for x in (1.0, 2.0))
            strided = device.array(np.arange(12, dtype=np.float32).reshape(3, 4))[:, ::2]
            slices = IndexedSlices(strided, device.array(np.array([2, 9, 0, 9, 2, 9]))[::2])
            ones = device.array(np.ones((3, 2), np.float32))
            plain: list[Any] = [(ones, one), (ones, other)]
            pairs = {
                "strided": [(strided, one), (strided, other)],
                "strided slices": [(slices, one)],
                "another's variable": [(other.value, one), (one.value, other)],
            }[kind]
            if kind == "strided slices":
                plain = [(IndexedSlices(ones, device.array(np.array([0, 1, 0]))), one)]
            optimizer = gpu_adam.Adam(0.1)
            optimizer.apply_gradients(pairs)
            if device is gpu:
                with captured(stream, graphs):
                    optimizer.apply_gradients(pairs)
            for _ in range(2):
                optimizer.iterations = 2
                optimizer.apply_gradients(plain)
                scratch = [device.array(np.full((3, 2), np.nan, np.float32)) for _ in range(20)]  # where others were
                if device is gpu:
                    graphs[0].launch()
                else:
                    optimizer.iterations = 1
                    optimizer.apply_gradients(pairs)
                del scratch
            optimizer.iterations = 0
            results.append(state(optimizer, [one, other]))
    assert_same_state(*results)


# The host device's bits.


# Every mode in one dtype, and in the others a kernel without and one with all switches.
CASES = [(dtype, mode) for dtype in kernels.DTYPES for mode in MODES if dtype == "float32" or mode in MODES_OF_ALL]


@pytest.mark.parametrize(("dtype", "mode"), CASES)
def test_the_same_bits_as_on_the_host(gpu: Device, dtype: str, mode: str) -> None:
    """Dense and sparse with duplicates, at every distance from a 16-byte boundary, the gradients at others."""
    results = []
    for device in (gpu, HOST):
        work, optimizer = Pairs(device, "both", dtype), gpu_adam.Adam(0.1, **MODES[mode])
        for seed in range(2):
            optimizer.apply_gradients(work.pairs(seed, 2 * seed))
        results.append(state(optimizer, work.variables))
    assert_same_state(*results)


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_long_rows_and_many_indices_have_the_same_bits_as_on_the_host(gpu: Device, dtype: str) -> None:
    rng = np.random.default_rng(3)
    tile = kernels.tile_size(dtype)
    tables = [((2, tile + 3), 3), ((40, 3), kernels.SORT_RUN + 7)]
    initial = [numbers(rng, shape, dtype) for shape, _ in tables]
    slices = [(numbers(rng, (n, shape[1]), dtype), rng.integers(0, shape[0], n)) for shape, n in tables]
    results = []
    for device in (gpu, HOST):
        variables = [Variable(array, device=device, name=str(k)) for k, array in enumerate(initial)]
        gradients = [IndexedSlices(device.array(values), device.array(indices)) for values, indices in slices]
        optimizer = gpu_adam.Adam(0.1, clipnorm=3.0)
        optimizer.apply_gradients(list(zip(gradients, variables, strict=True)))
        results.append(state(optimizer, variables))
    assert_same_state(*results)


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_special_numbers_have_the_same_bits_as_on_the_host(gpu: Device, dtype: str) -> None:
    """Signed zeros, denormals, huge numbers, infinities and NaN, in gradients and in variables."""
    limits = ml_dtypes.finfo(dtype)
    tiny, huge = float(limits.tiny), float(limits.max)
    special = np.array([0, -0.0, tiny, tiny / 4, -tiny / 4, huge, -huge, np.inf, -np.inf, np.nan, 1, -1e-3], dtype)
    g, theta = (part.reshape(-1).copy() for part in np.meshgrid(special, special))
    results = []
    for device in (gpu, HOST):
        variable = Variable(theta, device=device, name="w")
        optimizer = gpu_adam.Adam(0.1, amsgrad=True, clipvalue=huge / 2)
        for gradient in (g, -g):
            optimizer.apply_gradients([(device.array(gradient), variable)])
        results.append(state(optimizer, [variable]))
    assert_same_state(*results)


# Rows out of range.


def waits(tmp_path: Path) -> dict[str, Callable[[gpu_adam.Adam], object]]:
    """The calls that say what kernels have noted."""
    return {
        "check_errors": lambda optimizer: optimizer.check_errors(),
        "get_weights": lambda optimizer: optimizer.get_weights(),
        "save": lambda optimizer: optimizer.save(tmp_path / "state.npz"),
    }


def stepped(device: Device, table: Variable, indices: Sequence[int], optimizer: gpu_adam.Adam) -> None:
    values = np.arange(1.0, 1 + 3 * len(indices), dtype=np.float32).reshape(-1, 3)
    slices = IndexedSlices(device.array(values), device.array(np.array(indices, np.int64)))
    optimizer.apply_gradients([(slices, table)])


@pytest.mark.parametrize("wait", ["check_errors", "get_weights", "save"])
def test_rows_out_of_range_are_left_out_and_told_once(gpu: Device, tmp_path: Path, wait: str) -> None:
    table, optimizer = Variable(np.ones((4, 3), np.float32), name="words"), gpu_adam.Adam(0.1)
    expected, host_optimizer = Variable(np.ones((4, 3), np.float32), device=HOST), gpu_adam.Adam(0.1)
    tell = waits(tmp_path)[wait]
    values = np.arange(1.0, 16, dtype=np.float32).reshape(5, 3)
    indices = np.array([2, 4, 0, -3, 2])
    inside = np.array([0, 2, 4])
    for _ in range(2):
        optimizer.apply_gradients([(IndexedSlices(gpu.array(values), gpu.array(indices)), table)])
        host_optimizer.apply_gradients([(IndexedSlices(values[inside], indices[inside]), expected)])
        message = r"IndexedSlices\.indices\[1\] of variable 'words' must lie in \[0, 4\) \(got 4 and 1 more\)"
        with pytest.raises(SparseIndexError, match=message):
            tell(optimizer)
        assert not (tmp_path / "state.npz").exists()
        optimizer.check_errors()  # told
        assert_same_bits(table.numpy(), expected.numpy())
    tell(optimizer)
    for weight, other in zip(optimizer.get_weights(), host_optimizer.get_weights(), strict=True):
        assert_same_bits(weight, other)


def test_each_variable_has_its_own_note(gpu: Device) -> None:
    optimizer = gpu_adam.Adam()
    tables = {name: Variable(np.ones((4, 3), np.float32), name=name) for name in ("a", "b", "c")}
    stepped(gpu, tables["a"], [7], optimizer)
    stepped(gpu, tables["b"], [0, 3], optimizer)
    stepped(gpu, tables["c"], [0, 1, -1], optimizer)
    messages = []
    for _ in range(2):
        with pytest.raises(SparseIndexError) as caught:
            optimizer.check_errors()
        messages.append(str(caught.value))
    optimizer.check_errors()
    assert "indices[0] of variable 'a' must lie in [0, 4) (got 7)" in messages[0]
    assert "indices[2] of variable 'c' must lie in [0, 4) (got -1)" in messages[1]


def test_the_first_of_several_bad_steps_is_told(gpu: Device) -> None:
    """Position and index are those of one step, and all are counted."""
    table, optimizer = Variable(np.ones((4, 3), np.float32), name="words"), gpu_adam.Adam()
    for indices in ([0, 1, 2, 9], [-5, 1], [1, 1]):
        stepped(gpu, table, indices, optimizer)
    with pytest.raises(SparseIndexError, match=r"indices\[3\] of variable 'words' .*\(got 9 and 1 more\)"):
        optimizer.check_errors()


def test_noting_rows_out_of_range_does_not_wait(gpu: Device, emulation: Any) -> None:
    table, optimizer = Variable(np.ones((4, 3), np.float32)), gpu_adam.Adam()
    indices = gpu.array(np.array([1, 4]))
    slices = IndexedSlices(gpu.array(np.ones((2, 3), np.float32)), indices)
    for _ in range(2):
        counters = counted(emulation, optimizer, [(slices, table)])
    assert counters.syncs == []
    assert counters.d2h == 0
    with pytest.raises(SparseIndexError, match=r"got 4 and 1 more"):
        optimizer.check_errors()


# Arrays of other frameworks.


class Foreign:
    """An array of a framework with streams of its own, as torch and JAX have: both protocols, and no stream in one.

    Args:
        array: the memory.
        stream: where the framework writes it.
        refuses: whether it keeps its memory to itself, as a tensor that requires a gradient.
    """

    def __init__(self, array: Any, stream: Any, *, refuses: bool = False) -> None:
        self._array, self._stream, self._refuses = array, stream, refuses
        self.shape, self.dtype, self.device = array.shape, array.dtype, array.device
        self.asked: list[str] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, stream: int | None = None, **options: Any) -> Any:
        self.asked.append("DLPack")
        if self._refuses:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
        with self._stream:
            return self._array.__dlpack__(stream=stream, **options)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        self.asked.append("interface")
        if self._refuses:
            raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad.")
        return {**self._array.__cuda_array_interface__, "version": 2, "stream": None}


@pytest.mark.parametrize("way", ["gradient", "initial value", "assigned"])
def test_a_step_waits_for_the_stream_of_another_framework(gpu: Device, way: str) -> None:
    size = 5000
    for schedule in schedules(gpu):
        theirs, ours = (gpu.xp.cuda.Stream(non_blocking=True) for _ in range(2))
        array, values = gpu.array(np.full(size, 7.0, np.float32)), gpu.array(np.ones(size, np.float32))
        gpu.xp.cuda.Device().synchronize()
        with schedule():
            with theirs:
                array[...] = values
                array += values
            foreign = Foreign(array, theirs)
            with ours:
                variable, optimizer = Variable(np.zeros(size, np.float32)), gpu_adam.Adam(0.1)
                if way == "gradient":
                    optimizer.apply_gradients([(foreign, variable)])
                    assert foreign.asked == ["DLPack"]
                    found = optimizer.get_slot(variable, "m").numpy() / np.float32(1 - 0.9)
                else:
                    found = Variable(foreign).numpy() if way == "initial value" else variable.assign(foreign).numpy()
            np.testing.assert_allclose(found, 2, rtol=1e-6)


def test_a_captured_step_takes_the_array_interface(gpu: Device) -> None:
    """A wait for another stream is not permitted there."""
    stream, graphs = gpu.xp.cuda.Stream(non_blocking=True), list[Any]()
    gpu.xp.cuda.Device().synchronize()
    with stream:
        variable, optimizer = Variable(np.zeros(3, np.float32)), gpu_adam.Adam(0.1)
        foreign = Foreign(gpu.array(np.ones(3, np.float32)), gpu.xp.cuda.Stream(non_blocking=True))
        optimizer.apply_gradients([(foreign, variable)])
        foreign.asked.clear()
        with captured(stream, graphs, 0):
            optimizer.apply_gradients([(foreign, variable)])
        assert set(foreign.asked) == {"interface"}
        graphs[0].launch()
        np.testing.assert_allclose(variable.numpy(), -0.2, rtol=1e-5)


@pytest.mark.parametrize("is_captured", [False, True])
def test_objects_that_keep_their_memory_to_themselves(gpu: Device, is_captured: bool) -> None:
    stream, graphs = gpu.xp.cuda.Stream(non_blocking=True), list[Any]()
    gpu.xp.cuda.Device().synchronize()
    with stream:
        array: Any = gpu.array(np.ones(3, np.float32))
        foreign = Foreign(array, stream, refuses=True)
        variable, optimizer = Variable(np.zeros(3, np.float32)), gpu_adam.Adam(0.1)
        optimizer.apply_gradients([(array, variable)])
        before = state(optimizer, [variable])
        calls: list[Callable[[], object]] = [
            lambda: optimizer.apply_gradients([(foreign, variable)]),
            lambda: optimizer.apply_gradients([(array, foreign)]),
        ]
        if not is_captured:
            calls += [lambda: Variable(foreign), lambda: variable.assign(foreign), lambda: optimizer.build([foreign])]
        with captured(stream, graphs) if is_captured else contextlib.nullcontext():
            for call in calls:
                with pytest.raises(ArgumentTypeError, match=r"must share its memory \(got Can't .*\); detach it, or"):
                    call()
        assert_same_state(state(optimizer, [variable]), before)


def test_cupy_takes_a_variable_for_its_array(gpu: Device) -> None:
    """But not while a loss is being recorded, whose gradient would be cut off."""
    variable: Any = Variable(np.zeros(3, np.float32))
    assert variable.__cupy_get_ndarray__() is variable.value
    assert gpu.xp.asarray(variable).data.ptr == variable.value.data.ptr
    assert not hasattr(Variable(np.zeros(3), device="host"), "__cupy_get_ndarray__")
    with pytest.raises(TypeError, match="recorded array"):
        gpu_adam.Adam().minimize(lambda: gpu.xp.asarray(variable).sum(), [variable])


# The same under every schedule: what is enqueued late still reads what it should.


def test_a_whole_training_in_any_order(gpu: Device) -> None:
    """Dense and sparse, clipped, with a variable that comes late, assignments in between and a state that is read."""

    def train(device: Device) -> list[dict[str, Array]]:
        work, late = Pairs(device, "both"), Pairs(device, "dense", "float64")
        optimizer = gpu_adam.Adam(0.1, global_clipnorm=2.0)
        states = []
        for seed, later in itertools.product(range(3), (False, True)):
            optimizer.apply_gradients(work.pairs(seed) + (late.pairs(seed) if later else []))
            work.variables[1].assign_add(np.full(3, 0.5, np.float32))
            states.append(state(optimizer, [*work.variables, *late.variables]))
        return states

    expected = train(HOST)
    for schedule in schedules(gpu):
        with schedule():
            for actual, wanted in zip(train(gpu), expected, strict=True):
                assert_same_state(actual, wanted)
