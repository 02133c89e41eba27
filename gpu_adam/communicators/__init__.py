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
from gpu_adam.communicators.mpi import Mpi, local_rank
from gpu_adam.communicators.nccl import Nccl
from gpu_adam.communicators.ordered_sum import ordered_sum

__all__ = ["Alone", "Communicator", "Mpi", "Nccl", "Pending", "local_rank", "ordered_sum", "sum_dtype"]
