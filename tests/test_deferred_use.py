"""Deferred updates in use: graphs, several optimizers, threads, interrupts, memory, and what is refused."""

import gc
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from captures import captured, context_of
from reference import assert_same_bits
from snapshots import unchanged
from twins import Twins, numbers

from gpu_adam import Adam, IndexedSlices, Variable
from gpu_adam.devices import Device, HostDevice, find_device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, DeviceError, SparseIndexError

ROWS, COLUMNS = 23, 3


def table(seed: int = 0) -> np.ndarray:
    return numbers(np.random.default_rng(seed), (ROWS, COLUMNS), "float32")


def rows_of(seed: int, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Values and indices of a gradient."""
    rng = np.random.default_rng(seed)
    return numbers(rng, (count, COLUMNS), "float32"), rng.integers(0, ROWS, count)


def deferred(device: Device, steps: int = 5, **config: Any) -> tuple[Adam, Variable]:
    """An optimizer with a variable of which most rows are behind."""
    optimizer, variable = Adam(0.1, sparse_update="deferred", **config), Variable(table(), name="w", device=device)
    for seed in range(steps):
        optimizer.apply_gradients([(IndexedSlices(*map(device.array, rows_of(seed))), variable)])
    return optimizer, variable


# How far rows may be behind.


@pytest.mark.parametrize("limit", [1, 2, 13])
def test_rows_miss_no_more_steps_than_allowed(device: Device, limit: int) -> None:
    twins, most = Twins(device, [table()], max_deferral=limit), 0
    for seed in range(40):
        twins.step((rows_of(seed), 0))
        behind: Any = twins.variables[1][0]._behind
        most = max(most, int(device.numpy(behind._log)[:8].view(np.int64)[0]))
    assert most == limit
    twins.check()


def test_gather_brings_its_rows_up_to_date_and_no_others(device: Device) -> None:
    twins = Twins(device, [table()])
    for seed in range(30):
        twins.step((rows_of(seed), 0))
    before, indices = twins.behind, np.array([[4, 9], [9, 0]])
    dense, late = (device.numpy(variables[0].gather(indices)) for variables in twins.variables)
    assert_same_bits(late, dense)
    assert before - 3 <= twins.behind < before
    dense, late = (device.numpy(variables[0][device.array(indices[0])]) for variables in twins.variables)
    assert_same_bits(late, dense)
    assert twins.behind > ROWS // 2
    twins.check()
    assert twins.behind == 0


@pytest.mark.thorough
def test_averages_that_overwrite_variables(device: Device) -> None:
    twins = Twins(device, [table()], use_ema=True, ema_momentum=0.9)
    for seed in range(20):
        twins.step((rows_of(seed), 0))
        if seed % 6 == 5:
            twins.both(lambda optimizer, variables: optimizer.overwrite_by_averages())
    twins.check()


# Graphs.


class Batch:
    """A gradient whose memory lies still."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.values, self.rows = map(device.array, rows_of(0))
        self.slices = IndexedSlices(self.values, self.rows)

    def next(self, seed: int, *, is_bad: bool = False) -> None:
        """Other numbers in the same memory; where it is bad, one that is not finite."""
        values, rows = rows_of(seed)
        if is_bad:
            values[0] = np.inf
        with self.device.activate():
            self.values[...], self.rows[...] = self.device.array(values), self.device.array(rows)


def embedding_step(batch: Batch, optimizer: Adam, variable: Variable) -> int | None:
    """A step whose gradient depends on the rows."""
    with batch.device.activate():
        values = variable.gather(batch.rows) * np.float32(0.5) + batch.values
    return optimizer.apply_gradients([(IndexedSlices(values, batch.rows), variable)])


def two_steps(batch: Batch, optimizer: Adam, variable: Variable) -> int | None:
    optimizer.apply_gradients([(batch.slices, variable)])
    return embedding_step(batch, optimizer, variable)


def dense_first(batch: Batch, optimizer: Adam, variable: Variable) -> int | None:
    with batch.device.activate():
        gradient = batch.device.xp.ones(variable.shape, np.float32) * batch.values[0]
    optimizer.apply_gradients([(gradient, variable)])
    return optimizer.apply_gradients([(batch.slices, variable)])


GRAPHS: dict[str, tuple[Callable[[Batch, Adam, Variable], int | None], dict[str, Any]]] = {
    "plain": (embedding_step, {}),
    "small log": (embedding_step, {"max_deferral": 5}),
    "averages": (embedding_step, {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 7}),
    "clipped": (embedding_step, {"clipnorm": 0.5, "max_deferral": 13}),
    "guarded": (embedding_step, {"skip_nonfinite": True, "max_deferral": 9}),
    "two steps": (two_steps, {"max_deferral": 7}),
    "dense first": (dense_first, {}),
}
QUICK = ("small log", "two steps", "dense first")  # which share their kernels with other tests


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.thorough) for name in GRAPHS]
)
@pytest.mark.parametrize("seed", [None, pytest.param(1, marks=pytest.mark.thorough)])
def test_replays_of_a_graph(device: Device, name: str, seed: int | None) -> None:
    step, config = GRAPHS[name]
    with context_of(device, seed):
        twins, batch = Twins(device, [table()], **config), Batch(device)
        twins.both(lambda optimizer, variables: step(batch, optimizer, variables[0]))
        (eager, (dense,)), (optimizer, (variable,)) = twins.pairs
        graph = optimizer.capture(lambda: step(batch, optimizer, variable))
        for number in range(30):
            batch.next(number, is_bad="skip_nonfinite" in config and number % 7 == 2)
            step(batch, eager, dense)
            if number % 11 == 5:
                step(batch, optimizer, variable)
            else:
                graph.replay()
            if number % 8 == 6:
                twins.check(f"after step {number}")
            if number == 15:
                twins.both(lambda optimizer, variables: setattr(optimizer, "learning_rate", 0.3))
        assert twins.behind > 0
        twins.check()


def test_what_a_graph_would_read_too_early_is_refused(gpu: Device) -> None:
    with context_of(gpu):
        (optimizer, variable), batch = deferred(gpu), Batch(gpu)
        gradient = gpu.array(table())
        optimizer.get_slot(variable, "m").numpy()  # no row is behind: at a replay some would be

        def reading(look: Callable[[], object]) -> Callable[[], None]:
            def function() -> None:
                look()
                optimizer.apply_gradients([(batch.slices, variable)])

            return function

        looks: list[Callable[[], object]] = [
            lambda: variable.value,
            lambda: variable + 1,
            lambda: variable[2:4],
            lambda: optimizer.get_slot(variable, "v").value,
            lambda: variable.assign(gradient),
        ]
        message = (
            r"variable 'w', whose rows are deferred, must not be read.* while a graph is captured \(got .*\); take"
        )
        for look in looks:
            with unchanged(optimizer, variable), pytest.raises(ArgumentValueError, match=message):
                optimizer.capture(reading(look))
        optimizer.capture(reading(lambda: variable.gather(batch.rows))).replay()


def test_a_dense_step_behind_a_deferred_one_is_not_captured(gpu: Device) -> None:
    with context_of(gpu):
        (optimizer, variable), batch = deferred(gpu), Batch(gpu)
        gradient = gpu.array(table())

        def steps() -> None:
            optimizer.apply_gradients([(batch.slices, variable)])
            optimizer.apply_gradients([(gradient, variable)])

        message = "must not be updated as a whole behind a deferred step of the same captured function"
        with unchanged(optimizer, variable), pytest.raises(ArgumentValueError, match=message):
            optimizer.capture(steps)


def test_a_first_deferred_step_is_not_captured(gpu: Device) -> None:
    """The function might have read the variable before the step, of which nobody knew."""
    with context_of(gpu):
        optimizer, variable = deferred(gpu, 0)
        batch = Batch(gpu)
        message = r"a captured step that defers rows of variable 'w' must have been done before \(got a first one\)"
        with unchanged(optimizer, variable), pytest.raises(ArgumentValueError, match=message):
            optimizer.capture(lambda: optimizer.apply_gradients([(batch.slices, variable)]))
        optimizer.apply_gradients([(batch.slices, variable)])
        optimizer.capture(lambda: optimizer.apply_gradients([(batch.slices, variable)])).replay()


def test_a_users_own_graph_is_refused(gpu: Device) -> None:
    with context_of(gpu):
        (optimizer, variable), batch = deferred(gpu), Batch(gpu)
        optimizer.apply_gradients([(batch.slices, variable)])
        graphs: list[Any] = []
        with unchanged(optimizer, variable), captured(gpu, graphs):
            message = (
                r"a step captured in a graph must do without deferred rows \(got one with them\); use Adam.capture"
            )
            with pytest.raises(ArgumentValueError, match=message):
                optimizer.apply_gradients([(batch.slices, variable)])
            with pytest.raises(ArgumentValueError, match="must not be read, assigned or updated as a whole"):
                _ = variable.value
        optimizer.apply_gradients([(batch.slices, variable)])


# One optimizer alone.


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("gradient", ["dense", "sparse"])
def test_a_second_optimizer_is_refused(device: Device, gradient: str, is_known: bool) -> None:
    """Also one that stepped the variable before the first one did."""
    other, variable = Adam(0.1), Variable(table(), name="w", device=device)
    slices = IndexedSlices(*map(device.array, rows_of(0)))
    pairs = [(device.array(table()) if gradient == "dense" else slices, variable)]
    if is_known:
        other.apply_gradients(pairs)
    first = Adam(0.1, name="first", sparse_update="deferred")
    first.apply_gradients([(slices, variable)])
    message = r"variable 'w' must be updated by one optimizer alone .* \(got a second one beside 'first'\); let"
    with unchanged(other, variable), pytest.raises(ArgumentValueError, match=message):
        other.apply_gradients(pairs)
    with unchanged(other), pytest.raises(ArgumentValueError, match=message):
        other.build([variable, first.get_slot(variable, "m")])
    first.forget(variable)
    other.apply_gradients(pairs)


def test_a_slot_of_a_deferred_variable_is_no_variable_of_another_optimizer(device: Device) -> None:
    optimizer, variable = deferred(device)
    with pytest.raises(ArgumentValueError, match="must be updated by one optimizer alone"):
        Adam().build([optimizer.get_slot(variable, "m")])


def test_rows_outlive_their_optimizer(device: Device) -> None:
    """Steps that were done stay done, whoever looks, and another optimizer may go on."""
    twins = Twins(device, [table()])
    for seed in range(9):
        twins.step((rows_of(seed), 0))
    assert twins.behind > 0
    twins.optimizers = [Adam(0.1), Adam(0.1)]
    gc.collect()
    twins.step((rows_of(9), 0))
    twins.check()
    twins = Twins(device, [table()])
    for seed in range(9):
        twins.step((rows_of(seed), 0))
    twins.optimizers = []
    gc.collect()
    dense, late = twins.variables
    assert_same_bits(late[0].numpy(), dense[0].numpy())


def test_a_variable_that_was_forgotten_is_deferred_anew(device: Device) -> None:
    twins = Twins(device, [table()])
    for seed in range(12):
        twins.step((rows_of(seed), 0))
        if seed % 4 == 3:
            twins.both(lambda optimizer, variables: optimizer.forget(variables[0]))
    twins.check()


def test_variables_of_two_devices(gpu: Device) -> None:
    """A second GPU where there is one, else the host: rows are brought up to date on theirs, whichever is current."""
    try:
        other: Device = find_device("cuda:1")
    except DeviceError:
        other = HostDevice(threads=1)
    variables = [Variable(table(), device=device) for device in (gpu, other, gpu, other)]
    late, dense = Adam(0.1, sparse_update="deferred", max_deferral=7), Adam(0.1)
    for seed in range(17):
        slices = [IndexedSlices(*map(device.array, rows_of(seed))) for device in (gpu, other)]
        for optimizer, own in ((late, variables[:2]), (dense, variables[2:])):
            with (gpu, other)[seed % 2].activate():
                optimizer.apply_gradients(list(zip(slices, own, strict=True)))
    for current, (found, expected) in zip((other, gpu), zip(variables[:2], variables[2:], strict=True), strict=True):
        with current.activate():
            assert_same_bits(found.device.numpy(found.gather([3, 4])), expected.numpy()[3:5])
            assert_same_bits(found.numpy(), expected.numpy())
            assert_same_bits(late.get_slot(found, "v").numpy(), dense.get_slot(expected, "v").numpy())


# What is refused.


def test_what_is_not_deferred(device: Device) -> None:
    raw = device.array(table())
    optimizer = Adam(sparse_update="deferred")
    slices = IndexedSlices(*map(device.array, rows_of(0)))
    message = r"a variable with deferred updates must be a gpu_adam.Variable \(got a raw array\); wrap"
    with unchanged(optimizer, raw), pytest.raises(ArgumentValueError, match=message):
        optimizer.apply_gradients([(slices, raw)])
    optimizer.set_group([raw], sparse_update="dense")
    optimizer.apply_gradients([(slices, raw)])


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"sparse_update": "lazy"}, ArgumentValueError, "sparse_update must be one of"),
        ({"sparse_update": 1}, (ArgumentTypeError, ArgumentValueError), "sparse_update must be"),
        ({"max_deferral": 0}, ArgumentValueError, r"max_deferral must be a whole number in \[1, 2\^20\)"),
        ({"max_deferral": 2**20}, ArgumentValueError, r"max_deferral must be a whole number in \[1, 2\^20\)"),
        ({"max_deferral": 1.5}, (ArgumentTypeError, ArgumentValueError), "max_deferral must be"),
        ({"sparse_update": "deferred", "telemetry": True}, ArgumentValueError, "must be 'dense' with telemetry"),
    ],
    ids=str,
)
def test_keywords_out_of_range(config: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Adam(**config)


def test_groups_that_do_not_fit(device: Device) -> None:
    variable = Variable(table(), device=device)
    measured = Adam(telemetry=True)
    with unchanged(measured), pytest.raises(ArgumentValueError, match="must be 'dense' with telemetry"):
        measured.set_group([variable], sparse_update="deferred")
    with pytest.raises(ArgumentValueError, match="sparse_update must be one of"):
        Adam().set_group([variable], sparse_update="lazy")
    optimizer = Adam()
    optimizer.set_group([variable], sparse_update="deferred")
    assert optimizer.get_group(variable).sparse_update == "deferred"
    optimizer.apply_gradients([(IndexedSlices(*map(device.array, rows_of(0))), variable)])
    assert variable._behind is not None


def test_rows_out_of_range(device: Device) -> None:
    """On the host nothing has changed; on CUDA they are left out, and noted."""
    twins = Twins(device, [table()])
    for seed in range(5):
        twins.step((rows_of(seed), 0))
    values, indices = rows_of(5)
    for wrong in (-1, ROWS, 2**31 - 1):
        indices[1] = wrong
        if device.checks_indices:
            for optimizer, variables in twins.pairs:
                with unchanged(optimizer, variables[0]), pytest.raises(SparseIndexError):
                    optimizer.apply_gradients([(twins.gradient((values, indices)), variables[0])])
            continue
        twins.step(((values, indices), 0))
        for optimizer in twins.optimizers:
            with pytest.raises(SparseIndexError):
                optimizer.check_errors()
    twins.check()


# Beside other work.


def test_threads_read_while_steps_run(device: Device) -> None:
    """What they read may be of any moment of a step; the end is as without them."""
    if getattr(device.xp, "__emulated__", False):
        pytest.skip("needs a real GPU: the emulated one is for one thread")
    twins, is_done = Twins(device, [table()]), threading.Event()
    (_, (dense,)), (optimizer, (variable,)) = twins.pairs
    twins.step((rows_of(0), 0))
    errors: list[BaseException] = []

    def read() -> None:
        try:
            while not is_done.is_set():
                assert np.isfinite(variable.numpy()).all()
                variable.gather([1, 5])
                optimizer.get_slot(variable, "m").numpy()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for seed in range(1, 200):
            twins.step((rows_of(seed), 0))
    finally:
        is_done.set()
        for thread in threads:
            thread.join()
    assert not errors
    twins.check()
    assert dense.shape == variable.shape


def test_many_steps_and_reads_take_no_memory(device: Device) -> None:
    if getattr(device.xp, "__emulated__", False):
        pytest.skip("needs a real GPU: the emulated one's memory is Python's too")
    optimizer, variable = deferred(device, max_deferral=7)
    slices = [IndexedSlices(*map(device.array, rows_of(seed))) for seed in range(3)]

    def work(steps: int) -> None:
        for number in range(steps):
            optimizer.apply_gradients([(slices[number % 3], variable)])
            variable.gather(slices[0].indices)
            if number % 5 == 4:
                variable.numpy()

    work(20)
    tracemalloc.start()
    try:
        work(10)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        work(100)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 4096
    finally:
        tracemalloc.stop()


SHAPES = {
    "blocks of 1, 2 of them": HostDevice(block_size=1, max_blocks=2),
    "blocks of 32": HostDevice(block_size=32),
    "blocks of 96, 2 of them": HostDevice(block_size=96, max_blocks=2),
    "blocks of 256": HostDevice(block_size=256),
}


@pytest.mark.thorough
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("columns", [1, 7, 64, 1000])
@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        ("float32", {}),
        ("float64", {"amsgrad": True, "weight_decay": 0.01}),
        ("complex64", {"clipnorm": 0.5}),
        ("bfloat16", {"stochastic_rounding": True, "slot_dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_every_launch_shape(shape: str, columns: int, dtype: str, config: dict[str, Any]) -> None:
    rng = np.random.default_rng(columns)
    rows = 9 if columns > 100 else 300
    twins = Twins(SHAPES[shape], [numbers(rng, (rows, columns), dtype)], beta_1=0.5, beta_2=0.7, **config)
    for number in range(30 if columns < 100 else 6):
        count = int(rng.integers(0, 7)) if number % 10 else 2 * rows
        twins.step(((numbers(rng, (count, columns), dtype), rng.integers(0, rows - 1, count)), 0))
    twins.check()


@pytest.mark.parametrize("settle", ["value", "averages"])
def test_tables_that_are_brought_up_to_date_in_several_launches(
    device: Device, settle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_adam.step.deferred._ROWS_AT_ONCE", 3)
    frequency: dict[str, Any] = {"use_ema": True, "ema_overwrite_frequency": 5} if settle == "averages" else {}
    tables = [Variable(np.ones((10, 2), np.float32), device=device) for _ in range(2)]
    for variable, sparse_update in zip(tables, ("deferred", "dense"), strict=True):
        optimizer = Adam(0.1, sparse_update=sparse_update, **frequency)
        for rows in (np.arange(10), *[np.array([0])] * 4):
            values = device.array(np.ones((len(rows), 2), np.float32))
            optimizer.apply_gradients([(IndexedSlices(values, device.array(rows)), variable)])
    assert_same_bits(tables[0].numpy(), tables[1].numpy())


def test_noise_of_a_variable_whose_place_changes(device: Device) -> None:
    tables = {}
    for sparse_update in ("deferred", "dense"):
        first, second = (Variable(np.ones((8, 8)), dtype="bfloat16", device=device) for _ in range(2))
        optimizer = Adam(0.01, stochastic_rounding=True, sparse_update=sparse_update)
        values = device.array(np.ones((8, 8), np.float32))

        def step(variables: list[Variable], rows: list[int]) -> None:
            slices = IndexedSlices(values[: len(rows)], device.array(np.array(rows)))  # noqa: B023
            optimizer.apply_gradients([(slices, variable) for variable in variables])  # noqa: B023

        step([first, second], list(range(8)))
        for _ in range(5):
            step([first, second], [0])
        optimizer.forget(first)
        step([second], [1])
        tables[sparse_update] = second.numpy().view(np.uint16)
    assert_same_bits(tables["deferred"], tables["dense"])


def test_another_optimizers_averages_are_refused_while_rows_are_behind(device: Device) -> None:
    variable = Variable(np.ones((4, 2), np.float32), device=device)
    averaging = Adam(0.1, use_ema=True)
    averaging.build([variable])
    values = device.array(np.ones((1, 2), np.float32))
    slices = IndexedSlices(values, device.array(np.array([1])))
    optimizer = Adam(0.1, sparse_update="deferred")
    optimizer.apply_gradients([(slices, variable)])
    with pytest.raises(ArgumentValueError, match="one optimizer alone"):
        averaging.overwrite_by_averages()


def test_slots_of_16_bits_bound_what_theta_moves_by(device: Device) -> None:
    tables = []
    for sparse_update in ("deferred", "dense"):
        variable = Variable(np.ones((2, 2), np.float32), device=device)
        rates: dict[str, Any] = {"learning_rate": 2**-25 * (1 - 1e-4), "beta_1": 0.9999, "beta_2": 0.999}
        optimizer = Adam(**rates, slot_dtype="bfloat16", sparse_update=sparse_update)
        optimizer.build([variable])
        for name in ("m", "v"):
            optimizer.get_slot(variable, name).assign(np.ones((2, 2)))
        optimizer.iterations = 10**6
        zeros = device.array(np.zeros((1, 2), np.float32))
        for _ in range(60):
            optimizer.apply_gradients([(IndexedSlices(zeros, device.array(np.array([0]))), variable)])
        tables.append(variable.numpy())
    assert_same_bits(tables[0], tables[1])
    assert (tables[0] != 1).all()
