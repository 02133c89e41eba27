"""States of torch.optim.Adam and AdamW: the same bits on both sides, and the same next step."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gpu_adam import Adam, ArgumentTypeError, ArgumentValueError, CosineDecay
from gpu_adam.devices import Device
from gpu_adam.interop.torch import SLOTS, export_state, import_state

from . import cases

torch: Any = pytest.importorskip("torch", reason="torch is not installed (extra: torch)")
ours: Any = pytest.importorskip("gpu_adam.torch")

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PAPER: dict[str, Any] = {"epsilon_form": "paper", "complex_mode": "real_imag"}
CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "decoupled decay": {"weight_decay": 0.25},
    "L2": {"l2": 0.25, "amsgrad": True},
}
DTYPES = ["float32", "float64", "complex64", "complex128"]


def theirs(values: cases.Arrays, **config: Any) -> Any:
    """An optimizer of torch with the numbers of an optimizer here, and its parameters."""
    kind = torch.optim.AdamW if config.get("weight_decay") else torch.optim.Adam
    return kind(
        [torch.nn.Parameter(torch.tensor(value)) for value in values],
        cases.LR,
        (cases.EXACT["beta_1"], cases.EXACT["beta_2"]),
        2.0**-20,
        config.get("weight_decay") or config.get("l2", 0.0),
        config.get("amsgrad", False),
        maximize=config.get("maximize", False),
    )


def params(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def values(optimizer: Any) -> cases.Arrays:
    return [p.detach().clone().numpy() for p in params(optimizer)]


def step_on(optimizer: Any, grads: cases.Arrays) -> None:
    for p, gradient in zip(params(optimizer), grads, strict=True):
        p.grad = torch.tensor(gradient)
    optimizer.step()


def moments(optimizer: Any, name: str) -> cases.Arrays:
    return [optimizer.state[p][name].numpy() for p in params(optimizer)]


def assert_same_state(adam: Adam, variables: list[Any], optimizer: Any) -> None:
    names = list(SLOTS) if adam.amsgrad else list(SLOTS)[:2]
    for name in names:
        cases.assert_same(moments(optimizer, name), cases.slots(adam, variables, SLOTS[name]))
    assert [float(optimizer.state[p]["step"]) for p in params(optimizer)] == [adam.iterations] * len(variables)


def assert_same_next_step(adam: Adam, variables: list[Any], optimizer: Any, dtype: Any) -> None:
    before, grads = values(optimizer), cases.gradients(50, dtype)
    cases.assert_same([v.numpy() for v in variables], before)
    cases.step_on(adam, variables, grads)
    step_on(optimizer, grads)
    cases.assert_near([v.numpy() for v in variables], values(optimizer), before)
    for name, slot in SLOTS.items():
        if slot in adam.get_slot_names():
            cases.assert_slots_near(cases.slots(adam, variables, slot), moments(optimizer, name), grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", CHOICES)
def test_to_torch(device: Device, choice: str, dtype: str) -> None:
    config = CHOICES[choice]
    adam, variables = cases.stepped(dtype, **PAPER, **config)
    optimizer = theirs([v.numpy() for v in variables])  # its numbers come along
    optimizer.load_state_dict(export_state(adam, variables))
    assert_same_state(adam, variables, optimizer)
    assert_same_next_step(adam, variables, optimizer, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choice", CHOICES)
def test_from_torch(device: Device, choice: str, dtype: str) -> None:
    config = CHOICES[choice]
    optimizer = theirs(cases.arrays(0, dtype), **config)
    for step in range(cases.STEPS):
        step_on(optimizer, cases.gradients(step, dtype))
    adam, variables = cases.built(dtype, values(optimizer), **PAPER, **config)
    import_state(adam, optimizer.state_dict(), variables)
    assert adam.iterations == cases.STEPS
    assert_same_state(adam, variables, optimizer)
    assert_same_next_step(adam, variables, optimizer, dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_moments_of_16_bits_become_wider(dtype: str) -> None:
    """In torch they are in the parameter's dtype, which fits into float32; gpu_adam.torch takes float32 as it is."""
    parameters = [torch.nn.Parameter(torch.tensor(x).to(getattr(torch, dtype))) for x in cases.arrays(0)]
    optimizer = torch.optim.Adam(parameters, cases.LR)
    for step in range(cases.STEPS):
        for p, gradient in zip(parameters, cases.gradients(step), strict=True):
            p.grad = torch.tensor(gradient).to(p.dtype)
        optimizer.step()
    adam, variables = cases.built(getattr(ml_dtypes, dtype, dtype), **PAPER)
    import_state(adam, optimizer.state_dict(), variables)
    for name, slot in (("exp_avg", "m"), ("exp_avg_sq", "v")):
        cases.assert_same(cases.slots(adam, variables, slot), [optimizer.state[p][name].float() for p in parameters])

    cases.step_on(adam, variables, cases.gradients(50))  # so that the slots use their precision
    twin = ours.Adam(parameters)
    twin.load_state_dict(export_state(adam, variables))
    assert_same_state(adam, variables, twin)
    optimizer.load_state_dict(export_state(adam, variables))
    for p, m in zip(parameters, cases.slots(adam, variables, "m"), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], torch.tensor(m).to(p.dtype))


def test_slots_of_bfloat16_are_tensors_of_bfloat16() -> None:
    adam, variables = cases.stepped(slot_dtype="bfloat16", **PAPER)
    state = export_state(adam, variables)
    assert {state["state"][n][name].dtype for n in range(3) for name in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    twin, others = cases.built(slot_dtype="bfloat16", **PAPER)
    import_state(twin, state, others)
    cases.assert_same(twin.get_weights(), adam.get_weights())


def test_groups_are_neighbours_with_the_same_settings() -> None:
    adam, variables = cases.stepped(**PAPER, weight_decay=0.5)
    adam.set_group(variables[1:], learning_rate_multiplier=0.5, beta_1=0.75, epsilon=1e-3, weight_decay=0.0)
    groups = export_state(adam, variables)["param_groups"]
    assert [group["params"] for group in groups] == [[0], [1, 2]]
    first, second = groups
    assert (first["lr"], first["betas"], first["weight_decay"]) == (cases.LR, (0.875, 0.9375), 0.5)
    assert (second["lr"], second["betas"], second["eps"]) == (cases.LR / 2, (0.75, 0.9375), 1e-3)
    assert (first["decoupled_weight_decay"], second["decoupled_weight_decay"]) == (True, False)


def test_the_learning_rate_is_that_of_the_next_step() -> None:
    adam, variables = cases.stepped(**PAPER)
    adam.learning_rate, adam.decay = CosineDecay(1.0, decay_steps=10), 0.5
    (group,) = export_state(adam, variables)["param_groups"]
    assert group["lr"] == pytest.approx(0.5 / 3.5, rel=1e-15)


def test_a_count_beyond_float32(device: Device) -> None:
    adam, variables = cases.built(**PAPER)
    adam.iterations = 2**24 + 1
    assert float(export_state(adam, variables)["state"][0]["step"]) == 2**24 + 1


def test_a_fresh_state_is_one_of_no_steps() -> None:
    adam, variables = cases.stepped(**PAPER)
    import_state(adam, theirs(cases.arrays(0)).state_dict(), variables)
    assert adam.iterations == 0
    assert not any(weight.any() for weight in adam.get_weights())


def test_parameters_in_the_order_of_groups() -> None:
    """And by numbers of any kind, which older files have."""
    adam, variables = cases.stepped(**PAPER)
    state = export_state(adam, variables)
    (group,) = state["param_groups"]
    state["param_groups"] = [{**group, "params": [2]}, {**group, "params": [0, 1]}]
    twin, others = cases.built(**PAPER)
    import_state(twin, state, [others[2], others[0], others[1]])
    cases.assert_same(twin.get_weights(), adam.get_weights())


def test_states_that_have_no_counterpart() -> None:
    adam, variables = cases.stepped(**PAPER)
    good, before = export_state(adam, variables), adam.get_weights()

    def changed(number: int, **entries: Any) -> dict[str, Any]:
        entry = {**good["state"][number], **entries}
        entry = {name: value for name, value in entry.items() if value is not None}
        return {**good, "state": {**good["state"], number: entry}}

    def flagged(**flags: Any) -> dict[str, Any]:
        return {**good, "param_groups": [{**good["param_groups"][0], **flags}]}

    wrong: list[tuple[Any, type[Exception], str]] = [
        (changed(1, step=torch.tensor(4.0)), ArgumentValueError, "as many steps for every parameter .got 4 to 5"),
        (changed(0, step=torch.tensor(4.5)), ArgumentValueError, r"\[0\]\['step'\] must be a whole number"),
        ({**good, "state": {0: good["state"][0]}}, ArgumentValueError, "got 0 to 5.*use gpu_adam.torch.Adam"),
        (changed(2, exp_avg=torch.zeros(5, 3)), ArgumentValueError, r"\[2\]\['exp_avg'\] must have shape \(3, 5\)"),
        (changed(1, exp_avg_sq=torch.zeros(7).double()), ArgumentValueError, "must fit into float32 .*without loss"),
        (changed(1, exp_avg_sq=None), ArgumentTypeError, r"\[1\]\['exp_avg_sq'\] must consist of numbers .got None"),
        (flagged(amsgrad=True), ArgumentValueError, "construct the optimizer with amsgrad=True"),
        (flagged(maximize=True), ArgumentValueError, "construct the optimizer with maximize=True"),
        (flagged(params=[0, 1]), ArgumentValueError, "must hold 3 for these variables .got 2"),
        (good["state"], ArgumentTypeError, "must be a mapping with a mapping 'state'"),
        ({**good, "state": [1]}, ArgumentTypeError, "must be a mapping with a mapping 'state'"),
        ({**good, "param_groups": 1}, ArgumentTypeError, "and a list 'param_groups'"),
        (None, ArgumentTypeError, "must be a mapping"),
    ]
    for state, error, message in wrong:
        with pytest.raises(error, match=message):
            import_state(adam, state, variables)
        cases.assert_same(adam.get_weights(), before)


def test_both_kinds_of_decay_are_refused() -> None:
    adam, variables = cases.stepped(**PAPER, weight_decay=0.1, l2=0.1)
    with pytest.raises(ArgumentValueError, match="weight_decay must be 0 beside l2"):
        export_state(adam, variables)


def test_complex_parameters_need_both_parts_for_themselves() -> None:
    adam, variables = cases.stepped(np.complex64, epsilon_form="paper")
    with pytest.raises(ArgumentValueError, match="construct it with complex_mode='real_imag'"):
        export_state(adam, variables)
