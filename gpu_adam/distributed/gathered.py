"""The gradients of all ranks as those of one: dense ones added in buckets, slices joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gpu_adam.communicators import Communicator, sum_dtype
from gpu_adam.devices import Array
from gpu_adam.devices.base import LINE_BYTES
from gpu_adam.errors import ArgumentValueError
from gpu_adam.step.gradients import as_array, check_shape, on_device
from gpu_adam.step.request import Request
from gpu_adam.variables import IndexedSlices, Variable

BUCKET_BYTES = 2**22
"""Of gradients that are added together; a larger one is added by itself, from where it lies."""


class Bucket(NamedTuple):
    """Gradients that are added by one operation.

    Attributes:
        members: their numbers among the pairs of a step.
        send: what this rank has; None for one gradient, which is not copied.
        total: the sums.
        sends: each gradient's part of `send`.
        totals: of `total`. The same arrays in every step, which a step knows again.
    """

    members: tuple[int, ...]
    send: Array | None
    total: Array
    sends: list[Array]
    totals: list[Array]


class GatheredGradients:
    """What a step of all ranks takes: sums of dense gradients, and the slices of all ranks in their order.

    Memory that stays: the sums of all gradients, and once more those that are packed into buckets.

    Args:
        communicator: of the ranks.
        ordered: whether sums are added in the order of ranks.
    """

    def __init__(self, communicator: Communicator, *, ordered: bool) -> None:
        self._communicator, self._ordered = communicator, ordered
        self._kinds: tuple[Any, ...] = ()
        self._buckets: list[Bucket] = []

    def pairs(self, request: Request) -> list[tuple[Any, Any]]:
        """The pairs of a step with the gradients of all ranks. Each rank's request has the same kinds of gradients.

        Raises:
            ArgumentTypeError, ArgumentValueError: a gradient that does not fit its variable, a variable on another
                device than the communicator's. Nothing was sent then.
        """
        gradients = [
            _checked(*item, self._communicator)
            for item in zip(request.pairs, request.variables, request.gradient_dtypes, strict=True)
        ]
        dense = {n: each for n, each in enumerate(gradients) if not request.sparse[n]}
        slices = {n: each for n, each in enumerate(gradients) if request.sparse[n]}
        joined = {**self._sums(dense), **(self._joined(slices) if slices else {})}
        return [(joined[number], target) for number, (_, target) in enumerate(request.pairs)]

    def _sums(self, gradients: dict[int, Array]) -> dict[int, Array]:
        kinds = tuple((number, array.dtype, array.shape) for number, array in gradients.items())
        if kinds != self._kinds:
            self._kinds, self._buckets = kinds, self._made(gradients)
        begun = []
        for bucket in self._buckets:
            arrays = [gradients[number] for number in bucket.members]
            send = arrays[0].reshape(-1)
            if bucket.send is not None:
                self._communicator.device.copy_call(bucket.sends, arrays)()
                send = bucket.send
            begun.append(self._communicator.all_reduce(send, bucket.total, ordered=self._ordered))
        for pending in begun:
            pending.wait()
        return {
            number: total
            for bucket in self._buckets
            for number, total in zip(bucket.members, bucket.totals, strict=True)
        }

    def _made(self, gradients: dict[int, Array]) -> list[Bucket]:
        """Buckets of gradients of one dtype, in order; each gradient begins at a cache line of its own."""
        open_ones: dict[Any, list[int]] = {}
        closed: list[list[int]] = []
        for number, array in gradients.items():
            members = open_ones.setdefault(array.dtype, [])
            if members and sum(gradients[each].nbytes for each in members) + array.nbytes > BUCKET_BYTES:
                closed.append(open_ones.pop(array.dtype))
                members = open_ones.setdefault(array.dtype, [])
            members.append(number)
        return [self._bucket([gradients[n] for n in each], each) for each in [*closed, *open_ones.values()]]

    def _bucket(self, arrays: Sequence[Array], members: Sequence[int]) -> Bucket:
        device, dtype = self._communicator.device, arrays[0].dtype
        line = LINE_BYTES // dtype.itemsize
        begins, size = [], 0
        for array in arrays:
            begins.append(size)
            size += array.size if len(arrays) == 1 else -(-array.size // line) * line

        def views(memory: Array) -> list[Array]:
            return [
                memory[begin : begin + array.size].reshape(array.shape)
                for begin, array in zip(begins, arrays, strict=True)
            ]

        send = None if len(arrays) == 1 else device.zeros((size,), dtype)  # what pads is added too
        total = device.zeros((size,), sum_dtype(dtype))
        return Bucket(tuple(members), send, total, [] if send is None else views(send), views(total))

    def _joined(self, slices: dict[int, IndexedSlices]) -> dict[int, IndexedSlices]:
        """The slices of all ranks, in their order. The host waits for their numbers of rows."""
        communicator, device = self._communicator, self._communicator.device
        mine = np.array([len(each.indices) for each in slices.values()], np.int64)
        lengths = device.zeros((communicator.size, len(mine)), mine.dtype)
        communicator.all_gather(device.array(mine), lengths).wait()
        rows = device.numpy(lengths)
        begun = [
            joining(communicator, part, of_ranks)
            for each, of_ranks in zip(slices.values(), rows.T.tolist(), strict=True)
            for part in (each.values, each.indices)
        ]
        parts = [finish() for finish in begun]
        return {
            number: IndexedSlices(values, indices)
            for number, values, indices in zip(slices, parts[::2], parts[1::2], strict=True)
        }


def joining(communicator: Communicator, part: Array, lengths: Sequence[int]) -> Callable[[], Array]:
    """Begin to give every rank the arrays of all, each padded to the longest.

    Args:
        communicator: of the ranks, each of which calls this.
        part: this rank's array, C-contiguous.
        lengths: along the first axis, of each rank's.

    Returns:
        What waits for them, and returns them one after the other, in the order of ranks.
    """
    device, longest = communicator.device, max(lengths)
    padded = device.zeros((longest, *part.shape[1:]), part.dtype)
    device.copy_call([padded[: len(part)]], [part])()
    everything = device.zeros((communicator.size, *padded.shape), part.dtype)
    pending = communicator.all_gather(padded, everything)

    def finish() -> Array:
        pending.wait()
        with device.activate():
            return device.xp.concatenate([everything[rank, :length] for rank, length in enumerate(lengths)])

    return finish


def _checked(pair: Any, variable: Variable, dtype: np.dtype, communicator: Communicator) -> Any:
    """A gradient as an array of the device, slices as two; of one dtype of indices in all ranks."""
    gradient, device = pair[0], communicator.device
    if variable.device is device and device.is_plain(gradient, dtype) and gradient.shape == variable.shape:
        return gradient
    if variable.device is not device:
        rule = f"must lie on the communicator's device, {device.name}"
        raise ArgumentValueError(f"variable {variable.name!r}", rule, variable.device.name, "make it there")
    if not isinstance(gradient, IndexedSlices):
        array = as_array(gradient, variable, dtype)
        check_shape(array, variable.shape, variable)
        return array
    argument = f"IndexedSlices.indices of variable {variable.name!r}"
    indices = on_device(gradient.indices, device, argument, np.dtype(np.int64))
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        got = f"{indices.dtype} of shape {indices.shape}"
        raise ArgumentValueError(argument, "must be a one-dimensional array of integers", got, "pass row numbers")
    with device.activate():
        indices = indices.astype(np.int64)
    values = as_array(gradient.values, variable, dtype, "IndexedSlices.values")
    check_shape(values, (len(indices), *variable.shape[1:]), variable, "IndexedSlices.values")
    return IndexedSlices(values, indices)
