"""How parameters lie in buckets: what every layout must have, whatever the variables and ranks."""

from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_adam.distributed.layout import LINE, Bucket, buckets_of
from gpu_adam.kernels import CHUNK

BORDERS = [0, 1, 5, 15, 16, 17, 63, 64, 65, *(n * CHUNK + k for n in (1, 2, 3, 7) for k in (-1, 0, 1, 17)), 100_003]
SIZES = st.lists(st.one_of(st.sampled_from(BORDERS), st.integers(0, 200), st.integers(0, 90_000)), min_size=1)
ITEMSIZES = st.sampled_from([2, 4, 8, 16])
RANKS = st.one_of(st.integers(1, 9), st.sampled_from([16, 100, 1024]))
BUCKET_BYTES = st.one_of(st.sampled_from([1, 64, 2**14, 2**25]), st.integers(1, 2**19))


@settings(deadline=None, derandomize=True, max_examples=400)
@given(SIZES, ITEMSIZES, RANKS, BUCKET_BYTES)
def test_any_layout(sizes: list[int], itemsize: int, ranks: int, bucket_bytes: int) -> None:
    numbers = [3 * number for number in range(len(sizes))]
    size_of = dict(zip(numbers, sizes, strict=True))
    buckets = buckets_of(sizes, itemsize, ranks, bucket_bytes, numbers)
    assert [number for bucket in buckets for number in bucket.variables] == numbers, "each once, in order"
    for bucket in buckets:
        _check_places(bucket, size_of, itemsize, ranks)
        _check_owners(bucket, size_of, ranks)
        _check_padding(bucket, size_of, itemsize, ranks)
    for bucket in buckets:
        filled = [size_of[number] * itemsize for number in bucket.variables]
        assert sum(filled[:-1]) < bucket_bytes, "closed as soon as it is full"
        assert sum(filled) >= bucket_bytes or bucket is buckets[-1], "not before"


def _check_places(bucket: Bucket, size_of: dict[int, int], itemsize: int, ranks: int) -> None:
    """Variables lie within the bucket, one behind the other, each at the beginning of a line."""
    end = 0
    for number, offset in zip(bucket.variables, bucket.offsets, strict=True):
        assert offset >= end, "two variables overlap"
        assert offset * itemsize % LINE == 0
        end = offset + size_of[number]
    assert end <= ranks * bucket.shard, "the bucket has no room"
    assert bucket.shard > 0
    assert bucket.shard * itemsize % LINE == 0


def _check_owners(bucket: Bucket, size_of: dict[int, int], ranks: int) -> None:
    """Every element is owned once, by the rank in whose shard it lies; borders go between chunks."""
    offset_of = dict(zip(bucket.variables, bucket.offsets, strict=True))
    owned: dict[int, list[tuple[int, int]]] = {number: [] for number in bucket.variables}
    assert len(bucket.pieces) == ranks
    for rank, pieces in enumerate(bucket.pieces):
        assert pieces, "a rank without anything has an empty piece"
        assert len(pieces) == 1 or all(piece.size for piece in pieces)
        for piece in pieces:
            assert piece.begin % CHUNK == 0
            assert rank * bucket.shard <= piece.offset <= piece.offset + piece.size <= (rank + 1) * bucket.shard
            if piece.size:
                assert piece.offset == offset_of[piece.variable] + piece.begin
                owned[piece.variable].append((piece.begin, piece.begin + piece.size))
    for number, ranges in owned.items():  # by rank, so in order of elements
        ends = [0, *(end for _, end in ranges)]
        assert [begin for begin, _ in ranges] == ends[:-1], "a gap, or something owned twice"
        assert ends[-1] == size_of[number]


def _check_padding(bucket: Bucket, size_of: dict[int, int], itemsize: int, ranks: int) -> None:
    """A rank's share is its part of the elements, and two chunks at most; what is no longer than a chunk is whole."""
    line = LINE // itemsize
    total = sum(-(-size_of[number] // line) * line for number in bucket.variables)
    assert bucket.shard <= total / ranks + 2 * CHUNK + line
    longest = max(map(size_of.__getitem__, bucket.variables))
    if longest <= CHUNK:
        assert all(piece.begin == 0 for pieces in bucket.pieces for piece in pieces)
    if len(bucket.variables) == 1 and longest <= CHUNK:
        assert bucket.shard == max(line, -(-longest // line) * line), "one chunk has one owner, and no padding there"


def test_one_rank_has_everything_without_padding() -> None:
    (bucket,) = buckets_of([5, 0, CHUNK + 1, 16], 4, 1, 2**25, [0, 1, 2, 3])
    assert bucket.offsets == [0, 16, 16, 16 + 4112]
    assert bucket.shard == 16 + 4112 + 16
    assert [[piece.size for piece in pieces] for pieces in bucket.pieces] == [[5, CHUNK + 1, 16]]


def test_a_border_moves_a_variable_to_a_chunk() -> None:
    """The picture in layout.py: `w` is cut between chunks, what follows is whole."""
    w = 3 * CHUNK + 100
    (bucket,) = buckets_of([w, 10, 1], 4, 2, 2**25, [0, 1, 2])
    assert bucket.shard == 2 * CHUNK
    first, second = bucket.pieces
    assert first == [(0, 0, 2 * CHUNK, 0)]
    assert second == [(0, 2 * CHUNK, CHUNK + 100, 2 * CHUNK), (1, 0, 10, w + 12), (2, 0, 1, w + 28)]


def test_a_bucket_is_closed_when_it_is_full() -> None:
    buckets = buckets_of([16, 16, 16, 50, 1], 4, 2, 2 * 64, [0, 1, 2, 3, 4])
    assert [bucket.variables for bucket in buckets] == [[0, 1], [2, 3], [4]]
