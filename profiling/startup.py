"""How long from the start of a process to the end of its first step, imports included, with kernels already compiled?

    python profiling/startup.py [--repetitions 20] [--save]

Beside it: the same process that only imports NumPy. On the host device.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import common

STEP = """
import numpy as np, gpu_adam
v = gpu_adam.Variable(np.ones(1000, np.float32), device="host")
gpu_adam.Adam().apply_gradients([(np.ones(1000, np.float32), v)])
"""


def main() -> None:
    """Measure, print a table, and with --save write results/startup.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    programs = {"first step": STEP, "import numpy": "import numpy"}
    candidates = {
        name: lambda text=text: subprocess.run([sys.executable, "-c", text], check=True) for name, text in programs.items()
    }
    seconds = common.side_by_side(candidates, arguments.repetitions)
    results = {name: common.summary(values) for name, values in seconds.items()}
    for name, row in results.items():
        print(f"{name:>14}: {row['median']:.3f} s ({row['lower_quartile']:.3f} to {row['upper_quartile']:.3f})")
    if arguments.save:
        print(common.save("startup", results))


if __name__ == "__main__":
    main()
