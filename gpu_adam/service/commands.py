"""`gpu-adam serve`: display, and the signals that end a service."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpu_adam.errors import ArgumentValueError, GpuAdamError
from gpu_adam.held_signals import HeldSignals
from gpu_adam.service.config import read_config
from gpu_adam.service.paths import default_socket, make_default_directory
from gpu_adam.service.server import Server

if TYPE_CHECKING:
    from gpu_adam.service.control_plane import ControlPlane


def serve(
    config: Annotated[Path, typer.Option(help="TOML file: the optimizers, their variables and policies.")],
    socket: Annotated[
        Path | None, typer.Option(help="Path of the socket; default: GPU_ADAM_SOCKET, or a user's own.")
    ] = None,
    http: Annotated[
        str | None, typer.Option(help="HOST:PORT of the control plane and its page; default: none.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File of a token that HTTP requests must bring.")] = None,
    *,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoints.")] = False,
    device: Annotated[str | None, typer.Option(help="auto, host, cuda or cuda:N; default: the file's.")] = None,
    allow_uid: Annotated[list[int] | None, typer.Option(min=0, help="A user whose clients are taken, too.")] = None,
    max_clients: Annotated[int, typer.Option(min=1, help="So many at once.")] = 256,
) -> None:
    """Own optimizers, and make steps of the gradients that other processes push."""
    if token_file is not None and http is None:
        raise ArgumentValueError("--token-file", "must come with --http", "no --http", "pass --http HOST:PORT")
    if socket is None and allow_uid:
        rule = "must come with --socket: other users do not reach the default one's directory"
        raise ArgumentValueError("--allow-uid", rule, "no --socket", "pass --socket PATH")
    if socket is None:
        make_default_directory()
        socket = default_socket()
    with HeldSignals(signal.SIGTERM, signal.SIGINT) as held, ExitStack() as opened:
        server = Server(
            read_config(config, device), socket, resume=resume, allow_users=allow_uid or (), most_clients=max_clients
        )
        opened.callback(server.close)
        before = signal.set_wakeup_fd(server.wake_descriptor, warn_on_full_buffer=False)
        opened.callback(signal.set_wakeup_fd, before)
        address = ""
        if http is not None:
            plane = _control_plane()(server, http, token_file)
            opened.callback(plane.close)
            address = f" and {plane.address}"
        names = ", ".join(f"{name} ({each.policy.text})" for name, each in server.optimizers.items())
        typer.echo(f"Serving {names} on {server.device.name} at {socket}{address}; process {os.getpid()}.")
        server.run(lambda: held.received is not None)
    typer.echo(
        "The service has ended: "
        + ", ".join(f"{n} after {o.iterations} steps" for n, o in server.optimizers.items())
        + "."
    )


def _control_plane() -> type[ControlPlane]:
    """The class, of the extra `serve`.

    Raises:
        GpuAdamError: the extra is not installed.
    """
    try:
        from gpu_adam.service.control_plane import ControlPlane  # noqa: PLC0415  (of the extra)
    except ImportError as error:
        remedy = 'install it: pip install "gpu-adam[serve]"'
        raise GpuAdamError("--http", "needs the extra serve", error, remedy) from error
    return ControlPlane
