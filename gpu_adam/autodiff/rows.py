"""A gradient that touches some rows of a variable only, kept as those rows."""

from typing import Any

import numpy as np

from gpu_adam.variables import IndexedSlices


class Rows:
    """The gradient of gathers along the first axis of an array.

    Adding two joins their rows; adding a dense gradient, or passing it on through another operation, makes it dense.

    Args:
        like: the array that rows were taken from.
        indices: which rows, a vector; none negative.
        values: their gradients, one per index.
    """

    __array_ufunc__ = None  # so that `array + rows` asks __radd__
    __slots__ = ("like", "parts")

    def __init__(self, like: Any, indices: Any, values: Any) -> None:
        self.like = like
        self.parts = [(indices, values)]

    @property
    def shape(self) -> Any:
        """The shape of the dense gradient."""
        return self.like.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the dense gradient."""
        return self.like.dtype

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Rows):
            self.parts += other.parts
            return self
        return self._added_to(other.copy())

    __radd__ = __add__

    def dense(self) -> Any:
        """The same gradient as an array."""
        return self._added_to(np.zeros_like(self.like))

    def slices(self) -> IndexedSlices:
        """The same gradient in the form that the sparse update takes; rows may repeat."""
        if len(self.parts) == 1:
            indices, values = self.parts[0]
        else:
            indices, values = (np.concatenate(parts) for parts in zip(*self.parts, strict=True))
        return IndexedSlices(values, indices, self.like.shape)

    def _added_to(self, total: Any) -> Any:
        for indices, values in self.parts:
            np.add.at(total, indices, values)
        return total
