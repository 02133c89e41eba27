"""What an optimizer remembers between steps: its name, the counter, the slots and the variables that it has met.

A `Transaction` (transaction.py) makes all changes of what there is, as a whole or not at all. Whoever reads or writes
the values of all weights (`get_weights`, `set_weights`, files) does so by name, through `export` and `restore`.
"""

from __future__ import annotations

import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpu_adam.devices import Array, Device
from gpu_adam.errors import ArgumentValueError, SlotNotFoundError
from gpu_adam.hyperparameters import OWN_SETTINGS, REPLAYS, SPARSE_UPDATES, AnySettings, Cohort
from gpu_adam.kernels import UpdateRule, slots_of
from gpu_adam.loss_scale import check_scale
from gpu_adam.state.counter import checked_count
from gpu_adam.state.door import Door
from gpu_adam.state.pending_save import PendingSave, second_save
from gpu_adam.state.registry import Registry
from gpu_adam.state.slots import as_slot, beside, is_beside
from gpu_adam.uninterrupted import Call, make_all
from gpu_adam.variables import Variable

COUNTER = "iterations"
"""The name under which `AdamState.export` gives the counter of steps."""

SCALE, GOOD_STEPS = "loss_scale", "good_steps"
"""The names of a loss scale's numbers: a float32, and an int64."""

VALUE = "value"
"""What stands for a slot's name in the name of a variable itself."""

_LIVING: weakref.WeakSet[AdamState] = weakref.WeakSet()
"""All states, which tell each other whose rows are deferred."""

Copies = Sequence[tuple[Variable, Variable]]
"""What is overwritten, and by what."""


class AdamState:
    """The state of one optimizer.

    Args:
        name: begins the names of the slots.
        complex_mode: one of kernels.COMPLEX_MODES, on which the dtypes of slots depend.
        slot_dtype: of the moving averages of gradients; None for the one in which they are computed.
        sparse_update: one of SPARSE_UPDATES, for variables whose settings do not say.
        max_deferral: how many steps rows may miss.
        replay: one of REPLAYS.

    Attributes:
        weights: the counter and all slots in order of creation: for the first step the counter, every m, every v, and
            with AMSGrad every vhat; a variable that comes later appends its own. The same list for ever.
        names: slot names in order of first creation. The same list for ever.
        registry: which object stands for which variable.
        slots: for each slot name the slots by variable, in order of creation.
        own: arrays that the kernels write and that belong to no variable, by name: those of a loss scale.
        settings: what was set for variables of their own, by `Adam.set_group` or `Controller.set_cohorts`.
        settings_decay: whether some of these settings let weights decay.
        never_decayed: variables whose weights do not decay, whatever their settings say.
        never_decayed_names: patterns of the names of such variables.
        counter: the counter of steps done, an int64 on the host; one of `weights` from the first step or look at it on.
        index_errors: for each variable with a sparse gradient, where the kernels note rows out of range.
        deferred: for each variable with deferred updates, what its rows have missed. The same dict for ever.
        layout: another object whenever a slot or a variable comes to lie elsewhere, or goes. Who has their addresses
            compares.
        exchange: what other ranks do in each step (gpu_adam/step/exchange.py); None for an optimizer by itself.
        titles: for variables that are parts of others, the names that those have among all: they stand for the
            variables' own in the names of arrays.
        alone: ``with state.alone():`` is the context of one call at a time. It raises ConcurrentStepError where another
            call of the optimizer is at work, in another thread or around this one.
        pending: the last asynchronous save, until it has ended and its error, if it has one, was raised.
    """

    def __init__(
        self,
        name: str,
        complex_mode: str,
        slot_dtype: str | None = None,
        sparse_update: str = SPARSE_UPDATES[0],
        max_deferral: int = 1,
        replay: str = REPLAYS[0],
    ) -> None:
        self.name, self.complex_mode, self.slot_dtype = name, complex_mode, slot_dtype
        self.sparse_update, self.max_deferral, self.replay = sparse_update, max_deferral, replay
        self.weights: list[Variable] = []
        self.names: list[str] = []
        self.registry = Registry()
        self.slots: dict[str, dict[Variable, Variable]] = {}
        self.own: dict[str, Variable] = {}
        self.settings: dict[Variable, AnySettings] = {}
        self.never_decayed: frozenset[Variable] = frozenset()
        self.never_decayed_names: tuple[str, ...] = ()
        self.settings_decay = False
        self.counter = Variable(np.int64(0), trainable=False, name=f"{name}/iter", device="host")
        self.index_errors: dict[Variable, Any] = {}
        self.deferred: dict[Variable, Any] = {}
        self.exchange: Any = None
        self.titles: Mapping[Variable, str] = {}
        self.layout = object()
        self._weight_names: list[str] | None = None
        self.alone = Door(name)
        self.pending: PendingSave | None = None
        _LIVING.add(self)

    # Reading.

    @property
    def steps_done(self) -> int:
        """Value of the counter."""
        return int(self.counter.value.item())

    @property
    def counts(self) -> bool:
        """Whether the counter is one of the weights."""
        weights, counter = self.weights, self.counter
        return bool(weights) and (weights[0] is counter or any(weight is counter for weight in weights))

    @property
    def variables(self) -> list[Variable]:
        """The variables that have slots, in order of their first slot."""
        return list(dict.fromkeys(variable for owners in self.slots.values() for variable in owners))

    def has_slots(self, variable: Variable) -> bool:
        """Whether a variable has slots."""
        return any(variable in owners for owners in self.slots.values())

    def has_slot(self, variable: Variable, name: str) -> bool:
        """Whether a variable has a slot of that name."""
        return variable in self.slots.get(name, ())

    def slot(self, variable: Variable, name: str) -> Variable:
        """The slot of a variable.

        Raises:
            SlotNotFoundError: there is none of that name; the message says which there are.
        """
        found = self.slots.get(name, {}).get(variable)
        if found is None:
            raise SlotNotFoundError(
                f"slot {name!r} of variable {variable.name!r}",
                "must exist",
                f"slots {[known for known in self.names if self.has_slot(variable, known)]}",
                "call build([variable]) or apply_gradients first",
            )
        return found

    def settings_of(self, variable: Variable) -> AnySettings:
        """What a variable's updates take in place of the optimizer's hyperparameters."""
        settings = self.settings.get(variable, OWN_SETTINGS)
        if isinstance(settings, Cohort):
            return settings
        patterns = self.never_decayed_names
        if variable in self.never_decayed or any(re.search(pattern, variable.name) for pattern in patterns):
            return settings._replace(weight_decay=0.0)
        return settings

    def defers(self, variable: Variable) -> bool:
        """Whether the variable's rows without a gradient are left alone at a step.

        Raises:
            ArgumentValueError: they are to be, and others know the variable's memory, which cannot be guarded.
        """
        settings = self.settings.get(variable, OWN_SETTINGS)
        own = None if isinstance(settings, Cohort) else settings.sparse_update
        if (own or self.sparse_update) != "deferred":
            return False
        if self.registry.objects([variable])[0] is not variable:
            rule, remedy = "must be a gpu_adam.Variable", "wrap the array in one, or set sparse_update='dense' for it"
            raise ArgumentValueError("a variable with deferred updates", rule, "a raw array", remedy)
        return True

    def check_undivided(self, variables: Iterable[Variable]) -> None:
        """Raise ArgumentValueError for a variable whose rows another optimizer defers, and for a slot of such a one."""
        for variable in variables:
            behind = variable._behind
            if behind is None or behind is self.deferred.get(variable):
                continue
            owner = behind.owner()
            if owner is not None:
                raise ArgumentValueError(
                    f"variable {variable.name!r}",
                    "must be updated by one optimizer alone while its rows are deferred",
                    f"a second one beside {owner.name!r}",
                    "let the other one forget it, or make that one with sparse_update='dense'",
                )
            behind.settle()
            variable._behind = None

    def claim(self, variable: Variable) -> None:
        """Let other optimizers that know the variable look anew at whether they may update it (`check_undivided`)."""
        for other in list(_LIVING):
            if other is not self and other.has_slots(variable):
                other.layout = object()

    def link_deferred(self) -> None:
        """Let whoever reads a variable with deferred updates, or its slots, bring it up to date first."""
        for variable, rows in self.deferred.items():
            variable._behind = rows
            for owned in self.slots.values():
                slot = owned.get(variable)
                if slot is not None and slot.shape == variable.shape:
                    slot._behind = rows

    def slots_at(self, variables: Sequence[Variable], rule: UpdateRule) -> dict[str, list[Array]]:
        """For each slot of an update, in the order of the kernels' structs, the arrays of variables of one dtype."""
        return {
            spec.name: [owned[variable]._storage for variable in variables]
            for spec in slots_of(rule, variables[0].dtype.name)
            for owned in (self.slots[spec.name],)
        }

    def link_masters(self) -> None:
        """Let the variables with a master be its rounding, whatever is assigned to them."""
        for variable, master in self.slots.get("master", {}).items():
            variable._follow(master)

    def overwriting_calls(self, variables: Iterable[Variable]) -> list[Call]:
        """The calls that overwrite variables, and their masters, by their averages; to be made once."""
        by_device: dict[Device, list[Variable]] = {}
        for variable in dict.fromkeys(variables):
            by_device.setdefault(variable.device, []).append(variable)
        calls: list[Call] = []
        for device, there in by_device.items():
            for variable in there:
                if variable in self.deferred:
                    calls += self.deferred[variable].settle_calls()
            copies = self.overwriting_copies(there)
            targets, sources = zip(*((to._storage, by._storage) for to, by in copies), strict=True)
            calls.append(device.copy_call(targets, sources))
        return calls

    def overwriting_copies(self, variables: Sequence[Variable]) -> Copies:
        """What is overwritten, variables and their masters, and by which averages."""
        averages, masters = (self.slots.get(name, {}) for name in ("average", "master"))
        own = [(variable, averages[variable]) for variable in variables]
        return own + [(masters[variable], average) for variable, average in own if variable in masters]

    def raise_error_of_save(self) -> None:
        """Raise the error of the last asynchronous save, if it has ended with one that nobody was told."""
        pending = self.pending
        if pending is not None and pending.done:
            self.pending = None
            pending.raise_untold()

    def end_pending_save(self, on_busy: str) -> None:
        """Let no save be at work, and raise the error of the last one as `raise_error_of_save` does.

        Args:
            on_busy: "wait" for one that is, or "error".

        Raises:
            ConcurrentStepError: one is at work.
        """
        pending = self.pending
        if pending is None:
            return
        if on_busy == "error" and not pending.done:
            raise second_save()
        pending.join()
        self.raise_error_of_save()

    # As a whole, by name.

    def variable_names(self) -> dict[Variable, str]:
        """A name of its own for each variable that has slots."""
        variables, titles = self.variables, self.titles
        names = [titles.get(variable, variable.name) for variable in variables]
        return dict(zip(variables, unique_names(names), strict=True))

    def named(self, *, variables: bool = False) -> dict[str, Variable]:
        """The weights by name, and with `variables` the variables that have slots, as "<variable>/value"."""
        named = dict(zip(self.weight_names(), self.weights, strict=True))
        if variables:
            named |= {f"{name}/{VALUE}": variable for variable, name in self.variable_names().items()}
        return named

    def weight_names(self) -> list[str]:
        """A name of its own for each of `weights`: "iterations", "<variable>/<slot>" for each slot, those of `own`.

        Of several variables with one name the second is called "<variable>_1", and so on, in order of their first slot.
        """
        if self._weight_names is None:
            unique = self.variable_names()
            names = {id(self.counter): COUNTER, **{id(array): name for name, array in self.own.items()}}
            for slot_name, owned in self.slots.items():
                names.update({id(slot): f"{unique[variable]}/{slot_name}" for variable, slot in owned.items()})
            self._weight_names = [names[id(weight)] for weight in self.weights]
        return self._weight_names

    def forget_names(self) -> None:
        """To be called before the list of weights changes, and after."""
        self._weight_names = None

    def export(self) -> dict[str, np.ndarray]:
        """Copies in host memory by name, in the order of `weights`. Waits for the device."""
        return {name: weight.numpy() for name, weight in self.named().items()}

    def restore(
        self,
        arrays: Mapping[str, Any],
        label: Callable[[int], str] | None = None,
        *,
        from_file: bool = False,
        named: Mapping[str, Variable] | None = None,
        also: Sequence[Call] = (),
    ) -> None:
        """Overwrite the state: all arrays or, where one does not fit, none. Args and errors: see `restoring`."""
        self.restoring(arrays, label, from_file=from_file, named=named, also=also)()

    def restoring(
        self,
        arrays: Mapping[str, Any],
        label: Callable[[int], str] | None = None,
        *,
        from_file: bool = False,
        named: Mapping[str, Variable] | None = None,
        also: Sequence[Call] = (),
    ) -> Callable[[], None]:
        """A function that overwrites the state. Until it is called nothing changes.

        Args:
            arrays: one for each name that `export` gives; numbers, arrays of any device, or Variables. A live array of
                the state counts as it is before the call.
            label: what messages call the array of a weight, by the weight's number; by default its name.
            from_file: whether the arrays come from a file. Then each must have its slot's dtype, and as nobody else has
                the arrays they are not copied before they are written.
            named: what is overwritten, by the names of `arrays`; default: what `export` gives.
            also: calls to be made with the copies; they may be made twice.

        Raises:
            ArgumentTypeError, ArgumentValueError: an array is missing, left over, of another shape or dtype, or holds
                no numbers; a counter that is no number of steps, a loss scale outside its range.
        """
        named = self.named() if named is None else named
        names = list(named)
        in_order = list(arrays) == names  # which is sooner seen than each name is found in a large dict
        if not in_order and (len(arrays) != len(names) or not all(map(arrays.__contains__, names))):
            missing = next((f"nothing for {name!r}" for name in names if name not in arrays), None)
            raise ArgumentValueError(
                "arrays",
                f"must hold one array for each of the {len(names)} weights of optimizer {self.name!r}",
                missing or f"{next(iter(arrays.keys() - set(names)))!r} besides",
                "call build(variables) with the same variables first",
            )
        label = label or names.__getitem__
        copies: defaultdict[Device, tuple[list[Array], list[Array]]] = defaultdict(lambda: ([], []))
        values = arrays.values() if in_order else map(arrays.__getitem__, names)
        for number, (name, weight, value) in enumerate(zip(names, named.values(), values, strict=True)):
            target = weight._value
            if weight is self.counter:
                count = checked_count(value, label(number))
                source = as_slot(value if from_file else count, weight, label(number), from_file=from_file)
            elif type(value) is not np.ndarray or value.dtype != target.dtype or value.shape != target.shape:
                source = as_slot(value, weight, label(number), from_file=from_file)
            else:
                source = value if from_file and value.flags.c_contiguous else value.copy()
            if name == SCALE and isinstance(source, np.ndarray):  # what lies on a device cannot be seen without a wait
                check_scale(float(source), label(number))
            targets, sources = copies[weight._device]
            targets.append(target)
            sources.append(source)

        def write() -> None:
            copying = [device.copy_call(targets, sources) for device, (targets, sources) in copies.items()]
            make_all([*copying, *also])

        def write_all() -> None:
            try:
                write()
            except BaseException:
                write()  # all once more: after an error in between the state would be neither the old nor the new one
                raise

        return write_all

    # Copies: everything reachable is copied, by pickle and deepcopy alike.

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in ("alone", "deferred", "exchange", "index_errors", "layout", "pending", "titles"):  # of this process
            del state[name]
        # As lists: a copied dict of variables would be filled before the variables are.
        state["slots"] = {name: list(owned.items()) for name, owned in self.slots.items()}
        state["settings"] = list(self.settings.items())
        state["masters"] = any(variable._has_master for variable in self.slots.get("master", ()))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        has_masters = state.pop("masters")
        self.__dict__.update(state)
        self.alone, self.pending = Door(self.name), None
        self.index_errors, self.deferred, self.exchange, self.titles, self.layout = {}, {}, None, {}, object()
        self.slots = {name: dict(owned) for name, owned in state["slots"].items()}
        self.settings = dict(state["settings"])
        for owned in self.slots.values():
            for variable, slot in owned.items():
                if not is_beside(slot, variable):
                    slot._move_to(beside(slot._storage, variable))
        if has_masters:
            self.link_masters()
        _LIVING.add(self)


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, those that came before with a number: of "w", "w" the second becomes "w_1", if nobody is called so."""
    taken = set(names)
    if len(taken) == len(names):
        return list(names)
    used: set[str] = set()
    numbers: dict[str, int] = {}
    unique = []
    for name in names:
        own = name
        while own in used:
            numbers[name] = numbers.get(name, 0) + 1
            own = f"{name}_{numbers[name]}"
            if own in taken:  # another variable is called so
                own = name
        used.add(own)
        unique.append(own)
    return unique
