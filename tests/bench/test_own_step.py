"""Our own step: checked against the reference before it is timed, with its facts."""

from typing import Any

import numpy as np
import pytest

from gpu_adam import kernels
from gpu_adam.bench import own_step
from gpu_adam.bench.clocks import Effort, measure
from gpu_adam.bench.inputs import Inputs
from gpu_adam.bench.workloads import Workload, many
from gpu_adam.devices import Device

LITTLE = Effort(repetitions=2, most=2, seconds=0.0, burst_seconds=0.0, sets=2)
CASES = [
    Workload("dense", many(3, 1000)),
    Workload("sampled", many(1, 70_000)),
    Workload("amsgrad", many(2, 100), amsgrad=True),
    Workload("clipped", many(2, 100), clip=True),
    Workload("complex parts", many(2, 100), "complex64", complex_mode="real_imag"),
    Workload("sparse", many(2, 100, 7), indices=64, zipf=True),
    *(Workload(dtype, many(2, 100), dtype) for dtype in kernels.DTYPES),
]


@pytest.mark.parametrize("workload", CASES, ids=lambda workload: workload.name)
def test_right_results_pass_and_their_facts_are_counted(device: Device, workload: Workload) -> None:
    facts = own_step.checked(workload, device)
    wide = kernels.dtype_named(workload.dtype).itemsize
    real = np.dtype(kernels.DTYPES[workload.dtype].real_dtype).itemsize
    if workload.complex_mode == "real_imag":
        real = wide
    slots = (real if workload.dtype in kernels.HALVES else wide) + real * (2 if workload.amsgrad else 1)
    count = len(workload.shapes())
    read = count * 64 * (7 * wide + 8) if workload.indices else workload.elements * wide * (2 if workload.clip else 1)
    assert facts.moved_bytes == read + 2 * workload.elements * (wide + slots)
    assert facts.launches == (2 * count if workload.indices else 2 if workload.clip else 1)
    assert facts.extra_bytes is not None


def test_candidates_run_over_all_sets(device: Device) -> None:
    sets = [Inputs(CASES[0], number) for number in range(2)]
    made = [make() for make in own_step.candidates(sets, device)]
    assert [each.name for each in made] == (["gpu_adam"] if device.name == "host" else ["gpu_adam", "gpu_adam, graph"])
    measure(made, LITTLE)
    for candidate in made:
        assert len(candidate.steps) == 2
        assert candidate.summary.repetitions == 2


def test_a_replayed_step_updates(device: Device) -> None:
    if device.name == "host":
        return
    sets = [Inputs(CASES[0], 0)]
    *_, replayed = (make() for make in own_step.candidates(sets, device))
    step: Any = replayed.steps[0]
    before = step._kept.variables[0].numpy()
    replayed.clock(step)
    assert (step._kept.variables[0].numpy() != before).all()
