"""Steps of several ranks: that every candidate is one and is timed, and what the model of larger machines says."""

import json
import re
from pathlib import Path

import pytest
from communicators import jobs

from profiling import distributed
from profiling.distributed import GIB, Machine, Model


def test_a_job_measures_everything(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    jobs.launcher()
    file = tmp_path / "results.json"
    distributed.main(["--quick", "--json", str(file)])
    out = capsys.readouterr().out
    for title in ("steps, large", "steps, many", "stages", "overlap", "memory, of the formula"):
        assert f"| {title} | 2 ranks |" in out
    (job,) = json.loads(file.read_text())["jobs"]
    assert {"ShardedAdam", "ShardedAdam, deterministic", "DataParallelAdam", "MPI alone"} < set(job["steps, large"])
    seconds = [each for kind in ("steps, large", "stages", "overlap") for each in job[kind].values()]
    assert min(seconds) > 0
    stages = dict(job["stages"])
    assert stages.pop("step") > max(stages.values())


def test_memory_is_what_the_formula_says(tmp_path: Path) -> None:
    script = """
from gpu_adam.communicators import Mpi
from profiling.distributed import Shapes, memory
with Mpi(device="host") as communicator:
    for name, (held, formula) in memory(communicator, Shapes(8, 250_000)).items():
        assert 0.99 < held / formula < 1.02, (name, held, formula)
    print("done")
"""
    ended = jobs.run(tmp_path, 3, script)
    assert ended.status == 0, ended
    assert ended.out.split() == ["done"] * 3


def test_bytes_that_cross() -> None:
    """Of 4 ranks each gives three quarters of its gradients away, and gets three quarters of the parameters."""
    assert distributed.crossing({"ranks": 4, "elements": 1000}) == 2 * 3000
    assert distributed.crossing({"ranks": 1, "elements": 1000}) == 0


def test_rings_cross_a_node_once_and_all_to_alls_with_all_bytes() -> None:
    machine = Machine(nvlink=100.0, card=10.0, base=0.5, near=0.001, far=0.01)
    assert machine.ring(800, 8, 2) == pytest.approx((700 / 100, 2 * (0.5 + 7 * 0.001)))
    # 8 cards of 10 are slower than NVLink; 15 of 16 parts, 14 steps within nodes and one between them.
    assert machine.ring(800, 16, 1) == pytest.approx((750 / 80, 0.5 + 14 * 0.001 + 0.01))
    assert machine.all_to_all(800, 8, 1) == pytest.approx((700 / 100, 0.5 + 0.001))
    assert machine.all_to_all(800, 16, 3) == pytest.approx((400 / 10, 3 * (0.5 + 0.01)))


def test_the_model_names_what_limits() -> None:
    rows = {(row[0], row[1]): row for row in distributed.model()}
    assert rows["1.5 G float32", "8"][-1] == "gradients' way"
    assert rows["1.5 G float32", "1024"][-1] == "latency of rings"
    assert rows["7 G bfloat16, masters", "64"][-1] == "a network card of each"
    assert all(len(row) == len(distributed.MODEL_HEADER) for row in rows.values())


def test_a_model_that_does_not_fit_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "MODELS", (Model("large", 8 * GIB, 4, 8, direct=False),))
    ((_, gpus, memory, *_),) = distributed.model(gpus=[8])
    assert gpus == "8"
    assert re.fullmatch(r"\d+\.\d GB, too much", memory)
