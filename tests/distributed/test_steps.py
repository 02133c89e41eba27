"""ShardedAdam: steps that fail and are made anew, what is assigned between steps, and tables of any size."""

from typing import Any

import numpy as np
import pytest
from reference import assert_same_bits

from gpu_adam import Adam, IndexedSlices, Variable
from gpu_adam.communicators import Alone
from gpu_adam.devices import Device
from gpu_adam.distributed import ShardedAdam
from gpu_adam.distributed.layout import table_bucket
from gpu_adam.errors import ArgumentValueError


def slices(device: Device, row: int, dtype: str = "float32") -> IndexedSlices:
    return IndexedSlices(device.array(np.ones((1, 2), dtype)), device.array(np.array([row])))


def pairs(device: Device, variables: list[Variable], row: int) -> list[Any]:
    return [(slices(device, row), variables[0]), (device.array(np.ones(3, np.float32)), variables[1])]


@pytest.mark.parametrize("sparse_update", ["dense", "deferred"])
def test_a_step_whose_rate_could_not_be_evaluated_is_made_anew(device: Device, sparse_update: str) -> None:
    """The gradients are there still: a call without pairs goes on with them."""
    failures = [True, False, False]

    def rate() -> float:
        if failures.pop(0):
            raise RuntimeError("no rate")
        return 0.1

    variables = [
        Variable(np.zeros((4, 2), np.float32), device=device),
        Variable(np.zeros(3, np.float32), device=device),
    ]
    optimizer = ShardedAdam(Alone(device), 0.1, sparse_update=sparse_update)
    optimizer.build(variables, variables[:1])
    optimizer.learning_rate = rate
    with pytest.raises(RuntimeError, match="no rate"):
        optimizer.apply_gradients(pairs(device, variables, 2))
    assert optimizer.apply_gradients() == 1
    optimizer.apply_gradients(pairs(device, variables, 3))
    plain, alike = Adam(0.1), [Variable(np.zeros_like(each.numpy()), device=device) for each in variables]
    for row in (2, 3):
        plain.apply_gradients(pairs(device, alike, row))
    for one, other in zip(variables, alike, strict=True):
        assert_same_bits(one.numpy(), other.numpy())


def test_masters_follow_what_is_assigned(device: Device) -> None:
    results = []
    optimizers: list[Any] = [ShardedAdam(Alone(device), 0.1, master_weights=True), Adam(0.1, master_weights=True)]
    for optimizer in optimizers:
        variable = Variable(np.ones(5), dtype="bfloat16", device=device)
        gradient = device.array(np.ones(5, np.float32))
        optimizer.apply_gradients([(gradient, variable)])
        variable.assign(np.full(5, 4.0))
        optimizer.apply_gradients([(gradient, variable)])
        results.append(variable.numpy().view(np.uint16))
    assert_same_bits(results[0], results[1])


def test_slices_keep_their_dtype(device: Device) -> None:
    variable = Variable(np.ones((4, 2)), dtype="bfloat16", device=device)
    optimizer = ShardedAdam(Alone(device), 0.1)
    optimizer.apply_gradients([(slices(device, 1), variable)])
    with pytest.raises(ArgumentValueError, match="must have dtype float32, as the others"):
        optimizer.apply_gradients([(slices(device, 1, "float16"), variable)])


@pytest.mark.parametrize(("rows", "row_size", "ranks"), [(4000, 301, 8), (50_000, 301, 64), (10_000, 50, 8)])
def test_tables_are_shared_out_evenly(rows: int, row_size: int, ranks: int) -> None:
    bucket = table_bucket(rows, row_size, ranks, 0)
    sizes = [pieces[0].size for pieces in bucket.pieces]
    assert sum(sizes) == rows * row_size
    assert all(size % row_size == 0 for size in sizes)
    assert max(sizes) <= (rows / ranks + 64) * row_size
    assert ranks * bucket.shard <= (rows + 64 * ranks) * row_size
