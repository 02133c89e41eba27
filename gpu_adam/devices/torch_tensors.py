"""What torch alone knows of its tensors: where their memory lies, what they mean, and how often they were written."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from gpu_adam.devices import native_tensors
from gpu_adam.devices.native_tensors import NativeTensorReader
from gpu_adam.devices.pair_reader import ExpectedPairs
from gpu_adam.errors import ArgumentTypeError
from gpu_adam.kernels import MIXING, dtype_named
from gpu_adam.uninterrupted import Call


def is_tensor(obj: Any) -> bool:
    """Whether an object is a tensor of torch."""
    torch = sys.modules.get("torch")  # without which nobody has tensors
    return torch is not None and isinstance(obj, torch.Tensor)


def readable(obj: Any, argument: str) -> Any:
    """A tensor whose memory holds its elements as they are; what is no tensor of torch as it is.

    DLPack, by which memory is shared, knows nothing of negation that torch leaves for later.

    Args:
        obj: a tensor, or any other object.
        argument: the object's name, for messages.

    Returns:
        The tensor itself, or a copy where elements were still to be conjugated or negated.

    Raises:
        ArgumentTypeError: a tensor without memory for each element, or with a dtype that NumPy has not.
    """
    if not is_tensor(obj):
        return obj
    if obj.layout is not sys.modules["torch"].strided:
        remedy = "pass its to_dense(), or an IndexedSlices of its values and rows"
        raise ArgumentTypeError(argument, "must be a dense tensor", f"layout {obj.layout}", remedy)
    if obj.device.type == "meta":
        raise ArgumentTypeError(
            argument, "must have memory", "a tensor on the device meta", "compute it on another one"
        )
    name = str(obj.dtype).removeprefix("torch.")
    if obj.is_quantized or not (hasattr(np, name) or name in MIXING):
        raise ArgumentTypeError(argument, "must have a dtype that NumPy has", name, "cast it with its float()")
    return obj.resolve_conj().resolve_neg()


def from_dlpack(obj: Any, function: Callable[[Any], Any]) -> Any:
    """The memory of an object by `function`, NumPy's or CuPy's from_dlpack, neither of which takes torch's bfloat16."""
    if is_tensor(obj) and obj.dtype is sys.modules["torch"].bfloat16:
        return function(obj.view(sys.modules["torch"].int16)).view(dtype_named("bfloat16"))
    return function(obj)


def writeable(obj: Any, argument: str) -> Any:
    """A tensor that may be updated in place, apart from its graph; what is no tensor of torch as it is.

    A leaf that requires its gradient is what torch's own optimizers update, unseen by autograd.

    Args:
        obj: a tensor, or any other object.
        argument: the object's name, for messages.

    Raises:
        ArgumentTypeError: a tensor that cannot be read, or the elements of which are still to be computed.
    """
    if not is_tensor(obj):
        return obj
    if readable(obj, argument) is not obj:
        rule, got = "must be a tensor whose memory holds its elements", "one still to be conjugated or negated"
        raise ArgumentTypeError(argument, rule, got, "pass its resolve_conj().resolve_neg()")
    return obj.detach() if obj.is_leaf else obj


def written_calls(objects: Iterable[Any]) -> list[Call]:
    """Calls by which torch learns that the memory of its tensors among some objects has been written.

    Each raises the tensors' version counters, which all views of a tensor share. A graph that was recorded before and
    needs the old elements then refuses to go backward, as after a step of torch's own optimizers.
    """
    tensors = [obj for obj in objects if is_tensor(obj)]
    if not tensors:
        return []
    increment = sys.modules["torch"]._C._increment_version
    try:
        increment([])
    except TypeError:  # an older torch, whose function takes one tensor
        return [partial(increment, tensor) for tensor in tensors]
    return [partial(increment, tensors)]


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
        self._expected_dtypes, self._dtypes = expected.dtypes, list[Any]()
        self._is_array = np.array([kind is None for kind in expected.other_types])
        self._native: NativeTensorReader | None = None

    def read(self, pairs: Sequence[Any], addresses: np.ndarray) -> bool:
        """Write the addresses of the tensors among a step's gradients to where `addresses` is 0.

        Returns:
            Whether every gradient that should be an array has an address then.
        """
        torch = sys.modules.get("torch")
        device = None if torch is None else self._torch_device(torch)
        if device is None:  # then there are no tensors, or none may be read
            return False
        if native_tensors.is_available(torch):
            return self._native_reader(torch).read_gradients(pairs, device, addresses)
        missing = np.flatnonzero((addresses == 0) & self._is_array)
        try:
            found = np.array(self._each(torch, device, pairs, missing.tolist()), np.uint64)
        except (RuntimeError, NotImplementedError):  # a tensor without memory, such as those that vmap makes
            return False
        addresses[missing] = found
        return bool(found.all())

    def _native_reader(self, torch: Any) -> NativeTensorReader:
        if self._native is None:  # torch may be imported after the first step
            types = [torch.Tensor if is_array else None for is_array in self._is_array]
            self._native = NativeTensorReader(torch, types, self._shapes, self._expected_dtypes, are_plain=True)
        return self._native

    def _each(self, torch: Any, device: Any, pairs: Sequence[Any], numbers: Sequence[int]) -> list[int]:
        if not self._dtypes:
            known = {  # for each dtype once: NumPy makes its name anew each time
                dtype: getattr(torch, dtype.name, "a dtype that torch has not") for dtype in set(self._expected_dtypes)
            }
            self._dtypes = [known[dtype] for dtype in self._expected_dtypes]
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
