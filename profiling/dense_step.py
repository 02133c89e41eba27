"""How fast is a whole step of dense variables, beside PyTorch's fused Adam on the same machine in the same run?

    python profiling/dense_step.py [--repetitions 20] [--save]

One variable of 32 Mi elements shows memory bandwidth, a thousand variables of a thousand elements what a step costs
beside it. float32, the same gradients every step, none of them zero; the candidates take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import common
import gpu_adam

WORKLOADS = {"1 x 33554432": [2**25], "1 x 1048576": [2**20], "1000 x 1000": [1000] * 1000}
BYTES_PER_ELEMENT = 28  # reads theta, m, v, g; writes theta, m, v


def ours(sizes: list[int]) -> Callable[[], Any]:
    """A step of gpu_adam, on its default device."""
    rng = np.random.default_rng(0)
    device = gpu_adam.get_device()
    pairs = [
        (device.array(rng.standard_normal(n, np.float32)), gpu_adam.Variable(rng.standard_normal(n, np.float32)))
        for n in sizes
    ]
    optimizer = gpu_adam.Adam()

    def step() -> None:
        optimizer.apply_gradients(pairs)
        optimizer.synchronize()

    return step


def pytorch(sizes: list[int]) -> Callable[[], Any]:
    """A step of torch.optim.Adam(fused=True) on the CPU, with as many threads."""
    rng = np.random.default_rng(0)
    parameters = []
    for n in sizes:
        gradient, parameter = rng.standard_normal(n, np.float32), rng.standard_normal(n, np.float32)
        parameters.append(torch.from_numpy(parameter).clone().requires_grad_())
        parameters[-1].grad = torch.from_numpy(gradient).clone()
    optimizer = torch.optim.Adam(parameters, fused=True, eps=1e-7)
    return lambda: optimizer.step()


def main() -> None:
    """Measure, print a table, and with --save write results/dense_step.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    device = gpu_adam.set_device("host")
    torch.set_num_threads(device.threads)  # type: ignore[attr-defined]
    results = {}
    for name, sizes in WORKLOADS.items():
        seconds = common.side_by_side({"gpu_adam": ours(sizes), "torch fused": pytorch(sizes)}, arguments.repetitions)
        rows = {who: common.summary(values) for who, values in seconds.items()}
        ratio = rows["torch fused"]["median"] / rows["gpu_adam"]["median"]
        bandwidth = BYTES_PER_ELEMENT * sum(sizes) / rows["gpu_adam"]["median"] / 1e9
        results[name] = {**rows, "times as fast": ratio, "GB/s": bandwidth}
        print(
            f"{name:>14}: gpu_adam {rows['gpu_adam']['median'] * 1e3:8.3f} ms ({bandwidth:.1f} GB/s), "
            f"torch fused {rows['torch fused']['median'] * 1e3:8.3f} ms, {ratio:.2f} times as fast"
        )
    if arguments.save:
        print(common.save("dense_step", results))


if __name__ == "__main__":
    main()
