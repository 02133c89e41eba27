"""The gradient of an array of which only parts were used, kept as those parts."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_adam.arrays import add_at
from gpu_adam.variables import IndexedSlices


class SparseCotangent:
    """A gradient that is 0 except in the elements that were taken from the array.

    Adding two joins their parts, so that many slices of one array cost what they hold and the array once, not the array
    each.  Adding a dense gradient, or passing the gradient on through another operation, makes it dense.  An element
    that was taken several times gets its gradients in order of occurrence, those of several parts in the order of the
    backward pass.

    Args:
        like: the array that elements were taken from.
        key: which elements were taken, as an index in brackets.
        values: the gradient with respect to those elements.
        repeats: whether an element may have been taken twice.
        rows: whether `key` is a vector of row numbers, none negative, which the sparse update takes as they are.
    """

    __array_ufunc__ = None  # so that `array + sparse` asks __radd__
    __slots__ = ("like", "parts", "rows")

    def __init__(self, like: Any, key: Any, values: Any, *, repeats: bool = False, rows: bool = False) -> None:
        self.like = like
        self.parts = [(key, values, repeats or rows)]
        self.rows = rows

    @property
    def shape(self) -> Any:
        """The shape of the dense gradient."""
        return self.like.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the dense gradient."""
        return self.like.dtype

    def __add__(self, other: Any) -> Any:
        if isinstance(other, SparseCotangent):
            self.parts += other.parts
            self.rows = self.rows and other.rows
            return self
        return self._added_to(other.copy())

    __radd__ = __add__

    def dense(self) -> Any:
        """The same gradient as an array."""
        return self._added_to(np.zeros_like(self.like))

    def slices(self) -> IndexedSlices:
        """The same gradient, if it is one of rows, in the form that the sparse update takes; rows may repeat."""
        if len(self.parts) == 1:
            indices, values, _ = self.parts[0]
        else:
            indices, values = (np.concatenate([part[i] for part in self.parts]) for i in (0, 1))
        return IndexedSlices(values, indices, self.like.shape)

    def _added_to(self, total: Any) -> Any:
        for key, values, repeats in self.parts:
            if repeats:
                add_at(total, key, values)
            else:
                total[key] += values
        return total
