"""Cohorts: variables with numbers and a count of steps of their own, all of them in one launch."""

from typing import Any

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentValueError
from gpu_adam.hyperparameters import NO_CLIPPING, Cohort, Flavour
from gpu_adam.kernels import UpdateRule
from gpu_adam.state.adam_state import AdamState
from gpu_adam.step.controller import Controller
from gpu_adam.step.gradients import Incoming
from gpu_adam.step.scalars import Scalars

NAMES = ("learning_rate", "beta_1", "beta_2", "epsilon", "decay", "weight_decay", "l2")
NONE = dict.fromkeys(NAMES, 0.0)
RULE = UpdateRule(adjusts=True)
X = np.linspace(-1, 1, 6)


class Counted:
    """A cohort with its count, and the numbers of a Python Adam that is compared with it."""

    def __init__(self, numbers: tuple[float, ...], *, maximize: bool = False) -> None:
        self.steps = np.zeros(1, np.float32)
        self.cohort = Cohort(self.steps, np.zeros(1, np.intp))
        self.cohort.hyper = dict(zip(NAMES, numbers, strict=True))
        self.cohort.flavour = Flavour(maximize=maximize, epsilon_form="paper")


def adam(x: Any, gradients: list[Any], hyper: dict[str, float], sign: float) -> Any:
    """The paper's Adam in float64, with both kinds of weight decay."""
    m, v = np.zeros_like(x), np.zeros_like(x)
    rate, beta_1, beta_2, epsilon, _, decay, l2 = hyper.values()
    for t, g in enumerate(gradients, 1):
        slope = sign * g + l2 * x
        m, v = beta_1 * m + (1 - beta_1) * slope, beta_2 * v + (1 - beta_2) * slope * slope
        x = x * (1 - rate * decay)
        x = x - rate * (m / (1 - beta_1**t)) / (np.sqrt(v / (1 - beta_2**t)) + epsilon)
    return x


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_each_cohort_has_numbers_and_a_count_of_its_own(device: Device, dtype: str) -> None:
    """One cohort joins at the third step, and one misses every second one; all are updated by one launch.

    An update has about ten roundings, each of up to half the distance from 1 to its neighbour, of numbers of size 1.
    """
    cohorts = [
        Counted((0.1, 0.9, 0.999, 1e-8, 0.0, 0.1, 0.0)),
        Counted((0.02, 0.5, 0.75, 1e-2, 0.0, 0.0, 0.3), maximize=True),
        Counted((0.05, 0.0, 0.9, 0.5, 0.0, 0.0, 0.0)),
    ]
    when = [range(8), range(2, 8), range(0, 8, 2)]
    variables = [Variable(X.astype(dtype)) for _ in cohorts]
    state = AdamState("Adam", "abs2")
    controller = Controller(state, Flavour())
    controller.set_cohorts(variables, RULE, [each.cohort for each in cohorts])
    rng, used = np.random.default_rng(0), [list[Any]() for _ in cohorts]
    for step in range(8):
        chosen = [number for number, steps in enumerate(when) if step in steps]
        gradients = {number: rng.standard_normal(6).astype(dtype) for number in chosen}
        for number in chosen:
            cohorts[number].cohort.hyper["learning_rate"] = 0.1 / (number + 1)
            used[number].append(gradients[number].astype(np.float64))
        controller.step([(device.array(gradients[n]), variables[n]) for n in chosen], RULE, NONE, NO_CLIPPING)
        assert controller._memos._last is not None
        assert len(controller._memos._last.plan.groups) == 1
    assert [int(each.steps[0]) for each in cohorts] == [8, 6, 4]
    for each, variable, gradients_of, begin in zip(cohorts, variables, used, [X] * 3, strict=True):
        sign = -1.0 if each.cohort.flavour.maximize else 1.0
        expected = adam(begin.astype(dtype).astype(np.float64), gradients_of, each.cohort.hyper, sign)
        allowed = float(len(gradients_of) * 10 * np.finfo(dtype).eps)
        np.testing.assert_allclose(variable.numpy(), expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_steps_that_the_device_leaves_out_are_not_counted(device: Device, dtype: str) -> None:
    """Neither where all cohorts take part, nor while one of them joins late, or misses some steps."""
    cohorts = [
        Counted((0.1, 0.9, 0.999, 1e-8, 0.0, 0.1, 0.0)),
        Counted((0.02, 0.5, 0.75, 1e-2, 0.0, 0.0, 0.3), maximize=True),
    ]
    rule = RULE._replace(guarded=True, scaled=True)
    variables = [Variable(X.astype(dtype), device=device) for _ in cohorts]
    state = AdamState("Adam", "abs2")
    controller = Controller(state, Flavour())
    controller.set_cohorts(variables, rule, [each.cohort for each in cohorts])
    rng, used = np.random.default_rng(0), [list[Any]() for _ in cohorts]
    scale = device.array(np.float32(8))
    for step in range(24):
        chosen = [0] if step < 3 or 10 <= step < 14 else [0, 1]
        flag = step in (0, 2, 4, 5, 11, 13, 14, 20)
        gradients = {number: rng.standard_normal(6).astype(dtype) for number in chosen}
        pairs = [(device.array(8 * gradients[n] * (np.inf if flag else 1)), variables[n]) for n in chosen]
        controller.step(pairs, rule, NONE, NO_CLIPPING, Incoming(scale, device.array(np.float32(flag))))
        for number in chosen if not flag else ():
            used[number].append(gradients[number].astype(np.float64))
    controller.guards.settle()
    assert [int(each.steps[0]) for each in cohorts] == [len(gradients_of) for gradients_of in used] == [16, 13]
    for each, variable, gradients_of in zip(cohorts, variables, used, strict=True):
        sign = -1.0 if each.cohort.flavour.maximize else 1.0
        expected = adam(X.astype(dtype).astype(np.float64), gradients_of, each.cohort.hyper, sign)
        allowed = float(len(gradients_of) * 10 * np.finfo(dtype).eps)
        np.testing.assert_allclose(variable.numpy(), expected, rtol=0, atol=allowed)


def test_other_numbers_make_no_launch_anew(device: Device) -> None:
    cohorts = [Counted((0.1, 0.9, 0.999, 1e-8, 0.0, 0.0, 0.0)) for _ in range(2)]
    variables, gradients = ([device_made(device) for _ in cohorts] for device_made in (_variable, _gradient))
    controller = Controller(AdamState("Adam", "abs2"), Flavour())
    controller.set_cohorts(variables, RULE, [each.cohort for each in cohorts])
    plans = set()
    for step in range(4):
        for number, each in enumerate(cohorts):
            each.cohort.hyper["learning_rate"] = 0.1 * step + number
        controller.step(list(zip(gradients, variables, strict=True)), RULE, NONE, NO_CLIPPING)
        assert controller._memos._last is not None
        plans.add(id(controller._memos._last.plan._launches))
    assert len(plans) == 1
    assert not np.array_equal(variables[0].numpy(), variables[1].numpy())


def test_a_cohort_alone_is_passed_by_value(device: Device) -> None:
    """As an optimizer's own numbers are, without an array in device memory."""
    cohort = Counted((0.1, 0.9, 0.999, 1e-8, 0.0, 0.0, 0.0))
    variables, gradients = [_variable(device) for _ in range(3)], [_gradient(device) for _ in range(3)]
    controller = Controller(AdamState("Adam", "abs2"), Flavour())
    controller.set_cohorts(variables, RULE, [cohort.cohort] * 3)
    controller.step(list(zip(gradients, variables, strict=True)), RULE, NONE, NO_CLIPPING)
    assert controller._memos._last is not None
    (update,) = controller._memos._last.plan._launches._updates  # type: ignore[union-attr]
    assert not update.arguments.kind
    assert int(cohort.steps[0]) == 1


def test_a_failing_step_counts_nothing(device: Device) -> None:
    cohort, variable = Counted((0.1, 0.9, 0.999, 1e-8, 0.0, 0.0, 0.0)), _variable(device)
    controller = Controller(AdamState("Adam", "abs2"), Flavour())
    controller.set_cohorts([variable], RULE, [cohort.cohort])
    with pytest.raises(ArgumentValueError):
        controller.step([(device.array(np.ones(7, np.float32)), variable)], RULE, NONE, NO_CLIPPING)
    assert int(cohort.steps[0]) == 0
    np.testing.assert_array_equal(variable.numpy(), X.astype(np.float32))


def test_float32_numbers_are_rounded_once() -> None:
    """1 - 0.999 is 0.001 as torch has it, and not 1 - float32(0.999)."""
    cohort = Counted((0.1, 0.9, 0.999, 1e-8, 0.0, 0.0, 0.0)).cohort
    _, alpha, one_minus_beta_1, one_minus_beta_2, epsilon, *_ = Scalars(NONE, 0).under(cohort).for_real("float32")
    root = np.sqrt(1 - 0.999)
    expected = [0.1 * root / (1 - 0.9), 1 - 0.9, 1 - 0.999, 1e-8 * root]
    assert [alpha, one_minus_beta_1, one_minus_beta_2, epsilon] == [float(np.float32(each)) for each in expected]


@pytest.mark.parametrize("rate", [1e40, -1e40])
def test_a_rate_beyond_float32_is_refused(rate: float) -> None:
    cohort = Counted((rate, 0.9, 0.999, 1e-8, 0.0, 0.0, 0.0)).cohort
    with pytest.raises(ArgumentValueError, match="learning_rate must be finite in float32"):
        Scalars(NONE, 0).under(cohort).for_real("float32")


def _variable(device: Device) -> Variable:
    return Variable(X.astype(np.float32), device=device)


def _gradient(device: Device) -> Any:
    return device.array(np.ones(6, np.float32))
