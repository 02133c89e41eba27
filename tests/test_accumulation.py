"""Gradients accumulated over several calls: the sums, their mean, and what a step takes of them."""

import copy
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from captures import HOST, Case, assert_same_state, captured, context_of, state
from reference import Array, assert_same_bits

import gpu_adam
from gpu_adam import Adam, IndexedSlices, LossScale, Variable
from gpu_adam.devices import Device
from gpu_adam.devices.recording import RecordingDevice
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, SparseIndexError

DTYPES = {
    **{name: np.dtype(name) for name in ("float32", "float64", "complex64")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
SHAPES = [(6, 3), (5,), (4100,)]


def wide(x: Array) -> Array:
    return x.astype(np.float32) if x.dtype.itemsize == 2 else x


class Twins:
    """The same variables twice: one optimizer accumulates, the other one is given what the sums should be."""

    def __init__(self, device: Device, dtype: str = "float32", **config: Any) -> None:
        self.device, self.dtype, self.rng = device, DTYPES[dtype], np.random.default_rng(1)
        initial = [self.random(shape) for shape in SHAPES]
        self.ours, self.others = ([Variable(x, device=device) for x in initial] for _ in range(2))
        self.adam, self.other = Adam(0.1, **config), Adam(0.1, **{**config, "accumulation": "mean"})
        self.begin()

    def random(self, shape: tuple[int, ...]) -> Array:
        """Random numbers of the dtype."""
        x: Array = self.rng.standard_normal(shape)
        return (x + 1j * self.rng.standard_normal(shape) if self.dtype.kind == "c" else x).astype(self.dtype)

    def begin(self) -> None:
        """Begin new sums."""
        self.sums = [np.zeros(shape, wide(np.zeros(1, self.dtype)).dtype) for shape in SHAPES]
        self.calls = 0

    def accumulate(self, *, without: int = -1, sparse: bool = False, divisor: float = 1.0, **options: Any) -> int:
        """One call with random gradients, none for variable number `without`, slices for the first variable."""
        pairs: list[Any] = []
        for k, shape in enumerate(SHAPES):
            gradient = self.random(shape)
            if k == without:
                pairs.append((None, self.ours[k]))
                continue
            added = wide(gradient) * wide(np.ones(1, self.dtype)).real.dtype.type(1 / divisor)
            if k == 0 and sparse:
                rows = np.array([4, 1, 4])
                pairs.append((IndexedSlices(*map(self.device.array, (gradient[:3], rows))), self.ours[k]))
                dense = np.zeros_like(self.sums[k])
                for row, values in zip(rows, added[:3], strict=True):
                    dense[row] += values
                added = dense
            else:
                pairs.append((self.device.array(gradient), self.ours[k]))
            self.sums[k] = added if self.calls == 0 else self.sums[k] + added
        self.calls += 1
        return self.adam.accumulate(pairs, **options)

    def apply(self, *, mean: bool = True, among: tuple[int, ...] = (0, 1, 2)) -> None:
        """A step of both optimizers, and new sums."""
        self.adam.apply_gradients()
        real = np.float32 if self.dtype.itemsize <= 4 or self.dtype.kind == "c" else np.float64
        factor = real(1 / self.calls if mean and self.calls > 1 else 1)
        pairs = [(self.device.array(self.sums[k] * factor), self.others[k]) for k in among]
        self.other.apply_gradients(pairs)
        self.begin()

    def check(self) -> None:
        """Fail unless variables and slots of both have the same bits."""
        for one, other in zip(self.ours, self.others, strict=True):
            assert_same_bits(wide(one.numpy()), wide(other.numpy()))
            for slot in self.other.get_slot_names():
                if self.other._state.has_slot(other, slot):
                    assert_same_bits(self.adam.get_slot(one, slot).numpy(), self.other.get_slot(other, slot).numpy())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("accumulation", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_takes_the_mean_or_the_sum(dtype: str, accumulation: str, sparse: bool, device: Device) -> None:
    """In float32 for gradients of 16 bits, which would lose small terms."""
    twins = Twins(device, dtype, accumulation=accumulation)
    for number in (1, 3, 2):
        assert [twins.accumulate(sparse=sparse) for _ in range(number)] == list(range(1, number + 1))
        twins.apply(mean=accumulation == "mean")
    twins.check()
    assert twins.adam.iterations == 3


@pytest.mark.parametrize("config", [{"clipnorm": 1.0}, {"global_clipnorm": 1.0, "amsgrad": True}, {"clipvalue": 0.1}])
def test_the_mean_is_clipped_and_not_the_gradients(config: dict[str, Any], device: Device) -> None:
    twins = Twins(device, **config)
    for _ in range(2):
        for _ in range(4):
            twins.accumulate()
        twins.apply()
    twins.check()


def test_a_call_without_a_variables_gradient_counts_as_zero(device: Device) -> None:
    """First, in the middle and last; a variable that never has one stays as it is."""
    twins = Twins(device)
    for without in (1, 0, 2):
        twins.accumulate(without=without)
    twins.apply()
    for _ in range(2):
        twins.accumulate(without=1)
    twins.apply(among=(0, 2))
    twins.check()


def test_what_a_sum_held_before_is_gone(device: Device) -> None:
    """NaN too, whether a variable is in the first call of the new sums or comes to a later one."""
    twins = Twins(device)
    bad = [(device.array(np.full(shape, np.nan, np.float32)), v) for shape, v in zip(SHAPES, twins.ours, strict=True)]
    twins.adam.accumulate(bad)
    twins.adam._accumulator._begin = 1  # as after a step
    assert all(np.isnan(twins.adam._accumulator._sums[v].numpy()).all() for v in twins.ours)
    twins.accumulate(without=1)
    twins.accumulate()
    twins.apply()
    twins.check()


def test_a_variable_that_comes_twice_adds_twice(device: Device) -> None:
    w, g = Variable(np.zeros(3, np.float32), device=device), device.array(np.array([1, 2, 3], np.float32))
    adam = Adam(accumulation="sum", beta_1=0.0)
    for expected in ([2, 4, 6], [3, 6, 9]):
        adam.accumulate([(g, w), (g, w)] if expected[0] == 2 else [(g, w), (g, w), (g, w)])
        adam.apply_gradients()
        assert adam.get_slot(w, "m").numpy().tolist() == expected


def test_gradients_are_divided_by_their_scale_on_the_way_in(device: Device) -> None:
    twins = Twins(device)
    for _ in range(2):
        twins.accumulate(grad_scale=8.0, divisor=8.0)
    twins.apply()
    twins.check()


def test_a_loss_scale_divides_the_sums(device: Device) -> None:
    """Bit for bit, as a power of two; a bad call lets the whole step be left out, and the scale be halved."""
    w, u = (Variable(np.ones(5, np.float32), device=device) for _ in range(2))
    adam, other = Adam(0.1, loss_scale=LossScale(2.0**10)), Adam(0.1)
    gradients = [np.linspace(-1, 1, 5, dtype=np.float32) * k for k in (1, 2, 3, 4)]
    for gradient in gradients:
        adam.accumulate([(device.array(gradient * np.float32(2**10)), w)])
    adam.apply_gradients()
    other.apply_gradients([(device.array(sum(gradients[1:], gradients[0]) * np.float32(0.25)), u)])
    assert_same_bits(w.numpy(), u.numpy())
    adam.accumulate([(device.array(gradients[0]), w)])
    adam.accumulate([(device.array(np.full(5, np.inf, np.float32)), w)])
    adam.apply_gradients()
    assert_same_bits(w.numpy(), u.numpy())
    assert adam.iterations == 1
    assert adam.skipped_steps == 1
    assert adam.loss_scale is not None
    assert adam.loss_scale.value == 2.0**9
    for gradient in gradients:
        adam.accumulate([(device.array(gradient * np.float32(2**9)), w)])
    adam.apply_gradients()
    other.apply_gradients([(device.array(sum(gradients[1:], gradients[0]) * np.float32(0.25)), u)])
    assert_same_bits(w.numpy(), u.numpy())


def test_raw_arrays(device: Device) -> None:
    """Recognised again by their memory; the step writes into them."""
    w = device.array(np.zeros(3, np.float32))
    adam = Adam(0.5, beta_1=0.0, beta_2=0.0)
    for _ in range(2):
        adam.accumulate([(device.array(np.ones(3, np.float32)), w)])
    adam.apply_gradients()
    assert device.numpy(w).tolist() == pytest.approx([-0.5] * 3)


def test_one_launch_for_any_number_of_variables(device: Device) -> None:
    recording = RecordingDevice(device)
    variables = [Variable.over(device.array(np.zeros(k + 1, np.float32)), recording) for k in range(20)]
    pairs = [(device.array(np.ones(k + 1, np.float32)), v) for k, v in enumerate(variables)]
    adam = Adam()
    for number in range(3):
        recording.events.clear()
        adam.accumulate(pairs)
        assert recording.launches() == ["dense"], number
    recording.events.clear()
    adam.apply_gradients()
    assert recording.launches() == ["dense"]


def test_eager_steps_in_between_leave_the_sums_alone(device: Device) -> None:
    twins = Twins(device)
    twins.accumulate()
    gradients = [twins.random(shape) for shape in SHAPES]
    for adam, variables in ((twins.adam, twins.ours), (twins.other, twins.others)):
        adam.apply_gradients(list(zip(map(device.array, gradients), variables, strict=True)))
    twins.accumulate()
    twins.apply()
    twins.check()


def test_forgotten_variables_are_left_out(device: Device) -> None:
    twins = Twins(device)
    twins.accumulate()
    twins.adam.forget(twins.ours[1])
    twins.apply(among=(0, 2))
    twins.check()
    assert twins.adam._state.variables == [twins.ours[0], twins.ours[2]]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda adam: pickle.loads(pickle.dumps(adam))])
def test_copies_begin_without_sums(copied: Any) -> None:
    w = Variable(np.zeros(2, np.float32), device="host")
    adam = Adam()
    adam.accumulate([(np.ones(2, np.float32), w)])
    twin = copied(adam)
    with pytest.raises(ArgumentTypeError, match="where no gradients have been accumulated"):
        twin.apply_gradients()
    adam.apply_gradients()
    assert (w.numpy() != 0).all()


def test_config() -> None:
    assert "accumulation" not in Adam().get_config()
    assert Adam.from_config(Adam(accumulation="sum").get_config()).flavour.accumulation == "sum"


# Captured functions, which have sums of their own.


class Parts:
    """A batch in three parts: the second one has no gradient for the first variable, nor the first one for the last.

    Args:
        device: where.
        config: of the optimizer.
    """

    def __init__(self, device: Device, config: dict[str, Any]) -> None:
        self.case = Case(device, config=config, kind="both", dtypes=("float32", "float64", "complex64"))

    def step(self) -> int | None:
        """A step of the whole batch."""
        scale = self.case.optimizer.loss_scale
        for part in range(3):
            pairs = self.case.work.pairs(None if scale is None else scale.array)
            skipped = (self.case.work.all[-1], self.case.work.all[0], None)[part]
            self.case.optimizer.accumulate([(None if v is skipped else g, v) for g, v in pairs])
        return self.case.optimizer.apply_gradients()


CAPTURED: dict[str, dict[str, Any]] = {
    "mean": {"learning_rate": "schedule", "global_clipnorm": 1.0},
    "sum": {"learning_rate": "callable", "accumulation": "sum", "amsgrad": True},
    "loss scale": {"learning_rate": "schedule", "loss_scale": LossScale(8.0, 5), "telemetry": True},
}


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("config", CAPTURED)
def test_replays_have_the_bits_of_calls(device: Device, config: str, is_first: bool) -> None:
    """And leave sums alone that are accumulated outside, which a step in between uses."""
    eager = Parts(HOST, CAPTURED[config])
    with context_of(device, 1):
        own = Parts(device, CAPTURED[config])
        adam = own.case.optimizer
        if not is_first:
            own.step()
            eager.step()
        graph = adam.capture(own.step)
        for number in range(12):
            for each in (own, eager):
                each.case.work.next_batch(number, is_bad=each.case.optimizer.flavour.skips and number % 4 == 1)
            if number == 5:
                assert adam.accumulate(own.case.work.pairs()) == 1
                outside = [(as_it_is(g), v) for g, v in eager.case.work.pairs()]
            assert graph.replay() == eager.step()
            if number == 8:
                adam.apply_gradients()
                eager.case.optimizer.accumulate(outside)
                eager.case.optimizer.apply_gradients()
        assert_same_state(state(adam, own.case.work), state(eager.case.optimizer, eager.case.work))


def as_it_is(gradient: Any) -> Any:
    """The gradient, also when the batch is another one."""
    if isinstance(gradient, IndexedSlices):
        return IndexedSlices(gradient.values.copy(), gradient.indices.copy())
    return gradient.copy()


def test_nodes_of_a_captured_accumulation(gpu: Device, emulation: Any) -> None:
    """One kernel for each call and one for the step; the replay copies the scalars of the step alone."""
    with context_of(gpu):
        variables = [Variable(np.ones(3 + k, np.float32)) for k in range(3)]
        pairs = [(gpu.array(np.ones(v.shape, np.float32)), v) for v in variables]
        adam = Adam()

        def step() -> None:
            for _ in range(4):
                adam.accumulate(pairs)
            adam.apply_gradients()

        emulation.reset()
        graph = adam.capture(step)
        assert emulation.counters.graph_nodes == [["dense"] * 5]
        gpu.synchronize()
        emulation.reset()
        graph.replay()
        assert emulation.counters.syncs == []
        gpu.synchronize()
        assert emulation.counters.h2d == 1
        assert adam.iterations == 1


def test_sums_of_a_function_are_begun_and_used_in_it(device: Device) -> None:
    """Neither those from outside are used, nor are any left over; nothing has changed then."""
    with context_of(device):
        case = Case(device, config={})
        adam, work = case.optimizer, case.work
        case.step()
        adam.accumulate(work.pairs())
        before = state(adam, work)

        def leaves_some() -> None:
            adam.accumulate(work.pairs())
            adam.apply_gradients()
            adam.accumulate(work.pairs())

        with pytest.raises(ArgumentTypeError, match="must be given where no gradients have been accumulated"):
            adam.capture(adam.apply_gradients).replay()
        assert_same_state(state(adam, work), before)
        words = r"must use the gradients that it accumulates for optimizer 'Adam' \(got sums over 1 calls that no step"
        with pytest.raises(ArgumentValueError, match=words):
            adam.capture(leaves_some).replay()
        if device.name != "host":  # there the function has been called
            assert_same_state(state(adam, work), before)
        assert adam.accumulate(work.pairs()) == 2
        adam.apply_gradients()


def test_rows_out_of_range_in_a_captured_function(gpu: Device) -> None:
    with context_of(gpu):
        w = Variable(np.zeros((3, 2), np.float32), device=gpu)
        bad = IndexedSlices(gpu.array(np.ones((2, 2), np.float32)), gpu.array(np.array([1, 7])))
        adam = Adam(accumulation="sum", beta_1=0.0)

        def step() -> None:
            adam.accumulate([(bad, w)])
            adam.apply_gradients()

        graph = adam.capture(step)
        graph.replay()
        with pytest.raises(SparseIndexError):
            adam.check_errors()
        assert adam.get_slot(w, "m").numpy().tolist() == [[0, 0], [1, 1], [0, 0]]


# What is refused; nothing has changed then.


def test_a_failing_call_is_not_counted(device: Device) -> None:
    twins = Twins(device)
    twins.accumulate()
    for pairs, error in (
        ([(device.array(np.ones(4, np.float32)), twins.ours[1])], ArgumentValueError),
        ([(device.array(np.ones(5, np.float64)), twins.ours[1])], ArgumentValueError),
        ([(None, twins.ours[1])], ArgumentValueError),
        ([("text", twins.ours[1])], ArgumentTypeError),
        ([(device.array(np.ones(5, np.float32)), "text")], ArgumentTypeError),
        (5, ArgumentTypeError),
    ):
        with pytest.raises(error):
            twins.adam.accumulate(pairs)  # type: ignore[arg-type]
    assert twins.accumulate() == 2
    twins.apply()
    twins.check()


def test_rows_out_of_range(device: Device) -> None:
    """On the host at once; on CUDA when errors are checked, and left out of the sum."""
    w = Variable(np.zeros((3, 2), np.float32), device=device)
    adam = Adam(accumulation="sum", beta_1=0.0)
    bad = IndexedSlices(device.array(np.ones((2, 2), np.float32)), device.array(np.array([1, 7])))
    if device.name == "host":
        with pytest.raises(SparseIndexError):
            adam.accumulate([(bad, w)])
        return
    adam.accumulate([(bad, w)])
    adam.apply_gradients()
    assert adam.get_slot(w, "m").numpy().tolist() == [[0, 0], [1, 1], [0, 0]]
    with pytest.raises(SparseIndexError):
        adam.check_errors()


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (0.0, ArgumentValueError, r"grad_scale must be > 0 and finite \(got 0.0\)"),
        (-1, ArgumentValueError, "grad_scale must be > 0"),
        (float("nan"), ArgumentValueError, "grad_scale must be > 0"),
        ("8", ArgumentTypeError, "grad_scale must be a number"),
        (1e-60, ArgumentValueError, "grad_scale must have a reciprocal that float32 holds"),
    ],
)
def test_scales_that_are_refused(scale: Any, error: type[Exception], message: str) -> None:
    w = Variable(np.zeros(2, np.float32), device="host")
    adam = Adam()
    with pytest.raises(error, match=message):
        adam.accumulate([(np.ones(2, np.float32), w)], grad_scale=scale)
    with pytest.raises(ArgumentTypeError, match="where no gradients have been accumulated"):
        adam.apply_gradients()


def test_a_scale_is_given_once(device: Device) -> None:
    w = Variable(np.zeros(2, np.float32), device=device)
    pairs = [(device.array(np.ones(2, np.float32)), w)]
    with pytest.raises(ArgumentValueError, match=r"grad_scale must be left out with loss_scale, .*\(got 2.0\)"):
        Adam(loss_scale=LossScale()).accumulate(pairs, grad_scale=2)
    adam = Adam()
    adam.accumulate(pairs)
    with pytest.raises(ArgumentValueError, match="must be left out with accumulated gradients"):
        adam.apply_gradients(grad_scale=2.0)
    assert adam.iterations == 0


def test_scales_on_the_device_are_refused(device: Device) -> None:
    if device.name == "host":
        return
    w = Variable(np.zeros(2, np.float32), device=device)
    with pytest.raises(ArgumentTypeError, match="must be a number where gradients are accumulated"):
        Adam().accumulate([(device.array(np.ones(2, np.float32)), w)], grad_scale=device.array(np.float32(2)))


def test_a_graph_of_the_users_is_refused(gpu: Device) -> None:
    graphs = list[Any]()
    with context_of(gpu):
        w, g = Variable(np.zeros(2, np.float32), device=gpu), gpu.array(np.ones(2, np.float32))
        adam = Adam()
        adam.accumulate([(g, w)])
        for function in (lambda: adam.accumulate([(g, w)]), adam.apply_gradients):
            words = r"a step captured in a graph must not accumulate gradients, .*; use Adam.capture"
            with captured(gpu, graphs), pytest.raises(ArgumentValueError, match=words):
                function()
        adam.apply_gradients()
        assert adam.iterations == 1


def test_a_word_that_is_no_accumulation() -> None:
    with pytest.raises(ArgumentValueError, match=r"accumulation must be one of mean, sum \(got 'max'\)"):
        gpu_adam.Adam(accumulation="max")
