"""The host device: NumPy arrays, and the CUDA sources compiled by the system's C++ compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from gpu_adam import kernels
from gpu_adam.devices.base import PACK_BYTES, AddressReader, Array, Device, Launch, PointerTable
from gpu_adam.errors import ArgumentValueError, DeviceError, KernelCompileError
from gpu_adam.kernels import Kernel, Source

_FLAGS = [
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread"),
    # The bits: no contraction to multiply-add. The speed: without errno and traps the loops become vector code.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # 16-byte packs look at arrays of numbers, as they do in CUDA.
    "-fno-strict-aliasing",
    # Where a processor has 64-byte vectors: float64's flushing in software takes a fifth less time in them.
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
]


_LARGE = 2**20  # bytes


class HostDevice(Device):
    """NumPy arrays in host memory; the blocks of a launch run on a pool of processor threads.

    Args:
        threads: processor threads, the caller's included; default ``GPU_ADAM_THREADS``, or the cores that this process
            may use.
        block_size: None for the fast mode, one vectorised thread per block; a number for the faithful mode, in which
            every CUDA thread of a block is a fiber with real barriers and shuffles. For tests: it is slow.
        max_blocks: largest grid; kernels stride over what is beyond.
    """

    name = "host"
    xp = np
    checks_indices = True

    def __init__(self, threads: int | None = None, block_size: int | None = None, max_blocks: int = 2**31 - 1) -> None:
        default = threads is None and block_size is None and max_blocks == 2**31 - 1
        self._arguments = () if default else (threads, block_size, max_blocks)
        self.threads = _default_threads() if threads is None else threads
        self.block_size = block_size
        self.max_blocks = max_blocks
        self._large_arrays = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return host_device, self._arguments

    def current(self) -> AbstractContextManager[Any]:
        """Nothing: there is one host."""
        return nullcontext()

    def array(self, values: Any, dtype: np.dtype | None = None) -> Array:
        """A new C-contiguous array with these values."""
        values = np.asarray(values, dtype)
        array = self.empty(values.size, values.dtype).reshape(values.shape)
        array[...] = values
        return array

    def empty(self, size: int, dtype: np.dtype) -> Array:
        """A new one-dimensional array with undefined contents, its address a multiple of 64, a cache line."""
        # Large arrays begin at multiples of 4 KB, on huge pages of 2 MB. Streams that keep the same distance from one
        # are served by the same banks of memory and sets of the cache: up to three times slower (profiling/README.md).
        nbytes = size * dtype.itemsize
        shift = 0
        if nbytes >= _LARGE:
            self._large_arrays += 1
            shift = (4096 + 64) * (self._large_arrays % 16)
        spare = np.empty(nbytes + 64 + shift, np.uint8)
        start = -spare.ctypes.data % 64 + shift
        return spare[start : start + nbytes].view(dtype)

    def numpy(self, array: Array) -> np.ndarray:
        """A copy."""
        return np.array(array)

    def view(self, obj: Any) -> Array | None:
        """The memory of `obj` as a NumPy array; None where it is not in host memory."""
        if isinstance(obj, np.ndarray):
            return obj
        if isinstance(obj, np.generic):
            return None
        if hasattr(obj, "__dlpack_device__"):
            kind, _ = obj.__dlpack_device__()
            return np.from_dlpack(obj) if kind == 1 else None
        if hasattr(obj, "__array_interface__"):
            return np.asarray(obj)
        return None

    def address(self, array: Array) -> int:
        """Address of the first element."""
        return int(array.__array_interface__["data"][0])

    def address_reader(self, shapes: Sequence[tuple[int, ...]], dtype: np.dtype) -> AddressReader:
        """A function that checks and finds the addresses of arrays of these shapes and this dtype."""
        return _HostAddresses(shapes, dtype)

    def pointer_table(self, size: int) -> PointerTable:
        """A new table of `size` addresses."""
        return _HostPointers(size)

    def prepare(self, kernel: Kernel, arguments: Sequence[np.ndarray]) -> Launch:
        """Compile `kernel` if need be and bind `arguments`."""
        library = _library(kernel.source, self.block_size is not None)
        return _HostLaunch(self, _entry(library, kernel.name), arguments)

    def prepare_native(self, file: str, name: str, arguments: Sequence[np.ndarray]) -> Launch:
        """The same for an entry point in a C++ file of ``cuda/host/``, which the pool runs as it does a kernel's."""
        text = (kernels.directory() / "host" / file).read_text()
        return _HostLaunch(self, _entry(ctypes.CDLL(_built(text, file)), name), arguments)

    def is_capturing(self) -> bool:
        """Never."""
        return False

    def own_memory(self) -> tuple[Any, AbstractContextManager[Any]]:
        """Every array's memory is its own."""
        return None, nullcontext()

    def synchronize(self) -> None:
        """Nothing to wait for: a launch returns when its blocks are done."""

    def facts(self) -> list[tuple[str, str]]:
        """(label, value) pairs for ``gpu-adam info``."""
        command = compiler()
        return [
            ("processor", _processor_name()),
            ("threads", str(self.threads)),
            ("compiler", f"{shlex.join(command)}: {_compiler_version(tuple(command))}"),
            ("kernel cache", str(cache_directory())),
        ]


@functools.cache
def host_device(*arguments: int | None) -> HostDevice:
    """The one object for a host device with these arguments, also after unpickling."""
    return HostDevice(*arguments)  # type: ignore[arg-type]


class _HostAddresses:
    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: np.dtype) -> None:
        self._count = len(shapes)
        self._ndims = np.array([len(shape) for shape in shapes], np.intc)
        self._shapes = np.array([size for shape in shapes for size in shape], np.intp)
        kind = ctypes.c_char(dtype.kind.encode())
        self._read = _address_function()
        self._expected = (id(np.ndarray), kind, dtype.itemsize, self._ndims.ctypes.data, self._shapes.ctypes.data)

    def __call__(self, arrays: list[Any]) -> np.ndarray:
        addresses = np.empty(self._count, np.uint64)
        self._read(arrays, self._count, *self._expected, addresses.ctypes.data)
        return addresses


class _HostPointers:
    def __init__(self, size: int) -> None:
        self._table = np.zeros(size, np.uint64)
        self.address = int(self._table.ctypes.data)

    def write(self, addresses: np.ndarray) -> None:
        self._table[:] = addresses


class _HostLaunch:
    def __init__(self, device: HostDevice, entry: Any, arguments: Sequence[np.ndarray]) -> None:
        self._device, self._entry = device, entry
        self._kept = arguments
        self._table = np.array([a.ctypes.data for a in arguments], np.uint64)
        self._arguments = int(self._table.ctypes.data)
        self._entry_address = ctypes.cast(self._entry, ctypes.c_void_p).value
        self._pool = _pool()

    def __call__(self, blocks: int) -> None:
        device = self._device
        blocks = min(blocks, device.max_blocks)
        if device.block_size is None:
            self._pool(self._entry_address, self._arguments, blocks, device.threads)
        else:
            self._entry(self._arguments, 0, blocks, blocks, device.block_size)


def _default_threads() -> int:
    given = os.environ.get("GPU_ADAM_THREADS")
    if given is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not given.isdecimal() or int(given) < 1:
        raise ArgumentValueError("GPU_ADAM_THREADS", "must be a whole number >= 1", repr(given), "set or unset it")
    return int(given)


# From source text to machine code.


def compiler() -> list[str]:
    """The C++ compiler's command: ``$CXX``, g++, clang++ or the wheel ziglang, the first found.

    Raises:
        DeviceError: where there is none.
    """
    given = shlex.split(os.environ.get("CXX", ""))
    if given:
        if shutil.which(given[0]) is None:
            raise DeviceError("CXX", "must name a C++ compiler", repr(given[0]), "correct it, or unset it")
        return given
    for name in ("g++", "clang++"):
        if shutil.which(name) is not None:
            return [name]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    raise DeviceError(
        "the host device",
        "needs a C++ compiler",
        "neither $CXX nor g++ nor clang++ nor the package ziglang",
        "install g++ (apt install g++), or clang++ (apt install clang), or a compiler as a wheel "
        '(pip install "gpu-adam[zig]")',
    )


def flags() -> list[str]:
    """The options that make a kernel's bits and its speed."""
    return list(_FLAGS)


def cache_directory() -> Path:
    """Where compiled kernels are kept: ``GPU_ADAM_CACHE``, or gpu_adam in the user's cache directory."""
    given = os.environ.get("GPU_ADAM_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpu_adam"


def source_text(source: Source, *, faithful: bool) -> str:
    """The kernel's source as plain C++: a shim before it, an entry point for each kernel behind it."""
    shim = "faithful.h" if faithful else "fast.h"
    pack = "sizeof(GPU_ADAM_STORED)" if not faithful else str(PACK_BYTES)
    entries = "".join(f"GPU_ADAM_ENTRY({name})\n" for name in kernels.kernel_names(source.file))
    defines = "".join(f"#define {define.replace('=', ' ', 1)}\n" for define in source.defines)
    return f'{defines}#define GPU_ADAM_PACK_BYTES {pack}\n#include "{shim}"\n{source.text}{entries}'


@functools.cache
def _library(source: Source, faithful: bool) -> ctypes.CDLL:
    return ctypes.CDLL(_built(source_text(source, faithful=faithful), f"the kernels of {source.file}"))


@functools.cache
def _address_function() -> Any:
    text = (kernels.directory() / "host" / "addresses.cpp").read_text()
    # PyDLL: the function works on Python objects, under the interpreter's lock.
    read = ctypes.PyDLL(_built(text, "the address look-up"))["array_addresses"]
    pointer = ctypes.c_void_p
    read.argtypes = (
        ctypes.py_object,
        ctypes.c_ssize_t,
        pointer,
        ctypes.c_char,
        ctypes.c_int,
        pointer,
        pointer,
        pointer,
    )
    read.restype = None
    return read


@functools.cache
def _pool() -> Any:
    text = (kernels.directory() / "host" / "pool.cpp").read_text()
    launch = ctypes.CDLL(_built(text, "the thread pool"))["launch_blocks"]
    launch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int)
    launch.restype = None
    return launch


def _entry(library: ctypes.CDLL, name: str) -> Any:
    entry = library[f"{name}_entry"]
    entry.argtypes = (ctypes.c_void_p, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_int)
    entry.restype = None
    return entry


def _built(text: str, what: str) -> str:
    """Path of the library of a source text, from the cache or compiled into it."""
    command = compiler()
    shims = "".join(path.read_text() for path in sorted((kernels.directory() / "host").glob("*.h")))
    identity = "\0".join(
        (text, shims, *command, *_FLAGS, _compiler_version(tuple(command)), _processor_name(full=True))
    )
    directory = cache_directory()
    path = directory / f"host-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.so"
    if not path.exists():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory) as work:
                _compile(command, text, Path(work), what)
                # Atomic, so that processes that start together each find nothing or a whole library.
                (Path(work) / "kernel.so").replace(path)
        except OSError as error:
            raise DeviceError(
                "the kernel cache", "must be a writeable directory", error, "set GPU_ADAM_CACHE to one that is"
            ) from error
    return str(path)


def _compile(command: list[str], text: str, work: Path, what: str) -> None:
    (work / "kernel.cpp").write_text(text)
    include = f"-I{kernels.directory() / 'host'}"
    call = [*command, *_FLAGS, include, "-o", str(work / "kernel.so"), str(work / "kernel.cpp")]
    result = subprocess.run(call, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise KernelCompileError(
            what,
            "must compile as C++17",
            f"exit status {result.returncode} from {shlex.join(call)}\n{result.stderr.strip()}\n",
            "try another compiler: set CXX to g++ >= 9 or clang++ >= 10",
        )


@functools.cache
def _compiler_version(command: tuple[str, ...]) -> str:
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    return lines[0].strip() if lines else "unknown version"


@functools.cache
def _processor_name(*, full: bool = False) -> str:
    """The processor's model; with `full` also its instruction sets, on which -march=native depends."""
    facts: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if not line.strip():
                    break
                label, _, text = line.partition(":")
                facts[label.strip()] = text.strip()
    except OSError:
        pass
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name + facts.get("flags", facts.get("Features", "")) if full else name
