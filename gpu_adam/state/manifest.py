"""The manifest of a checkpoint: which arrays it holds, with their dtypes, shapes and checksums, and a note.

It is one JSON text in UTF-8, the same in every container:

    {"sha256": "<64 digits>", "format": "gpu_adam", "version": 2,
     "arrays": {"w/m": "float32 [3, 2] 1c291ca3", ...}, "meta": {...}}

An entry of `arrays` has the dtype, the shape and, in 8 hexadecimal digits, the CRC-32 of the elements in C order. (A
string, because 200,000 lists or mappings would take most of a second to write and to read.) The digest `sha256` is that
of the text itself with 64 zeros in the place of its digits. Version 1 has no digest, and entries of a dtype alone.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, CheckpointError

NAME = "meta.json"
FORMAT, VERSION = "gpu_adam", 2
WHOLE = "must be a whole gpu_adam checkpoint"
ANOTHER = "pass a file that gpu_adam wrote, or an older copy of this one"

_NO_DIGEST = "0" * 64
FIRST_OF_OTHERS = 256  # NumPy's numbers of dtypes that are not its own
_MAX_META, _MAX_ENTRY = 4 << 20, 1 << 10  # bytes; a parsed text takes up to twenty times as many


class Manifest(NamedTuple):
    """What a file says of itself.

    Attributes:
        version: 1 or 2.
        digest: of the manifest; "" in version 1.
        arrays: the entry of each array, in order.
        meta: the note.
    """

    version: int
    digest: str
    arrays: dict[str, str]
    meta: dict[str, Any]

    def dtypes(self) -> list[str]:
        """The name of each array's dtype, in order."""
        entries = list(self.arrays.values())
        return entries if self.version == 1 else [entry.partition(" ")[0] for entry in entries]

    def only(self, names: Container[str]) -> Manifest:
        """The same without the other arrays."""
        return self._replace(arrays={name: entry for name, entry in self.arrays.items() if name in names})

    def check(self, file: str, arrays: Iterable[np.ndarray]) -> None:
        """Compare arrays with their entries.

        Args:
            file: its name, for messages.
            arrays: those of the table, in its order.

        Raises:
            CheckpointError: another dtype, shape or checksum than the manifest's.
        """
        if self.version == 1:
            return
        for (name, entry), found in zip(self.arrays.items(), entries_of(arrays), strict=True):
            if found != entry:
                rule = f'must be as its {NAME} says, "{short(entry)}"'
                raise CheckpointError(f"{name!a} in {file}", rule, found, ANOTHER)


def entries_of(arrays: Iterable[np.ndarray]) -> Iterator[str]:
    """What a manifest says of arrays, which must be C-contiguous."""
    begins: dict[tuple[object, ...], str] = {}  # numpy computes a dtype's name anew each time
    for array in arrays:
        key = array.dtype, array.shape
        begin = begins.get(key)
        if begin is None:
            dtype = array.dtype.name if array.dtype.isnative else array.dtype.str  # the name tells no order of bytes
            begin = begins[key] = f"{dtype} {list(array.shape)}"
        content: Any = array if array.dtype.num < FIRST_OF_OTHERS else array.reshape(-1).view(np.uint8)
        yield f"{begin} {crc32(content):08x}"


def checksum_in(entry: str) -> int:
    """The checksum that an entry ends with."""
    return int(entry[-8:], 16)


def kind_in(entry: str) -> str:
    """The dtype and the shape that an entry of version 2 begins with, such as "float32 [3, 2]"."""
    return entry[:-9]


def text_of(entries: Mapping[str, str], meta: Mapping[str, Any]) -> str:
    """The manifest of arrays with these entries.

    Raises:
        ArgumentTypeError: a `meta` that JSON cannot hold.
        ArgumentValueError: a `meta` that is too large.
    """
    head = _json("head", {"sha256": _NO_DIGEST, "format": FORMAT, "version": VERSION, "arrays": entries})
    text = f'{head[:-1]}, "meta": {_json("meta", meta)}}}'
    if len(text) > _limit(len(entries)):
        rule = f"must be at most {_MAX_META >> 20} MiB of JSON"
        raise ArgumentValueError("meta", rule, f"{len(text)} bytes", "keep large data in arrays")
    return text.replace(_NO_DIGEST, _digest(text.encode()), 1)


def as_read(argument: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a part of a `meta`, as it will be read.

    Raises:
        ArgumentTypeError: what JSON cannot hold, in the argument of this name.
    """
    import json  # noqa: PLC0415

    copy: dict[str, Any] = json.loads(_json(argument, table))
    return copy


def _json(argument: str, table: Mapping[str, Any]) -> str:
    import json  # noqa: PLC0415  (not for `import gpu_adam`: many programs write no file)

    try:
        return json.dumps(dict(table))
    except (TypeError, ValueError, RecursionError) as error:
        rule, remedy = "must be JSON-serialisable", "pass numbers, strings and lists"
        raise ArgumentTypeError(argument, rule, error, remedy) from error


def check_size(file: str, size: int, arrays: int) -> None:
    """Raise CheckpointError where so many bytes are too many for the manifest of so many arrays."""
    if size > _limit(arrays):
        raise CheckpointError(file, WHOLE, f"{size} bytes of {NAME} for {arrays} arrays", ANOTHER)


def parsed(file: str, text: bytes) -> Manifest:
    """The manifest that a file holds.

    Args:
        file: its name, for messages.
        text: the manifest's, of a size that was checked.

    Raises:
        CheckpointError: no manifest of these versions, or a damaged one.
        ValueError, RecursionError: no JSON.
    """
    import json  # noqa: PLC0415

    content = json.loads(text.decode())
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise CheckpointError(file, f'must have the format "{FORMAT}"', short(found), ANOTHER)
    version = content.get("version")
    if version not in (1, VERSION) or type(version) is not int:
        remedy = "read it with the gpu_adam that wrote it, or a newer one"
        raise CheckpointError(file, f"must have version 1 or {VERSION}", short(version), remedy)
    digest = ""
    if version != 1:
        digest = content.get("sha256")
        if not isinstance(digest, str) or _digest(text.replace(digest.encode(), _NO_DIGEST.encode(), 1)) != digest:
            raise CheckpointError(f"{NAME} in {file}", "must have its digest", short(digest), ANOTHER)
    for key in ("arrays", "meta"):
        if not isinstance(content.get(key), dict):
            raise CheckpointError(file, WHOLE, f'no table "{key}" in its {NAME}', ANOTHER)
    for name, entry in content["arrays"].items():
        if type(entry) is not str:
            raise CheckpointError(file, WHOLE, short(f"{entry} as the entry of {name!a}"), ANOTHER)
    return Manifest(version, digest, content["arrays"], content["meta"])


def check_names(names: Iterable[Any], reserved: str, longest: int) -> None:
    """Raise ArgumentTypeError or ArgumentValueError for names that a container cannot hold.

    Args:
        names: of arrays.
        reserved: what the container calls its manifest.
        longest: in bytes.
    """
    for name in names:
        if not isinstance(name, str):  # JSON would make a string of 1, and the reader another key than was written
            raise ArgumentTypeError("a name in arrays", "must be a string", repr(name), "pass str(name)")
        if name.isascii() and "\0" not in name and len(name) <= longest and name != reserved:  # without a copy
            continue
        try:
            holds = len(name.encode()) <= longest and "\0" not in name and name != reserved
        except UnicodeEncodeError:  # half of a surrogate pair
            holds = False
        if not holds:
            rule = f"must be at most {longest} bytes of UTF-8 without NUL, and not {reserved!r}"
            raise ArgumentValueError("a name in arrays", rule, short(ascii(name)), "rename the array")


def _limit(arrays: int) -> int:
    return _MAX_META + _MAX_ENTRY * arrays


def _digest(text: bytes) -> str:
    import hashlib  # noqa: PLC0415

    return hashlib.sha256(text).hexdigest()


def short(value: object) -> str:
    """A value as messages show it."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
