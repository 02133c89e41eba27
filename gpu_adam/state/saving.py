"""What a file of an optimizer holds: its state by name, and its variables where they are asked for.

Arrays have the names of `AdamState.named`. The note says what belongs to them:

    {"kind": "Adam", "config": {...}, "groups": {"w": {"weight_decay": 0.1}}, "never_decayed": ["b"],
     "never_decayed_names": ["bias$"], "user": {"epoch": 3}}

`config` has every argument of the constructor, defaults too, for a later version may have others. `user` is what the
caller of `Adam.save` adds, and is left out where that is nothing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, TypeVar

import numpy as np

from gpu_adam.devices import Array, Device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, CheckpointError
from gpu_adam.hyperparameters import OWN_SETTINGS, Flavour, Settings
from gpu_adam.kernels import COMPLEX_MODES
from gpu_adam.state import checkpoint, manifest
from gpu_adam.state.adam_state import COUNTER, VALUE, AdamState, unique_names
from gpu_adam.state.atomic_file import PathOrFile
from gpu_adam.uninterrupted import Call
from gpu_adam.variables import Variable

Contents = tuple[dict[str, np.ndarray], dict[str, Any]]
"""The arrays of a file by name, and its note."""

T = TypeVar("T")

OWN = "pass its own checkpoint, or build(variables) with the same variables first"


def note_of(
    state: AdamState, flavour: Flavour, config: Mapping[str, Any], user: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The note of an optimizer's file.

    Args:
        state: of the optimizer.
        flavour: of the optimizer.
        config: its other arguments, at least.
        user: what the note holds besides, copied.

    Raises:
        ArgumentTypeError: a `user` that JSON cannot hold.
    """
    names = state.variable_names()
    scale = None if flavour.loss_scale is None else flavour.loss_scale.config()
    return {
        "kind": "Adam",
        "config": {"complex_mode": state.complex_mode, **flavour._asdict(), "loss_scale": scale, **config},
        "groups": {
            names[variable]: {name: number for name, number in settings._asdict().items() if number is not None}
            for variable, settings in state.settings.items()
            if isinstance(settings, Settings) and settings != OWN_SETTINGS
        },
        "never_decayed": [name for variable, name in names.items() if variable in state.never_decayed],
        "never_decayed_names": list(state.never_decayed_names),
        **({} if user is None else {"user": manifest.as_read("user", user)}),
    }


def writing(
    path: PathOrFile, state: AdamState, note: Mapping[str, Any], *, variables: bool, lasting: bool
) -> Callable[[], None]:
    """A function that writes the present state to a file.

    Args:
        path: the file.
        state: of the optimizer.
        note: of the file.
        variables: whether the file is to have the variables.
        lasting: whether the state may change before the function is called.

    Raises:
        ArgumentTypeError, ArgumentValueError: what the file cannot hold.
    """
    path = lasting_path(path)
    named = state.named(variables=variables)
    checkpoint.check(path, named)
    read = reading(named, lasting=lasting)
    return lambda: checkpoint.write(path, read(), note)


def lasting_path(path: PathOrFile) -> PathOrFile:
    """The same file for a thread that writes it later, when the working directory may be another one."""
    return os.path.abspath(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else path


def reading(named: Mapping[str, Variable], *, lasting: bool) -> Callable[[], dict[str, np.ndarray]]:
    """A function that gives the present contents of variables by name, in host memory.

    Args:
        named: the variables.
        lasting: whether they may change before the function is called.
    """
    by_device: dict[Device, dict[str, Array]] = {}
    for name, variable in named.items():
        by_device.setdefault(variable.device, {})[name] = variable.value
    snapshots = [
        (list(arrays), device.snapshot(list(arrays.values()), lasting=lasting)) for device, arrays in by_device.items()
    ]

    def read() -> dict[str, np.ndarray]:
        found = {
            name: array for names, snapshot in snapshots for name, array in zip(names, snapshot.read(), strict=True)
        }
        return found if len(snapshots) == 1 else {name: found[name] for name in named}

    return read


def updated(title: str, contents: Contents) -> Contents:
    """What an optimizer's file of any version holds by today's names; the contents of other files as they are.

    Raises:
        CheckpointError: the names of version 1 do not fit the arrays.
    """
    arrays, note = contents
    config = note.get("config")
    if note.get("kind") != "Adam" or "names" not in note or not isinstance(config, Mapping):
        return contents
    arrays = _of_version_1(title, arrays, note["names"], f"{config.get('name')}/")
    return arrays, {key: value for key, value in note.items() if key != "names"}


def restoring(
    title: str, state: AdamState, contents: Contents, *, variables: bool, also: Sequence[Call] = ()
) -> Callable[[], None]:
    """A function that overwrites a state by what a file holds. Until it is called nothing changes.

    Args:
        title: the file's name, for messages.
        state: of the optimizer.
        contents: of the file.
        variables: whether the file must have the variables, which are then overwritten too.
        also: calls to be made with the copies; they may be made twice.

    Raises:
        CheckpointError: the file does not fit, and why.
    """
    arrays, note = updated(title, contents)
    check_note(title, state, note)
    named = state.named(variables=variables)
    fits = fitting(title, state, arrays, named.keys(), variables=variables)
    try:
        return state.restoring(fits, from_file=True, named=named, also=also)
    except (ArgumentTypeError, ArgumentValueError) as error:
        raise CheckpointError(f"{error.argument!r} in {title}", error.rule, error.got, OWN) from error


def check_note(title: str, state: AdamState, note: Mapping[str, Any]) -> None:
    """Raise CheckpointError for the note of a file that is none of an optimizer, or of one with another complex_mode.

    Args:
        title: the file's name, for messages.
        state: of the optimizer that loads.
        note: of the file.
    """
    if note.get("kind") != "Adam":
        raise CheckpointError(title, "must be written by Adam.save", note.get("kind"), "pass another file")
    config = note.get("config")
    if not isinstance(config, Mapping):
        raise CheckpointError(title, "must hold a configuration", type(config).__name__, "pass an older copy")
    mode = config.get("complex_mode", COMPLEX_MODES[0])
    if mode != state.complex_mode:
        rule = f"must come from an optimizer with complex_mode={state.complex_mode!r}"
        raise CheckpointError(title, rule, repr(mode), "construct the optimizer with the file's complex_mode")


def fitting(
    title: str, state: AdamState, arrays: Mapping[str, T], named: Set[str], *, variables: bool
) -> Mapping[str, T]:
    """What a file holds of a state, by name.

    Args:
        title: the file's name, for messages.
        state: of the optimizer that loads.
        arrays: all that the file holds.
        named: the names of what it must hold.
        variables: whether these are among them; otherwise those of the file are left out.

    Raises:
        CheckpointError: something is missing, or left over.
    """
    fits = list(arrays) == list(named) or arrays.keys() == named  # mostly they are in order, which is sooner seen
    if not fits and not variables:
        arrays = {name: array for name, array in arrays.items() if not name.endswith(f"/{VALUE}")}
        fits = arrays.keys() == named
    if not fits:
        missing = [name for name in named if name not in arrays]
        left = [name for name in arrays if name not in named]
        got = " and ".join([*_listed("nothing for", missing), *_listed("also", left)])
        raise CheckpointError(title, f"must hold the {len(named)} arrays of optimizer {state.name!r}", got, OWN)
    return arrays


def _listed(words: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(map(repr, names[:3]))
    return [f"{words} {shown}" if len(names) <= 3 else f"{words} {shown} and {len(names) - 3} more"]


def _of_version_1(title: str, arrays: Mapping[str, np.ndarray], names: Any, prefix: str) -> dict[str, np.ndarray]:
    """Arrays by today's names: version 1 has numbers, and a list of the slots' names, which begin with the optimizer's.

    In that list a variable's name comes as often as there are variables of that name.
    """
    keys = [f"weights/{number}" for number in range(len(arrays))]
    if not isinstance(names, list) or len(names) != len(keys) or not all(type(name) is str for name in names):
        raise CheckpointError(title, f"must hold a list of {len(keys)} names", type(names).__name__, OWN)
    if arrays.keys() != set(keys):
        got = ", ".join(sorted(arrays.keys() - set(keys))[:3])
        raise CheckpointError(title, f"must hold {len(keys)} weights by number", got, OWN)
    seen: Counter[str] = Counter()
    places = []  # of each weight: the variable's name, its number among those of that name, and the slot's name
    for name in names:
        # A counter of the user's has a name of the user's.
        variable, _, slot = name.removeprefix(prefix).rpartition("/") if name.startswith(prefix) else ("", "", "iter")
        places.append((variable, seen[name], slot))
        seen[name] += 1
    variables = list(dict.fromkeys((variable, number) for variable, number, slot in places if variable))
    unique = dict(zip(variables, unique_names([variable for variable, _ in variables]), strict=True))
    return {
        f"{unique[variable, number]}/{slot}" if variable else COUNTER if slot == "iter" else slot: arrays[key]
        for key, (variable, number, slot) in zip(keys, places, strict=True)
    }
