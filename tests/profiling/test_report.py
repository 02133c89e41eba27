"""The documents' tables are those of the result files."""

import re
from pathlib import Path

import pytest

from gpu_adam.bench.runner import Report, Row
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


def test_without_results_nothing_is_claimed() -> None:
    rows = report.performance({}).splitlines()[2:]
    assert len(rows) == sum(len(goals) for goals in report.GOALS.values())
    assert all(re.search(r"\| not measured \|", row) for row in rows)


def test_goals_name_real_workloads_and_peers() -> None:
    from gpu_adam.bench.peers import PEERS  # noqa: PLC0415
    from gpu_adam.bench.workloads import named  # noqa: PLC0415

    for goal in (goal for goals in report.GOALS.values() for goal in goals):
        assert named(goal.workload) is not None, goal
        assert goal.figure in report.FIGURES, goal
        assert not goal.beside or goal.beside in {each.name for each in PEERS} or named(goal.beside) is not None, goal


def test_figures() -> None:
    rows = [
        Row("plain", "gpu_adam", "float32", 100, 1, median=4.0, moved_bytes=2800, copy_fraction=0.5),
        Row("plain", "gpu_adam, graph", "float32", 100, 1, median=2.0, moved_bytes=2800, copy_fraction=1.0),
        Row("plain", "torch fused", "float32", 100, 1, median=6.0, times=1.5),
        Row("many", "gpu_adam", "float32", 50, 10, median=3.0, moved_bytes=1400),
        Row("clipped", "gpu_adam", "float32", 100, 1, median=9.0, moved_bytes=3200),
        Row("clipped", "gpu_adam, graph", "float32", 100, 1, median=5.0, moved_bytes=3200),
        Row("failed", "gpu_adam", "float32", 100, 1),
    ]
    measured = Report({}, "host", False, {"bytes_per_second": 200.0}, None, "", rows)

    def figure(name: str, workload: str, beside: str = "") -> float | None:
        return report.FIGURES[name](measured, workload, beside)

    assert figure(report.COPY, "plain") == 1.0
    assert figure(report.TIMES, "plain", "torch fused") == 1.5
    assert figure(report.ELEMENT, "many", "plain") == 3.0
    assert figure(report.CLIPPING, "clipped", "plain") == 1.5
    assert figure(report.COPY, "failed") is figure(report.TIMES, "plain", "thinc") is None
    assert figure(report.ELEMENT, "failed", "plain") is figure(report.CLIPPING, "clipped", "failed") is None
