"""What distinguishes two arrays: which element first, and by how many floating-point numbers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from gpu_adam.files.contents import pieces_of


class Difference(NamedTuple):
    """How two arrays of one dtype and shape differ.

    The distance of two numbers is how many numbers of the dtype one must go from one to the other: 1 for neighbours, 0
    for 0 and -0 and for two NaN of different bits, infinite between a NaN and a number. A complex number's is the
    larger one of its parts', an integer's the plain difference.

    Attributes:
        differing: how many elements have other bits.
        first: the index of the first one in C order.
        values: the two values there.
        ulp: their distance.
        largest_ulp: the largest distance of all elements.
    """

    differing: int
    first: tuple[int, ...]
    values: tuple[Any, Any]
    ulp: float
    largest_ulp: float


def difference_of(one: np.ndarray, other: np.ndarray) -> Difference | None:
    """How two arrays of the same dtype and shape differ; None where all bits are equal."""
    count, first, largest, start = 0, -1, 0.0, 0
    for piece, other_piece in zip(pieces_of(one), pieces_of(other), strict=True):
        places = np.flatnonzero(_bits(piece) != _bits(other_piece))
        if places.size:
            first = start + int(places[0]) if first < 0 else first
            count += places.size
            largest = max(largest, float(_distances(piece[places], other_piece[places]).max()))
        start += piece.size
    if not count:
        return None
    index = np.unravel_index(first, one.shape)
    values = one[index], other[index]
    ulp = float(_distances(*(np.array([value], one.dtype) for value in values))[0])
    return Difference(count, tuple(map(int, index)), values, ulp, largest)


def _bits(array: np.ndarray) -> np.ndarray:
    """An item of bits for each element, whose equality is that of the elements' bytes."""
    return np.ascontiguousarray(array).view(np.dtype((np.void, array.dtype.itemsize)))


def _distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The distance of each pair of elements, as float64."""
    distances: np.ndarray
    if one.dtype.kind == "c":
        parts = [_distances(getattr(one, part), getattr(other, part)) for part in ("real", "imag")]
        distances = np.maximum(*parts)
        return distances
    if one.dtype.kind in "biu" or "int" in one.dtype.name:
        wide, other_wide = one.astype(np.longdouble), other.astype(np.longdouble)
        distances = np.abs(wide - other_wide).astype(np.float64)
        return distances
    (size, negative), (other_size, other_negative) = _sign_magnitude(one), _sign_magnitude(other)
    apart = np.where(size > other_size, size - other_size, other_size - size)
    distances = np.where(negative == other_negative, apart, size + other_size).astype(np.float64)
    nan, other_nan = np.isnan(one), np.isnan(other)
    distances[nan | other_nan] = math.inf
    distances[nan & other_nan] = 0
    return distances


def _sign_magnitude(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bits of floating-point numbers without the sign, which count the numbers from 0 on; and the sign."""
    width = 8 * array.dtype.itemsize
    bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").astype(np.uint64)
    sign = np.uint64(1 << (width - 1))
    return bits & ~sign, (bits & sign) != 0
