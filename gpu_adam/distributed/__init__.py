"""Optimizers on several ranks, each a process with a device of its own.

    layout.py      how parameters lie in buckets, and which elements each rank owns: arithmetic
    shards.py      the buckets' memory, and what ranks exchange within a step
    agreement.py   whether all ranks mean the same variables and configuration
    sharded.py     ShardedAdam: each rank has the slots of its share alone

Who moves arrays between ranks is a `Communicator` (gpu_adam/communicators).
"""

from gpu_adam.distributed.sharded import ShardedAdam

__all__ = ["ShardedAdam"]
