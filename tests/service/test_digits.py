"""Two processes that train the digits through a service, as the README has it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service.running import SECONDS, InProcess

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("steps", [200, pytest.param(3000, marks=pytest.mark.thorough)])
def test_two_clients(serve_in_process: Callable[..., InProcess], steps: int) -> None:
    service = serve_in_process((ROOT / "docker" / "service.toml").read_text())
    command = [sys.executable, "-m", "gpu_adam", "demo", "--service", str(service.path), "--steps", str(steps)]
    clients = [subprocess.Popen([*command, "--seed", str(seed)], stdout=subprocess.PIPE, text=True) for seed in (1, 2)]
    printed = [client.communicate(timeout=2 * SECONDS)[0] for client in clients]
    accuracies = [float(re.findall(r"test accuracy +([\d.]+)%", text)[0]) for text in printed]
    assert accuracies[0] == accuracies[1] > (90 if steps < 3000 else 97.5)
    assert service.end().endswith(f"The service has ended: digits after {steps} steps.\n")


def test_the_commands_are_those_of_the_readme() -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    (block,) = [block for block in blocks if "gpu-adam serve" in block]
    assert block.splitlines() == [
        "gpu-adam serve --config docker/service.toml --socket /tmp/adam.sock &",
        "gpu-adam demo --service /tmp/adam.sock --seed 1 &",
        "gpu-adam demo --service /tmp/adam.sock --seed 2",
        "kill %1",
    ]
