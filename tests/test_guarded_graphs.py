"""Captured functions whose steps the device decides about: replays have the bits of calls, and wait for nothing."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from captures import HOST, Case, assert_same_state, captured, context_of, state
from reference import assert_same_bits

import gpu_adam
from gpu_adam import LossScale, Variable
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentValueError
from gpu_adam.step import candidates, replays, staging
from gpu_adam.step.candidates import ROOM

SCALE = LossScale(2.0**10, growth_interval=20)
SMALL = LossScale(2.0, growth_interval=50)  # the products with gradients stay in float16's range
CASES: dict[str, dict[str, Any]] = {
    "schedule, loss scale, global norm, both": {
        "config": {"learning_rate": "schedule", "loss_scale": SCALE, "global_clipnorm": 1.0, "telemetry": True},
        "kind": "both",
    },
    "callable, loss scale, amsgrad, averages": {
        "config": {"learning_rate": "callable", "loss_scale": SCALE, "amsgrad": True, "use_ema": True, "decay": 0.01},
    },
    "number, skipping, norm of each, dtypes, groups": {
        "config": {"skip_nonfinite": True, "clipnorm": 1.0, "weight_decay": 0.01, "telemetry": True},
        "dtypes": ("float32", "float64", "complex64"),
        "groups": True,
    },
    "16 bits, masters, schedule, loss scale": {
        "config": {"master_weights": True, "learning_rate": "schedule", "loss_scale": SMALL, "clipvalue": 0.5},
        "dtypes": ("float16",),
    },
    "sparse, skipping": {"config": {"learning_rate": "schedule", "skip_nonfinite": True}, "kind": "sparse"},
    "skipping, averages that overwrite, constraints, dtypes": {
        "config": {"skip_nonfinite": True, "use_ema": True, "ema_overwrite_frequency": 3, "telemetry": True},
        "dtypes": ("float32", "float64", "complex64"),
        "constraint": lambda variable: variable * variable.real.dtype.type(0.75),  # applied twice it would show
    },
    "16 bits, masters, loss scale, averages that overwrite": {
        "config": {"master_weights": True, "loss_scale": SMALL, "use_ema": True, "ema_overwrite_frequency": 2},
        "dtypes": ("float16", "float32"),
    },
    "both, skipping, averages that overwrite": {
        "config": {"learning_rate": "schedule", "skip_nonfinite": True, "use_ema": True, "ema_overwrite_frequency": 5},
        "kind": "both",
    },
    "telemetry, averages that overwrite": {
        "config": {"telemetry": True, "use_ema": True, "ema_overwrite_frequency": 7, "learning_rate": "schedule"},
    },
}
BAD = (0, 57)
"""In which steps of 200 gradients are not finite, in cases that leave such steps out."""


def change(optimizer: gpu_adam.Adam, number: int) -> None:
    """What a user assigns between steps."""
    if number == 70:
        optimizer.beta_2 = 0.99
    if number == 90:
        optimizer.iterations = 30
    if number == 120:
        optimizer.learning_rate = lambda: 0.5 / (3 + int(optimizer.iterations))


def assert_same_telemetry(one: Case, other: Case) -> None:
    """But for the last bits of the norms of updates and variables, where these are on two devices."""
    found, expected = (case.optimizer.read_telemetry() for case in (one, other))
    assert found is not None
    assert expected is not None
    if one.work.device is not other.work.device:
        np.testing.assert_allclose(found[-2:], expected[-2:], rtol=1e-12)
        found = found._replace(update_norm=expected.update_norm, param_norm=expected.param_norm)
    assert found == expected


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_replays_have_the_bits_of_calls(device: Device, case: str, seed: int) -> None:
    """Of 200 steps, two of them left out, some of them eager ones in between; counts, scale and telemetry too."""
    eager = Case(HOST, **CASES[case])
    with context_of(device, seed):
        own = Case(device, **CASES[case])
        for each in (own, eager):
            each.step()
        graph = own.optimizer.capture(own.step)
        assert_same_state(state(own.optimizer, own.work), state(eager.optimizer, eager.work))
        skips = own.optimizer.flavour.skips
        for number in range(200):
            for each in (own, eager):
                each.work.next_batch(number, is_bad=skips and number in BAD)
                change(each.optimizer, number)
            done = own.step() if number % 25 == 3 else graph.replay()
            assert done == eager.step()
            if own.optimizer.flavour.telemetry and number % 20 in (0, 17):
                own.optimizer.synchronize()
                assert_same_telemetry(own, eager)
        assert own.optimizer.skipped_steps == eager.optimizer.skipped_steps == (len(BAD) if skips else 0)
        assert_same_state(state(own.optimizer, own.work), state(eager.optimizer, eager.work))


@pytest.mark.parametrize("case", CASES)
def test_a_first_step_may_be_captured(device: Device, case: str) -> None:
    """And be left out; the loss scale, which the function reads, is created outside of the graph."""
    eager = Case(HOST, **CASES[case])
    with context_of(device):
        own = Case(device, **CASES[case])
        graph = own.optimizer.capture(own.step)
        assert own.optimizer.iterations == 0
        for number in range(6):
            for each in (own, eager):
                each.work.next_batch(number, is_bad=each.optimizer.flavour.skips and number % 3 == 0)
            assert graph.replay() == eager.step()
        assert own.optimizer.iterations == eager.optimizer.iterations
        assert_same_state(state(own.optimizer, own.work), state(eager.optimizer, eager.work))


def test_telemetry_of_replays_and_of_calls(device: Device) -> None:
    """On one device they are the same numbers."""
    config = {"loss_scale": SCALE, "telemetry": True, "clipvalue": 0.5, "learning_rate": "schedule"}
    with context_of(device, 1):
        own, eager = (Case(device, config=config, kind="both", dtypes=("float32", "float64")) for _ in range(2))
        graph = own.optimizer.capture(own.step)
        for number in range(8):
            for each in (own, eager):
                each.work.next_batch(number, is_bad=number in (2, 5))
            graph.replay()
            eager.step()
            for each in (own, eager):
                each.optimizer.synchronize()
            assert_same_telemetry(own, eager)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_scale_on_the_device(device: Device, dtype: str) -> None:
    """Is read by each replay as it is then; eager steps without one, or with another one, may come in between."""
    results = []
    for where in (device, HOST):
        with context_of(where):
            case = Case(where, config={"learning_rate": "schedule"}, kind="both")
            scale = Variable(np.asarray(2.0, dtype), device=where)

            def step(case: Case = case, scale: Variable = scale) -> int | None:
                return case.optimizer.apply_gradients(case.work.pairs(), grad_scale=scale)

            step()
            replay = step if where is HOST else case.optimizer.capture(step).replay
            for number in range(12):
                case.work.next_batch(number)
                scale.assign(np.asarray(number % 5 + 1, dtype))
                if number % 4 == 2:
                    case.optimizer.apply_gradients(case.work.pairs(), grad_scale=None if number % 8 == 2 else 3.0)
                assert replay() == case.optimizer.iterations
            results.append(state(case.optimizer, case.work))
    assert_same_state(*results)


def test_optimizers_that_step_together(device: Device) -> None:
    """Each with its own guard, or none; the rate of one looks at the count of the other."""
    results = []
    for where in (device, HOST):
        with context_of(where):
            one = Case(where, config={"loss_scale": SCALE, "learning_rate": "schedule"})
            two = Case(where, config={"skip_nonfinite": True})
            plain = Case(where, config={})
            two.optimizer.learning_rate = partial(lambda one: 0.1 / (1 + int(one.optimizer.iterations)), one)
            cases = (two, one, plain)

            def step(cases: tuple[Case, ...] = cases) -> None:
                for each in cases:
                    each.step()

            step()
            graph = plain.optimizer.capture(step)
            for number in range(12):
                for place, case in enumerate(cases):
                    case.work.next_batch(number + place, is_bad=case is not plain and number % 5 == place)
                assert graph.replay() == number + 2
            assert [int(case.optimizer.iterations) for case in cases] == [10, 10, 13]
            results.append([state(case.optimizer, case.work) for case in cases])
    for actual, expected in zip(*results, strict=True):
        assert_same_state(actual, expected)


@pytest.mark.parametrize(("room", "waits"), [(8, True), (ROOM, False)])
def test_a_replay_waits_where_its_room_ends(
    gpu: Device, emulation: Any, monkeypatch: pytest.MonkeyPatch, room: int, waits: bool
) -> None:
    """And nowhere else. The device is about as many steps behind as it has done here."""
    for module in (replays, candidates):
        monkeypatch.setattr(module, "ROOM", room)
    eager = Case(HOST, config={"learning_rate": "schedule", "loss_scale": SCALE})
    with context_of(gpu):
        own = Case(gpu, config={"learning_rate": "schedule", "loss_scale": SCALE})
        graph = own.optimizer.capture(own.step)
        gpu.synchronize()
        emulation.reset()
        for number in range(60):
            for each in (own, eager):
                each.work.next_batch(number, is_bad=number % 10 == 5)
            assert graph.replay() is None
            eager.step()
        assert bool(emulation.counters.syncs) == waits
        assert_same_state(state(own.optimizer, own.work), state(eager.optimizer, eager.work))


@pytest.mark.parametrize(
    ("config", "nodes"),
    [
        ({"skip_nonfinite": True}, ["square_sums"]),
        ({"loss_scale": SCALE, "global_clipnorm": 1.0}, ["square_sums"]),
        ({"telemetry": True}, ["square_sums", *["add_square_sum"] * 3]),
        ({"skip_nonfinite": True, "use_ema": True, "ema_overwrite_frequency": 9}, ["square_sums", "dense"]),
    ],
)
def test_nodes_of_a_guarded_step(gpu: Device, emulation: Any, config: dict[str, Any], nodes: list[str]) -> None:
    """Two kernels decide; the candidates come in one copy outside of the graph, and the report goes in another."""
    with context_of(gpu):
        case = Case(gpu, config=config)
        pairs = list(zip(case.work.batch, case.work.variables, strict=True))
        emulation.reset()
        graph = case.optimizer.capture(lambda: case.optimizer.apply_gradients(pairs))
        assert sorted(emulation.counters.graph_nodes[0]) == sorted(["guard_begin", *nodes, "guard_end", "dense"])
        for _ in range(3):
            with emulation.uncounted():
                gpu.synchronize()
            emulation.reset()
            graph.replay()
            assert emulation.counters.syncs == []
            assert emulation.counters.allocations == emulation.counters.device_allocations == 0
            with emulation.uncounted():
                gpu.synchronize()
            assert (emulation.counters.h2d, emulation.counters.d2h) == (1, 1)


def test_a_graph_keeps_what_decides(gpu: Device) -> None:
    """The guard, the loss scale and what was passed as a scale live on when the optimizer is gone."""
    eager = Case(HOST, config={"loss_scale": SCALE})
    with context_of(gpu):
        own = Case(gpu, config={"loss_scale": SCALE})
        scale = gpu.array(np.float64(SCALE.initial))
        step = partial(lambda own, scale: own.optimizer.apply_gradients(own.work.pairs(scale), grad_scale=scale))
        graph = own.optimizer.capture(partial(step, own, scale))
        for each in (own, eager):
            each.work.next_batch(1)
        variables, batch = own.work.variables, own.work.batch
        del own, scale
        gc.collect()
        gpu.xp.get_default_memory_pool().free_all_blocks()
        scratch = [gpu.array(np.full(n, np.nan)) for n in (1, 2, 9, 30) for _ in range(20)]
        for _ in range(3):
            graph.replay()
            eager.step()
        for variable, expected in zip(variables, eager.work.variables, strict=True):
            assert_same_bits(variable.numpy(), expected.numpy())
        del scratch, batch


# Graphs that the user captured by other means, and stages before each launch.

STAGED = {name: case for name, case in CASES.items() if "overwrite" not in name}
STAGED["skipping, averages that would overwrite later, dtypes"] = {
    "config": {"skip_nonfinite": True, "use_ema": True, "ema_overwrite_frequency": 1000, "learning_rate": "schedule"},
    "dtypes": ("float32", "float64"),
}


@contextlib.contextmanager
def staged(gpu: Device, config: dict[str, Any], graphs: list[Any]) -> Iterator[tuple[Case, Case]]:
    """A case with a captured step, which it has counted as step 2, and one that makes the same steps on the host.

    The device does nothing until somebody waits for it.
    """
    own, eager = Case(gpu, config=config), Case(HOST, config=config)
    with context_of(gpu):
        for each in (own, eager):
            each.given()
        assert own.optimizer.iterations == 1  # which waits
        with captured(gpu, graphs):
            own.given()
        yield own, eager


def assert_same(own: Case, eager: Case) -> None:
    """The same count and bits."""
    assert own.optimizer.iterations == eager.optimizer.iterations
    assert_same_state(state(own.optimizer, own.work), state(eager.optimizer, eager.work))


@pytest.mark.parametrize("case", STAGED)
@pytest.mark.parametrize("seed", [1, 2])
def test_staged_launches_have_the_bits_of_calls(gpu: Device, case: str, seed: int) -> None:
    """Of 100 steps, two of them left out, some of them eager ones in between; counts, scale and telemetry too."""
    eager, graphs = Case(HOST, **STAGED[case]), list[Any]()
    with context_of(gpu, seed):
        own = Case(gpu, **STAGED[case])
        for each in (own, eager):
            each.given()
        assert own.optimizer.iterations == 1  # which waits
        with captured(gpu, graphs):
            assert own.given() == 2
        skips = own.optimizer.flavour.skips
        for number in range(100):
            for each in (own, eager):
                each.work.next_batch(number, is_bad=skips and number in BAD)
                change(each.optimizer, number)
            done = own.given() if number % 25 == 3 else own.stage_and_launch(graphs[0])
            assert done == eager.given()
            if own.optimizer.flavour.telemetry and number % 20 in (0, 17):
                own.optimizer.synchronize()
                assert_same_telemetry(own, eager)
            if number == 58:
                assert own.optimizer.iterations == eager.optimizer.iterations
        assert own.optimizer.skipped_steps == eager.optimizer.skipped_steps == (len(BAD) if skips else 0)
        assert_same_state(state(own.optimizer, own.work), state(eager.optimizer, eager.work))


def test_a_guarded_graph_is_frozen_until_something_is_staged(gpu: Device, emulation: Any) -> None:
    """It repeats the step of its capture as often as it is launched; the loss scale goes on. It copies its scalars."""
    config = {"learning_rate": "schedule", "loss_scale": SCALE, "weight_decay": 0.1}
    eager, graphs = Case(HOST, config=config), list[Any]()
    with context_of(gpu):
        own = Case(gpu, config=config)
        for each in (own, eager):
            each.given()
        assert own.optimizer.iterations == 1
        emulation.reset()
        with captured(gpu, graphs):
            own.given()
        nodes = ["memcpy H2D", "guard_begin", "square_sums", "guard_end", "dense"]
        assert sorted(emulation.counters.graph_nodes[0]) == sorted(nodes)
        for number in range(3):
            for each in (own, eager):
                each.work.next_batch(number, is_bad=number == 1)
            graphs[0].launch()
            eager.optimizer.iterations = 1
            eager.given()
        assert own.optimizer.iterations == 2  # of which nobody has staged one
        for each in (own, eager):
            each.optimizer.iterations = 2
            each.given()
        assert_same_state(state(own.optimizer, own.work), state(eager.optimizer, eager.work))


@pytest.mark.parametrize("waits", [False, True])
def test_a_graph_that_is_launched_again_repeats_what_was_staged(gpu: Device, waits: bool) -> None:
    """It is counted once, whether or not the host knows which step it is: one before was left out."""
    graphs = list[Any]()
    with staged(gpu, {"skip_nonfinite": True, "learning_rate": "schedule"}, graphs) as (own, eager):
        for number, launches in enumerate((1, 3, 1, 2)):
            for each in (own, eager):
                each.work.next_batch(number, is_bad=number == 0)
            if waits and number > 0:
                assert own.optimizer.iterations == eager.optimizer.iterations
            own.optimizer.stage()
            before = int(eager.optimizer.iterations)
            for _ in range(launches):
                graphs[0].launch()
                eager.optimizer.iterations = before
                eager.given()
        assert own.optimizer.skipped_steps == 1
        assert_same(own, eager)


@pytest.mark.parametrize("is_staged", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_a_launch_that_nobody_staged_moves_no_count(gpu: Device, is_staged: bool, waits: bool) -> None:
    """Between steps of which the host knows nothing, or not all: it repeats what the graph did last, or its capture."""
    graphs, repeated = list[Any](), 1
    with staged(gpu, {"skip_nonfinite": True, "learning_rate": "schedule"}, graphs) as (own, eager):
        eager.optimizer.iterations = 2
        for _ in range(2):
            for each in (own, eager):
                each.given()
        if is_staged:
            repeated = int(eager.optimizer.iterations)
            own.stage_and_launch(graphs[0])
            eager.given()
        for _ in range(3):
            for each in (own, eager):
                each.given()
        if waits:
            assert own.optimizer.iterations == eager.optimizer.iterations
        for _ in range(2):
            before = int(eager.optimizer.iterations)
            graphs[0].launch()
            eager.optimizer.iterations = repeated
            eager.given()
            eager.optimizer.iterations = before
            for each in (own, eager):
                each.given()
        assert_same(own, eager)


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("config", [{"skip_nonfinite": True, "telemetry": True}, {"telemetry": True}])
def test_a_staged_step_that_is_not_launched(gpu: Device, config: dict[str, Any], looks: bool) -> None:
    """It counts until a later step shows that it was not done, where steps may be left out; else it counts for good."""
    graphs, may_be_left_out = list[Any](), "skip_nonfinite" in config
    with staged(gpu, config, graphs) as (case, _):
        for number in (2, 3):
            assert case.optimizer.stage() == (None if may_be_left_out else number)
            if looks:
                case.optimizer.synchronize()
                case.optimizer.read_telemetry()
                assert case.optimizer.iterations == number
        graphs[0].launch()
        assert case.optimizer.iterations == (2 if may_be_left_out else 3)
        case.given()
        assert case.optimizer.iterations == (3 if may_be_left_out else 4)
        assert case.optimizer.skipped_steps == 0


LOOKS: dict[str, Callable[[gpu_adam.Adam], object]] = {
    "read_telemetry": lambda optimizer: optimizer.read_telemetry(),
    "synchronize": lambda optimizer: optimizer.synchronize(),
    "iterations": lambda optimizer: optimizer.iterations,
    "skipped_steps": lambda optimizer: optimizer.skipped_steps,
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("skips", [False, True])
def test_a_look_between_staging_and_launch_loses_nothing(gpu: Device, look: str, skips: bool) -> None:
    """Though what the device reports then is too early."""
    config, graphs = {"skip_nonfinite": skips, "telemetry": True, "learning_rate": "schedule"}, list[Any]()
    with staged(gpu, config, graphs) as (own, eager):
        for number in range(5):
            for each in (own, eager):
                each.work.next_batch(number, is_bad=skips and number == 2)
            own.optimizer.stage()
            LOOKS[look](own.optimizer)
            graphs[0].launch()
            eager.given()
            if number % 2:
                gpu.synchronize()
        assert_same(own, eager)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("skips", [False, True])
def test_a_look_in_a_capture_does_no_harm(gpu: Device, look: str, skips: bool) -> None:
    """It is refused where it would have to wait, and puts nothing into the graph."""
    graphs = list[Any]()
    with staged(gpu, {"skip_nonfinite": skips, "telemetry": True}, graphs) as (own, eager):
        own.stage_and_launch(graphs[0])
        eager.given()
        waits = look == "skipped_steps" or (look == "iterations" and skips)
        expected = pytest.raises(ArgumentValueError, match=f"{look} must not be called while a graph is captured")
        if look != "synchronize":  # which CUDA itself refuses
            with captured(gpu, graphs, mode=2), expected if waits else contextlib.nullcontext():
                LOOKS[look](own.optimizer)
        for each in (own, eager):
            each.given()
        assert_same(own, eager)
        assert own.optimizer.skipped_steps == 0


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_from_another_stream_puts_nothing_into_a_capture(gpu: Device, emulation: Any, look: str) -> None:
    """Not on the stream on which steps are staged, while that is captured for something else."""
    graphs = list[Any]()
    with staged(gpu, {"skip_nonfinite": True, "telemetry": True}, graphs) as (own, eager):
        own.stage_and_launch(graphs[0])
        eager.given()
        emulation.reset()
        with captured(gpu, graphs, mode=2):
            own.work.batch[0] *= 1
            with gpu.xp.cuda.Stream(non_blocking=True):
                LOOKS[look](own.optimizer)
        assert not [node for node in emulation.counters.graph_nodes[0] if "memcpy" in node]
        for each in (own, eager):
            each.given()
        assert_same(own, eager)


def test_a_report_that_comes_while_a_step_is_staged(gpu: Device) -> None:
    """Of a step that was left out: the count is that of before or that of after, and the same for all graphs."""
    graphs = list[Any]()

    class Waiting(gpu_adam.LearningRateSchedule):
        def __call__(self, step: Any) -> float:
            gpu.synchronize()
            return 0.1 / (1 + int(step))

        def get_config(self) -> dict[str, Any]:
            return {}

    with staged(gpu, {"skip_nonfinite": True}, graphs) as (own, eager):
        for number in range(4):
            for each in (own, eager):
                each.work.next_batch(number, is_bad=number == 1)
                each.optimizer.learning_rate = Waiting() if number > 1 else 0.1
            own.stage_and_launch(graphs[0])
            eager.given()
        assert_same(own, eager)


def test_a_step_between_capture_and_staging(gpu: Device) -> None:
    """Nothing goes back to the captured step, also where the one in between is left out and the counts are equal."""
    for waits in (False, True):
        graphs = list[Any]()
        with staged(gpu, {"skip_nonfinite": True}, graphs) as (own, eager):
            eager.optimizer.iterations = 2
            for number in range(2):
                for each in (own, eager):
                    each.work.next_batch(number, is_bad=number == 0)
                if number == 0:
                    own.given()
                    if waits:
                        assert own.optimizer.iterations == 2
                else:
                    own.stage_and_launch(graphs[0])
                eager.given()
            assert own.optimizer.iterations == 3
            assert_same(own, eager)


def test_a_count_that_is_set_between_capture_and_staging(gpu: Device) -> None:
    """Also to what it is."""
    graphs = list[Any]()
    with staged(gpu, {"telemetry": True}, graphs) as (own, _):
        own.optimizer.iterations = 2
        assert own.optimizer.stage() == 3


def test_two_graphs_of_guarded_steps_by_turns(gpu: Device) -> None:
    """Of all variables, and of some: each launch takes what was staged last."""
    eager, graphs = Case(HOST, config={"skip_nonfinite": True, "learning_rate": "schedule"}), list[Any]()
    with context_of(gpu):
        own = Case(gpu, config={"skip_nonfinite": True, "learning_rate": "schedule"})

        def some(case: Case) -> None:
            case.optimizer.apply_gradients(list(zip(case.work.batch, case.work.variables, strict=True))[:2])

        for each in (own, eager):
            some(each)
            each.given()
        assert own.optimizer.iterations == 2
        with captured(gpu, graphs):
            own.given()
        with captured(gpu, graphs):
            some(own)
        for number in range(9):
            for each in (own, eager):
                each.work.next_batch(number, is_bad=number in (2, 5))
            own.stage_and_launch(graphs[number % 2])
            if number % 2:
                some(eager)
            else:
                eager.given()
        assert_same(own, eager)


@pytest.mark.parametrize("waits", [False, True])
def test_a_guarded_graph_beside_a_plain_one(gpu: Device, waits: bool) -> None:
    """Whichever is launched, the step counts."""
    eager, graphs = Case(HOST, config={"learning_rate": "schedule"}), list[Any]()
    with context_of(gpu):
        own, scale = Case(gpu, config={"learning_rate": "schedule"}), gpu.array(np.float32(2))
        own.given(grad_scale=scale)
        own.given()
        eager.given(grad_scale=2.0)
        eager.given()
        with captured(gpu, graphs):
            own.given(grad_scale=scale)
        with captured(gpu, graphs):
            own.given()
        for number in range(6):
            for each in (own, eager):
                each.work.next_batch(number)
            assert own.stage_and_launch(graphs[number % 3 > 0]) == number + 3
            eager.given(grad_scale=None if number % 3 > 0 else 2.0)
            if waits:
                gpu.synchronize()
        assert_same(own, eager)


@pytest.mark.parametrize(("room", "waits"), [(8, True), (ROOM, False)])
def test_staging_waits_where_its_room_ends(
    gpu: Device, emulation: Any, monkeypatch: pytest.MonkeyPatch, room: int, waits: bool
) -> None:
    for module in (replays, candidates, staging):
        monkeypatch.setattr(module, "ROOM", room)
    graphs = list[Any]()
    with staged(gpu, {"loss_scale": SCALE, "learning_rate": "schedule"}, graphs) as (own, eager):
        gpu.synchronize()
        emulation.reset()
        for number in range(60):
            for each in (own, eager):
                each.work.next_batch(number, is_bad=number % 10 == 5)
            assert own.stage_and_launch(graphs[0]) is None
            eager.given()
        assert bool(emulation.counters.syncs) == waits
        assert_same(own, eager)


def test_a_callable_may_synchronize(device: Device) -> None:
    """It is a part of a call of the optimizer that is at work."""
    optimizer = gpu_adam.Adam(skip_nonfinite=True)

    def rate() -> float:
        optimizer.synchronize()
        return 0.1

    optimizer.learning_rate = rate
    variable = Variable(np.ones(3, np.float32), device=device)
    for _ in range(2):
        optimizer.apply_gradients([(device.array(np.ones(3, np.float32)), variable)])
    assert optimizer.iterations == 2


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_scale_on_the_device_in_a_graph_of_the_users(gpu: Device, dtype: str) -> None:
    """Is read by each launch as it is then, and lives as long as the graph."""
    eager, graphs = Case(HOST, config={"learning_rate": "schedule"}), list[Any]()
    with context_of(gpu):
        own = Case(gpu, config={"learning_rate": "schedule"})
        scales = [gpu.array(np.asarray(2.0, dtype)), HOST.array(np.asarray(2.0, dtype))]
        for each, scale in zip((own, eager), scales, strict=True):
            each.given(grad_scale=scale)
        with captured(gpu, graphs, mode=2 if dtype == "float16" else 0):  # which takes memory for a cast
            assert own.given(grad_scale=scales[0]) == 2
        for number in range(8):
            for each, scale in zip((own, eager), scales, strict=True):
                each.work.next_batch(number)
                scale[...] = number % 5 + 1
            assert own.stage_and_launch(graphs[0]) == number + 2
            eager.given(grad_scale=scales[1])
        assert_same_state(state(own.optimizer, own.work), state(eager.optimizer, eager.work))


def test_a_graph_of_the_users_keeps_what_decides(gpu: Device) -> None:
    """The guard, the loss scale and what was passed as a scale live on when the optimizer is gone."""
    eager, graphs = Case(HOST, config={"loss_scale": SCALE}), list[Any]()
    with context_of(gpu):
        own = Case(gpu, config={"loss_scale": SCALE})
        scale = gpu.array(np.float64(4))
        for each in (own, eager):
            each.given(grad_scale=4.0)
        own.given(grad_scale=scale)
        eager.given(grad_scale=4.0)
        assert own.optimizer.iterations == 2
        with captured(gpu, graphs):
            own.given(grad_scale=scale)
        eager.optimizer.iterations = 3
        for each in (own, eager):
            each.given(grad_scale=4.0)
        variables, batch = own.work.variables, own.work.batch
        for each in (own, eager):
            each.work.next_batch(1)
        del own, scale, each
        gc.collect()
        gpu.xp.get_default_memory_pool().free_all_blocks()
        scratch = [gpu.array(np.full(n, np.nan)) for n in (1, 2, 9, 30) for _ in range(20)]
        for _ in range(3):
            graphs[0].launch()
            eager.optimizer.iterations = 2
            eager.given(grad_scale=4.0)
        for variable, expected in zip(variables, eager.work.variables, strict=True):
            assert_same_bits(variable.numpy(), expected.numpy())
        del scratch, batch


def test_staging_that_fails_forgets_no_report(gpu: Device) -> None:
    """What the host learns of steps that were left out stays, where a callable raises behind that."""
    eager, graphs = Case(HOST, config={"skip_nonfinite": True}), list[Any]()
    with context_of(gpu):
        case = Case(gpu, config={"skip_nonfinite": True})
        for each in (case, eager):
            each.given()
        assert case.optimizer.iterations == 1
        with captured(gpu, graphs):
            case.given()

        def fails() -> float:
            raise KeyError("x")

        for number in range(4):
            for each in (case, eager):
                each.work.next_batch(number, is_bad=number == 1)
            if number in (0, 2):  # before the first one and behind one that was left out
                case.optimizer.beta_1 = fails
                for _ in range(2):
                    gpu.synchronize()
                    with pytest.raises(KeyError):
                        case.optimizer.stage()
                case.optimizer.beta_1 = 0.9
            case.stage_and_launch(graphs[0])
            eager.given()
        assert case.optimizer.iterations == eager.optimizer.iterations == 4
        assert_same_state(state(case.optimizer, case.work), state(eager.optimizer, eager.work))


def test_a_capture_that_knows_no_count_is_refused(gpu: Device) -> None:
    """Of a step that may be left out; nothing has changed then, and reading the count is what helps."""
    graphs = list[Any]()
    with context_of(gpu):
        case = Case(gpu, config={"skip_nonfinite": True})
        case.given()
        words = r"must begin with a count that is known \(got steps before it .*\); read iterations before the capture"
        with captured(gpu, graphs), pytest.raises(ArgumentValueError, match=words):
            case.given()
        assert case.optimizer.iterations == 1
        with captured(gpu, graphs):
            case.given()
        case.stage_and_launch(graphs[1])
        assert case.optimizer.iterations == 2


def test_a_guarded_step_with_overwriting_averages_is_not_staged(gpu: Device) -> None:
    """Nor captured; as long as the host does not know which steps are done, it refuses where one of them would."""
    graphs = list[Any]()
    config = {"skip_nonfinite": True, "use_ema": True, "ema_overwrite_frequency": 3}
    with context_of(gpu):
        case = Case(gpu, config=config)
        case.given()
        assert case.optimizer.iterations == 1
        with captured(gpu, graphs):
            case.given()
        assert case.stage_and_launch(graphs[0]) is None
        for _ in range(2):
            with pytest.raises(ArgumentValueError, match="must not overwrite variables by their averages"):
                case.optimizer.stage()
            assert case.optimizer.iterations == 2
        with captured(gpu, graphs, mode=2), pytest.raises(ArgumentValueError, match="must not overwrite variables"):
            case.given()
        case.given()
        assert case.optimizer.iterations == 3


# What is refused; nothing has changed then.


@pytest.mark.parametrize("config", [{"skip_nonfinite": True}, {"telemetry": True}, {}])
def test_a_second_step_is_refused(gpu: Device, config: dict[str, Any]) -> None:
    """Also one without a guard behind one with."""
    with context_of(gpu):
        case, scale = Case(gpu, config=config), gpu.array(np.float32(8))
        case.optimizer.apply_gradients(case.work.pairs())
        before = state(case.optimizer, case.work)

        def twice() -> None:
            case.optimizer.apply_gradients(case.work.pairs(), grad_scale=None if config else scale)
            case.step()

        words = r"the captured function must make one step of an optimizer with skip_nonfinite, .* \(got a second one\)"
        with pytest.raises(ArgumentValueError, match=words):
            case.optimizer.capture(twice)
        assert_same_state(state(case.optimizer, case.work), before)
        case.step()
        assert case.optimizer.iterations == 2


def test_a_replay_that_fails_forgets_no_report(device: Device) -> None:
    """What the host learns of steps that were left out stays, where a callable raises behind that."""
    with context_of(device):
        case, eager = (Case(where, config={"skip_nonfinite": True}) for where in (device, HOST))
        graph = case.optimizer.capture(case.step)
        for number in range(3):
            for each in (case, eager):
                each.work.next_batch(number, is_bad=number == 1)
            graph.replay()
            eager.step()

        def fails() -> float:
            assert case.optimizer.iterations == 2
            raise KeyError("x")

        case.optimizer.beta_1 = fails
        for _ in range(2):
            with pytest.raises(KeyError):
                graph.replay()
        assert case.optimizer.iterations == 2
        case.optimizer.beta_1 = 0.9
        graph.replay()
        eager.step()
        assert case.optimizer.iterations == 3
        assert_same_state(state(case.optimizer, case.work), state(eager.optimizer, eager.work))


def test_a_failed_capture_leaves_no_loss_scale(gpu: Device) -> None:
    with context_of(gpu):
        case = Case(gpu, config={"loss_scale": SCALE})

        def fails() -> None:
            case.step()
            raise KeyError("x")

        with pytest.raises(KeyError):
            case.optimizer.capture(fails)
        assert list(case.optimizer.export()) == []
        case.step()
        assert case.optimizer.iterations == 1


def test_a_bad_scale_is_refused(gpu: Device) -> None:
    with context_of(gpu):
        case, scale = Case(gpu, config={}), gpu.array(np.ones(1, np.float32))
        with pytest.raises(ArgumentValueError, match=r"grad_scale must be a 0-d array"):
            case.optimizer.capture(lambda: case.optimizer.apply_gradients(case.work.pairs(), grad_scale=scale))
        assert case.optimizer.weights == []
