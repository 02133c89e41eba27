"""Rows out of range: what the kernels note of them, and the error that tells."""

from __future__ import annotations

import numpy as np

from gpu_adam import kernels
from gpu_adam.errors import SparseIndexError
from gpu_adam.variables import Variable


class IndexErrors:
    """The note that the kernels make of rows out of range of one variable, in device memory."""

    def __init__(self, variable: Variable) -> None:
        self._variable, self._device = variable, variable.device
        self.array = self._device.array(np.atleast_1d(kernels.NO_INDEX_ERRORS).view(np.uint8))

    def check(self) -> None:
        """Raise SparseIndexError if an index was out of range since the last check. Waits for the device."""
        found = self._device.numpy(self.array).view(kernels.INDEX_ERRORS)[0]
        if found["count"]:
            with self._device.activate():
                self.array[...] = self._device.array(np.atleast_1d(kernels.NO_INDEX_ERRORS).view(np.uint8))
            others = int(found["count"]) - 1
            raise index_error(self._variable, int(found["first_position"]), int(found["first_index"]), others)


def index_error(variable: Variable, position: int, index: int, others: int = 0) -> SparseIndexError:
    """The error for a row out of range."""
    and_others = f" and {others} more" if others else ""
    return SparseIndexError(
        f"IndexedSlices.indices[{position}] of variable {variable.name!r}",
        f"must lie in [0, {variable.shape[0]})",
        f"{index}{and_others}",
        "check the indices; on a CUDA device such rows were left out of the update",
    )
