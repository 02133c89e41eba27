"""`gpu-adam bench` and `gpu-adam profile`: what they print and write, and a sentence for every mistake."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gpu_adam.__main__ import main
from gpu_adam.bench import commands, ncu, own_step, peers
from gpu_adam.bench.clocks import Effort
from gpu_adam.bench.page import page
from gpu_adam.bench.runner import Report, Row, Runner
from gpu_adam.bench.tables import comparison_table, terminal_table
from gpu_adam.bench.workloads import Workload, many, workloads
from gpu_adam.devices import Device

ROOT = Path(__file__).parents[2]
LITTLE = Effort(repetitions=2, most=2, seconds=0.0, burst_seconds=0.0, sets=2)
SMALL = [Workload("little", many(2, 100), quick=True), Workload("little sparse", many(1, 50, 4), indices=9)]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return int(caught.value.code or 0), out, err


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Little work, no peers."""
    copy = Runner.copy
    for name, value in {"workloads": lambda: SMALL, "QUICK": LITTLE, "FULL": LITTLE}.items():
        monkeypatch.setattr(commands, name, value)
    monkeypatch.setattr(Runner, "copy", lambda self: copy(self, 2**16))
    monkeypatch.setattr(peers, "PEERS", [])
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.mark.thorough
@pytest.mark.usefixtures("small")
def test_bench_prints_writes_and_compares(device: Device, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--device", device.name)
    status, out, _ = run(capsys, "bench", *where, "--only", "little", "--json", "a.json")
    assert status == 0
    for text in ("little sparse", "gpu_adam", "GB/s", "of copy", "extra memory", "no telemetry"):
        assert text in out
    assert {row.workload for row in Report.load(Path("a.json")).rows} == {"little", "little sparse"}
    first = Report.load(Path("a.json")).rows
    assert run(capsys, "bench", *where, "--only", "sparse", "--json", "a.json")[0] == 0
    again = Report.load(Path("a.json")).rows
    assert [(row.workload, row.who) for row in again] == [(row.workload, row.who) for row in first]
    replaced = [after != before for before, after in zip(first, again, strict=True)]
    assert replaced == [row.workload == "little sparse" for row in first]
    status, _, err = run(capsys, "bench", *where, "--only", "little", "--quick", "--json", "a.json")
    assert status == 1
    assert "--json must be a file of the same list of workloads for --only (got full; now --quick)" in err
    assert Report.load(Path("a.json")).rows == again
    assert not Path("a.json.incomplete").exists()
    pytest.importorskip("matplotlib", reason="the extra bench brings it")
    more = ("--only", "little", "--quick", "--html", "p.html", "--compare", "a.json")
    status, out, _ = run(capsys, "bench", *where, *more)
    assert status == 0
    assert "beside the run of" in out
    text = Path("p.html").read_text()
    assert text.count("<svg") == 1  # no peers, no figure of them
    assert not re.search(r"(src|href)=\"http", text)
    ElementTree.fromstring(
        text.replace("<!doctype html>", "")
        .replace('<meta charset="utf-8">', "")
        .replace('<meta name="viewport" content="width=device-width, initial-scale=1">', "")
    )


def _report(*rows: Row) -> Report:
    machine = {"date": "2000-01-01", "devices": {}, "versions": {}}
    return Report(machine, "host", False, {"bytes_per_second": 1e9, "how": "copied"}, None, "", list(rows))


OURS = Row("w", "gpu_adam", "float32", 1, 1, median=1.0, moved_bytes=28, bytes_per_second=28.0)
PEER = Row("w", "a peer", "float32", 1, 1, median=2.0, times=2.0)
TITLES = ["How near the memory's limit", "Beside whom"]


@pytest.mark.parametrize(
    ("rows", "titles"),
    [
        ([OURS, PEER], TITLES),
        ([OURS], TITLES[:1]),
        ([replace(OURS, who="gpu_adam, graph"), replace(PEER, median=None, times=None, note="failed: x")], TITLES[:1]),
        ([replace(OURS, median=None, bytes_per_second=None, note="not measured: x")], []),
    ],
    ids=["with a peer", "alone", "beside a peer that failed", "nothing timed"],
)
def test_a_page_has_no_empty_figures(rows: list[Row], titles: list[str]) -> None:
    pytest.importorskip("matplotlib", reason="the extra bench brings it")
    text = page(_report(*rows))
    figures = re.findall(r"<figure>(<svg.*?</svg>)\s*</figure>", text, re.S)
    assert len(figures) == text.count("<figure>") == len(titles)
    for figure, title in zip(figures, titles, strict=True):
        assert f">{title}<" in figure
    assert all(row.note in text for row in rows)


def test_runs_without_a_row_in_common_say_so() -> None:
    pytest.importorskip("matplotlib", reason="the extra bench brings it")
    mine, other = _report(OURS), _report(replace(OURS, workload="another"))
    assert comparison_table(mine, other).caption == "Nothing was measured in both runs."
    assert "<p>Nothing was measured in both runs.</p>" in page(mine, other)
    assert comparison_table(mine, mine).caption is None
    assert "Nothing was measured" not in page(mine, mine)
    assert "<td>w</td><td>gpu_adam</td><td>1 s</td><td>1 s</td><td>1.00</td>" in page(mine, mine)


@pytest.mark.usefixtures("small")
def test_only_is_a_regular_expression(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "bench", "--device", "host", "--only", "^little$", "--json", "a.json")[0] == 0
    assert [row.workload for row in Report.load(Path("a.json")).rows] == ["little"]


def test_the_documented_expression_finds_every_size_of_one_tensor() -> None:
    (expression,) = re.findall(r"--only '(\^.*?)'", (ROOT / "profiling" / "README.md").read_text())
    found = [workload for workload in workloads() if re.search(expression, workload.name)]
    sizes = ["1", "1 K", "10 K", "100 K", "1 M", "2 M", "8 M", "16 M", "32 M"]
    assert [workload.name for workload in found] == [f"dense float32 {size}" for size in sizes]
    assert [workload.elements for workload in found] == [1, *(n * 2**10 for n in (1, 10, 100))] + [
        n * 2**20 for n in (1, 2, 8, 16, 32)
    ]
    assert all(len(workload.shapes()) == 1 and workload.peers for workload in found)


@pytest.mark.usefixtures("small")
def test_a_wrong_result_is_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> own_step.Facts:
        raise own_step.WrongResultError("w", "must be 1", 2, "run the tests")

    monkeypatch.setattr(own_step, "checked", wrong)
    status, out, _ = run(capsys, "bench", "--device", "host", "--only", "sparse")
    assert status == 1
    assert "Wrong results, not timed: little sparse" in out


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "--only must be found in one of 'little', 'little sparse' (got 'nothing')"),
        (["--only", "litt(le"], "--only must be a regular expression (got 'litt(le': missing ), unterminated subp"),
        (["--json", "no/where.json"], "--json must be a file in a writable directory"),
        (["--html", "no/where.html"], "--html must be a file in a writable directory"),
        (["--compare", "none.json"], "none.json: No such file or directory."),
        (["--device", "gpu"], "device must be 'auto', 'host', 'cuda' or 'cuda:N'"),
    ],
)
def test_mistakes_are_sentences(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    status, _, err = run(capsys, "bench", *arguments)
    assert status == 1
    assert message in err


def test_a_row_without_time_shows_why() -> None:
    row = Row("w", "peer", "float32", 1, 1, note="failed: x")
    assert terminal_table(_report(row), wide=False).row_count == 2


def test_profile_prints_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for kernel, file in ncu.kernel_files().items():
        status, out, err = run(capsys, "profile", kernel)
        assert status == 0
        assert out.startswith("ncu --set=full ")
        assert f"'--kernel-name=regex:^{kernel}$'" in out
        assert "ncu is not installed here" in err
        assert file.endswith(".cu")


def test_profile_runs_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    class Result:
        returncode = 3

    monkeypatch.setattr(shutil, "which", lambda name: "/ncu")

    def run_instead(command: list[str], check: bool) -> Result:
        called.append(command)
        return Result()

    monkeypatch.setattr(subprocess, "run", run_instead)
    assert run(capsys, "profile", "sparse", "--workload", "DLRM tables, 128 rows each", "--output", "o")[0] == 3
    assert called[0][-2:] == ["DLRM tables, 128 rows each", "3"]
    assert "--export=o" in called[0]


@pytest.mark.parametrize("arguments", [["nothing"], ["dense", "--workload", "nothing"]])
def test_profile_knows_kernels_and_workloads(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    status, _, err = run(capsys, "profile", *arguments)
    assert status == 1
    assert "must be one of" in err


def test_the_profiled_program_steps(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ncu, "named", lambda name: SMALL[0])
    ncu.main("little", 2)
