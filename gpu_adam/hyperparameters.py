"""Hyperparameters: numbers, callables and schedules, their rules, and clipping; step/scalars.py evaluates them."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.loss_scale import LossScale, checked_loss_scale
from gpu_adam.rules import (
    BELOW_ONE,
    FINITE,
    FINITE_NOT_NEGATIVE,
    LIMITS,
    NOT_NEGATIVE,
    POSITIVE,
    Rule,
    is_whole,
    items_of,
    one_of,
    real_number,
    shown,
    truth_value,
)
from gpu_adam.schedules import LearningRateSchedule
from gpu_adam.uninterrupted import Call
from gpu_adam.variables import Variable

DEFAULT_EPSILON = 1e-7

_CLIPPING = POSITIVE._replace(remedy="pass None for no clipping")
_RULES: dict[str, Rule] = {
    "learning_rate": FINITE._replace(remedy="pass a finite number"),
    "beta_1": BELOW_ONE._replace(remedy="pass 0.9, say"),
    "beta_2": BELOW_ONE._replace(remedy="pass 0.999, say"),
    "epsilon": NOT_NEGATIVE._replace(remedy="pass 1e-7, say"),
    "decay": Rule("must be >= 0 and finite", FINITE_NOT_NEGATIVE.holds, "pass 0 for no decay"),
    "weight_decay": Rule("must be >= 0 and finite", FINITE_NOT_NEGATIVE.holds, "pass 0 for no decay of weights"),
    "l2": Rule("must be >= 0 and finite", FINITE_NOT_NEGATIVE.holds, "pass 0 for no penalty"),
    "learning_rate_multiplier": FINITE._replace(remedy="pass 1 for the optimizer's learning rate"),
    "ema_momentum": Rule("must lie in [0, 1]", lambda x: 0 <= x <= 1, "pass 0.99, say"),
    "clipnorm": _CLIPPING,
    "clipvalue": _CLIPPING,
    "global_clipnorm": _CLIPPING,
}

_MAY_BE_CALLABLE = ("learning_rate", "beta_1", "beta_2", "epsilon")


def checked(name: str, value: Any) -> Any:
    """`value` as it is stored for hyperparameter `name`: a float, or what is evaluated at every step.

    Args:
        name: the hyperparameter.
        value: a real number; for learning_rate, beta_1, beta_2 and epsilon also a 0-d array or variable (read at every
            step; one on a CUDA device makes the host wait then) or a callable without arguments; for learning_rate also
            a schedule.

    Raises:
        ArgumentTypeError: neither of these.
        ArgumentValueError: a number outside the hyperparameter's rule.
    """
    if isinstance(value, LearningRateSchedule):
        if name == "learning_rate":
            return value
    elif name in _MAY_BE_CALLABLE and (_is_live(value) or callable(value)):
        if _is_live(value):
            as_number(name, value)
        return value
    return as_number(name, value, or_else=" or a callable without arguments" if name in _MAY_BE_CALLABLE else "")


def as_number(name: str, value: Any, or_else: str = "") -> float:
    """`value` as a float that obeys the rule of hyperparameter `name`; `or_else` is what messages allow besides."""
    rule = _RULES[name]
    number = float(real_number(name, value, kind=f"a real number{or_else}", remedy=rule.remedy))
    rule.check(name, number)
    return number


def evaluated(name: str, value: Any) -> float:
    """The number that a stored callable, variable or 0-d array has now; schedules are for `step.scalars.Scalars`."""
    return as_number(name, value() if callable(value) and not _is_live(value) else value)


def _is_live(value: Any) -> bool:
    return isinstance(value, Variable) or (hasattr(value, "dtype") and not isinstance(value, (np.generic, float)))


class Clip(NamedTuple):
    """How the gradients of a step are clipped: by value, then by norm.

    Attributes:
        clipvalue: bound of every element's absolute value, or None.
        clipnorm: bound of each gradient's L2 norm, or None.
        global_clipnorm: bound of the L2 norm over all gradients together, or None.
    """

    clipvalue: float | None
    clipnorm: float | None
    global_clipnorm: float | None

    @property
    def norm(self) -> Literal["each", "global"] | None:
        """Which norm is bounded: that of each gradient, the one over all gradients together, or none."""
        if self.global_clipnorm is not None:
            return "global"
        return None if self.clipnorm is None else "each"

    @property
    def limit(self) -> float | None:
        """The bound of that norm."""
        return self.clipnorm if self.global_clipnorm is None else self.global_clipnorm

    def value_in(self, dtype: str) -> float:
        """`clipvalue` as the kernels of a dtype take it: infinite where nothing is bounded.

        Raises:
            ArgumentValueError: the dtype would flush it to 0.
        """
        value, limits = self.clipvalue, LIMITS[dtype]
        if value is None or value > limits.max:
            return math.inf
        if value < limits.tiny:
            rule = f"must be at least {limits.tiny:.3g}, the smallest {dtype} that is not flushed to 0"
            raise ArgumentValueError("clipvalue", rule, value, "pass None for no clipping, or a larger bound")
        return value


NO_CLIPPING = Clip(None, None, None)


class Flavour(NamedTuple):
    """What an optimizer does besides plain Adam, from its construction on.

    Attributes:
        maximize: whether it goes up along the gradient.
        epsilon_form: one of EPSILON_FORMS.
        use_ema: whether it keeps an exponential moving average of each variable, in the slot "average".
        ema_momentum: share of the old average in the new one, in [0, 1].
        ema_overwrite_frequency: after so many steps each variable is overwritten by its average; None for never.
        slot_dtype: of the moving averages of gradients, one of SLOT_DTYPES; None for the one that they are computed in.
        master_weights: whether variables of 16 bits have a master of 32 bits, in the slot "master".
        stochastic_rounding: whether variables of bfloat16 are rounded to one of two neighbours by chance.
        seed: of that chance, in [0, 2^64).
        skip_nonfinite: whether a step with a gradient that is not finite changes nothing.
        loss_scale: what the gradients are divided by, a scale that follows the steps that are left out; None for none.
        telemetry: whether the numbers of the last step can be read without a wait.
        accumulation: one of ACCUMULATIONS.
        sparse_update: one of SPARSE_UPDATES, for variables whose group does not say.
        replay: one of REPLAYS.
        max_deferral: after how many steps rows that were left alone are brought up to date.
    """

    maximize: bool = False
    epsilon_form: str = "hat"
    use_ema: bool = False
    ema_momentum: float = 0.99
    ema_overwrite_frequency: int | None = None
    slot_dtype: str | None = None
    master_weights: bool = False
    stochastic_rounding: bool = False
    seed: int = 0
    skip_nonfinite: bool = False
    loss_scale: LossScale | None = None
    telemetry: bool = False
    accumulation: str = "mean"
    sparse_update: str = "dense"
    replay: str = "exact"
    max_deferral: int = 65536

    @property
    def halves(self) -> tuple[str | None, bool, bool]:
        """What concerns variables of 16 bits, as fields of `UpdateRule`."""
        return self.slot_dtype, self.master_weights, self.stochastic_rounding

    @property
    def skips(self) -> bool:
        """Whether steps are left out whose gradients are not all finite."""
        return self.skip_nonfinite or self.loss_scale is not None

    def config(self) -> dict[str, Any]:
        """The constructor's arguments that are not the default ones."""
        others = {name: value for name, value in self._asdict().items() if value != getattr(PLAIN, name)}
        return others if self.loss_scale is None else {**others, "loss_scale": self.loss_scale.config()}

    def overwrites_at(self, step: int) -> bool:
        """Whether step t ends with the averages in the variables' places."""
        return self.ema_overwrite_frequency is not None and step % self.ema_overwrite_frequency == 0


PLAIN = Flavour()
"""Nothing: the one object of all optimizers that ask for nothing."""
SLOT_DTYPES = ("bfloat16",)
SPARSE_UPDATES = ("dense", "deferred")
"""When rows without a gradient move: at each step, or when somebody needs them."""
REPLAYS = ("exact", "closed_form")
"""How v takes missed steps: one by one, or all in one product."""
ACCUMULATIONS = ("mean", "sum")
"""What becomes of the gradients that were accumulated: their mean over the calls, or their sum."""
EPSILON_FORMS = ("hat", "paper")
"""To what epsilon is added: the root of v ("epsilon hat" of the paper's section 2), or that of v / (1 - beta_2^t)."""


def checked_flavour(arguments: Mapping[str, Any]) -> Flavour:
    """The flavour that the constructor's arguments ask for.

    Raises:
        ArgumentTypeError, ArgumentValueError: a value of the wrong kind or outside its range; a frequency of
            overwriting without averages.
    """
    given = {name: value for name, value in arguments.items() if name in Flavour._fields}
    for name in ("maximize", "use_ema", "master_weights", "stochastic_rounding", "skip_nonfinite", "telemetry"):
        if name in given:
            given[name] = truth_value(name, given[name])
    if "ema_momentum" in given:
        given["ema_momentum"] = as_number("ema_momentum", given["ema_momentum"])
    words = {"epsilon_form": EPSILON_FORMS, "accumulation": ACCUMULATIONS, "slot_dtype": SLOT_DTYPES}
    words |= {"sparse_update": SPARSE_UPDATES, "replay": REPLAYS}
    for name in words.keys() & given.keys():
        if name != "slot_dtype" or given[name] is not None:
            given[name] = one_of(name, given[name], words[name])
    for name, least, bound, example in (("seed", 0, 64, 0), ("max_deferral", 1, 20, 65536)):
        number = given.get(name, example)
        if not is_whole(number) or not least <= number < 2**bound:
            rule = f"must be a whole number in [{least}, 2^{bound})"
            raise ArgumentValueError(name, rule, shown(number), f"pass {example}, say")
    if "loss_scale" in given:
        given["loss_scale"] = checked_loss_scale(given["loss_scale"])
    flavour = Flavour(**given)
    flavour = flavour._replace(seed=int(flavour.seed), max_deferral=int(flavour.max_deferral))
    _check_combination(flavour)
    frequency = flavour.ema_overwrite_frequency
    if frequency is not None:
        if not is_whole(frequency) or frequency < 1:
            rule = "must be a whole number >= 1, or None"
            raise ArgumentValueError("ema_overwrite_frequency", rule, repr(frequency), "pass a number of steps")
        if not flavour.use_ema:
            rule = "must be None without use_ema=True"
            raise ArgumentValueError("ema_overwrite_frequency", rule, frequency, "pass use_ema=True too")
        flavour = flavour._replace(ema_overwrite_frequency=int(frequency))
    return PLAIN if flavour == PLAIN else flavour


def _check_combination(flavour: Flavour) -> None:
    if flavour.master_weights and flavour.stochastic_rounding:
        rule = "must not be set together with master_weights"
        raise ArgumentValueError("stochastic_rounding", rule, True, "choose one: a master is not rounded at all")
    if flavour.sparse_update == "deferred":
        check_deferrable(flavour)


def check_deferrable(flavour: Flavour) -> None:
    """Raise ArgumentValueError where a flavour needs all rows of a variable at each step."""
    if flavour.telemetry:
        rule = "must be 'dense' with telemetry, which measures all rows of a variable at each step"
        raise ArgumentValueError("sparse_update", rule, "deferred", "choose one of them")


def checked_patterns(patterns: Any) -> list[str]:
    """Regular expressions as a list; None is none.

    Raises:
        ArgumentTypeError, ArgumentValueError: something that is no text, or no regular expression.
    """
    if patterns is None:
        return []
    listed = items_of("var_names", patterns, "must be a list of regular expressions")
    for number, pattern in enumerate(listed):
        argument, rule = f"var_names[{number}]", "must be a regular expression"
        if not isinstance(pattern, str):
            raise ArgumentTypeError(argument, rule, type(pattern).__name__, "pass a text")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ArgumentValueError(argument, rule, f"{pattern!r}: {error}", "correct it") from error
    return listed


class Settings(NamedTuple):
    """What the updates of some variables take in place of the optimizer's hyperparameters; None where they take those.

    Attributes:
        learning_rate_multiplier: times the optimizer's learning rate.
        weight_decay, beta_1, beta_2, epsilon: as the optimizer's.
        sparse_update: one of SPARSE_UPDATES.
    """

    learning_rate_multiplier: float = 1.0
    weight_decay: float | None = None
    beta_1: float | None = None
    beta_2: float | None = None
    epsilon: float | None = None
    sparse_update: str | None = None

    def updated(self, given: Mapping[str, Any]) -> Settings:
        """These settings with others in place of some: numbers, or None for the optimizer's values.

        Raises:
            ArgumentTypeError, ArgumentValueError: an unknown name, no number, or one outside its range.
        """
        for name in given:
            if name not in self._fields:
                rule = f"must be one of {', '.join(self._fields)}"
                raise ArgumentTypeError(f"keyword {name!r}", rule, "another", "correct or drop it")
        numbers: dict[str, Any] = {
            name: value if value is None else _checked_setting(name, value) for name, value in given.items()
        }
        if numbers.get("learning_rate_multiplier", 1.0) is None:
            numbers["learning_rate_multiplier"] = 1.0
        return self._replace(**numbers)


def _checked_setting(name: str, value: Any) -> Any:
    return one_of(name, value, SPARSE_UPDATES) if name == "sparse_update" else as_number(name, value)


OWN_SETTINGS = Settings()
"""Those of a variable for which nothing was set."""


class Cohort:
    """Settings of variables that take nothing from the optimizer, and whose steps are counted apart.

    Every step that updates one of the variables updates all of them. All values are given before each step, and others
    than last time make no launch anew. What kernels take of them is computed in float64 and rounded once, as in torch.

    Args:
        counts: steps that are done; elements of a NumPy array, of which each variable has one.
        members: the places of these variables' elements, which are equal before each step.

    Attributes:
        hyper: floats by name that have been checked, as an optimizer stores them.
        flavour: what the update does besides plain Adam; nothing that needs another rule than the optimizer's.
    """

    __slots__ = ("_counts", "_first", "_members", "flavour", "hyper")

    def __init__(self, counts: np.ndarray, members: np.ndarray) -> None:
        self._counts, self._members, self._first = counts, members, int(members[0])
        self.flavour, self.hyper = PLAIN, dict[str, float]()

    @property
    def iterations(self) -> int:
        """Steps of these variables that are done, t - 1; at most, while the device may leave some of them out."""
        return int(self._counts.item(self._first))

    @property
    def present(self) -> Any:
        """What the scalars of the next step depend on: cohorts for which it is equal have the same ones."""
        return id(self.hyper), id(self.flavour), self._counts.item(self._first)


AnySettings = Settings | Cohort


def counting(cohorts: Sequence[Cohort], steps: int) -> list[Call]:
    """The calls that add steps to those that cohorts have done; fewer than 0 take some back that were left out."""
    by_array: dict[int, list[Cohort]] = {}
    for cohort in cohorts:
        by_array.setdefault(id(cohort._counts), []).append(cohort)
    return [
        functools.partial(
            np.add.at, counts, np.concatenate([each._members for each in alike]), counts.dtype.type(steps)
        )
        for alike in by_array.values()
        for counts in (alike[0]._counts,)
    ]


class PresentValue(float):
    """What a hyperparameter is when it is read: a float, with what the reference's variables offer besides.

    ``adam.learning_rate.assign(0.1)`` is ``adam.learning_rate = 0.1``. Copies and pickles are plain floats.

    Args:
        value: the number.
        optimizer: whose hyperparameter it is.
        name: the hyperparameter's.
    """

    dtype = np.dtype(np.float64)  # which tf.keras.backend.set_value looks at
    _optimizer: Any
    _name: str

    def __new__(cls, value: float, optimizer: Any, name: str) -> PresentValue:
        """The value of the optimizer's hyperparameter of that name."""
        self = super().__new__(cls, value)
        self._optimizer, self._name = optimizer, name
        return self

    def assign(self, value: Any) -> Any:
        """Give the hyperparameter another number; an array is read now, once. Returns the value after that."""
        setattr(self._optimizer, self._name, as_number(self._name, value))
        return getattr(self._optimizer, self._name)

    def numpy(self) -> np.float64:
        """The number as NumPy's."""
        return np.float64(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return float, (float(self),)


class Hyperparameter:
    """An attribute of an optimizer that reads as its present value and may be assigned at any time.

    A number, or what a function returns, reads as a `PresentValue`; a schedule, variable or array as itself.

    Args:
        name: under which the optimizer stores it in `_hyper`.
        doc: what it is.
    """

    def __init__(self, name: str, doc: str) -> None:
        self.name, self.__doc__ = name, doc

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        value = optimizer._hyper[self.name]
        if callable(value) and not isinstance(value, LearningRateSchedule):
            value = evaluated(self.name, value)
        return PresentValue(value, optimizer, self.name) if type(value) is float else value

    def __set__(self, optimizer: Any, value: Any) -> None:
        new, old = checked(self.name, value), optimizer._hyper[self.name]
        if isinstance(old, Variable) and type(new) is float:
            old.assign(new)  # a variable given as hyperparameter is shared with whoever gave it
        else:
            optimizer._hyper[self.name] = new


class ClipAttribute:
    """An attribute of an optimizer that bounds its gradients; None where it does not.

    Args:
        name: the field of `Clip`, which the optimizer stores as `_clip`.
        doc: what it is.
    """

    def __init__(self, name: str, doc: str) -> None:
        self.name, self.__doc__ = name, doc

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        return self if optimizer is None else getattr(optimizer._clip, self.name)

    def __set__(self, optimizer: Any, value: Any) -> None:
        clip = optimizer._clip._replace(**{self.name: None if value is None else checked(self.name, value)})
        if clip.clipnorm is not None and clip.global_clipnorm is not None:
            rule = "must not be set together with global_clipnorm"
            got = f"{clip.clipnorm} and {clip.global_clipnorm}"
            raise ArgumentValueError("clipnorm", rule, got, "set one of them to None")
        optimizer._clip = clip
