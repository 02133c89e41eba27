"""The service over HTTP, in a thread of its own: what it does, a few knobs, and a page. Needs the extra `serve`.

Its parts:

    endpoints.py    what is answered
    answers.py      what answers have
    gatekeeper.py   who may ask, and how much
    metrics.py      for Prometheus
    page.html       for people
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import threading
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpu_adam.errors import ArgumentValueError
from gpu_adam.service.endpoints import Access, make_application
from gpu_adam.service.gatekeeper import Gatekeeper, read_token
from gpu_adam.service.server import Server

MOST_CONNECTIONS = 64
"""At once; requests of more are answered by 503, and far more connections than that are closed."""

MOST_HEADER = 16384
"""Bytes of a request's header."""

IDLE_SECONDS = 10.0
"""How long a connection may be without a whole request."""


class ControlPlane:
    """The service over HTTP, from its construction until `close`.

    Args:
        server: the service.
        address: HOST:PORT; port 0 for a free one.
        token_file: of a token that requests must bring; None for none, on a loopback address only.

    Attributes:
        address: as a URL.

    Raises:
        ArgumentValueError: no such address, or one that others reach, without a token; or as `read_token`.
        OSError: the token's file cannot be read.
    """

    def __init__(self, server: Server, address: str, token_file: Path | None = None) -> None:
        token = None if token_file is None else read_token(token_file)
        self._socket = _listening(address, needs_loopback=token is None)
        host, port = self._socket.getsockname()[:2]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        application = make_application(server, has_token=token is not None)
        config = uvicorn.Config(
            Gatekeeper(application, token),
            http=_Connection,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            headers=[("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")],
            limit_concurrency=MOST_CONNECTIONS,
            h11_max_incomplete_event_size=MOST_HEADER,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config, application.state.access)
        self._thread = threading.Thread(target=self._serve, name="gpu_adam control plane", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        # Off the main thread uvicorn leaves signals alone.
        self._server.run([self._socket])

    def close(self) -> None:
        """End it: streams at once, what is being answered within a second."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


class _Server(uvicorn.Server):
    """uvicorn, which would wait for streams to end by themselves."""

    def __init__(self, config: uvicorn.Config, access: Access) -> None:
        super().__init__(config)
        self._access = access

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, and the rest."""
        self._access.ending.set()
        await super().shutdown(sockets)


class _Connection(H11Protocol):
    """A connection, which uvicorn would keep for as long as its first request does not come, or half of one."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Wait for the first request; close one of very many at once."""
        super().connection_made(transport)
        if len(self.connections) > 2 * MOST_CONNECTIONS:
            transport.abort()
        else:
            self._await_request()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _await_request(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(IDLE_SECONDS, self._close_unless_asked, self.cycle)

    def _close_unless_asked(self, last: Any) -> None:
        if self.cycle is last and (last is None or last.response_complete):
            self.transport.abort()


def _listening(address: str, *, needs_loopback: bool) -> socket.socket:
    """A socket at HOST:PORT, which listens.

    Raises:
        ArgumentValueError: no address, none to listen at, or not one of loopback where it must be.
    """
    match = re.fullmatch(r"(\[[^\]]+\]|[^:\s]+):(\d{1,5})", address)
    if match is None or int(match[2]) >= 2**16:
        raise ArgumentValueError("--http", "must be HOST:PORT", repr(address), "pass 127.0.0.1:8080, say")
    host, port = match[1].strip("[]"), int(match[2])
    try:
        family, _, _, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        if needs_loopback and not ipaddress.ip_address(found[0]).is_loopback:
            rule = "must be a loopback address where no token is demanded"
            raise ArgumentValueError("--http", rule, address, "pass 127.0.0.1:PORT, or --token-file FILE")
        listener = socket.create_server(found[:2], family=family, backlog=MOST_CONNECTIONS)
    except OSError as error:
        rule, remedy = "must be an address to listen at", "choose another, or port 0 for a free one"
        raise ArgumentValueError("--http", rule, f"{address}: {error}", remedy) from error
    return listener
