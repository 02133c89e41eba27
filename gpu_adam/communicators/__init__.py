"""The engines that move arrays between ranks, which are processes with a device each.

    base.py         Communicator, the interface; Pending, an operation that has begun
    alone.py        Alone: one rank, copies
    mpi.py          Mpi: mpi4py
    nccl.py         Nccl: NCCL, by CuPy
    ordered_sum.py  sums in the order of ranks

Who trains on several ranks takes a `Communicator`, and knows of no engine.
"""

from gpu_adam.communicators.alone import Alone
from gpu_adam.communicators.base import Communicator, Pending, sum_dtype
from gpu_adam.communicators.mpi import Mpi, local_rank, mpi_version
from gpu_adam.communicators.nccl import Nccl, nccl_version
from gpu_adam.communicators.ordered_sum import ordered_sum
from gpu_adam.errors import DeviceError

__all__ = [
    "Alone",
    "Communicator",
    "Mpi",
    "Nccl",
    "Pending",
    "describe",
    "local_rank",
    "mpi_version",
    "nccl_version",
    "ordered_sum",
    "sum_dtype",
]


def describe() -> list[tuple[str, list[tuple[str, str]]]]:
    """Which engines are there: (section, facts) pairs, the last one "missing" where something is, as of devices."""
    found, missing = [], []
    for name, version in (("MPI", mpi_version), ("NCCL", nccl_version)):
        try:
            found.append((name, version()))
        except DeviceError as error:
            missing.append((name, str(error)))
    return [(section, facts) for section, facts in (("between processes", found), ("missing", missing)) if facts]
