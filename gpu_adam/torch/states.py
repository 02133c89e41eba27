"""What `optimizer.state` shows: torch's tensors over the memory of slots, and counts of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gpu_adam.autodiff.torch import view
from gpu_adam.devices.native_tensors import Contents, is_available
from gpu_adam.errors import ArgumentValueError
from gpu_adam.interop.torch import SLOTS
from gpu_adam.state.adam_state import AdamState
from gpu_adam.torch.groups import Group

_NOTHING: tuple[None, dict[str, Any], dict[str, Any]] = None, {}, {}


def has_moments(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of `optimizer.state` holds what slots hold."""
    return "exp_avg" in entry and "exp_avg_sq" in entry


class States:
    """The entries of `optimizer.state` that show slots.

    Args:
        state: has the slots.
    """

    def __init__(self, state: AdamState) -> None:
        self._state = state
        # By the id of each parameter, with the arrays of its slots that the tensors show.
        self._shown: dict[int, tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]] = {}
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
        _, shown, _ = self._shown.get(id(param), _NOTHING)
        return any(entry[name] is not shown.get(name) for name in SLOTS if name in entry)

    def forgotten(self, entries: Mapping[Any, Any]) -> list[Any]:
        """Parameters of which slots were shown, and that have no moments any more; they are shown no more."""
        gone = [param for param, *_ in self._shown.values() if not has_moments(entries.get(param, {}))]
        for param in gone:
            del self._shown[id(param)]
        return gone

    def read(self, param: Any, entry: Mapping[str, Any]) -> None:
        """Copy the moments that an entry holds into the slots of its parameter."""
        for name, slot in self._slots(param).items():
            if name in entry:
                view(slot).copy_(entry[name])

    def show(self, group: Group, entries: Any) -> None:
        """Let the entries of those of a group's parameters that have slots show these, and the counts of steps."""
        for param, step in zip(group.params, group.steps, strict=True):
            slots = self._slots(param)
            if not slots:
                continue
            _, old, kept = self._shown.get(id(param), _NOTHING)
            arrays = {name: slot._value for name, slot in slots.items()}
            shown = {"step": step}
            for name, array in arrays.items():
                shown[name] = old[name] if kept.get(name) is array else view(slots[name])
            self._shown[id(param)] = param, shown, arrays
            entries.setdefault(param, {}).update(shown)

    def _slots(self, param: Any) -> dict[str, Any]:
        variable, slots = self._state.registry.known(param), self._state.slots
        if variable is None:
            return {}
        return {name: slots[slot][variable] for name, slot in SLOTS.items() if variable in slots.get(slot, ())}


def check_shapes(param: Any, entry: Mapping[str, Any]) -> None:
    """Raise ArgumentValueError where an entry's moments have not the shape of its parameter."""
    for name in SLOTS:
        if name in entry and entry[name].shape != param.shape:
            rule, got = f"must have the parameter's shape {tuple(param.shape)}", tuple(entry[name].shape)
            raise ArgumentValueError(f"state[p][{name!r}]", rule, got, "load the state of the same parameters")
