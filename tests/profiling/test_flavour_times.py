"""The times of flavours: what their bytes are, and that every one is a step."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from gpu_adam.devices import HostDevice
from gpu_adam.devices.recording import RecordingDevice
from profiling import flavours
from profiling.flavours import Flavour

SIZE = 1000
BYTES = {
    "plain": 28,
    "amsgrad": 36,
    "use_ema": 36,
    "skip_nonfinite": 32,
    "slot_dtype": 20,
    "accumulate": 12,
    "bfloat16": 22,
    "bfloat16, gradient of float32": 24,
    "bfloat16, master_weights": 28,
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_those_of_the_arrays(name: str) -> None:
    """Gradient read once, or twice for a search; variable and slots of 16 or 32 bits there and back.

    Not so a variable with a master, which takes its place where an update reads.
    """
    _, moved = flavours.step_of(flavours.FLAVOURS[name], SIZE, HostDevice(threads=1))
    assert moved == BYTES[name] * SIZE


@pytest.mark.parametrize("name", flavours.FLAVOURS)
def test_every_flavour_steps_and_reads_the_gradient_as_often_as_it_says(name: str) -> None:
    device, flavour = RecordingDevice(HostDevice(threads=1)), flavours.FLAVOURS[name]
    step, _ = flavours.step_of(flavour, SIZE, device)
    step()
    device.synchronize()
    readers = [kernel for kernel in device.launches() if kernel in ("dense", "square_sums")]
    assert readers == ["square_sums", "dense"][-flavour.reads :]


def test_a_flavour_is_a_row_beside_its_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    flavours.main(["--only", "^amsgrad$", "--size", str(SIZE), "--turns", "2"])
    header, _, row = capsys.readouterr().out.splitlines()
    assert header == "| flavour | bytes per parameter | predicted | measured | measured / predicted |"
    assert re.fullmatch(r"\| amsgrad \| 36 \| 1\.29 \| \d+\.\d\d \| \d+\.\d\d \|", row)


def test_first_steps_compile_each_into_their_own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def seconds(flavour: Flavour, device: str, cache: object) -> list[float]:
        calls.append(cache)
        return [2.0, 1.5] if calls.count(cache) == 1 else [0.25, 0.5]

    monkeypatch.setattr(flavours, "seconds_of_first_step", seconds)
    rows = list(flavours.first_steps(["host", "cuda"], "plain"))
    times = ("2.00 s", "1.50 s", "0.25 s", "0.50 s")
    assert rows == [("plain float32", device, *times) for device in ("host", "cuda")]
    assert len(set(calls)) == 2


def test_a_first_step_fills_the_cache_that_it_is_given(tmp_path: Path) -> None:
    elapsed, worked = flavours.seconds_of_first_step(flavours.PLAIN, "host", tmp_path)
    assert elapsed > 0
    assert worked > 0
    assert list((tmp_path / "host").rglob("*.so"))


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed (extra: torch)")
@pytest.mark.usefixtures("one_torch_thread")
def test_steps_of_changing_parameters_are_timed_beside_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(flavours, "PARAMETERS", 9)
    flavours.main(["--changing", "--turns", "2"])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("| parameters with a gradient | torch fused | gpu_adam.torch | gpu_adam.Adam |")
    assert [row.split(" | ")[0] for row in rows] == ["| all of 9", "| a random half"]
    for row in rows:
        assert re.fullmatch(r"\|[^|]*(\| \d+\.\d\d ms ){3}(\| \d+\.\d\d ){2}\|", row)
