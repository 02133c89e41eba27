"""Functions that start services, which end with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.running import PLAIN, InProcess, InThread, Running


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., InThread]]:
    """A function that starts a service in a thread: of a configuration and options of `Server`."""
    yield from _starting(tmp_path, InThread)


@pytest.fixture
def serve_in_process(tmp_path: Path) -> Iterator[Callable[..., InProcess]]:
    """A function that starts the command: of a configuration and arguments."""
    yield from _starting(tmp_path, InProcess)


def _starting(directory: Path, kind: type[Running]) -> Iterator[Callable[..., Any]]:
    started: list[Running] = []

    def start(config: str = PLAIN, *arguments: Any, **options: Any) -> Any:
        own = directory / str(len(started))
        own.mkdir()
        started.append(kind(own, config, *arguments, **options))
        return started[-1]

    yield start
    for service in started:
        service.close()
