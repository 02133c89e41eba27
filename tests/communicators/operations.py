"""Every operation of a communicator against NumPy, as each of its ranks sees it; in tests, and in processes of MPI."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_adam.communicators import Communicator, sum_dtype
from gpu_adam.communicators.base import SUMMED
from gpu_adam.kernels import DTYPES, dtype_named

Array = np.ndarray[Any, np.dtype[Any]]


def values(rank: int, size: int, dtype: np.dtype, *, whole: bool = False) -> Array:
    """A rank's array, which every rank knows; of whole numbers, sums of which are exact in any order."""
    rng = np.random.default_rng([rank, size])
    numbers = rng.integers(0, 9, size) if whole or dtype.kind in "iu" else rng.standard_normal(size)
    array = numbers.astype(dtype)
    return array + np.array(1j, dtype) * array[::-1] if dtype.kind == "c" else array


def summed(arrays: list[Array]) -> Array:
    """The sum in the order of ranks."""
    dtype = sum_dtype(arrays[0].dtype)
    total = arrays[0].astype(dtype)
    for array in arrays[1:]:
        total = total + array.astype(dtype)
    return total


def same(found: Any, expected: Array, communicator: Communicator, what: object) -> None:
    """Raise where an array of the device has not these bits."""
    array = communicator.device.numpy(found)
    assert array.dtype == expected.dtype, what
    assert array.shape == expected.shape, what
    assert array.tobytes() == expected.tobytes(), (what, communicator, array, expected)


def check(communicator: Communicator, sizes: tuple[int, ...] = (0, 1, 3, 5000)) -> None:
    """Go through all operations with parts of these sizes; raise where a result is wrong."""
    for name in SUMMED:
        for size in sizes:
            for check_one in (_sums, _gathers, _broadcasts):
                check_one(communicator, dtype_named(name), size)
        _exchanges(communicator, dtype_named(name))
    _several_at_once(communicator)


def _sums(communicator: Communicator, dtype: np.dtype, size: int) -> None:
    ranks, rank, device = communicator.size, communicator.rank, communicator.device
    total_dtype = sum_dtype(dtype)
    for ordered in (False, True):
        if size * ranks > 0 and ordered and dtype.name not in DTYPES:
            continue
        what = (dtype.name, size, ordered)
        for length in {size * ranks, size}:  # equal parts, and what has none
            arrays = [values(r, length, dtype, whole=not ordered) for r in range(ranks)]
            expected, send = summed(arrays), device.array(arrays[rank])
            recv = device.empty(length, total_dtype)
            communicator.all_reduce(send, recv, ordered=ordered).wait()
            same(recv, expected, communicator, ("all_reduce", *what))
            same(send, arrays[rank], communicator, ("what all_reduce reads", *what))
            if total_dtype == dtype:
                communicator.all_reduce(send, send, ordered=ordered).wait()
                same(send, expected, communicator, ("all_reduce in place", *what))
        arrays = [values(r, size * ranks, dtype, whole=not ordered) for r in range(ranks)]
        send, recv = device.array(arrays[rank]), device.empty(size, total_dtype)
        communicator.reduce_scatter(send, recv, ordered=ordered).wait()
        same(recv, summed(arrays)[rank * size : (rank + 1) * size], communicator, ("reduce_scatter", *what))
        same(send, arrays[rank], communicator, ("what reduce_scatter reads", *what))


def _gathers(communicator: Communicator, dtype: np.dtype, size: int) -> None:
    ranks, rank, device = communicator.size, communicator.rank, communicator.device
    expected = np.concatenate([values(r, size, dtype) for r in range(ranks)])
    recv = device.zeros((ranks, size), dtype)
    communicator.all_gather(device.array(values(rank, size, dtype)), recv).wait()
    same(recv, expected.reshape(ranks, size), communicator, ("all_gather", dtype.name, size))
    recv = device.array(expected)
    with device.activate():
        recv[: rank * size] = recv[(rank + 1) * size :] = 0
    communicator.all_gather(recv[rank * size : (rank + 1) * size], recv).wait()
    same(recv, expected, communicator, ("all_gather in place", dtype.name, size))


def _broadcasts(communicator: Communicator, dtype: np.dtype, size: int) -> None:
    for root in range(communicator.size):
        array = communicator.device.array(values(communicator.rank, size, dtype))
        communicator.broadcast(array, root).wait()
        same(array, values(root, size, dtype), communicator, ("broadcast", dtype.name, size, root))


def _exchanges(communicator: Communicator, dtype: np.dtype) -> None:
    ranks, rank, device = communicator.size, communicator.rank, communicator.device

    def rows(sender: int, receiver: int) -> int:
        return (sender + 2 * receiver) % 4  # none now and then

    def matrix(sender: int, lengths: list[int]) -> Array:
        return values(sender, sum(lengths) * 3, dtype).reshape(-1, 3)

    def part(sender: int, lengths: list[int]) -> Array:
        begin = sum(lengths[:rank])
        return matrix(sender, lengths)[begin : begin + lengths[rank]]

    ways: list[tuple[str, Callable[[int], list[int]]]] = [
        ("all_to_all by counts", lambda sender: [rows(sender, receiver) for receiver in range(ranks)]),
        ("all_to_all of equal parts", lambda sender: [2] * ranks),
        ("all_to_all of nothing", lambda sender: [0] * ranks),
    ]
    for what, counts in ways:
        received = [counts(sender)[rank] for sender in range(ranks)]
        send, recv = device.array(matrix(rank, counts(rank))), device.zeros((sum(received), 3), dtype)
        given = (counts(rank), received) if what == "all_to_all by counts" else ()
        communicator.all_to_all(send, recv, *given).wait()
        expected = np.concatenate([part(sender, counts(sender)) for sender in range(ranks)])
        same(recv, expected, communicator, (what, dtype.name))


def _several_at_once(communicator: Communicator) -> None:
    """Operations that begin before others are waited for, in another order, or never."""
    ranks, rank, device = communicator.size, communicator.rank, communicator.device
    float32 = np.dtype(np.float32)
    begun = []
    for bucket in range(5):
        arrays = [values(r, 700 * ranks + bucket, float32) for r in range(ranks)]
        recv = device.empty(700 * ranks + bucket, float32)
        begun.append((communicator.all_reduce(device.array(arrays[rank]), recv, ordered=True), recv, summed(arrays)))
    for pending, recv, expected in begun[::-1]:
        pending.wait()
        pending.wait()
        same(recv, expected, communicator, "several at once")
    communicator.all_reduce(device.zeros((5,), float32), device.empty(5, float32))  # waited for by close
    communicator.barrier()
