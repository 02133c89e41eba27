"""Reports as tables: for the terminal (rich), and as rows of text for a page or a document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from gpu_adam.bench.runner import Report, Row

NOT_MEASURED = "not measured"
HEADER = (
    "workload", "who", "step", "quartiles", "GB/s", "of copy", "of sheet", "times as fast", "launches", "extra memory",
)  # fmt: skip
COMPARED = ("workload", "who", "earlier", "now", "times as fast")
NOTHING_COMPARED = "Nothing was measured in both runs."


def duration(seconds: float | None) -> str:
    """With three digits and a unit."""
    if seconds is None:
        return NOT_MEASURED
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:.0f} {unit}"
    return f"{seconds * 1e6:.3g} us"


def size(nbytes: int | None) -> str:
    """In bytes, KiB or MiB."""
    if nbytes is None:
        return ""
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes} B"


def cells(row: Row) -> tuple[str, ...]:
    """A row's texts, one for each of HEADER."""
    step = duration(row.median) if row.median is not None else row.note or NOT_MEASURED
    quartiles = "" if row.median is None else f"{duration(row.lower_quartile)} to {duration(row.upper_quartile)}"
    return (
        row.workload,
        row.who + (" (throttled)" if row.telemetry.get("throttled") else ""),
        step,
        quartiles,
        "" if row.bytes_per_second is None else f"{row.bytes_per_second / 1e9:.4g}",
        _fraction(row.copy_fraction),
        _fraction(row.sheet_fraction),
        "" if row.times is None else f"{row.times:.2f}",
        "" if row.launches is None else str(row.launches),
        size(row.extra_bytes),
    )


def _fraction(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def summary(report: Report) -> list[tuple[str, str]]:
    """(label, value) pairs: machine, limits, and what a step costs beside its kernels."""
    copy, machine = report.copy, report.machine
    facts = [("date", machine["date"]), ("device", _device(report))]
    facts.append(("copy", f"{copy['bytes_per_second'] / 1e9:.4g} GB/s, {copy['how']}"))
    sheet = report.sheet_bytes_per_second
    facts.append(("data sheet", f"{sheet / 1e9:.4g} GB/s" if sheet else report.telemetry))
    if report.overhead:
        one = report.overhead["variables"]["1"]
        slopes = report.overhead["per_variable"]
        for kind, what in (("same", "the same gradient arrays"), ("new", "new gradient arrays")):
            cost = f"{duration(one[kind]['median'])} a step and {duration(slopes[kind])} a variable"
            facts.append((f"Python, {what}", cost))
    if report.first_step:
        kinds = (("cold", "nothing compiled"), ("warm", "kernels compiled"), ("numpy", "import numpy alone"))
        said = "; ".join(f"{what} {duration(report.first_step[kind]['median'])}" for kind, what in kinds)
        facts.append(("process up to its first step", said))
    facts.append(("versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())))
    return facts


def _device(report: Report) -> str:
    facts = report.machine["devices"].get(report.device, {})
    return f"{report.device}, {report.model}" + (f", {facts['threads']} threads" if "threads" in facts else "")


def terminal_table(report: Report, *, wide: bool = True) -> Table:
    """The rows of a report, workload by workload; without `wide` only the columns that matter most."""
    hidden = {"workload"} | (set() if wide else {"quartiles", "extra memory"})
    hidden |= set() if report.sheet_bytes_per_second else {"of sheet"}
    table = Table(title=f"gpu_adam on {_device(report)}", title_justify="left")
    for label in HEADER:
        if label not in hidden:
            table.add_column(label, justify="left" if label == "who" else "right")
    before = ""
    for row in report.rows:
        if row.workload != before:
            table.add_section()
            table.add_row(Text(row.workload, "bold cyan"))
        ours = row.who.startswith("gpu_adam")
        style = "red" if row.is_wrong else "bold" if ours else "dim" if row.median is None else ""
        shown = [text for label, text in zip(HEADER, cells(row), strict=True) if label not in hidden]
        table.add_row("  " + shown[0], *(Text(text) for text in shown[1:]), style=style)
        before = row.workload
    return table


def comparison(report: Report, earlier: Report) -> list[tuple[str, str, str, str, str]]:
    """Texts, one for each of COMPARED, of what both have measured."""
    old = {(row.workload, row.who): row.median for row in earlier.rows if row.median}
    found = []
    for row in report.rows:
        then = old.get((row.workload, row.who))
        if then and row.median:
            found.append((row.workload, row.who, duration(then), duration(row.median), f"{then / row.median:.2f}"))
    return found


def comparison_table(report: Report, earlier: Report) -> Table:
    """`comparison` for the terminal."""
    both = comparison(report, earlier)
    caption = None if both else NOTHING_COMPARED
    table = Table(title=f"beside the run of {earlier.machine['date']}", title_justify="left", caption=caption)
    for label in COMPARED:
        table.add_column(label, justify="left" if label in ("workload", "who") else "right")
    for texts in both:
        table.add_row(*texts)
    return table


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    texts = [list(header), *([str(text).replace("|", "\\|") for text in row] for row in rows)]
    lines = ["| " + " | ".join(line) + " |" for line in texts]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
