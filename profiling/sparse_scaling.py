"""Does a step with deferred rows cost the rows that it touches, however large the table is? Beside torch, on the host.

    python profiling/sparse_scaling.py                     all sizes that memory allows; writes results/sparse-scaling.*
    python profiling/sparse_scaling.py --only "^1M x 16"   the sizes whose names match an expression; writes nothing
    python profiling/sparse_scaling.py --quick --results FOLDER

Tables of float32 have rows of 8 to 128 elements; each step has a gradient for 4096 random rows. Candidates take turns;
a figure is the median of a candidate's steps. To add up duplicates is part of a step, and so is it at torch to write
the gradient out.

A deferred step takes the steps that its rows have missed, so what it costs is known in the long run, when rows have
been touched and have been left alone again. To begin there, about 25,000 rows are trained, of which each step touches
as large a share as of the whole table, until e^-5 of them have never been touched; then all others become copies of
them. Nothing settles the table meanwhile, which an optimizer does after `max_deferral` steps, by default 65,536:
"settle" is what that takes in the long run, and so whatever reads a whole table.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gpu_adam
from gpu_adam.bench.clocks import Candidate, Effort, Step, Summary, WallClock, measure
from gpu_adam.bench.facts import free_bytes, machine
from gpu_adam.bench.peers.base import EPSILON, RATE
from gpu_adam.bench.tables import duration, markdown
from gpu_adam.devices import Device

RESULTS = Path(__file__).parent / "results"
INDICES = 4096
MODEL_ROWS = 25_000
"""Rows that are trained, about, before a table is filled with copies of them."""
LIVES = 5
"""Steps of that training, in mean times between two touches of a row: e^-5 of the rows have not been touched then."""
SETTLED = 10**6
"""Rows of a table that is settled, at most: others take minutes."""
SETTLE = "settle"
DEFERRED, DENSE = "gpu_adam, deferred", "gpu_adam, dense"
LAZY, WRITTEN_OUT = "torch SparseAdam (lazy)", "torch fused, gradient written out"


RowStep = Callable[[np.ndarray], object]


@dataclass(frozen=True)
class Size:
    """A table.

    Attributes:
        rows: how many.
        width: elements of each.
    """

    rows: int
    width: int

    @property
    def name(self) -> str:
        """Such as "10M x 16"."""
        label = f"{self.rows // 10**6}M" if self.rows >= 10**6 else f"{self.rows // 1000}k"
        return f"{label} x {self.width}"


SIZES = [
    *(Size(rows, width) for width in (8, 16) for rows in (10**5, 10**6, 10**7, 10**8)),
    *(Size(rows, width) for width in (64, 128) for rows in (10**5, 10**6, 8 * 10**6)),
]
QUICK = [Size(20_000, 8), Size(100_000, 16)]


@dataclass(frozen=True)
class Goal:
    """How many times as fast deferred steps are to be as another candidate's, at least."""

    size: str
    beside: str
    least: float


GOALS = (Goal("10M x 16", DENSE, 5), Goal("8M x 64", DENSE, 12), Goal("1M x 16", LAZY, 1 / 3))


@dataclass(frozen=True)
class Contender:
    """Who takes part.

    Attributes:
        build: makes a table, and returns a step by rows that have a gradient, and what settles the table, if anything
            does.
        bytes: of memory for an element of the table.
    """

    build: Callable[[Size, Device], tuple[RowStep, Step | None]]
    bytes: int


@dataclass(frozen=True)
class Row:
    """What was found.

    Attributes:
        size: of the table.
        who: a candidate; or SETTLE, whose step settles the table.
        step: seconds.
        load: how many threads wanted to run on the machine, on average over the last minute.
    """

    size: Size
    who: str
    step: Summary
    load: float


def deferred(size: Size, device: Device) -> tuple[RowStep, Step | None]:
    """Ours, with a table as it is after many steps."""
    step, table, adam = _own(size, device, "deferred")
    touches = max(1, min(INDICES, round(INDICES * MODEL_ROWS / size.rows)))
    trained = min(size.rows, round(touches * size.rows / INDICES))
    random = np.random.default_rng(1)
    values = _values(touches, size.width)
    for _ in range(round(LIVES * trained / touches)):
        rows = gpu_adam.IndexedSlices(values, random.integers(trained, size=touches))
        adam.apply_gradients([(rows, table)])
    # Past the hook that would settle the rows: what they have missed is copied with them.
    arrays = [variable._storage for variable in (table, *(adam.get_slot(table, name) for name in ("m", "v")))]
    for array in (*arrays, table._behind._last_step):  # type: ignore[union-attr]
        for begin in range(trained, size.rows, trained):
            array[begin : begin + trained] = array[: min(trained, size.rows - begin)]
    return step, lambda: table.value


def dense(size: Size, device: Device) -> tuple[RowStep, Step | None]:
    """Ours, which moves all rows at each step; the same bits in the end."""
    return _own(size, device, "dense")[0], None


def _own(size: Size, device: Device, sparse_update: str) -> tuple[RowStep, gpu_adam.Variable, gpu_adam.Adam]:
    table = gpu_adam.Variable.over(device.zeros((size.rows, size.width), np.dtype(np.float32)), device)
    random = np.random.default_rng(2)
    table.value[:MODEL_ROWS] = random.standard_normal((min(MODEL_ROWS, size.rows), size.width), np.float32)
    adam = gpu_adam.Adam(RATE, epsilon=EPSILON, sparse_update=sparse_update, max_deferral=2**20 - 1)
    adam.build([table])
    values = _values(INDICES, size.width)
    return lambda rows: adam.apply_gradients([(gpu_adam.IndexedSlices(values, rows), table)]), table, adam


def lazy(size: Size, device: Device) -> tuple[RowStep, Step | None]:
    """Torch's SparseAdam, which leaves rows without a gradient alone for good: other numbers, for less work."""
    import torch  # noqa: PLC0415

    table = _parameter(size, device)
    values = torch.from_numpy(_values(INDICES, size.width))
    step = torch.optim.SparseAdam([table], lr=RATE, eps=EPSILON).step

    def run(rows: np.ndarray) -> None:
        table.grad = torch.sparse_coo_tensor(torch.from_numpy(rows)[None], values, table.shape, check_invariants=False)
        step()

    return run, None


def written_out(size: Size, device: Device) -> tuple[RowStep, Step | None]:
    """Torch's fused Adam, for a gradient with zeros in all other rows."""
    import torch  # noqa: PLC0415

    table = _parameter(size, device)
    table.grad = torch.zeros_like(table)
    values = torch.from_numpy(_values(INDICES, size.width))
    step = torch.optim.Adam([table], lr=RATE, eps=EPSILON, fused=True).step

    def run(rows: np.ndarray) -> None:
        table.grad.zero_().index_add_(0, torch.from_numpy(rows), values)
        step()

    return run, None


def _parameter(size: Size, device: Device) -> Any:
    import torch  # noqa: PLC0415

    torch.set_num_threads(getattr(device, "threads", 1))
    return torch.ones((size.rows, size.width)).requires_grad_()


def _values(rows: int, width: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((rows, width), np.float32)


CONTENDERS = {
    DEFERRED: Contender(deferred, 12),
    DENSE: Contender(dense, 12),
    LAZY: Contender(lazy, 12),
    WRITTEN_OUT: Contender(written_out, 16),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure; print tables; write results and a picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="EXPRESSION", help="for the names of sizes")
    parser.add_argument("--memory", type=float, metavar="GB", help="for tables; default: two thirds of what is free")
    parser.add_argument("--seconds", type=float, default=1.0, help="of measuring, for each candidate of a size")
    parser.add_argument("--quick", action="store_true", help="small tables, few steps")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="default: results/, if all is measured")
    options = parser.parse_args(arguments)
    device = gpu_adam.set_device("host")
    memory = free_bytes(device) * 2 / 3 if options.memory is None else options.memory * 1e9
    effort = Effort(2, 2, 0) if options.quick else Effort(repetitions=5, most=500, seconds=options.seconds)
    rows: list[Row] = []
    for size in QUICK if options.quick else SIZES:
        if re.search(options.only, size.name):
            rows += measured(size, memory, effort, device)
            print(f"{size.name} is measured, load {os.getloadavg()[0]:.1f}", flush=True)
    print(table_of(rows), goals(rows), sep="\n\n")
    folder = options.results or (None if options.quick or options.only else RESULTS)
    if folder is not None:
        found = {"machine": machine(), "threads": getattr(device, "threads", 1), "rows": [asdict(row) for row in rows]}
        (folder / "sparse-scaling.json").write_text(json.dumps(found, indent=1) + "\n")
        draw(rows, folder / "sparse-scaling.png")


def measured(size: Size, memory: float, effort: Effort, device: Device) -> Iterator[Row]:
    """The rows of a size: of as many candidates at a time as memory holds; of nobody who needs more of it alone.

    Args:
        size: of the table.
        memory: bytes.
        effort: how long each is measured.
        device: ours.
    """
    random = np.random.default_rng(4)
    indices = [random.integers(size.rows, size=INDICES) for _ in range(1000)]
    fitting = int(memory) // (size.rows * size.width)  # bytes for an element
    waiting = [who for who, contender in CONTENDERS.items() if contender.bytes <= fitting]
    while waiting:
        group = [who for number, who in enumerate(waiting) if _bytes(waiting[: number + 1]) <= fitting]
        waiting = waiting[len(group) :]
        yield from _measured_together(group, size, indices, effort, device)
        gc.collect()


def _measured_together(
    group: Sequence[str], size: Size, indices: Sequence[np.ndarray], effort: Effort, device: Device
) -> list[Row]:
    built = {who: CONTENDERS[who].build(size, device) for who in group}
    candidates = [Candidate(who, [_turns(step, indices)], WALL) for who, (step, _) in built.items()]
    measure(candidates, effort)
    found = {candidate.name: candidate.summary for candidate in candidates}
    for _, settle in built.values():
        if settle is not None and size.rows <= SETTLED:
            found[SETTLE] = Summary.of([WALL(settle)])
    return [Row(size, who, summary, os.getloadavg()[0]) for who, summary in found.items()]


WALL = WallClock(lambda: None)


def _bytes(names: Sequence[str]) -> int:
    return sum(CONTENDERS[who].bytes for who in names)


def _turns(step: RowStep, indices: Sequence[np.ndarray]) -> Step:
    """A step by other rows at each call."""
    turns = itertools.cycle(indices)
    return lambda: step(next(turns))


def loaded(path: Path) -> list[Row]:
    """The rows of a file of results."""
    found = json.loads(path.read_text())["rows"]
    return [Row(Size(**row["size"]), row["who"], Summary(**row["step"]), row["load"]) for row in found]


def _median(rows: Sequence[Row], name: str, who: str) -> float | None:
    return next((row.step.median for row in rows if (row.size.name, row.who) == (name, who)), None)


def table_of(rows: Sequence[Row]) -> str:
    """A line for each size."""
    columns = (*CONTENDERS, SETTLE)
    lines = [
        (name, *("" if (found := _median(rows, name, who)) is None else duration(found) for who in columns))
        for name in dict.fromkeys(row.size.name for row in rows)
    ]
    return markdown(("table", *columns), lines)


def goals(rows: Sequence[Row]) -> str:
    """What was reached of the goals."""
    lines = []
    for goal in GOALS:
        ours, theirs = _median(rows, goal.size, DEFERRED), _median(rows, goal.size, goal.beside)
        found = "not measured" if ours is None or theirs is None else f"{theirs / ours:.2f}"
        lines.append((f"{goal.size}, deferred: times as fast as {goal.beside}", found, f"at least {goal.least:.2g}"))
    return markdown(("What", "Result", "Goal"), lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the time of a step against the rows of a table, for each width, into a PNG file."""
    from matplotlib.figure import Figure  # noqa: PLC0415  (optional: extra `bench`)

    widths = sorted({row.size.width for row in rows})
    figure = Figure(figsize=(2.6 * len(widths) + 0.6, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    for axis, width in zip(axes, widths, strict=True):
        for who, look in zip(CONTENDERS, ("o-", "s-", "v:", "^:"), strict=True):
            points = sorted(
                (row.size.rows, row.step.median) for row in rows if (row.size.width, row.who) == (width, who)
            )
            axis.loglog([rows for rows, _ in points], [step * 1e3 for _, step in points], look, label=who)
        axis.set(title=f"rows of {width}", xlabel="rows")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"ms per step of {INDICES} indices")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(CONTENDERS))
    figure.savefig(path, format="png", metadata={"Software": None})


if __name__ == "__main__":
    main()
