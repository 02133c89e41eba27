"""The copy that kernels are compared with: it copies, all of it."""

import numpy as np
import pytest

from gpu_adam.bench import copy_bandwidth
from gpu_adam.bench.clocks import Effort
from gpu_adam.devices import Device, HostDevice

LITTLE = Effort(repetitions=2, most=2, seconds=0.0, burst_seconds=0.0)


def test_bytes_are_counted_both_ways(device: Device) -> None:
    found = copy_bandwidth.copy_bandwidth(device, LITTLE, 2**17)
    assert found.moved_bytes == 2**18
    assert found.bytes_per_second == pytest.approx(2**18 / found.summary.median)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("nbytes", [64, copy_bandwidth.BLOCK, 5 * copy_bandwidth.BLOCK + 192])
def test_the_host_copies_every_byte(threads: int, nbytes: int) -> None:
    device = HostDevice(threads=threads)
    source, target = (device.empty(nbytes + 64, np.dtype(np.uint8)) for _ in range(2))
    source[:], target[:] = np.random.default_rng(0).integers(0, 256, nbytes + 64), 0
    copy_bandwidth._host_copy(device, target[:nbytes], source[:nbytes])()
    assert (target[:nbytes] == source[:nbytes]).all()
    assert not target[nbytes:].any()
