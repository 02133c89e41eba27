"""What is in a checkpoint, and in an array in a few numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpu_adam.distributed import checkpoint as of_ranks
from gpu_adam.state import checkpoint, saving

_PIECE = 1 << 20  # elements that are looked at together, so that a large array takes little memory


class File(NamedTuple):
    """A whole checkpoint.

    Attributes:
        path: the file; or the directory, of several ranks.
        version: of its format.
        digest: the SHA-256 of its manifest, and so of all there is; version 1 has none, "".
        arrays: by the names of today's version.
        note: what belongs to them.
    """

    path: Path
    version: int
    digest: str
    arrays: dict[str, np.ndarray]
    note: dict[str, Any]


def read(path: Path) -> File:
    """Read a checkpoint of any version, or the one that several ranks have saved into a directory.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no whole checkpoint.
    """
    if path.is_dir():
        said, whole, note = of_ranks.read_all(path)
        return File(path, said.version, said.digest, whole, note)
    manifest, arrays = checkpoint.read_all(path)
    return File(path, manifest.version, manifest.digest, *saving.updated(str(path), (arrays, manifest.meta)))


class Summary(NamedTuple):
    """An array in a few numbers.

    Attributes:
        dtype: its name.
        shape: of the array.
        norm: the L2 norm of its finite elements.
        finite: how many of its elements are finite.
        size: how many it has.
    """

    dtype: str
    shape: tuple[int, ...]
    norm: float
    finite: int
    size: int


def summary_of(array: np.ndarray) -> Summary:
    """The numbers of an array of any numeric dtype."""
    largest, finite = 0.0, 0
    for parts in _finite_parts(array):
        finite += len(parts)
        largest = max(largest, float(parts.max(initial=0)))
    # Divided by the largest, no square is too large for a float, or so small that it is lost.
    squares = sum(float(np.square(parts / largest).sum()) for parts in _finite_parts(array)) if largest else 0.0
    return Summary(array.dtype.name, array.shape, largest * math.sqrt(squares), finite, array.size)


def pieces_of(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array's elements in C order, in pieces without axes of their own."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        yield flat[start : start + _PIECE]


def _finite_parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """The absolute values of the finite elements, as rows in float64: a complex one has two."""
    is_complex = array.dtype.kind == "c"
    for piece in pieces_of(array):
        wide: Any = piece.astype(np.complex128 if is_complex else np.float64)
        parts = np.abs(wide.view(np.float64).reshape(piece.size, 1 + is_complex))
        yield parts[np.isfinite(parts).all(axis=1)]
