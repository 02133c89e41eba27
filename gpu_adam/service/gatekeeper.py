"""Who may ask over HTTP, and how much: in front of the control plane's endpoints, as an ASGI application has it."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import stat
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse, Response

from gpu_adam.errors import ArgumentValueError, GpuAdamError, ServiceError
from gpu_adam.rules import shown
from gpu_adam.service.messages import refusal

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

MOST_BODY = 4096
"""Bytes of a request's body: an assignment of a hyperparameter takes a few dozen."""

BODY_SECONDS = 5.0
"""How long a body may take to come."""

WITHOUT_TOKEN = ("/", "/v1/health/live", "/v1/health/ready")
"""What may be asked for without the token: that the service is there, and the page, which has no data of its own."""

_SHORTEST_TOKEN = 16
_SAFE = ("GET", "HEAD", "OPTIONS")


def failure(error: GpuAdamError) -> dict[str, str]:
    """An exception as an answer: its class, its four parts, and the sentence that they make."""
    kind, argument, rule, got, remedy = refusal(error)["error"]
    parts = {"error": kind, "argument": argument, "rule": rule, "got": got, "remedy": remedy}
    return {**parts, "message": f"{argument} {rule} (got {got}); {remedy}."}


def read_token(path: Path) -> bytes:
    """The token of a file that nobody else may read.

    Raises:
        OSError: it cannot be read.
        ArgumentValueError: others may read it; it is too short, or has other than visible ASCII characters.
    """
    with open(path, "rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise ArgumentValueError("--token-file", "must be this user's alone", f"mode {mode:o}", f"chmod 600 {path}")
        token = file.read(4096).strip()
    if len(token) < _SHORTEST_TOKEN or not all(0x21 <= character <= 0x7E for character in token):
        rule = f"must hold at least {_SHORTEST_TOKEN} visible ASCII characters and no space"
        got = f"{len(token)} bytes"  # never the token itself
        raise ArgumentValueError("--token-file", rule, got, f"make one: openssl rand -hex 32 > {path}")
    return token


class Gatekeeper:
    """Lets requests pass, or answers them itself.

    Without a token every process of the machine may ask, but no web page: a browser that follows a page's link to this
    port names that page's host in `Host` where a name server leads it here, and in `Origin` where it sends something.

    Args:
        application: behind it.
        token: what requests must bring; None for none, on a loopback address.
    """

    def __init__(self, application: Application, token: bytes | None) -> None:
        self._application, self._token = application, token

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        answer = self._refused(scope, headers)
        if answer is None:
            answer, receive = await _with_body(headers, receive)
        await (answer or self._application)(scope, receive, send)

    def _refused(self, scope: Message, headers: dict[str, str]) -> Response | None:
        host = headers.get("host", "")
        if self._token is None:
            if not _is_loopback(host):
                rule, remedy = "must be localhost or a loopback address", "ask by one of these"
                return _answer(403, ServiceError("the header Host", rule, shown(host), remedy))
        elif scope["path"] not in WITHOUT_TOKEN and not self._is_known(headers.get("authorization", "")):
            remedy = "send the header Authorization: Bearer TOKEN"
            error = ServiceError("the request", "must bring the token of --token-file", "none, or another", remedy)
            return _answer(401, error, {"WWW-Authenticate": "Bearer"})
        origin = headers.get("origin")
        if scope["method"] not in _SAFE and origin is not None and origin.partition("://")[2] != host:
            rule, remedy = "must be that of the service's own page", "send it from there, or without a browser"
            return _answer(403, ServiceError("the header Origin", rule, shown(origin), remedy))
        return None

    def _is_known(self, authorization: str) -> bool:
        scheme, _, token = authorization.partition(" ")
        same = hmac.compare_digest(token.strip().encode("latin-1"), self._token or b"")
        return same and scheme.lower() == "bearer"


async def _with_body(headers: dict[str, str], receive: Receive) -> tuple[Response | None, Receive]:
    """What gives the body again, once all of it is here; or an answer to one that is too long, or takes too long."""
    deadline = asyncio.get_running_loop().time() + BODY_SECONDS
    parts: list[bytes] = []
    size = int(length) if (length := headers.get("content-length", "")).isdecimal() else 0
    is_whole = False
    while not is_whole and size <= MOST_BODY:
        try:
            message = await asyncio.wait_for(receive(), deadline - asyncio.get_running_loop().time())
        except asyncio.TimeoutError:
            rule, remedy = f"must come within {BODY_SECONDS:g} s", "send it at once"
            return _answer(408, ServiceError("the body", rule, "less", remedy), {"Connection": "close"}), receive
        if message["type"] != "http.request":  # the other end is gone
            return Response(), receive
        parts.append(message.get("body", b""))
        size, is_whole = sum(map(len, parts)), not message.get("more_body", False)
    if size > MOST_BODY:
        rule, remedy = f"must have at most {MOST_BODY} bytes", "send less"
        return _answer(413, ServiceError("the body", rule, f"{size} or more", remedy), {"Connection": "close"}), receive
    whole = iter([{"type": "http.request", "body": b"".join(parts), "more_body": False}])

    async def again() -> Message:
        for message in whole:
            return message
        return await receive()

    return None, again


def _answer(status: int, error: GpuAdamError, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(failure(error), status, headers)


def _is_loopback(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
