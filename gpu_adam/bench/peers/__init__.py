"""What a user would run instead: every peer one function that makes its step for the same inputs, and one table.

A peer raises :class:`Unsupported` for a workload that it does not offer; then it has no row. Hyperparameters are those
of our own step; that some place epsilon elsewhere changes their numbers, and not their time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from gpu_adam.bench.clocks import Candidate
from gpu_adam.bench.inputs import Inputs
from gpu_adam.bench.peers import elementwise, pytorch, tensorflow, xla
from gpu_adam.bench.peers.base import Unsupported
from gpu_adam.devices import Device

__all__ = ["PEERS", "Peer", "Unsupported", "installed"]


class Peer(NamedTuple):
    """A row of the table.

    Attributes:
        name: as shown.
        module: that must be installed.
        build: makes its candidate for these sets of inputs on this device.
    """

    name: str
    module: str
    build: Callable[[Sequence[Inputs], Device], Candidate]


PEERS = [
    Peer("gpu_adam.torch", "torch", pytorch.own_in_torch),
    Peer("torch fused", "torch", pytorch.torch_fused),
    Peer("torch foreach", "torch", pytorch.torch_foreach),
    Peer("torch fused, graph", "torch", pytorch.torch_graph),
    Peer("torch, written out dense", "torch", pytorch.torch_dense_equivalent),
    Peer("torch SparseAdam (lazy)", "torch", pytorch.torch_sparse),
    Peer("optax", "optax", xla.optax),
    Peer("cupy ElementwiseKernel", "cupy", elementwise.cupy_elementwise),
    Peer("warp", "warp", elementwise.warp),
    Peer("thinc", "thinc", elementwise.thinc),
    Peer("keras on tensorflow", "tensorflow", tensorflow.keras),
    Peer("tf.keras legacy", "tf_keras", tensorflow.tf_keras),
]


def installed() -> Iterator[Peer]:
    """The peers whose packages are here."""
    for peer in PEERS:
        if importlib.util.find_spec(peer.module) is not None:
            yield peer
