"""Figures of a report as SVG: how near every step is to the memory's limit, and our times beside the peers'."""

from __future__ import annotations

import importlib.util
import io
from typing import Any

from gpu_adam.bench.runner import Report, Row
from gpu_adam.errors import DeviceError

_OURS, _LIMIT = "#1b6ca8", "#b03a2e"


def require() -> None:
    """DeviceError unless matplotlib is installed, to be asked before minutes of measuring."""
    if importlib.util.find_spec("matplotlib") is None:
        raise DeviceError("--html", "needs matplotlib", "no matplotlib", 'pip install "gpu-adam[bench]"')


def figures(report: Report) -> list[str]:
    """The figures as SVG elements, without those that would be empty."""
    require()
    import matplotlib as mpl  # noqa: PLC0415  (optional: extra `bench`)
    from matplotlib.figure import Figure  # noqa: PLC0415

    # No dates and no random names: the same report gives the same page. Text stays text, to be searched and copied.
    with mpl.rc_context({"svg.hashsalt": "gpu_adam", "svg.fonttype": "none", "font.size": 9}):
        drawn = [draw(Figure, report) for draw in (_roofline, _bars)]
        return [_svg(figure) for figure in drawn if figure is not None]


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _roofline(figure_class: Any, report: Report) -> Any:
    """GB/s over the bytes of a step; None where no step was timed."""
    # Every update has about the same operations per byte, far left of a roofline's ridge: the roof is the bandwidth
    # alone, and what varies is the size.
    timed = [row for row in report.rows if row.who.startswith("gpu_adam") and row.bytes_per_second]
    if not timed:
        return None
    figure = figure_class(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for mode, marker in (("", "o"), (", graph", "s")):
        rows = [row for row in timed if row.who == f"gpu_adam{mode}"]
        x, y = [row.moved_bytes for row in rows], [(row.bytes_per_second or 0) / 1e9 for row in rows]
        if rows:
            fill = "none" if mode else "full"
            axes.plot(x, y, marker, color=_OURS, alpha=0.8, fillstyle=fill, label=f"gpu_adam{mode}")
    axes.axhline(report.copy["bytes_per_second"] / 1e9, color=_LIMIT, label=f"copy ({report.copy['how']})")
    if report.sheet_bytes_per_second:
        axes.axhline(report.sheet_bytes_per_second / 1e9, color=_LIMIT, linestyle=":", label="data sheet")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes that a step must move")
    axes.set_ylabel("GB/s")
    axes.set_title("How near the memory's limit")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _bars(figure_class: Any, report: Report) -> Any:
    """How many times as fast as each peer, pair by pair; None without peers."""
    rows = [row for row in report.rows if row.times]
    if not rows:
        return None
    figure = figure_class(figsize=(9, 1.2 + 0.19 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for number, row in enumerate(rows):
        axes.barh(number, (row.times or 1) - 1, left=1, color=_OURS if (row.times or 0) >= 1 else _LIMIT)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("times as fast as the peer (1: equal)")
    axes.set_title("Beside whom")
    axes.grid(axis="x", alpha=0.3)
    return figure


def _label(row: Row) -> str:
    return f"{row.workload}: {row.who}"
