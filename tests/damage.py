"""Damaged copies of the contents of files."""

import random
from collections.abc import Callable

Kind = Callable[[bytes, random.Random, int, int], bytes]


def damaged(good: bytes, dice: random.Random, other: Kind) -> bytes:
    """One piece of damage: bytes that change, vanish, come twice, change places.

    Args:
        good: what is whole.
        dice: choose.
        other: one more kind, given the same and the place where a few bytes begin and end.
    """
    a, b = sorted(dice.sample(range(len(good) + 1), 2))
    end = a + dice.choice((1, 2, 4, 8, 30))
    kinds = [
        good[:a] + bytes([good[a] ^ 1 << dice.randrange(8)]) + good[a + 1 :],
        good[:a] + good[b:],
        good[:b] + good[a:],
        good[:a] + bytes(b - a) + good[b:],
        good[:a] + dice.randbytes(dice.randrange(1, 40)) + good[a:],
        dice.randbytes(a % 50) + good,
        good[:a] + good[b : b + end - a] + good[end:],
        other(good, dice, a, end),
    ]
    return dice.choice(kinds)
