"""Where the memory of torch's tensors lies, asked of torch, without making an array of each: see `TorchReader`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpu_adam.devices.pair_reader import ExpectedPairs


class TorchReader:
    """Reads gradients that are torch's tensors.

    A tensor is read if its memory holds all its elements as they are: a tensor of torch's own class, which requires no
    gradient, strided, contiguous, not to be conjugated or negated when it is read. Any other object is left to be
    looked at more closely.

    Args:
        expected: the pairs of a step.
        torch_device: torch's device that the tensors must lie on, from the module torch; None where none may be read.
    """

    def __init__(self, expected: ExpectedPairs, torch_device: Callable[[Any], Any]) -> None:
        self._torch_device = torch_device
        self._shapes, self._sizes = expected.shapes, [math.prod(shape) for shape in expected.shapes]
        self._widths = [dtype.itemsize for dtype in expected.dtypes]
        self._names, self._dtypes = [dtype.name for dtype in expected.dtypes], list[Any]()
        self._is_array = np.array([kind is None for kind in expected.other_types])

    def read(self, pairs: Sequence[Any], addresses: np.ndarray) -> bool:
        """Write the addresses of the tensors among a step's gradients to where `addresses` is 0.

        Returns:
            Whether every gradient that should be an array has an address then.
        """
        torch = sys.modules.get("torch")
        if torch is None:  # then there are no tensors
            return False
        missing = np.flatnonzero((addresses == 0) & self._is_array).tolist()
        tensor_type = torch.Tensor
        for number in missing:
            if type(pairs[number][0]) is tensor_type:
                break
        else:
            return False
        device = self._torch_device(torch)
        if device is None:
            return False
        try:
            found = self._addresses(torch, device, pairs, missing)
        except (RuntimeError, NotImplementedError):  # a tensor without memory, such as those that vmap makes
            return False
        addresses[missing] = found
        return 0 not in found

    def _addresses(self, torch: Any, device: Any, pairs: Sequence[Any], numbers: Sequence[int]) -> list[int]:
        if not self._dtypes:  # torch may be imported after the first step
            self._dtypes = [getattr(torch, name, "a dtype that torch has not") for name in self._names]
        tensor_type, strided = torch.Tensor, torch.strided
        shapes, sizes, widths, dtypes = self._shapes, self._sizes, self._widths, self._dtypes
        return [
            address or not sizes[n]  # torch gives empty tensors no memory
            if type(tensor := pairs[n][0]) is tensor_type
            and tensor.dtype is dtypes[n]
            and tensor.shape == shapes[n]
            and tensor.device == device
            and tensor.layout is strided
            and tensor.is_contiguous()
            and not tensor.requires_grad
            and not tensor.is_neg()
            and not (dtypes[n].is_complex and tensor.is_conj())
            and tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + sizes[n]) * widths[n]
            and (address := tensor.data_ptr()) % widths[n] == 0
            else 0
            for n in numbers
        ]
