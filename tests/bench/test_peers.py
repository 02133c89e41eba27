"""Peers: each runs, or says that it does not offer the workload."""

import numpy as np
import pytest

from gpu_adam.bench import peers
from gpu_adam.bench.clocks import Effort, measure
from gpu_adam.bench.inputs import Inputs
from gpu_adam.bench.workloads import Workload, many
from gpu_adam.devices import HostDevice

ONCE = Effort(repetitions=1, most=1, seconds=0.0, burst_seconds=0.0)
CASES = [
    Workload("dense", many(2, 30)),
    Workload("amsgrad", many(2, 30), amsgrad=True),
    Workload("clipped", many(2, 30), clip=True),
    Workload("float64", many(2, 30), "float64"),
    Workload("float16", many(2, 30), "float16"),
    Workload("bfloat16", many(2, 30), "bfloat16"),
    Workload("complex64", many(2, 30), "complex64", complex_mode="real_imag"),
    Workload("sparse", many(2, 30, 3), indices=8, zipf=True),
]


def test_names_are_those_of_the_table() -> None:
    names = [peer.name for peer in peers.PEERS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("module", ["torch", "optax"])
@pytest.mark.parametrize("workload", CASES, ids=lambda workload: workload.name)
def test_runs_or_is_not_offered(module: str, workload: Workload) -> None:
    pytest.importorskip(module, reason="the extra peers brings it")
    device = HostDevice(threads=1)
    ran = []
    for peer in peers.installed():
        if peer.module == module:
            try:
                candidate = peer.build([Inputs(workload, number) for number in range(2)], device)
            except peers.Unsupported:
                continue
            measure([candidate], ONCE)
            assert candidate.name == peer.name
            ran.append(peer.name)
    assert ran or workload.name == "complex64"
    if module == "torch" and workload.name.endswith("float16"):
        assert {"torch fused", "torch foreach"} <= set(ran)


def test_ours_and_torchs_agree() -> None:
    torch = pytest.importorskip("torch", reason="the extra peers brings it")
    workload = Workload("w", many(1, 50), "float64")
    candidate = peers.pytorch.torch_fused([Inputs(workload, 0)], HostDevice(threads=1))
    step = candidate.steps[0]
    parameters = next(
        cell.cell_contents
        for cell in step.__closure__ or ()
        if isinstance(cell.cell_contents, list)
        and cell.cell_contents
        and isinstance(cell.cell_contents[0], torch.Tensor)
    )
    step()
    moved = parameters[0].detach().numpy() - Inputs(workload, 0).theta(0)
    np.testing.assert_allclose(moved, -0.001 * np.sign(Inputs(workload, 0).gradient(0)), rtol=1e-4)
