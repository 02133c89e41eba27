"""Which variable an object stands for: a Variable for itself, a raw array for the memory that it shows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from gpu_adam.devices import device_of, view_of
from gpu_adam.devices.placement import Placement, has_all_its_memory, placement_of
from gpu_adam.devices.torch_tensors import writeable
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.variables import Variable


class Entry(NamedTuple):
    """A raw array that was passed as a variable.

    Attributes:
        obj: the object, kept alive so that its id stays its own.
        variable: the variable that it stands for.
        placement: where the object's memory lay when it was last looked at.
    """

    obj: Any
    variable: Variable
    placement: Placement

    @property
    def is_current(self) -> bool:
        """Whether the object's memory is where it was."""
        return _placement(self.obj) == self.placement


class News:
    """What a call has brought that the registry does not know yet: nothing of it is kept unless it is adopted.

    Attributes:
        variables: new Variables, by id.
        entries: new raw arrays, and known ones whose memory has moved, by the object's id.
        moved: for each variable whose memory has moved, its new array.
    """

    def __init__(self) -> None:
        self.variables: dict[int, Variable] = {}
        self.entries: dict[int, Entry] = {}
        self.moved: dict[Variable, Any] = {}
        self._by_memory: dict[Any, Entry] = {}
        self._variables_by_memory: dict[Any, Variable] = {}
        self._looked_at = 0  # so many of the Variables are in the table before

    def __bool__(self) -> bool:
        return bool(self.variables or self.entries)

    def _variable_at(self, key: Any) -> Variable | None:
        """The new Variable with that memory."""
        for variable in itertools.islice(self.variables.values(), self._looked_at, None):
            self._variables_by_memory.setdefault(_memory_key(variable), variable)
        self._looked_at = len(self.variables)
        return self._variables_by_memory.get(key)

    def _add(self, entry: Entry, key: Any) -> None:
        self.entries[id(entry.obj)] = self._by_memory[key] = entry


class Registry:
    """The variables that an optimizer has met. A raw array is recognised again by its memory."""

    def __init__(self) -> None:
        self._variables: dict[int, Variable] = {}
        self._entries: dict[int, Entry] = {}
        self._by_memory: dict[Any, Entry] = {}
        # Of Variables, whose memory never moves. Made when a raw array asks, for most models have one kind alone.
        self._variables_by_memory: dict[Any, Variable] | None = None

    def find(self, obj: Any, argument: str, news: News) -> Variable:
        """The variable for `obj`: itself, or one over a raw array's memory. What is new is noted in `news`.

        Raises:
            ArgumentTypeError: no variable, and no array of a device.
            ArgumentValueError: an array that cannot be updated in place; one whose shape or dtype has changed.
            ServiceError: a variable of a service.
        """
        if isinstance(obj, Variable):
            return self._find_variable(obj, news)
        entry = news.entries.get(id(obj)) or self._entries.get(id(obj))
        if entry is not None:
            return entry.variable if entry.is_current else self._moved(entry, argument, news)
        variable = over_raw_array(obj, argument)
        key = _memory_key(variable)
        known = self._raw_at(key, news)
        if known is None:
            known = self._variable_at(key, news)
        # Another object over the same memory is not kept: a new view in every step would pile up.
        if known is not None:
            return known
        news._add(Entry(obj, variable, _placement(obj)), key)
        return variable

    def _find_variable(self, variable: Variable, news: News) -> Variable:
        if id(variable) in self._variables or id(variable) in news.variables:
            return variable
        if self._entries or news.entries:
            known = self._raw_at(_memory_key(variable), news)
            if known is not None:
                return known
        variable._check_updatable()
        news.variables[id(variable)] = variable
        return variable

    def _raw_at(self, key: Any, news: News) -> Variable | None:
        """The variable of a raw array that has that memory still: the place of one that moved may be another's."""
        entry = news._by_memory.get(key) or self._by_memory.get(key)
        return entry.variable if entry is not None and entry.is_current else None

    def _variable_at(self, key: Any, news: News) -> Variable | None:
        """The Variable with that memory."""
        if self._variables_by_memory is None:
            self._variables_by_memory = {_memory_key(variable): variable for variable in self._variables.values()}
        known = self._variables_by_memory.get(key)
        return news._variable_at(key) if known is None else known

    def _moved(self, entry: Entry, argument: str, news: News) -> Variable:
        variable, old = entry.variable, entry.placement
        fresh = over_raw_array(entry.obj, argument)
        new = _placement(entry.obj)
        if (new.shape, new.dtype) != (old.shape, old.dtype) or fresh.device is not variable.device:
            raise ArgumentValueError(
                argument,
                f"must keep the shape {old.shape} and dtype {old.dtype} that its slots have",
                f"shape {new.shape}, dtype {new.dtype} on {fresh.device.name}",
                "call forget(variable) first, or replace(old, new) with another array",
            )
        news._add(Entry(entry.obj, variable, new), _memory_key(fresh))
        news.moved[variable] = fresh._storage
        return variable

    def known(self, obj: Any) -> Variable | None:
        """The variable of an object that was met before, wherever its memory lies now; None for others."""
        entry = self._entries.get(id(obj))
        return self._variables.get(id(obj)) if entry is None else entry.variable

    def arrays(self, variables: Iterable[Variable] | None = None) -> list[Any]:
        """The raw arrays that were met; only those that stand for some variables, where these are given."""
        wanted = None if variables is None else set(variables)
        return [entry.obj for entry in self._entries.values() if wanted is None or entry.variable in wanted]

    def objects(self, variables: Iterable[Variable]) -> list[Any]:
        """For each variable the raw array that it stands for, or the variable itself."""
        arrays = {entry.variable: entry.obj for entry in self._entries.values()}
        return [arrays.get(variable, variable) for variable in variables]

    def placement(self, obj: Any) -> Placement:
        """Where the memory of a raw array lies."""
        entry = self._entries.get(id(obj))
        return _placement(obj) if entry is None else entry.placement

    # For the state's transactions alone.

    def adopt(self, news: News) -> None:
        """Keep what is new."""
        moved = set(news.moved)
        if moved:
            self._by_memory = {key: entry for key, entry in self._by_memory.items() if entry.variable not in moved}
        if news.variables:
            self._variables_by_memory = None
        self._variables.update(news.variables)
        self._entries.update(news.entries)
        self._by_memory.update(news._by_memory)

    def drop(self, variable: Variable) -> None:
        """Forget every object that stands for a variable."""
        self._variables.pop(id(variable), None)
        self._variables_by_memory = None
        self._entries = {key: entry for key, entry in self._entries.items() if entry.variable is not variable}
        self._by_memory = {key: entry for key, entry in self._by_memory.items() if entry.variable is not variable}

    def tables(self) -> dict[str, Any]:
        """Copies of the tables, by attribute."""
        return {
            "_variables": dict(self._variables),
            "_entries": dict(self._entries),
            "_by_memory": dict(self._by_memory),
            "_variables_by_memory": None,
        }

    def __getstate__(self) -> tuple[list[Variable], list[Entry]]:
        return list(self._variables.values()), list(self._entries.values())

    def __setstate__(self, state: tuple[list[Variable], list[Entry]]) -> None:
        variables, entries = state
        self._variables = {id(variable): variable for variable in variables}
        self._entries, self._by_memory, self._variables_by_memory = {}, {}, None
        for obj, variable, old in entries:
            # The object was copied apart from its variable, whose array may be a view: they share memory again. Where
            # its shape or dtype had changed since the last step, the old placement stays, and the next step refuses it.
            new = _placement(obj)
            if (new.shape, new.dtype) == (old.shape, old.dtype):
                variable._move_to(variable.device.view(writeable(obj, "a raw variable")))
                entry = Entry(obj, variable, new)
            else:
                entry = Entry(obj, variable, old._replace(address=-1))
            self._entries[id(obj)] = self._by_memory[_memory_key(variable)] = entry


def _placement(obj: Any) -> Placement:
    """Where the memory of a raw array lies; of an object that speaks nothing but DLPack a view tells."""
    placement = placement_of(obj)
    if placement is None:
        device = device_of(obj)
        placement = placement_of(device.view(obj)) if device is not None else None
    assert placement is not None, "an object that was a variable is no array any more"
    return placement


def _memory_key(variable: Variable) -> Any:
    if variable.size == 0:
        return id(variable)
    return variable.device, variable.device.address(variable._storage), variable.shape, variable.dtype


def over_raw_array(obj: Any, argument: str) -> Variable:
    """A variable over the memory of a raw array: NumPy, CuPy, or what speaks DLPack or an array interface.

    Raises:
        ArgumentTypeError, ArgumentValueError: no array that can be updated in place.
    """
    obj = writeable(obj, argument)
    device = None if isinstance(obj, np.generic) else device_of(obj)
    if device is None:
        raise ArgumentTypeError(
            argument,
            "must be a Variable or a writeable device array",
            type(obj).__name__,
            "wrap the value in gpu_adam.Variable",
        )
    if not has_all_its_memory(obj):
        raise ArgumentValueError(
            argument, "must have memory for all its elements", "a storage that was resized", "resize the storage back"
        )
    array = view_of(obj, device, argument)
    if array is not None and hasattr(obj, "detach"):
        # torch's own view is of the tensor, whose `data` can be exchanged, and frees the memory then.
        array = view_of(obj.detach(), device, argument)
    if array is None:
        raise ArgumentTypeError(
            argument, f"must lie on {device.name}", type(obj).__name__, "wrap it in gpu_adam.Variable"
        )
    flags = array.flags
    if not flags.c_contiguous:
        raise ArgumentValueError(
            argument, "must be C-contiguous", f"strides {array.strides}", "pass a contiguous array"
        )
    if not array.dtype.isnative:
        raise ArgumentValueError(argument, "must have the machine's byte order", array.dtype.str, "use astype")
    if array.size and device.address(array) % array.dtype.itemsize:
        rule = f"must begin at a multiple of {array.dtype.itemsize} bytes"
        raise ArgumentValueError(argument, rule, hex(device.address(array)), "wrap a copy in gpu_adam.Variable")
    if device.xp is np and not flags.writeable:
        raise ArgumentValueError(
            argument, "must be writeable", "a read-only array", "pass a writeable array, or a Variable"
        )
    return Variable.over(array, device)
