"""Whether what was passed as variables lies where it lay: many objects at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpu_adam.devices import native_tensors
from gpu_adam.devices.native_tensors import NativeTensorReader
from gpu_adam.devices.placement import Placement, placement_of


class Places:
    """Where raw arrays of one device lie. torch's tensors are looked at in one call, where torch can do so.

    Args:
        objects: the arrays.
        placements: of each.
        dtypes: NumPy's, of each.
    """

    def __init__(self, objects: Sequence[Any], placements: Sequence[Placement], dtypes: Sequence[np.dtype]) -> None:
        torch = sys.modules.get("torch")
        classes = (torch.Tensor, torch.nn.Parameter) if torch is not None and native_tensors.is_available(torch) else ()
        tensors = [number for number, obj in enumerate(objects) if type(obj) in classes]
        known = set(tensors)
        self._others = [(obj, placements[n]) for n, obj in enumerate(objects) if n not in known]
        self._tensors = [objects[n] for n in tensors]
        if self._tensors:
            shapes, own_dtypes = [placements[n].shape for n in tensors], [dtypes[n] for n in tensors]
            types = list(map(type, self._tensors))
            # Not plain ones: a parameter requires its gradient.
            self._reader = NativeTensorReader(torch, types, shapes, own_dtypes, are_plain=False)
            self._device = self._tensors[0].device
            # Without elements there may be no memory, for which the reader says 1.
            addresses = [1 if 0 in placements[n].shape else placements[n].address for n in tensors]
            self._addresses = np.array(addresses, np.uint64)

    def are_kept(self) -> bool:
        """Whether every object lies where it lay, with its shape and dtype."""
        if self._tensors and not self._reader.lie_at(self._tensors, self._device, self._addresses):
            return False
        return all(placement_of(obj) == placement for obj, placement in self._others)
