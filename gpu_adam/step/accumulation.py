"""Sums of gradients over several calls, for a batch that does not fit into memory at once.

A sum is updated by the kernels of a step, of the rule that adds the gradient to theta and does nothing else: any number
of sums in one launch, dense gradients and rows, in float32 for gradients of 16 bits.

A captured function has sums of its own, which it begins and uses: over how many calls they go is part of its graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.hyperparameters import NO_CLIPPING, PLAIN
from gpu_adam.kernels import DTYPES, UpdateRule, dtype_named
from gpu_adam.state.adam_state import AdamState
from gpu_adam.step import request as requests
from gpu_adam.step.controller import Controller
from gpu_adam.step.gradients import AS_THEY_ARE, Incoming
from gpu_adam.step.replays import current_recording, own_sums
from gpu_adam.uninterrupted import Call
from gpu_adam.variables import Variable

_NAMES = ("beta_1", "beta_2", "epsilon", "decay", "weight_decay", "l2")
_ADDS = {"learning_rate": 1.0, **dict.fromkeys(_NAMES, 0.0)}
_BEGINS = {**_ADDS, "weight_decay": 1.0}  # the sum decays to nothing, then the gradient is added


class Accumulator:
    """The sums of an optimizer's gradients.

    Args:
        state: of the optimizer.
    """

    def __init__(self, state: AdamState) -> None:
        self._state = state
        # A step of this optimizer is a call; its counter tells them, interrupted ones too.
        self._own = AdamState(f"{state.name}/sums", state.complex_mode)
        self._controller = Controller(self._own, PLAIN)
        self._sums: dict[Variable, Variable] = {}
        self._targets: dict[Variable, Any] = {}  # the variables of these sums, as they were passed
        self._begin = 0
        self._of_captures = WeakSet[Accumulator]()

    def now(self) -> Accumulator:
        """The sums to work with: in a captured function its own ones, else these."""
        sums = own_sums.get()
        if sums is None:
            return self
        if self._state not in sums:
            sums[self._state] = own = Accumulator(self._state)
            self._of_captures.add(own)
        found: Accumulator = sums[self._state]
        return found

    @property
    def calls(self) -> int:
        """Over how many calls the present sums go."""
        return self._own.steps_done - self._begin

    def add(self, pairs: Iterable[Any], scale: float | None, build: Callable[[list[Any]], object]) -> int:
        """Add gradients.

        Args:
            pairs: (gradient, variable) pairs.
            scale: what the gradients are divided by.
            build: registers variables that the optimizer does not know yet.

        Returns:
            Over how many calls the sums go now.

        Raises:
            As Controller.step; ArgumentValueError too where a graph of the user's is being captured.
        """
        request = requests.read(requests.listed(pairs), self._state.registry)
        if request.news or not all(map(self._state.has_slots, request.variables)):
            build([target for _, target in request.pairs])
            request = requests.read(request.pairs, self._state.registry)
        variables = request.variables
        _refuse_in_graph(variables)
        given = {variable: target for variable, (_, target) in zip(variables, request.pairs, strict=True)}
        self._have_sums(list(given))
        is_first = self.calls == 0
        begins = is_first and len(given) == len(variables)
        before = {} if is_first else self._targets
        targets = {**before, **given}
        if not begins:
            for variable in given.keys() - before.keys():
                with variable.device.activate():
                    self._sums[variable].value.fill(0)
        rule, steps_done = _rule(self._own.complex_mode, scale is not None), self._own.steps_done
        given_pairs = [(g, self._sums[v]) for (g, _), v in zip(request.pairs, variables, strict=True)]
        try:
            incoming = AS_THEY_ARE if scale is None else Incoming(scale)
            self._controller.step(given_pairs, rule, _BEGINS if begins else _ADDS, NO_CLIPPING, incoming)
        finally:
            if self._own.steps_done != steps_done:
                self._targets = targets
        return self.calls

    def _have_sums(self, variables: list[Variable]) -> None:
        """Make the sums that are missing, outside of a graph, whose replays would make them again."""
        kinds: dict[tuple[Device, Any], list[Variable]] = {}
        for variable in variables:
            if variable not in self._sums:
                kinds.setdefault((variable.device, variable.dtype), []).append(variable)
        recording = current_recording.get()
        for (device, dtype), missing in kinds.items():
            wide = dtype_named(DTYPES[dtype.name].wide_dtype)
            with nullcontext() if recording is None else recording.outside():
                arrays = device.zeros_beside([each._storage for each in missing], wide)
            for variable, array in zip(missing, arrays, strict=True):
                self._sums[variable] = Variable.over(array, device, variable.name, trainable=False)

    def sums(self) -> list[tuple[Any, Any]]:
        """(sum, variable) pairs of all variables that had a gradient, but for those that were forgotten since.

        Raises:
            ArgumentTypeError: there are none.
            ArgumentValueError: a graph of the user's is being captured.
        """
        pairs = [(self._sums[v].value, target) for v, target in self._targets.items() if self._state.has_slots(v)]
        if not self.calls or not pairs:
            rule = "must be given where no gradients have been accumulated"
            raise ArgumentTypeError("grads_and_vars", rule, None, "pass a list of pairs, or call accumulate first")
        _refuse_in_graph(self._targets)
        return pairs

    def taken(self, *, mean: bool) -> Incoming:
        """How the sums come in as the gradients of a step, after which new ones begin; their mean over the calls."""
        return Incoming(None, None, self.calls if mean else 1, (self.clear_call(),))

    def clear_call(self) -> Call:
        """The call after which new sums begin."""
        return functools.partial(setattr, self, "_begin", self._own.steps_done)

    def check_errors(self) -> None:
        """Raise what the kernels have noted. Waits for the device."""
        self._controller.check_errors()
        for own in self._of_captures:
            own.check_errors()


def _refuse_in_graph(variables: Iterable[Variable]) -> None:
    """Raise ArgumentValueError in a graph of the user's, which would not know whose sums it adds to."""
    if current_recording.get() is not None:
        return
    if any(device.is_capturing() for device in {variable.device for variable in variables}):
        rule, remedy = "must not accumulate gradients, or use those that were", "use Adam.capture"
        raise ArgumentValueError("a step captured in a graph", rule, "such a call", remedy)


@functools.cache
def _rule(complex_mode: str, scaled: bool) -> UpdateRule:
    return UpdateRule(complex_mode, accumulates=True, scaled=scaled)
