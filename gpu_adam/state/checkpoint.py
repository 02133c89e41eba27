"""Named arrays and a JSON note in one file, replaced atomically: the format of checkpoints, described in README.md.

A file is a container with the arrays and a manifest (manifest.py), which says what there must be. The container goes by
the suffix: `.safetensors`, and `.npz` for all others. The same arrays and note give the same bytes, in every year and
under every user.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Container, Iterator, Mapping
from pathlib import PurePath
from types import ModuleType
from typing import Any

import numpy as np

from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, CheckpointError
from gpu_adam.state import atomic_file, manifest, npz_container
from gpu_adam.state.atomic_file import PathOrFile
from gpu_adam.state.manifest import Manifest

_NUMBERS = frozenset("biufc")  # kinds of NumPy's own dtypes


def write(path: PathOrFile, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint; a reader sees the old file or the new one, never a part, also after a power failure.

    Args:
        path: the file, whose directory must exist and be writable; or a binary file object.
        arrays: host arrays of numbers of any shape. They come back C-contiguous, in the machine's byte order.
        meta: what `json` can write, at most 4 MiB of it.

    Raises:
        ArgumentTypeError: an array of something else than numbers, or of a dtype that the container does not know; a
            name that is no string; a `meta` that JSON cannot hold.
        ArgumentValueError: a name that the container cannot hold, too large a `meta`.
        OSError: the file system refuses; the old file is unchanged.
    """
    check(path, arrays)
    container = _container(path)
    plain = {name: _plain(array) for name, array in arrays.items()}
    entries = dict(zip(plain, manifest.entries_of(plain.values()), strict=True))
    text = manifest.text_of(entries, meta)
    with atomic_file.written(path) as file:
        container.write(file, plain, entries, text)


def check(path: PathOrFile, arrays: Mapping[str, Any]) -> None:
    """Raise what `write` would raise for these names and dtypes.

    Args:
        path: as for `write`.
        arrays: anything with dtypes, by name.
    """
    container = _container(path)
    manifest.check_names(arrays, container.RESERVED, container.MAX_NAME)
    known: set[np.dtype] = set()
    for name, array in arrays.items():
        dtype = array.dtype
        if dtype not in known:
            _check_numbers(name, dtype)
            container.check_dtype(name, dtype)
            known.add(dtype)


def read(path: PathOrFile) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `write` wrote: the arrays in their order, with their dtypes, and the meta.

    Nothing in the file is executed: pickled objects are refused. No size in the file is believed before it is compared
    with the size of the file, and memory for no more than twice that is taken.

    Args:
        path: the file, or a binary file object.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is not a checkpoint, is damaged or cut short, or comes from a newer version.
    """
    said, arrays = read_all(path)
    return arrays, said.meta


def read_all(path: PathOrFile, names: Container[str] | None = None) -> tuple[Manifest, dict[str, np.ndarray]]:
    """The same with the whole manifest, of which the meta is a part.

    Args:
        path: as for `read`.
        names: of the arrays that are wanted; None for all. Of an `.npz` file of version 2 nothing but the manifest and
            the members of these arrays is read.
    """
    container, title = _container(path), atomic_file.name_of(path)
    # The file is opened outside of `naming`: a missing file stays FileNotFoundError.
    with atomic_file.opened(path) as file, naming(title):
        said, arrays = container.read(file, title, names)
        (said if names is None else said.only(names)).check(title, arrays.values())
    return said, arrays


@contextlib.contextmanager
def naming(title: str) -> Iterator[None]:
    """A block that reads a file which may be damaged: what it raises is a CheckpointError that names the file."""
    try:
        yield
    except (CheckpointError, ArgumentTypeError, ArgumentValueError):
        raise
    except Exception as error:  # struct, json, ast and numpy raise a dozen kinds on damaged bytes
        raise CheckpointError(title, manifest.WHOLE, manifest.short(error), manifest.ANOTHER) from error


def _container(path: Any) -> ModuleType:
    """The module that writes and reads the file."""
    name = path if isinstance(path, (str, bytes, os.PathLike)) else getattr(path, "name", "")
    if isinstance(name, (str, bytes, os.PathLike)) and PurePath(os.fsdecode(name)).suffix == ".safetensors":
        from gpu_adam.state import safetensors_container  # noqa: PLC0415  (ml_dtypes: not for `import gpu_adam`)

        return safetensors_container
    return npz_container


def _plain(array: np.ndarray) -> np.ndarray:
    """The array, C-contiguous and in the machine's byte order: itself, where it is so."""
    return np.asarray(array, None if array.dtype.isnative else array.dtype.newbyteorder("="), order="C")


def _check_numbers(name: str, dtype: np.dtype) -> None:
    is_known = dtype.kind in _NUMBERS and dtype.name not in ("longdouble", "clongdouble", "float128", "complex256")
    if is_known:
        return
    import ml_dtypes  # noqa: PLC0415  (not for `import gpu_adam`)

    if dtype != getattr(ml_dtypes, dtype.name, None):
        raise ArgumentTypeError(f'arrays["{name}"]', "must hold numbers", dtype, "convert it to a numeric dtype")
