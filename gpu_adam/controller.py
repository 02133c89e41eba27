"""One step: read the hyperparameters, check the gradients, clip, update, count. What raises has changed nothing."""

from __future__ import annotations

import operator
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpu_adam import kernels
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.hyperparameters import Clip, Scalars
from gpu_adam.plan import Mode, Plan, check_overlap
from gpu_adam.slots import Slots, slot_names
from gpu_adam.sparse import IndexErrors
from gpu_adam.trace import stage
from gpu_adam.variables import IndexedSlices, Registry, Variable

_PLANS_KEPT = 8  # sets of variables whose tables stay: a GAN steps two by turns


class Controller:
    """The steps of one optimizer over its variables.

    Args:
        slots: the optimizer's slots.
        prefix: the optimizer's name, for slot names.
    """

    def __init__(self, slots: Slots, prefix: str) -> None:
        self.registry = Registry()
        self._slots, self._prefix = slots, prefix
        self._index_errors: dict[Variable, IndexErrors] = {}
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        self._last: _Last | None = None

    @stage("step")
    def step(
        self,
        grads_and_vars: Iterable[Any],
        hyper: dict[str, Any],
        *,
        amsgrad: bool,
        clip: Clip,
    ) -> int:
        """Update every variable by its gradient and count the step.

        Args:
            grads_and_vars: (gradient, variable) pairs.
            hyper: stored hyperparameters by name.
            amsgrad: whether to keep and use the maximum of v.
            clip: how the gradients are clipped.

        Returns:
            The steps done.

        Raises:
            ArgumentTypeError, ArgumentValueError, SparseIndexError: nothing has changed then.
        """
        pairs = _listed(grads_and_vars)
        mode = Mode(
            self._slots.complex_mode,
            amsgrad,
            clip.clipvalue is not None,
            clip.clipnorm is not None,
            clip.global_clipnorm is not None,
        )
        last = self._last
        gradients = None if last is None or last.plan.mode != mode else last.gradients_of(pairs)
        if last is None or gradients is None:
            plan, steps = self._prepared(pairs, hyper, mode, clip)
        else:
            plan = last.plan
            steps = plan.steps(Scalars(hyper, self._slots.steps_done), clip)
            last.bind(gradients)
        plan.enqueue(steps, clip)
        done = self._slots.steps_done + 1
        self._slots.iterations(self._prefix).value[...] = done
        return done

    @stage("check")
    def _prepared(
        self, pairs: Sequence[Any], hyper: dict[str, Any], mode: Mode, clip: Clip
    ) -> tuple[Plan, list[tuple[Any, ...]]]:
        known = len(self.registry)
        try:
            gradients, variables, without = self._resolved(pairs)
            sparse = tuple([isinstance(gradient, IndexedSlices) for gradient in gradients])
            key = (tuple(map(id, variables)), sparse, mode)
            plan = self._plans.get(key)
            is_new = plan is None
            if plan is None:
                for variable in variables:
                    kernels.dtype_row(variable.dtype, f"variable {variable.name!r}")
                check_overlap(variables)
                _check_not_capturing(variables)
                plan = Plan(variables, sparse, mode, self._errors_of)
            checked = plan.check(gradients)
            steps = plan.steps(Scalars(hyper, self._slots.steps_done), clip)
        except BaseException:
            self.registry.forget(known)
            raise
        if without:
            warnings.warn(
                f"no gradient for the variables {without}; they are left as they are", UserWarning, stacklevel=4
            )
        with self._slots.undone_if_raised():
            self._slots.iterations(self._prefix)
            if is_new:
                self._slots.ensure(variables, slot_names(mode.amsgrad), self._prefix)
                plan.allocate(self._slots)
        self._plans[key] = plan
        self._plans.move_to_end(key)
        for old in [key for key, kept in self._plans.items() if not kept.captured][:-_PLANS_KEPT]:
            del self._plans[old]
        self._last = None if without else _Last(plan, [target for _, target in pairs])
        repeatable = plan.bind(checked)
        if self._last is not None and repeatable:
            self._last.remember(gradients)
        return plan, steps

    def build(self, variables: Iterable[Any], *, amsgrad: bool) -> None:
        """Create the slots of `variables` ahead of their first step."""
        known = len(self.registry)
        try:
            found = [self.registry.find(obj, f"var_list[{number}]") for number, obj in enumerate(variables)]
            for variable in found:
                kernels.dtype_row(variable.dtype, f"variable {variable.name!r}")
            check_overlap(found)
        except BaseException:
            self.registry.forget(known)
            raise
        self._slots.iterations(self._prefix)
        self._slots.ensure(found, slot_names(amsgrad), self._prefix)

    def check_errors(self) -> None:
        """Raise what the kernels have noted. Waits for the device."""
        for errors in self._index_errors.values():
            errors.check()

    def _resolved(self, pairs: Sequence[Any]) -> tuple[list[Any], list[Variable], list[str]]:
        """Gradients and variables of the pairs that have a gradient, and the names of those that have none."""
        gradients: list[Any] = []
        variables: list[Variable] = []
        without: list[str] = []
        for number, pair in enumerate(pairs):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                got = (
                    f"{type(pair).__name__} of length {len(pair)}" if hasattr(pair, "__len__") else type(pair).__name__
                )
                rule = "must be a (gradient, variable) pair"
                raise ArgumentTypeError(f"grads_and_vars[{number}]", rule, got, "pass a list of pairs")
            gradient, target = pair
            if isinstance(gradient, Variable) and not isinstance(target, Variable):
                rule = "must be (gradient, variable), in this order"
                raise ArgumentTypeError(f"grads_and_vars[{number}]", rule, "a Variable as gradient", "swap the two")
            variable = self.registry.find(target, f"the variable of grads_and_vars[{number}]")
            if gradient is None:
                without.append(variable.name)
            else:
                gradients.append(gradient)
                variables.append(variable)
        if not gradients:
            rule = "must hold a gradient for at least one variable"
            got = f"none for {without}" if without else "no pairs"
            raise ArgumentValueError("grads_and_vars", rule, got, "check that the loss depends on the variables")
        return gradients, variables, without

    def _errors_of(self, variable: Variable) -> IndexErrors:
        if variable not in self._index_errors:
            self._index_errors[variable] = IndexErrors(variable)
        return self._index_errors[variable]


class _Last:
    """The last step's variables and gradients, so that a step with the same ones need not be looked at again.

    Gradients are held weakly: the optimizer must not keep a model's gradients alive. (NumPy refuses to resize an array
    that is weakly referenced, so its address stays.)

    Args:
        plan: of the step.
        targets: the second of each pair, as it was passed.
    """

    def __init__(self, plan: Plan, targets: list[Any]) -> None:
        self.plan, self._targets = plan, targets
        self._gradients: list[Callable[[], Any]] = []

    def gradients_of(self, pairs: Sequence[Any]) -> list[Any] | None:
        """The gradients of the pairs, if the plan is theirs too; else None."""
        if len(pairs) != len(self._targets) or set(map(type, pairs)) != {tuple} or set(map(len, pairs)) != {2}:
            return None
        gradients, targets = zip(*pairs, strict=True)
        if not all(map(operator.is_, targets, self._targets)):
            return None
        types = set(map(type, gradients))
        if types & {type(None), Variable}:
            return None
        if any(issubclass(kind, IndexedSlices) for kind in types) or True in self.plan.sparse:
            sparse = [isinstance(gradient, IndexedSlices) for gradient in gradients]
            return list(gradients) if sparse == self.plan.sparse else None
        return list(gradients)

    def bind(self, gradients: list[Any]) -> None:
        """Use these gradients; checked, unless they are the very same arrays as last time."""
        if self._gradients and all(map(operator.is_, gradients, [gradient() for gradient in self._gradients])):
            return
        checked = self.plan.check(gradients)
        self._gradients = []
        if self.plan.bind(checked):
            self.remember(gradients)

    def remember(self, gradients: list[Any]) -> None:
        """These arrays need no check as long as they live."""
        try:
            self._gradients = list(map(weakref.ref, gradients))
        except TypeError:
            self._gradients = []


def _check_not_capturing(variables: Sequence[Variable]) -> None:
    """What a first step makes, its slots of zeros above all, a graph would make anew at every replay."""
    for device in {variable.device for variable in variables}:
        if device.is_capturing():
            raise ArgumentValueError(
                "a step captured in a graph",
                "must have been done before, with these variables, kinds of gradients and clipping",
                "a first one",
                "do one such step, then capture the next",
            )


def _listed(grads_and_vars: Iterable[Any]) -> Sequence[Any]:
    """The pairs as a list; ArgumentTypeError where they are not iterable."""
    if type(grads_and_vars) is list:
        return grads_and_vars
    try:
        iterator = iter(grads_and_vars)
    except TypeError as error:
        rule = "must be an iterable of (gradient, variable) pairs"
        raise ArgumentTypeError(
            "grads_and_vars", rule, type(grads_and_vars).__name__, "pass a list of pairs"
        ) from error
    return list(iterator)
