"""Checkpoints as `.safetensors` files, for programs that read those; the manifest is `meta.json` in `__metadata__`.

    the header's size in 8 bytes; the header, JSON with spaces up to a multiple of 8 bytes; the arrays

The library of that name reads them. It is not asked to write: it makes a file of its own, or one block of memory that
holds all arrays once more, and takes memory as it lies, C-contiguous or not.

Reference: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, CheckpointError
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
_BEGIN = b'{"__metadata__":'
_SMALL = 1 << 10  # bytes


def check_dtype(name: str, dtype: np.dtype) -> None:
    """Raise ArgumentTypeError for a dtype that the format has no name for, ArgumentValueError without the library."""
    _library()
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
    quoted = json.JSONEncoder().encode
    header = [_BEGIN.decode(), quoted({manifest.NAME: text})]
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
        names: of the arrays that are returned; None for all. The file is read as a whole.

    Raises:
        CheckpointError: the file is no checkpoint.
        Exception: a damaged one.
    """
    library, content = _library(), file.read()
    parts = library.deserialize(content)  # which compares all sizes with the content's
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size]
    del content
    if not header.startswith(_BEGIN):
        raise CheckpointError(title, "must be a gpu_adam checkpoint", "no metadata in it", manifest.ANOTHER)
    metadata, _ = json.JSONDecoder().raw_decode(header[len(_BEGIN) :].decode())
    text = metadata[manifest.NAME].encode()
    manifest.check_size(title, len(text), len(parts))
    said = manifest.parsed(title, text)
    dtypes = {code: np.dtype(getattr(ml_dtypes, name, None) or name) for code, name in _DTYPES.items()}
    arrays = {name: np.frombuffer(part["data"], dtypes[part["dtype"]]).reshape(part["shape"]) for name, part in parts}
    for name in said.arrays.keys() ^ arrays.keys():
        got = f"{name!a} in its {'manifest' if name in said.arrays else 'file'} alone"
        raise CheckpointError(title, manifest.WHOLE, got, manifest.ANOTHER)
    return said, {name: arrays[name] for name in said.arrays if names is None or name in names}


def _library() -> Any:
    try:
        import safetensors.numpy  # noqa: PLC0415
    except ImportError as error:
        rule, remedy = "must end in something else without the library safetensors", "pip install gpu-adam[safetensors]"
        raise ArgumentValueError("path", rule, ".safetensors", remedy) from error
    return safetensors
