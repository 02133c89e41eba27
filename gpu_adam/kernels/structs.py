"""Structs that cross the border to C++, as NumPy dtypes, and arguments of kernels made of them.

Each struct stands once in C++, in the file that its docstring names, and once here; tests compare names, sizes and
offsets.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

from gpu_adam.kernels.slot_specs import SLOT_SPECS

_POINTER, _INTEGER = np.uint64, np.int64


@functools.cache
def step_scalars(real_dtype: str) -> np.dtype:
    """``StepScalars`` of adam_math.cuh, for a dtype whose real numbers are of `real_dtype`."""
    adam = ("alpha", "one_minus_beta_1", "one_minus_beta_2", "epsilon")
    others = ("sign", "l2", "decay", "momentum", "one_minus_momentum", "clip_value", "unscale", "apply")
    return np.dtype([("noise", np.uint64), *((name, real_dtype) for name in (*adam, *others))], align=True)


@functools.cache
def logged_step(real_dtype: str) -> np.dtype:
    """``LoggedStep`` of replay.cuh, for a dtype whose real numbers are of `real_dtype`."""
    extremes = [(name, real_dtype) for name in ("largest_alpha", "smallest_epsilon", "smallest_decay")]
    others = [("decays", np.int32), ("penalized", np.int32), ("steady_since", _INTEGER)]
    return np.dtype([("scalars", step_scalars(real_dtype)), *extremes, *others], align=True)


SLOT_POINTERS = np.dtype([(name, _POINTER) for name in ("theta", *(spec.name for spec in SLOT_SPECS))], align=True)
"""``Slots`` of slots.cuh: where a variable and its slots lie; a slot that the rule has not is null."""

TENSOR = np.dtype(
    [("slots", SLOT_POINTERS), *((name, _INTEGER) for name in ("size", "first_chunk", "group", "place"))], align=True
)
"""``Tensor`` of tensor_table.cuh."""

TENSOR_TABLE = np.dtype(
    [(name, _POINTER) for name in ("tensors", "gradients", "chunk_tensor")]
    + [("chunks", _INTEGER), ("frozen", _POINTER)],
    align=True,
)
"""``TensorTable`` of tensor_table.cuh."""

EMBEDDING_TABLE = np.dtype(
    [("slots", SLOT_POINTERS)]
    + [(name, _INTEGER) for name in ("rows", "row_size", "rows_per_tile", "pieces", "tiles", "place")],
    align=True,
)
"""``EmbeddingTable`` of sparse.cu."""

DEFERRED_TABLE = np.dtype(
    [("slots", SLOT_POINTERS)]
    + [(name, _INTEGER) for name in ("rows", "row_size", "rows_per_tile", "place")]
    + [(name, _POINTER) for name in ("last_step", "log")]
    + [("at_once", _INTEGER)],
    align=True,
)
"""``DeferredTable`` of deferred.cu."""

STEP_LOG = np.dtype([("count", _INTEGER), ("blocks", np.uint64), ("steps", _POINTER)], align=True)
"""``StepLog`` of replay.cuh."""

INDICES = np.dtype([("data", _POINTER), ("wide", _INTEGER), ("count", _INTEGER), ("rows", _INTEGER)], align=True)
"""``Indices`` of sort.cuh."""

KEYS = np.dtype([("row", _POINTER), ("position", _POINTER)], align=True)
"""``Keys`` of sort.cuh."""

INDEX_ERRORS = np.dtype(
    [("count", np.uint64), ("first_position", np.uint64), ("first_index", _INTEGER), ("recorded", _INTEGER)], align=True
)
"""``IndexErrors`` of sort.cuh."""

NO_INDEX_ERRORS = np.array((0, np.iinfo(np.uint64).max, 0, 0), INDEX_ERRORS)
"""The state in which no index was wrong yet."""


GUARD = np.dtype(
    [
        *((name, _INTEGER) for name in ("count", "number", "counts", "skipped", "not_finite")),
        *((name, np.float64) for name in ("scale", "norm")),
        ("found", np.uint64),
        *((name, np.float64) for name in ("square_sum", "update_squares", "theta_squares")),
    ],
    align=True,
)
"""``Guard`` of guard.cu."""

NORM = np.dtype([("factors", _POINTER), ("written", _POINTER), ("stride", _INTEGER), ("limit", np.float64)], align=True)
"""``Norm`` of norm.cu."""

MEASURED_SUMS = np.dtype([("update", _POINTER), ("theta", _POINTER)], align=True)
"""``MeasuredSums`` of memory.cuh."""

CANDIDATES = np.dtype([(name, _INTEGER) for name in ("first", "rows", "number", "chosen")], align=True)
"""``Candidates`` of guard.cu."""

GUARD_ROWS = np.dtype(
    [(name, _POINTER) for name in ("candidates", "frozen", "row", "places")]
    + [(name, _INTEGER) for name in ("words", "count")],
    align=True,
)
"""``GuardRows`` of guard.cu."""

GUARD_PLACE = np.dtype([(name, _INTEGER) for name in ("unscale", "apply", "size")], align=True)
"""``GuardPlace`` of guard.cu."""

LOSS_SCALE = np.dtype([("scale", _POINTER), ("good", _POINTER), ("interval", _INTEGER)], align=True)
"""``LossScale`` of guard.cu."""


def slot_pointers(addresses: Mapping[str, int]) -> tuple[int, ...]:
    """A value of SLOT_POINTERS from addresses by name, "theta" for the variable; a name that is missing is null."""
    return tuple([addresses.get(name, 0) for name in SLOT_POINTERS.names or ()])


def struct(dtype: np.dtype, *values: object) -> np.ndarray:
    """One struct as an array of size 1, which both devices pass by value and which may be changed between launches."""
    return np.array([values], dtype)


def scalar(value: int, dtype: type = np.int64) -> np.ndarray:
    """An integer argument of a kernel."""
    return np.array([value], dtype)


def pointer(address: int) -> np.ndarray:
    """An address as an argument of a kernel; 0 is null."""
    return np.array([address], np.uint64)
