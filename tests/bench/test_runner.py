"""The whole run: rows and report, what is not measured, what is wrong."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gpu_adam.bench import facts, host_costs, own_step, peers
from gpu_adam.bench.clocks import Candidate, Effort, WallClock
from gpu_adam.bench.runner import Report, Row, Runner
from gpu_adam.bench.workloads import Workload, many
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentValueError

LITTLE = Effort(repetitions=2, most=2, seconds=0.0, burst_seconds=0.0, sets=2)
DENSE = Workload("dense", many(2, 100))


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One peer that works, one that fails, one that does not offer anything."""

    def fails(*_: object) -> Candidate:
        raise RuntimeError("no luck\nat all")

    def refuses(*_: object) -> Candidate:
        raise peers.Unsupported

    works = peers.Peer("works", "json", lambda sets, device: Candidate("works", [int], WallClock(int)))
    rest = [("fails", "json", fails), ("refuses", "json", refuses), ("absent", "nope", fails)]
    monkeypatch.setattr(peers, "PEERS", [works, *(peers.Peer(*row) for row in rest)])


@pytest.mark.usefixtures("peer")
def test_rows_of_a_workload(device: Device) -> None:
    run = Runner(device, LITTLE)
    run.copy(2**16)
    rows = {row.who: row for row in run.workload(DENSE)}
    graph = set() if device.name == "host" else {"gpu_adam, graph"}
    assert set(rows) == {"gpu_adam", "works", "fails"} | graph
    mine, works = rows["gpu_adam"], rows["works"]
    assert mine.median is not None
    assert works.median is not None
    assert mine.moved_bytes == 2 * 100 * 28
    assert mine.bytes_per_second == pytest.approx(mine.moved_bytes / mine.median)
    assert mine.copy_fraction == pytest.approx(mine.bytes_per_second / run.report.copy["bytes_per_second"])
    assert works.times == pytest.approx(works.median / mine.median)
    assert (mine.times, mine.launches, mine.repetitions, mine.sets) == (None, 1, 2, 2)
    assert rows["fails"].note == "failed: RuntimeError: no luck"
    assert rows["fails"].median is None
    assert run.report.rows == list(rows.values())


def test_bursts_are_long_where_a_clock_starts_on_an_idle_device(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours by our clock, a peer's by its own."""
    step = 1e-4

    def candidate(name: str) -> Candidate:
        steps: list[int] = []

        def clock(run: Callable[[], None]) -> float:
            steps.clear()
            run()
            return len(steps) * step

        return Candidate(name, [functools.partial(steps.append, 0)], clock)

    monkeypatch.setattr(own_step, "candidates", lambda sets, device: [functools.partial(candidate, own_step.NAME)])
    monkeypatch.setattr(peers, "PEERS", [peers.Peer("peer", "json", lambda sets, device: candidate("peer"))])
    run = Runner(device, Effort(repetitions=2, most=2, seconds=0.0, sets=1))
    run.copy(2**16)
    least = 2e-4 if device.name == "host" else 2.5e-2
    rows = run.workload(DENSE)
    assert [row.who for row in rows] == ["gpu_adam", "peer"]
    assert [row.burst * step for row in rows] == pytest.approx([least] * 2)


def test_what_does_not_fit_is_not_measured(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "free_bytes", lambda device: 1000)
    (row,) = Runner(device, LITTLE).workload(DENSE)
    assert row.note.startswith("not measured: needs ")


@pytest.mark.usefixtures("peer")
def test_peers_whose_copies_do_not_fit_are_not_measured(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "free_bytes", lambda device: 10_000)
    run = Runner(device, LITTLE)
    run.copy(2**16)
    *mine, left_out = run.workload(DENSE)
    assert all(row.who.startswith("gpu_adam") and row.median for row in mine)
    assert (left_out.who, left_out.median) == ("peers", None)
    assert left_out.note.startswith("not measured: needs ")


def test_a_wrong_kernel_is_not_timed(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> own_step.Facts:
        raise own_step.WrongResultError("w: variable 0, element 1", "must be 1 within 1e-6", 2, "run the tests")

    monkeypatch.setattr(own_step, "checked", wrong)
    (row,) = Runner(device, LITTLE).workload(DENSE)
    assert row.is_wrong
    assert row.note.startswith("WRONG, not timed: w: variable 0")
    assert row.median is None


@pytest.mark.usefixtures("peer")
def test_a_report_is_read_as_it_was_written(device: Device, tmp_path: Path) -> None:
    run = Runner(device, LITTLE, quick=True)
    run.copy(2**16)
    run.workload(DENSE)
    run.report.save(tmp_path / "r.json")
    assert Report.load(tmp_path / "r.json") == run.report
    assert "kernel cache" not in (tmp_path / "r.json").read_text()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "rows": 3}', '{"format": 1}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ArgumentValueError, match="must be a result of gpu-adam bench --json"):
        Report.load(tmp_path / "r.json")


@pytest.mark.thorough
def test_costs_beside_the_kernels(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_costs, "COUNTS", (1, 3))
    overhead = host_costs.python_overhead(device, LITTLE)
    assert set(overhead["variables"]) == {"1", "3"}
    assert set(overhead["per_variable"]) == {"same", "new"}
    if device.name == "host":
        one = Effort(repetitions=1, most=1, seconds=0.0, burst_seconds=0.0)
        assert set(host_costs.first_step(device, one)) == {"cold", "warm", "numpy"}
    json.dumps(overhead)


def test_cache_sizes_are_read() -> None:
    assert [facts._cache_size(text) for text in ("48K\n", "2M", "100", "?")] == [49152, 2**21, 100, 2**26]
    assert Row("w", "who", "float32", 1, 1).median is None
