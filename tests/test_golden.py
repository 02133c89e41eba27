"""Trajectories recorded from TensorFlow: the same bits where the operations are the same, else near, by derived bounds.

Cases of float16 and bfloat16 are not replayed: the reference rounds every operation to 16 bits, the kernels compute in
float32 and round once. tests/test_halves.py compares them with NumPy.
"""

from contextlib import nullcontext
from typing import Any

import golden
import numpy as np
import numpy.typing as npt
import pytest
import reference
from reference import assert_same_bits

import gpu_adam
from gpu_adam.devices import Device, find_device

Case = tuple[dict[str, Any], golden.Arrays, golden.Arrays, golden.Arrays | None]

# Relative, and as a part of the largest element: where operations come in another order (the reference's sparse update,
# its norms), elements near zero are differences of larger numbers.
TOLERANCE = {"float32": 1e-6, "float64": 1e-14}
# The reference's schedules compute in float32, with a power and a cosine of their own.
RATE_TOLERANCE = 5e-6
# Emulated kernels run a millionth as fast: there the first checkpoint from this step on is the last.
EMULATED_STEPS = 10


def dtypes_of(case: dict[str, Any]) -> set[str]:
    return {variable["dtype"] for variable in case["vars"]}


ALL = list(golden.load())
CASES = [case for case in ALL if dtypes_of(case[0]) <= set(TOLERANCE)]


def has_schedule(case: dict[str, Any]) -> bool:
    return "__schedule__" in str(case["config"].get("learning_rate"))


def is_exact(case: dict[str, Any]) -> bool:
    """Whether the reference does the same operations in the same order on m and v."""
    is_dense = all(variable["grad"] == "dense" for variable in case["vars"])
    return is_dense and not {"clipnorm", "global_clipnorm"} & set(case["config"]) and dtypes_of(case) <= set(TOLERANCE)


class Replay:
    """A recorded case on a device."""

    def __init__(self, case: dict[str, Any], inputs: golden.Arrays, device: Device) -> None:
        self.case, self.inputs, self.device, self.done = case, inputs, device, 0
        specs = enumerate(case["vars"])
        self.variables = [gpu_adam.Variable(inputs[f"x0/{k}"], name=spec["name"], device=device) for k, spec in specs]
        config = {"learning_rate": 0.001, "beta_1": 0.9, "beta_2": 0.999, **case["config"]}
        with pytest.warns(DeprecationWarning, match="lr") if "lr" in config else nullcontext():
            self.optimizer = gpu_adam.Adam(**{key: self._hyper(key, value) for key, value in config.items()})
        if case.get("iterations0"):
            self.optimizer.iterations = case["iterations0"]

    def _hyper(self, key: str, value: Any) -> Any:
        """A recorded hyperparameter; the reference rounds Python floats to float32, whatever the variables are."""
        kind, recorded = next(iter(value.items())) if isinstance(value, dict) else ("", value)
        if kind == "__schedule__":
            return gpu_adam.schedules.deserialize(recorded)
        if kind == "__per_step__":
            return lambda: float(np.float32(recorded[self.done % len(recorded)]))
        if kind in ("__np__", "__tensor__"):
            return np.dtype(recorded[0]).type(recorded[1])
        rounded = key in ("learning_rate", "lr", "beta_1", "beta_2", "decay")
        return float(np.float32(value)) if rounded else value

    def step(self) -> None:
        """Take the next step."""
        row = self.done % self.case["period"]
        self.optimizer.apply_gradients(
            [(self._gradient(number, row), self.variables[k]) for number, k in enumerate(self.case["pairs"])]
        )
        self.done += 1

    def _gradient(self, number: int, row: int) -> Any:
        if f"g/{number}" in self.inputs:
            return self.device.array(self.inputs[f"g/{number}"][row])
        count = int(self.inputs[f"gn/{number}"][row])
        values, indices = (self.inputs[f"{part}/{number}"][row][:count] for part in ("gv", "gi"))
        return gpu_adam.IndexedSlices(self.device.array(values), self.device.array(indices))


def assert_close(actual: Any, expected: Any, slack: Any, what: str) -> None:
    """Within the dtype's tolerance, and `slack`."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    if expected.dtype.kind == "i":
        assert actual == expected, what
        return
    tolerance = TOLERANCE[expected.dtype.name]
    bound = tolerance * (np.abs(expected) + np.abs(expected).max(initial=0)) + slack
    over = np.abs(actual - expected) / np.where(bound == 0, np.finfo(expected.dtype).tiny, bound)
    assert over.max(initial=0) <= 1, f"{what}: {over.max():.3g} times as far as rounding explains"


def test_most_cases_are_replayed() -> None:
    assert len(ALL) == 88
    assert len(CASES) >= 62
    assert sum(is_exact(case) and not has_schedule(case) for case, *_ in CASES) >= 18


@pytest.mark.parametrize("recorded", CASES, ids=[case["name"] for case, *_ in CASES])
def test_recorded_trajectory(recorded: Case, device: Device) -> None:
    case, inputs, outputs, later = recorded
    outputs = outputs if later is None else later
    checkpoints = case["checkpoints"]
    if getattr(device.xp, "__emulated__", False):
        last = next((step for step in checkpoints if step >= EMULATED_STEPS), checkpoints[-1])
        checkpoints = [step for step in checkpoints if step <= last]
    replay = Replay(case, inputs, device)
    # A rate that is off by a relative d_t moves the variable by d_t times its step: at the end by the sum of these.
    paths: list[npt.NDArray[Any]] = [np.zeros(variable.shape) for variable in replay.variables]
    while replay.done < checkpoints[-1]:
        before = [variable.numpy() for variable in replay.variables] if has_schedule(case) else []
        replay.step()
        for path, old, variable in zip(paths, before, replay.variables, strict=False):
            np.add(path, np.abs(variable.numpy() - old), out=path)
        if replay.done in checkpoints:
            _compare(replay, outputs, paths)
    # (A counter made before the first step is "iter" there.)
    names = [name.removesuffix(":0").removeprefix("Adam/") for name in case["weight_names"]]
    assert [weight.name for weight in replay.optimizer.weights] == [f"Adam/{name}" for name in names]


def _compare(replay: Replay, outputs: golden.Arrays, paths: list[npt.NDArray[Any]]) -> None:
    case, step = replay.case, replay.done
    for k, (variable, path) in enumerate(zip(replay.variables, paths, strict=True)):
        what = f"{case['name']}, step {step}, variable {k}"
        expected = outputs[f"v/{step}/{k}"]
        if is_exact(case) and not has_schedule(case):
            assert_same_bits(variable.numpy(), expected, what)
        else:
            assert_close(variable.numpy(), expected, RATE_TOLERANCE * path, what)
    weights = replay.optimizer.get_weights()
    assert len(weights) == len(case["weight_names"])
    for j, weight in enumerate(weights):
        what = f"{case['name']}, step {step}, {case['weight_names'][j]}"
        if is_exact(case):  # the rate has no part in m and v
            assert_same_bits(weight, outputs[f"w/{step}/{j}"], what)
        else:
            assert_close(weight, outputs[f"w/{step}/{j}"], 0, what)


def test_the_oracle_of_other_tests_has_the_recorded_bits() -> None:
    """The NumPy Adam that they compare with is the recorded one."""
    plain = [case for case in CASES if is_exact(case[0]) and not has_schedule(case[0]) and "clipvalue" not in case[0]]
    for case, inputs, outputs, later in plain:
        config = {name: case["config"][name] for name in case["config"] if name != "lr"}
        config["learning_rate"] = case["config"].get("lr", config.get("learning_rate", 0.001))
        rounded = {"beta_1": 0.9, "beta_2": 0.999, **config}
        rounded |= {name: float(np.float32(rounded[name])) for name in ("learning_rate", "beta_1", "beta_2")}
        initial = [inputs[f"x0/{k}"] for k in range(len(case["vars"]))]
        oracle = reference.Adam(initial, iterations=case.get("iterations0") or 0, **rounded)
        last = case["checkpoints"][-1]
        for step in range(last):
            row = step % case["period"]
            oracle.step_pairs((inputs[f"g/{number}"][row], k) for number, k in enumerate(case["pairs"]))
        for k, found in enumerate(oracle.variables):
            expected = (outputs if later is None else later)[f"v/{last}/{k}"]
            assert_same_bits(found, expected, f"{case['name']}, variable {k}")


def test_config_after_a_recorded_case() -> None:
    """The reference's keys; its values, which it has rounded to float32."""
    for case, inputs, *_ in CASES:
        replay = Replay({**case, "steps": 1}, inputs, find_device("host"))
        replay.step()
        recorded, config = case["final_config"], replay.optimizer.get_config()
        assert set(config) == set(recorded), case["name"]
        for key in ("beta_1", "beta_2", "epsilon", "amsgrad", "name", "clipnorm", "clipvalue", "global_clipnorm"):
            if key in recorded:
                value = recorded[key]["__np__"][1] if isinstance(recorded[key], dict) else recorded[key]
                assert config[key] == pytest.approx(value, rel=1e-7) if key != "name" else config[key] == value
