"""Checkpoints as `.npz` files: an uncompressed zip archive of `.npy` members, and the manifest as `meta.json`.

`numpy.load` opens every member. A dtype that `.npy` cannot name (bfloat16 and others of `ml_dtypes`) is stored as
unsigned integers of the same size; the manifest has its name. (Version 1 stored raw bytes.)
"""

from __future__ import annotations

import io
import math
from collections.abc import Container, Mapping
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

from gpu_adam.errors import CheckpointError
from gpu_adam.state import manifest, stored_zip
from gpu_adam.state.manifest import Manifest

RESERVED, MAX_NAME = manifest.NAME, stored_zip.MAX_NAME - len(".npy")
_SMALL = 1 << 20  # bytes


def check_dtype(name: str, dtype: np.dtype) -> None:
    """Every dtype of numbers has its place."""


def write(file: BinaryIO, arrays: Mapping[str, np.ndarray], entries: Mapping[str, str], text: str) -> None:
    """Write a file.

    Args:
        file: where to.
        arrays: C-contiguous, of numbers.
        entries: what the manifest says of them.
        text: the manifest.
    """
    archive = stored_zip.Writer(file)
    archive.add(manifest.NAME, text.encode())
    headers: dict[tuple[object, ...], bytes] = {}  # which an optimizer's thousands of slots have in common
    for name, array in arrays.items():
        key = array.dtype, array.shape
        header = headers.get(key)
        if header is None:
            header = headers[key] = _header(_stored(array.dtype), array.shape)
        if array.nbytes <= _SMALL:
            archive.add(f"{name}.npy", header + array.tobytes())
        else:
            rest = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
            archive.add(f"{name}.npy", header, rest, manifest.checksum_in(entries[name]))
    archive.close()


def read(file: BinaryIO, title: str, names: Container[str] | None = None) -> tuple[Manifest, dict[str, np.ndarray]]:
    """Read a file: the manifest and the arrays, which are as large as their members and not compared with the manifest.

    Args:
        file: a seekable one.
        title: its name, for messages.
        names: of the arrays whose members are read; None for all.

    Raises:
        CheckpointError: the file is no checkpoint.
        Exception: a damaged one; struct, json, ast and numpy raise a dozen kinds.
    """
    archive = stored_zip.Reader(file)
    if manifest.NAME not in archive.numbers:
        rule = "must be a gpu_adam checkpoint"
        raise CheckpointError(title, rule, f"no {manifest.NAME} in it", manifest.ANOTHER)
    manifest.check_size(title, archive.size(manifest.NAME), len(archive.numbers))
    said = manifest.parsed(title, archive.read(manifest.NAME))
    summed = said.version == 1  # the manifest's checksums are of the elements alone
    if len(archive.numbers) != len(said.arrays) + 1:
        got = f"{len(said.arrays)} arrays in its table and {len(archive.numbers) - 1} in the file"
        raise CheckpointError(title, manifest.WHOLE, got, manifest.ANOTHER)
    layouts: dict[tuple[bytes, str], _Layout] = {}
    arrays: dict[str, np.ndarray] = {}
    wanted = said if names is None else said.only(names)
    contents = archive.contents([f"{name}.npy" for name in wanted.arrays], _SMALL, summed=summed)
    for name, dtype, content in zip(wanted.arrays, wanted.dtypes(), contents, strict=True):
        if isinstance(content, bytes):
            arrays[name] = _small_array(content, dtype, layouts)
        else:
            arrays[name] = _large_array(content, dtype, layouts)
    return said, arrays


def _stored(dtype: np.dtype) -> np.dtype:
    """The dtype in a `.npy` member."""
    return dtype if dtype.num < manifest.FIRST_OF_OTHERS else np.dtype(f"u{dtype.itemsize}")


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return header.getvalue()


class _Layout(NamedTuple):
    """What the header of a `.npy` member says, with the dtype that the manifest names."""

    dtype: np.dtype
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    nbytes: int


def _small_array(content: bytes, dtype_name: str, layouts: dict[tuple[bytes, str], _Layout]) -> np.ndarray:
    begin, (dtype, shape, order, nbytes) = _begin(content, len(content), dtype_name, layouts)
    if not nbytes:  # a copy would visit each of 2**60 elements of no size, and give those of "S0" a byte
        return np.ndarray(shape, dtype, order=order)
    array: np.ndarray = np.ndarray(shape, dtype, content, begin, None, order)
    return array.copy(order)  # for the bytes that were read cannot be written


def _large_array(content: stored_zip.Member, dtype_name: str, layouts: dict[tuple[bytes, str], _Layout]) -> np.ndarray:
    size, head = content.left, content.read(_SMALL)
    begin, (dtype, shape, order, _) = _begin(head, size, dtype_name, layouts)
    array: np.ndarray = np.ndarray(shape, dtype, order=order)
    rest = memoryview(array.reshape(-1, order=order).view(np.uint8))  # type: ignore[arg-type]
    rest[: len(head) - begin] = head[begin:]
    content.readinto(rest[len(head) - begin :])
    content.close()
    return array


def _begin(head: bytes, size: int, dtype_name: str, layouts: dict[tuple[bytes, str], _Layout]) -> tuple[int, _Layout]:
    """Return where the elements begin in a member of `size` bytes that begins with `head`, and their layout."""
    # The length of the header has 16 bits in version 1 of the format, and 32 since.
    begin = 10 + (head[8] | head[9] << 8) if head[6] == 1 else 12 + int.from_bytes(head[8:12], "little")
    key = head[:begin], dtype_name
    layout = layouts.get(key)
    if layout is None:
        layout = layouts[key] = _layout(*key)
    if begin + layout.nbytes != size:
        raise ValueError(f"{size - begin} bytes for an array of shape {layout.shape} and dtype {dtype_name}")
    return begin, layout


def _layout(header: bytes, name: str) -> _Layout:
    """Parse the header of a `.npy` member; `name` is the dtype's, from the manifest."""
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, stored = np.lib.format.read_array_header_1_0(stream)
    else:
        # Version 3 differs from 2 in the encoding of field names only: as escapes, Latin-1 holds all of Unicode.
        if version == (3, 0):
            text = header[12:].decode().encode("latin-1", "backslashreplace")
            stream = io.BytesIO(len(text).to_bytes(4, "little") + text)
        shape, fortran, stored = np.lib.format.read_array_header_2_0(stream)
    if stored.hasobject:
        raise ValueError("Object arrays cannot be loaded: unpickling runs code")
    if stored.subdtype is not None:  # numpy itself refuses negative numbers
        raise ValueError(f"no array has shape {shape} and dtype {stored}")
    dtype = stored if stored.name == name else _named(name, stored)
    return _Layout(dtype, shape, "F" if fortran else "C", math.prod(shape) * dtype.itemsize)


def _named(name: str, stored: np.dtype) -> np.dtype:
    """Return the dtype of `ml_dtypes` that is stored as `stored`: so many raw bytes, or an unsigned integer of them."""
    import ml_dtypes  # noqa: PLC0415

    kind = getattr(ml_dtypes, name, None)
    if isinstance(kind, type) and issubclass(kind, np.generic):
        dtype = np.dtype(kind)
        if dtype.name == name and stored in (np.dtype((np.void, dtype.itemsize)), _stored(dtype)):
            return dtype
    raise ValueError(f"an array of dtype {stored}, not of {manifest.short(name)}")
