"""The Nsight Compute command for one kernel in one workload, and the small program that it looks at.

``python -m gpu_adam.bench.ncu WORKLOAD [STEPS]`` is the program: some steps of the workload, nothing else.
"""

from __future__ import annotations

import sys

import gpu_adam
from gpu_adam import kernels
from gpu_adam.bench.inputs import Inputs
from gpu_adam.bench.own_step import OwnStep
from gpu_adam.bench.workloads import Workload, named, workloads
from gpu_adam.errors import ArgumentValueError

STEPS = 3  # the last one is profiled: compiled, tables made, caches as in the midst of a training
_WORKLOADS = {
    "dense.cu": "dense float32 32 M",
    "sparse.cu": "sparse 1M x 16, Zipf",
    "sort.cu": "sparse 1M x 16, Zipf",
    "norm.cu": "dense float32 32 M, global norm",
}


def kernel_files() -> dict[str, str]:
    """The file of ``cuda/`` of every kernel."""
    files = sorted(path.name for path in kernels.directory().glob("*.cu"))
    return {name: file for file in files for name in kernels.kernel_names(file)}


def workload_of(kernel: str, workload: str | None = None) -> Workload:
    """The workload that runs `kernel`; by default one that shows it at its best-known size.

    Raises:
        ArgumentValueError: no such kernel or workload.
    """
    files = kernel_files()
    if kernel not in files:
        known = ", ".join(sorted(files))
        raise ArgumentValueError("KERNEL", f"must be one of {known}", repr(kernel), "pass one of them")
    name = _WORKLOADS.get(files[kernel], _WORKLOADS["dense.cu"]) if workload is None else workload
    found = named(name)
    if found is None:
        known = ", ".join(repr(each.name) for each in workloads())
        raise ArgumentValueError("--workload", f"must be one of {known}", repr(name), "pass one of them")
    return found


def command(kernel: str, workload: Workload, output: str) -> list[str]:
    """The command line: the kernel's first launch of the last step, with every section, written to `output`."""
    return [
        "ncu",
        "--set=full",
        "--import-source=yes",
        f"--kernel-name=regex:^{kernel}$",
        "--nvtx",
        "--nvtx-include=profiled/",
        "--launch-count=1",
        "--force-overwrite",
        f"--export={output}",
        sys.executable,
        "-m",
        __name__,
        workload.name,
        str(STEPS),
    ]


def main(name: str, steps: int = STEPS) -> None:
    """Run some steps of a workload; the last one inside the NVTX range "profiled"."""
    workload = named(name)
    assert workload is not None, name
    device = gpu_adam.get_device()
    step = OwnStep(Inputs(workload, 0), device)
    for number in range(steps):
        profiled = device.name != "host" and number == steps - 1
        if profiled:
            device.xp.cuda.nvtx.RangePush("profiled")
        step()
        device.synchronize()
        if profiled:
            device.xp.cuda.nvtx.RangePop()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
