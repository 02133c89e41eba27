"""CUDA devices: CuPy arrays, and the CUDA sources compiled by NVRTC. The only module that imports CuPy."""

from __future__ import annotations

import functools
import importlib
import itertools
import operator
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import cupy
import numpy as np

from gpu_adam.devices.base import (
    PACK_BYTES,
    Array,
    Capture,
    Device,
    Landing,
    Launch,
    ReadBack,
    SharedEvent,
    SharedMemory,
    Snapshot,
    StagedArray,
)
from gpu_adam.devices.native_pairs import ArrayKind, NativeAddressReader, NativePairReader, cupy_is_read_in_c
from gpu_adam.devices.pair_reader import AddressReader, ExpectedPairs, PairReader
from gpu_adam.devices.sharing import CudaEvent, CudaMapping, CudaSharedMemory
from gpu_adam.devices.torch_tensors import from_dlpack
from gpu_adam.errors import ArgumentValueError, KernelCompileError
from gpu_adam.kernels import BLOCK_SIZE, Kernel
from gpu_adam.uninterrupted import Call, all_of, make_all

_LINE = 64  # bytes: copies begin at multiples of it
_NOT_WHILE_CAPTURING = 900  # cudaErrorStreamCaptureUnsupported
_OF_CAPTURES = range(_NOT_WHILE_CAPTURING, 909)  # to cudaErrorStreamCaptureWrongThread

# No contraction to multiply-add: the bits of the host device. Division and square root are IEEE by default, and CuPy
# itself adds -ftz=true.
_OPTIONS = ("--std=c++17", "-fmad=false")


class CudaDevice(Device):
    """One NVIDIA GPU. Everything is enqueued on CuPy's current stream of this device.

    Args:
        index: the device's number, as CuPy counts.
    """

    xp = cupy
    checks_indices = False
    captures = True

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self.index = index
        self._kind = ArrayKind(cupy.ndarray, index)

    def __reduce__(self) -> tuple[Any, ...]:
        return cuda_device, (self.index,)

    def activate(self) -> AbstractContextManager[Any]:
        """A context in which CuPy works on this device."""
        return cupy.cuda.Device(self.index)  # type: ignore[no-any-return]

    def array(self, values: Any, dtype: np.dtype | None = None) -> Array:
        """A new C-contiguous array with these values; values on the host or on another device are copied over."""
        if not isinstance(values, (np.ndarray, cupy.ndarray)) and _is_in_device_memory(values):
            values = _shared(values)
        with self.activate():
            if isinstance(values, cupy.ndarray) and values.device.id != self.index:
                return self._array_from_elsewhere(values, dtype)
            return cupy.array(values, dtype, order="C")

    def _array_from_elsewhere(self, values: Array, dtype: np.dtype | None) -> Array:
        """A copy of another device's array, between what the current streams of both devices do before and after."""
        there, stream = cupy.cuda.Device(values.device.id), cupy.cuda.get_current_stream()
        with there:
            values = cupy.ascontiguousarray(values, dtype)
            its_stream = cupy.cuda.get_current_stream()
            is_written = its_stream.record()
        stream.wait_event(is_written)
        array = cupy.array(values)
        is_read = stream.record()
        with there:
            its_stream.wait_event(is_read)
        return array

    def empty(self, size: int, dtype: np.dtype) -> Array:
        """A new one-dimensional array with undefined contents; CuPy's addresses are multiples of 512."""
        with self.activate():
            return cupy.empty(size, dtype)

    def numpy(self, array: Array) -> np.ndarray:
        """A copy in host memory. Waits for the device."""
        with self.activate():
            return np.asarray(cupy.asnumpy(array))

    def view(self, obj: Any) -> Array | None:
        """The memory of `obj` as a CuPy array; None where it does not lie on this device."""
        array = None
        if isinstance(obj, cupy.ndarray):
            array = obj
        elif _is_in_device_memory(obj):
            with self.activate():
                array = _shared(obj)
        return array if array is not None and array.device.id == self.index else None

    def address(self, array: Array) -> int:
        """Address of the first element."""
        return int(array.data.ptr)

    def is_plain(self, obj: Any, dtype: np.dtype) -> bool:
        """Whether `obj` is known at a glance to be this device's own C-contiguous array of that dtype, aligned."""
        if type(obj) is not cupy.ndarray or obj.dtype != dtype or not obj._c_contiguous:
            return False
        memory = obj.data
        return bool(memory.device_id == self.index and memory.ptr % dtype.itemsize == 0)

    def address_reader(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype]) -> AddressReader:
        """A function that reads the addresses of as many arrays as there are shapes and dtypes."""
        if self._is_read_in_c():
            return NativeAddressReader(shapes, dtypes, self._kind)
        ndarray, index = cupy.ndarray, self.index
        expected = list(zip(shapes, dtypes, strict=True))

        def addresses(arrays: list[Any]) -> np.ndarray:
            found = [
                memory.ptr or not array.size  # CuPy gives empty arrays no memory
                if type(array) is ndarray
                and array.shape == shape
                and array.dtype == dtype
                and array._c_contiguous
                and (memory := array.data).device_id == index
                and memory.ptr % dtype.itemsize == 0
                else 0
                for array, (shape, dtype) in zip(arrays, expected, strict=True)
            ]
            return np.array(found, np.uint64)

        return addresses

    def _is_read_in_c(self) -> bool:
        with self.activate():
            return cupy_is_read_in_c(cupy)

    def pair_reader(self, expected: ExpectedPairs) -> PairReader:
        """A reader that recognises a step whose variables lie on this device."""
        if self._is_read_in_c():
            return NativePairReader(expected, self._kind, self.torch_device)
        return super().pair_reader(expected)

    def torch_device(self, torch: Any) -> Any:
        """The device of torch that this one is, while torch enqueues to the same stream as CuPy; else None."""
        with self.activate():
            stream = cupy.cuda.get_current_stream().ptr
        same = torch.cuda.is_initialized() and torch.cuda.current_stream(self.index).cuda_stream == stream
        return torch.device("cuda", self.index) if same else None

    @contextmanager
    def on_stream_of(self, torch: Any) -> Iterator[None]:
        """A context in which torch's current stream of this device is CuPy's."""
        with self.activate():  # a stream that was not made by CuPy is taken for one of the current device
            before = cupy.cuda.get_current_stream()
            cupy.cuda.Stream.from_external(_TorchStream(torch.cuda.current_stream(self.index).cuda_stream)).use()
        try:
            yield
        finally:
            with self.activate():
                before.use()

    def staged(self, size: int, dtype: np.dtype) -> StagedArray:
        """A new array of `size` elements that is rewritten from step to step."""
        return _StagedArray(self, size, dtype)

    def read_back(self, array: Array) -> ReadBack:
        """Copies of the contents of an array, as they come about."""
        return _Copies(self, array)

    def snapshot(self, arrays: Sequence[Array], *, lasting: bool) -> Snapshot:
        """Copies in pinned memory, which the current stream makes."""
        return _CudaSnapshot(self, arrays)

    def landing(self, array: Array) -> Landing:
        """Pinned memory, from which the current stream copies."""
        return _CudaLanding(self, array)

    def copy_call(self, targets: Sequence[Array], sources: Sequence[Array]) -> Call:
        """A call, to be made once, that enqueues copies on the current stream of this device."""
        if any(target.dtype != source.dtype for target, source in zip(targets, sources, strict=True)):
            return self._made_there(all_of(operator.setitem, targets, itertools.repeat(...), sources))
        runtime = cupy.cuda.runtime
        to_device, on_device = runtime.memcpyHostToDevice, runtime.memcpyDeviceToDevice
        is_host = [isinstance(source, np.ndarray) for source in sources]
        with self.activate():
            stream = cupy.cuda.get_current_stream().ptr
        copies = all_of(
            runtime.memcpyAsync,
            [target.data.ptr for target in targets],
            [s.ctypes.data if host else s.data.ptr for s, host in zip(sources, is_host, strict=True)],
            [target.nbytes for target in targets],
            [to_device if host else on_device for host in is_host],
            itertools.repeat(stream),
        )
        call = self._made_there(copies)  # the default stream is a number that means the current device's
        call.__dict__["sources"] = sources  # alive until the copies are enqueued
        return call

    def _made_there(self, call: Call) -> Call:
        """The call, made while this device is current."""
        current = current_index()
        if current == self.index:
            return call
        there, back = (functools.partial(cupy.cuda.runtime.setDevice, index) for index in (self.index, current))
        return all_of(functools.partial.__call__, (there, call, back))

    def prepare(self, kernel: Kernel, arguments: Sequence[np.ndarray]) -> Launch:
        """Compile `kernel` if need be and bind `arguments`."""
        return _CudaLaunch(self, _function(kernel, self.index), arguments)

    def is_capturing(self) -> bool:
        """Whether the current stream is being captured."""
        with self.activate():
            return bool(cupy.cuda.get_current_stream().is_capturing())

    def resumed(self) -> Callable[[], AbstractContextManager[Any]]:
        """A function that gives a context in which what is now the current stream of this device is it again."""
        with self.activate():
            return functools.partial(self._on, cupy.cuda.get_current_stream())

    @contextmanager
    def _on(self, stream: Any) -> Iterator[None]:
        with self.activate(), stream:
            yield

    def capture(self) -> Capture:
        """A new capture, on a stream of its own."""
        return _CudaCapture(self)

    def private_pool(self) -> tuple[Any, AbstractContextManager[Any]]:
        """A pool of memory, and a context in which new arrays are allocated from it."""
        pool = cupy.cuda.MemoryPool()
        return pool, cupy.cuda.using_allocator(functools.partial(_allocated, pool))

    def keep_with_graph(self, obj: Any) -> None:
        """Keep an object alive as long as CuPy's graph of what the current stream captures.

        CuPy's stream hands the graph a list of what it must keep, meant for captured functions of the host. A graph
        that is not CuPy's own keeps nothing.
        """
        with self.activate():
            kept = getattr(cupy.cuda.get_current_stream(), "_graph_host_funcargs", None)
        if isinstance(kept, list):
            kept.append((None, obj))

    def synchronize(self) -> None:
        """Wait for the current stream."""
        with self.activate():
            cupy.cuda.get_current_stream().synchronize()

    @property
    def identity(self) -> str:
        """The device's place on the PCI bus, and of its UUID what CuPy gives, which is cut off at the first zero byte.

        The place tells one GPU from another, the UUID the instances of one GPU (MIG).
        """
        uuid = cupy.cuda.runtime.getDeviceProperties(self.index)["uuid"]
        return f"{cupy.cuda.Device(self.index).pci_bus_id} {uuid.hex()}"

    def share_memory(self, nbytes: int, *, read_only: bool) -> SharedMemory:
        """New memory in an allocation of its own."""
        with self.activate():
            return CudaSharedMemory(cupy, nbytes)

    def map_memory(self, handle: dict[str, Any], descriptor: int) -> SharedMemory:
        """Another process's memory, by its IPC handle."""
        with self.activate():
            return CudaMapping(cupy, handle)

    def share_event(self) -> SharedEvent:
        """A new interprocess event."""
        with self.activate():
            return CudaEvent(cupy)

    def map_event(self, handle: str) -> SharedEvent:
        """Another process's event, by its IPC handle."""
        with self.activate():
            return CudaEvent(cupy, handle)

    def facts(self) -> list[tuple[str, str]]:
        """(label, value) pairs for ``gpu-adam info``."""
        runtime = cupy.cuda.runtime
        properties = runtime.getDeviceProperties(self.index)
        name = properties["name"]
        with self.activate():
            free, total = runtime.memGetInfo()
        driver = runtime.driverGetVersion()
        return [
            ("GPU", name.decode() if isinstance(name, bytes) else str(name)),
            ("compute capability", f"{properties['major']}.{properties['minor']}"),
            ("memory", f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"),
            ("driver", f"for CUDA {driver // 1000}.{driver % 1000 // 10}"),
            ("CuPy", cupy.__version__),
            ("NVRTC", "{}.{}".format(*nvrtc_version())),
        ]


def device_count() -> int:
    """How many devices answer. Raises CuPy's error where there is no driver."""
    return int(cupy.cuda.runtime.getDeviceCount())


def nvrtc_version() -> tuple[int, int]:
    """Version of NVRTC. Raises what its loader raises where there is none."""
    major, minor = cupy.cuda.nvrtc.getVersion()
    return int(major), int(minor)


def nccl_module() -> Any:
    """CuPy's module for NCCL, whose `available` is False where the library is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is missing
        return importlib.import_module("cupy.cuda.nccl")


def current_index() -> int:
    """Number of CuPy's current device."""
    return int(cupy.cuda.runtime.getDevice())


def index_of(obj: Any) -> int | None:
    """Number of the device of a CuPy array; None for anything else."""
    return int(obj.data.device_id) if isinstance(obj, cupy.ndarray) else None


def _is_in_device_memory(obj: Any) -> bool:
    if hasattr(obj, "__dlpack_device__"):
        return int(obj.__dlpack_device__()[0]) in (2, 13)
    return hasattr(obj, "__cuda_array_interface__")


def _shared(obj: Any) -> Array:
    """The memory of another framework's object as a CuPy array.

    DLPack lets the current stream wait for the object's own stream, where the array interface of torch and JAX says
    nothing of streams. In a capture, where a wait for work outside is not permitted, the array interface is taken.
    """
    if hasattr(obj, "__cupy_get_ndarray__"):
        return cupy.asarray(obj)
    is_capturing = cupy.cuda.get_current_stream().is_capturing()
    if hasattr(obj, "__dlpack__") and not is_capturing:
        try:
            return from_dlpack(obj, cupy.from_dlpack)
        except BufferError:  # memory that DLPack calls read-only, which the array interface may give nevertheless
            if not hasattr(obj, "__cuda_array_interface__"):
                raise
    if hasattr(obj, "__cuda_array_interface__"):
        return cupy.asarray(_Interface(obj) if is_capturing else obj)
    return from_dlpack(obj, cupy.from_dlpack)


class _TorchStream:
    """The protocol of streams, for a torch whose own streams do not have it yet."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


class _Interface:
    """An object's array interface without its stream, for which CuPy would have the host wait; it keeps the object."""

    def __init__(self, obj: Any) -> None:
        self._obj = obj
        self.__cuda_array_interface__ = {**obj.__cuda_array_interface__, "stream": None}


@functools.cache
def cuda_device(index: int) -> CudaDevice:
    """The one object for a device."""
    return CudaDevice(index)


def options(kernel_defines: Sequence[str]) -> tuple[str, ...]:
    """NVRTC's options for a kernel with these definitions."""
    return (*_OPTIONS, f"-DGPU_ADAM_PACK_BYTES={PACK_BYTES}", *(f"-D{define}" for define in kernel_defines))


@functools.cache
def _function(kernel: Kernel, index: int) -> Any:
    """The kernel as loaded on a device, which may be launched while that device is current."""
    # Headers are part of the text: CuPy's cache on disk does not look into -I directories.
    raw = cupy.RawKernel(kernel.source.text, kernel.name, options=options(kernel.source.defines))
    with cupy.cuda.Device(index):
        try:
            raw.compile()
        except cupy.cuda.compiler.CompileException as error:
            raise KernelCompileError(
                f"the kernels of {kernel.source.file}",
                "must compile with NVRTC",
                f"{error}\n",
                "check the versions of CuPy and NVRTC with: gpu-adam info",
            ) from error
        return raw.kernel  # a call of the RawKernel would look for it anew at every launch


def _as_argument(array: np.ndarray) -> Any:
    """An array of size 1 in the form in which CuPy passes its bytes by value at the least cost.

    CuPy asks an array for its `__array_interface__` at every launch: 4 to 7 us for a struct, whose fields NumPy lists.
    An object of CuPy's own holds the address. Where CuPy has none, bytes without fields are the next best.
    """
    holder = getattr(cupy.cuda.function, "CNumpyArray", None)
    return array.view(np.dtype((np.void, array.nbytes))) if holder is None else holder(array)


def _allocated(pool: Any, size: int) -> Any:
    try:
        return pool.malloc(size)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if error.status != _NOT_WHILE_CAPTURING:
            raise
        raise ArgumentValueError(
            "a step captured in a graph",
            "must need no memory in the capture modes 'global' and 'thread_local'",
            error,
            "do one such step before each capture, with contiguous gradients of as many rows, or capture in 'relaxed'",
        ) from error


class _CudaCapture:
    """See `Capture`. The mode "relaxed" lets a function allocate, and lets `outside` work on the stream of before.

    The stream under capture is non-blocking, so that also the legacy default stream may be worked on meanwhile.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device, self._pool = device, cupy.cuda.MemoryPool()
        self._graph: Any = None

    def run(self, function: Callable[[], object]) -> None:
        with self._device.activate():
            self._stream, self._allocator = cupy.cuda.get_current_stream(), cupy.cuda.get_allocator()
            stream = cupy.cuda.Stream(non_blocking=True)
            with stream, cupy.cuda.using_allocator(self._pool.malloc):
                stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
                try:
                    function()
                    self._graph = stream.end_capture()
                except BaseException as error:
                    with suppress(cupy.cuda.runtime.CUDARuntimeError):  # that it is invalid, or has ended
                        stream.end_capture()
                    if _is_of_captures(error):
                        raise ArgumentValueError(
                            "the captured function",
                            "must enqueue all work on the current stream, and wait for none",
                            error,
                            "leave out what waits, such as float(), numpy() and synchronize()",
                        ) from error
                    raise

    @contextmanager
    def outside(self) -> Iterator[None]:
        with self._device.activate(), self._stream, cupy.cuda.using_allocator(self._allocator):
            yield

    def launch_call(self) -> Call:
        with self._device.activate():
            launch = functools.partial(self._graph.launch, cupy.cuda.get_current_stream())
        return self._device._made_there(launch)


def _is_of_captures(error: BaseException) -> bool:
    if isinstance(error, cupy.cuda.runtime.CUDARuntimeError):
        return error.status in _OF_CAPTURES
    return type(error) is RuntimeError and "captur" in str(error)  # CuPy's own words


class _CudaLaunch:
    def __init__(self, device: CudaDevice, kernel: Any, arguments: Sequence[np.ndarray]) -> None:
        self._device, self._kernel = device, kernel
        self._arguments = tuple(map(_as_argument, arguments))
        self._call: tuple[int, Call] = -1, functools.partial(int)

    def call(self, blocks: int) -> Call:
        made_for, launch = self._call
        if blocks != made_for:
            launch = functools.partial(self._kernel, (blocks, 1, 1), (BLOCK_SIZE, 1, 1), self._arguments)
            self._call = blocks, launch
        return self._device._made_there(launch)

    def __call__(self, blocks: int) -> None:
        self.call(blocks)()


class _Staging:
    """Pinned host memory, from which the device copies on its own."""

    def __init__(self, size: int, dtype: np.dtype) -> None:
        memory = cupy.cuda.alloc_pinned_memory(size * dtype.itemsize)
        self.array = np.frombuffer(memory, dtype, size)
        self.address = memory.ptr
        self.copied = cupy.cuda.Event(disable_timing=True)

    def copy(self, values: np.ndarray, target: Array) -> Call:
        """Hold these values; a call that enqueues their copy on the current stream."""
        self.array[:] = values
        stream, to_device = cupy.cuda.get_current_stream().ptr, cupy.cuda.runtime.memcpyHostToDevice
        memcpy = cupy.cuda.runtime.memcpyAsync
        return functools.partial(memcpy, target.data.ptr, self.address, target.nbytes, to_device, stream)


_orphans: list[_Staging] = []  # buffers whose array is gone before their copy has run


def _release_orphans() -> None:
    _orphans[:] = [staging for staging in _orphans if not staging.copied.done]


class _StagedArray:
    """An array in device memory, written through a ring of pinned buffers.

    A pinned buffer must not be rewritten before its copy has run. Rather than wait for that, the ring grows. A graph
    copies its buffer again at every replay, so that the buffer is written once. It exists before the capture, which may
    forbid to allocate it.
    """

    def __init__(self, device: CudaDevice, size: int, dtype: np.dtype) -> None:
        self._device, self._size, self._dtype = device, size, dtype
        self._array = device.empty(size * dtype.itemsize, np.dtype(np.uint8))
        self.address = int(self._array.data.ptr)
        with device.activate():
            self._ring = [_Staging(size, dtype)]
        self._is_written = self._is_captured = False
        _release_orphans()

    def __del__(self) -> None:
        # Whether their copies have run is asked later: a graph may be under capture now, which forbids the question.
        if not sys.is_finalizing():
            _orphans.extend(getattr(self, "_ring", ()))  # of an array that could not be made there is none

    def write(self, values: np.ndarray, *, captured: bool = False) -> None:
        assert not self._is_captured, "a graph copies its buffer again"
        assert not (captured and self._is_written), "a graph has a buffer of its own"
        self._is_written, self._is_captured = True, captured
        with self._device.activate():
            if captured:
                self._ring[0].copy(values, self._array)()  # not recorded: its event could not be asked
                return
            if self._ring and self._ring[0].copied.done:
                staging = self._ring.pop(0)
            else:
                staging = _Staging(self._size, self._dtype)
            self._ring.append(staging)
            # In one go: a buffer whose copy is under way unrecorded would be rewritten.
            record = functools.partial(staging.copied.record, cupy.cuda.get_current_stream())
            make_all([staging.copy(values, self._array), record])


class _Copies:
    """Copies of an array in pinned buffers, of which there are as many as the host is ahead."""

    def __init__(self, device: CudaDevice, array: Array) -> None:
        self._device, self._array = device, array
        self._free: list[_Staging] = []
        self._made: deque[_Staging] = deque()

    def __del__(self) -> None:
        if not sys.is_finalizing():
            _orphans.extend(getattr(self, "_made", ()))

    def calls(self) -> list[Call]:
        array = self._array
        with self._device.activate():
            staging = self._free.pop() if self._free else _Staging(array.nbytes, np.dtype(np.uint8))
            stream, to_host = cupy.cuda.get_current_stream(), cupy.cuda.runtime.memcpyDeviceToHost
            memcpy = cupy.cuda.runtime.memcpyAsync
            copy = functools.partial(memcpy, staging.address, array.data.ptr, array.nbytes, to_host, stream.ptr)
            record = functools.partial(staging.copied.record, stream)
        return [*map(self._device._made_there, (copy, record)), functools.partial(self._made.append, staging)]

    def read(self, *, waits: bool) -> tuple[int, np.ndarray]:
        number, last = 0, np.zeros(0, np.uint8)
        for staging in self._made:
            if waits:
                staging.copied.synchronize()
            elif not staging.copied.done:
                break
            number, last = number + 1, staging.array
        return number, last.copy()

    def forget(self, number: int) -> list[Call]:
        forgotten = itertools.islice(self._made, number)
        return [
            call
            for staging in forgotten
            for call in (functools.partial(self._free.append, staging), functools.partial(self._made.popleft))
        ]


class _CudaSnapshot:
    """Copies of arrays in one pinned buffer.

    They are made on the current stream, whose later work waits for them on the device. A stream of their own would gain
    nothing: the next step writes what they read, and must come after them. Copies on the device, which take a fortieth
    of the time, would need as much memory again as the state, and could leave a step without.
    """

    def __init__(self, device: CudaDevice, arrays: Sequence[Array]) -> None:
        self._device = device
        self._kinds = [(array.shape, array.dtype, array.nbytes) for array in arrays]
        ends = list(itertools.accumulate(-(-array.nbytes // _LINE) * _LINE for array in arrays))
        self._begins, self._is_read = [0, *ends[:-1]], True
        runtime = cupy.cuda.runtime
        with device.activate():
            self._staging = staging = _Staging(max(1, *ends), np.dtype(np.uint8))
            stream = cupy.cuda.get_current_stream()
            copies = all_of(
                runtime.memcpyAsync,
                [staging.address + begin for begin in self._begins],
                [array.data.ptr for array in arrays],
                [array.nbytes for array in arrays],
                itertools.repeat(runtime.memcpyDeviceToHost),
                itertools.repeat(stream.ptr),
            )
            # In one go: a buffer whose copies are under way unrecorded would be given to others.
            is_unread = functools.partial(setattr, self, "_is_read", False)
            make_all([is_unread, copies, functools.partial(staging.copied.record, stream)])

    def __del__(self) -> None:
        if not (self._is_read or sys.is_finalizing()):
            _orphans.append(self._staging)

    def read(self) -> list[np.ndarray]:
        with self._device.activate():
            self._staging.copied.synchronize()
        self._is_read = True
        memory = self._staging.array
        return [
            memory[begin : begin + nbytes].view(dtype).reshape(shape)
            for begin, (shape, dtype, nbytes) in zip(self._begins, self._kinds, strict=True)
        ]


class _CudaLanding:
    """A pinned buffer, which stays until the device has copied from it."""

    def __init__(self, device: CudaDevice, array: Array) -> None:
        self._device, self._target, self._is_landed = device, array, False
        with device.activate():
            _release_orphans()
            self._staging = _Staging(max(1, array.nbytes), np.dtype(np.uint8))
        self.array = self._staging.array[: array.nbytes].view(array.dtype).reshape(array.shape)

    def __del__(self) -> None:
        if self._is_landed and not sys.is_finalizing():
            _orphans.append(self._staging)

    def land(self) -> None:
        staging, target, runtime = self._staging, self._target, cupy.cuda.runtime
        with self._device.activate():
            stream = cupy.cuda.get_current_stream()
            arguments = target.data.ptr, staging.address, target.nbytes, runtime.memcpyHostToDevice, stream.ptr
            # In one go, as for a snapshot.
            is_landed = functools.partial(setattr, self, "_is_landed", True)
            copy = functools.partial(runtime.memcpyAsync, *arguments)
            make_all([is_landed, copy, functools.partial(staging.copied.record, stream)])
