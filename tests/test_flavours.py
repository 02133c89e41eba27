"""What an optimizer does besides plain Adam: decay of weights, penalties, ascent, epsilon's form, averages, groups."""

import copy
import itertools
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
from reference import assert_same_bits
from snapshots import unchanged

import gpu_adam
from gpu_adam import IndexedSlices, Variable
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, SlotNotFoundError
from gpu_adam.hyperparameters import OWN_SETTINGS, PLAIN
from gpu_adam.state.transaction import Transaction
from gpu_adam.step.scalars import Scalars

FLAVOURS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "weight_decay": ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
    "l2": ({"l2": 0.3}, {"l2": 0.3}),
    "maximize": ({"maximize": True}, {"maximize": True}),
    "paper": ({"epsilon_form": "paper", "epsilon": 1e-3}, {"paper": True, "epsilon": 1e-3}),
    "ema": ({"use_ema": True, "ema_momentum": 0.75}, {"ema": 0.75}),
    "all": (
        {
            "weight_decay": 0.1,
            "l2": 0.3,
            "maximize": True,
            "epsilon_form": "paper",
            "use_ema": True,
            "ema_momentum": 0.9,
            "amsgrad": True,
            "decay": 0.2,
        },
        {"weight_decay": 0.1, "l2": 0.3, "maximize": True, "paper": True, "ema": 0.9, "amsgrad": True, "decay": 0.2},
    ),
}


def start(dtype: str, size: int = 70) -> Any:
    return np.linspace(-2, 2, size).astype(dtype)


def gradient(step: int, dtype: str, size: int = 70) -> Any:
    return np.cos(np.arange(size) * (step + 1.5)).astype(dtype)


# Beside NumPy, beside torch.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_bits_of_the_equations(device: Device, flavour: str, dtype: str) -> None:
    ours, theirs = FLAVOURS[flavour]
    x, optimizer = Variable(start(dtype), name="x"), gpu_adam.Adam(0.05, **ours)
    oracle = reference.Adam([start(dtype)], 0.05, **theirs)
    for step in range(7):
        optimizer.apply_gradients([(device.array(gradient(step, dtype)), x)])
        oracle.step([gradient(step, dtype)])
        assert_same_bits(x.numpy(), oracle.variables[0], f"step {step}")
    if oracle.ema is not None:
        average = optimizer.get_slot(x, "average")
        assert average.name == f"{optimizer.name}/x/average"
        assert_same_bits(average.numpy(), oracle.average[0])


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_sparse_equals_dense(device: Device, flavour: str) -> None:
    """Rows without a gradient decay, are penalized and averaged as the others are."""
    config, _ = FLAVOURS[flavour]
    table = start("float32", 60).reshape(12, 5)
    one, other = Variable(table, name="x"), Variable(table, name="x")
    sparse, dense = gpu_adam.Adam(0.05, **config), gpu_adam.Adam(0.05, **config)
    for step in range(5):
        values, rows = gradient(step, "float32", 20).reshape(4, 5), np.array([7, 2, 7, step])
        sparse.apply_gradients([(IndexedSlices(device.array(values), device.array(rows)), one)])
        dense.apply_gradients([(device.array(reference.densified(values, rows, table)), other)])
    for a, b in zip([one, *sparse.weights], [other, *dense.weights], strict=True):
        assert_same_bits(a.numpy(), b.numpy(), a.name)


@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        ("Adam", {"l2": 0.1}, {"weight_decay": 0.1}),
        ("AdamW", {"weight_decay": 0.1}, {"weight_decay": 0.1}),
        ("AdamW", {"weight_decay": 0.1, "amsgrad": True}, {"weight_decay": 0.1, "amsgrad": True}),
        ("Adam", {"maximize": True}, {"maximize": True}),
        ("AdamW", {"maximize": True, "weight_decay": 0.01}, {"maximize": True, "weight_decay": 0.01}),
    ],
)
def test_beside_torch(kind: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Torch adds epsilon as the paper does. Each of 100 steps rounds some 10 times, by 2^-53 of numbers near 1."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    x, p = Variable(start("float64"), device="host"), torch.tensor(start("float64"), requires_grad=True)
    optimizer = gpu_adam.Adam(0.01, epsilon=1e-8, epsilon_form="paper", **ours)
    other = getattr(torch.optim, kind)([p], lr=0.01, eps=1e-8, **theirs)
    for step in range(100):
        g = gradient(step, "float64")
        optimizer.apply_gradients([(g, x)])
        p.grad = torch.tensor(g)
        other.step()
    np.testing.assert_allclose(x.numpy(), p.detach().numpy(), rtol=0, atol=100 * 10 * 2.0**-53 * 2)


def test_the_papers_epsilon(device: Device) -> None:
    """The equation written out: epsilon beside the root of the corrected v."""
    x, optimizer = Variable(start("float64")), gpu_adam.Adam(0.05, epsilon=0.5, epsilon_form="paper")
    theta, m, v = start("float64"), np.zeros(70), np.zeros(70)
    for t in range(1, 6):
        g = gradient(t, "float64")
        optimizer.apply_gradients([(device.array(g), x)])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        theta -= 0.05 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 0.5)
    np.testing.assert_allclose(x.numpy(), theta, rtol=1e-13)


def test_numbers_may_change_between_steps(device: Device) -> None:
    x, optimizer = Variable(start("float32")), gpu_adam.Adam(0.05)
    oracle = reference.Adam([start("float32")], 0.05)
    for step, (decay, l2) in enumerate([(0.0, 0.0), (0.5, 0.0), (0.0, 0.25), (0.5, 0.25), (0.0, 0.0)]):
        optimizer.weight_decay, optimizer.l2 = decay, l2
        oracle.weight_decay, oracle.l2 = decay, l2
        optimizer.apply_gradients([(device.array(gradient(step, "float32")), x)])
        oracle.step([gradient(step, "float32")])
        assert_same_bits(x.numpy(), oracle.variables[0], f"step {step}")
    assert (float(optimizer.weight_decay), float(optimizer.l2)) == (0.0, 0.0)


def test_infinite_variables_leave_the_moments_alone_without_a_penalty(device: Device) -> None:
    """0 times infinity is NaN: a penalty of 0 is none."""
    x, optimizer = Variable(np.array([np.inf, 1], np.float32)), gpu_adam.Adam(l2=0.0, weight_decay=0.0)
    optimizer.apply_gradients([(device.array(np.ones(2, np.float32)), x)])
    assert np.isfinite(optimizer.get_slot(x, "m").numpy()).all()


@pytest.mark.parametrize("mode", ["abs2", "real_imag"])
def test_complex_variables(device: Device, mode: str) -> None:
    """In the mode "real_imag" they are two real ones; in the mode "abs2" a rotation of all phases goes through."""
    config, theirs = FLAVOURS["all"]
    z = start("float64") * np.exp(1j * np.arange(70))
    x, optimizer = Variable(z), gpu_adam.Adam(0.05, complex_mode=mode, **config)
    turned, other = Variable(z * 1j), gpu_adam.Adam(0.05, complex_mode=mode, **config)
    parts = reference.Adam([z.real, z.imag], 0.05, **theirs)
    for step in range(4):
        g = gradient(step, "float64") + 1j * gradient(step + 1, "float64")
        optimizer.apply_gradients([(device.array(g), x)])
        other.apply_gradients([(device.array(g * 1j), turned)])
        parts.step([g.real, g.imag])
    if mode == "abs2":
        np.testing.assert_allclose(turned.numpy(), x.numpy() * 1j, rtol=1e-12)
    else:
        assert_same_bits(x.numpy().real, parts.variables[0])
        assert_same_bits(x.numpy().imag, parts.variables[1])


# Averages.


def test_averages_overwrite_the_variables(device: Device) -> None:
    x, optimizer = Variable(start("float32")), gpu_adam.Adam(0.05, use_ema=True, ema_overwrite_frequency=3)
    late = Variable(start("float32"))
    oracle = reference.Adam([start("float32")], 0.05, ema=0.99)
    for step in range(7):
        pairs = [(device.array(gradient(step, "float32")), x)]
        optimizer.apply_gradients(pairs if step < 5 else [*pairs, (pairs[0][0], late)])
        oracle.step([gradient(step, "float32")])
        if step in (2, 5):
            oracle.variables[0] = oracle.average[0].copy()
        assert_same_bits(x.numpy(), oracle.variables[0], f"step {step}")
        assert_same_bits(optimizer.get_slot(x, "average").numpy(), oracle.average[0], f"step {step}")


def test_averages_at_the_end(device: Device) -> None:
    x, y, optimizer = Variable(start("float32")), Variable(start("float32")), gpu_adam.Adam(0.05, use_ema=True)
    g = device.array(gradient(0, "float32"))
    for _ in range(3):
        optimizer.apply_gradients([(g, x), (g, y)])
    average = optimizer.get_slot(x, "average").numpy()
    optimizer.overwrite_by_averages([x])
    assert_same_bits(x.numpy(), average)
    assert not np.array_equal(y.numpy(), average)
    optimizer.finalize_variable_values()
    assert_same_bits(y.numpy(), average)
    plain = gpu_adam.Adam()
    plain.build([x])
    with pytest.raises(SlotNotFoundError):
        plain.overwrite_by_averages([x])
    plain.overwrite_by_averages()
    with pytest.raises(ArgumentValueError, match="must be a variable of optimizer"):
        plain.overwrite_by_averages([y])


def test_an_average_begins_at_the_variable(device: Device) -> None:
    x, optimizer = Variable(start("float32")), gpu_adam.Adam(use_ema=True)
    optimizer.build([x])
    assert [weight.name.rpartition("/")[2] for weight in optimizer.weights] == ["iter", "m", "v", "average"]
    assert_same_bits(optimizer.get_slot(x, "average").numpy(), start("float32"))
    assert not optimizer.get_slot(x, "m").numpy().any()


@pytest.mark.parametrize("is_named", [False, True])
def test_averages_reach_arrays_whose_memory_has_moved(device: Device, is_named: bool) -> None:
    class Holder:
        """An array by its interface, the memory of which may be exchanged."""

        def __init__(self, array: Any) -> None:
            self.array = array

        def __getattr__(self, name: str) -> Any:
            if name in ("__array_interface__", "__cuda_array_interface__", "__dlpack__", "__dlpack_device__"):
                return getattr(self.array, name)
            raise AttributeError(name)

    old, other = device.array(start("float32")), device.array(start("float32"))
    holder, optimizer = Holder(old), gpu_adam.Adam(0.05, use_ema=True)
    g = device.array(gradient(0, "float32"))
    for _ in range(3):
        optimizer.apply_gradients([(g, holder), (g, other)])
    before = device.numpy(old)
    holder.array = device.array(before)
    optimizer.overwrite_by_averages([holder] if is_named else None)
    average = optimizer.get_slot(holder, "average")
    assert_same_bits(device.numpy(holder.array), average.numpy())
    assert_same_bits(device.numpy(old), before)
    assert np.array_equal(device.numpy(other), before) == is_named
    optimizer.apply_gradients([(g, holder), (g, other)])
    assert not np.array_equal(device.numpy(holder.array), average.numpy())


def test_averages_are_refused_as_a_whole() -> None:
    """One array is read-only: the other one is not overwritten either."""
    one, other, optimizer = start("float32"), start("float32"), gpu_adam.Adam(use_ema=True)
    for _ in range(2):
        optimizer.apply_gradients([(gradient(0, "float32"), one), (gradient(0, "float32"), other)])
    other.flags.writeable = False
    with unchanged(optimizer, one, other), pytest.raises(ArgumentValueError, match="a raw variable must be writeable"):
        optimizer.overwrite_by_averages()


def test_no_loss_overwrites_by_averages(device: Device) -> None:
    x, optimizer = Variable(start("float32")), gpu_adam.Adam(use_ema=True)
    optimizer.build(x)

    def loss() -> Any:
        optimizer.overwrite_by_averages()
        return np.sum(x * x)

    with unchanged(optimizer, x), pytest.raises(ArgumentValueError, match=r"^overwrite_by_averages must not be called"):
        optimizer.minimize(loss, x)


def test_torch_learns_that_averages_were_written() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
    p, optimizer = torch.ones(3, requires_grad=True), gpu_adam.Adam(use_ema=True)
    optimizer.build([p])
    loss = (p * p).sum()
    optimizer.overwrite_by_averages()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Groups.

SETTINGS: list[dict[str, Any]] = [
    {},
    {"learning_rate_multiplier": 0.5},
    {"weight_decay": 0.25},
    {"beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-3},
]


def oracle_of(settings: dict[str, Any], dtype: str) -> reference.Adam:
    values = {"weight_decay": 0.1, **settings}
    rate = 0.05 * values.pop("learning_rate_multiplier", 1.0)
    return reference.Adam([start(dtype)], rate, **values)


@pytest.mark.parametrize("kinds", [["float32"] * 4, ["float32", "float64"] * 4])
def test_groups_in_one_launch(device: Device, kinds: list[str]) -> None:
    """Each variable has the bits that an optimizer with its numbers gives."""
    optimizer = gpu_adam.Adam(0.05, weight_decay=0.1)
    all_settings = list(itertools.islice(itertools.cycle(SETTINGS), len(kinds)))
    variables = [Variable(start(dtype), name=f"x{k}") for k, dtype in enumerate(kinds)]
    oracles = [oracle_of(settings, dtype) for settings, dtype in zip(all_settings, kinds, strict=True)]
    for variable, settings in zip(variables, all_settings, strict=True):
        if settings:
            optimizer.set_group([variable], **settings)
    for step in range(5):
        pairs = [
            (device.array(gradient(step + k, dtype)), variable)
            for k, (dtype, variable) in enumerate(zip(kinds, variables, strict=True))
        ]
        optimizer.apply_gradients(pairs)
        for k, oracle in enumerate(oracles):
            oracle.step([gradient(step + k, kinds[k])])
            assert_same_bits(variables[k].numpy(), oracle.variables[0], f"variable {k}, step {step}")


def test_groups_take_one_launch_for_each_dtype(device: Device) -> None:
    from gpu_adam.devices.recording import RecordingDevice  # noqa: PLC0415

    recording = RecordingDevice(device)
    variables = [Variable(start("float32"), device=recording) for _ in range(6)]
    optimizer = gpu_adam.Adam()
    for k, variable in enumerate(variables):
        optimizer.set_group([variable], learning_rate_multiplier=k + 1)
    pairs = [(recording.array(gradient(k, "float32")), variable) for k, variable in enumerate(variables)]
    for _ in range(2):
        recording.events.clear()
        optimizer.apply_gradients(pairs)
        assert recording.launches() == ["dense"]


def test_groups_of_sparse_and_clipped_variables(device: Device) -> None:
    table = start("float32", 60).reshape(12, 5)
    values, rows = gradient(0, "float32", 20).reshape(4, 5), np.array([7, 2, 7, 0])
    ours: list[Any] = []
    theirs: list[Any] = []
    for kind in ("sparse", "dense"):
        x, y = Variable(table, name="x"), Variable(start("float32"), name="y")
        optimizer = gpu_adam.Adam(0.05, global_clipnorm=1.0)
        optimizer.set_group([x], learning_rate_multiplier=2, beta_1=0.5)
        g: Any = IndexedSlices(device.array(values), device.array(rows))
        if kind == "dense":
            g = device.array(reference.densified(values, rows, table))
        optimizer.global_clipnorm = None if kind == "dense" else 1e6  # a bound that bounds nothing
        optimizer.apply_gradients([(g, x), (device.array(gradient(1, "float32")), y)])
        (ours if kind == "sparse" else theirs).extend([x.numpy(), y.numpy()])
    for a, b in zip(ours, theirs, strict=True):
        assert_same_bits(a, b)


def test_a_group_may_change_at_any_time(device: Device) -> None:
    x, y = Variable(start("float32")), Variable(start("float32"))
    optimizer, oracles = gpu_adam.Adam(0.05), [reference.Adam([start("float32")], 0.05) for _ in range(2)]
    for step in range(6):
        if step == 2:
            optimizer.set_group([y], learning_rate_multiplier=3, beta_1=0.5)
            oracles[1].learning_rate, oracles[1].beta_1 = 0.05 * 3, 0.5
            assert optimizer.get_group(y)[:3] == (3.0, None, 0.5)
        if step == 4:
            optimizer.set_group([y], learning_rate_multiplier=None)  # beta_1 stays
            oracles[1].learning_rate = 0.05
        g = gradient(step, "float32")
        optimizer.apply_gradients([(device.array(g), x), (device.array(g), y)])
        for variable, oracle in zip((x, y), oracles, strict=True):
            oracle.step([g])
            assert_same_bits(variable.numpy(), oracle.variables[0], f"step {step}")


def test_callable_hyperparameters_and_groups(device: Device) -> None:
    calls: list[int] = []

    def rate() -> float:
        calls.append(0)
        return 0.05

    x, y, optimizer = Variable(start("float32")), Variable(start("float32")), gpu_adam.Adam(rate)
    optimizer.set_group([y], learning_rate_multiplier=2)
    g = device.array(gradient(0, "float32"))
    optimizer.apply_gradients([(g, x), (g, y)])
    assert len(calls) == 1
    oracle = reference.Adam([start("float32")], 0.1)
    oracle.step([gradient(0, "float32")])
    assert_same_bits(y.numpy(), oracle.variables[0])


@pytest.mark.parametrize("is_raw", [False, True])
def test_a_variable_alone_is_not_its_rows(device: Device, is_raw: bool) -> None:
    rows = start("float32").reshape(7, 10)
    x: Any = device.array(rows) if is_raw else Variable(rows, name="x")
    optimizer = gpu_adam.Adam(0.05, weight_decay=0.1, use_ema=True)
    optimizer.set_group(x, learning_rate_multiplier=2.0)
    optimizer.exclude_from_weight_decay(x)
    optimizer.build(x)
    assert optimizer.get_group(x)[:2] == (2.0, 0.0)
    assert [weight.shape for weight in optimizer.weights] == [(), (7, 10), (7, 10), (7, 10)]
    optimizer.apply_gradients([(device.array(gradient(0, "float32").reshape(7, 10)), x)])
    optimizer.overwrite_by_averages(x)
    assert_same_bits(device.numpy(x) if is_raw else x.numpy(), optimizer.get_slot(x, "average").numpy())


def test_exclusion_from_weight_decay(device: Device) -> None:
    """By object and by name, also of a variable that comes later; exclusion wins over a group, set before or after."""
    kernel, bias, late = (Variable(start("float32"), name=name) for name in ("dense/kernel", "dense/bias", "late/bias"))
    chosen = Variable(start("float32"), name="chosen")
    optimizer = gpu_adam.Adam(0.05, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=[chosen], var_names=["bias$"])
    optimizer.set_group([bias, chosen], weight_decay=0.75)
    assert optimizer.get_group(chosen).weight_decay == optimizer.get_group(bias).weight_decay == 0.0
    variables = [kernel, bias, late, chosen]
    optimizer.apply_gradients([(device.array(gradient(0, "float32")), variable) for variable in variables])
    for variable in variables:
        oracle = reference.Adam([start("float32")], 0.05, weight_decay=0.5 if variable is kernel else 0.0)
        oracle.step([gradient(0, "float32")])
        assert_same_bits(variable.numpy(), oracle.variables[0], variable.name)


def test_groups_are_copied_dropped_and_handed_on(device: Device) -> None:
    x, optimizer = Variable(start("float32"), name="x"), gpu_adam.Adam(0.05, maximize=True)
    optimizer.set_group([x], learning_rate_multiplier=2)
    g = gradient(0, "float32")

    def after(optimizer: gpu_adam.Adam, variable: Variable) -> Any:
        before = variable.numpy()
        optimizer.apply_gradients([(device.array(g), variable)])
        return np.abs(variable.numpy() - before).max()

    for twin, variable in (copy.deepcopy((optimizer, x)), pickle.loads(pickle.dumps((optimizer, x)))):
        assert after(twin, variable) == pytest.approx(0.1, rel=1e-4)
    assert after(optimizer, x) == pytest.approx(0.1, rel=1e-4)
    new = Variable(start("float32"), name="new")
    optimizer.replace(x, new)
    assert after(optimizer, new) == pytest.approx(0.1, rel=1e-3)
    optimizer.forget(new)
    optimizer.iterations = 0
    assert after(optimizer, new) == pytest.approx(0.05, rel=1e-3)


def test_exclusions_are_copied_dropped_and_handed_on(device: Device) -> None:
    x, new, optimizer = Variable(start("float32")), Variable(start("float32")), gpu_adam.Adam(weight_decay=0.5)
    optimizer.exclude_from_weight_decay(x)
    for twin, variable in (copy.deepcopy((optimizer, x)), pickle.loads(pickle.dumps((optimizer, x)))):
        assert twin.get_group(variable).weight_decay == 0.0
    optimizer.replace(x, new)
    assert optimizer.get_group(new).weight_decay == 0.0
    assert optimizer.get_group(x).weight_decay is None
    optimizer.forget(new)
    assert optimizer.get_group(new).weight_decay is None


def test_settings_and_exclusions_go_back_with_a_change_that_fails(device: Device) -> None:
    x, optimizer = Variable(start("float32")), gpu_adam.Adam(weight_decay=0.5)
    optimizer.build(x)
    state = optimizer._state

    def fail() -> None:
        with Transaction(state) as change:
            change.set_settings({x: OWN_SETTINGS.updated({"weight_decay": 0.75})})
            change.never_decay([x], ["x"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert optimizer.get_group(x).weight_decay is None
    assert not any((state.settings, state.settings_decay, state.never_decayed, state.never_decayed_names))


def test_no_kernel_lets_weights_decay_when_nobody_does(device: Device) -> None:
    x, optimizer = Variable(start("float32")), gpu_adam.Adam()
    optimizer.set_group(x, weight_decay=0.5)
    assert optimizer._rule().adjusts
    optimizer.forget(x)
    assert not optimizer._rule().adjusts


# Configuration.


def test_config_and_defaults() -> None:
    assert not gpu_adam.Adam().get_config().keys() & {"weight_decay", "l2", "maximize", "epsilon_form", "use_ema"}
    given: dict[str, Any] = {
        "weight_decay": 0.1,
        "l2": 0.2,
        "maximize": True,
        "epsilon_form": "paper",
        "use_ema": True,
        "ema_momentum": 0.5,
        "ema_overwrite_frequency": 7,
    }
    optimizer = gpu_adam.Adam(**given)
    config = json.loads(json.dumps(optimizer.get_config()))
    assert config.items() >= given.items()
    assert gpu_adam.Adam.from_config(config).get_config() == config
    assert optimizer.flavour.ema_overwrite_frequency == 7
    assert gpu_adam.Adam(weight_decay=None, l2=None).get_config() == gpu_adam.Adam().get_config()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_decay": -0.1}, r"weight_decay must be >= 0 and finite \(got -0.1\)"),
        ({"weight_decay": math.nan}, "weight_decay must be >= 0 and finite"),
        ({"weight_decay": lambda: 0.1}, "weight_decay must be a real number"),
        ({"l2": "0.1"}, "l2 must be a real number"),
        ({"l2": math.inf}, "l2 must be >= 0 and finite"),
        ({"maximize": "False"}, "maximize must be True or False"),
        ({"use_ema": None}, "use_ema must be True or False"),
        ({"epsilon_form": "torch"}, r"epsilon_form must be one of hat, paper \(got 'torch'\)"),
        ({"epsilon_form": np.array(["hat", "paper"])}, "epsilon_form must be one of hat, paper"),
        ({"complex_mode": Variable(1.0)}, "complex_mode must be one of abs2, real_imag"),
        ({"weight_decay": np.ma.masked}, "weight_decay must be a real number"),
        (
            {"use_ema": True, "ema_overwrite_frequency": np.timedelta64(2, "s")},
            "ema_overwrite_frequency must be a whole number >= 1",
        ),
        ({"use_ema": True, "ema_momentum": 1.5}, r"ema_momentum must lie in \[0, 1\] \(got 1.5\)"),
        ({"use_ema": True, "ema_overwrite_frequency": 0}, r"ema_overwrite_frequency must be a whole number >= 1"),
        ({"use_ema": True, "ema_overwrite_frequency": 2.5}, r"ema_overwrite_frequency must be a whole number >= 1"),
        ({"ema_overwrite_frequency": 2}, r"ema_overwrite_frequency must be None without use_ema=True"),
        ({"weight_dacay": 0.1}, r"keyword 'weight_dacay' must be one of clipnorm, "),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ArgumentTypeError, ArgumentValueError), match=f"^{message}"):
        gpu_adam.Adam(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o, x: o.set_group([x], weight_decay=-1), "weight_decay must be >= 0"),
        (lambda o, x: o.set_group([x], beta_1=1.0), r"beta_1 must lie in \[0, 1\)"),
        (lambda o, x: o.set_group([x], learning_rate=0.1), "keyword 'learning_rate' must be one of learning_rate_mult"),
        (lambda o, x: o.set_group([x], epsilon=lambda: 1), r"epsilon must be a real number \(got <function"),
        (lambda o, x: o.set_group({x}, beta_1=0.5), r"variables must hold variables in an order \(got a set\)"),
        (lambda o, x: o.set_group(3, beta_1=0.5), r"variables must hold variables in an order \(got int\)"),
        (lambda o, x: o.set_group([x, "y"], beta_1=0.5), r"variables\[1\] must be a Variable"),
        (lambda o, x: o.set_group([x, Variable([1])], beta_1=0.5), "variable 'Variable' must have one of the dtypes"),
        (lambda o, x: o.exclude_from_weight_decay(var_names="bias"), "var_names must be a list"),
        (lambda o, x: o.exclude_from_weight_decay(var_names=np.array("bias")), "var_names must be a list"),
        (lambda o, x: o.exclude_from_weight_decay(var_names=["("]), r"var_names\[0\] must be a regular expression"),
        (lambda o, x: o.exclude_from_weight_decay(var_names=[1]), r"var_names\[0\] must be a regular expression"),
        (lambda o, x: o.exclude_from_weight_decay([3.0]), r"var_list\[0\] must be a Variable"),
    ],
)
def test_groups_that_are_refused(device: Device, call: Callable[[Any, Any], None], message: str) -> None:
    x, optimizer = Variable(start("float32"), name="x"), gpu_adam.Adam(weight_decay=0.1)
    with unchanged(optimizer, x), pytest.raises((ArgumentTypeError, ArgumentValueError), match=f"^{message}"):
        call(optimizer, x)
    assert not optimizer.weights
    assert not optimizer._state.settings
    assert not optimizer._state.never_decayed
    assert not optimizer._state.never_decayed_names


@pytest.mark.parametrize(("dtype", "large"), [("float32", 1e30), ("float64", 1e200)])
def test_products_that_a_dtype_does_not_hold(device: Device, dtype: str, large: float) -> None:
    x = Variable(start(dtype), name="x")
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("learning_rate", {}, {"learning_rate_multiplier": large}),
        ("weight_decay times learning_rate", {"weight_decay": large}, {}),
        ("weight_decay times learning_rate", {}, {"weight_decay": large}),
    ]
    for argument, config, settings in cases:
        optimizer = gpu_adam.Adam(large, **config)
        optimizer.set_group([x], **settings)
        with unchanged(optimizer, x), pytest.raises(ArgumentValueError, match=f"^{argument} must be finite in {dtype}"):
            optimizer.apply_gradients([(device.array(gradient(0, dtype)), x)])


def test_a_penalty_that_float32_does_not_hold(device: Device) -> None:
    x, optimizer = Variable(start("float32"), name="x"), gpu_adam.Adam(l2=1e39)
    optimizer.build([x])
    with unchanged(optimizer, x), pytest.raises(ArgumentValueError, match=r"^l2 must be finite in float32"):
        optimizer.apply_gradients([(device.array(gradient(0, "float32")), x)])


def test_a_copied_flavour_is_as_plain() -> None:
    """A copy of a plain optimizer computes no numbers of other flavours."""
    hyper = gpu_adam.Adam()._hyper
    copied = copy.deepcopy(PLAIN)
    assert copied is not PLAIN
    for dtype in ("float32", "float64"):
        assert Scalars(hyper, 3, copied).for_real(dtype) == Scalars(hyper, 3, PLAIN).for_real(dtype)
