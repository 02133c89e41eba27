"""How parameters lie in flat arenas, and which elements each rank owns: arithmetic, without devices and ranks.

An arena is a sequence of buckets of one dtype. A bucket is cut into as many equal shards as there are ranks, and rank r
owns the r-th of each. Variables lie in buckets one after the other, each whole; where the border of two shards goes
through a variable, it goes between two chunks of the variable's elements. So a variable's partial sums of squares are
the same ones, whoever owns its chunks, and a norm over all ranks has the bits that it has on one.

    bucket    | w ............ | w ...... b . c ... - - |     three variables, two ranks; - is padding
    shards    |<-- rank 0 ---->|<------ rank 1 -------->|
    pieces    | w[:n]          | w[n:]    b   c         |
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from gpu_adam.kernels import CHUNK

LINE = 64
"""Bytes at a multiple of which variables begin: a processor's cache line."""


class Piece(NamedTuple):
    """Consecutive elements of a variable that one rank owns.

    Attributes:
        variable: number of the variable.
        begin: the first element, in the variable; a multiple of CHUNK.
        size: how many elements; 0 where a rank owns nothing of a bucket.
        offset: where they begin, in elements from the bucket's beginning.
    """

    variable: int
    begin: int
    size: int
    offset: int


class Bucket(NamedTuple):
    """Variables that are exchanged together.

    Attributes:
        variables: their numbers, in order.
        offsets: where each begins, in elements from the bucket's beginning.
        shard: elements that each rank owns, padding included.
        pieces: for each rank what it owns, at least one piece.
    """

    variables: list[int]
    offsets: list[int]
    shard: int
    pieces: list[list[Piece]]


def buckets_of(
    sizes: Sequence[int], itemsize: int, ranks: int, bucket_bytes: int, numbers: Sequence[int]
) -> list[Bucket]:
    """The buckets of variables of one dtype.

    Args:
        sizes: elements of each variable.
        itemsize: bytes of an element.
        ranks: how many there are.
        bucket_bytes: a bucket is closed when it has so many bytes; a larger variable has one to itself.
        numbers: of each variable.
    """
    buckets: list[Bucket] = []
    begin = total = 0
    for end, size in enumerate(sizes, 1):
        total += size * itemsize
        if total >= bucket_bytes or end == len(sizes):
            buckets.append(_bucket(sizes[begin:end], itemsize, ranks, numbers[begin:end]))
            begin, total = end, 0
    return buckets


def table_bucket(rows: int, row_size: int, ranks: int, number: int) -> Bucket:
    """The bucket of a variable whose gradients are of some of its rows: each rank owns whole rows.

    Args:
        rows: how many it has.
        row_size: elements of a row.
        ranks: how many there are.
        number: of the variable.
    """
    whole_lines = LINE // math.gcd(LINE, max(1, row_size))  # of elements, whose bytes are a multiple then, too
    shard = _rounded(-(-rows // ranks), whole_lines) * row_size
    begins = [min(rank * shard, rows * row_size) for rank in range(ranks + 1)]
    pieces = [
        [Piece(number, begin, end - begin, rank * shard)]
        for rank, (begin, end) in enumerate(itertools.pairwise(begins))
    ]
    return Bucket([number], [0], shard, pieces)


def _bucket(sizes: Sequence[int], itemsize: int, ranks: int, numbers: Sequence[int]) -> Bucket:
    line = max(1, LINE // itemsize)
    longest = max(sizes)
    shard = _rounded(max(1, -(-sum(_rounded(size, line) for size in sizes) // ranks)), line)
    while True:
        if longest > shard and shard % CHUNK:  # one of the borders within the longest would go through a chunk
            shard = min(_rounded(longest, line), _rounded(shard, CHUNK))
        offsets = _offsets(sizes, line, shard)
        lacking = offsets[-1] + sizes[-1] - ranks * shard
        if lacking <= 0:
            break
        shard += _rounded(-(-lacking // ranks), line)  # not by a line: for 100,000 variables that takes seconds
    return Bucket(list(numbers), offsets, shard, _pieces(sizes, offsets, numbers, ranks, shard))


def _offsets(sizes: Sequence[int], line: int, shard: int) -> list[int]:
    """Where variables begin, so that borders of shards go between chunks."""
    offsets, end = [], 0
    for size in sizes:
        begin = _rounded(end, line)
        border = _rounded(begin + 1, shard)
        if border < begin + size:
            begin = border - (border - begin) // CHUNK * CHUNK
        offsets.append(begin)
        end = begin + size
    return offsets


def _pieces(
    sizes: Sequence[int], offsets: Sequence[int], numbers: Sequence[int], ranks: int, shard: int
) -> list[list[Piece]]:
    """What each rank owns."""
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]
    for number, size, offset in zip(numbers, sizes, offsets, strict=True):
        for rank in range(offset // shard, -(-(offset + size) // shard)):
            begin, end = max(offset, rank * shard), min(offset + size, (rank + 1) * shard)
            if begin < end:
                pieces[rank].append(Piece(number, begin - offset, end - begin, begin))
    return [own or [Piece(numbers[0], 0, 0, rank * shard)] for rank, own in enumerate(pieces)]


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
