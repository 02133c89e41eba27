"""What a device can do. The controller knows devices by this interface alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np

from gpu_adam.devices.pair_reader import AddressReader, ExpectedPairs, PairReader, PythonPairReader
from gpu_adam.devices.torch_tensors import TorchReader
from gpu_adam.kernels import Kernel
from gpu_adam.uninterrupted import Call

Array = Any
"""A NumPy array on the host device, a CuPy array on a CUDA device."""

PACK_BYTES = 16
"""Width of the kernels' loads and stores."""

LINE_BYTES = 64
"""A processor's cache line: arrays of different variables do not share one, so that threads do not wait for another."""

SHARED_BYTES = 2**16
"""Largest new array that shares an allocation with others, and keeps theirs in use as long as itself."""


class Launch(Protocol):
    """A kernel with its arguments, ready to run."""

    def call(self, blocks: int) -> Call:
        """A call that enqueues the kernel with a grid of `blocks` blocks and the arguments' contents of that moment."""

    def __call__(self, blocks: int) -> None:
        """Make that call."""


class StagedArray(Protocol):
    """An array of numbers or structs in device memory that is rewritten from step to step."""

    address: int

    def write(self, values: np.ndarray, *, captured: bool = False) -> None:
        """Enqueue new contents, without waiting for the device.

        Args:
            values: the contents.
            captured: whether the write becomes part of a graph, which makes it again at every replay. It is then the
                first one and the last.
        """


class ReadBack(Protocol):
    """Copies of an array's contents in host memory. They are made in the order of the stream, and nobody waits."""

    def calls(self) -> list[Call]:
        """Calls that enqueue one more copy."""

    def read(self, *, waits: bool) -> tuple[int, np.ndarray]:
        """How many of the copies that were not forgotten are there, and the last one of these.

        Args:
            waits: whether to wait for all of them.
        """

    def forget(self, number: int) -> list[Call]:
        """Calls that forget so many copies, the oldest ones, which are there."""


class Snapshot(Protocol):
    """The contents of arrays in host memory, as they were at one point of the stream."""

    def read(self) -> list[np.ndarray]:
        """The contents. Waits for them, in whichever thread."""


class Landing(Protocol):
    """Host memory for what an array of the device is to get from elsewhere.

    Attributes:
        array: the memory, of the array's shape and dtype. Not to be written any more once it is landed.
    """

    array: np.ndarray

    def land(self) -> None:
        """Enqueue the copy into the device's array, once. Nobody waits."""


class Capture(Protocol):
    """One capture: what a function enqueues becomes a graph."""

    def run(self, function: Callable[[], object]) -> None:
        """Call the function; what it enqueues on the current stream, with all memory that it allocates, is the graph's.

        Raises:
            ArgumentValueError: the function did what a capture forbids, such as to wait for the device.
        """

    def outside(self) -> AbstractContextManager[Any]:
        """A context, for the time of `run`, in which one works as if there were no capture."""

    def launch_call(self) -> Call:
        """A call that enqueues the graph once."""


class SharedMemory(Protocol):
    """Memory that this process has made for others.

    Attributes:
        array: all of it, a writeable array of uint8 on the device.
        handle: what others pass to `Device.map_memory`, as JSON has it.
        descriptor: a file descriptor that they need too, or -1.
    """

    array: Array
    handle: dict[str, Any]
    descriptor: int

    def close(self) -> None:
        """Give it back; on the host as soon as no array and no other process has it."""


class SharedEvent(Protocol):
    """A point in a stream that other processes' streams can wait for.

    Attributes:
        handle: what others pass to `Device.map_event`, as JSON has it.
    """

    handle: str

    def record(self) -> None:
        """Let it stand for all that is enqueued on the current stream so far."""

    def wait(self) -> None:
        """Let what is enqueued on the current stream from now on follow what the event stands for now."""

    def close(self) -> None:
        """Give it back."""


class Device(ABC):
    """A place where arrays live and kernels run.

    Attributes:
        name: "host" or "cuda:N".
        xp: the array module, ``numpy`` or ``cupy``.
        captures: whether what is enqueued can become part of a graph.
    """

    name: str
    xp: Any
    captures: bool

    def __repr__(self) -> str:
        return f"<gpu_adam device {self.name}>"

    @abstractmethod
    def activate(self) -> AbstractContextManager[Any]:
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
    def is_plain(self, obj: Any, dtype: np.dtype) -> bool:
        """Whether `obj` is known at a glance to be this device's own C-contiguous array of that dtype, aligned."""

    def addresses(self, arrays: Sequence[Array]) -> np.ndarray:
        """The address of each array's first element, as uint64."""
        return np.array([self.address(array) for array in arrays], np.uint64)

    @abstractmethod
    def address_reader(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype]) -> AddressReader:
        """A function that reads the addresses of as many arrays as there are shapes and dtypes.

        An address is 0 unless the object is the device's contiguous array of that shape and dtype.
        """

    @abstractmethod
    def staged(self, size: int, dtype: np.dtype) -> StagedArray:
        """A new array of `size` elements that is rewritten from step to step.

        Args:
            size: number of elements.
            dtype: of an element; a struct's or a number's.
        """

    @abstractmethod
    def read_back(self, array: Array) -> ReadBack:
        """Copies of the contents of one of the device's arrays, one-dimensional, as they come about."""

    @abstractmethod
    def snapshot(self, arrays: Sequence[Array], *, lasting: bool) -> Snapshot:
        """The contents that arrays of this device have once everything enqueued so far is done. Nobody waits.

        What is enqueued afterwards, on the same stream, does not change them.

        Args:
            arrays: C-contiguous.
            lasting: whether also calls of this thread must not change the contents, as they may on the host.
        """

    @abstractmethod
    def landing(self, array: Array) -> Landing:
        """Host memory for what an array of this device is to get, the counterpart of a snapshot.

        On the host it is the array itself.

        Args:
            array: C-contiguous.
        """

    @abstractmethod
    def copy_call(self, targets: Sequence[Array], sources: Sequence[Array]) -> Call:
        """A call, to be made once, that enqueues copies into arrays of this device.

        Args:
            targets: C-contiguous arrays of this device.
            sources: for each a C-contiguous array of the same shape and dtype, on this device or in host memory; or
                arrays of this device alone, which are cast.
        """

    @abstractmethod
    def prepare(self, kernel: Kernel, arguments: Sequence[np.ndarray]) -> Launch:
        """Compile `kernel` if need be and bind `arguments`.

        Every argument is a NumPy array of size 1 that is passed by value and read at each launch; a pointer is an
        address as uint64. What the addresses point to must outlive the launches.
        """

    def share_processors(self) -> None:  # noqa: B027  # most compute elsewhere
        """Leave the processors to other processes between launches, from now on, in the whole of this process."""

    @abstractmethod
    def resumed(self) -> Callable[[], AbstractContextManager[Any]]:
        """A function that gives a context in which what is now the current stream of this device is it again."""

    @abstractmethod
    def is_capturing(self) -> bool:
        """Whether what is enqueued now becomes part of a graph, to run at every replay."""

    @abstractmethod
    def capture(self) -> Capture | None:
        """A new capture; None where nothing can become part of a graph."""

    @abstractmethod
    def private_pool(self) -> tuple[Any, AbstractContextManager[Any]]:
        """A pool of memory, and a context in which new arrays are allocated from it.

        The pool must be kept alive as long as the arrays are used.
        """

    @abstractmethod
    def keep_with_graph(self, obj: Any) -> None:
        """Keep an object alive as long as the graph that is being captured, where the graph can be reached."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything enqueued on the current stream is done."""

    @abstractmethod
    def facts(self) -> list[tuple[str, str]]:
        """(label, value) pairs for ``gpu-adam info``."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """What names the device in every process of the machine, whatever number it has there."""

    @abstractmethod
    def share_memory(self, nbytes: int, *, read_only: bool) -> SharedMemory:
        """New memory for other processes too, full of zeros.

        Args:
            nbytes: how much; there may be more.
            read_only: whether others may only read. On CUDA nothing hinders them.
        """

    @abstractmethod
    def map_memory(self, handle: dict[str, Any], descriptor: int) -> SharedMemory:
        """Another process's memory, by what its `SharedMemory` says. The descriptor stays open."""

    @abstractmethod
    def share_event(self) -> SharedEvent:
        """A new event, for which other processes' streams can wait too."""

    @abstractmethod
    def map_event(self, handle: str) -> SharedEvent:
        """Another process's event, by its handle."""

    @property
    @abstractmethod
    def checks_indices(self) -> bool:
        """Whether reading a gradient's indices costs no wait, so that they can be checked before a step."""

    def pair_reader(self, expected: ExpectedPairs) -> PairReader:
        """A reader that recognises a step whose variables lie on this device."""
        addresses = self.address_reader(expected.shapes, expected.dtypes)
        return PythonPairReader(expected, addresses, TorchReader(expected, self.torch_device))

    def torch_device(self, torch: Any) -> Any:
        """The device of torch that this one is, if a step may read its tensors' memory as it is now; else None.

        Args:
            torch: the module.
        """
        return None

    def on_stream_of(self, torch: Any) -> AbstractContextManager[Any]:
        """A context in which what is enqueued here follows what torch has enqueued on its current stream.

        Args:
            torch: the module.
        """
        return nullcontext()

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype, like: Array | None = None) -> Array:
        """New zeros. With `like` they have its misalignment: see `zeros_beside`."""
        if like is not None:
            return self.zeros_beside([like], dtype, shape)[0]
        with self.activate():
            array = self.empty(math.prod(shape), dtype)
            array.fill(0)
            return array.reshape(shape)

    def zeros_beside(
        self, arrays: Sequence[Array], dtype: np.dtype, shape: tuple[int, ...] | None = None
    ) -> list[Array]:
        """New zeros for each array, of its shape or of `shape`, as many elements past a 16-byte boundary as the array.

        The kernels bring an array to such a boundary by a scalar prologue, which then aligns the new arrays too
        (memory.cuh). Small arrays share one allocation, so that a model of many variables costs few.
        """
        pack = max(1, PACK_BYTES // dtype.itemsize)
        line = max(1, LINE_BYTES // dtype.itemsize)
        made: list[Array] = []
        starts: list[int] = []  # where each array begins in the shared memory; -1 for one with memory of its own
        used = 0
        with self.activate():
            for array, address in zip(arrays, self.addresses(arrays).tolist(), strict=True):
                wanted = array.shape if shape is None else shape
                size, itemsize = math.prod(wanted), array.dtype.itemsize
                skip = address // itemsize % max(1, PACK_BYTES // itemsize) % pack if array.size else 0
                if size * dtype.itemsize > SHARED_BYTES or len(arrays) == 1:
                    memory = self.empty(skip + size, dtype)
                    memory.fill(0)
                    made.append(memory[skip:].reshape(wanted))
                    starts.append(-1)
                else:
                    made.append(None)
                    starts.append(used + skip)
                    used += -(-(skip + size) // line) * line
            memory = self.empty(used, dtype)
            memory.fill(0)
            for number, (array, start) in enumerate(zip(arrays, starts, strict=True)):
                if start >= 0:
                    wanted = array.shape if shape is None else shape
                    made[number] = memory[start : start + math.prod(wanted)].reshape(wanted)
        return made
