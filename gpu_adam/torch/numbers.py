"""The numbers of a parameter group of torch: their rules, and the hyperparameters that they are here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.hyperparameters import Flavour
from gpu_adam.rules import BELOW_ONE, FINITE, FINITE_NOT_NEGATIVE, NOT_NEGATIVE, real_number, truth_value

_LR = FINITE._replace(remedy="pass 1e-3, say")
_BETA = BELOW_ONE._replace(remedy="pass (0.9, 0.999), say")
_EPS = NOT_NEGATIVE._replace(remedy="pass 1e-8, say")
_DECAY = FINITE_NOT_NEGATIVE._replace(remedy="pass 0 for none")
_FLAVOURS = {maximize: Flavour(maximize=maximize, epsilon_form="paper") for maximize in (False, True)}
_NAMES = ("lr", "betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay")


class Numbers:
    """What a group's parameters are updated by, in this package's words.

    Args:
        group: a parameter group. Tensors among its numbers are read now; on a CUDA device the host waits for that.

    Attributes:
        hyper: as a `Cohort` has it. "l2" is the weight decay that is added to the gradient, as Adam of torch has it,
            "weight_decay" the decoupled one of AdamW.
        flavour: as a `Cohort` has it.
        adjusts: whether there is weight decay of either kind, or the group maximizes.

    Raises:
        ArgumentTypeError, ArgumentValueError: no number, or one outside its range.
    """

    def __init__(self, group: Mapping[str, Any]) -> None:
        self._values = [group[name] for name in _NAMES]
        rate, betas, epsilon, decay, maximize, is_decoupled = self._values
        self._are_fixed = type(rate) is float and type(betas) is tuple and not any(map(torch.is_tensor, betas))
        beta_1, beta_2 = _pair(betas)
        decay = _number("weight_decay", decay, _DECAY)
        self.hyper: dict[str, float] = {
            "learning_rate": _number("lr", rate, _LR),
            "beta_1": _number("betas[0]", beta_1, _BETA),
            "beta_2": _number("betas[1]", beta_2, _BETA),
            "epsilon": _number("eps", epsilon, _EPS),
            "decay": 0.0,
            "weight_decay": decay if is_decoupled else 0.0,
            "l2": 0.0 if is_decoupled else decay,
        }
        maximizes = truth_value("maximize", maximize)
        self.flavour = _FLAVOURS[maximizes]
        self.adjusts = bool(decay or maximizes)

    def are_of(self, group: Mapping[str, Any]) -> bool:
        """Whether the group has these numbers still."""
        return self._are_fixed and [group[name] for name in _NAMES] == self._values


def check(defaults: Mapping[str, Any]) -> None:
    """Raise what is wrong with a constructor's arguments.

    Raises:
        ArgumentTypeError, ArgumentValueError: see `Numbers`; a learning rate below 0; `differentiable`.
    """
    rate = Numbers(defaults).hyper["learning_rate"]
    if rate < 0:
        raise ArgumentValueError("lr", "must be >= 0", rate, "pass maximize=True to go uphill")
    truth_value("amsgrad", defaults["amsgrad"])
    if defaults["differentiable"]:
        rule, remedy = "must be False, for kernels have no derivative", "use torch.optim.Adam for this"
        raise ArgumentValueError("differentiable", rule, defaults["differentiable"], remedy)


def _pair(betas: Any) -> tuple[Any, Any]:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ArgumentTypeError("betas", "must be a pair of numbers", repr(betas), _BETA.remedy)
    return betas[0], betas[1]


def _number(argument: str, value: Any, rule: Any) -> float:
    """`value`, a number or a tensor with one element, as a float that obeys the rule."""
    if torch.is_tensor(value):
        if value.numel() != 1:
            raise ArgumentValueError(argument, "must have one element", f"shape {tuple(value.shape)}", rule.remedy)
        value = value.item()
    number = float(real_number(argument, value, remedy=rule.remedy))
    rule.check(argument, number)
    return number
