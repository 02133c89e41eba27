"""``gpu-adam bench`` and ``gpu-adam profile``: display only."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import gpu_adam
from gpu_adam.bench import figures, ncu
from gpu_adam.bench.clocks import Effort
from gpu_adam.bench.page import page
from gpu_adam.bench.runner import Report, Runner
from gpu_adam.bench.tables import comparison_table, summary, terminal_table
from gpu_adam.bench.workloads import Workload, workloads
from gpu_adam.devices import Device
from gpu_adam.errors import ArgumentValueError

FULL = Effort()
_WIDE = 120
QUICK = Effort(most=50, seconds=0.2)


def bench(
    *,
    device: Annotated[str | None, typer.Option(help="auto, host, cuda or cuda:N; default: GPU_ADAM_DEVICE.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few small workloads, in about a minute.")] = False,
    only: Annotated[str | None, typer.Option(help="Workloads alone whose names match this regular expression.")] = None,
    json: Annotated[Path | None, typer.Option(help="File for the results; with --only they replace its rows.")] = None,
    html: Annotated[Path | None, typer.Option(help="File for a page with figures and tables.")] = None,
    compare: Annotated[Path | None, typer.Option(help="File of an earlier --json, to show beside.")] = None,
) -> None:
    """Measure how fast steps are: beside a copy of memory, and beside other libraries that are installed."""
    try:
        pattern = re.compile(only or "")
    except re.error as error:
        rule = "must be a regular expression"
        raise ArgumentValueError("--only", rule, f"{only!r}: {error}", "pass another text") from None
    chosen = [w for w in workloads() if pattern.search(w.name) and (w.quick or not quick)]
    if not chosen:
        known = ", ".join(repr(workload.name) for workload in workloads())
        raise ArgumentValueError("--only", f"must be found in one of {known}", repr(only), "pass another text")
    for option, path in (("--json", json), ("--html", html)):
        if path is not None and not (path.absolute().parent.is_dir() and os.access(path.absolute().parent, os.W_OK)):
            raise ArgumentValueError(option, "must be a file in a writable directory", path, "choose another path")
    if html is not None:
        figures.require()
    earlier = None if compare is None else Report.load(compare)
    in_file = Report.load(json) if only is not None and json is not None and json.exists() else None
    if device is not None:
        gpu_adam.set_device(device)

    # It grows beside the file of that name: an interrupt leaves the earlier results, and those so far.
    so_far = None if json is None else json.with_name(json.name + ".incomplete")

    def save(measured: Report) -> None:
        if so_far is not None:
            (measured if in_file is None else in_file.updated(measured)).save(so_far)

    report = _measured(gpu_adam.get_device(), chosen, quick, save, whole=only is None)
    if json is not None and so_far is not None:
        so_far.replace(json)
    if html is not None:
        html.write_text(page(report, earlier))
    console = Console()
    console.print(terminal_table(report, wide=console.width >= _WIDE))
    grid = Table.grid(padding=(0, 2))
    for label, value in summary(report):
        grid.add_row(Text(label, "bold"), Text(value))
    console.print(grid)
    if earlier is not None:
        console.print(comparison_table(report, earlier))
    wrong = [row.workload for row in report.rows if row.is_wrong]
    if wrong:
        console.print(Text(f"Wrong results, not timed: {', '.join(wrong)}", "red"))
        raise typer.Exit(1)


def _measured(
    device: Device, chosen: list[Workload], quick: bool, save: Callable[[Report], None], *, whole: bool
) -> Report:
    """The report, saved after every workload: what an interrupt or the system ends has not been for nothing."""

    def advance() -> None:
        progress.advance(task)
        save(runner.report)

    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("copy", total=len(chosen) + 1 + whole)
        runner = Runner(device, QUICK if quick else FULL, quick=quick, tick=lambda: progress.advance(task, 0))
        runner.copy()
        advance()
        for workload in chosen:
            progress.update(task, description=workload.name)
            runner.workload(workload)
            advance()
        if whole:
            progress.update(task, description="Python and the first step")
            runner.host_costs()
            advance()
    return runner.report


def profile(
    kernel: Annotated[str, typer.Argument(help="A kernel of cuda/: dense, sparse, square_sums, sort_rows, ...")],
    *,
    workload: Annotated[str | None, typer.Option(help="A workload of gpu-adam bench that runs it.")] = None,
    output: Annotated[Path | None, typer.Option(help="Nsight Compute's report; default: KERNEL.ncu-rep.")] = None,
) -> None:
    """Print the Nsight Compute command for a kernel, and run it where ncu is installed."""
    command = ncu.command(kernel, ncu.workload_of(kernel, workload), str(output or f"{kernel}.ncu-rep"))
    print(shlex.join(command))
    if shutil.which(command[0]) is None:
        Console(stderr=True).print(Text("ncu is not installed here: run the command where it is.", "yellow"))
        return
    raise typer.Exit(subprocess.run(command, check=False).returncode)
