"""States of optax.adam: the same bits on both sides, and the same next step."""

from typing import Any

import numpy as np
import pytest

from gpu_adam import ArgumentTypeError, ArgumentValueError, Variable
from gpu_adam.devices import Device
from gpu_adam.interop.optax import export_state, import_state

from . import cases

jax: Any = pytest.importorskip("jax", reason="JAX is not installed (extra: jax)")
optax: Any = pytest.importorskip("optax", reason="Optax is not installed (extra: peers)")

PAPER: dict[str, Any] = {"epsilon_form": "paper"}
NAMES = list(cases.SHAPES)
DECAY = 0.25
OPTIMIZERS: dict[str, Any] = {
    "adam": lambda **numbers: optax.adam(cases.LR, **numbers),
    "adam on a schedule": lambda **numbers: optax.adam(optax.constant_schedule(cases.LR), **numbers),
    "adamw": lambda **numbers: optax.adamw(cases.LR, weight_decay=DECAY, **numbers),
    "chained": lambda **numbers: optax.chain(optax.scale(1.0), optax.adam(cases.LR, **numbers)),
}
DTYPES = ["float32", "complex64"]


def theirs(kind: str) -> Any:
    return OPTIMIZERS[kind](b1=cases.EXACT["beta_1"], b2=cases.EXACT["beta_2"], eps=2.0**-20)


def config(kind: str) -> dict[str, Any]:
    return {**PAPER, "weight_decay": DECAY} if kind == "adamw" else PAPER


def tree(values: cases.Arrays) -> dict[str, Any]:
    return {name: jax.numpy.asarray(value) for name, value in zip(NAMES, values, strict=True)}


def leaves(tree: dict[str, Any]) -> cases.Arrays:
    return [np.asarray(tree[name]) for name in NAMES]


def step_on(optimizer: Any, state: Any, params: Any, grads: cases.Arrays) -> tuple[Any, Any]:
    updates, state = optimizer.update(tree(grads), state, params)
    return state, optax.apply_updates(params, updates)


def moments(state: Any) -> Any:
    """The one state of Adam in that of an optimizer."""
    (found,) = [s for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s)]
    return found


def is_adam(state: Any) -> bool:
    return isinstance(state, optax.ScaleByAdamState)


def assert_same_state(adam: Any, variables: list[Variable], state: Any) -> None:
    found = moments(state)
    assert (int(found.count), found.count.dtype) == (adam.iterations, np.int32)
    mu, nu = leaves(found.mu), leaves(found.nu)
    cases.assert_same(mu, cases.slots(adam, variables, "m"))
    cases.assert_same(nu, [v.astype(m.dtype) for v, m in zip(cases.slots(adam, variables, "v"), mu, strict=True)])


def assert_same_next_step(adam: Any, variables: list[Variable], optimizer: Any, state: Any, dtype: str) -> None:
    before, grads = [v.numpy() for v in variables], cases.gradients(50, dtype)
    state, params = step_on(optimizer, state, tree(before), grads)
    cases.step_on(adam, variables, grads)
    cases.assert_near([v.numpy() for v in variables], leaves(params), before)
    found = moments(state)
    cases.assert_slots_near(cases.slots(adam, variables, "m"), leaves(found.mu), grads)
    cases.assert_slots_near(cases.slots(adam, variables, "v"), leaves(found.nu), grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_to_optax(device: Device, kind: str, dtype: str) -> None:
    adam, variables = cases.stepped(dtype, **config(kind))
    optimizer = theirs(kind)
    state = optimizer.init(tree([v.numpy() for v in variables]))
    state = optax.tree.set(state, **export_state(adam, variables)._asdict())
    assert_same_state(adam, variables, state)
    assert_same_next_step(adam, variables, optimizer, state, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_from_optax(device: Device, kind: str, dtype: str) -> None:
    optimizer, params = theirs(kind), tree(cases.arrays(0, dtype))
    state = optimizer.init(params)
    for step in range(cases.STEPS):
        state, params = step_on(optimizer, state, params, cases.gradients(step, dtype))
    adam, variables = cases.built(dtype, leaves(params), **config(kind))
    import_state(adam, state, variables)
    assert adam.iterations == cases.STEPS
    assert_same_state(adam, variables, state)
    assert_same_next_step(adam, variables, optimizer, state, dtype)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_64_bits_need_an_option_of_jax(device: Device, dtype: str) -> None:
    adam, variables = cases.stepped(dtype, **PAPER)
    with pytest.raises(ArgumentValueError, match="jax_enable_x64"):
        export_state(adam, variables)
    with jax.enable_x64(True):
        state = export_state(adam, variables)
        assert_same_state(adam, variables, state)
        twin, others = cases.built(dtype, [v.numpy() for v in variables], **PAPER)
        import_state(twin, state, others)
        assert_same_next_step(twin, others, theirs("adam"), (state, optax.EmptyState()), dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_moments_of_16_bits_become_wider(dtype: str) -> None:
    params = {name: value.astype(dtype) for name, value in tree(cases.arrays(0)).items()}
    optimizer = theirs("adam")
    state = optimizer.init(params)
    for step in range(cases.STEPS):
        grads = {name: value.astype(dtype) for name, value in tree(cases.gradients(step)).items()}
        _, state = optimizer.update(grads, state, params)
    found = moments(state)
    adam, variables = cases.built(params["bias"].dtype, leaves(params), **PAPER)
    import_state(adam, state, variables)
    for slot, tree_of in (("m", found.mu), ("v", found.nu)):
        cases.assert_same(cases.slots(adam, variables, slot), [x.astype(np.float32) for x in leaves(tree_of)])
    assert export_state(adam, variables).mu["bias"].dtype == np.float32


def test_trees_of_variables() -> None:
    """Of any depth, as of Flax's parameters; a list is a dict by name."""
    adam, (scale, bias, kernel) = cases.stepped(**PAPER)
    nested = {"dense": {"kernel": kernel, "bias": bias}, "norm": [scale]}
    state = export_state(adam, nested)
    assert jax.tree.structure(state.mu) == jax.tree.structure(jax.tree.map(lambda v: 0, nested))
    cases.assert_same([state.mu["dense"]["kernel"]], [adam.get_slot(kernel, "m").numpy()])
    assert set(export_state(adam, [scale, bias, kernel]).mu) == {"scale", "bias", "kernel"}
    twin, (s, b, k) = cases.built(**PAPER)
    import_state(twin, state, {"dense": {"kernel": k, "bias": b}, "norm": [s]})
    cases.assert_same(twin.get_weights(), adam.get_weights())


def test_states_that_have_no_counterpart() -> None:
    adam, variables = cases.stepped(**PAPER)
    good, before = export_state(adam, variables), adam.get_weights()
    params = tree(cases.arrays(0))
    wide = {**good.mu, "bias": np.zeros(7)}
    wrong: list[tuple[Any, type[Exception], str]] = [
        (optax.amsgrad(0.1).init(params), ArgumentValueError, "maximum is over bias-corrected v .got ScaleByAmsgrad"),
        (optax.sgd(0.1).init(params), ArgumentTypeError, "must hold one ScaleByAdamState .got 0 in a tuple"),
        ((good, good), ArgumentTypeError, "must hold one ScaleByAdamState .got 2"),
        (None, ArgumentTypeError, "must hold one ScaleByAdamState"),
        (good._replace(count=-1), ArgumentValueError, r"state.count must lie in \[0"),
        (good._replace(nu={"bias": good.nu["bias"]}), ArgumentValueError, "state.nu must be a tree like that"),
        (good._replace(mu=wide), ArgumentValueError, r"state.mu\['bias'\] must fit into float32 .*without loss"),
        (
            good._replace(nu={**good.nu, "scale": np.zeros(2, "f")}),
            ArgumentValueError,
            r"nu\['scale'\] must have shape",
        ),
        (good._replace(nu={**good.nu, "scale": 1j}), ArgumentValueError, r"nu\['scale'\] must be real"),
    ]
    for state, error, message in wrong:
        with pytest.raises(error, match=message):
            import_state(adam, state, variables)
        cases.assert_same(adam.get_weights(), before)


def test_optimizers_that_have_no_counterpart() -> None:
    adam, variables = cases.stepped(**PAPER, amsgrad=True)
    with pytest.raises(ArgumentValueError, match=r"amsgrad=False, as .* optax.amsgrad keeps that of bias-corrected v"):
        export_state(adam, variables)
    adam, variables = cases.stepped(np.complex64, **PAPER, complex_mode="real_imag")
    with pytest.raises(ArgumentValueError, match="construct it with complex_mode='abs2'"):
        export_state(adam, variables)
    adam, variables = cases.built(**PAPER)
    adam.iterations = 2**31
    with pytest.raises(ArgumentValueError, match=r"must be below 2\^31"):
        export_state(adam, variables)


def test_names_must_differ() -> None:
    adam, variables = cases.built(**PAPER)
    twin = Variable(1.0, name="bias")
    adam.build([twin])
    with pytest.raises(ArgumentValueError, match=r"'bias' twice.*pass a dict"):
        export_state(adam, [*variables, twin])
