"""The scale of a loss in half precision: its settings, and its present value, which lies on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gpu_adam.devices import Array
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.rules import is_whole, real_number, shown
from gpu_adam.variables import Variable


class LossScale(NamedTuple):
    """A scale that the loss is multiplied by, so that small gradients are not lost in half precision.

    After a step whose gradients are not all finite the scale is halved; after so many good steps in a row it doubles.
    It stays in [2^-126, 2^126], where a float32 has a reciprocal.

    Attributes:
        initial: the scale at the first step, in that range.
        growth_interval: after how many good steps in a row it doubles, >= 1.

    Reference:
        Micikevicius et al., "Mixed Precision Training", ICLR 2018, https://arxiv.org/abs/1710.03740, section 3.2.
    """

    initial: float = 2.0**15
    growth_interval: int = 2000

    def config(self) -> dict[str, Any]:
        """The settings as JSON-serialisable values, which `checked_loss_scale` takes."""
        return self._asdict()


def checked_loss_scale(value: Any) -> LossScale | None:
    """Settings, or None for none.

    Args:
        value: a LossScale, the mapping that its `config` gives, or None.

    Raises:
        ArgumentTypeError, ArgumentValueError: something else; an unknown name; a number outside its range.
    """
    if value is None:
        return None
    if isinstance(value, LossScale):
        given: Mapping[str, Any] = value._asdict()
    elif isinstance(value, Mapping):
        given = value
    else:
        raise ArgumentTypeError("loss_scale", "must be a LossScale or None", shown(value), "pass LossScale()")
    for name in given:
        if name not in LossScale._fields:
            rule = f"must be one of {', '.join(LossScale._fields)}"
            raise ArgumentTypeError(f"loss_scale's {name!r}", rule, "another", "correct or drop it")
    settings = LossScale(**given)
    initial = float(real_number("loss_scale's initial", settings.initial))
    check_scale(initial, "loss_scale's initial")
    if not is_whole(settings.growth_interval) or settings.growth_interval < 1:
        got = shown(settings.growth_interval)
        raise ArgumentValueError("loss_scale's growth_interval", "must be a whole number >= 1", got, "pass 2000, say")
    return LossScale(initial, int(settings.growth_interval))


def check_scale(scale: float, argument: str) -> None:
    """Raise ArgumentValueError for a scale outside its range."""
    if not 2.0**-126 <= scale <= 2.0**126:
        raise ArgumentValueError(argument, "must lie in [2^-126, 2^126]", scale, "pass 2**15, say")


class CurrentLossScale:
    """The present loss scale of an optimizer.

    Args:
        variable: the optimizer's scale, a float32 scalar on the device of its variables.
        settings: how it follows the steps.

    Attributes:
        settings: as above.
    """

    def __init__(self, variable: Variable, settings: LossScale) -> None:
        self._variable, self.settings = variable, settings

    @property
    def array(self) -> Array:
        """The scale as a live 0-d float32 array on the device, to multiply a loss by. Nothing waits for it."""
        return self._variable._value

    @property
    def value(self) -> float:
        """The scale as a number. Waits for the device."""
        return float(self._variable.numpy())

    def __repr__(self) -> str:
        return f"<{self.settings}, now {self.value}>"
