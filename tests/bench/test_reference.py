"""The reference's tolerance: rounding stays within, what is computed wrongly does not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpu_adam import kernels
from gpu_adam.bench import own_step
from gpu_adam.bench.inputs import Inputs
from gpu_adam.bench.reference import Reference
from gpu_adam.bench.workloads import Workload, many
from gpu_adam.devices import Device

FEW_ROWS = many(26, 4, 16)  # of 128 indices, as the smallest tables of the DLRM have them
ROUNDED = [
    *(Workload(f"few rows {dtype}", FEW_ROWS, dtype, indices=128, zipf=True) for dtype in kernels.DTYPES),
    Workload("few rows amsgrad", FEW_ROWS, amsgrad=True, indices=128, zipf=True),
    Workload("few rows clipped", FEW_ROWS, clip=True, indices=128, zipf=True),
    Workload("few rows in parts", FEW_ROWS, "complex64", complex_mode="real_imag", indices=128, zipf=True),
    Workload("one row", many(2, 1, 50), indices=1000),
    *(Workload(f"dense {dtype} amsgrad", many(3, 3000), dtype, amsgrad=True) for dtype in kernels.DTYPES),
]
DENSE = Workload("dense", many(2, 100))
SPARSE = Workload("sparse", many(2, 4, 16), indices=128, zipf=True)


@pytest.mark.parametrize("workload", ROUNDED, ids=lambda workload: workload.name)
def test_rounding_is_within_the_tolerance(device: Device, workload: Workload) -> None:
    own_step.checked(workload, device)


def _with(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Inputs], None]:
    """What changes a method of inputs for variable 1."""

    def put(inputs: Inputs) -> None:
        right = getattr(inputs, name)
        setattr(inputs, name, lambda k: change(right(k)) if k == 1 else right(k))

    return put


def _first(change: Callable[[Any], Any]) -> Callable[[np.ndarray], np.ndarray]:
    """What changes the first element or row."""
    return lambda array: np.concatenate([change(array[:1]), array[1:]]).astype(array.dtype)


FAULTS: dict[str, tuple[Workload, Callable[[Inputs], None]]] = {
    "a gradient": (DENSE, _with("gradient", lambda g: g * np.float32(1 + 1e-4))),
    "one element": (DENSE, _with("gradient", _first(lambda g: g * 1.001))),
    "a start": (DENSE, _with("theta", lambda theta: theta + np.float32(1e-6))),
    "one of many rows": (SPARSE, _with("values", _first(lambda row: row * 1.1))),
    "a lost row": (SPARSE, _with("values", _first(np.zeros_like))),
    "another row": (SPARSE, _with("indices", _first(lambda index: (index + 1) % 4))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_other_values_are_not(device: Device, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    workload, put = FAULTS[fault]

    def faulty(inputs: Inputs, *rest: Any) -> own_step.OwnStep:
        ours = Inputs(inputs.workload, inputs.number)
        put(ours)
        return right(ours, *rest)

    right = own_step.OwnStep
    monkeypatch.setattr(own_step, "OwnStep", faulty)
    with pytest.raises(own_step.WrongResultError, match=r"variable 1, element \d+ must be .* are off"):
        own_step.checked(workload, device)


@pytest.mark.parametrize("name", ["learning_rate", "beta_1", "beta_2", "epsilon"])
@pytest.mark.parametrize("workload", [DENSE, SPARSE], ids=lambda workload: workload.name)
def test_other_hyperparameters_are_not(
    device: Device, monkeypatch: pytest.MonkeyPatch, workload: Workload, name: str
) -> None:
    right = own_step.OwnStep
    other: Any = lambda inputs, device, hyper: right(inputs, device, {**hyper, name: hyper[name] * 1.001})  # noqa: E731
    monkeypatch.setattr(own_step, "OwnStep", other)
    with pytest.raises(own_step.WrongResultError, match="are off"):
        own_step.checked(workload, device)


def test_the_gradient_has_the_error_of_a_sum() -> None:
    """Count x unit x sum of magnitudes, row by row; nothing where no index points."""
    workload = Workload("w", many(1, 8, 2), indices=9)
    inputs = Inputs(workload, 0)
    indices, values = inputs.indices(0), inputs.values(0).astype(np.float64)
    gradient, error = Reference(inputs)._gradient(0, slice(0, 16))
    for row in range(8):
        mine = values[indices == row]
        np.testing.assert_allclose(gradient.reshape(8, 2)[row], mine.sum(0))
        np.testing.assert_allclose(error.reshape(8, 2)[row], len(mine) * 2.0**-24 * np.abs(mine).sum(0), rtol=1e-6)
    assert 1 < len(set(indices)) < 8
