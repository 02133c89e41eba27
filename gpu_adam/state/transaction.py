"""Changes of an optimizer's state, made as a whole or not at all. Nothing else changes the state."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from gpu_adam.devices import Array, Device
from gpu_adam.errors import ArgumentValueError
from gpu_adam.hyperparameters import AnySettings, Settings
from gpu_adam.kernels import SLOT_SPECS, UpdateRule, slot_spec, slots_of
from gpu_adam.state.adam_state import GOOD_STEPS, SCALE, VALUE, AdamState
from gpu_adam.state.registry import News
from gpu_adam.state.slots import beside, initialized, is_beside
from gpu_adam.uninterrupted import Call, make_all
from gpu_adam.variables import Variable


class Transaction:
    """Changes of a state that are made as a whole or not at all.

    Nothing is copied until something changes, so that a step with known variables pays nothing.

    ::

        with Transaction(state) as change:
            change.adopt(news)
            make_all([..., *change.commit])

    Args:
        state: what changes.

    Attributes:
        commit: calls after which the changes stay, even where the block raises later: to be made with what cannot be
            undone, once all changes are made. A block that ends without error needs none.
    """

    __slots__ = ("_before", "_committed", "_state", "commit")

    def __init__(self, state: AdamState) -> None:
        self._state = state
        self._before: list[Call] = []
        self._committed: Sequence[bool] = ()
        self.commit: Sequence[Call] = ()

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._before:
            if kind is not None and not self._committed:
                make_all(reversed(self._before))
            self._state.forget_names()

    def _remember(self) -> None:
        """Note how to go back, before the first change."""
        if not self._before:
            state = self._state
            state.forget_names()
            self._committed = committed = list[bool]()
            self.commit = (partial(committed.append, True),)
            tables = {name: dict(owned) for name, owned in state.slots.items()}
            replace_items = [(a_list, list(a_list)) for a_list in (state.weights, state.names)]
            attributes = [
                (state, "slots", tables),
                (state, "counter", state.counter),
                (state, "own", dict(state.own)),
                (state, "index_errors", dict(state.index_errors)),
                (state, "settings", dict(state.settings)),
                (state, "settings_decay", state.settings_decay),
                (state, "never_decayed", state.never_decayed),
                (state, "never_decayed_names", state.never_decayed_names),
                *((state.registry, name, table) for name, table in state.registry.tables().items()),
            ]
            self._before = [
                *(partial(operator.setitem, a_list, slice(None), items) for a_list, items in replace_items),
                *(partial(setattr, *attribute) for attribute in attributes),
            ]

    def guard(self) -> None:
        """Let an error undo also what other transactions change within the block."""
        self._remember()

    def _move(self, variable: Variable, array: Array) -> None:
        self._before.append(partial(variable._move_to, variable._storage))
        variable._move_to(array)
        self._state.layout = object()

    def ensure_counter(self) -> Variable:
        """The counter of steps done, which is one of the weights from now on."""
        state = self._state
        if not state.counts:
            self._remember()
            state.weights.append(state.counter)
        return state.counter

    def ensure_loss_scale(self, device: Device, initial: float) -> Variable:
        """Create the numbers of a loss scale where they do not exist: the scale, and the good steps since it changed.

        Args:
            device: where they are to lie.
            initial: the scale.

        Returns:
            The scale.

        Raises:
            ArgumentValueError: they lie on another device.
        """
        state = self._state
        found = state.own.get(SCALE)
        if found is None:
            self._remember()
            for name, value in ((SCALE, np.float32(initial)), (GOOD_STEPS, np.int64(0))):
                array = device.array(value)
                state.own[name] = variable = Variable.over(array, device, f"{state.name}/{name}", trainable=False)
                state.weights.append(variable)
        elif found.device is not device:
            raise ArgumentValueError(
                "the variables of an optimizer with a loss_scale",
                f"must lie on {found.device}, as the scale does",
                device,
                "call build(variables) before loss_scale is read, or make an optimizer for each device",
            )
        return state.own[SCALE]

    def set_counter(self, counter: Variable) -> None:
        """Count in this variable, where the counter is none of the weights yet."""
        self._remember()
        self._state.counter = counter
        self._state.weights.append(counter)

    def note(self, index_errors: Mapping[Variable, Any], deferred: Mapping[Variable, Any]) -> None:
        """Keep where the kernels note rows out of range of variables, and what rows miss from now on."""
        state = self._state
        if index_errors and index_errors.keys() - state.index_errors.keys():
            self._remember()
            state.index_errors.update(index_errors)
        if deferred and deferred.keys() - state.deferred.keys():
            self._remember()
            for variable in deferred.keys() - state.deferred.keys():
                self._before.append(partial(self._let_go, variable))
                state.claim(variable)
            state.deferred.update(deferred)
            state.link_deferred()

    def adopt(self, news: News) -> None:
        """Register new variables, and follow the memory of known ones; their slots are placed beside it anew."""
        if not news:
            return
        self._remember()
        self._state.registry.adopt(news)
        for variable, array in news.moved.items():
            self._move(variable, array)
        for variable in news.moved:
            for owned in self._state.slots.values():
                slot = owned.get(variable)
                if slot is not None and not is_beside(slot, variable):
                    self._move(slot, beside(slot._storage, variable))

    def ensure_slots(self, variables: Sequence[Variable], rule: UpdateRule) -> None:
        """Create the slots of an update that are missing, zero, slot name by slot name."""
        state = self._state
        kinds: dict[tuple[Device, np.dtype], list[Variable]] = {}
        for variable in dict.fromkeys(variables):
            kinds.setdefault((variable.device, variable.dtype), []).append(variable)
        for spec in SLOT_SPECS:
            owned = state.slots.get(spec.name, {})
            arrays: dict[Variable, Array] = {}
            for (device, variable_dtype), same in kinds.items():
                if spec not in slots_of(rule, variable_dtype.name):
                    continue
                missing = [variable for variable in same if variable not in owned]
                if not missing:
                    continue
                self._remember()
                dtype = spec.dtype(variable_dtype, state.complex_mode, state.slot_dtype)
                made = device.zeros_beside([variable._storage for variable in missing], dtype)
                if spec.begins_at_variable:
                    make_all([device.copy_call(made, [variable._value for variable in missing])])
                arrays.update(zip(missing, made, strict=True))
            if arrays:
                in_order = [variable for variable in dict.fromkeys(variables) if variable in arrays]
                self._add(in_order, spec.name, [arrays[variable] for variable in in_order])
        if rule.master:
            state.link_masters()
        if state.deferred:
            state.link_deferred()

    def add_slot(self, variable: Variable, name: str, initializer: Any, shape: tuple[int, ...] | None) -> Variable:
        """A slot of this shape, or the variable's, with values from an initializer; where the slot exists, as it is."""
        state = self._state
        if state.has_slot(variable, name):
            return state.slot(variable, name)
        if name == VALUE or "/" in name:
            rule = f"must not be {VALUE!r} or have a '/' in it, for it ends the names of arrays in files"
            raise ArgumentValueError("slot_name", rule, repr(name), "choose another name")
        spec = slot_spec(name)
        dtype = variable.dtype if spec is None else spec.dtype(variable.dtype, state.complex_mode, state.slot_dtype)
        array = beside(
            initialized(initializer, variable.shape if shape is None else shape, dtype, variable.device), variable
        )
        if spec is not None and tuple(array.shape) != variable.shape:
            raise ArgumentValueError(
                f"initializer of slot {name!r} for variable {variable.name!r}",
                f"must give the variable's shape {variable.shape}",
                tuple(array.shape),
                "pass 'zeros', or an array of that shape",
            )
        self._remember()
        self._add([variable], name, [array])
        return state.slot(variable, name)

    def _add(self, variables: Sequence[Variable], name: str, arrays: Sequence[Array]) -> None:
        state = self._state
        slots = [
            Variable.over(array, variable.device, f"{state.name}/{variable.name}/{name}", trainable=False)
            for variable, array in zip(variables, arrays, strict=True)
        ]
        state.slots.setdefault(name, {}).update(zip(variables, slots, strict=True))
        state.weights += slots
        if name not in state.names:
            state.names.append(name)

    def set_settings(self, settings: Mapping[Variable, AnySettings]) -> None:
        """Let the updates of variables take other numbers than the optimizer's."""
        self._remember()
        state = self._state
        state.settings.update(settings)
        self._note_decay()
        state.layout = object()

    def _note_decay(self) -> None:
        settings = self._state.settings.values()
        self._state.settings_decay = any(isinstance(each, Settings) and each.weight_decay for each in settings)

    def never_decay(self, variables: Sequence[Variable], patterns: Sequence[str]) -> None:
        """Let the weights of variables, and of those whose names match one of these patterns, not decay."""
        self._remember()
        state = self._state
        state.never_decayed = state.never_decayed.union(variables)
        state.never_decayed_names = tuple(dict.fromkeys([*state.never_decayed_names, *patterns]))
        state.layout = object()

    def forget(self, variable: Variable) -> None:
        """Drop the slots of a variable, and what stands for it."""
        self._remember()
        state = self._state
        dropped = {id(owned.pop(variable)) for owned in state.slots.values() if variable in owned}
        state.weights[:] = [weight for weight in state.weights if id(weight) not in dropped]
        state.index_errors.pop(variable, None)
        self._end_deferral(variable)
        state.settings.pop(variable, None)
        self._note_decay()
        state.never_decayed -= {variable}
        state.registry.drop(variable)
        state.layout = object()

    def _end_deferral(self, variable: Variable) -> None:
        """Have all rows up to date, and nobody behind them."""
        rows = self._state.deferred.pop(variable, None)
        if rows is not None:
            rows.settle()
            self._before.append(partial(setattr, variable, "_behind", rows))
            self._before.append(partial(operator.setitem, self._state.deferred, variable, rows))
            variable._behind = None

    def _let_go(self, variable: Variable) -> None:
        """Forget rows that have missed nothing yet."""
        self._state.deferred.pop(variable, None)
        variable._behind = None

    def replace(self, old: Variable, new: Variable, arrays: Mapping[str, Array]) -> None:
        """Give `new` slots with these values in place of the slots of `old`; the places among the weights stay.

        Args:
            old: a variable with slots.
            new: a variable without.
            arrays: the values of each slot of `old`.
        """
        self._remember()
        state = self._state
        successors: dict[int, Variable] = {}
        for name, array in arrays.items():
            title = f"{state.name}/{new.name}/{name}"
            slot = Variable.over(beside(array, new), new.device, title, trainable=False)
            owned = state.slots[name]
            successors[id(owned[old])] = slot
            state.slots[name] = {
                new if owner is old else owner: slot if owner is old else own for owner, own in owned.items()
            }
        state.weights[:] = [successors.get(id(weight), weight) for weight in state.weights]
        state.index_errors.pop(old, None)
        self._end_deferral(old)
        if old in state.settings:
            state.settings[new] = state.settings.pop(old)
        if old in state.never_decayed:
            state.never_decayed = state.never_decayed - {old} | {new}
        if old._has_master:
            state.link_masters()
        state.registry.drop(old)
        state.layout = object()
