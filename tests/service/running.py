"""Services for tests: in a thread of this process, or by the command in a process of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_adam.service import Client, connect
from gpu_adam.service.config import read_config
from gpu_adam.service.server import Server

SECONDS = 60  # more than anything here takes

PLAIN = """
[optimizer.main]
config = {learning_rate = 0.01}
[optimizer.main.variables]
w = {shape = [6, 4]}
b = {shape = [4]}
"""


class Running:
    """A service with its socket in a directory, and clients, which end with it.

    Args:
        directory: for the configuration, the socket and checkpoints.
        config: TOML.
    """

    def __init__(self, directory: Path, config: str) -> None:
        self.directory, self.path = directory, directory / "socket"
        self.file = directory / "service.toml"
        self.file.write_text(config)
        self.clients: list[Client] = []

    def connect(self, name: str | None = None, patience: float = SECONDS) -> Client:
        """A new client."""
        self.clients.append(connect(self.path, name, patience))
        return self.clients[-1]

    def optimizer(self, name: str | None = None) -> Any:
        """A new client's optimizer "main"."""
        return self.connect(name).optimizer("main")

    def close_clients(self) -> None:
        """End all clients."""
        for client in self.clients:
            client.close()

    def close(self) -> None:
        """End clients and service."""
        self.close_clients()


class InThread(Running):
    """A service in a thread of this process.

    Args:
        directory, config: see `Running`.
        **options: of `Server`.
    """

    def __init__(self, directory: Path, config: str, **options: Any) -> None:
        super().__init__(directory, config)
        self.server = Server(read_config(self.file), self.path, **options)
        self._is_over = False
        self._thread = threading.Thread(target=self.server.run, args=(lambda: self._is_over,))
        self._thread.start()

    def end(self) -> None:
        """Have the service finish."""
        self._is_over = True
        self.server.call(lambda: None)
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()

    def close(self) -> None:
        """End clients and service."""
        super().close()
        self.end()
        self.server.close()


class InProcess(Running):
    """A service by its command.

    Args:
        directory, config: see `Running`.
        *arguments: of the command.
    """

    def __init__(self, directory: Path, config: str, *arguments: str) -> None:
        super().__init__(directory, config)
        self.start(*arguments)

    def start(self, *arguments: str) -> None:
        """Start the process."""
        command = [sys.executable, "-m", "gpu_adam", "serve", "--config", str(self.file), "--socket", str(self.path)]
        self.process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.communicate(timeout=SECONDS)

    def end(self, number: signal.Signals = signal.SIGTERM) -> str:
        """Have the process end by itself; what it printed."""
        self.process.send_signal(number)
        printed, _ = self.process.communicate(timeout=SECONDS)
        assert self.process.returncode == 0, printed
        assert not os.path.lexists(self.path)
        return printed

    def close(self) -> None:
        """End clients and service."""
        super().close()
        if self.process.poll() is None:
            self.kill()


def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.002)
