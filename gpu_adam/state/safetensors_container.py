"""Checkpoints as `.safetensors` files, for programs that read those; the manifest is `meta.json` in `__metadata__`.

    the header's size in 8 bytes; the header, JSON with spaces up to a multiple of 8 bytes; the arrays

The library of that name is not needed. It writes a file of its own, or one block of memory that holds all arrays once
more, and takes memory as it lies, C-contiguous or not; it reads a block of memory, of which it makes another. A header
is read as that library and this module write it: without spaces, with the keys of an array in this order.

Reference: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Container, Mapping
from json.decoder import scanstring  # type: ignore[attr-defined]  # the string that ends at a quote
from typing import BinaryIO

import ml_dtypes
import numpy as np

from gpu_adam.errors import ArgumentTypeError, CheckpointError
from gpu_adam.state import manifest
from gpu_adam.state.manifest import Manifest

RESERVED, MAX_NAME = "__metadata__", 0xFFFF

_DTYPES = {
    "BOOL": "bool",
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "C64": "complex64",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""The format's names of dtypes, and NumPy's."""
_CODES = {name: code for code, name in _DTYPES.items()}
_BEGIN = '{"__metadata__":'
_ENTRY = re.compile(r':{"dtype":"(\w+)","shape":\[([\d,]*)\],"data_offsets":\[(\d+),(\d+)\]}')
_END = re.compile(r"} *")
_SMALL = 1 << 10  # bytes
_MAX_AXES = 64  # of NumPy

_Kind = tuple[np.dtype, tuple[int, ...], int]
"""The dtype and the shape of an array, and how many elements it has."""


def check_dtype(name: str, dtype: np.dtype) -> None:
    """Raise ArgumentTypeError for a dtype that the format has no name for."""
    if dtype.name not in _DTYPES.values():
        rule, remedy = "must have a dtype that safetensors knows", "save to a .npz file, which holds every dtype"
        raise ArgumentTypeError(f'arrays["{name}"]', rule, dtype, remedy)


def write(file: BinaryIO, arrays: Mapping[str, np.ndarray], entries: Mapping[str, str], text: str) -> None:
    """Write a file.

    Args:
        file: where to.
        arrays: C-contiguous, of the dtypes above.
        entries: what the manifest says of them.
        text: the manifest.
    """
    quoted = json.JSONEncoder(separators=(",", ":")).encode
    header = [_BEGIN, quoted({manifest.NAME: text})]
    kinds: dict[tuple[object, ...], str] = {}  # which an optimizer's thousands of slots have in common
    end = 0
    # The largest elements first, so that all are aligned for readers that map the file into memory.
    ordered = sorted(arrays.items(), key=lambda item: -item[1].itemsize)
    for name, array in ordered:
        key = array.dtype, array.shape
        kind = kinds.get(key)
        if kind is None:
            kind = kinds[key] = f'"dtype":"{_CODES[array.dtype.name]}","shape":{list(array.shape)}'.replace(" ", "")
        begin, end = end, end + array.nbytes
        header.append(f',{quoted(name)}:{{{kind},"data_offsets":[{begin},{end}]}}')
    content = f"{''.join(header)}}}".encode()
    content += b" " * (-len(content) % 8)
    file.write(len(content).to_bytes(8, "little") + content)
    for _, array in ordered:
        # A copy of few bytes costs less than a view of them.
        file.write(array.tobytes() if array.nbytes <= _SMALL else memoryview(array.reshape(-1).view(np.uint8)))  # type: ignore[arg-type]


def read(file: BinaryIO, title: str, names: Container[str] | None = None) -> tuple[Manifest, dict[str, np.ndarray]]:
    """Read a file: the manifest and the arrays, which are not compared with each other.

    Args:
        file: a seekable one.
        title: its name, for messages.
        names: of the arrays that are returned; None for all, as views of one block. The file is read as a whole.

    Raises:
        CheckpointError: the file is no checkpoint.
        Exception: a damaged one.
    """
    size = file.seek(0, io.SEEK_END) - 8
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > size:
        raise CheckpointError(title, manifest.WHOLE, f"{size + 8} bytes with a header of {length}", manifest.ANOTHER)
    header = file.read(length).decode()
    if not header.startswith(_BEGIN):
        raise CheckpointError(title, "must be a gpu_adam checkpoint", "no metadata in it", manifest.ANOTHER)
    decoded, position = _text(header, len(_BEGIN))
    text = decoded.encode()
    places = _places(header, position, size - length)
    del header, decoded
    manifest.check_size(title, len(text), len(places))
    said = manifest.parsed(title, text)
    for name in said.arrays.keys() ^ places.keys():
        where = f"{name!a} in its {'manifest' if name in said.arrays else 'file'} alone"
        raise CheckpointError(title, manifest.WHOLE, where, manifest.ANOTHER)
    content = np.empty(size - length, np.uint8)
    rest = memoryview(content)  # type: ignore[arg-type]
    while rest:
        got = file.readinto(rest)  # type: ignore[attr-defined]  # every binary file has it
        if not got:
            raise ValueError("the file became shorter")
        rest = rest[got:]
    arrays = {}
    for name in said.arrays:
        if names is None or name in names:
            begin, (dtype, shape, count) = places[name]
            array = np.frombuffer(content, dtype, count, begin).reshape(shape)
            arrays[name] = array if names is None else array.copy()  # a part does not keep the whole in memory
    return said, arrays


# No parser of JSON reads a header: what is in it may become an object of sixty bytes for each three, `[],`.


def _text(header: str, position: int) -> tuple[str, int]:
    """The manifest in the metadata, pairs of strings in braces at a position; and the position behind them.

    Raises:
        ValueError: something else is there, or no manifest in it.
    """
    text, separator = "", "{"
    while header.startswith(f'{separator}"', position):
        name, position = scanstring(header, position + 2)
        if not header.startswith(':"', position):
            break
        value, position = scanstring(header, position + 2)
        text = value if name == manifest.NAME else text
        separator = ","
    if not text or not header.startswith("}", position):
        raise ValueError(f"no {manifest.NAME} in pairs of strings before {header[position : position + 40]!r}")
    return text, position + 1


def _places(header: str, position: int, size: int) -> dict[str, tuple[int, _Kind]]:
    """Where each array begins, and what it is; of arrays that fill so many bytes without a hole.

    Raises:
        ValueError, KeyError: damage.
    """
    kinds: dict[tuple[str, str], _Kind] = {}
    found: list[tuple[int, int, str]] = []
    places: dict[str, tuple[int, _Kind]] = {}
    while header.startswith(',"', position):
        name, end_of_name = scanstring(header, position + 2)
        match = _ENTRY.match(header, end_of_name)
        if match is None:
            break
        position = match.end()
        code, sizes, *ends = match.groups()
        kind = kinds.get((code, sizes))
        if kind is None:
            kind = kinds[code, sizes] = _kind(code, sizes)
        begin, end = map(int, ends)
        places[name] = begin, kind
        found.append((begin, end, name))
    if not _END.fullmatch(header, position):
        raise ValueError(f"no entry of an array at {header[position : position + 40]!r}")
    last = 0
    for begin, end, name in sorted(found):
        dtype, _, count = places[name][1]
        if begin != last or end - begin != count * dtype.itemsize:
            raise ValueError(f"{name!a} at [{begin}, {end}], behind byte {last}")
        last = end
    if last != size or len(found) != len(places):
        raise ValueError(f"{len(places)} arrays of {last} bytes in {size}, {len(found)} entries")
    return places


def _kind(code: str, sizes: str) -> _Kind:
    if sizes.count(",") >= _MAX_AXES:
        raise ValueError(f"an array of more than {_MAX_AXES} axes")
    name, shape = _DTYPES[code], tuple(map(int, sizes.split(","))) if sizes else ()
    return np.dtype(getattr(ml_dtypes, name, None) or name), shape, math.prod(shape)
