"""Steps over other variables each time: bits are those of steps that know nothing of earlier ones."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reference import assert_same_bits

import gpu_adam
from gpu_adam import IndexedSlices, Variable
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentValueError
from gpu_adam.step import request as requests

SHAPES = [(3,), (5000,), (2, 3), (0,), (), (4097,), (17, 5)]
KEYWORDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm of each": {"clipnorm": 0.5},
    "global norm": {"global_clipnorm": 0.5},
    "amsgrad, averages": {"amsgrad": True, "use_ema": True, "weight_decay": 0.01},
    "guarded": {"skip_nonfinite": True, "telemetry": True},
}
DTYPES = ("float32", "float64", "complex64")


class Model:
    """Variables of several dtypes with gradients, some in groups of their own, all of which have been stepped."""

    def __init__(self, device: Device, keywords: dict[str, Any]) -> None:
        rng = np.random.default_rng(0)
        made = [rng.standard_normal(shape).astype(dtype) for dtype in DTYPES for shape in SHAPES]
        self.variables = [Variable(x, name=f"v{number}", device=device) for number, x in enumerate(made)]
        self.gradients = [device.array(x * x.dtype.type(0.5)) for x in made]
        self.adam = gpu_adam.Adam(0.1, **keywords)
        self.adam.set_group(self.variables[::4], learning_rate_multiplier=0.5)
        self.step(range(len(made)))

    def step(self, numbers: Any) -> Any:
        """Update some of the variables."""
        return self.adam.apply_gradients([(self.gradients[n], self.variables[n]) for n in numbers])

    def weights(self) -> list[np.ndarray]:
        """All that the steps change."""
        return [array.numpy() for array in (*self.variables, *self.adam.weights)]


def sets(steps: int) -> list[list[int]]:
    """Different subsets of the variables in different orders."""
    rng, count = np.random.default_rng(1), len(SHAPES) * len(DTYPES)
    return [rng.permutation(count)[: rng.integers(1, count)].tolist() for _ in range(steps)]


@pytest.mark.parametrize("keywords", KEYWORDS.values(), ids=KEYWORDS)
def test_a_new_set_of_variables_has_the_bits_of_a_step_prepared_for_it(
    device: Device, keywords: dict[str, Any]
) -> None:
    model, other = Model(device, keywords), Model(device, keywords)
    for numbers in sets(12):
        model.step(numbers)
        other.adam._controller._memos.forget()
        other.step(numbers)
    for number, (one, two) in enumerate(zip(model.weights(), other.weights(), strict=True)):
        assert_same_bits(one, two, f"weight {number}")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the lists of pairs that are read one by one."""
    lengths: list[int] = []
    read: Callable[..., Any] = requests.read

    def counted(pairs: Any, registry: Any) -> Any:
        lengths.append(len(pairs))
        return read(pairs, registry)

    monkeypatch.setattr(requests, "read", counted)
    return lengths


def test_only_the_first_new_set_of_known_variables_is_read(device: Device, reads: list[int]) -> None:
    model = Model(device, {})
    for numbers in ([0, 1, 2], [3, 2], [1, 7, 8], [1, 2], [0]):
        model.step(numbers)
    assert reads == [len(model.variables), 3]


def test_variables_that_come_later_are_in_the_new_sets_after_them(device: Device, reads: list[int]) -> None:
    model = Model(device, {})
    model.step([1, 2])
    x = np.ones(3, np.float32)
    model.variables.append(Variable(x, device=device))
    model.gradients.append(device.array(x))
    new = len(model.variables) - 1
    for numbers in ([new, 0], [1, 2], [new, 1], [2, new], [1, new], [0, 1]):
        model.step(numbers)
    assert reads[1:] == [2, 2, 2]
    expected = gpu_adam.Adam(0.1)  # the count of steps is the optimizer's
    expected.iterations = 2
    variable = Variable(x, device=device)
    for step in (2, 4, 5, 6):
        expected.iterations = step
        expected.apply_gradients([(device.array(x), variable)])
    assert_same_bits(model.variables[new].numpy(), variable.numpy())


def test_what_is_no_plain_step_of_known_variables_is_read(device: Device, reads: list[int]) -> None:
    """Rows, variables that come twice, missing gradients, other dtypes and unknown variables."""
    model = Model(device, {})
    model.step([0, 1])
    model.step([1, 2])
    before, g, v = len(reads), model.gradients, model.variables
    rows = IndexedSlices(device.array(np.ones((1, 3), np.float32)), device.array(np.zeros(1, np.int64)))
    model.adam.apply_gradients([(rows, v[2]), (g[0], v[0])])
    model.adam.apply_gradients([(g[0], v[0]), (g[0], v[0])])
    with pytest.warns(UserWarning, match="v1"):
        model.adam.apply_gradients([(g[0], v[0]), (None, v[1])])
    model.adam.apply_gradients([(g[0].astype(np.float16), v[0])])
    model.adam.apply_gradients([(g[0], Variable(np.ones(3, np.float32), device=device))])
    assert len(reads) == before + 5
    with pytest.raises(ArgumentValueError, match="v1"):
        model.adam.apply_gradients([(g[0], v[1])])


def test_variables_that_overlap_may_be_updated_by_turns(device: Device) -> None:
    memory = device.array(np.ones(12, np.float32))
    variables = [memory[:8], memory[4:], device.array(np.ones(4, np.float32))]
    gradients = [device.array(np.ones(x.shape, np.float32)) for x in variables]
    adam = gpu_adam.Adam(0.5)
    for numbers in ([0], [1], [2], [0, 2], [2, 1], [2, 0], [1, 2]):
        adam.apply_gradients([(gradients[n], variables[n]) for n in numbers])
    moved = 1 - device.numpy(memory)
    assert (moved > 1).all()
    np.testing.assert_allclose(moved[4], moved[0] + moved[8], rtol=1e-6)  # of six roundings
    with pytest.raises(ArgumentValueError, match="overlap"):
        adam.apply_gradients([(gradients[n], variables[n]) for n in (0, 1)])
