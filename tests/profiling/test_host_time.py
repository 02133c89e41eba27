"""The table of a CUDA step's time on the host: its columns; what the script overwrites of an emulated driver."""

import importlib
import json
import math
import platform
import sys
from pathlib import Path

import pytest

import gpu_adam
from gpu_adam.devices.compiler import compile_library
from profiling import host_time


def test_the_best_round_of_each_checkout_counts() -> None:
    def rounds(*numbers: float) -> list[dict[str, object]]:
        return [{"rows": {host_time.NODES: 1, "one tensor": number}} for number in numbers]

    assert host_time.table({"old": rounds(9.26, 8.26, 8.44), "new": rounds(4.0, 5.0, 6.0)}).splitlines() == [
        "| microseconds | old | new |",
        "|---|---|---|",
        f"| {host_time.NODES} | 1 | 1 |",
        "| one tensor | 8.3 | 4.0 |",
    ]


def test_a_row_that_a_checkout_lacks_is_left_empty() -> None:
    old, new = {"rows": {"one tensor": 4.0}}, {"rows": {"one tensor": 5.0, "one tensor, replay": 3.0}}
    assert host_time.table({"old": [old, old], "new": [new, new]}).splitlines()[2:] == [
        "| one tensor | 4.0 | 5.0 |",
        "| one tensor, replay |  | 3.0 |",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_functions_of_a_library_are_found(tmp_path: Path) -> None:
    text = 'extern "C" int one() { return 1; }\nextern "C" int one_ptsz() { return 1; }'
    path = compile_library(text, "a test", tmp_path, tmp_path)
    names = [name for name, offset in host_time._functions(str(path)) if offset]
    assert names.count("one") >= 2


def test_every_row_is_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the emulated driver works as before afterwards."""
    cupy = pytest.importorskip("cupy", reason="the extra cuda13 brings it")
    if not getattr(cupy, "__emulated__", False) or platform.machine() != "x86_64":
        pytest.skip("needs a real GPU, or an emulated one")
    before = gpu_adam.get_device()
    device_class = importlib.import_module("gpu_adam.devices.cuda").CudaDevice
    monkeypatch.setattr(device_class, "torch_device", device_class.torch_device)  # which the script replaces
    monkeypatch.setattr(host_time, "SECONDS", 0.0)
    try:
        assert host_time.main(["--one-round"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert "emulated driver" in found["facts"]
        assert len(found["rows"]) == 13
        assert all(math.isfinite(value) and value > 0 for value in found["rows"].values())
        assert (cupy.arange(5) + 1).get().tolist() == [1, 2, 3, 4, 5]
    finally:
        gpu_adam.set_device(before)
