"""ShardedAdam: several ranks beside one process, memory, what does not fit, and the calls of NCCL."""

import json
from typing import Any

import pytest
from communicators import jobs

from gpu_adam.communicators import Alone

from . import equality

SCRIPT = """
from distributed import equality
from gpu_adam.communicators import Mpi, mpi
mpi._EAGER_SECONDS = 0.001  # more ranks than processors, one of which does the work of all besides
with Mpi(timeout=50) as communicator:
    equality.main(communicator, {names})
"""

ALL = tuple(equality.CASES)
RANKS = [(2, equality.SOME), *(pytest.param((ranks, ALL), marks=pytest.mark.thorough) for ranks in (1, 2, 3, 4, 7))]


@pytest.fixture(scope="module", params=RANKS, ids=lambda given: f"{given[0]}-{len(given[1])} cases")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank of a job has written down."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks, names = request.param
    ended = jobs.run(folder, ranks, SCRIPT.replace("{names}", repr(names)))
    assert ended.status == 0, ended
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def test_several_ranks_have_the_bits_of_one(found: list[Any]) -> None:
    for name, (_, _, expected, expected_slots) in found[0]["cases"].items():
        assert len(expected) > 2, name
        assert len(set(expected)) > 2, f"{name}: the training does something"
        for rank, theirs in enumerate(found):
            digests, slots, _, _ = theirs["cases"][name]
            different = [step for step, pair in enumerate(zip(digests, expected, strict=True)) if len(set(pair)) > 1]
            assert not different, f"{name}: rank {rank} of {len(found)} from step {different[0]} on"
            assert slots == expected_slots[rank], f"{name}: slots of rank {rank} of {len(found)}"
        assert sum(map(len, expected_slots)) >= len(expected_slots[0]) > 0, name


def test_in_any_order_several_ranks_are_near_one(found: list[Any]) -> None:
    for dtype, (worst, digest) in found[0]["nearly"].items():
        assert worst <= 1, dtype
        assert all(theirs["nearly"][dtype][1] == digest for theirs in found), "all ranks have the same bits"


def check_memory(found: dict[str, list[float]], padding: int) -> None:
    """What is kept, and the most that there is at once, are what is said, but for some padding."""
    for kind, (kept, said, peak, most) in found.items():
        assert abs(kept - said) <= padding, kind
        assert abs(peak - most) <= padding, kind


def test_memory(found: list[Any]) -> None:
    """With several ranks, chunks that are not full."""
    for theirs in found:
        check_memory(theirs["memory"], 2_000 if len(found) == 1 else 500_000)


def test_one_rank_has_no_copy_of_gradients() -> None:
    check_memory(equality.memory(Alone("host")), 2_000)
