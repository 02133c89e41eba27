"""Training on several ranks: processes with a device each, which a communicator connects.

    sharded.py         ShardedAdam: each rank has the slots of its share alone
    layout.py          how its parameters lie in buckets, and which elements each rank owns: arithmetic
    shards.py          the buckets' memory, and what ranks exchange within a step
    checkpoint.py      directories with a file for each rank, loaded by any number of ranks; README.md has the format
    pending_shards.py  saves that go on while the ranks train
    data_parallel.py   DataParallelAdam: every rank has all variables and slots
    gathered.py        the gradients of all ranks as those of one
    agreement.py       whether all ranks train the same thing, and what fails on one of them

::

    with gpu_adam.communicators.Mpi() as communicator:
        adam = gpu_adam.distributed.ShardedAdam(communicator, 0.01)

A script is started by ``mpiexec -n 4 python -m mpi4py script.py``.
"""

from gpu_adam.distributed.data_parallel import DataParallelAdam
from gpu_adam.distributed.sharded import ShardedAdam

__all__ = ["DataParallelAdam", "ShardedAdam"]
