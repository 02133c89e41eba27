"""Where arrays lie in shared memory: their places, and views of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from gpu_adam.devices import Array
from gpu_adam.errors import ArgumentValueError
from gpu_adam.kernels import dtype_named
from gpu_adam.rules import shown
from gpu_adam.service.messages import Fields

LINE = 512
"""Bytes, of which every offset is a multiple: what CuPy's own arrays begin at."""

KINDS = (
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
)
"""NumPy's names of the dtypes that arrays in shared memory may have."""

_MOST = 2**62


class Place(NamedTuple):
    """Where an array lies.

    Attributes:
        offset: in bytes.
        shape: of the array.
        dtype: NumPy's name of it.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        return math.prod(self.shape) * dtype_named(self.dtype).itemsize

    def view(self, memory: Array) -> Array:
        """The array in a memory of uint8."""
        return memory[self.offset : self.offset + self.nbytes].view(dtype_named(self.dtype)).reshape(self.shape)

    def to_json(self) -> list[Any]:
        """What `place_in` reads."""
        return [self.offset, list(self.shape), self.dtype]


def place_in(nbytes: int, given: Any, argument: str) -> Place:
    """A place that a message names, once it is known to lie in a memory of so many bytes.

    Raises:
        ArgumentTypeError: no place.
        ArgumentValueError: an array of unknown dtype, misaligned, or not inside the memory.
    """
    parts = Fields({"place": given}, argument).items("place")
    fields = Fields(dict(zip(("offset", "shape", "dtype"), parts, strict=False)), argument)
    dtype = fields.text("dtype")
    if dtype not in KINDS:
        raise ArgumentValueError(argument, f"must have a dtype of {', '.join(KINDS)}", shown(dtype), "cast it")
    shape = tuple(
        Fields({"size": size}, f"{argument}'s shape").whole("size", _MOST) for size in fields.items("shape")[:64]
    )
    place = Place(fields.whole("offset", _MOST), shape, dtype)
    if place.offset % 16 or place.offset + place.nbytes > nbytes or len(shape) > 32:
        rule = f"must begin at a multiple of 16 and end within the {nbytes} bytes of its region"
        raise ArgumentValueError(argument, rule, shown(given), "check its offset and shape")
    return place


def placed(shapes: Iterable[tuple[tuple[int, ...], str]], start: int = 0) -> tuple[list[Place], int]:
    """A place for each array of a shape and dtype, one after the other, and where the last one ends."""
    places = []
    for shape, dtype in shapes:
        places.append(Place(start, tuple(shape), dtype))
        start += -(-places[-1].nbytes // LINE) * LINE
    return places, start
