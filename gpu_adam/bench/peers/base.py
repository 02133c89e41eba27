"""What every peer needs: the answer that a workload is not offered, and the hyperparameters of our own step."""

from __future__ import annotations

from gpu_adam.bench.workloads import Workload
from gpu_adam.kernels import HALVES

EPSILON = 1e-7
RATE = 0.001


class Unsupported(Exception):  # noqa: N818  (not an error: an answer)
    """The peer does not offer this workload."""


def only(
    workload: Workload,
    *,
    sparse: bool = False,
    amsgrad: bool = False,
    clip: bool = False,
    real: bool = True,
    halves: bool = False,
) -> None:
    """Refuse what is not offered: True means that it is; `real` that only float32, float64 and perhaps `halves` are."""
    if (workload.amsgrad and not amsgrad) or (workload.clip and not clip) or bool(workload.indices) != sparse:
        raise Unsupported
    if real and workload.dtype not in ("float32", "float64", *(HALVES if halves else ())):
        raise Unsupported
