"""A report as one HTML page that needs nothing else: figures as SVG, tables, and the machine's facts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from gpu_adam.bench.figures import figures
from gpu_adam.bench.runner import Report
from gpu_adam.bench.tables import COMPARED, HEADER, NOTHING_COMPARED, cells, comparison, summary

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; position: sticky; top: 0; background: #fff; }
tr.ours td { font-weight: 600; background: #eef5fb; }
tr.missing td { color: #888; }
.scroll { overflow-x: auto; }
svg { max-width: 100%; height: auto; }
pre { font-size: 12px; background: #f6f6f6; padding: 1rem; overflow-x: auto; }
"""


def page(report: Report, earlier: Report | None = None) -> str:
    """The page's text."""
    rows = [(cells(row), _kind(row.who, row.median is None)) for row in report.rows]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>gpu_adam: performance</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>",
        "<h1>gpu_adam: performance</h1>",
        _table((), ((pair, "") for pair in summary(report))),
        *(f"<figure>{figure}</figure>" for figure in figures(report)),
        "<h2>All rows</h2><p>Median of a step. A peer's GB/s is what our bytes would need in its time. torch "
        "SparseAdam (lazy) computes something else: it leaves rows without gradient alone.</p>",
        _table(HEADER, rows),
    ]
    if earlier is not None:
        parts.append(f"<h2>Beside the run of {escape(earlier.machine['date'])}</h2>")
        both = comparison(report, earlier)
        parts.append(_table(COMPARED, ((texts, "") for texts in both)) if both else f"<p>{NOTHING_COMPARED}</p>")
    parts.append(f"<h2>Machine</h2><pre>{escape(json.dumps(report.machine, indent=1))}</pre>")
    return "\n".join([*parts, "</body></html>", ""])


def _kind(who: str, missing: bool) -> str:
    return "missing" if missing else "ours" if who.startswith("gpu_adam") else ""


def _table(header: Sequence[str], rows: Iterable[tuple[Sequence[str], str]]) -> str:
    head = "".join(f"<th>{escape(label)}</th>" for label in header)
    body = "".join(
        f'<tr class="{kind}">' + "".join(f"<td>{escape(text)}</td>" for text in texts) + "</tr>\n"
        for texts, kind in rows
    )
    thead = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{thead}<tbody>{body}</tbody></table></div>'
