"""checkpoint.write and checkpoint.read: what goes in comes out, or an error that says why; never half a file."""

import json
import os
import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpu_adam import checkpoint
from gpu_adam.errors import ArgumentTypeError, CheckpointError

DTYPES = [np.float16, np.float32, np.float64, np.complex64, np.complex128, np.int32, np.int64, np.uint8, np.bool_]
ML_DTYPES = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4]


def same(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


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
        assert json.loads(archive["meta.json"]) == {
            "format": "gpu_adam", "version": 1, "arrays": {"a/m": "float64"}, "meta": {"step": 7},
        }  # fmt: skip


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "first", {}, {"n": 1})
    (tmp_path / "latest").symlink_to(tmp_path / "first")
    checkpoint.write(tmp_path / "latest", {}, {"n": 2})
    assert (tmp_path / "latest").is_symlink()
    assert checkpoint.read(tmp_path / "first")[1] == {"n": 2}


@pytest.mark.parametrize("stage", ["write_array", "fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    checkpoint.write(tmp_path / "state", {"w": np.zeros(3)}, {"n": 1})
    before = (tmp_path / "state").read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format if stage == "write_array" else os, stage, fail)
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
    assert os.listdir(tmp_path) == []


def test_missing_files_and_directories(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint.read(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        checkpoint.write(tmp_path / "none" / "state", {}, {})
    with pytest.raises(IsADirectoryError):
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
            {"format": "gpu_adam", "version": 2, "arrays": {}, "meta": {}},
            r"must have version 1 \(got 2\); read it with",
        ),
        ({"format": "gpu_adam", "version": 1}, "must be a whole gpu_adam checkpoint"),
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


def test_damage_is_noticed(tmp_path: Path) -> None:
    """Cut at every length, and with every byte flipped: an error, or the same content where zip ignores the byte."""
    arrays = {"w": np.arange(5.0), "b": np.array([0.5, 3], ml_dtypes.bfloat16)}
    checkpoint.write(tmp_path / "good", arrays, {"step": 3})
    good, file = (tmp_path / "good").read_bytes(), tmp_path / "bad"
    for length in range(len(good)):
        file.write_bytes(good[:length])
        with pytest.raises(CheckpointError):
            checkpoint.read(file)
    payload = [good.index(array.tobytes()) for array in arrays.values()]
    must_notice = {
        start + i for start, array in zip(payload, arrays.values(), strict=True) for i in range(array.nbytes)
    }
    unnoticed = set()
    for position in range(len(good)):
        file.write_bytes(good[:position] + bytes([good[position] ^ 0xFF]) + good[position + 1 :])
        try:
            read_arrays, meta = checkpoint.read(file)
        except CheckpointError:
            continue
        unnoticed.add(position)
        assert meta == {"step": 3}
        assert all(same(read_arrays[name], array) for name, array in arrays.items())
    assert not unnoticed & must_notice
