"""States of torch.optim.Adam and AdamW.

torch has for each parameter exp_avg, exp_avg_sq and a step of its own, and with amsgrad max_exp_avg_sq, the maximum of
exp_avg_sq before its bias is corrected: m, v, vhat and t of `Adam(epsilon_form="paper")`, for complex parameters with
``complex_mode="real_imag"``. Releases older than the pull request below, of August 2019, added epsilon to the root of v
itself, which a state does not tell.

References:
    https://github.com/pytorch/pytorch/blob/v2.13.0/torch/optim/adam.py
    https://github.com/pytorch/pytorch/pull/22628
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpu_adam.adam import Adam
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.interop.exchange import NOT_KEPT, PAPER, Convention, Exchange, Given, check_count, imported, learning_rate
from gpu_adam.state.counter import checked_count

SLOTS = {"exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "vhat"}
"""The slots by torch's names of them, in the order of torch's dicts, in which "step" comes first."""

_CONVENTION = Convention("torch.optim.Adam", "real_imag", {"epsilon_form": PAPER, **NOT_KEPT})


def export_state(adam: Adam, variables: Sequence[Any]) -> dict[str, Any]:
    """The state as `load_state_dict` of torch.optim.Adam, torch.optim.AdamW and gpu_adam.torch takes it.

    torch rounds moments of 16-bit parameters to their dtype when it loads them; gpu_adam.torch does not.

    Args:
        adam: with ``epsilon_form="paper"``; it is not changed. Waits for the device.
        variables: all its variables, in the order of torch's parameters. Neighbours with the same settings are a
            parameter group.

    Returns:
        {"state": {number: {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}}, "param_groups": [...]}, of tensors in
        host memory in the slots' dtypes; the groups have lr (that of the next step), betas, eps, weight_decay, amsgrad,
        maximize and decoupled_weight_decay.

    Raises:
        DeviceError: torch is not installed.
        ArgumentTypeError, ArgumentValueError, SlotNotFoundError: as `exchange.Exchange`; weight_decay beside l2, of
            which torch has one.
    """
    exchange = Exchange(adam, variables, _CONVENTION)
    groups = _groups(adam, exchange.variables)
    torch = imported("torch", '"gpu-adam[torch]"')
    tensor = imported("gpu_adam.autodiff.torch", '"gpu-adam[torch]"').tensor
    iterations, arrays = exchange.export()
    # torch counts in float32, in which numbers from 2^24 on stand still.
    step = torch.tensor(float(iterations), dtype=torch.float32 if iterations < 2**24 else torch.float64)
    names = [name for name, slot in SLOTS.items() if slot in arrays]
    state = {
        number: {"step": step.clone(), **{name: tensor(arrays[SLOTS[name]][number]) for name in names}}
        for number in range(len(exchange.variables))
    }
    return {"state": state, "param_groups": groups}


def import_state(adam: Adam, state: Mapping[str, Any], variables: Sequence[Any]) -> None:
    """Go on from the state of torch.optim.Adam, torch.optim.AdamW or gpu_adam.torch; hyperparameters stay as they are.

    Args:
        adam: with ``epsilon_form="paper"``; `build` has made its slots.
        state: what `state_dict` returned. A parameter without an entry has made no step.
        variables: all variables of `adam`, in the order of torch's parameters.

    Raises:
        ArgumentTypeError, ArgumentValueError, SlotNotFoundError: as `exchange.Exchange`; no state of torch; another
            number of parameters, other shapes or wider dtypes; parameters that have made different numbers of steps, as
            `Adam` counts once for all; another amsgrad or maximize than the optimizer's. Nothing has changed then.
    """
    exchange = Exchange(adam, variables, _CONVENTION)
    is_state = isinstance(state, Mapping) and isinstance(state.get("state"), Mapping)
    if not is_state or not isinstance(state.get("param_groups"), list):
        rule = "must be a mapping with a mapping 'state' and a list 'param_groups'"
        remedy = "pass what optimizer.state_dict() returned"
        raise ArgumentTypeError("state", rule, type(state).__name__, remedy)
    for name, own in (("amsgrad", adam.amsgrad), ("maximize", adam.flavour.maximize)):
        if any(bool(group.get(name, False)) != own for group in state["param_groups"]):
            rule, remedy = f"must be {own} in every group", f"construct the optimizer with {name}={not own}"
            raise ArgumentValueError(f"state['param_groups'][...][{name!r}]", rule, not own, remedy)
    numbers = numbers_of(state)
    check_count("state['param_groups']", len(numbers), [len(exchange.variables)], "pass all variables, in its order")
    entries = {number: state["state"].get(number, {}) for number in numbers}
    steps = [checked_count(each.get("step", 0), f"state['state'][{n}]['step']") for n, each in entries.items()]
    if len(set(steps)) > 1:
        rule, got = "must have made as many steps for every parameter", f"{min(steps)} to {max(steps)}"
        raise ArgumentValueError("state", rule, got, "use gpu_adam.torch.Adam, which counts for each parameter")
    arrays = {
        slot: [
            Given(f"state['state'][{number}][{name!r}]", _moment(entries[number], name, own))
            for number, own in zip(numbers, exchange.slots[slot], strict=True)
        ]
        for name, slot in SLOTS.items()
        if slot in exchange.slots
    }
    exchange.restore(Given("state", max(steps, default=0)), arrays)


def numbers_of(state_dict: Mapping[str, Any]) -> list[Any]:
    """By which numbers a state dict calls the parameters, in order."""
    return [number for group in state_dict["param_groups"] for number in group["params"]]


def _moment(entry: Mapping[str, Any], name: str, slot: Any) -> Any:
    """A moment of a parameter; zeros where it has made no step, None where it is missing."""
    return entry.get(name) if entry else np.zeros(slot.shape, slot.dtype)


def _groups(adam: Adam, variables: list[Any]) -> list[dict[str, Any]]:
    """The parameter groups: runs of variables with the same settings."""
    groups, first = [], 0
    for settings, run in itertools.groupby(variables, adam.get_group):
        count = len(list(run))
        decay, l2 = settings.weight_decay, float(adam.l2)
        decay = float(adam.weight_decay) if decay is None else decay
        if decay and l2:
            rule = "must be 0 beside l2, as torch has one of them"
            raise ArgumentValueError("weight_decay", rule, decay, "set one of them to 0")
        groups.append(
            {
                "params": list(range(first, first + count)),
                "lr": learning_rate(adam) * settings.learning_rate_multiplier,
                "betas": (_or(settings.beta_1, adam.beta_1), _or(settings.beta_2, adam.beta_2)),
                "eps": _or(settings.epsilon, adam.epsilon),
                "weight_decay": decay or l2,
                "amsgrad": adam.amsgrad,
                "maximize": adam.flavour.maximize,
                "decoupled_weight_decay": bool(decay),
            }
        )
        first += count
    return groups


def _or(setting: float | None, own: Any) -> float:
    return float(own if setting is None else setting)
