"""What do the result files say? Writes their tables between the marks of the documents.

    python profiling/report.py             check that they are in step with results/*.json; exit 1 if not
    python profiling/report.py --update    rewrite them

README.md has how fast steps are beside other libraries; profiling/README.md has all figures of the goals, and the goals
that wait for one; cuda/README.md has what the variants of the dense kernel move and take. A result that differs from
the reference is not a row of a table: either command exits with 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_adam.bench import own_step
from gpu_adam.bench.runner import Report, Row
from gpu_adam.bench.tables import HEADER, cells, markdown, summary
from gpu_adam.kernels import DTYPES
from profiling import distributed, service, sparse_scaling

HERE = Path(__file__).parent
RESULTS = HERE / "results"
OTHERS = ("static.json", "laziness.json", "sparse-scaling.json", "distributed.json", "service.json")
"""Results that are no report of the bench."""
README, PROFILING, KERNELS = HERE.parent / "README.md", HERE / "README.md", HERE.parent / "cuda" / "README.md"


@dataclass(frozen=True)
class Goal:
    """A figure that the project wants to reach.

    Attributes:
        workload: by its name.
        figure: which one, a key of FIGURES.
        beside: the peer or the other workload that it is a ratio to.
        least, most: the bound; None where there is none.
    """

    workload: str
    figure: str
    beside: str = ""
    least: float | None = None
    most: float | None = None

    def what(self) -> str:
        """The figure in words."""
        return f"{self.workload}: {self.figure} {'' if self.figure == CLIPPING else self.beside}".strip()

    def bound(self) -> str:
        """The bound in words; "" where there is none."""
        if self.least is not None:
            return f"at least {self.least:g}"
        return "" if self.most is None else f"at most {self.most:g}"

    def found(self, report: Report) -> float | None:
        """The figure in a report; None where that has not been measured."""
        return FIGURES[self.figure](report, self.workload, self.beside)


COPY, TIMES, TORCH_TIMES = "of copy bandwidth", "times as fast as", "gpu_adam.torch times as fast as"
ELEMENT, CLIPPING = "time of an element, beside", "time of clipping, beside a copy of what it reads"
ONE_M, PLAIN, CLIPPED = "dense float32 1 M", "dense float32 32 M", "dense float32 32 M, global norm"
GOALS: dict[str, list[Goal]] = {
    "cuda": [
        Goal(PLAIN, COPY, least=0.95),
        Goal("dense float32 512 M", COPY, least=0.95),
        Goal(PLAIN, TIMES, "torch fused", least=1.0),
        Goal(ONE_M, TIMES, "torch fused", least=1.0),
        Goal("dense float32 amsgrad 32 M", COPY, least=0.93),
        Goal("dense float64 32 M", COPY, least=0.93),
        Goal("dense complex64 32 M", COPY, least=0.93),
        Goal("1000 x 1000", ELEMENT, ONE_M, most=1.5),
        Goal("1000 x 1000", TIMES, "torch fused", least=3.0),
        Goal(CLIPPED, CLIPPING, PLAIN, most=1.0),
        Goal("sparse 10M x 64, uniform", COPY, least=0.9),
    ],
    "host": [
        Goal(PLAIN, COPY),
        Goal(PLAIN, TIMES, "torch fused", least=1.2),
        Goal("1000 x 1000", ELEMENT, ONE_M),
        Goal("1000 x 1000", TIMES, "torch fused", least=8.0),
        Goal(PLAIN, TORCH_TIMES, "torch fused", least=1.2),
        Goal("dense bfloat16 32 M", TORCH_TIMES, "torch fused", least=1.2),
        Goal("1000 x 1000", TORCH_TIMES, "torch fused", least=5.0),
        Goal("GPT-2 124M", TORCH_TIMES, "torch fused", least=1.2),
        Goal(CLIPPED, CLIPPING, PLAIN),
        Goal("sparse 1M x 16, uniform", TIMES, "tf.keras legacy", least=3.0),
    ],
}
PLACES = {"cuda": "a GPU", "host": "the host"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or update; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="rewrite the tables")
    options = parser.parse_args(arguments)
    wrong = [f"{name}: {row.workload}" for name, report in results().items() for row in report.rows if row.is_wrong]
    if wrong:
        print(f"differs from the reference: {'; '.join(wrong)}; mend it and measure these workloads again")
        return 1
    stale = []
    for path, parts in documents().items():
        text = path.read_text()
        fresh = text
        for name, content in parts.items():
            fresh = between_marks(fresh, name, content)
        if fresh != text and options.update:
            path.write_text(fresh)
        elif fresh != text:
            stale.append(path.relative_to(HERE.parent).as_posix() if path.is_relative_to(HERE.parent) else path.name)
    if stale:
        print(f"not in step with profiling/results: {', '.join(stale)}; python profiling/report.py --update")
    return int(bool(stale))


def documents() -> dict[Path, dict[str, str]]:
    """What stands between which marks of which document."""
    reports = results()
    return {
        README: {"performance": performance(reports, [TIMES])},
        PROFILING: {
            "performance": performance(reports, FIGURES),
            "goals": waiting(reports),
            "results": full(reports),
            "static": static(),
            "scaling": scaling(),
            "ranks": ranks(),
            "service": service_tables(),
            "machines": markdown(distributed.MODEL_HEADER, distributed.model()),
        },
        KERNELS: {"variants": variants()},
    }


def results() -> dict[str, Report]:
    """Every machine's report by the name of its file."""
    files = sorted(path for path in RESULTS.glob("*.json") if path.name not in OTHERS)
    return {path.stem: Report.load(path) for path in files}


def between_marks(text: str, name: str, content: str) -> str:
    """The text with `content` between the marks of that name."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"no marks {name}")
    return head + begin + content.rstrip("\n") + "\n" + end + tail


def performance(reports: dict[str, Report], figures: Collection[str]) -> str:
    """The short table: those of the figures that were measured, machine by machine."""
    rows = [
        (goal.what(), f"{found:.2f}", goal.bound(), f"{_machine(report)}, {report.machine['date']}")
        for kind, goals in GOALS.items()
        for report in _of_kind(reports, kind)
        for goal in goals
        if goal.figure in figures and (found := goal.found(report)) is not None
    ]
    return markdown(("What", "Result", "Goal", "Machine, date"), rows)


def waiting(reports: dict[str, Report]) -> str:
    """The goals of which no report has a figure."""
    rows = [
        (goal.what(), goal.bound(), PLACES[kind])
        for kind, goals in GOALS.items()
        for goal in goals
        if goal.bound() and all(goal.found(report) is None for report in _of_kind(reports, kind))
    ]
    return markdown(("What", "Goal", "Needs"), rows) if rows else "None: all have been measured."


def _of_kind(reports: dict[str, Report], kind: str) -> list[Report]:
    return [report for report in reports.values() if report.device.startswith(kind)]


def _kernels(report: Report, workload: str) -> Row | None:
    """Our row that shows the kernels' time: on a GPU the replayed one, for a step from Python may wait for Python."""
    who = own_step.NAME + ("" if report.device == "host" else own_step.GRAPH)
    return next((row for row in report.rows if (row.workload, row.who) == (workload, who) and row.median), None)


def _copy_fraction(report: Report, workload: str, _: str) -> float | None:
    row = _kernels(report, workload)
    return None if row is None else row.copy_fraction


def _times(report: Report, workload: str, peer: str) -> float | None:
    return next((row.times for row in report.rows if (row.workload, row.who) == (workload, peer)), None)


def _torch_times(report: Report, workload: str, peer: str) -> float | None:
    medians = {row.who: row.median for row in report.rows if row.workload == workload}
    ours, theirs = medians.get("gpu_adam.torch"), medians.get(peer)
    return theirs / ours if ours and theirs else None


def _element_time(report: Report, workload: str, other: str) -> float | None:
    rows = [_kernels(report, name) for name in (workload, other)]
    times = [row.median / row.elements for row in rows if row is not None and row.median]
    return times[0] / times[1] if len(times) == 2 else None


def _clipping_time(report: Report, workload: str, plain: str) -> float | None:
    clipped, without = _kernels(report, workload), _kernels(report, plain)
    if clipped is None or without is None:
        return None
    bandwidth: float = report.copy["bytes_per_second"]
    copied = ((clipped.moved_bytes or 0) - (without.moved_bytes or 0)) / bandwidth
    return ((clipped.median or 0) - (without.median or 0)) / copied if copied > 0 else None


FIGURES: dict[str, Callable[[Report, str, str], float | None]] = {
    COPY: _copy_fraction,
    TIMES: _times,
    TORCH_TIMES: _torch_times,
    ELEMENT: _element_time,
    CLIPPING: _clipping_time,
}


def _machine(report: Report) -> str:
    return f"{report.model or report.device}, {report.machine['cores']} cores"


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


def scaling() -> str:
    """What a step with deferred rows takes beside others, by the size of the table."""
    path = RESULTS / "sparse-scaling.json"
    if not path.exists():
        return "Not measured yet."
    rows, found = sparse_scaling.loaded(path), json.loads(path.read_text())
    processor = found["machine"]["devices"]["host"]["processor"]
    load = f"load of the machine up to {max(row.load for row in rows):.1f}"
    facts = f"{processor}, {found['threads']} threads, {found['machine']['date']}, {load}."
    return f"{facts}\n\n{sparse_scaling.goals(rows)}\n\n{sparse_scaling.table_of(rows)}"


def ranks() -> str:
    """What a step on several ranks takes."""
    path = RESULTS / "distributed.json"
    return "\n\n".join(distributed.tables(json.loads(path.read_text()))) if path.exists() else "Not measured yet."


def service_tables() -> str:
    """What a push through a service takes, and what lasts."""
    path = RESULTS / "service.json"
    return service.tables(json.loads(path.read_text())) if path.exists() else "Not measured yet."


SHOWN = "sm_90"
"""The architecture of the table of variants."""

_COLUMNS = {"bytes per element": "bytes", "registers": "registers", "spilled": "spilled", "loop": "loop"}


def variants() -> str:
    """The dense kernels' variants on one architecture, each switch alone, and all of them together."""
    path = RESULTS / "static.json"
    if not path.exists():
        return "Not measured yet."
    rows = []
    for name, row in json.loads(path.read_text())["gpu"].items():
        kernel, *words, architecture = name.split()
        if kernel != "dense" or architecture != SHOWN:
            continue
        dtype, *switches = words
        given = dict(word.split("=") for word in switches if "=" in word)
        alone = [word for word in switches if "=" not in word]
        if "clip" in alone or alone == ["amsgrad", "bounded"]:  # less than "bounded" takes; what both take
            continue
        types = (dtype, given.get("gradient", dtype), given.get("slots", ""))
        figures = (f"{row[key]:g}" if isinstance(row.get(key), float) else row.get(key, "") for key in _COLUMNS)
        rows.append((*types, " ".join(alone) or "plain", *figures))
    order = {dtype: number for number, dtype in enumerate(DTYPES)}
    rows.sort(key=lambda row: (order[row[0]], row[1] != row[0], row[2], row[3] != "plain", row[3].count(" "), row[3]))
    return markdown(("variable", "gradient", "slots", "switches", *_COLUMNS.values()), rows)


if __name__ == "__main__":
    sys.exit(main())
