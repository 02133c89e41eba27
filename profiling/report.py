"""What do the result files say? Writes their tables between the marks of README.md and profiling/README.md.

    python profiling/report.py             check that both are in step with results/*.json; exit 1 if not
    python profiling/report.py --update    rewrite them

What was never measured is "not measured".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_adam.bench.runner import Report
from gpu_adam.bench.tables import HEADER, NOT_MEASURED, cells, markdown, summary

HERE = Path(__file__).parent
RESULTS = HERE / "results"
README, PROFILING = HERE.parent / "README.md", HERE / "README.md"
PERFORMANCE = "performance"

# What the project wants to reach: (workload, what, a figure of our row, goal), on a GPU and on the host.
FRACTION, TIMES = "of copy bandwidth", "times as fast as"
GOALS: dict[str, list[tuple[str, str, str, float | None]]] = {
    "cuda": [
        ("dense float32 32 M", FRACTION, "", 0.95),
        ("dense float32 512 M", FRACTION, "", 0.95),
        ("dense float32 32 M", TIMES, "torch fused", 1.0),
        ("dense float32 1 M", TIMES, "torch fused", 1.0),
        ("dense float32 amsgrad 32 M", FRACTION, "", 0.93),
        ("dense float64 32 M", FRACTION, "", 0.93),
        ("dense complex64 32 M", FRACTION, "", 0.93),
        ("1000 x 1000", TIMES, "torch fused", 3.0),
        ("sparse 10M x 64, uniform", FRACTION, "", 0.9),
    ],
    "host": [
        ("dense float32 32 M", FRACTION, "", None),
        ("dense float32 32 M", TIMES, "torch fused", 1.2),
        ("1000 x 1000", TIMES, "torch fused", 8.0),
        ("sparse 1M x 16, uniform", TIMES, "tf.keras legacy", 3.0),
    ],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or update; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="rewrite the tables")
    options = parser.parse_args(arguments)
    stale = []
    for path, parts in documents().items():
        text = path.read_text()
        fresh = text
        for name, content in parts.items():
            fresh = between_marks(fresh, name, content)
        if fresh != text and options.update:
            path.write_text(fresh)
        elif fresh != text:
            stale.append(path.name if path.parent != HERE else f"profiling/{path.name}")
    if stale:
        print(f"not in step with profiling/results: {', '.join(stale)}; python profiling/report.py --update")
    return int(bool(stale))


def documents() -> dict[Path, dict[str, str]]:
    """What stands between which marks of which document."""
    reports = results()
    return {
        README: {PERFORMANCE: performance(reports)},
        PROFILING: {"results": full(reports), "static": static()},
    }


def results() -> dict[str, Report]:
    """Every machine's report by the name of its file."""
    files = sorted(path for path in RESULTS.glob("*.json") if path.name != "static.json")
    return {path.stem: Report.load(path) for path in files}


def between_marks(text: str, name: str, content: str) -> str:
    """The text with `content` between the marks of that name."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"no marks {name}")
    return head + begin + content.rstrip("\n") + "\n" + end + tail


def performance(reports: dict[str, Report]) -> str:
    """The short table: what the project wants, and what was measured."""
    rows = []
    for kind, goals in GOALS.items():
        machines: list[Report | None] = [report for report in reports.values() if report.device.startswith(kind)]
        for report in machines or [None]:
            for workload, what, peer, goal in goals:
                figure, where = None, "a GPU" if kind == "cuda" else "the host"
                if report is not None:
                    figure, where = _figure(report, workload, peer), f"{_machine(report)}, {report.machine['date']}"
                said = NOT_MEASURED if figure is None else f"{figure:.2f}"
                label = f"{workload}: {what} {peer}".strip()
                rows.append((label, said, "" if goal is None else f"{goal:g}", where))
    return markdown(("What", "Result", "Goal", "Machine, date"), rows)


def _figure(report: Report, workload: str, peer: str) -> float | None:
    found = {row.who: row for row in report.rows if row.workload == workload}
    if peer:
        row = found.get(peer)
        return None if row is None else row.times
    best = [row.copy_fraction for who, row in found.items() if who.startswith("gpu_adam") and row.copy_fraction]
    return max(best, default=None)


def _machine(report: Report) -> str:
    facts = report.machine["devices"].get(report.device, {})
    return f"{next(iter(facts.values()), report.device)}, {report.machine['cores']} cores"


def full(reports: dict[str, Report]) -> str:
    """Every machine's facts and rows."""
    return "\n\n".join("\n\n".join(_sections(name, report)) for name, report in reports.items()) or "Not measured yet."


def _sections(name: str, report: Report) -> Iterator[str]:
    yield f"### {name}{' (quick)' if report.quick else ''}"
    yield markdown(("Fact", "Value"), summary(report))
    yield markdown(HEADER, (cells(row) for row in report.rows))


def static() -> str:
    """The dense float32 kernel on every architecture, and the host's instruction counts."""
    path = RESULTS / "static.json"
    if not path.exists():
        return "Not measured yet."
    found: dict[str, Any] = json.loads(path.read_text())
    keys = ("registers", "spilled", "occupancy", "loop", "instructions per byte")
    plain = ("dense float32 sm", "sparse float32 sm")
    named = {name: row for name, row in found["gpu"].items() if name.startswith(plain)}
    order = sorted(named, key=lambda name: (name.split()[0], int(name.rpartition("_")[2])))
    gpu = markdown(("Kernel", *keys), ([name, *(named[name].get(key, "") for key in keys)] for name in order))
    host = markdown(("Host kernel", "instructions per element"), ((k, *v.values()) for k, v in found["host"].items()))
    return f"By {found['nvrtc']} and {found['compiler']}.\n\n{gpu}\n\n{host}"


if __name__ == "__main__":
    sys.exit(main())
