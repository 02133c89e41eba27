"""Ranges around the stages of a step: none by default, named ones with GPU_ADAM_NVTX=1."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from gpu_adam import nvtx

STEP = """
import sys, types
import numpy as np
calls = []
sys.modules["cupy.cuda.nvtx"] = types.SimpleNamespace(RangePush=calls.append, RangePop=lambda: calls.append("end"))
import gpu_adam
gpu_adam.set_device("host")
v = gpu_adam.Variable(np.ones(3, np.float32))
adam = gpu_adam.Adam(global_clipnorm=1.0)
for _ in range(2):
    adam.apply_gradients([(np.ones(3, np.float32), v)])
print(*calls, sep=",")
"""


def test_a_step_pays_nothing_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPU_ADAM_NVTX", raising=False)
    function = lambda: 1  # noqa: E731
    assert nvtx.stage("x")(function) is function


def test_stages_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_ADAM_NVTX", "1")
    result = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True)
    step = "step,check,end,read,end,update,end,end"
    assert result.stdout.replace("gpu_adam: ", "").strip() == f"{step},{step}"


def test_a_range_ends_when_the_stage_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    ranges = SimpleNamespace(RangePush=calls.append, RangePop=lambda: calls.append("end"))
    monkeypatch.setenv("GPU_ADAM_NVTX", "1")
    monkeypatch.setitem(sys.modules, "cupy.cuda.nvtx", ranges)
    with pytest.raises(ZeroDivisionError):
        nvtx.stage("x")(lambda: 1 / 0)()
    assert calls == ["gpu_adam: x", "end"]
