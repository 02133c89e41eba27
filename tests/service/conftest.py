"""A service in a process of its own, and clients in this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpu_adam.service import Client, connect

SECONDS = 60  # more than anything here takes


class Service:
    """`gpu-adam serve` in a directory, with its socket there.

    Args:
        directory: for the configuration, the socket and checkpoints.
        config: TOML.
        arguments: for the command.
    """

    def __init__(self, directory: Path, config: str, *arguments: str) -> None:
        self.directory, self.path, self.arguments = directory, directory / "socket", arguments
        self.clients: list[Client] = []
        (directory / "service.toml").write_text(config)
        self.start()

    def start(self, *more: str) -> None:
        """Start the process."""
        command = [sys.executable, "-m", "gpu_adam", "serve", "--config", str(self.directory / "service.toml")]
        self.process = subprocess.Popen(
            [*command, "--socket", str(self.path), *self.arguments, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def connect(self, name: str | None = None, patience: float = SECONDS) -> Client:
        """A client, closed with the service."""
        self.clients.append(connect(self.path, name, patience))
        return self.clients[-1]

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.communicate(timeout=SECONDS)

    def end(self) -> str:
        """Have the process end by itself; what it printed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        printed, _ = self.process.communicate(timeout=SECONDS)
        assert self.process.returncode == 0, printed
        assert not os.path.lexists(self.path)
        return printed

    def close(self) -> None:
        """End what is left."""
        for client in self.clients:
            client.close()
        if self.process.poll() is None:
            self.kill()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """A function that starts a service; all end with the test."""
    services: list[Service] = []

    def start(config: str, *arguments: str) -> Service:
        directory = tmp_path / str(len(services))
        directory.mkdir()
        services.append(Service(directory, config, *arguments))
        return services[-1]

    yield start
    for service in services:
        service.close()


def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.005)
