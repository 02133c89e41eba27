"""Both containers of a checkpoint: what others read in them, and that damage is noticed, wherever it is."""

import hashlib
import importlib
import io
import json
import random
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from damage import damaged
from reference import assert_same_bits

import gpu_adam
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, CheckpointError
from gpu_adam.state import checkpoint, manifest, stored_zip

SUFFIXES = ["npz", "safetensors"]
SMALL: dict[str, npt.NDArray[Any]] = {
    "iterations": np.array(3, np.int64),
    "w/m": np.arange(3, dtype=np.float32).reshape(3, 1),
    "half/v": np.array([0.5, 3], ml_dtypes.bfloat16),
    "z/m": np.array([5 + 7j], np.complex64),
    "none/m": np.zeros((0, 2), np.float64),
}


def same(arrays: dict[str, npt.NDArray[Any]], others: dict[str, npt.NDArray[Any]]) -> bool:
    return list(arrays) == list(others) and all(
        (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        for a, b in zip(arrays.values(), others.values(), strict=True)
    )


def written(path: Path) -> bytes:
    checkpoint.write(path, SMALL, {"step": 3})
    return path.read_bytes()


def outcome(path: Path, content: bytes) -> CheckpointError | None:
    """The error, or None where the file holds just what was written; anything else fails the test."""
    path.write_bytes(content)
    try:
        arrays, meta = checkpoint.read(path)
    except CheckpointError as error:
        return error
    assert meta == {"step": 3}
    assert same(arrays, SMALL)
    return None


def trained() -> gpu_adam.Adam:
    variables = [
        gpu_adam.Variable(np.ones((3, 2), np.float32), name="w"),
        gpu_adam.Variable(np.ones(2), name="half", dtype="bfloat16"),
    ]
    optimizer = gpu_adam.Adam(0.1, amsgrad=True, use_ema=True, master_weights=True)
    for number in range(2):
        optimizer.apply_gradients([(np.full(v.shape, number + 1, v.dtype), v) for v in variables])
    return optimizer


# As README.md beside the module says, by NumPy and json alone.


def opened_by_numpy(path: Path) -> tuple[bytes, dict[str, npt.NDArray[Any]]]:
    """The manifest's text and the arrays as they are stored, of a `.npz` file."""
    with np.load(path, allow_pickle=False) as file:
        return file["meta.json"], {name: file[name] for name in file.files if name != "meta.json"}


def opened_by_hand(path: Path) -> tuple[bytes, dict[str, npt.NDArray[Any]]]:
    """The same of a `.safetensors` file."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    codes = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "I64": "<i8", "C64": "<c8", "BF16": "<u2"}
    text, arrays = header.pop("__metadata__")["meta.json"], {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        arrays[name] = np.frombuffer(content[begin + first : begin + last], codes[entry["dtype"]]).reshape(
            entry["shape"]
        )
    return text.encode(), arrays


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_numpy_and_json_are_enough(tmp_path: Path, suffix: str) -> None:
    optimizer, path = trained(), tmp_path / f"state.{suffix}"
    optimizer.save(path, variables=True)
    text, stored = {"npz": opened_by_numpy, "safetensors": opened_by_hand}[suffix](path)
    note = json.loads(text)
    digest = note["sha256"]
    assert hashlib.sha256(text.replace(digest.encode(), b"0" * 64, 1)).hexdigest() == digest
    assert (note["format"], note["version"]) == ("gpu_adam", 2)
    assert note["arrays"].keys() == stored.keys() == {*optimizer.export(), "w/value", "half/value"}
    for name, entry in note["arrays"].items():
        dtype, rest = entry.split(" ", 1)
        shape, crc = rest.rsplit(" ", 1)
        array = stored[name]
        assert list(array.shape) == json.loads(shape)
        assert zlib.crc32(array.tobytes()) == int(crc, 16)
        assert array.dtype.name == ("uint16" if dtype == "bfloat16" else dtype)
    assert stored["half/value"].dtype == np.uint16
    for name, array in optimizer.export().items():
        assert_same_bits(stored[name].view(array.dtype), array, name)
    assert gpu_adam.Adam.from_config(note["meta"]["config"]).get_config() == optimizer.get_config()


def test_safetensors_itself_reads_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    arrays = {name: array for name, array in SMALL.items() if name != "half/v"}  # its NumPy reader knows no bfloat16
    arrays |= {"strided": np.arange(12.0)[::3], "Fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
    checkpoint.write(path, arrays, {})
    read = importlib.import_module("safetensors.numpy").load_file(path)
    assert all(np.array_equal(read[name], array) for name, array in arrays.items())


# What the files are.


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_state_gives_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    contents = {written(tmp_path / f"{number}.{suffix}") for number in range(5)}
    assert len(contents) == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_objects(suffix: str) -> None:
    """The suffix of its name chooses the container, as of a path."""
    file = io.BytesIO()
    if suffix != "npz":
        file.name = f"state.{suffix}"
    checkpoint.write(file, SMALL, {"step": 3})
    assert (file.getvalue()[:2] == b"PK") == (suffix == "npz")
    arrays, meta = checkpoint.read(file)
    assert same(arrays, SMALL)
    assert meta == {"step": 3}


@pytest.mark.parametrize("dtype", ["complex128", ml_dtypes.int4, ml_dtypes.float8_e4m3])
def test_what_safetensors_cannot_hold(tmp_path: Path, dtype: Any) -> None:
    arrays = {"good": np.zeros(1), "bad": np.zeros(2, dtype)}
    with pytest.raises(ArgumentTypeError, match=r'arrays\["bad"\] must have a dtype that safetensors knows .* \.npz'):
        checkpoint.write(tmp_path / "state.safetensors", arrays, {})
    assert list(tmp_path.iterdir()) == []
    checkpoint.write(tmp_path / "state.npz", arrays, {})
    assert same(checkpoint.read(tmp_path / "state.npz")[0], arrays)


def test_a_file_that_safetensors_wrote_again(tmp_path: Path) -> None:
    """With the arrays in an order of its own, and names of any letters."""
    path = tmp_path / "state.safetensors"
    arrays: dict[str, npt.NDArray[Any]] = {
        f'{letter}"\\/\n{{}}[0]': np.arange(size, dtype=np.int8) for size, letter in enumerate("zäbé")
    }
    arrays |= {"nothing": np.zeros((3, 0)), "number": np.array(7.0)}
    checkpoint.write(path, arrays, {"step": 3})
    library = importlib.import_module("safetensors.numpy")
    with importlib.import_module("safetensors").safe_open(path, "np") as file:
        metadata = file.metadata()
    library.save_file(dict(reversed(library.load_file(path).items())), path, metadata)
    found, meta = checkpoint.read(path)
    assert same(found, arrays)
    assert meta == {"step": 3}


ENTRY = '{"dtype":"U8","shape":[%s],"data_offsets":[%d,%d]}'


@pytest.mark.parametrize(
    "entries",
    [
        {"a": ("2", 0, 2), "b": ("2", 1, 3)},
        {"a": ("1", 0, 1), "b": ("2", 2, 4)},
        {"a": ("2", 0, 2)},
        {"a": ("4", 0, 4), "b": ("1", 4, 5)},
        {"a": ("4,-1", 0, 4)},
        {"a": ("1," * 70 + "4", 0, 4)},
        {"a": ("4294967296,4294967296,4", 0, 4)},
        {"a": ("9" * 5000, 0, 4)},
        {"a": ("2", 0, 2), "a\\u0061": ("2", 2, 4)},
        {"a": ("4", 0, 4), "": ("0", 9, 9)},
    ],
    ids=["overlap", "hole", "left", "beyond", "negative", "axes", "large", "digits", "unknown", "far"],
)
def test_places_of_arrays_that_cannot_be(tmp_path: Path, entries: dict[str, tuple[str, int, int]]) -> None:
    text = manifest.text_of({"a": f"uint8 [4] {zlib.crc32(bytes(4)):08x}"}, {})
    header = f'{{"__metadata__":{json.dumps({"meta.json": text})}'
    header += "".join(f',"{name}":{ENTRY % entry}' for name, entry in entries.items()) + "}"
    path = tmp_path / "state.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        checkpoint.read(path)


def test_an_array_with_two_places(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    content = written(path)
    entry = content[content.index(b',"w/m":') : content.index(b"}", content.index(b',"w/m":')) + 1]
    length = int.from_bytes(content[:8], "little")
    end = content.rindex(b"}", 0, 8 + length)
    path.write_bytes((length + len(entry)).to_bytes(8, "little") + content[8:end] + entry + content[end:])
    with pytest.raises(CheckpointError, match=r"behind byte|entries"):
        checkpoint.read(path)


@pytest.mark.parametrize(("suffix", "name"), [("npz", "meta.json"), ("safetensors", "__metadata__")])
def test_the_name_of_the_manifest_is_taken(tmp_path: Path, suffix: str, name: str) -> None:
    with pytest.raises(ArgumentValueError, match=f"and not '{name}'"):
        checkpoint.write(tmp_path / f"state.{suffix}", {name: np.zeros(1)}, {})


def test_a_note_that_is_too_large_to_be_read(tmp_path: Path) -> None:
    with pytest.raises(ArgumentValueError, match="meta must be at most 4 MiB of JSON"):
        checkpoint.write(tmp_path / "state", {}, {"log": "x" * (5 << 20)})
    assert list(tmp_path.iterdir()) == []


# Damage.


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_truncation_is_noticed(tmp_path: Path, suffix: str) -> None:
    good, bad = written(tmp_path / f"good.{suffix}"), tmp_path / f"bad.{suffix}"
    assert [length for length in range(len(good)) if outcome(bad, good[:length]) is None] == []


@pytest.mark.parametrize("flip", [0xFF, 1, 0x20])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_flipped_byte_is_noticed(tmp_path: Path, suffix: str, flip: int) -> None:
    """Or changes nothing that is read. In an array's elements, the message names the array."""
    good, bad = written(tmp_path / f"good.{suffix}"), tmp_path / f"bad.{suffix}"
    elements = {
        good.rindex(array.tobytes()) + offset: name for name, array in SMALL.items() for offset in range(array.nbytes)
    }
    begin = good.index(b'{\\"sha256' if suffix == "safetensors" else b'{"sha256')
    text = range(begin, good.index(b"step", begin))
    for position in range(len(good)):
        error = outcome(bad, good[:position] + bytes([good[position] ^ flip]) + good[position + 1 :])
        if position in elements:
            assert repr(elements[position]) in str(error)
        assert position not in text or error is not None, position


def _nines(good: bytes, dice: random.Random, begin: int, end: int) -> bytes:
    """Digits, of which a header of JSON makes other numbers."""
    return good[:begin] + b"9" * (end - begin) + good[end:]


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_generated_damage_is_noticed(tmp_path: Path, suffix: str, seed: int) -> None:
    """Bytes that change, vanish, come twice, change places: an error or the same arrays, and no memory beyond."""
    good, bad = written(tmp_path / f"good.{suffix}"), tmp_path / f"bad.{suffix}"
    dice, noticed = random.Random(seed), 0
    tracemalloc.start()
    try:
        for _ in range(800):
            noticed += outcome(bad, damaged(good, dice, _nines)) is not None
        assert tracemalloc.get_traced_memory()[1] < (6 << 20)  # the buffer of a file is 1 MiB
    finally:
        tracemalloc.stop()
    assert noticed > 600


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("change", ["dtype", "shape", "crc", "elements"])
def test_an_array_is_compared_with_its_entry(tmp_path: Path, suffix: str, change: str) -> None:
    """Also where the container is sound, and so is the manifest."""
    array = np.arange(4, dtype=np.float32)
    entry = {"dtype": "int32 [4] {}", "shape": "float32 [2, 2] {}", "crc": "float32 [4] 00000000"}.get(change)
    text = manifest.text_of({"w": (entry or "float32 [4] {}").format(f"{zlib.crc32(array.tobytes()):08x}")}, {})
    stored = array + (change == "elements")
    path = tmp_path / f"state.{suffix}"
    if suffix == "safetensors":
        library = importlib.import_module("safetensors.numpy")
        path.write_bytes(library.save({"w": stored}, {"meta.json": text}))
    else:
        np.savez(path, w=stored)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("meta.json", text)
    with pytest.raises(CheckpointError) as error:
        checkpoint.read(path)
    assert "'w' in " in str(error.value) or change == "dtype"


def with_manifest(path: Path, text: bytes) -> None:
    """A file whose manifest is this text."""
    if path.suffix == ".npz":
        with path.open("wb") as file:
            archive = stored_zip.Writer(file)
            archive.add("meta.json", text)
            archive.close()
    else:
        header = json.dumps({"__metadata__": {"meta.json": text.decode()}}, separators=(",", ":")).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"meta": ' * 100_000, b"[" + b"[]," * (3 << 20) + b"0]", b"9" * (8 << 20), b'{"a": NaN'],
    ids=["lists", "mappings", "many", "large", "cut"],
)
def test_a_manifest_is_bounded(tmp_path: Path, suffix: str, text: bytes) -> None:
    path = tmp_path / f"state.{suffix}"
    with_manifest(path, text)
    size = path.stat().st_size
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as error:
            checkpoint.read(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * size + (4 << 20)
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "header",
    [
        b'{"__metadata__":' + b"[" + b"[]," * (1 << 20) + b"0]}",
        b'{"__metadata__":{"meta.json":' + b"[" * (1 << 20),
        b'{"__metadata__":{' + b"".join(b'"%d":"",' % n for n in range(1 << 16)) + b'"a":1}}',
        b'{"__metadata__":{"meta.json":"{}"},"' + b"\\n" * (1 << 20) + b'":{',
        b'{"__metadata__":{"meta.json":"{}"}' + b',"a":[]' * (1 << 18) + b"}",
        b'{"__metadata__":{"meta.json":"{}"},"a":{"dtype":"U8","shape":[' + b"1," * (1 << 20),
    ],
    ids=["list", "depth", "pairs", "escapes", "others", "shape"],
)
def test_a_header_is_bounded(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as error:
            checkpoint.read(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(header) + (4 << 20)
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 600


def test_metadata_of_others(tmp_path: Path) -> None:
    library = importlib.import_module("safetensors.numpy")
    path = tmp_path / "state.safetensors"
    for metadata in (None, {"format": "pt"}, {"meta.json": "{}"}, {"meta.json": "[]"}):
        path.write_bytes(library.save({"w": np.zeros(3)}, metadata))
        with pytest.raises(CheckpointError):
            checkpoint.read(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_memory_while_a_file_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"state.{suffix}"
    checkpoint.write(path, {name: np.zeros(4 << 20, np.float32) for name in "ab"}, {})
    tracemalloc.start()
    try:
        checkpoint.read(path)
        assert tracemalloc.get_traced_memory()[1] < 2.1 * path.stat().st_size
    finally:
        tracemalloc.stop()
