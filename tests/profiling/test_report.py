"""The documents' tables are those of the result files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gpu_adam.bench import own_step
from gpu_adam.bench.clocks import Effort
from gpu_adam.bench.runner import Report, Row, Runner
from gpu_adam.bench.workloads import Workload, many
from gpu_adam.devices import HostDevice
from profiling import report


def test_documents_are_in_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([]) == 0, capsys.readouterr().out


def test_update_rewrites_what_is_stale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- x:begin -->\nold\n<!-- x:end -->\nafter\n")
    monkeypatch.setattr(report, "documents", lambda: {document: {"x": "| new |"}})
    assert report.main([]) == 1
    assert report.main(["--update"]) == 0
    assert document.read_text() == "before\n<!-- x:begin -->\n| new |\n<!-- x:end -->\nafter\n"
    assert report.main([]) == 0


def test_marks_must_be_there() -> None:
    with pytest.raises(SystemExit, match="no marks y"):
        report.between_marks("text", "y", "")


@pytest.mark.parametrize("arguments", [[], ["--update"]])
def test_a_wrong_result_fails_and_is_not_published(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    def wrong(*_: object) -> own_step.Facts:
        raise own_step.WrongResultError("w: variable 0, element 1", "must be 1 within 1e-6", 2, "run the tests")

    monkeypatch.setattr(own_step, "checked", wrong)
    run = Runner(HostDevice(threads=1), Effort())
    run.workload(Workload("w", many(1, 10)))
    run.report.save(tmp_path / "a-machine.json")
    document = tmp_path / "README.md"
    document.write_text("<!-- x:begin -->\nold\n<!-- x:end -->\n")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "documents", lambda: {document: {"x": "new"}})
    assert report.main(arguments) == 1
    assert "differs from the reference: a-machine: w;" in capsys.readouterr().out
    assert "old" in document.read_text()


def _report(device: str, *rows: Row) -> Report:
    machine = {"date": "2000-01-01", "cores": 2, "devices": {device: {"processor": "Model"}}, "versions": {}}
    return Report(machine, device, False, {"bytes_per_second": 200.0}, None, "", list(rows))


def test_what_was_measured_and_what_waits_are_two_tables() -> None:
    """A goal without a figure waits; a figure without a goal only shows; one machine's figure ends the wait of all."""
    mine = Row(report.PLAIN, "gpu_adam", "float32", 1, 1, median=1.0, copy_fraction=0.5)
    peers = Row(report.PLAIN, "torch fused", "float32", 1, 1, median=2.0, times=2.0)
    both = {"a": _report("host", mine), "b": _report("host", mine, peers)}
    measured = report.performance(both, report.FIGURES).splitlines()[2:]
    place = "Model, 2 cores, 2000-01-01 |"
    shown = f"| {report.PLAIN}: {report.COPY} | 0.50 |  | {place}"
    beside = f"| {report.PLAIN}: {report.TIMES} torch fused | 2.00 | at least 1.2 | {place}"
    assert measured == [shown, shown, beside]
    assert report.performance(both, [report.TIMES]).splitlines()[2:] == [beside]
    before = report.waiting({"a": _report("host", mine)}).splitlines()[2:]
    after = report.waiting({"a": _report("host", mine), "b": _report("host", mine, peers)}).splitlines()[2:]
    assert set(before) - set(after) == {f"| {report.PLAIN}: {report.TIMES} torch fused | at least 1.2 | the host |"}
    assert before == report.waiting({}).splitlines()[2:]
    assert len(before) == sum(bool(goal.bound()) for goals in report.GOALS.values() for goal in goals)
    assert len([row for row in after if row.endswith("| a GPU |")]) == len(report.GOALS["cuda"])


def test_variants_of_the_dense_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In order of their dtypes, then of their switches; other kernels, architectures and combinations are left out."""
    names = (
        *("dense bfloat16 gradient=float32 slots=bfloat16 master", "dense bfloat16 master", "dense bfloat16"),
        *("dense float32 amsgrad ema bounded", "dense float32 bounded", "dense float32", "dense float32 clip"),
        *("dense float32 amsgrad bounded", "dense float32 amsgrad", "sparse float32"),
    )
    row = {"bytes per element": 28.0, "registers": 40, "spilled": 0, "loop": "4 LDG.16, 3 STG.16", "shared": 0}
    gpu = {f"{name} {report.SHOWN}": row for name in names} | {"dense float64 sm_75": row, "dense float16 sm_90": {}}
    (tmp_path / "static.json").write_text(json.dumps({"gpu": gpu}))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    figures = "28 | 40 | 0 | 4 LDG.16, 3 STG.16 |"
    assert report.variants().splitlines()[2:] == [
        f"| float32 | float32 |  | plain | {figures}",
        f"| float32 | float32 |  | amsgrad | {figures}",
        f"| float32 | float32 |  | bounded | {figures}",
        f"| float32 | float32 |  | amsgrad ema bounded | {figures}",
        "| float16 | float16 |  | plain |  |  |  |  |",
        f"| bfloat16 | bfloat16 |  | plain | {figures}",
        f"| bfloat16 | bfloat16 |  | master | {figures}",
        f"| bfloat16 | float32 | bfloat16 | master | {figures}",
    ]


def test_goals_name_real_workloads_and_peers() -> None:
    from gpu_adam.bench.peers import PEERS  # noqa: PLC0415
    from gpu_adam.bench.workloads import named  # noqa: PLC0415

    for goal in (goal for goals in report.GOALS.values() for goal in goals):
        assert named(goal.workload) is not None, goal
        assert goal.figure in report.FIGURES, goal
        assert not goal.beside or goal.beside in {each.name for each in PEERS} or named(goal.beside) is not None, goal


@pytest.mark.parametrize("where", ["host", "cuda:0"])
def test_figures(where: str) -> None:
    """On a GPU the kernels' figures are those of the replayed graph, although steps from Python are faster here."""
    replayed = [
        Row("plain", "gpu_adam", "float32", 100, 1, median=4.0, moved_bytes=2800, copy_fraction=0.5),
        Row("many", "gpu_adam", "float32", 50, 10, median=3.0, moved_bytes=1400),
        Row("clipped", "gpu_adam", "float32", 100, 1, median=7.0, moved_bytes=3200),
        Row("failed", "gpu_adam", "float32", 100, 1),
    ]
    called = [replace(row, median=0.1, copy_fraction=2.0) for row in replayed]
    called.append(Row("python", "gpu_adam", "float32", 100, 1, median=1.0, moved_bytes=2800, copy_fraction=0.5))
    peer = Row("plain", "torch fused", "float32", 100, 1, median=6.0, times=1.5)
    graphs = [replace(row, who="gpu_adam, graph") for row in replayed]
    measured = _report(where, *(replayed if where == "host" else called + graphs), peer)

    def figure(name: str, workload: str, beside: str = "") -> float | None:
        return report.FIGURES[name](measured, workload, beside)

    assert figure(report.COPY, "plain") == 0.5
    assert figure(report.TIMES, "plain", "torch fused") == 1.5
    assert figure(report.ELEMENT, "many", "plain") == 1.5
    assert figure(report.CLIPPING, "clipped", "plain") == 1.5
    assert figure(report.COPY, "failed") is figure(report.TIMES, "plain", "thinc") is None
    assert figure(report.ELEMENT, "failed", "plain") is figure(report.CLIPPING, "clipped", "failed") is None
    assert figure(report.COPY, "python") is figure(report.ELEMENT, "python", "plain") is None
    assert figure(report.ELEMENT, "many", "python") is figure(report.CLIPPING, "clipped", "python") is None
