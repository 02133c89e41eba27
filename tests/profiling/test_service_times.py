"""The measurement of the service: every candidate steps and is timed, and what lasts is compared."""

import json
from pathlib import Path

import pytest

from profiling import service


@pytest.mark.thorough
def test_everything_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    service.main(["--quick", "--soak", "--json", str(file)])
    out = capsys.readouterr().out
    for name in ("memory", "local", "service", "service, +copy", "HTTP", "queue"):
        assert f"| 4 KiB | {name} |" in out
    assert "0 of 10,000 elements differ from what one process makes of the same work" in out
    found = json.loads(file.read_text())
    assert all(each["p50"] > 0 for payload in found["payloads"] for each in payload["times"].values())
    worked = found["soak"]["processes"]
    assert worked["steps"] == max(worked["counts"]) > 3
    assert service.tables(found) in out
