"""The documents' tables are those of the result files."""

import re
from pathlib import Path

import pytest

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

    for workload, _, peer, _ in (goal for goals in report.GOALS.values() for goal in goals):
        assert named(workload) is not None, workload
        assert not peer or peer in {each.name for each in PEERS}
