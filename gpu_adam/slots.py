"""Slot buffers: the arrays an optimizer keeps for each variable, their order, names and the list of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from gpu_adam.devices import Device, find_device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, SlotNotFoundError
from gpu_adam.kernels import DTYPES
from gpu_adam.variables import Variable

_FILLS = {"zeros": 0, "ones": 1}


def slot_names(amsgrad: bool) -> tuple[str, ...]:
    """The slots that an update reads and writes, in the order of the kernels' structs."""
    return ("m", "v", "vhat") if amsgrad else ("m", "v")


class Slots:
    """The slots of every variable, and the list of weights they form with the iteration counter.

    Args:
        complex_mode: one of kernels.COMPLEX_MODES.

    Attributes:
        weights: all slots and the counter in order of creation: for the first step iterations, every m, every v, and
            with AMSGrad every vhat; a variable that comes later appends its own.
        names: slot names in order of first creation.
    """

    def __init__(self, complex_mode: str = "abs2") -> None:
        self.complex_mode = complex_mode
        self.weights: list[Variable] = []
        self.names: list[str] = []
        self._slots: dict[Variable, dict[str, Variable]] = {}
        self._iterations: Variable | None = None

    @property
    def variable_count(self) -> int:
        """How many variables have slots."""
        return len(self._slots)

    @property
    def steps_done(self) -> int:
        """Value of the iteration counter; 0 where it does not exist yet."""
        return 0 if self._iterations is None else int(self._iterations.value)

    def iterations(self, prefix: str) -> Variable:
        """The counter of steps done: an int64 on the host, created by the first call."""
        if self._iterations is None:
            self._iterations = Variable(np.int64(0), trainable=False, name=f"{prefix}/iter", device="host")
            self.weights.append(self._iterations)
        return self._iterations

    def adopt_iterations(self, counter: Variable) -> None:
        """Count in the user's variable; only before the counter exists."""
        if self._iterations is not None:
            rule = "must be set before the counter exists"
            raise ArgumentValueError("iterations", rule, repr(counter), "assign an int, which sets the counter")
        if counter.shape != () or counter.dtype != np.int64 or counter.device.name != "host":
            rule = "must be an int64 scalar on the host"
            raise ArgumentValueError("iterations", rule, repr(counter), "assign an int, which sets the counter")
        self._iterations = counter
        self.weights.append(counter)

    def ensure(self, variables: Iterable[Variable], names: Iterable[str], prefix: str) -> None:
        """Create the missing slots, zero, slot name by slot name; `prefix` is the optimizer's name."""
        variables = list(variables)
        for slot_name in names:
            for variable in variables:
                if slot_name not in self._slots.get(variable, ()):
                    self.add(variable, slot_name, "zeros", f"{prefix}/{variable.name}/{slot_name}")

    def add(self, variable: Variable, slot_name: str, initializer: Any, name: str) -> Variable:
        """The slot, created from `initializer` where it does not exist yet."""
        existing = self._slots.get(variable, {}).get(slot_name)
        if existing is not None:
            return existing
        dtype = self._dtype(variable.dtype, slot_name)
        if isinstance(initializer, str) and initializer == "zeros":
            array = variable.device.zeros(variable.shape, dtype, like=variable.value)
        else:
            array = _beside(initialized(initializer, variable.shape, dtype, variable.device), variable)
        if slot_name in ("m", "v", "vhat") and tuple(array.shape) != variable.shape:
            raise ArgumentValueError(
                f"initializer of slot {slot_name!r} for variable {variable.name!r}",
                f"must give the variable's shape {variable.shape}",
                tuple(array.shape),
                "pass 'zeros', or an array of that shape",
            )
        slot = Variable.over(array, variable.device, name, trainable=False)
        self._slots.setdefault(variable, {})[slot_name] = slot
        self.weights.append(slot)
        if slot_name not in self.names:
            self.names.append(slot_name)
        return slot

    def _dtype(self, dtype: np.dtype, slot_name: str) -> np.dtype:
        """The variable's dtype, but real for the moving averages of |g|^2."""
        if slot_name in ("v", "vhat") and self.complex_mode == "abs2" and dtype.name in DTYPES:
            return np.dtype(DTYPES[dtype.name].real_dtype)
        return dtype

    def get(self, variable: Variable, slot_name: str) -> Variable:
        """The slot; SlotNotFoundError names what there is instead."""
        slots = self._slots.get(variable, {})
        if slot_name not in slots:
            raise SlotNotFoundError(
                f"slot {slot_name!r} of variable {variable.name!r}",
                "must exist",
                f"slots {list(slots)}",
                "call build([variable]) or apply_gradients first",
            )
        return slots[slot_name]

    def copied(self, memo: dict[int, Any]) -> Slots:
        """Independent slots that stay bound to the same variables."""
        new = Slots(self.complex_mode)
        copies: dict[Variable, Variable] = {}
        for variable, slots in self._slots.items():
            for slot in slots.values():
                copies[slot] = Variable.over(_beside(slot.value, variable), slot.device, slot.name, trainable=False)
        if self._iterations is not None:
            copies[self._iterations] = new._iterations = self._iterations.__deepcopy__(memo)
        memo.update({id(slot): copy for slot, copy in copies.items()})
        new.weights = [copies[slot] for slot in self.weights]
        new.names = list(self.names)
        new._slots = {
            variable: {name: copies[slot] for name, slot in slots.items()} for variable, slots in self._slots.items()
        }
        return new

    @contextmanager
    def undone_if_raised(self) -> Iterator[None]:
        """Whatever the block creates is gone again if it raises."""
        weights, names, iterations = list(self.weights), list(self.names), self._iterations
        slots = {variable: dict(named) for variable, named in self._slots.items()}
        try:
            yield
        except BaseException:
            self.weights[:], self.names[:], self._iterations, self._slots = weights, names, iterations, slots
            raise


def _beside(values: Any, variable: Variable) -> Any:
    """A copy of `values` as far from a 16-byte boundary as the variable."""
    device = variable.device
    array = device.zeros(tuple(values.shape), values.dtype, like=variable.value)
    with device.current():
        array[...] = values
    return array


def initialized(initializer: Any, shape: tuple[int, ...], dtype: np.dtype, device: Device | str | None) -> Any:
    """The array that an initializer makes: "zeros", "ones", a callable(shape=, dtype=), or the value itself."""
    device = find_device(device)
    if isinstance(initializer, str):
        if initializer not in _FILLS:
            raise ArgumentValueError(
                "initializer",
                f"must be one of {list(_FILLS)}",
                f"unknown initializer {initializer!r}",
                "pass a callable",
            )
        array = device.zeros(shape, dtype)
        with device.current():
            array.fill(_FILLS[initializer])
        return array
    if initializer is None:
        raise ArgumentValueError(
            "initializer", "must make an array", None, "pass 'zeros', 'ones', a callable or a value"
        )
    value = initializer(shape=shape, dtype=dtype) if callable(initializer) else initializer
    value = value.value if isinstance(value, Variable) else value
    try:
        return device.array(value, dtype)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError("initializer", "must give numbers", error, "pass 'zeros', or an array") from error
