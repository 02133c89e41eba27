"""`gpu-adam inspect` and `gpu-adam convert`: what is in a checkpoint, how two differ, and another container."""

import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import gpu_adam
from gpu_adam import Variable
from gpu_adam.__main__ import main
from gpu_adam.files import contents
from gpu_adam.files.contents import read, summary_of
from gpu_adam.files.differences import difference_of
from gpu_adam.state import checkpoint

VERSION_1 = Path(__file__).parent / "data" / "checkpoint_v1.npz"
REALS = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


@pytest.fixture(params=[contents._PIECE, 3])
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays that are looked at as a whole, and in pieces."""
    monkeypatch.setattr(contents, "_PIECE", request.param)


# An array in numbers.


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", [*REALS, np.complex64, np.complex128, np.int64, np.uint8, np.bool_, ml_dtypes.int4])
def test_summaries(dtype: Any) -> None:
    array = np.array([[3, 0, 1, 1], [0, 1, 2, 3]]).astype(dtype)
    found: Any = summary_of(array)
    norm = math.sqrt(sum(abs(complex(x)) ** 2 for x in array.astype(np.complex128).ravel()))
    assert found == (array.dtype.name, (2, 4), pytest.approx(norm), 8, 8)
    assert summary_of(array[:0]) == (array.dtype.name, (0, 4), 0, 0, 0)
    assert summary_of(array[1, 1]).norm == pytest.approx(1)


@pytest.mark.usefixtures("_pieces")
def test_what_is_not_finite_is_counted_and_not_in_the_norm() -> None:
    array = np.array([np.nan, 3, np.inf, 4, -np.inf], np.float32)
    found: Any = summary_of(array)
    assert found == ("float32", (5,), pytest.approx(5), 2, 5)
    parts = np.stack([np.ones(5, np.float32), array], 1).view(np.complex64)
    found = summary_of(parts)
    assert found[2:] == (pytest.approx(math.sqrt(27)), 2, 5)
    assert summary_of(array[:1]).norm == 0


def test_norms_that_squares_would_lose() -> None:
    assert summary_of(np.array([3e200, 4e200])).norm == pytest.approx(5e200)
    assert summary_of(np.array([3e-200, 4e-200])).norm == pytest.approx(5e-200)
    found: Any = summary_of(np.array([complex(9e307, 12e307)]))
    assert found == ("complex128", (1,), pytest.approx(15e307), 1, 1)
    assert summary_of(np.array([complex(1.5e308, 1.5e308)])).finite == 1


# How two arrays differ.


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", REALS)
def test_distances_count_the_numbers_in_between(dtype: Any) -> None:
    width = 8 * np.dtype(dtype).itemsize
    bits = np.array([0, 1, 5, 1 << (width - 1), (1 << (width - 1)) + 2], f"u{width // 8}")
    zero, one, five, minus_zero, minus_two = bits.view(dtype)
    cases = {
        (zero, one): 1,
        (one, five): 4,
        (five, one): 4,
        (zero, minus_zero): 0,
        (minus_zero, minus_two): 2,
        (one, minus_two): 3,
        (zero, dtype(np.nan)): math.inf,
        (dtype(np.nan), one): math.inf,
    }
    for (a, b), expected in cases.items():
        found = difference_of(np.array([one, a]), np.array([one, b]))
        assert found is not None
        assert found[:2] == (1, (1,))
        assert (found.ulp, found.largest_ulp) == (expected, expected), (a, b)


def test_numbers_at_both_ends() -> None:
    largest = np.finfo(np.float64).max
    found = difference_of(np.array([largest]), np.array([-largest]))
    assert found is not None
    assert found.ulp == pytest.approx(2 * 0x7FEFFFFFFFFFFFFF)
    steps = difference_of(np.array([1.0]), np.nextafter(np.nextafter(np.array([1.0]), 0), 0))
    assert steps is not None
    assert steps.ulp == 2


def test_nans_of_other_bits() -> None:
    found = difference_of(*np.array([[0x7FC00000], [0x7FC00001]], np.uint32).view(np.float32))
    assert found is not None
    assert found[:2] == (1, (0,))
    assert found.ulp == 0


@pytest.mark.usefixtures("_pieces")
def test_the_first_element_and_the_largest_distance() -> None:
    one = np.ones((3, 4), np.float32)
    other = one.copy()
    other[1, 2] = np.nextafter(np.float32(1), np.float32(2))
    other[2, 0] += 1
    assert difference_of(one, other) == (2, (1, 2), (1, other[1, 2]), 1, 1 << 23)
    assert difference_of(one, one.copy(order="F")) is None
    assert difference_of(one[:0], one[:0]) is None
    assert difference_of(one[0, 0], other[2, 0]) == (1, (), (1, 2), 1 << 23, 1 << 23)


def test_parts_of_complex_numbers() -> None:
    one = np.array([1 + 1j], np.complex64)
    other = np.array([complex(1, 2)], np.complex64)
    found = difference_of(one, other)
    assert found is not None
    assert found.largest_ulp == 1 << 23


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_, ml_dtypes.int4])
def test_integers_differ_by_their_difference(dtype: Any) -> None:
    found = difference_of(np.array([0, 0, 1]).astype(dtype), np.array([0, 1, 1]).astype(dtype))
    assert found is not None
    assert (found.first, found.ulp) == ((1,), 1)
    large = difference_of(np.array([2**62], np.int64), np.array([-(2**62)], np.int64))
    assert large is not None
    assert large.ulp == 2.0**63


# The commands.


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    """Exit status and lines of a command that goes well."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert err == ""
    return int(caught.value.code or 0), [re.sub(" +", " ", line) for line in out.splitlines()]


def save(path: Path, rate: float = 0.5, **config: Any) -> Path:
    """The state after a step of a variable [2, 3] with the gradient 0, 1, 2, 3, 4, infinite."""
    variable, adam = Variable(np.ones((2, 3), np.float32), name="w"), gpu_adam.Adam(rate, **config)
    adam.apply_gradients([(np.array([[0, 1, 2], [3, 4, np.inf]], np.float32), variable)])
    adam.save(path)
    return path


def test_inspect_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", clipnorm=None)
    status, lines = run(capsys, "inspect", path)
    assert status == 0
    assert lines[0] == "version 2"
    assert lines[1] == f"sha256 {read(path).digest}"
    assert len(read(path).digest) == 64
    for line in ('kind "Adam"', "config.learning_rate 0.5", "config.amsgrad false"):
        assert line in lines
    table = lines[lines.index("") + 1 :]
    assert table == [
        "array dtype shape norm finite",
        "iterations int64 [] 1 1 of 1",
        "w/m float32 [2, 3] 0.547723 5 of 6",
        "w/v float32 [2, 3] 0.0188146 5 of 6",
    ]


def test_inspect_two_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one, same = save(tmp_path / "a.npz"), save(tmp_path / "same.npz")
    status, lines = run(capsys, "inspect", one, same)
    assert (status, lines) == (0, ["The 3 arrays are equal, bit for bit, and so are the notes."])

    arrays, note = checkpoint.read(one)
    arrays["w/m"][1, 0] = np.nextafter(arrays["w/m"][1, 0], np.float32(1))
    arrays["w/m"][1, 1] *= 2
    arrays |= {"b/m": np.zeros(2), "w/v": arrays["w/v"][:1]}
    del arrays["iterations"]
    note["config"] |= {"learning_rate": 0.25}
    other = tmp_path / "b.npz"
    checkpoint.write(other, arrays, {**note, "epoch": 3})
    status, lines = run(capsys, "inspect", one, other)
    assert status == 1
    assert lines == [
        "config.learning_rate: 0.5 and 0.25",
        "epoch: nothing and 3",
        f"iterations: only in {one}",
        "w/m: 2 of 6 elements differ, at first [1, 0]: 0.30000007 and 0.3000001, 1 ulp; largest 8388608 ulp",
        "w/v: float32 [2, 3] and float32 [1, 3]",
        f"b/m: only in {other}",
    ]


def test_names_cannot_speak_to_the_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "a", {"\033[2J": np.zeros(1)}, {"\033[1m": "\033[0m"})
    checkpoint.write(tmp_path / "b", {}, {})
    for arguments in (["a"], ["a", "b"]):
        with pytest.raises(SystemExit):
            main(["inspect", *(str(tmp_path / name) for name in arguments)])
        out = capsys.readouterr().out
        assert "\033" not in out
        assert r"'\x1b[2J'" in out


@pytest.mark.parametrize("command", [["inspect"], ["convert"], ["inspect", "good"]])
def test_what_is_no_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    good = save(tmp_path / "good.npz")
    arguments = [command[0], *[str(good)] * (len(command) - 1), str(tmp_path / "bad.npz")]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, *([str(tmp_path / "new")] if command == ["convert"] else [])])
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (1, "")
    assert "bad.npz must be a whole gpu_adam checkpoint" in err
    assert not (tmp_path / "new").exists()


def test_convert_there_and_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The digest is that of the contents, whatever the container."""
    one = save(tmp_path / "a.npz", amsgrad=True)
    tensors, back = tmp_path / "a.safetensors", tmp_path / "back.npz"
    status, lines = run(capsys, "convert", one, tensors)
    assert (status, lines) == (0, [f"{tensors}: 4 arrays, sha256 {read(one).digest}"])
    assert run(capsys, "inspect", one, tensors)[0] == 0
    assert run(capsys, "convert", tensors, back)[0] == 0
    assert back.read_bytes() == one.read_bytes()


def test_what_safetensors_cannot_hold(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "a.npz", {"w": np.zeros(1, np.complex128)}, {})
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(tmp_path / "a.npz"), str(tmp_path / "a.safetensors")])
    assert caught.value.code == 1
    assert "must have a dtype that safetensors knows (got complex128); save to a .npz file" in capsys.readouterr().err
    assert not (tmp_path / "a.safetensors").exists()


def test_version_1_becomes_version_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Under today's names, which a comparison uses for both."""
    path = tmp_path / "new.npz"
    assert run(capsys, "inspect", VERSION_1)[1][0] == "version 1"
    assert run(capsys, "convert", VERSION_1, path)[0] == 0
    assert run(capsys, "inspect", path)[1][0] == "version 2"
    assert "iterations" in checkpoint.read(path)[0]
    assert run(capsys, "inspect", VERSION_1, path)[0] == 0
