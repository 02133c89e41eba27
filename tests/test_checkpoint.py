"""checkpoint.write and checkpoint.read of .npz files: what goes in comes out, or an error that says why.

Both containers are tested in test_containers.py; files of version 1, made by hand, here.
"""

import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from damage import damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, CheckpointError
from gpu_adam.state import checkpoint, npz_container, stored_zip

DTYPES = [np.float16, np.float32, np.float64, np.complex64, np.complex128, np.int32, np.int64, np.uint8, np.bool_]
ML_DTYPES = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4]


def same(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


class Pipe(io.BytesIO):
    """A file that cannot seek: `zipfile` puts sizes and CRC behind the content then."""

    def seekable(self) -> bool:  # noqa: D102
        return False

    def seek(self, *args: object) -> int:  # noqa: D102
        raise io.UnsupportedOperation

    tell = seek


def by_zipfile(arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any], file: io.BytesIO) -> bytes:
    """Version 1 of the format as it was first written, by `zipfile`."""
    dtypes = {name: array.dtype.name for name, array in arrays.items()}
    header = {"format": "gpu_adam", "version": 1, "arrays": dtypes, "meta": meta}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("meta.json"), json.dumps(header))
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return file.getvalue()


def members_by_zipfile(members: Mapping[str, bytes]) -> bytes:
    """A zip of these members as `zipfile` writes it where it does not know their sizes beforehand."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                member.write(content)
    return file.getvalue()


def archive_of(header: object, **members: bytes) -> bytes:
    """A zip with this meta.json and these `.npy` members, whatever is in them; sums and sizes are right."""
    file = io.BytesIO()
    archive = stored_zip.Writer(file)
    archive.add("meta.json", header if isinstance(header, bytes) else json.dumps(header).encode())
    for name, content in members.items():
        archive.add(f"{name}.npy", content)
    archive.close()
    return file.getvalue()


def npy(array: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue()


def npy_header(text: str, version: int = 1) -> bytes:
    length = len(text.encode()).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode()


def table(**arrays: object) -> dict[str, object]:
    return {"format": "gpu_adam", "version": 1, "arrays": arrays, "meta": {}}


MANY_KINDS: dict[str, npt.NDArray[Any]] = {
    "iterations": np.array(3, np.int64),
    "w/m": np.arange(6, dtype=np.float32).reshape(2, 3),
    "w/ä/v": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "": np.zeros((0, 2), np.complex64),
    "half": np.array([0.5, 3], ml_dtypes.bfloat16),
    "big endian": np.arange(3, dtype=">i2"),
    "record": np.array([(1, 2.5)], [("é", "u1"), ("b", "f8")]),
    "λ": np.array([(1,)], [("λ", "u1")]),
    "date": np.array(["2020-01-01"], "M8[s]"),
    "text": np.array(["ab", "c"]),
    "void": np.array([b"xyz"], "V3"),
    "nothing": np.zeros(3, "V0"),
    "true": np.array([[True]]),
    "large": np.arange(300_000, dtype=np.float32),
    "large, Fortran": np.asfortranarray(np.arange(300_000, dtype=np.int16).reshape(2, -1).repeat(2, 0)),
    "large half": np.ones((1, 600_000), ml_dtypes.bfloat16),
    "large, strided": np.arange(600_000, dtype=np.float32).reshape(-1, 2)[::-1, 0],
}

NUMBERS = {
    name: np.ascontiguousarray(array).reshape(array.shape)
    for name, array in MANY_KINDS.items()
    if name not in ("big endian", "record", "λ", "date", "text", "void", "nothing")
}
"""What is written today."""


@given(
    arrays=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12),
        st.sampled_from(DTYPES).flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))),
        max_size=4,
    ),
    meta=st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(tmp_path: Path, arrays: dict[str, npt.NDArray[Any]], meta: dict[str, Any]) -> None:
    checkpoint.write(tmp_path / "state", arrays, meta)
    read_arrays, read_meta = checkpoint.read(tmp_path / "state")
    assert list(read_arrays) == list(arrays)
    assert read_meta == meta
    assert all(same(read_arrays[name], array) for name, array in arrays.items())
    assert os.listdir(tmp_path) == ["state"]


def test_the_order_of_bytes_and_elements_is_not_kept(tmp_path: Path) -> None:
    arrays = {"big endian": np.arange(3, dtype=">i2"), "Fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
    checkpoint.write(tmp_path / "state", arrays, {})
    read = checkpoint.read(tmp_path / "state")[0]
    assert read["big endian"].dtype == np.int16
    assert read["Fortran"].flags.c_contiguous
    assert all(np.array_equal(read[name], array) for name, array in arrays.items())


@pytest.mark.parametrize("name", ["record", "date", "text", "void", "nothing"])
def test_what_are_no_numbers(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArgumentTypeError, match=rf'arrays\["{name}"\] must hold numbers'):
        checkpoint.write(tmp_path / "state", {name: MANY_KINDS[name]}, {})
    assert os.listdir(tmp_path) == []


def test_other_readers_open_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    checkpoint.write(path, NUMBERS, {"n": 1})
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["meta.json", *(f"{name}.npy" for name in NUMBERS)]
    with np.load(path) as archive:
        for name, array in NUMBERS.items():
            assert archive[name].tobytes() == array.tobytes()
            assert archive[name].shape == array.shape
    if unzip := shutil.which("unzip"):
        subprocess.run([unzip, "-tqq", path], check=True)


@pytest.mark.parametrize("limit", [1000, 2**31 - 1])
def test_the_bytes_are_those_of_zipfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Also with sizes and offsets in zip64 fields, from a limit on that a test reaches."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    monkeypatch.setattr(stored_zip, "LIMIT", limit)
    checkpoint.write(tmp_path / "state", NUMBERS, {"n": 1})
    content = (tmp_path / "state").read_bytes()
    with zipfile.ZipFile(tmp_path / "state") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    # Python 3.11.4 corrected what zipfile writes in headers with 64-bit sizes.
    if sys.version_info >= (3, 11, 4):
        assert content == members_by_zipfile(members)
    for name, array in NUMBERS.items():
        if array.dtype.kind != "V":
            assert members[f"{name}.npy"] == npy(array), name
    assert all(same(array, NUMBERS[name]) for name, array in checkpoint.read(tmp_path / "state")[0].items())


def test_the_format_stays(tmp_path: Path) -> None:
    arrays = {"iterations": np.array(3, "<i8"), "w/m": np.arange(6, dtype="<f4").reshape(2, 3), "ä": np.ones(2, "<f8")}
    checkpoint.write(tmp_path / "state", arrays, {"kind": "x", "rate": 0.1})
    digest = hashlib.sha256((tmp_path / "state").read_bytes()).hexdigest()
    assert digest == "b61623e0bd589d2925ff2c32288cf8deab1e4d6c07fc9f94f1b02c327e59bc1f"


def test_members_in_any_order(tmp_path: Path) -> None:
    """Large and small ones, many of which are read together: the arrays come in the order of the manifest."""
    sizes = [2000, 3, (1 << 19) + 5, 70_000, 1, 200_000]
    arrays = {f"a{number}": np.full(sizes[number % 6], number, np.uint16) for number in range(60)}
    names = list(arrays)
    random.Random(1).shuffle(names)
    content = archive_of(table(**dict.fromkeys(arrays, "uint16")), **{name: npy(arrays[name]) for name in names})
    found = outcome(tmp_path / "state", content)
    assert found is not None
    assert list(found) == list(arrays)
    assert all(same(found[name], array) for name, array in arrays.items())


@pytest.mark.filterwarnings("ignore:Stored array in format 3.0:UserWarning")
@pytest.mark.parametrize("file", [io.BytesIO, Pipe])
def test_files_that_zipfile_wrote(tmp_path: Path, file: type[io.BytesIO]) -> None:
    """With the sizes before the content, or behind it in a data descriptor."""
    (tmp_path / "state").write_bytes(by_zipfile(MANY_KINDS, {"n": 1}, file()))
    arrays, meta = checkpoint.read(tmp_path / "state")
    assert meta == {"n": 1}
    assert list(arrays) == list(MANY_KINDS)
    assert all(same(arrays[name], array) for name, array in MANY_KINDS.items())


def test_files_with_sizes_in_both_places(tmp_path: Path) -> None:
    """Before Python 3.11.4, zipfile wrote a member's sizes into the header and into its zip64 field."""
    content = bytearray(archive_of(table(w="float64"), w=npy(np.arange(5.0))))
    header = content.index(b"w.npy") - 30
    size = len(npy(np.arange(5.0)))
    content[header + 18 : header + 26] = size.to_bytes(4, "little") * 2
    (tmp_path / "state").write_bytes(content)
    assert checkpoint.read(tmp_path / "state")[0]["w"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [65_534, 65_535])
def test_more_members_than_16_bits_count(tmp_path: Path, count: int) -> None:
    """One member is meta.json: 65,535 fit the end record, one more needs zip64's."""
    path = tmp_path / "state.npz"
    arrays = {str(i): np.array([i], np.uint16) for i in range(count)}
    checkpoint.write(path, arrays, {})
    assert (b"PK\6\6" in path.read_bytes()) == (count + 1 > 65_535)
    read = checkpoint.read(path)[0]
    assert list(read) == list(arrays)
    assert all(array[0] == i for i, array in enumerate(read.values()))
    with np.load(path) as archive:
        assert len(archive.files) == count + 1
        assert archive[str(count - 1)] == count - 1


def test_what_arrays_have_in_common_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header of `.npy` takes 10 us to write and 15 to parse: an optimizer has thousands of slots of few shapes."""
    calls = []

    def note(name: str) -> None:
        function = getattr(np.lib.format, name)

        def noted(*args: object, **kwargs: object) -> object:
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(np.lib.format, name, noted)

    note("write_array_header_1_0")
    note("read_array_header_1_0")
    arrays = {str(i): np.full(1 + i % 2, i) for i in range(50)}
    checkpoint.write(tmp_path / "state", arrays, {})
    assert all(same(arrays[name], array) for name, array in checkpoint.read(tmp_path / "state")[0].items())
    assert sorted(calls) == ["read_array_header_1_0"] * 2 + ["write_array_header_1_0"] * 2


def test_memory_holds_no_second_copy(tmp_path: Path) -> None:
    arrays = {name: np.arange(8 << 20, dtype=np.float32) for name in "ab"}
    arrays["strided"] = np.zeros((8 << 20, 2), np.float32)[:, 0]
    size = sum(array.nbytes for array in arrays.values())
    tracemalloc.start()
    try:
        checkpoint.write(tmp_path / "state", arrays, {})
        assert tracemalloc.get_traced_memory()[1] < size * 0.5  # numpy's pieces of 16 MiB, and a copy of one
        tracemalloc.reset_peak()
        checkpoint.read(tmp_path / "state")
        assert tracemalloc.get_traced_memory()[1] < size * 1.1
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ML_DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)])
def test_dtypes_that_npy_cannot_name(tmp_path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    array: npt.NDArray[Any] = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    checkpoint.write(tmp_path / "state", {"w": array}, {})
    assert same(checkpoint.read(tmp_path / "state")[0]["w"], array)


def test_the_same_state_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write(tmp_path / "today", {"w": np.ones(3)}, {"kind": "x"})
    monkeypatch.setattr(time, "time", lambda: 2e9)
    checkpoint.write(tmp_path / "later", {"w": np.ones(3)}, {"kind": "x"})
    assert (tmp_path / "today").read_bytes() == (tmp_path / "later").read_bytes()


def test_strided_arrays_keep_their_elements(tmp_path: Path) -> None:
    array: npt.NDArray[np.float64] = np.arange(24.0).reshape(4, 6)[::2, ::-1].T
    checkpoint.write(tmp_path / "state", {"w": array}, {})
    np.testing.assert_array_equal(checkpoint.read(tmp_path / "state")[0]["w"], array)


def test_numpy_opens_the_file(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "state.npz", {"a/m": np.arange(3.0)}, {"step": 7})
    with np.load(tmp_path / "state.npz") as archive:
        assert archive["a/m"].tolist() == [0.0, 1.0, 2.0]
        note = json.loads(archive["meta.json"])
        assert len(note.pop("sha256")) == 64
        entry = f"float64 [3] {zlib.crc32(np.arange(3.0).tobytes()):08x}"
        assert note == {"format": "gpu_adam", "version": 2, "arrays": {"a/m": entry}, "meta": {"step": 7}}


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "first", {}, {"n": 1})
    (tmp_path / "latest").symlink_to(tmp_path / "first")
    checkpoint.write(tmp_path / "latest", {}, {"n": 2})
    assert (tmp_path / "latest").is_symlink()
    assert checkpoint.read(tmp_path / "first")[1] == {"n": 2}


@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    checkpoint.write(tmp_path / "state", {"w": np.zeros(3)}, {"n": 1})
    before = (tmp_path / "state").read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(npz_container if stage == "write" else os, stage, fail)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(tmp_path / "state", {"w": np.ones(3)}, {"n": 2})
    assert (tmp_path / "state").read_bytes() == before
    assert os.listdir(tmp_path) == ["state"]


def test_file_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        checkpoint.write(tmp_path / "state", {}, {})
    finally:
        os.umask(old)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o640


def test_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match=r'arrays\["w"\] must hold numbers'):
        checkpoint.write(tmp_path / "state", {"w": np.array([object()])}, {})
    with pytest.raises(ArgumentTypeError, match="meta must be JSON-serialisable"):
        checkpoint.write(tmp_path / "state", {}, {"f": print})
    loop: dict[str, Any] = {}
    loop["itself"] = loop
    with pytest.raises(ArgumentTypeError, match="meta must be JSON-serialisable"):
        checkpoint.write(tmp_path / "state", {}, loop)
    assert os.listdir(tmp_path) == []


def test_names_that_a_zip_cannot_hold(tmp_path: Path) -> None:
    for name in ("a\0b", "\ud800", "n" * 65_532, "ä" * 32_766):
        with pytest.raises(ArgumentValueError, match="must be at most 65531 bytes of UTF-8 without NUL"):
            checkpoint.write(tmp_path / "state", {name: np.zeros(1)}, {})
    with pytest.raises(ArgumentTypeError, match=r"must be a string \(got 1\)"):
        checkpoint.write(tmp_path / "state", {1: np.zeros(1)}, {})  # type: ignore[dict-item]
    assert os.listdir(tmp_path) == []
    longest = {"n" * 65_531: np.zeros(1), "ä" * 32_765: np.ones(1), "PK\6\7": np.ones(2), "../../up": np.ones(3)}
    checkpoint.write(tmp_path / "state", longest, {})
    assert list(checkpoint.read(tmp_path / "state")[0]) == list(longest)


def test_missing_files_and_directories(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint.read(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        checkpoint.write(tmp_path / "none" / "state", {}, {})
    with pytest.raises(CheckpointError, match="must be a regular file"):
        checkpoint.read(tmp_path)


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    file = tmp_path / "file"
    np.savez(tmp_path / "plain.npz", w=np.zeros(3))
    for content in (b"", b"PK", b"hello" * 100, pickle.dumps([1]), (tmp_path / "plain.npz").read_bytes()):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"file must be a .*gpu_adam checkpoint"):
            checkpoint.read(file)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": "other", "version": 1, "arrays": {}, "meta": {}}, 'must have the format "gpu_adam"'),
        ([], 'must have the format "gpu_adam"'),
        (
            {"format": "gpu_adam", "version": 3, "arrays": {}, "meta": {}},
            r"must have version 1 or 2 \(got 3\); read it with",
        ),
        ({"format": "gpu_adam", "version": 1}, "must be a whole gpu_adam checkpoint"),
        ({"format": "gpu_adam", "version": 2, "arrays": {}, "meta": {}}, "must have its digest"),
        ({"format": "gpu_adam", "version": True, "arrays": {}, "meta": {}}, "must have version 1 or 2"),
        ({"format": "gpu_adam", "version": 1, "arrays": {"w": "bfloat16"}, "meta": {}}, "must be a whole"),
        ({"format": "gpu_adam", "version": 1, "arrays": [], "meta": {}}, "must be a whole"),
    ],
)
def test_wrong_headers(tmp_path: Path, header: object, message: str) -> None:
    with zipfile.ZipFile(tmp_path / "file", "w") as archive:
        archive.writestr("meta.json", json.dumps(header))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(tmp_path / "file")


def test_pickles_inside_are_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (marker,))

    with zipfile.ZipFile(tmp_path / "file", "w") as archive:
        archive.writestr("meta.json", '{"format": "gpu_adam", "version": 1, "arrays": {"w": "object"}, "meta": {}}')
        with archive.open("w.npy", "w") as member:
            np.lib.format.write_array(member, np.array([Payload()]), allow_pickle=True)
    with pytest.raises(CheckpointError, match="Object arrays cannot be loaded"):
        checkpoint.read(tmp_path / "file")
    assert not marker.exists()


SMALL_KINDS = {name: array for name, array in NUMBERS.items() if array.nbytes < 1000}


def outcome(path: Path, content: bytes) -> dict[str, npt.NDArray[Any]] | None:
    """The arrays, or None for a CheckpointError; any other exception fails the test."""
    path.write_bytes(content)
    try:
        return checkpoint.read(path)[0]
    except CheckpointError:
        return None


def _changed_field(good: bytes, dice: random.Random, begin: int, end: int) -> bytes:
    """A field of the archive with a value of its own."""
    size = len(good)
    signature = dice.choice((b"PK\1\2", b"PK\3\4", b"PK\5\6"))
    places = [found.start() for found in re.finditer(re.escape(signature), good)]
    field, width = dice.choice(places) + dice.randrange(4, 46), dice.choice((2, 4, 8))
    old = int.from_bytes(good[field : field + width], "little")
    values = (0, 1, old + 1, old - 1, old * 2, size, size - 1, (1 << 8 * width) - 1, 1 << 8 * width - 1, old ^ 1)
    value = dice.choice(values) % (1 << 8 * width)
    return good[:field] + value.to_bytes(width, "little") + good[field + width :]


@pytest.mark.thorough
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_generated_damage_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, wide: bool) -> None:
    """An error or the same arrays, and no memory beyond the file's size, whatever the damage claims."""
    if wide:
        monkeypatch.setattr(stored_zip, "LIMIT", 100)  # zip64 fields everywhere
    checkpoint.write(tmp_path / "good", SMALL_KINDS, {"step": 3})
    good, dice, noticed = (tmp_path / "good").read_bytes(), random.Random(seed), 0
    assert outcome(tmp_path / "bad", good)
    tracemalloc.start()
    try:
        for _ in range(1000):
            bad = damaged(good, dice, _changed_field)
            arrays = outcome(tmp_path / "bad", bad)
            if arrays is None:
                noticed += 1
            else:
                assert list(arrays) == list(SMALL_KINDS)
                assert all(same(array, SMALL_KINDS[name]) for name, array in arrays.items())
        assert tracemalloc.get_traced_memory()[1] < (4 << 20)  # the buffer of a file is 1 MiB
    finally:
        tracemalloc.stop()
    assert noticed > 700


def test_generated_headers_of_arrays(tmp_path: Path) -> None:
    """Damage with the right sums, as only malice makes it: an error, or an array as large as its member."""
    dice = random.Random(4)
    words = ["'<f4'", "'|O'", "'<f8'", "'V0'", "'S0'", "('<f4', (2,))", "[('a', '<f4')]", "None", "1", "True", "False"]
    words += [
        "()",
        "(1,)",
        "(2, 2)",
        "(-1,)",
        "(-1, -4)",
        f"({2**60},)",
        f"({2**62}, 0)",
        f"({2**70},)",
        "(1.5,)",
        "'('",
    ]
    words += [
        "(" + "1," * 70 + ")",
        "[" * 300,
        "'a'.b",
        "\\",
        "\0",
        "'\\ud800'",
        "0777",
        "1_0",
        "1if 1else 2",
        "x" * 9999,
    ]
    tracemalloc.start()
    try:
        for _ in range(1500):
            descr, order, shape = (dice.choice(words) for _ in range(3))
            descr = dice.choice((descr, "'<f4'"))
            order = dice.choice((order, "False", "False"))
            text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
            if dice.randrange(4) == 0:
                cut = dice.randrange(len(text))
                text = text[:cut] + dice.choice(words) + text[cut + dice.randrange(3) :]
            content = npy_header(text, dice.choice((1, 1, 2, 3, 4))) + bytes(dice.choice((0, 4, 16)))
            content = content[: dice.choice((len(content), len(content), 5, 9, 11, 40))]
            dtype = dice.choice(("float32", "float32", "object", "void0", "bytes0", "void32"))
            arrays = outcome(tmp_path / "file", archive_of(table(w=dtype), w=content))
            if arrays is not None:
                assert arrays["w"].dtype.name == dtype
                assert arrays["w"].nbytes <= 16
                assert not arrays["w"].dtype.hasobject
        assert tracemalloc.get_traced_memory()[1] < (4 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("descr", "name"), [("|V0", "void"), ("|S0", "bytes"), ("<U0", "str")])
def test_elements_of_no_size(tmp_path: Path, descr: str, name: str) -> None:
    """As many as a header says, at no cost: not a byte each, and no loop over them."""
    head = npy_header(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({2**60},), }}")
    tracemalloc.start()
    try:
        arrays = outcome(tmp_path / "file", archive_of(table(w=name), w=head))
        assert tracemalloc.get_traced_memory()[1] < (4 << 20)
    finally:
        tracemalloc.stop()
    assert arrays is not None
    assert (arrays["w"].dtype, arrays["w"].shape) == (np.dtype(descr), (2**60,))


def test_headers_that_lie(tmp_path: Path) -> None:
    """Sizes are compared before memory is taken, also for members that are read by pieces."""
    for payload in (16, 3 << 20):
        for shape in ((payload // 4 + 1,), (payload // 4 - 1,), (2**40,), (-payload // 4,), (-1, -payload // 4), (0,)):
            head = npy_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}")
            assert outcome(tmp_path / "file", archive_of(table(w="float32"), w=head + bytes(payload))) is None, shape
    whole = (
        npy_header("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2), }") + np.arange(4, dtype="<f4").tobytes()
    )
    arrays = outcome(tmp_path / "file", archive_of(table(w="float32"), w=whole))
    assert arrays is not None
    assert arrays["w"].tolist() == [[0, 2], [1, 3]]
    for short in range(len(whole)):
        assert outcome(tmp_path / "file", archive_of(table(w="float32"), w=whole[:short])) is None


def test_damage_in_large_arrays_is_noticed(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "good", {"w": np.ones(3 << 20, np.uint8), "v": np.zeros(1)}, {})
    good = (tmp_path / "good").read_bytes()
    for place in (1 << 20, (1 << 20) + 300, 2 << 20, (3 << 20) - 1):
        assert outcome(tmp_path / "bad", good[:place] + b"\2" + good[place + 1 :]) is None
    assert outcome(tmp_path / "bad", good[: 1 << 20] + good[2 << 20 :]) is None


def test_archives_outside_the_rules(tmp_path: Path) -> None:
    content = npy(np.arange(3.0))
    good = archive_of(table(w="float64"), w=content)
    file, bad = tmp_path / "file", []
    assert outcome(file, good)

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("meta.json", json.dumps(table(w="float64")))
        archive.writestr("w.npy", content)
    bad.append(packed.getvalue())

    for names in (("w.npy", "w.npy"), ("meta.json", "w.npy"), ("w.npy", "v.npy"), ("w",), ("v.npy",), ()):
        twice = io.BytesIO()
        writer = stored_zip.Writer(twice)
        writer.add("meta.json", json.dumps(table(w="float64")).encode())
        for name in names:
            writer.add(name, content)
        writer.close()
        bad.append(twice.getvalue())

    directory = good.index(b"PK\1\2")
    entry = good.index(b"PK\1\2", directory + 1)
    local = good.index(b"w.npy") - 30
    for place in ((entry + 8,), (local + 6,), (entry + 8, local + 6)):  # the flag of encryption
        flagged = bytearray(good)
        for p in place:
            flagged[p] |= 1
        bad.append(bytes(flagged))
    # Both entries speak of the same bytes; and an entry that reaches into the directory.
    bad.append(good[: entry + 42] + good[directory + 42 : directory + 46] + good[entry + 46 :])
    reach = (len(content) + 1).to_bytes(4, "little")
    bad.append(good[: entry + 20] + reach * 2 + good[entry + 28 :])
    # The header's extra field pushes the content into what follows.
    bad.append(good[: local + 28] + b"\xff\0" + good[local + 30 :])
    bad += [good + b"comment", b"prefix" + good, good[:-2] + b"\7\0comment"]
    assert [i for i, content in enumerate(bad) if outcome(file, content) is not None] == []


def test_a_sum_is_compared(tmp_path: Path) -> None:
    content = npy(np.arange(3.0))
    good = archive_of(table(w="float64"), w=content)
    crc = zlib.crc32(content).to_bytes(4, "little")
    assert good.count(crc) == 2  # the directory's counts
    place = good.rindex(crc)
    assert outcome(tmp_path / "file", good[:place] + b"abcd" + good[place + 4 :]) is None


@pytest.mark.parametrize(
    "header",
    [
        b"", b"{", b"\xff\xfe", b"\0", b"[" * 100_000, b'{"format": ' * 5000, b"1" * 5000, b"nan",
        [], 1, None, "gpu_adam", True, {},
        {"format": ["gpu_adam"], "version": 1, "arrays": {}, "meta": {}},
        {"format": "gpu_adam", "version": None, "arrays": {}, "meta": {}},
        {"format": "gpu_adam", "version": {"a": "x" * 10**6}, "arrays": {}, "meta": {}},
        {"format": "gpu_adam", "arrays": {}, "meta": {}},
        {"format": "gpu_adam", "version": 1, "arrays": {"w": "float32"}},
        {"format": "gpu_adam", "version": 1, "meta": {}},
        *(table(w="float32") | {key: wrong} for key in ("arrays", "meta") for wrong in (None, 1, "w", ["w"])),
        *(table(w=wrong) for wrong in (None, 1, ["float32"], {"float32": 1}, True, 1.5)),
        table(), table(v="float32"), table(w="float32", v="float32"), table(**{"w.npy": "float32"}),
        table(**{"\ud800": "float32"}), table(**{"w\0": "float32"}), table(**{"n" * 100_000: "float32"}),
    ],
)  # fmt: skip
def test_malformed_metadata(tmp_path: Path, header: object) -> None:
    (tmp_path / "file").write_bytes(archive_of(header, w=npy(np.arange(3, dtype=np.float32))))
    with pytest.raises(CheckpointError) as error:
        checkpoint.read(tmp_path / "file")
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        (np.float32, name)
        for name in (
            "float64", "float16", "bfloat16", "int32", "int4", "", "void", "void32", "f4", "<f4", "Float32", "single",
            "finfo", "iinfo", "__name__", "__version__", "__doc__", "__class__", "np", "_finfo", "float32 ", "object",
        )
    ]
    + [
        ("V2", name) for name in ("float16", "int16", "float8_e4m3fn", "V2", "finfo", "Bfloat16", "generic")
    ]
    + [("V1", name) for name in ("bfloat16", "int8", "bool")]
    + [("f2", "bfloat16"), ("i2", "bfloat16"), ("u2", "float8_e4m3fn"), ("i1", "int4")],
)  # fmt: skip
def test_dtypes_that_the_table_must_not_name(tmp_path: Path, stored: Any, name: str) -> None:
    content = npy(np.zeros(4, stored))
    assert outcome(tmp_path / "file", archive_of(table(w=name), w=content)) is None
    right = {"V2": "bfloat16", "V1": "int4"}.get(stored, np.dtype(stored).name)
    assert outcome(tmp_path / "file", archive_of(table(w=right), w=content)) is not None


@pytest.mark.parametrize(
    ("record", "field", "value", "message"),
    [
        ("entry", 42, bytes(4), "w.npy overlaps the member before it"),
        ("entry", 20, b"\xff\1\0\0" * 2, "w.npy overlaps the directory"),
        ("local", 28, b"\xff\0", "w.npy overlaps what follows it"),
        ("local", 30, b"v", "w.npy has a damaged header"),
        ("end", 8, b"\4\0" * 2, "the directory must have 4 members"),
        ("end", 4, b"\1\0", "the end record is damaged"),
    ],
)
def test_each_lie_has_its_own_check(record: str, field: int, value: bytes, message: str) -> None:
    """So that none hides behind the sums of the contents."""
    good = archive_of(table(v="float64", w="float64"), v=npy(np.arange(3.0)), w=npy(np.arange(3.0)))
    place = {"local": good.index(b"w.npy") - 30, "entry": good.rindex(b"PK\1\2"), "end": len(good) - 22}[record] + field
    bad = good[:place] + value + good[place + len(value) :]
    with pytest.raises(ValueError, match=message):
        stored_zip.Reader(io.BytesIO(bad)).read("w.npy")
