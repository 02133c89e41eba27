"""What crosses the border to CUDA C++: the kernel sources, their variants, and the structs both sides know.

A variant is one compilation of one file of ``cuda/`` for one row of the dtype table and one choice of the compile-time
switches. Adding a dtype is adding a row to :data:`DTYPES`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpu_adam.errors import ArgumentValueError

CHUNK = 4096
"""Elements of a tensor that one block updates, and that one partial sum of a norm covers."""

SORT_RUN = 4096
"""Indices that one block sorts."""

BLOCK_SIZE = 256
"""CUDA threads of a block."""

_TILE_BYTES = (
    16384  # of shared memory for the gradient of a sparse tile: all 2048 threads of a multiprocessor stay resident
)


@dataclass(frozen=True)
class Dtype:
    """A row of the dtype table.

    Attributes:
        stored: C type of an element of a variable, its gradient and ``m`` in memory.
        stored_real: C type of an element of ``v`` and ``vhat`` in memory.
        value: C type in which an element is computed with.
        real: C type in which ``v`` and the scalars of a step are computed with.
        real_dtype: NumPy dtype of ``stored_real``, in which the scalars of a step are computed on the host.
        hardware_flush: whether denormals are flushed by the processor's mode rather than in software.
    """

    stored: str
    stored_real: str
    value: str
    real: str
    real_dtype: str
    hardware_flush: bool

    @property
    def defines(self) -> tuple[str, ...]:
        """The row as preprocessor definitions."""
        return (
            f"GPU_ADAM_STORED={self.stored}",
            f"GPU_ADAM_STORED_REAL={self.stored_real}",
            f"GPU_ADAM_VALUE={self.value}",
            f"GPU_ADAM_REAL={self.real}",
            f"GPU_ADAM_HARDWARE_FLUSH={int(self.hardware_flush)}",
        )


DTYPES = {
    "float32": Dtype("float", "float", "float", "float", "float32", hardware_flush=True),
    "float64": Dtype("double", "double", "Double", "Double", "float64", hardware_flush=False),
    "complex64": Dtype("ComplexFloat", "float", "ComplexFloat", "float", "float32", hardware_flush=True),
    "complex128": Dtype("StoredComplexDouble", "double", "ComplexDouble", "Double", "float64", hardware_flush=False),
}


def dtype_row(dtype: np.dtype, argument: str) -> Dtype:
    """The row of `dtype`, or an ArgumentValueError that names `argument` and lists the dtypes there are."""
    row = DTYPES.get(dtype.name)
    if row is None:
        known = ", ".join(DTYPES)
        raise ArgumentValueError(argument, f"must have one of the dtypes {known}", dtype.name, "cast it to one of them")
    return row


COMPLEX_MODES = ("abs2", "real_imag")
"""How a complex variable is updated: by |g|^2, or real and imaginary part as if they were two real elements."""


class Layout(NamedTuple):
    """How a variable's elements appear to the kernels.

    Attributes:
        dtype: the row of the dtype table.
        parts: kernel elements per element of the variable: 2 for complex ones in the mode "real_imag".
    """

    dtype: str
    parts: int


def layout(dtype: np.dtype, complex_mode: str) -> Layout:
    """The layout of a variable of that dtype."""
    if dtype.kind == "c" and complex_mode == "real_imag":
        return Layout(DTYPES[dtype.name].real_dtype, 2)
    return Layout(dtype.name, 1)


@dataclass(frozen=True)
class Source:
    """One file of ``cuda/`` with its definitions: a unit of compilation.

    Attributes:
        file: name of the ``.cu`` file.
        defines: preprocessor definitions, as NAME=VALUE.
    """

    file: str
    defines: tuple[str, ...]

    @property
    def text(self) -> str:
        """The source with its headers written out, so that an edited header changes the compilers' cache keys."""
        return _inlined(self.file)


@dataclass(frozen=True)
class Kernel:
    """A ``__global__`` function of a compiled source."""

    source: Source
    name: str


def _switches(amsgrad: bool, clip: bool) -> tuple[str, ...]:
    return (f"GPU_ADAM_AMSGRAD={int(amsgrad)}", f"GPU_ADAM_CLIP={int(clip)}", f"GPU_ADAM_CHUNK={CHUNK}")


def tile_size(dtype: str) -> int:
    """Elements of a tile of the sparse update."""
    return _TILE_BYTES // np.dtype(dtype).itemsize


@functools.cache
def dense(dtype: str, *, amsgrad: bool, clip: bool) -> Kernel:
    """The update of all dense variables of a dtype."""
    return Kernel(Source("dense.cu", (*DTYPES[dtype].defines, *_switches(amsgrad, clip))), "dense")


@functools.cache
def sparse(dtype: str, *, amsgrad: bool, clip: bool) -> Kernel:
    """The update of one variable by some of its rows."""
    tile = (f"GPU_ADAM_TILE={tile_size(dtype)}", f"GPU_ADAM_SORT_RUN={SORT_RUN}")
    return Kernel(Source("sparse.cu", (*DTYPES[dtype].defines, *_switches(amsgrad, clip), *tile)), "sparse")


@functools.cache
def norm(dtype: str, name: str) -> Kernel:
    """A pass of the norms of gradients: square_sums, square_sums_of, clip_by_norm or clip_by_global_norm."""
    return Kernel(Source("norm.cu", (*DTYPES[dtype].defines, *_switches(amsgrad=False, clip=True))), name)


@functools.cache
def sort(name: str) -> Kernel:
    """A step of the sort of row numbers: sort_rows, sort_keys, sort_count, sort_scan or sort_scatter."""
    return Kernel(Source("sort.cu", (f"GPU_ADAM_SORT_RUN={SORT_RUN}",)), name)


def variants() -> list[Source]:
    """Every source that a step can ask for: what tests compile and profiling lists."""
    choices = [(amsgrad, clip) for amsgrad in (False, True) for clip in (False, True)]
    updates = [
        update(dtype, amsgrad=amsgrad, clip=clip)
        for dtype in DTYPES
        for update in (dense, sparse)
        for amsgrad, clip in choices
    ]
    others = [*(norm(dtype, "square_sums") for dtype in DTYPES), sort("sort_rows")]
    return [kernel.source for kernel in (*updates, *others)]


def kernel_names(file: str) -> list[str]:
    """The ``__global__`` functions that a file of ``cuda/`` defines, in order."""
    return re.findall(
        r'^extern "C" __global__ void __launch_bounds__\(\d+\)\s+(\w+)\(', (directory() / file).read_text(), re.M
    )


@functools.cache
def directory() -> Path:
    """Where the kernel sources lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "cuda", package.parent / "cuda"):
        if (candidate / "dense.cu").is_file():
            return candidate
    raise FileNotFoundError(f"gpu_adam's kernel sources are neither in {package} nor beside it; install gpu_adam again")


@functools.cache
def _inlined(file: str) -> str:
    seen: set[str] = set()

    def lines(name: str) -> list[str]:
        seen.add(name)
        out = [f'#line 1 "{name}"']
        for number, line in enumerate((directory() / name).read_text().splitlines(), 1):
            include = re.fullmatch(r'#include "([\w.]+)"', line)
            if include is None:
                out.append("" if line == "#pragma once" else line)
            elif include[1] not in seen:
                out += [*lines(include[1]), f'#line {number + 1} "{name}"']
            else:
                out.append("")
        return out

    return "\n".join(lines(file)) + "\n"


# Structs. Each stands once in C++, named in the comment, and once here; tests compare sizes and offsets.

_POINTER, _INTEGER = np.uint64, np.int64


@functools.cache
def step_dtype(real_dtype: str) -> np.dtype:
    """``Step`` of adam_math.cuh."""
    names = ("alpha", "one_minus_beta_1", "one_minus_beta_2", "epsilon", "clip_value")
    return np.dtype([(name, real_dtype) for name in names], align=True)


TENSOR = np.dtype(
    [(name, _POINTER) for name in ("theta", "m", "v", "vhat")] + [("size", _INTEGER), ("first_chunk", _INTEGER)],
    align=True,
)
"""``Tensor`` of tensor_table.cuh."""

TENSOR_TABLE = np.dtype(
    [(name, _POINTER) for name in ("tensors", "gradients", "chunk_tensor")] + [("chunks", _INTEGER)], align=True
)
"""``TensorTable`` of tensor_table.cuh."""

TABLE = np.dtype(
    [(name, _POINTER) for name in ("theta", "m", "v", "vhat")]
    + [(name, _INTEGER) for name in ("rows", "row_size", "rows_per_tile", "pieces", "tiles")],
    align=True,
)
"""``Table`` of sparse.cu."""

INDICES = np.dtype([("data", _POINTER), ("wide", _INTEGER), ("count", _INTEGER), ("rows", _INTEGER)], align=True)
"""``Indices`` of sort.cuh."""

KEYS = np.dtype([("row", _POINTER), ("position", _POINTER)], align=True)
"""``Keys`` of sort.cuh."""

INDEX_ERRORS = np.dtype(
    [("count", np.uint64), ("first_position", np.uint64), ("first_index", _INTEGER), ("recorded", _INTEGER)], align=True
)
"""``IndexErrors`` of sort.cuh."""

NO_INDEX_ERRORS = np.array((0, np.iinfo(np.uint64).max, 0, 0), INDEX_ERRORS)
"""The state in which nothing was wrong yet."""


def struct(dtype: np.dtype, *values: object) -> np.ndarray:
    """One struct as an array of size 1, which both devices pass by value and which may be changed between launches."""
    return np.array([values], dtype)


def scalar(value: int, dtype: type = np.int64) -> np.ndarray:
    """An integer argument of a kernel."""
    return np.array([value], dtype)


def pointer(address: int) -> np.ndarray:
    """An address as an argument of a kernel; 0 is null."""
    return np.array([address], np.uint64)
