"""What a step costs beside its kernels: Python per step and per variable, and the first step of a process."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import gpu_adam
from gpu_adam.bench.clocks import Candidate, Effort, Summary, WallClock, measure
from gpu_adam.devices import Device, HostDevice

COUNTS = (1, 10, 100, 1000)
COLD_REPETITIONS = 5  # compiling takes seconds
_STEP = """
import numpy as np, gpu_adam
v = gpu_adam.Variable(np.ones(1000, np.float32), device="{device}")
adam = gpu_adam.Adam()
adam.apply_gradients([(v.device.array(np.ones(1000, np.float32)), v)])
adam.synchronize()
"""


def python_overhead(device: Device, effort: Effort) -> dict[str, Any]:
    """Seconds of ``apply_gradients`` for variables of one element, so that the kernels' work is next to nothing.

    "same": the gradients are last step's objects; "new": every gradient is a new array. On the host on one thread, on a
    GPU without waiting for it. The cost per variable is the slope from the fewest to the most variables.
    """
    quiet = HostDevice(threads=1) if isinstance(device, HostDevice) else device
    rows: dict[str, dict[str, Any]] = {}
    for count in COUNTS:
        samples = _overhead(quiet, count, max(effort.repetitions, min(effort.most, 3000 // count)))
        rows[str(count)] = {kind: asdict(Summary.of(seconds)) for kind, seconds in samples.items()}
    first, last = rows[str(COUNTS[0])], rows[str(COUNTS[-1])]
    span = COUNTS[-1] - COUNTS[0]
    slopes = {kind: (last[kind]["median"] - first[kind]["median"]) / span for kind in ("same", "new")}
    return {"variables": rows, "per_variable": slopes}


def _overhead(device: Device, count: int, repetitions: int) -> dict[str, list[float]]:
    variables = [gpu_adam.Variable(np.ones(1, np.float32), device=device) for _ in range(count)]
    optimizer = gpu_adam.Adam()

    def fresh() -> list[Any]:
        return [(device.array(np.ones(1, np.float32)), variable) for variable in variables]

    same = fresh()
    samples: dict[str, list[float]] = {"same": [], "new": []}
    for kind, turns in (("same", [same]), ("new", [fresh(), fresh()])):
        for step in range(-3, repetitions):
            chosen = turns[step % len(turns)]
            start = time.perf_counter()
            optimizer.apply_gradients(chosen)
            seconds = time.perf_counter() - start
            device.synchronize()
            if step >= 0:
                samples[kind].append(seconds)
    return samples


def first_step(device: Device, effort: Effort) -> dict[str, Any]:
    """Seconds of a whole process up to the end of its first step, imports included.

    "cold": no kernel is compiled yet; "warm": they are in the cache on disk; "numpy": a process that only imports it.
    """
    program = _STEP.format(device=device.name)
    with tempfile.TemporaryDirectory() as warm:
        _process(program, Path(warm))
        candidates = [
            Candidate("warm", [lambda: _process(program, Path(warm))], WallClock(_nothing)),
            Candidate("numpy", [lambda: _process("import numpy", Path(warm))], WallClock(_nothing)),
        ]
        measure(candidates, Effort(effort.repetitions, effort.repetitions, 0.0, 0.0))
    with tempfile.TemporaryDirectory() as root:
        clock, count = WallClock(_nothing), min(COLD_REPETITIONS, effort.repetitions)
        empty = [Path(root) / str(number) for number in range(count)]
        samples = [clock(functools.partial(_process, program, cache)) for cache in empty]
    return {"cold": asdict(Summary.of(samples)), **{each.name: asdict(each.summary) for each in candidates}}


def _process(program: str, cache: Path) -> None:
    caches = {"GPU_ADAM_CACHE": "host", "CUPY_CACHE_DIR": "cupy"}
    caches = {name: str(cache / folder) for name, folder in caches.items()}
    # The package that runs here, installed or not.
    paths = [str(Path(gpu_adam.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **caches, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def _nothing() -> None:
    """A process that has ended needs no wait."""
