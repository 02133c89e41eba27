"""Named arrays and a JSON note in one file, replaced atomically.

The file is an uncompressed zip in NumPy's `.npz` layout (`numpy.load` opens it) with one more member, `meta.json`:

    {"format": "gpu_adam", "version": 1, "arrays": {"w/m": "float32", "w/v": "bfloat16"}, "meta": {...}}

`arrays` is the table of contents. Its dtype names count where the `.npy` format has none: bfloat16 is raw bytes there.
The same arrays and meta give the same bytes, in every year and under every user.
"""

import io
import math
from collections.abc import Mapping
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, CheckpointError
from gpu_adam.state import stored_zip
from gpu_adam.state.atomic_file import PathOrFile, name_of, opened, written

FORMAT, VERSION = "gpu_adam", 1
_META = "meta.json"
_WHOLE = "must be a whole gpu_adam checkpoint"
_ANOTHER = "pass a file that gpu_adam wrote, or an older copy of this one"
_MAX_NAME = stored_zip.MAX_NAME - len(".npy")
_SMALL = 1 << 20  # bytes


def write(path: PathOrFile, arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint; a reader sees the old file or the new one, never a part, also after a power failure.

    Args:
        path: the file, with any suffix; its directory must exist and be writable.
        arrays: host arrays of any shape and any dtype but object. Arrays above 1 MiB are written by pieces.
        meta: what `json` can write.

    Raises:
        ArgumentTypeError: an array of Python objects, a name that is no string, or a meta that JSON cannot hold.
        ArgumentValueError: a name that a zip archive cannot hold.
        OSError: the file system refuses; the old file is unchanged.
    """
    host = {name: np.asarray(array) for name, array in arrays.items()}
    header = _header(host, meta)
    with written(path) as file:
        archive = stored_zip.Writer(file)
        archive.add(_META, header.encode(), zip64=False)
        _write_arrays(archive, host)
        archive.close()


def read(path: PathOrFile) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Read what `write` wrote: the arrays in their order, with their dtypes, and the meta.

    Nothing in the file is executed: pickled objects are refused. No size in the file is believed before it is compared
    with the size of the file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is not a checkpoint, is damaged or cut short, or comes from a newer version.
    """
    with opened(path) as file:  # outside of `try`: a missing file stays FileNotFoundError
        try:
            return _read(file, name_of(path))
        except CheckpointError:
            raise
        except Exception as error:  # struct, json, ast and numpy raise a dozen kinds on damaged bytes
            raise CheckpointError(name_of(path), _WHOLE, _short(error), _ANOTHER) from error


def _header(arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]) -> str:
    import json  # noqa: PLC0415  (not for `import gpu_adam`: many programs write no file)

    names: dict[np.dtype[Any], str] = {}  # numpy computes a dtype's name anew each time
    contents = {}
    for name, array in arrays.items():
        dtype = array.dtype
        if dtype not in names:
            if dtype.hasobject:
                raise ArgumentTypeError(
                    f'arrays["{name}"]', "must hold numbers", dtype, "convert it to a numeric dtype"
                )
            names[dtype] = dtype.name
        contents[name] = names[dtype]
    _check_names(arrays)
    try:
        return json.dumps({"format": FORMAT, "version": VERSION, "arrays": contents, "meta": dict(meta)})
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentTypeError(
            "meta", "must be JSON-serialisable", error, "pass numbers, strings and lists"
        ) from error


def _check_names(arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    for name in arrays:
        if not isinstance(name, str):  # JSON would make a string of 1, and read() another key than was written
            raise ArgumentTypeError("a name in arrays", "must be a string", repr(name), "pass str(name)")
        if name.isascii() and "\0" not in name and len(name) <= _MAX_NAME:  # the common case, without a copy
            continue
        try:
            holds = len(name.encode()) <= _MAX_NAME and "\0" not in name
        except UnicodeEncodeError:  # half of a surrogate pair
            holds = False
        if not holds:
            rule = f"must be at most {_MAX_NAME} bytes of UTF-8 without NUL"
            raise ArgumentValueError("a name in arrays", rule, _short(ascii(name)), "rename the array")


def _write_arrays(archive: stored_zip.Writer, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    headers: dict[tuple[object, ...], bytes] = {}
    for name, array in arrays.items():
        member = f"{name}.npy"
        if array.nbytes > _SMALL:
            with archive.open(member) as sink:
                np.lib.format.write_array(sink, array, allow_pickle=False)
            continue
        # The order is numpy's choice: Fortran's where nothing else keeps the elements as they lie.
        order: Literal["C", "F"] = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        key = (array.dtype, array.shape, order)
        if key not in headers:
            whole = io.BytesIO()
            np.lib.format.write_array(whole, array, allow_pickle=False)
            headers[key] = whole.getvalue()[: len(whole.getvalue()) - array.nbytes]
        archive.add(member, headers[key] + array.tobytes(order))


def _read(file: BinaryIO, path: str) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    import json  # noqa: PLC0415

    archive = stored_zip.Reader(file)
    if _META not in archive.entries:
        raise CheckpointError(path, "must be a gpu_adam checkpoint", f"no {_META} in it", _ANOTHER)
    header = json.loads(archive.read(_META).decode())
    _check_header(path, header)
    dtypes = header["arrays"]
    if len(archive.entries) != len(dtypes) + 1:
        got = f"{len(dtypes)} arrays in its table and {len(archive.entries) - 1} in the file"
        raise CheckpointError(path, _WHOLE, got, _ANOTHER)
    layouts: dict[tuple[bytes, str], _Layout] = {}
    arrays: dict[str, npt.NDArray[Any]] = {}
    contents = archive.contents([f"{name}.npy" for name in dtypes], _SMALL)
    for (name, dtype), content in zip(dtypes.items(), contents, strict=True):
        if content is None:
            arrays[name] = _large_array(archive, f"{name}.npy", dtype, layouts)
        else:
            arrays[name] = _small_array(content, dtype, layouts)
    return arrays, header["meta"]


def _check_header(path: str, header: Any) -> None:
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise CheckpointError(path, f'must have the format "{FORMAT}"', _short(found), _ANOTHER)
    if header.get("version") != VERSION:
        remedy = "read it with the gpu_adam that wrote it, or a newer one"
        raise CheckpointError(path, f"must have version {VERSION}", _short(header.get("version")), remedy)
    for key in ("arrays", "meta"):
        if not isinstance(header.get(key), dict):
            raise CheckpointError(path, _WHOLE, f'no table "{key}" in its {_META}', _ANOTHER)
    for name, dtype in header["arrays"].items():
        if not isinstance(dtype, str):
            got = _short(f"{dtype} as the dtype of {name!a}")
            raise CheckpointError(path, _WHOLE, got, _ANOTHER)


class _Layout(NamedTuple):
    """What the header of a `.npy` member says, with the dtype that the table of contents names."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    nbytes: int


def _small_array(content: bytes, dtype_name: str, layouts: dict[tuple[bytes, str], _Layout]) -> npt.NDArray[Any]:
    begin, (dtype, shape, order, nbytes) = _begin(content, len(content), dtype_name, layouts)
    if not nbytes:  # a copy would visit each of 2**60 elements of no size, and give those of "S0" a byte
        return np.ndarray(shape, dtype, order=order)
    # A copy: arrays over the bytes that were read cannot be written.
    return np.ndarray(shape, dtype, content, begin, None, order).copy(order)


def _large_array(
    archive: stored_zip.Reader, member: str, dtype_name: str, layouts: dict[tuple[bytes, str], _Layout]
) -> npt.NDArray[Any]:
    stream = archive.open(member)
    head, size = stream.read(_SMALL), archive.entries[member][2]
    begin, (dtype, shape, order, _) = _begin(head, size, dtype_name, layouts)
    array: npt.NDArray[Any] = np.ndarray(shape, dtype, order=order)
    rest = memoryview(array.reshape(-1, order=order).view(np.uint8))  # type: ignore[arg-type]
    rest[: len(head) - begin] = head[begin:]
    stream.readinto(rest[len(head) - begin :])
    stream.close()
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
    """Parse the header of a `.npy` member; `name` is the dtype's, from the table of contents."""
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


def _named(name: str, stored: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of `ml_dtypes` that the `.npy` format knows as `stored`: so many raw bytes."""
    import ml_dtypes  # noqa: PLC0415

    kind = getattr(ml_dtypes, name, None)
    if isinstance(kind, type) and issubclass(kind, np.generic):
        dtype = np.dtype(kind)
        if dtype.name == name and stored == np.dtype((np.void, dtype.itemsize)):
            return dtype
    raise ValueError(f"an array of dtype {stored}, not of {_short(name)}")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
