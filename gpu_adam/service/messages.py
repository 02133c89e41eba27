"""Messages between a client and the server: one JSON object in each datagram of a Unix SEQPACKET socket.

The system keeps a datagram whole and tells its end, so that nothing is framed here. What does not fit into one travels
in shared memory. Descriptors come with the answers of a server; those that a client sends are closed by the kernel.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterable, Sequence
from typing import Any

from gpu_adam import errors
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, GpuAdamError, ServiceError
from gpu_adam.rules import is_whole, shown

VERSION = 1
"""Of the protocol; a client of another version is refused with a sentence."""

SETTABLE = (
    *("learning_rate", "beta_1", "beta_2", "epsilon", "decay", "weight_decay", "l2"),
    *("clipvalue", "clipnorm", "global_clipnorm", "amsgrad"),
)
"""What of an optimizer may be read and assigned while it is served."""

LARGEST = 2**17
"""Bytes of a datagram at most; Linux sends up to about 200 KiB at once by default."""

_log = logging.getLogger("gpu_adam")
AWAKE_SECONDS = 1e-3
"""How long each end looks for a message before it sleeps: to wake a processor takes as long as all the rest."""

_LONGEST = 2000  # characters of a part of an error
_INT = 4  # bytes of a descriptor
_ANCILLARY = socket.CMSG_SPACE(4 * _INT)  # for four, which is more than any message has
_encode = json.JSONEncoder(separators=(",", ":")).encode
_decode = json.JSONDecoder().raw_decode  # without regular expressions for spaces around a text: a third of the time

_ERROR_CLASSES: dict[str, type[GpuAdamError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, GpuAdamError) and kind is not GpuAdamError
}


class ConnectionLostError(Exception):
    """The other end is gone."""


def send(connection: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send a message, with descriptors of files.

    Raises:
        ConnectionLostError: nobody is at the other end.
        BlockingIOError: of a socket that does not wait: the other end does not read.
        ArgumentValueError: the message is too large; nothing was sent.
    """
    data = _encode(message).encode()
    if len(data) > LARGEST:
        rule, remedy = f"must fit into a message of {LARGEST} bytes", "push fewer gradients at once"
        raise ArgumentValueError("what is sent", rule, f"{len(data)} bytes", remedy)
    try:
        if descriptors:
            socket.send_fds(connection, [data], descriptors)
        else:
            connection.send(data)
    except BlockingIOError:
        raise
    except OSError as error:
        raise ConnectionLostError from error


class Receiver:
    """Receives messages, all into the same memory: so large a piece anew each time would cost more than the rest."""

    def __init__(self) -> None:
        self._memory = memoryview(bytearray(LARGEST + 1))

    def receive(self, connection: socket.socket) -> dict[str, Any]:
        """The next message, without descriptors: what came with it is closed.

        Raises:
            ConnectionLostError: nobody is at the other end.
            ServiceError: no JSON object, or a datagram that was cut off.
        """
        try:
            size = connection.recv_into(self._memory)
        except BlockingIOError:
            raise
        except OSError as error:
            raise ConnectionLostError from error
        return self._message(size)

    def receive_with_descriptors(self, connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
        """The next message, and the descriptors that came with it, which are the caller's to close."""
        end = time.perf_counter() + AWAKE_SECONDS
        try:
            while True:
                wait = 0 if time.perf_counter() > end else socket.MSG_DONTWAIT
                try:
                    size, ancillary, flags, _ = connection.recvmsg_into([self._memory], _ANCILLARY, wait)
                    break
                except BlockingIOError:
                    if not wait:
                        raise
                    os.sched_yield()
        except OSError as error:
            raise ConnectionLostError from error
        descriptors: list[int] = []
        for _, _, data in ancillary:
            descriptors += memoryview(data[: len(data) // _INT * _INT]).cast("i")
        try:
            if flags & socket.MSG_CTRUNC:
                rule = "must come with all its descriptors"
                raise ServiceError("a message", rule, "fewer", "raise the limit of open files (ulimit -n)")
            return self._message(size), descriptors
        except BaseException:
            close_all(descriptors)
            raise

    def _message(self, size: int) -> dict[str, Any]:
        if not size:
            raise ConnectionLostError
        message, end = None, -1
        if size <= LARGEST:
            with contextlib.suppress(ValueError, RecursionError):
                text = str(self._memory[:size], "utf-8").strip(" \t\r\n")
                message, end = _decode(text)
                end -= len(text)
        if end or not isinstance(message, dict):
            rule, got = f"must be a JSON object of at most {LARGEST} bytes", shown(bytes(self._memory[: min(size, 60)]))
            raise ServiceError("a message", rule, got, "speak the protocol of gpu_adam/service/README.md")
        return message


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors, which came with a message."""
    for descriptor in descriptors:
        os.close(descriptor)


def refusal(error: Exception) -> dict[str, Any]:
    """The answer that makes a client raise this error; for one that nobody has foreseen a ServiceError, and a log."""
    if isinstance(error, OSError):
        error = ServiceError("the service", "must be able to use its files", error, "see to its directories and limits")
    elif not isinstance(error, GpuAdamError):
        _log.error("a call of a client failed", exc_info=error)
        got, remedy = f"{type(error).__name__}: {error}", "look into the service's log"
        error = ServiceError("the service", "must not fail", got, remedy)
    kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERROR_CLASSES)
    parts = [error.argument, error.rule, str(error.got), error.remedy]
    return {"error": [kind, *(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..." for text in parts)]}


def raise_refusal(answer: dict[str, Any]) -> None:
    """Raise the error that an answer stands for, if it does."""
    if "error" in answer:
        kind, argument, rule, got, remedy = answer["error"]
        raise _ERROR_CLASSES[kind](argument, rule, got, remedy)


class Fields:
    """A message's fields, each checked when it is taken.

    Args:
        message: what came.
        where: what the message is, for errors.
    """

    def __init__(self, message: Any, where: str) -> None:
        if not isinstance(message, dict):
            raise ArgumentTypeError(where, "must be a table", shown(message), "pass names with values")
        self._message, self._where = message, where

    def text(self, name: str) -> str:
        """A text."""
        value = self._message.get(name)
        if not isinstance(value, str):
            raise self._wrong(name, "must be a text", value)
        return value

    def whole(self, name: str, most: int, default: int | None = None) -> int:
        """A whole number in [0, most]."""
        value: Any = self._message.get(name, default)
        if not is_whole(value):
            raise self._wrong(name, "must be a whole number", value)
        if not 0 <= value <= most:
            rule = f"must lie in [0, {most}]"
            raise ArgumentValueError(f"{self._where}'s {name}", rule, shown(value), "choose one in this range")
        return int(value)

    def items(self, name: str) -> list[Any]:
        """A list."""
        value = self._message.get(name)
        if not isinstance(value, list):
            raise self._wrong(name, "must be a list", value)
        return value

    def get(self, name: str) -> Any:
        """Anything, or None."""
        return self._message.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self._message

    def _wrong(self, name: str, rule: str, value: Any) -> ArgumentTypeError:
        return ArgumentTypeError(f"{self._where}'s {name}", rule, shown(value), "see gpu_adam/service/README.md")
