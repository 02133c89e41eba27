"""Named arrays and a JSON note in one file, replaced atomically.

The file is an uncompressed zip in NumPy's `.npz` layout (`numpy.load` opens it) with one more member, `meta.json`:

    {"format": "gpu_adam", "version": 1, "arrays": {"w/m": "float32", "w/v": "bfloat16"}, "meta": {...}}

`arrays` is the table of contents. Its dtype names count where the `.npy` format has none: bfloat16 is raw bytes there.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gpu_adam.errors import ArgumentTypeError, CheckpointError

FORMAT, VERSION = "gpu_adam", 1
_META = "meta.json"
_ANOTHER = "pass a file that gpu_adam wrote, or an older copy of this one"


def write(path: str | os.PathLike[str], arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint; a reader sees the old file or the new one, never a part, also after a power failure.

    Args:
        path: the file, with any suffix; its directory must exist and be writable.
        arrays: host arrays of any shape and any dtype but object.
        meta: what `json` can write.

    Raises:
        ArgumentTypeError: an array of Python objects, or a meta that JSON cannot hold.
        OSError: the file system refuses; the old file is unchanged.
    """
    import zipfile  # noqa: PLC0415  (as below: 30 ms of `import gpu_adam`, for what many programs never do)

    target = Path(path).resolve()  # a symbolic link stays one
    header = _header(arrays, meta)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                # A ZipInfo has a date of its own, 1980, where a name would get today's: same state, same bytes.
                archive.writestr(zipfile.ZipInfo(_META), header)
                for name, array in arrays.items():
                    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(target.parent)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Read what `write` wrote: the arrays in their order, with their dtypes, and the meta.

    Nothing in the file is executed: pickled objects are refused.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is not a checkpoint, is damaged or cut short, or comes from a newer version.
    """
    with open(path, "rb") as file:  # outside of `try`: a missing file stays FileNotFoundError
        try:
            return _read(file)
        except CheckpointError:
            raise
        except Exception as error:  # zipfile, zlib, json and numpy raise a dozen kinds on damaged bytes
            raise CheckpointError(str(path), "must be a whole gpu_adam checkpoint", error, _ANOTHER) from error


def _read(file: BinaryIO) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    import json  # noqa: PLC0415
    import zipfile  # noqa: PLC0415

    with zipfile.ZipFile(file) as archive:
        if _META not in archive.namelist():
            raise CheckpointError(file.name, "must be a gpu_adam checkpoint", f"no {_META} in it", _ANOTHER)
        header = json.loads(archive.read(_META))
        _check_header(file.name, header)
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, dtype in header["arrays"].items():
            with archive.open(f"{name}.npy") as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
            arrays[name] = array if array.dtype.name == dtype else _named(array, dtype)
        return arrays, header["meta"]


def _named(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    import ml_dtypes  # noqa: PLC0415

    return array.view(getattr(ml_dtypes, dtype))


def _header(arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]) -> str:
    import json  # noqa: PLC0415

    dtypes = {name: np.asarray(array).dtype for name, array in arrays.items()}
    for name, dtype in dtypes.items():
        if dtype.hasobject:
            raise ArgumentTypeError(f'arrays["{name}"]', "must hold numbers", dtype, "convert it to a numeric dtype")
    contents = {name: dtype.name for name, dtype in dtypes.items()}
    header = {"format": FORMAT, "version": VERSION, "arrays": contents, "meta": dict(meta)}
    try:
        return json.dumps(header)
    except TypeError as error:
        raise ArgumentTypeError(
            "meta", "must be JSON-serialisable", error, "pass numbers, strings and lists"
        ) from error


def _check_header(path: str, header: Any) -> None:
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise CheckpointError(path, f'must have the format "{FORMAT}"', found, _ANOTHER)
    if header.get("version") != VERSION:
        remedy = "read it with the gpu_adam that wrote it, or a newer one"
        raise CheckpointError(path, f"must have version {VERSION}", header.get("version"), remedy)


def _sync_directory(directory: Path) -> None:
    """Make the new name itself durable; file systems that cannot sync a directory refuse, and nothing is lost."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
