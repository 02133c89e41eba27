"""What is measured: lists of variables, their dtype, their gradients, and the variant of the update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gpu_adam import kernels
from gpu_adam.bench import shapes
from gpu_adam.bench.shapes import Shape

K, M = 2**10, 2**20
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Workload:
    """A step to be timed.

    Attributes:
        name: as shown, and as `--only` searches it.
        shapes: gives the variables' shapes.
        dtype: of the variables, a key of kernels.DTYPES.
        amsgrad: whether the update is AMSGrad's.
        complex_mode: one of kernels.COMPLEX_MODES.
        clip: whether gradients are clipped by global norm.
        indices: how many rows each gradient names; 0 for dense gradients.
        zipf: whether the rows are drawn by Zipf's law with exponent 1.1, many of them several times, or uniformly.
        quick: whether `--quick` keeps it.
        peers: whether peers take part.
    """

    name: str
    shapes: Callable[[], list[Shape]]
    dtype: str = "float32"
    amsgrad: bool = False
    complex_mode: str = "abs2"
    clip: bool = False
    indices: int = 0
    zipf: bool = False
    quick: bool = False
    peers: bool = True

    @property
    def elements(self) -> int:
        """Elements of all variables."""
        return sum(math.prod(shape) for shape in self.shapes())


def many(count: int, *shape: int) -> Callable[[], list[Shape]]:
    """`count` variables of that shape."""
    return lambda: [shape] * count


def workloads() -> list[Workload]:
    """All of them. Dtypes come from the kernels' own table, so that a new one has its rows."""
    sizes = [1, K, 10 * K, 100 * K, M, 2 * M, 8 * M, 16 * M, 32 * M, 512 * M]
    dense = [Workload(f"dense float32 {_size(size)}", many(1, size), quick=size in (K, M)) for size in sizes]
    variants = [
        Workload(f"dense {dtype}{' amsgrad' if amsgrad else ''} 32 M", many(1, 32 * M), dtype, amsgrad)
        for dtype in kernels.DTYPES
        for amsgrad in (False, True)
        if (dtype, amsgrad) != ("float32", False)
    ]
    variants += [
        Workload(f"dense {dtype} {mode} 32 M", many(1, 32 * M), dtype, complex_mode=mode)
        for dtype in kernels.DTYPES
        if dtype.startswith("complex")
        for mode in kernels.COMPLEX_MODES[1:]
    ]
    lists = [
        Workload("1000 x 1000", many(1000, 1000), quick=True),
        Workload("3000 x 3500", many(3000, 3500)),
        Workload("10000 x 64", many(10000, 64)),
        Workload("GPT-2 124M", shapes.gpt2),
        Workload("ResNet-50", shapes.resnet50),
    ]
    clipped = [
        Workload("dense float32 32 M, global norm", many(1, 32 * M), clip=True),
        Workload("1000 x 1000, global norm", many(1000, 1000), clip=True, quick=True),
        Workload("GPT-2 124M, global norm", shapes.gpt2, clip=True),
    ]
    sparse = [
        Workload(
            f"sparse {label}, {law}",
            shapes_of,
            indices=4096,
            zipf=law == "Zipf",
            quick=quick,
            peers=quick or law == "uniform",  # the law changes little for them, and they take minutes here
        )
        for label, shapes_of, quick in (("1M x 16", many(1, M, 16), True), ("10M x 64", many(1, 10 * M, 64), False))
        for law in ("uniform", "Zipf")
    ]
    sparse += [
        Workload(f"sparse {dtype} 1M x 16, Zipf", many(1, M, 16), dtype, indices=4096, zipf=True)
        for dtype in kernels.DTYPES
        if dtype != "float32"
    ]
    dlrm = Workload("DLRM tables, 128 rows each", shapes.dlrm_tables, indices=128, zipf=True)
    return [*dense, *variants, *lists, *clipped, *sparse, dlrm]


def _size(elements: int) -> str:
    units = ((M, " M"), (K, " K"), (1, ""))
    return next(f"{elements // unit}{label}" for unit, label in units if elements >= unit)


def named(name: str) -> Workload | None:
    """The workload of that name."""
    return {workload.name: workload for workload in workloads()}.get(name)
