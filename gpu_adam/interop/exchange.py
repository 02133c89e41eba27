"""What all exchanges have in common: a state is the steps done and, slot by slot, the arrays of variables in order."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu_adam.adam import Adam
from gpu_adam.conversion import as_numbers
from gpu_adam.devices import Array
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, DeviceError
from gpu_adam.rules import items_of, shown
from gpu_adam.schedules import LearningRateSchedule
from gpu_adam.state.counter import checked_count
from gpu_adam.variables import Variable


class Convention(NamedTuple):
    """What an optimizer must be for a library's state to mean the same in both.

    Attributes:
        library: its optimizer, for messages.
        complex_mode: how it updates complex variables; None for a way that is not offered here.
        settings: which arguments of `Adam` must have which value, and why: what the library does.
    """

    library: str
    complex_mode: str | None
    settings: Mapping[str, tuple[Any, str]]


HAT, PAPER = ("hat", "adds epsilon to the root of v"), ("paper", "adds epsilon to the root of bias-corrected v")
"""What a library says of epsilon_form."""

NOT_KEPT: dict[str, tuple[Any, str]] = {
    "use_ema": (False, "keeps no averages"),
    "master_weights": (False, "keeps no masters"),
    "loss_scale": (None, "keeps no loss scale"),
}
"""What no library but Keras 3, which has averages, keeps in its state."""


class Given(NamedTuple):
    """A number or an array of a library's state, with what messages call it."""

    argument: str
    value: Any


class Exchange:
    """The slots of an optimizer that a library keeps too.

    Args:
        adam: the optimizer.
        variables: all variables that it has slots for, in the order of the library's parameters.
        convention: the library's.

    Attributes:
        variables: as above, in a list.
        slots: for each slot name that the optimizer's configuration asks for, the slots in the order of `variables`.

    Raises:
        ArgumentTypeError: no `Adam`; no variables.
        ArgumentValueError: the optimizer's configuration, or something that it holds, has no counterpart; a variable is
            missing, or comes twice.
        SlotNotFoundError: a variable has no slots yet.
    """

    def __init__(self, adam: Adam, variables: Any, convention: Convention) -> None:
        if not isinstance(adam, Adam):
            raise ArgumentTypeError("adam", "must be a gpu_adam.Adam", type(adam).__name__, "pass the optimizer")
        self.variables = items_of("variables", variables, "must be the optimizer's variables")
        settings = {**adam.flavour._asdict(), "amsgrad": adam.amsgrad}
        for name, (value, why) in convention.settings.items():
            _check_setting(name, settings[name], value, f"{convention.library} {why}")
        names = ["m", "v", *["vhat"] * adam.amsgrad, *["average"] * adam.flavour.use_ema]
        self._adam, self._weights = adam, adam.weights
        self.slots: dict[str, list[Variable]] = {
            name: [adam.get_slot(variable, name) for variable in self.variables] for name in names
        }
        self._check_variables(convention)

    def _check_variables(self, convention: Convention) -> None:
        """Raise ArgumentValueError unless the slots are all that the optimizer holds, and of kinds that are shared."""
        shared = {id(slot) for slots in self.slots.values() for slot in slots}
        if len(shared) < sum(map(len, self.slots.values())):
            raise ArgumentValueError("variables", "must name each variable once", "one twice", "leave the second out")
        if any(slot.dtype.kind == "c" for slot in self.slots["m"]):
            library, mode = convention.library, convention.complex_mode
            if mode is None:
                rule = f"must be real, as {library} updates complex ones in a way that has no counterpart"
                raise ArgumentValueError("variables", rule, "a complex one", "exchange the optimizer of real ones")
            _check_setting("complex_mode", self._adam.complex_mode, mode, f"{library} updates complex parameters so")
        counter = self._adam.iterations
        besides = [weight.name for weight in self._weights if weight is not counter and id(weight) not in shared]
        if besides:
            rule = f"must be all that the optimizer has slots for, none but {', '.join(self.slots)}"
            remedy = "pass all its variables, or forget those with other slots"
            raise ArgumentValueError("variables", rule, f"{besides[0]!r} besides", remedy)

    def export(self) -> tuple[int, dict[str, list[np.ndarray]]]:
        """The steps done and copies of the slots in host memory, by slot name. Waits for the device."""
        by_slot = dict(zip(map(id, self._weights), self._adam.get_weights(), strict=True))
        arrays = {name: [np.asarray(by_slot[id(slot)]) for slot in slots] for name, slots in self.slots.items()}
        return int(by_slot[id(self._adam.iterations)]), arrays

    def restore(self, iterations: Given, arrays: Mapping[str, Sequence[Given]]) -> None:
        """Overwrite the steps done and the slots: all or, on an error, none.

        Args:
            iterations: the steps done.
            arrays: for each name in `slots` one array for each variable, whose shape is the slot's, and whose dtype
                fits into the slot's without loss.

        Raises:
            ArgumentTypeError, ArgumentValueError: no number of steps; an array of another shape or of a wider dtype.
        """
        by_slot: dict[int, Any] = {id(self._adam.iterations): checked_count(iterations.value, iterations.argument)}
        for name, slots in self.slots.items():
            by_slot |= {id(slot): _fitting(given, slot) for slot, given in zip(slots, arrays[name], strict=True)}
        self._adam.set_weights([by_slot[id(weight)] for weight in self._weights])


def learning_rate(adam: Adam) -> float:
    """The learning rate of an optimizer's next step."""
    rate, iterations = adam.learning_rate, int(adam.iterations)
    now = rate(iterations) if isinstance(rate, LearningRateSchedule) else rate
    return float(now) / (1 + float(adam.decay) * iterations)


def imported(module: str, install: str) -> Any:
    """A library's module.

    Raises:
        DeviceError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        what = f"a state for {module.partition('.')[0]}"
        raise DeviceError(what, "needs the library", error, f"install it: pip install {install}") from error


def check_count(argument: str, count: int, expected: Sequence[int], remedy: str) -> None:
    """Raise ArgumentValueError unless a state has one of the expected numbers of arrays or parameters."""
    if count not in expected:
        rule = f"must hold {' or '.join(map(str, expected))} for these variables"
        raise ArgumentValueError(argument, rule, count, remedy)


def _check_setting(name: str, value: Any, expected: Any, why: str) -> None:
    if value != expected:
        rule = f"must have {name}={expected!r}, as {why}"
        raise ArgumentValueError("adam", rule, shown(value), f"construct it with {name}={expected!r}")


def _fitting(given: Given, slot: Variable) -> Array:
    """An array that a slot holds bit for bit."""
    argument, remedy = given.argument, "pass the state of the same parameters, in the order of the variables"
    array = as_numbers(given.value, argument, remedy)
    if tuple(array.shape) != slot.shape:
        raise ArgumentValueError(argument, f"must have shape {slot.shape} for {slot.name!r}", array.shape, remedy)
    if not np.can_cast(array.dtype, slot.dtype):
        rule = f"must fit into {slot.dtype} of {slot.name!r} without loss"
        raise ArgumentValueError(argument, rule, array.dtype, "use variables of that dtype, or cast the array yourself")
    return array
