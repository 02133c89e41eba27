"""The whole run: check, then time, workload by workload; everything that was found as one report of JSON values."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gpu_adam.bench import facts, host_costs, own_step, peers
from gpu_adam.bench.clocks import Candidate, Effort, measure
from gpu_adam.bench.copy_bandwidth import copy_bandwidth
from gpu_adam.bench.inputs import Inputs
from gpu_adam.bench.own_step import WrongResultError
from gpu_adam.bench.workloads import Workload
from gpu_adam.devices import Device
from gpu_adam.devices.telemetry import NONE, Telemetry, between
from gpu_adam.errors import ArgumentValueError
from gpu_adam.kernels import dtype_named

FORMAT = 1
_SPARE = 1.6  # a workload's own copies while it is made
_PEER_SPARE = 3  # and of a peer that copies its inputs and has temporary arrays of their size
# The clock of a burst starts on an idle GPU and counts what Python takes until the first step is there, of 50 us 0.2 %.
# A long burst serves wall clocks as well as events, and so every peer.
_GPU_BURST = 2.5e-2
_WRONG = "WRONG, not timed: "


@dataclass
class Row:
    """One candidate's time for one workload; None is what was not measured.

    Attributes:
        workload, dtype, elements, variables: what.
        who: gpu_adam or a peer; ", graph" where steps are replayed from a CUDA graph.
        median, lower_quartile, upper_quartile: seconds of a step.
        repetitions: samples, of `burst` steps each, over `sets` sets of inputs by turns.
        moved_bytes: that our step must move.
        bytes_per_second: those by the median; for a peer, what our bytes would need in its time.
        copy_fraction, sheet_fraction: of the copy in the same run, and of the data sheet.
        times: the peer's median by ours in the same mode: how many times as fast we are.
        launches, extra_bytes: kernels per step and peak memory beside variables, gradients and slots.
        telemetry: what the GPU said meanwhile.
        note: why something is missing.
    """

    workload: str
    who: str
    dtype: str
    elements: int
    variables: int
    median: float | None = None
    lower_quartile: float | None = None
    upper_quartile: float | None = None
    repetitions: int = 0
    burst: int = 0
    sets: int = 0
    moved_bytes: int | None = None
    bytes_per_second: float | None = None
    copy_fraction: float | None = None
    sheet_fraction: float | None = None
    times: float | None = None
    launches: int | None = None
    extra_bytes: int | None = None
    telemetry: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether our result differs from the reference; the note says where."""
        return self.note.startswith(_WRONG)


@dataclass
class Report:
    """A run.

    Attributes:
        machine: facts.machine().
        device: its name.
        quick: whether it was the short list.
        copy: bandwidth, and how it was measured.
        sheet_bytes_per_second: of the data sheet, by NVML.
        telemetry: "NVML", or why there is none.
        rows: of all workloads.
        overhead, first_step: of host_costs.
    """

    machine: dict[str, Any]
    device: str
    quick: bool
    copy: dict[str, Any]
    sheet_bytes_per_second: float | None
    telemetry: str
    rows: list[Row] = field(default_factory=list)
    overhead: dict[str, Any] = field(default_factory=dict)
    first_step: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The device's processor or GPU; "" where it did not tell."""
        return next(iter(self.machine["devices"].get(self.device, {}).values()), "")

    def updated(self, newer: Report) -> Report:
        """This report with the rows of a newer one in place of its own of the same workloads, or after them.

        Raises:
            ArgumentValueError: they are of different machines or devices, or one is of --quick.
        """
        for what, mine, its in (
            ("device", *(f"{report.device}, {report.model}" for report in (self, newer))),
            ("list of workloads", *("--quick" if report.quick else "full" for report in (self, newer))),
        ):
            if mine != its:
                rule = f"must be a file of the same {what} for --only"
                raise ArgumentValueError("--json", rule, f"{mine}; now {its}", "name a new file")
        rows: dict[str, list[Row]] = {}
        for row in self.rows:
            rows.setdefault(row.workload, []).append(row)
        fresh = {row.workload: [one for one in newer.rows if one.workload == row.workload] for row in newer.rows}
        return replace(
            newer,
            copy=self.copy,
            rows=[row for group in (rows | fresh).values() for row in group],
            overhead=newer.overhead or self.overhead,
            first_step=newer.first_step or self.first_step,
        )

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what `save` has written."""
        try:
            values = json.loads(path.read_text())
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            return cls(**{**values, "rows": [Row(**row) for row in values["rows"]]})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArgumentValueError(
                str(path), "must be a result of gpu-adam bench --json", error, "measure again with this version"
            ) from error


class Runner:
    """Measures workloads on a device.

    Args:
        device: where.
        effort: how much.
        quick: noted in the report.
        tick: called after every round of samples.
    """

    def __init__(
        self, device: Device, effort: Effort, *, quick: bool = False, tick: Callable[[], None] = lambda: None
    ) -> None:
        if device.name != "host" and effort.burst_seconds:
            effort = replace(effort, burst_seconds=_GPU_BURST)
        self._device, self._effort, self._tick = device, effort, tick
        self._telemetry = Telemetry.open(device)
        sheet = None if self._telemetry is None else self._telemetry.sheet_bandwidth()
        copy: dict[str, Any] = {}
        said = NONE if self._telemetry is None else "NVML"
        self.report = Report(facts.machine(), device.name, quick, copy, sheet, said)

    def copy(self, nbytes: int | None = None) -> None:
        """Measure the copy that everything is compared with."""
        found = copy_bandwidth(self._device, self._effort, nbytes)
        self.report.copy = {
            "bytes_per_second": found.bytes_per_second,
            "moved_bytes": found.moved_bytes,
            "how": found.how,
            **asdict(found.summary),
        }
        self._release()

    def workload(self, workload: Workload) -> list[Row]:
        """Check and time one workload; returns its rows, ours first."""
        free, need = facts.free_bytes(self._device), _bytes_of(workload)
        if need * _SPARE > free:
            rows = [self._row(workload, own_step.NAME, note=_too_large(need * _SPARE, free))]
        else:
            try:
                known = own_step.checked(workload, self._device)
                self._release()
                rows = self._timed(workload, known, need)
            except WrongResultError as error:
                rows = [self._row(workload, own_step.NAME, note=f"{_WRONG}{error}")]
        self._release()
        self.report.rows += rows
        return rows

    def host_costs(self) -> None:
        """Measure Python's part of a step, and the first step of a process."""
        self.report.overhead = host_costs.python_overhead(self._device, self._effort)
        self.report.first_step = host_costs.first_step(self._device, self._effort)

    def _timed(self, workload: Workload, known: own_step.Facts, need: int) -> list[Row]:
        sets = min(self._effort.sets, max(1, -(-2 * facts.cache_bytes(self._device) // max(1, known.moved_bytes))))
        inputs = [Inputs(workload, number) for number in range(sets)]
        makers: list[tuple[str, Callable[[], Candidate]]] = [
            (own_step.NAME, make) for make in own_step.candidates(inputs, self._device)
        ]
        free, peers_need = facts.free_bytes(self._device), sets * need * _PEER_SPARE
        peers_there = list(_peers_of(workload))
        left_out = []
        if peers_there and peers_need > free:
            left_out.append(self._row(workload, "peers", note=_too_large(peers_need, free)))
        else:
            makers += [(peer.name, _maker(peer, inputs, self._device)) for peer in peers_there]
        together = sets * need * len(makers) * _SPARE < facts.free_bytes(self._device) and self._device.name == "host"
        rows = []
        for group in [makers] if together else [[maker] for maker in makers]:
            rows += list(self._group(workload, group))
        rows += left_out
        for row in rows:
            self._compare(row, known, rows)
        rows[0].launches, rows[0].extra_bytes = known.launches, known.extra_bytes
        return rows

    def _group(self, workload: Workload, makers: Sequence[tuple[str, Callable[[], Candidate]]]) -> Iterator[Row]:
        candidates, failed = [], []
        for name, make in makers:
            try:
                candidate = make()
                candidate.warm_up(self._effort)
                candidates.append(candidate)
            except peers.Unsupported:
                continue
            except Exception as error:
                if name == own_step.NAME:
                    raise
                said = (str(error).splitlines() or [""])[0][:200]
                failed.append(self._row(workload, name, note=f"failed: {type(error).__name__}: {said}"))
        before = self._telemetry.read() if self._telemetry else None
        executed = [candidate.executed for candidate in candidates]
        measure(candidates, self._effort, self._tick)
        for candidate, executed_before in zip(candidates, executed, strict=True):
            row = self._row(workload, candidate.name, **asdict(candidate.summary), sets=len(candidate.steps))
            if self._telemetry and before:
                row.telemetry = between(before, self._telemetry.read(), candidate.executed - executed_before)
            yield row
        yield from failed
        del candidates
        self._release()

    def _compare(self, row: Row, known: own_step.Facts, rows: Sequence[Row]) -> None:
        row.moved_bytes = known.moved_bytes
        if row.median is None:
            return
        if "lazy" not in row.who:  # which moves less
            row.bytes_per_second = known.moved_bytes / row.median
            row.copy_fraction = row.bytes_per_second / self.report.copy["bytes_per_second"]
            if self.report.sheet_bytes_per_second:
                row.sheet_fraction = row.bytes_per_second / self.report.sheet_bytes_per_second
        ours_in_the_same_mode = own_step.NAME + (own_step.GRAPH if row.who.endswith(own_step.GRAPH) else "")
        for other in rows:
            if not row.who.startswith(own_step.NAME) and other.who == ours_in_the_same_mode and other.median:
                row.times = row.median / other.median

    def _row(self, workload: Workload, who: str, **values: Any) -> Row:
        return Row(workload.name, who, workload.dtype, workload.elements, len(workload.shapes()), **values)

    def _release(self) -> None:
        """Give memory back before the next candidate takes its own."""
        gc.collect()
        if self._device.name != "host":
            self._device.xp.get_default_memory_pool().free_all_blocks()
            if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
                sys.modules["torch"].cuda.empty_cache()


def _too_large(need: float, free: int) -> str:
    return f"not measured: needs {need / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"


def _peers_of(workload: Workload) -> Iterator[peers.Peer]:
    return peers.installed() if workload.peers else iter(())


def _maker(peer: peers.Peer, inputs: Sequence[Inputs], device: Device) -> Callable[[], Candidate]:
    return lambda: peer.build(inputs, device)


def _bytes_of(workload: Workload) -> int:
    """Memory of one set: variable, gradient, m, v and with AMSGrad vhat."""
    return workload.elements * dtype_named(workload.dtype).itemsize * (5 if workload.amsgrad else 4)
