"""Captured functions: a replay has the bits of a call, on every device; what is in a graph, and what is refused."""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from captures import HOST, Case, assert_same_state, captured, context_of, state
from reference import Array, assert_same_bits

import gpu_adam
from gpu_adam import Variable
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.step.replays import CapturedFunction

CASES: dict[str, dict[str, Any]] = {
    "schedule, groups": {"config": {"learning_rate": "schedule", "weight_decay": 0.01}, "groups": True},
    "callable, amsgrad, decay": {"config": {"learning_rate": "callable", "amsgrad": True, "decay": 0.01}},
    "global norm, both": {"config": {"global_clipnorm": 1.0, "clipvalue": 2.0}, "kind": "both"},
    "norm of each, dtypes": {"config": {"clipnorm": 1.0}, "dtypes": ("float32", "float64", "complex64")},
    "sparse, clipped": {"config": {"learning_rate": "schedule", "clipvalue": 0.5}, "kind": "sparse"},
    "16 bits, masters, averages that overwrite": {
        "config": {"master_weights": True, "use_ema": True, "ema_overwrite_frequency": 7, "learning_rate": "schedule"},
        "dtypes": ("float16",),
    },
    "averages that overwrite": {
        "config": {"use_ema": True, "ema_overwrite_frequency": 7, "ema_momentum": 0.9, "weight_decay": 0.01},
        "constraint": lambda variable: variable * variable.dtype.type(0.5),
    },
}


def change(optimizer: gpu_adam.Adam, number: int) -> None:
    """What a user assigns between steps."""
    if number == 20:
        optimizer.beta_2 = 0.99
    if number == 60 and not optimizer.amsgrad:
        optimizer.learning_rate = 0.02
    if number == 70:
        optimizer.learning_rate = lambda: 0.5 / (3 + int(optimizer.iterations))
    if number == 90:
        optimizer.iterations = 30
    if number == 120 and optimizer.clipvalue is not None and optimizer.global_clipnorm is None:
        optimizer.clipvalue = 0.25
    if number == 130 and optimizer.weight_decay:
        optimizer.weight_decay = 0.02
    if number == 140 and optimizer.weight_decay:
        optimizer.weight_decay = 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_replays_have_the_bits_of_calls(device: Device, case: str, seed: int) -> None:
    """Of 200 steps, some of them eager ones in between, with what is assigned meanwhile."""
    eager = Case(HOST, **CASES[case])
    with context_of(device, seed):
        own = Case(device, **CASES[case])
        own.step()
        eager.step()
        before = state(own.optimizer, own.work)
        graph = own.optimizer.capture(own.step)
        assert_same_state(state(own.optimizer, own.work), before)
        for number in range(200):
            for each in (own, eager):
                each.work.next_batch(number)
                change(each.optimizer, number)
            done = own.step() if number % 25 == 3 else graph.replay()
            assert done == eager.step()
        assert_same_state(state(own.optimizer, own.work), state(eager.optimizer, eager.work))


@pytest.mark.parametrize("case", CASES)
def test_a_first_step_may_be_captured(device: Device, case: str) -> None:
    """Slots are created, no step is done, and the replays are the first steps; also of an optimizer that was built."""
    for is_built in (False, True):
        eager = Case(HOST, **CASES[case])
        with context_of(device):
            own = Case(device, **CASES[case])
            if is_built:
                own.optimizer.build(own.work.all)
            values = [variable.numpy() for variable in own.work.all]
            graph = own.optimizer.capture(own.step)
            assert own.optimizer.iterations == 0
            for variable, value in zip(own.work.all, values, strict=True):
                assert_same_bits(variable.numpy(), value)
            for number in range(8):
                for each in (own, eager):
                    each.work.next_batch(number)
                assert graph.replay() == eager.step()
            assert_same_state(state(own.optimizer, own.work), state(eager.optimizer, eager.work))


def test_a_rate_may_set_the_count(device: Device) -> None:
    """As in a call of the function, the step is then the one after that count."""
    case, eager = (Case(where, config={}) for where in (device, HOST))
    for each in (case, eager):

        def rate(each: Case = each) -> float:
            if each.optimizer.iterations == 4:
                each.optimizer.iterations.assign(7)
            return 0.1

        each.optimizer.learning_rate = rate
    with context_of(device):
        graph = case.optimizer.capture(case.step)
        assert [graph.replay() for _ in range(6)] == [eager.step() for _ in range(6)] == [1, 2, 3, 4, 8, 9]
        assert_same_state(state(case.optimizer, case.work), state(eager.optimizer, eager.work))


def test_replays_round_by_other_lots(device: Device) -> None:
    """The seed of a step's noise is one of its scalars."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    results = []
    for where in (device, HOST):
        with context_of(where):
            variable = Variable(np.ones(4097, ml_dtypes.bfloat16), device=where)
            gradient = where.array(np.linspace(-1, 1, 4097, dtype=np.float32))
            adam = gpu_adam.Adam(0.001, stochastic_rounding=True)
            step = partial(adam.apply_gradients, [(gradient, variable)])
            step()
            replay = step if where is HOST else adam.capture(step).replay
            assert [replay() for _ in range(10)] == list(range(2, 12))
            results.append(variable.numpy().view(np.uint16))
    assert len(set(results[0].tolist())) > 2
    assert_same_bits(results[0], results[1])


def test_a_loss_is_captured(device: Device) -> None:
    results = []
    for where in (device, HOST):
        with context_of(where):
            w, x = Variable(np.ones(5, np.float32), device=where), where.array(np.arange(5, dtype=np.float32))
            adam = gpu_adam.Adam(0.1)
            adam.build([w])
            graph = adam.capture(partial(adam.minimize, partial(lambda w, x: (w - x) * (w - x), w, x), [w]))
            for number in range(10):
                x[...] = where.array(np.arange(number, number + 5, dtype=np.float32))
                assert graph.replay() == number + 1
            results.append(w.numpy())
    assert_same_bits(results[0], results[1])


def test_all_optimizers_of_a_function_step(device: Device) -> None:
    """Two optimizers by turns, one of them twice, as a GAN does; each with its own count and rate."""
    results = [steps_of_two(where) for where in (device, HOST)]
    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual, expected)


def steps_of_two(device: Device) -> list[Array]:
    with context_of(device):
        w, u = (Variable(np.full(5, x, np.float32), device=device) for x in (1.0, 2.0))
        one = gpu_adam.Adam(gpu_adam.ExponentialDecay(0.1, 3, 0.5), name="one")
        other: gpu_adam.Adam = gpu_adam.Adam(lambda: 0.1 / (1 + int(other.iterations)), name="other")
        one.build([w])
        other.apply_gradients([(w.value - u.value, u)])

        seen: list[Any] = [1, 2, 3]

        def function() -> list[Any]:
            seen[:] = [
                one.apply_gradients([(w.value - u.value, w)]),
                other.apply_gradients([(u.value * w.value, u)]),
                other.apply_gradients([(w.value + u.value, u)]),
            ]
            return seen

        graph = one.capture(function)
        assert seen == [1, 2, 3]
        for number in range(10):
            if number == 5:
                assert function()[0] == number + 1
            else:
                assert graph.replay() == number + 1
            assert other.iterations == 2 * number + 3
        arrays = [w.numpy(), u.numpy(), *one.get_weights(), *other.get_weights()]
        return [np.asarray(array) for array in arrays]


def test_several_graphs_of_one_optimizer(device: Device) -> None:
    """Of the same variables with other gradients, and of some of the variables."""
    results = []
    for where in (device, HOST):
        with context_of(where):
            case = Case(where, config={"learning_rate": "schedule", "global_clipnorm": 1.0}, kind="both")
            adam, work = case.optimizer, case.work
            functions: list[Callable[[], Any]] = [
                case.step,
                partial(lambda case: case.optimizer.apply_gradients(case.work.pairs()[:2]), case),
                partial(lambda case: case.optimizer.apply_gradients([(v.value, v) for v in case.work.all]), case),
            ]
            adam.build(work.all)
            graphs = [adam.capture(function) for function in functions]
            for number, turn in enumerate((0, 1, 2, 2, 1, 0, 0, 2)):
                work.next_batch(number)
                assert graphs[turn].replay() == number + 1
            results.append(state(adam, work))
    assert_same_state(*results)


@pytest.mark.parametrize("kind", ["dense", "both"])
def test_a_graph_keeps_its_optimizer(device: Device, kind: str) -> None:
    """And the gradients, the variables and all other memory: nobody else is given what it uses."""
    eager = Case(HOST, config={"learning_rate": "schedule", "clipnorm": 1.0}, kind=kind)
    with context_of(device):
        own = Case(device, config={"learning_rate": "schedule", "clipnorm": 1.0}, kind=kind)
        graph, values = own.optimizer.capture(own.step), [variable.value for variable in own.work.all]
        batch = own.work
        for each in (batch, eager.work):
            each.next_batch(1)
        del own
        gc.collect()
        if device.name != "host":
            device.xp.get_default_memory_pool().free_all_blocks()
        scratch = [device.array(np.full(n, np.nan, np.float32)) for n in (1, 3, 30, 45, 85, 4097) for _ in range(5)]
        for _ in range(3):
            assert graph.replay() == eager.step()
        assert all(np.isnan(device.numpy(array)).all() for array in scratch)
        for value, variable in zip(values, eager.work.all, strict=True):
            assert_same_bits(device.numpy(value), variable.numpy())
        del batch


def test_what_a_function_builds_is_no_part_of_its_graph(gpu: Device) -> None:
    """Else each replay would create the slots again, full of zeros."""
    eager = Case(HOST, config={"amsgrad": True})
    with context_of(gpu):
        own = Case(gpu, config={"amsgrad": True})

        def step() -> None:
            own.optimizer.build(own.work.all)
            own.step()

        graph = own.optimizer.capture(step)
        for number in range(3):
            for each in (own, eager):
                each.work.next_batch(number)
            assert graph.replay() == eager.step()
        assert_same_state(state(own.optimizer, own.work), state(eager.optimizer, eager.work))


def test_a_graph_is_given_back_at_once(gpu: Device) -> None:
    """With its memory, as soon as nobody has it: nothing of it waits for the garbage collector."""
    with context_of(gpu):
        case = plain(gpu)
        graph = case.optimizer.capture(case.step)
        assert isinstance(graph, CapturedFunction)
        launches = weakref.ref(graph._steps[0][1].launches)
        gc.disable()
        try:
            del graph
            assert launches() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("dtypes", [["float32"], ["float32", "complex128"]])
@pytest.mark.parametrize(
    ("config", "norms"),
    [({}, []), ({"clipnorm": 1.0}, ["square_sums"]), ({"weight_decay": 0.1, "use_ema": True}, [])],
)
def test_nodes_of_a_captured_function(
    gpu: Device, emulation: Any, config: dict[str, Any], norms: list[str], dtypes: list[str]
) -> None:
    """A step is one kernel for each dtype, and those of a norm, whatever groups there are; no copy."""
    with context_of(gpu):
        variables = [Variable(np.ones(3 + k, dtypes[k % len(dtypes)])) for k in range(4)]
        pairs = [(gpu.array(np.ones(variable.shape, variable.dtype)), variable) for variable in variables]
        adam = gpu_adam.Adam(**config)
        adam.set_group(variables[:2], learning_rate_multiplier=2.0)
        emulation.reset()
        graph = adam.capture(lambda: adam.apply_gradients(pairs))
        (nodes,) = emulation.counters.graph_nodes
        assert sorted(nodes) == sorted(["dense", *norms] * len(dtypes))
        with emulation.uncounted():
            adam.synchronize()
        emulation.reset()
        for _ in range(3):
            graph.replay()
        counters = emulation.counters
        assert counters.syncs == []
        assert counters.allocations == counters.device_allocations == 0
        with emulation.uncounted():
            adam.synchronize()
        assert counters.h2d == 3 * len(dtypes)  # the scalars
        assert adam.iterations == 3


# Graphs that the user captured by other means: each launch takes what was staged last.


STAGED = [case for case in CASES if "overwrite" not in case]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", STAGED)
def test_staged_launches_have_the_bits_of_calls(gpu: Device, case: str, seed: int) -> None:
    """Of 100 steps, some of them eager ones in between, with what is assigned meanwhile."""
    eager, graphs = Case(HOST, **CASES[case]), list[Any]()
    with context_of(gpu, seed):
        own = Case(gpu, **CASES[case])
        own.given()
        eager.given()
        with captured(gpu, graphs):
            assert own.given() == 2
        for number in range(100):
            for each in (own, eager):
                each.work.next_batch(number)
                change(each.optimizer, number)
            done = own.given() if number % 25 == 3 else own.stage_and_launch(graphs[0])
            assert done == eager.given()
        assert_same_state(state(own.optimizer, own.work), state(eager.optimizer, eager.work))


def test_new_memory_is_not_taken_for_staged_scalars(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it held before: here every new array is full of positive numbers."""
    empty, graphs = type(gpu).empty, list[Any]()

    def used(self: Any, size: int, dtype: Any) -> Any:
        array = empty(self, size, dtype)
        array.view(np.uint8)[...] = 0x3F
        return array

    monkeypatch.setattr(type(gpu), "empty", used)
    eager = plain(HOST)
    with context_of(gpu):
        case = plain(gpu)
        case.given()
        with captured(gpu, graphs):
            case.given()
        graphs[0].launch()
        for _ in range(2):
            eager.given()
        assert_same_state(state(case.optimizer, case.work), state(eager.optimizer, eager.work))


@pytest.mark.parametrize("groups", [False, True])
def test_a_graph_is_frozen_until_something_is_staged(gpu: Device, emulation: Any, groups: bool) -> None:
    """With the scalars of its own capture, also where others were captured since; a step is one kernel.

    The scalars of several groups are copied by the graph, for an argument has room for one of each.
    """
    config: dict[str, Any] = {"config": {"learning_rate": "schedule", "weight_decay": 0.1}, "groups": groups}
    eager, graphs = Case(HOST, **config), list[Any]()
    with context_of(gpu):
        own = Case(gpu, **config)
        emulation.reset()
        for _ in range(2):
            own.given()
            eager.given()
            with captured(gpu, graphs):
                own.given()
            eager.optimizer.iterations += 1
        for nodes in emulation.counters.graph_nodes:
            assert nodes == (["memcpy H2D", "dense"] if groups else ["dense"])
        for turn in (0, 1, 1, 0):
            graphs[turn].launch()
            eager.optimizer.iterations = 1 + 2 * turn
            eager.given()
        # Staged: the second capture has counted step 4, which nobody has begun with yet.
        eager.optimizer.iterations = 3
        for turn in (1, 0, 0):
            assert own.stage_and_launch(graphs[turn]) == eager.given()
        assert_same_state(state(own.optimizer, own.work), state(eager.optimizer, eager.work))


def test_the_first_staged_step_is_the_first_that_was_captured(gpu: Device) -> None:
    """However many graphs were captured in a row; an eager step in between goes on from what was counted."""
    with context_of(gpu):
        case, graphs = plain(gpu), list[Any]()
        case.given()
        for _ in range(3):
            with captured(gpu, graphs, mode=2):
                case.given()
        assert case.optimizer.iterations == 4
        assert [case.optimizer.stage(), case.optimizer.stage()] == [2, 3]
        with captured(gpu, graphs, mode=2):
            case.given()
        case.given()
        assert [case.optimizer.stage(), case.optimizer.stage()] == [6, 7]


def test_staging_is_refused(gpu: Device) -> None:
    """Where nothing was captured, in a capture, and where a graph does not fit; nothing has changed then."""
    with context_of(gpu):
        case, graphs = plain(gpu), list[Any]()
        case.step()
        with unchanged(case), pytest.raises(ArgumentValueError, match=r"stage must follow the capture .* \(got none\)"):
            case.optimizer.stage()
        case.given()
        with captured(gpu, graphs):
            case.given()
            with pytest.raises(ArgumentValueError, match="stage must not be called while a graph is captured"):
                case.optimizer.stage()
        case.optimizer.learning_rate = lambda: np.nan
        before = int(case.optimizer.iterations)
        with pytest.raises(ArgumentValueError, match="learning_rate must be finite"):
            case.optimizer.stage()
        case.optimizer.learning_rate = 0.1
        case.optimizer.amsgrad = False
        with pytest.raises(ArgumentValueError, match=r"\(got other amsgrad\); capture it again"):
            case.optimizer.stage()
        assert case.optimizer.iterations == before
        case.given()
        with captured(gpu, graphs):
            case.given()
        case.optimizer.stage()  # which leaves out the graph that does not fit
        case.optimizer.forget(case.work.variables[0])
        with unchanged(case), pytest.raises(ArgumentValueError, match="got other variables, slots or groups"):
            case.optimizer.stage()


def test_a_step_with_overwriting_averages_is_not_staged(gpu: Device) -> None:
    with context_of(gpu):
        case, graphs = Case(gpu, config={"use_ema": True, "ema_overwrite_frequency": 3}), list[Any]()
        case.given()
        with captured(gpu, graphs):
            case.given()
        assert case.optimizer.stage() == 2
        with unchanged(case), pytest.raises(ArgumentValueError, match="must not overwrite variables by their averages"):
            case.optimizer.stage()


def test_both_kinds_of_graphs_of_one_optimizer(gpu: Device) -> None:
    eager, graphs = plain(HOST), list[Any]()
    with context_of(gpu):
        case = plain(gpu)
        case.given()
        eager.given()
        graph = case.optimizer.capture(case.step)
        with captured(gpu, graphs):
            case.given()
        for number in range(6):
            for each in (case, eager):
                each.work.next_batch(number)
            if number % 3 == 0:
                case.stage_and_launch(graphs[0])
                eager.given()
            else:
                assert graph.replay() == eager.step()
        assert_same_state(state(case.optimizer, case.work), state(eager.optimizer, eager.work))


# What is refused changes nothing.


@contextlib.contextmanager
def unchanged(case: Case) -> Iterator[None]:
    """Within, nothing changes; after it, a step works."""
    before = state(case.optimizer, case.work)
    yield
    assert_same_state(state(case.optimizer, case.work), before)
    assert case.step() == before["iterations"] + 1


def plain(device: Device) -> Case:
    return Case(device, config={"learning_rate": 0.1, "amsgrad": True, "clipnorm": 1.0}, kind="both")


def test_what_is_no_function_is_refused(device: Device) -> None:
    case = plain(device)
    with pytest.raises(ArgumentTypeError, match=r"function must be a callable without arguments \(got int\); pass a"):
        case.optimizer.capture(3)  # type: ignore[arg-type]


def test_a_function_without_step_is_refused(device: Device) -> None:
    """By the capture, or where nothing is captured by the replay; steps of other optimizers do not count."""
    with context_of(device):
        case, other = plain(device), plain(device)
        case.step()
        with (
            unchanged(case),
            pytest.raises(ArgumentValueError, match=r"must make a step of optimizer 'Adam' \(got none"),
        ):
            case.optimizer.capture(other.step).replay()


@pytest.mark.parametrize("is_first", [True, False])
def test_a_function_that_fails_changes_nothing(gpu: Device, is_first: bool) -> None:
    with context_of(gpu):
        case = plain(gpu)
        if not is_first:
            case.step()

        def fail() -> None:
            case.step()
            raise KeyError("x")

        case.optimizer.build(case.work.variables[:1])
        weights = list(case.optimizer.weights)
        with unchanged(case), pytest.raises(KeyError, match="x"):
            case.optimizer.capture(fail)
        assert case.optimizer.weights[: len(weights)] == weights


@pytest.mark.parametrize("wait", ["float", "numpy", "synchronize", "list"])
def test_a_function_that_waits_is_refused(gpu: Device, wait: str) -> None:
    with context_of(gpu):
        case = plain(gpu)
        case.step()
        waits: dict[str, Callable[[], Any]] = {
            "float": lambda: float(case.work.variables[0].value[0]),
            "numpy": case.work.variables[0].numpy,
            "synchronize": case.optimizer.synchronize,
            "list": lambda: case.optimizer.apply_gradients([([1.0, 2.0, 3.0], case.work.variables[0])]),
        }

        def function() -> None:
            case.step()
            waits[wait]()

        with unchanged(case), pytest.raises((ArgumentValueError, ArgumentTypeError), match="captured"):
            case.optimizer.capture(function)


def test_graphs_are_not_nested(gpu: Device) -> None:
    with context_of(gpu):
        case = plain(gpu)
        case.step()
        graph = case.optimizer.capture(case.step)

        def replays() -> None:
            case.step()
            graph.replay()

        message = r"must not be called while a graph is captured \(got a call inside of a capture\); end"
        with unchanged(case), pytest.raises(ArgumentValueError, match=f"replay {message}"):
            case.optimizer.capture(replays)
        with unchanged(case), pytest.raises(ArgumentValueError, match=f"capture {message}"):
            case.optimizer.capture(lambda: case.optimizer.capture(case.step))
        with unchanged(case):
            stream = gpu.xp.cuda.get_current_stream()
            stream.begin_capture()
            with pytest.raises(ArgumentValueError, match=f"replay {message}"):
                graph.replay()
            with pytest.raises(ArgumentValueError, match=f"capture {message}"):
                case.optimizer.capture(case.step)
            stream.end_capture()
        graph.replay()


def test_steps_elsewhere_are_not_captured(gpu: Device) -> None:
    """On another device, or on another stream than that of the capture: they would run at once."""
    with context_of(gpu):
        case = plain(gpu)
        case.step()
        host = plain(HOST)
        stream = gpu.xp.cuda.Stream(non_blocking=True)

        def on_another_stream() -> None:
            with stream:
                case.step()

        for function, where in ((host.step, "host"), (on_another_stream, gpu.name)):
            with unchanged(case), pytest.raises(ArgumentValueError, match=rf"is called \(got one on {where}\)"):
                case.optimizer.capture(function)
        assert host.optimizer.iterations == 0


def test_two_steps_with_overwriting_averages_are_not_captured(gpu: Device) -> None:
    with context_of(gpu):
        case = Case(gpu, config={"use_ema": True, "ema_overwrite_frequency": 2})
        case.step()

        def twice() -> None:
            case.step()
            case.step()

        with (
            unchanged(case),
            pytest.raises(ArgumentValueError, match="must make one step of an optimizer with ema_over"),
        ):
            case.optimizer.capture(twice)


CHANGES: dict[str, Callable[[Case], object]] = {
    "amsgrad": lambda case: setattr(case.optimizer, "amsgrad", False),
    "bounds": lambda case: setattr(case.optimizer, "clipnorm", 2.0),
    "norm, bounds": lambda case: setattr(case.optimizer, "clipnorm", None),
    "adjusts": lambda case: setattr(case.optimizer, "weight_decay", 0.1),
    "bounded, bounds": lambda case: setattr(case.optimizer, "clipvalue", 0.1),
    "variables, slots or groups": lambda case: case.optimizer.set_group(case.work.all[:1], beta_1=0.5),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_graph_of_another_kind_of_step_is_not_replayed(gpu: Device, what: str) -> None:
    with context_of(gpu):
        case = plain(gpu)
        case.step()
        graph = case.optimizer.capture(case.step)
        CHANGES[what](case)
        with unchanged(case), pytest.raises(ArgumentValueError, match=rf"\(got other {what}\); capture it again"):
            graph.replay()


def test_a_rate_that_breaks_its_rule_is_refused_at_the_replay(device: Device) -> None:
    """Also where an optimizer before it in the function has been counted already."""
    with context_of(device):
        case, other = plain(device), plain(device)
        rates = [0.1, 0.1, 0.1, 0.1, 0.1]
        case.optimizer.learning_rate = lambda: rates.pop() if rates else np.nan

        def function() -> None:
            other.step()
            case.step()

        graph = case.optimizer.capture(function)
        while rates:
            graph.replay()
        before = state(case.optimizer, case.work), state(other.optimizer, other.work)
        with pytest.raises(ArgumentValueError, match="learning_rate must be finite"):
            graph.replay()
        assert_same_state(state(case.optimizer, case.work), before[0])
        if device.name != "host":  # there the other's step has been called
            assert_same_state(state(other.optimizer, other.work), before[1])
            case.optimizer.learning_rate = 0.1
            assert graph.replay() == before[0]["iterations"] + 1


def test_a_replay_in_a_loss_is_refused(device: Device) -> None:
    with context_of(device):
        case = plain(device)
        case.step()
        graph = case.optimizer.capture(case.step)
        variable = case.work.variables[0]

        def loss() -> Any:
            graph.replay()
            return variable * variable

        with unchanged(case), pytest.raises(ArgumentValueError, match="while a loss is being differentiated"):
            gpu_adam.Adam().minimize(loss, [variable])
