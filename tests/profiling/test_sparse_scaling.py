"""Times of deferred steps by the size of a table: the table is as after a long run, and memory is kept to."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpu_adam
from gpu_adam.bench.clocks import Effort, Summary
from gpu_adam.bench.peers.base import EPSILON, RATE
from gpu_adam.devices import HostDevice
from profiling import report, sparse_scaling
from profiling.sparse_scaling import CONTENDERS, DEFERRED, DENSE, LAZY, SETTLE, Contender, Row, Size


def test_a_table_begins_in_the_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows have missed as many steps as random touches leave out, and settle to what dense steps make of them."""
    size, trained, touches = Size(5000, 8), 125, 8
    monkeypatch.setattr(sparse_scaling, "INDICES", 320)
    monkeypatch.setattr(sparse_scaling, "MODEL_ROWS", trained)
    tables, steps = [], []
    adam = gpu_adam.Adam.apply_gradients

    def recorded(self: gpu_adam.Adam, pairs: Any) -> Any:
        ((rows, table),) = pairs
        tables.append(table)
        steps.append(rows)
        return adam(self, pairs)

    monkeypatch.setattr(gpu_adam.Adam, "apply_gradients", recorded)
    device = gpu_adam.set_device("host")
    run, settle = sparse_scaling.deferred(size, device)
    assert settle is not None
    assert len(steps) == round(sparse_scaling.LIVES * trained / touches)
    missed = len(steps) - tables[0]._behind._last_step
    assert 0.6 < missed.mean() * touches / trained < 1.4
    start = np.zeros((size.rows, size.width), np.float32)
    start[:trained] = np.random.default_rng(2).standard_normal((trained, size.width), np.float32)
    dense, own = gpu_adam.Adam(RATE, epsilon=EPSILON), gpu_adam.Variable(start)
    for rows in steps:
        adam(dense, [(rows, own)])
    expected = np.resize(own.numpy()[:trained], (size.rows, size.width))
    assert settle().tobytes() == expected.tobytes()
    run(np.arange(320))
    assert steps[-1].values.shape == (320, size.width)


@pytest.mark.parametrize(
    ("bytes_each", "groups"),
    [(11, []), (12, [[DEFERRED], [DENSE], [LAZY]]), (24, [[DEFERRED, DENSE], [LAZY], ["torch"]]), (60, [[*"abc"]])],
)
def test_tables_keep_to_the_memory(monkeypatch: pytest.MonkeyPatch, bytes_each: int, groups: list[list[str]]) -> None:
    size, built = Size(1000, 8), list[str]()
    together = []

    def builder(who: str) -> Callable[..., Any]:
        def build(*_: object) -> tuple[Callable[[object], None], None]:
            built.append(who)
            return lambda rows: None, None

        return build

    def measure(candidates: Any, effort: object) -> None:
        together.append([candidate.name for candidate in candidates])
        for candidate in candidates:
            candidate.samples.append(1.0)

    contenders = {
        who: Contender(builder(who), 16 if who == "torch" else 12) for who in (DEFERRED, DENSE, LAZY, "torch")
    }
    monkeypatch.setattr(sparse_scaling, "CONTENDERS", contenders)
    monkeypatch.setattr(sparse_scaling, "measure", measure)
    rows = list(sparse_scaling.measured(size, bytes_each * 8000, Effort(), HostDevice(threads=1)))
    expected = [list(contenders)] if bytes_each == 60 else groups
    assert together == expected
    assert [row.who for row in rows] == built == [who for group in expected for who in group]


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed (extra: torch)")
@pytest.mark.usefixtures("one_torch_thread")
def test_results_are_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("matplotlib.image", reason="the extra bench brings it")
    monkeypatch.setattr(gpu_adam, "set_device", lambda _: HostDevice(threads=1))  # and as many of torch
    sparse_scaling.main(["--quick", "--results", str(tmp_path)])
    rows = sparse_scaling.loaded(tmp_path / "sparse-scaling.json")
    assert [(row.size, row.who) for row in rows] == [
        (size, who) for size in sparse_scaling.QUICK for who in (*CONTENDERS, SETTLE)
    ]
    assert all(row.step.median > 0 for row in rows)
    assert capsys.readouterr().out.endswith(f"{sparse_scaling.table_of(rows)}\n\n{sparse_scaling.goals(rows)}\n")
    pictures = [image.imread(tmp_path / "sparse-scaling.png")]
    for slower in (1, 2):
        step = Summary(rows[0].step.median * slower, 0, 0, 1)
        sparse_scaling.draw([Row(rows[0].size, rows[0].who, step, 0), *rows[1:]], tmp_path / "again.png")
        pictures.append(image.imread(tmp_path / "again.png"))
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()


def test_goals_are_quotients_of_medians() -> None:
    size = Size(10**7, 16)
    assert size.name == "10M x 16"
    rows = [Row(size, who, Summary(seconds, 0, 0, 1), 0) for who, seconds in ((DEFERRED, 0.5), (DENSE, 3.0))]
    first, second, *_ = sparse_scaling.goals(rows).splitlines()[2:]
    assert first == f"| 10M x 16, deferred: times as fast as {DENSE} | 6.00 | at least 5 |"
    assert "| not measured |" in second


def test_the_document_has_the_results_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.scaling() == "Not measured yet."
    row = {"size": {"rows": 10**6, "width": 8}, "who": DENSE, "load": 0.25}
    step = {"median": 0.5, "lower_quartile": 0.4, "upper_quartile": 0.6, "repetitions": 3, "burst": 1}
    machine = {"date": "2026-01-01", "devices": {"host": {"processor": "Abacus"}}}
    found = {"machine": machine, "threads": 2, "rows": [{**row, "step": step}]}
    (tmp_path / "sparse-scaling.json").write_text(json.dumps(found))
    text = report.scaling()
    assert text.startswith("Abacus, 2 threads, 2026-01-01, load of the machine up to 0.2.\n")
    assert "| 1M x 8 |  | 500 ms |  |  |  |" in text
