"""What a device can do. The controller knows devices by this interface alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from gpu_adam.kernels import Kernel

Array = Any
"""A NumPy array on the host device, a CuPy array on a CUDA device."""

PACK_BYTES = 16
"""Width of the kernels' loads and stores."""


class Launch(Protocol):
    """A kernel with its arguments, ready to run."""

    def __call__(self, blocks: int) -> None:
        """Enqueue the kernel with a grid of `blocks` blocks and the arguments' present contents."""


class AddressReader(Protocol):
    """Finds the addresses of a fixed number of arrays with fixed shapes and dtype."""

    def __call__(self, arrays: list[Any]) -> np.ndarray:
        """uint64 addresses, each 0 unless the object is the device's contiguous array of the right shape and dtype."""


class PointerTable(Protocol):
    """An array of addresses in device memory that is rewritten from step to step."""

    address: int

    def write(self, addresses: np.ndarray) -> None:
        """Enqueue the new contents, without waiting for the device."""


class Device(ABC):
    """A place where arrays live and kernels run.

    Attributes:
        name: "host" or "cuda:N".
        xp: the array module, ``numpy`` or ``cupy``.
        max_blocks: largest grid of a launch; kernels stride over what is beyond.
    """

    name: str
    xp: Any
    max_blocks: int

    def __repr__(self) -> str:
        return f"<gpu_adam device {self.name}>"

    @abstractmethod
    def current(self) -> AbstractContextManager[Any]:
        """A context in which the array module works on this device."""

    @abstractmethod
    def array(self, values: Any, dtype: np.dtype | None = None) -> Array:
        """A new C-contiguous array with these values (a NumPy array, this device's array, or what NumPy converts)."""

    @abstractmethod
    def empty(self, size: int, dtype: np.dtype) -> Array:
        """A new one-dimensional array with undefined contents, its address a multiple of 16."""

    @abstractmethod
    def numpy(self, array: Array) -> np.ndarray:
        """A copy in host memory. Waits for the device."""

    @abstractmethod
    def view(self, obj: Any) -> Array | None:
        """The memory of `obj` as this device's array, without a copy; None where it does not lie on this device."""

    @abstractmethod
    def address(self, array: Array) -> int:
        """Address of the first element."""

    @abstractmethod
    def address_reader(self, shapes: Sequence[tuple[int, ...]], dtype: np.dtype) -> AddressReader:
        """A function that checks and finds the addresses of arrays of these shapes and this dtype."""

    @abstractmethod
    def pointer_table(self, size: int) -> PointerTable:
        """A new table of `size` addresses."""

    @abstractmethod
    def prepare(self, kernel: Kernel, arguments: Sequence[np.ndarray]) -> Launch:
        """Compile `kernel` if need be and bind `arguments`.

        Every argument is a NumPy array of size 1 that is passed by value and read at each launch; a pointer is an
        address as uint64. What the addresses point to must outlive the launches.
        """

    @abstractmethod
    def is_capturing(self) -> bool:
        """Whether what is enqueued now becomes part of a graph, to run at every replay."""

    @abstractmethod
    def own_memory(self) -> tuple[Any, AbstractContextManager[Any]]:
        """A pool of memory of its own, and a context whose new arrays lie in it. It must be kept as long as they."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything enqueued on the current stream is done."""

    @abstractmethod
    def facts(self) -> list[tuple[str, str]]:
        """(label, value) pairs for ``gpu-adam info``."""

    @property
    @abstractmethod
    def checks_indices(self) -> bool:
        """Whether reading a gradient's indices costs no wait, so that they can be checked before a step."""

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype, like: Array | None = None) -> Array:
        """New zeros, as many elements past a 16-byte boundary as `like`: one head serves both (memory.cuh)."""
        size = int(np.prod(shape, dtype=np.int64))
        skip = 0
        if like is not None and like.size:
            pack = max(1, PACK_BYTES // like.dtype.itemsize)
            skip = self.address(like) // like.dtype.itemsize % pack
        with self.current():
            array = self.empty(skip + size, dtype)
            array.fill(0)
            return array[skip:].reshape(shape)
