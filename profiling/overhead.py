"""What does a step cost in Python, beside the kernels?

    python profiling/overhead.py [--repetitions 300] [--save]

Variables of one element, so that the kernels' work is next to nothing, on one thread. "same": the gradient arrays are
last step's objects. "new": every gradient is a new array. The cost per variable is the slope from 1 to 1000 variables.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

import common
import gpu_adam
from gpu_adam.devices import HostDevice

COUNTS = (1, 10, 100, 1000)


def measured(count: int, repetitions: int) -> dict[str, float]:
    """Median seconds of apply_gradients for `count` variables, with the same gradients and with new ones."""
    device = HostDevice(threads=1)
    variables = [gpu_adam.Variable(np.ones(1, np.float32), device=device) for _ in range(count)]
    optimizer = gpu_adam.Adam()

    def fresh() -> list[Any]:
        return [(np.ones(1, np.float32), variable) for variable in variables]

    same = fresh()
    seconds: dict[str, list[float]] = {"same": [], "new": []}
    for kind, turns in (("same", [same]), ("new", [fresh(), fresh()])):
        for step in range(repetitions + 5):
            chosen = turns[step % len(turns)]
            start = time.perf_counter()
            optimizer.apply_gradients(chosen)
            seconds[kind].append(time.perf_counter() - start)
    return {kind: common.summary(values[5:])["median"] for kind, values in seconds.items()}


def main() -> None:
    """Measure, print a table, and with --save write results/overhead.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=300)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    rows = {count: measured(count, arguments.repetitions) for count in COUNTS}
    for count, row in rows.items():
        print(f"{count:5d} variables: same {row['same'] * 1e6:8.1f} us, new {row['new'] * 1e6:8.1f} us")
    first, last = COUNTS[0], COUNTS[-1]
    slopes = {kind: (rows[last][kind] - rows[first][kind]) / (last - first) for kind in ("same", "new")}
    print(f"per variable: same {slopes['same'] * 1e6:.2f} us, new {slopes['new'] * 1e6:.2f} us")
    if arguments.save:
        print(common.save("overhead", {"seconds": {str(n): row for n, row in rows.items()}, "per variable": slopes}))


if __name__ == "__main__":
    main()
