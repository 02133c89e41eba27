"""Learning rates that depend on the step: pass one to Adam as `learning_rate`.

A schedule is a frozen value, a function of the step and nothing else; it computes in float64. The step t counts the
updates already done, so the first update uses the rate of t = 0. In the equations η₀ is `initial_learning_rate`.
Steps and `decay_steps` are in updates, rates in the unit of the variables (an update of Adam is the rate times a number
near 1). `name` is only kept in the configuration. Arguments may be any finite numbers, as in the reference, also where
the equation has no value at some steps (0 / 0, a root of a negative number): the rate is infinite or NaN there, which a
step of Adam refuses. A number that is not finite raises `ArgumentValueError`, an object that is no real number
`ArgumentTypeError`, both at construction.

Reference: https://www.tensorflow.org/versions/r2.0/api_docs/python/tf/keras/optimizers/schedules
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, SupportsFloat

from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.rules import FINITE, items_of, real_number, truth_value

if TYPE_CHECKING:
    from typing import Self


class LearningRateSchedule(ABC):
    """Base of all schedules; a subclass needs `__call__`, and `get_config` where it is to be saved.

    Example:
        >>> class Halving(LearningRateSchedule):
        ...     def __call__(self, step):
        ...         return 0.1 * 0.5 ** step
        >>> Halving()(2)
        0.025
    """

    @abstractmethod
    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate of the update that follows `step` earlier ones; step >= 0."""

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as JSON-serialisable values."""
        raise NotImplementedError("Learning rate schedule must override get_config")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Self":
        """Build a schedule from what `get_config` returned; `config` is not changed."""
        return cls(**config)


# Equality, text and immutability are written once: generated for every class they take 10 ms of `import gpu_adam`.
@dataclass(repr=False, eq=False)
class _Standard(LearningRateSchedule):
    """A schedule whose dataclass fields are its configuration: frozen, and equal where they are."""

    def get_config(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._values().items()}

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __setattr__(self, name: str, value: object) -> None:
        if name in vars(self) and name in self._values():
            raise AttributeError(f"cannot assign {name}: a {type(self).__name__} is frozen; build a new one")
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Standard) and type(other) is type(self) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), *self._values().values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._values().items())})"

    def _check(self, *names: str) -> None:
        """Replace every field named by a finite Python number, and what is to be true or false by a truth value."""
        for name in names:
            vars(self)[name] = _number(f"{type(self).__name__}({name})", getattr(self, name))
        for field in fields(self):
            if field.type is bool:
                vars(self)[field.name] = truth_value(f"{type(self).__name__}({field.name})", getattr(self, field.name))


def _number(argument: str, value: Any) -> float:
    """`value` as a finite number; an int stays one, so that a configuration is given back as it was."""
    number = real_number(argument, value)
    FINITE.check(argument, number)
    return number


# Python raises, or changes over to complex numbers, where IEEE arithmetic says infinity or NaN.


def _power(base: float, exponent: float) -> float:
    try:
        return math.pow(base, exponent)
    except OverflowError:
        return -math.inf if base < 0 and exponent % 2 == 1 else math.inf
    except ValueError:
        return math.inf if base == 0 else math.nan


def _quotient(a: float, b: float) -> float:
    try:
        return a / b
    except ZeroDivisionError:
        return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a)


def _whole(number: float) -> float:
    """The number rounded down; itself where it is infinite or NaN."""
    return math.floor(number) if math.isfinite(number) else number


@dataclass(repr=False, eq=False)
class ExponentialDecay(_Standard):
    """η = η₀ · decay_rate^(t / decay_steps).

    Args:
        initial_learning_rate: η₀, finite.
        decay_steps: updates after which the rate has been multiplied by `decay_rate` once.
        decay_rate: below 0 only with `staircase`.
        staircase: round t / decay_steps down, so that the rate falls in steps.
        name: kept in the configuration.
    """

    initial_learning_rate: float
    decay_steps: float
    decay_rate: float
    staircase: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        self._check("initial_learning_rate", "decay_steps", "decay_rate")

    def __call__(self, step: SupportsFloat) -> float:
        """Return η at `step`."""
        p = _quotient(float(step), self.decay_steps)
        return self.initial_learning_rate * _power(self.decay_rate, _whole(p) if self.staircase else p)


@dataclass(repr=False, eq=False)
class PiecewiseConstantDecay(_Standard):
    """η = values[0] for t <= boundaries[0], values[i] for boundaries[i-1] < t <= boundaries[i], then values[-1].

    Args:
        boundaries: last steps of all intervals but the final one, increasing; at least one.
        values: finite rates, one more than boundaries.
        name: kept in the configuration.
    """

    boundaries: Sequence[float]
    values: Sequence[float]
    name: str | None = None

    def __post_init__(self) -> None:
        for name in ("boundaries", "values"):
            label = f"PiecewiseConstantDecay({name})"
            given = items_of(label, getattr(self, name), "must be a sequence of numbers")
            vars(self)[name] = tuple(_number(f"{label}[{i}]", x) for i, x in enumerate(given))
        label = "PiecewiseConstantDecay(boundaries)"
        if not self.boundaries:
            raise ArgumentValueError(label, "must not be empty", "[]", "pass a plain number for a constant rate")
        if list(self.boundaries) != sorted(self.boundaries):
            raise ArgumentValueError(label, "must increase", list(self.boundaries), "sort it, and values with it")
        if len(self.values) != len(self.boundaries) + 1:
            got = f"{len(self.boundaries)} boundaries, {len(self.values)} values"
            raise ArgumentValueError(label, "must be 1 shorter than values", got, "pass one value per interval")

    def __call__(self, step: SupportsFloat) -> float:
        """Return η at `step`."""
        return float(self.values[bisect_left(self.boundaries, float(step))])


@dataclass(repr=False, eq=False)
class PolynomialDecay(_Standard):
    """η = (η₀ - end) · (1 - s/d)^power + end, where d = decay_steps and s = min(t, d).

    With `cycle` s = t, and d is decay_steps times the smallest whole number that makes d >= t: the rate rises again
    whenever it has reached the end.

    Args:
        initial_learning_rate: η₀, finite.
        decay_steps: updates until the end is reached.
        end_learning_rate: end, finite.
        power: 1 is a straight line; below 0 the rate grows beyond all bounds at the end.
        cycle: start again after decay_steps instead of staying at the end.
        name: kept in the configuration.
    """

    initial_learning_rate: float
    decay_steps: float
    end_learning_rate: float = 0.0001
    power: float = 1.0
    cycle: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        self._check("initial_learning_rate", "decay_steps", "end_learning_rate", "power")

    def __call__(self, step: SupportsFloat) -> float:
        """Return η at `step`."""
        s, d, end = float(step), float(self.decay_steps), self.end_learning_rate
        if self.cycle:
            d *= -_whole(-_quotient(s, d)) if s else 1
        else:
            s = min(s, d)
        return (self.initial_learning_rate - end) * _power(1 - _quotient(s, d), self.power) + end


@dataclass(repr=False, eq=False)
class InverseTimeDecay(_Standard):
    """η = η₀ / (1 + decay_rate · t / decay_steps).

    Args:
        initial_learning_rate: η₀, finite.
        decay_steps: the unit of time.
        decay_rate: how much is added to the divisor in each unit.
        staircase: round t / decay_steps down, so that the rate falls in steps.
        name: kept in the configuration.
    """

    initial_learning_rate: float
    decay_steps: float
    decay_rate: float
    staircase: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        self._check("initial_learning_rate", "decay_steps", "decay_rate")

    def __call__(self, step: SupportsFloat) -> float:
        """Return η at `step`."""
        p = _quotient(float(step), self.decay_steps)
        return _quotient(self.initial_learning_rate, 1 + self.decay_rate * (_whole(p) if self.staircase else p))


@dataclass(repr=False, eq=False)
class CosineDecay(_Standard):
    """η = η₁ · ((1 - alpha) · ½(1 + cos(π s/decay_steps)) + alpha), where s = min(t - warmup, decay_steps).

    Without `warmup_target` η₁ = η₀ and warmup = 0. With it the rate first goes in a straight line from η₀ to
    η₁ = warmup_target, within warmup = warmup_steps updates.

    Args:
        initial_learning_rate: η₀, finite.
        decay_steps: updates from η₁ to the end, the warm-up not counted.
        alpha: the end as a fraction of η₁, finite.
        name: kept in the configuration.
        warmup_target: η₁, finite, or None for no warm-up.
        warmup_steps: without `warmup_target` it has no effect.

    Reference: I. Loshchilov, F. Hutter, 2017, https://arxiv.org/abs/1608.03983; the warm-up is TensorFlow 2.15's.
    """

    initial_learning_rate: float
    decay_steps: float
    alpha: float = 0.0
    name: str | None = None
    warmup_target: float | None = None
    warmup_steps: float = 0

    def __post_init__(self) -> None:
        self._check("initial_learning_rate", "decay_steps", "alpha", "warmup_steps")
        if self.warmup_target is not None:
            self._check("warmup_target")

    def __call__(self, step: SupportsFloat) -> float:
        """Return η at `step`."""
        s, top = float(step), self.initial_learning_rate
        if self.warmup_target is not None:
            if s < self.warmup_steps:
                return (self.warmup_target - top) * _quotient(s, self.warmup_steps) + top
            s, top = s - self.warmup_steps, self.warmup_target
        return top * _cosine(_quotient(min(s, self.decay_steps), self.decay_steps), self.alpha)


@dataclass(repr=False, eq=False)
class LinearCosineDecay(_Standard):
    """η = η₀ · ((alpha + 1 - s/d) · ½(1 + cos(2π num_periods s/d)) + beta), where d = decay_steps and s = min(t, d).

    Args:
        initial_learning_rate: η₀, finite.
        decay_steps: updates until the end is reached.
        num_periods: of the cosine, within decay_steps.
        alpha: added to the straight line, as a fraction of η₀.
        beta: the end as a fraction of η₀.
        name: kept in the configuration.

    Reference: I. Bello, B. Zoph, V. Vasudevan, Q. V. Le, 2017, https://arxiv.org/abs/1709.07417, as
    tf.keras.experimental.LinearCosineDecay.
    """

    initial_learning_rate: float
    decay_steps: float
    num_periods: float = 0.5
    alpha: float = 0.0
    beta: float = 0.001
    name: str | None = None

    def __post_init__(self) -> None:
        self._check("initial_learning_rate", "decay_steps", "num_periods", "alpha", "beta")

    def __call__(self, step: SupportsFloat) -> float:
        """Return η at `step`."""
        fraction = _quotient(min(float(step), self.decay_steps), self.decay_steps)
        angle = 2 * math.pi * self.num_periods * fraction
        cosine = 0.5 * (1 + math.cos(angle)) if math.isfinite(angle) else math.nan
        return self.initial_learning_rate * ((self.alpha + 1 - fraction) * cosine + self.beta)


@dataclass(repr=False, eq=False)
class CosineDecayRestarts(_Standard):
    """η = η₀ · ((1 - alpha) · ½ m_mulⁱ (1 + cos(π f)) + alpha) in period i, at its fraction f, from 0 to 1.

    Period i takes first_decay_steps · t_mulⁱ updates.

    Args:
        initial_learning_rate: η₀, finite.
        first_decay_steps: length of period 0.
        t_mul: each period is so many times as long as the one before. Below 1 all periods together take
            first_decay_steps / (1 - t_mul) updates, and there is no rate behind them.
        m_mul: each period starts at so many times the rate of the one before.
        alpha: the end of a period as a fraction of η₀, finite.
        name: kept in the configuration.

    Reference: I. Loshchilov, F. Hutter, 2017, https://arxiv.org/abs/1608.03983
    """

    initial_learning_rate: float
    first_decay_steps: float
    t_mul: float = 2.0
    m_mul: float = 1.0
    alpha: float = 0.0
    name: str | None = None

    def __post_init__(self) -> None:
        self._check("initial_learning_rate", "first_decay_steps", "t_mul", "m_mul", "alpha")

    def __call__(self, step: SupportsFloat) -> float:
        """Return η at `step`."""
        f = _quotient(float(step), self.first_decay_steps)
        if self.t_mul == 1:
            i = _whole(f)
            return self.initial_learning_rate * _cosine(f - i, self.alpha, _power(self.m_mul, i))
        grown = f * (self.t_mul - 1)  # by how much the next period is longer than the first one, and how far it is
        if not (self.t_mul >= 0 and -1 < grown < math.inf):
            return math.nan
        i = math.floor(math.log1p(grown) / math.log(self.t_mul)) if self.t_mul else 0
        if f >= self._start(i + 1):  # at a restart the logarithm's last bit may put i on either side
            i += 1
        elif f < self._start(i):
            i -= 1
        fraction = (f - self._start(i)) / _power(self.t_mul, i)
        return self.initial_learning_rate * _cosine(fraction, self.alpha, _power(self.m_mul, i))

    def _start(self, i: int) -> float:
        """First step of period i, in units of first_decay_steps."""
        return (_power(self.t_mul, i) - 1) / (self.t_mul - 1)


def _cosine(fraction: float, alpha: float, scale: float = 1.0) -> float:
    if not math.isfinite(fraction):
        return math.nan
    return (1 - alpha) * 0.5 * scale * (1 + math.cos(math.pi * fraction)) + alpha


STANDARD: dict[str, type[LearningRateSchedule]] = {
    schedule.__name__: schedule
    for schedule in (
        ExponentialDecay, PiecewiseConstantDecay, PolynomialDecay, InverseTimeDecay, CosineDecay, CosineDecayRestarts,
        LinearCosineDecay,
    )
}  # fmt: skip


def serialize(schedule: LearningRateSchedule) -> dict[str, Any]:
    """Return {"class_name": ..., "config": ...}, from which `deserialize` builds an equal schedule."""
    return {"class_name": type(schedule).__name__, "config": schedule.get_config()}


def deserialize(
    config: Mapping[str, Any], custom_objects: Mapping[str, type[LearningRateSchedule]] | None = None
) -> LearningRateSchedule:
    """Build the schedule that `serialize` described.

    Args:
        config: {"class_name": ..., "config": ...}; further keys are ignored, and it is not changed.
        custom_objects: classes of schedules by name; they go before the standard ones.

    Raises:
        ArgumentTypeError: config is no mapping.
        ArgumentValueError: there is no class name in it, or an unknown one.
    """
    if not hasattr(config, "keys"):
        remedy = "pass what serialize returned"
        raise ArgumentTypeError("config", "must be a mapping of a schedule", repr(config), remedy)
    if "class_name" not in config:
        remedy = 'pass {"class_name": ..., "config": {...}}'
        raise ArgumentValueError("config", 'must have the key "class_name"', dict(config), remedy)
    known = {**STANDARD, **(custom_objects or {})}
    name = config["class_name"]
    if name not in known:
        remedy = "add your own class through custom_objects={name: class}"
        raise ArgumentValueError("config class_name", f"must be one of {', '.join(known)}", repr(name), remedy)
    return known[name].from_config(config.get("config", {}))
