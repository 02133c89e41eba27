"""What `optimizer.state` shows: torch's tensors over the memory of slots, and counts of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from gpu_adam.autodiff.torch import view
from gpu_adam.devices.native_tensors import Contents, is_available
from gpu_adam.errors import ArgumentValueError
from gpu_adam.interop.torch import SLOTS
from gpu_adam.state.adam_state import AdamState
from gpu_adam.torch.groups import Group
from gpu_adam.torch.orders import Orders, shown


class Shown(NamedTuple):
    """What an entry shows.

    Attributes:
        param: whose entry it is.
        target: what is updated in its place.
        tensors: by torch's names.
        arrays: of the slots, by the same names.
    """

    param: Any
    target: Any
    tensors: dict[str, torch.Tensor]
    arrays: dict[str, Any]


_NOTHING = Shown(None, None, {}, {})


def has_moments(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of `optimizer.state` holds what slots hold."""
    return "exp_avg" in entry and "exp_avg_sq" in entry


class States:
    """The entries of `optimizer.state` that show slots.

    Args:
        state: has the slots.
        orders: knows what is updated in place of each parameter.
    """

    def __init__(self, state: AdamState, orders: Orders) -> None:
        self._state, self._orders = state, orders
        self._shown: dict[int, Shown] = {}  # by the id of each parameter
        self._entries: Any = None
        self._seen = Contents({}, at_once=False)

    def are_seen(self, entries: Mapping[Any, Any]) -> bool:
        """Whether the entries are as `see` left them, with the same tensors."""
        return entries is self._entries and self._seen.are_in(entries)

    def see(self, entries: Mapping[Any, Any]) -> None:
        """Note the entries as they are."""
        self._entries, self._seen = entries, Contents(entries, at_once=is_available(torch))

    def is_foreign(self, param: Any, entry: Mapping[str, Any]) -> bool:
        """Whether an entry with moments holds other tensors than those that show its parameter's slots."""
        tensors = self._shown.get(id(param), _NOTHING).tensors
        return any(entry[name] is not tensors.get(name) for name in SLOTS if name in entry)

    def forgotten(self, entries: Mapping[Any, Any]) -> list[Any]:
        """What was updated in place of parameters that have no moments any more, or now lie in another order.

        Their slots are shown no more.
        """
        gone = [
            each
            for each in self._shown.values()
            if each.target is not self._orders.target(each.param) or not has_moments(entries.get(each.param, {}))
        ]
        for each in gone:
            del self._shown[id(each.param)]
        return [each.target for each in gone]

    def read(self, param: Any, entry: Mapping[str, Any]) -> None:
        """Copy the moments that an entry holds into the slots of its parameter."""
        for name, slot in self._slots(param).items():
            if name in entry:
                shown(param, view(slot)).copy_(entry[name])

    def show(self, group: Group, entries: Any) -> None:
        """Let the entries of those of a group's parameters that have slots show these, and the counts of steps."""
        for param, step in zip(group.params, group.steps, strict=True):
            slots = self._slots(param)
            if not slots:
                continue
            known = self._shown.get(id(param), _NOTHING)
            arrays = {name: slot._storage for name, slot in slots.items()}
            tensors = {"step": step}
            for name, array in arrays.items():
                is_kept = known.arrays.get(name) is array
                tensors[name] = known.tensors[name] if is_kept else shown(param, view(slots[name]))
            self._shown[id(param)] = Shown(param, self._orders.target(param), tensors, arrays)
            entries.setdefault(param, {}).update(tensors)

    def _slots(self, param: Any) -> dict[str, Any]:
        variable, slots = self._state.registry.known(self._orders.target(param)), self._state.slots
        if variable is None:
            return {}
        return {name: slots[slot][variable] for name, slot in SLOTS.items() if variable in slots.get(slot, ())}


def check_shapes(param: Any, entry: Mapping[str, Any]) -> None:
    """Raise ArgumentValueError where an entry's moments have not the shape of its parameter."""
    for name in SLOTS:
        if name in entry and entry[name].shape != param.shape:
            rule, got = f"must have the parameter's shape {tuple(param.shape)}", tuple(entry[name].shape)
            raise ArgumentValueError(f"state[p][{name!r}]", rule, got, "load the state of the same parameters")
