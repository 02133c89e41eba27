"""What every script here needs: side-by-side timing, facts about the machine, result files."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import gpu_adam
from gpu_adam.devices import describe

RESULTS = Path(__file__).parent / "results"


def side_by_side(candidates: Mapping[str, Callable[[], Any]], repetitions: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Seconds of each call of each candidate, taken in turns, so that a busy machine slows all of them alike."""
    for _ in range(warm_up):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repetitions):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"median": median, "lower_quartile": low, "upper_quartile": high}


def machine() -> dict[str, Any]:
    """What a reader needs to judge a number: processor, devices, versions, date."""
    versions = {"gpu_adam": gpu_adam.__version__, "python": platform.python_version(), "numpy": np.__version__}
    for name in ("torch", "jax", "optax", "cupy"):
        try:
            versions[name] = __import__(name).__version__
        except ImportError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "devices": {section: dict(facts) for section, facts in describe() if section != "missing"},
        "versions": versions,
    }


def save(name: str, results: Any) -> Path:
    """Write results/NAME.json with the machine's facts."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    return path
