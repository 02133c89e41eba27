"""The process that owns the device: one thread takes clients' messages one after the other and makes the steps.

The thread waits for its sockets, for the time of a step that is due, and for calls of other threads (`Server.call`), as
those of the control plane. It never waits for a client: one that does not take what it is to get is disconnected.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import re
import secrets
import select
import socket
import stat
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gpu_adam.devices import Array, Device
from gpu_adam.devices.base import SharedMemory
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, ServiceError
from gpu_adam.rules import shown
from gpu_adam.service.config import ServiceConfig
from gpu_adam.service.layout import place_in
from gpu_adam.service.messages import (
    VERSION,
    ConnectionLostError,
    Fields,
    Receiver,
    refusal,
    send,
)
from gpu_adam.service.policies import Push
from gpu_adam.service.served import ServedOptimizer
from gpu_adam.step.guard import checked_scale
from gpu_adam.variables import IndexedSlices, Variable

_log = logging.getLogger("gpu_adam")

MOST_REGIONS = MOST_BINDINGS = 64
"""Of one client."""

_PATH_BYTES = 107  # of a Unix socket's name
_NAME = re.compile(r"[\w.:-]{1,64}")
_UCRED = struct.Struct("3i")  # process, user, group
_BACKLOG = 128
_Result = TypeVar("_Result")


class _Binding(NamedTuple):
    """Gradients in a client's region.

    Attributes:
        optimizer: whose.
        pairs: (gradient, variable) pairs.
        region: where they are.
    """

    optimizer: ServedOptimizer
    pairs: list[tuple[Any, Variable]]
    region: int


class _Connection:
    """A client, and what it has: regions, bindings, an event."""

    def __init__(self, connection: socket.socket, device: Device) -> None:
        self.socket, self.name, self.is_known = connection, "", False
        _, self.user, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        self.device = device
        self.ready = device.share_event()
        self.regions: dict[int, SharedMemory] = {}
        self.bindings: dict[int, _Binding] = {}
        self.attached: set[str] = set()  # names of optimizers
        self.numbers = itertools.count(1)
        self.is_waiting = self.is_muted = False  # for the answer to a push, and unheard until then

    @property
    def used(self) -> int:
        """Bytes of its regions."""
        return sum(int(region.handle["bytes"]) for region in self.regions.values())

    def memory(self, number: int) -> Array:
        """The memory of a region, which must be this client's own."""
        if number not in self.regions:
            remedy = "ask for a region first"
            raise ArgumentValueError("the region", "must be one of this client's own", number, remedy)
        return self.regions[number].array

    def close(self) -> None:
        self.socket.close()
        self.bindings.clear()
        for region in self.regions.values():
            region.close()
        self.regions.clear()
        self.ready.close()


class Server:
    """A service of optimizers.

    Args:
        config: what it owns.
        path: of its socket, which only this user may use.
        resume: whether optimizers continue from their newest checkpoints.
        allow_users: numbers of users besides this one whose clients are taken.
        most_clients: at once.

    Attributes:
        path, optimizers, device: as above.
        is_draining: whether it takes no clients and no gradients any more.

    Raises:
        ArgumentValueError: another service answers at the path, or something else is there.
        And as `ServedOptimizer`.
    """

    def __init__(
        self,
        config: ServiceConfig,
        path: Path,
        *,
        resume: bool = False,
        allow_users: Sequence[int] = (),
        most_clients: int = 256,
    ) -> None:
        self.path, self.device, self.is_draining = path, config.device, False
        self._listener = _bound(path, is_open=bool(allow_users))
        self._own_file = os.stat(path).st_ino
        self._users = {os.getuid(), *allow_users}
        self._most_clients, self._client_memory = most_clients, config.client_memory
        self._identity = secrets.token_hex(8)
        self._connections: dict[int, _Connection] = {}
        self._numbers = itertools.count(1)
        self._calls: deque[Callable[[], None]] = deque()
        self._waker, self._woken = socket.socketpair()
        self._poll, self._receiver = select.epoll(), Receiver()
        try:
            with self.device.activate():
                self.optimizers = {
                    name: ServedOptimizer(name, each, config.device, resume=resume)
                    for name, each in config.optimizers.items()
                }
        except BaseException:
            self.close()
            raise
        for end in (self._waker, self._woken, self._listener):
            end.setblocking(False)
        for end in (self._woken, self._listener):
            self._poll.register(end.fileno(), select.EPOLLIN)
        self._operations: dict[str, Callable[[_Connection, Fields], tuple[dict[str, Any], Sequence[int]] | None]] = {
            "hello": self._hello,
            "attach": self._attach,
            "region": self._region,
            "free": self._free,
            "bind": self._bind,
            "unbind": self._unbind,
            "push": self._push,
            "read": self._read,
            "get": self._get,
            "set": self._set,
            "config": self._config,
            "describe": self._describe,
            "check": self._check,
            "save": self._save,
            "pause": self._pause,
            "resume": self._resume,
        }

    # The loop.

    @property
    def clients(self) -> list[str]:
        """The names of those who are connected."""
        return sorted(client.name for client in self._connections.values() if client.is_known)

    def clients_of(self, optimizer: str) -> list[str]:
        """The names of those who use an optimizer."""
        return sorted(client.name for client in self._connections.values() if optimizer in client.attached)

    @property
    def client_bytes(self) -> int:
        """How much memory clients have, all together."""
        return sum(client.used for client in self._connections.values())

    @property
    def wake_descriptor(self) -> int:
        """A descriptor that wakes the loop when something is written to it, for `signal.set_wakeup_fd`."""
        return self._waker.fileno()

    def call(self, function: Callable[[], _Result]) -> Future[_Result]:
        """Have the loop's thread call a function, between two messages."""
        future: Future[_Result] = Future()

        def made() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:  # whatever it is, it is the caller's
                    future.set_exception(error)

        self._calls.append(made)
        with contextlib.suppress(BlockingIOError):  # then it is going to wake up as it is
            self._waker.send(b".")
        return future

    def run(self, is_over: Callable[[], bool]) -> None:
        """Serve until told otherwise; then finish: no new clients, the steps that were promised, checkpoints.

        Args:
            is_over: asked after each message and each time that the loop was woken.
        """
        with self.device.activate():
            while not is_over():
                for descriptor, events in self._poll.poll(self._seconds()):
                    self._serve(descriptor, events)
                for optimizer in self.optimizers.values():
                    if optimizer.deadline is not None and time.monotonic() >= optimizer.deadline:
                        optimizer.tick()
            self.is_draining = True
            self._forget_socket()
            for optimizer in self.optimizers.values():
                optimizer.finish()
            self._make_calls()

    def close(self) -> None:
        """Give everything back."""
        self._forget_socket()
        for connection in list(self._connections.values()):
            self._drop(connection)
        for optimizer in getattr(self, "optimizers", {}).values():
            optimizer.close()
        for end in (self._waker, self._woken, self._poll):
            end.close()

    def _seconds(self) -> float | None:
        deadlines = [optimizer.deadline for optimizer in self.optimizers.values() if optimizer.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _serve(self, descriptor: int, events: int) -> None:
        if descriptor == self._listener.fileno():
            self._accept()
        elif descriptor == self._woken.fileno():
            with contextlib.suppress(BlockingIOError):
                self._woken.recv(4096)
            self._make_calls()
        elif (connection := self._connections.get(descriptor)) is not None:
            if events & select.EPOLLIN and not connection.is_waiting:
                self._take_message(connection)
            elif events & (select.EPOLLHUP | select.EPOLLERR):
                self._drop(connection)

    def _make_calls(self) -> None:
        while self._calls:
            self._calls.popleft()()

    def _accept(self) -> None:
        try:
            end, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no descriptors are left, say
            _log.warning("a client could not be accepted: %s", error)
            time.sleep(0.01)
            return
        end.setblocking(False)
        try:
            connection = _Connection(end, self.device)
        except Exception as error:  # the device has no events left, say
            _log.warning("a client could not be accepted: %s", error)
            with contextlib.suppress(ConnectionLostError, BlockingIOError):
                send(end, refusal(error))
            end.close()
            return
        refused = None
        if connection.user not in self._users:
            rule, remedy = "must be this service's, or one of --allow-uid", "ask who runs the service"
            refused = ServiceError("the user", rule, connection.user, remedy)
        elif len(self._connections) >= self._most_clients:
            rule, remedy = f"must be at most {self._most_clients} at once", "close others, or raise --max-clients"
            refused = ServiceError("the clients", rule, "one more", remedy)
        if refused is not None:
            with contextlib.suppress(ConnectionLostError, BlockingIOError):
                send(end, refusal(refused))
            connection.close()
            return
        self._connections[end.fileno()] = connection
        self._poll.register(end.fileno(), select.EPOLLIN)

    def _take_message(self, connection: _Connection) -> None:
        try:
            answer = self._answered(connection)
        except (ConnectionLostError, BlockingIOError):
            self._drop(connection)
            return
        if answer is not None:
            self._send(connection, *answer)

    def _answered(self, connection: _Connection) -> tuple[dict[str, Any], Sequence[int]] | None:
        try:
            fields = Fields(self._receiver.receive(connection.socket), "the message")
            operation = self._operations.get(name := fields.text("op"))
            if operation is None:
                rule, remedy = f"must be one of {', '.join(self._operations)}", "use a client of this version"
                raise ArgumentValueError("the message's op", rule, shown(name), remedy)
            if not connection.is_known and name != "hello":
                rule, remedy = "must be hello", "say hello first"
                raise ServiceError("the first message of a client", rule, shown(name), remedy)
            return operation(connection, fields)
        except (ConnectionLostError, BlockingIOError):
            raise
        except Exception as error:  # whatever it is, it is this client's, and the service goes on
            return refusal(error), ()

    def _send(self, connection: _Connection, answer: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send an answer, or drop a client that does not read its answers."""
        try:
            send(connection.socket, answer, descriptors)
        except (ConnectionLostError, BlockingIOError):
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        """Forget a client, with what it wrote and nobody has used."""
        descriptor = connection.socket.fileno()
        if self._connections.get(descriptor) is not connection:
            return
        self._poll.unregister(descriptor)
        del self._connections[descriptor]
        connection.close()
        for optimizer in self.optimizers.values():
            optimizer.lose(connection.name)

    def _forget_socket(self) -> None:
        self._listener.close()  # which the poll forgets by itself
        with contextlib.suppress(OSError):
            if os.stat(self.path).st_ino == self._own_file:
                os.unlink(self.path)

    # The operations.

    def _hello(self, connection: _Connection, fields: Fields) -> tuple[dict[str, Any], Sequence[int]]:
        if fields.get("version") != VERSION:
            got, remedy = shown(fields.get("version")), "install the same version of gpu_adam at both ends"
            raise ServiceError("the protocol's version", f"must be {VERSION}", got, remedy)
        if connection.is_known:
            raise ServiceError("a client", "must say hello once", "again", "connect again")
        if "name" in fields:
            name = fields.text("name")
            if _NAME.fullmatch(name) is None:
                rule = "must be 1 to 64 letters, digits and signs of . : - _"
                raise ArgumentValueError("the client's name", rule, shown(name), "choose another one")
            if any(other.name == name for other in self._connections.values() if other is not connection):
                rule, remedy = "must not be that of another client", "choose another one"
                raise ArgumentValueError("the client's name", rule, repr(name), remedy)
            connection.name = name
        else:  # a client of an earlier service may have come back with the name that it got there
            names = {other.name for other in self._connections.values()}
            connection.name = next(name for name in map("client-{:06}".format, self._numbers) if name not in names)
        connection.is_known = True
        device, ready = connection.device.identity, connection.ready.handle
        answer = {"version": VERSION, "server": self._identity, "name": connection.name, "device": device}
        return {**answer, "ready": ready, "optimizers": list(self.optimizers)}, ()

    def _attach(self, connection: _Connection, fields: Fields) -> tuple[dict[str, Any], Sequence[int]]:
        served = self._optimizer(fields)
        connection.attached.add(served.name)
        memories = [served.layout, served.status, served.parameters]
        answer = {"memories": [memory.handle for memory in memories], "done": served.done.handle}
        descriptors = [memory.descriptor for memory in memories if memory.descriptor >= 0]
        return {**answer, "policy": served.policy.text}, descriptors

    def _region(self, connection: _Connection, fields: Fields) -> tuple[dict[str, Any], Sequence[int]] | None:
        most = self._client_memory
        nbytes = fields.whole("bytes", most)
        if connection.used + nbytes > most or len(connection.regions) == MOST_REGIONS:
            rule = f"must take at most {most} bytes together, and be at most {MOST_REGIONS}"
            got = f"{connection.used + nbytes} bytes, {len(connection.regions) + 1} regions"
            raise ServiceError("the regions of a client", rule, got, "free others, or raise client_memory")
        region = self.device.share_memory(nbytes, read_only=False)
        number = next(connection.numbers)
        connection.regions[number] = region
        descriptors = [region.descriptor] if region.descriptor >= 0 else []
        self._send(connection, {"region": number, "memory": region.handle}, descriptors)
        if descriptors and region.descriptor >= 0:  # the mapping stays; so a client costs one descriptor
            os.close(region.descriptor)
            region.descriptor = -1
        return None

    def _free(self, connection: _Connection, fields: Fields) -> tuple[dict[str, Any], Sequence[int]]:
        number = fields.whole("region", 2**53)
        connection.memory(number)
        for key in [key for key, binding in connection.bindings.items() if binding.region == number]:
            del connection.bindings[key]
        connection.regions.pop(number).close()
        return {}, ()

    def _bind(self, connection: _Connection, fields: Fields) -> tuple[dict[str, Any], Sequence[int]]:
        before: list[tuple[Any, Variable]] = []
        if "binding" in fields:  # of more gradients than fit into a message
            before, number = self._binding(connection, fields).pairs, fields.whole("binding", 2**53)
        elif len(connection.bindings) == MOST_BINDINGS:
            rule, remedy = f"must be at most {MOST_BINDINGS}", "unbind others"
            raise ServiceError("the bindings of a client", rule, MOST_BINDINGS + 1, remedy)
        else:
            number = next(connection.numbers)
        connection.bindings[number] = self._bound_gradients(connection, fields, before)
        return {"binding": number}, ()

    def _unbind(self, connection: _Connection, fields: Fields) -> tuple[dict[str, Any], Sequence[int]]:
        self._binding(connection, fields)
        del connection.bindings[fields.whole("binding", 2**53)]
        return {}, ()

    def _push(self, connection: _Connection, fields: Fields) -> None:
        if "binding" in fields:
            binding = self._binding(connection, fields)
        else:
            binding = self._bound_gradients(connection, fields)
        scale = fields.get("scale")
        push = Push(
            client=connection.name,
            pairs=binding.pairs,
            scale=None if scale is None else float(checked_scale(scale)),
            read=fields.whole("read", 2**63) if "read" in fields else None,
            loss=_loss(fields.get("loss")),
            ready=connection.ready.wait,
            answer=functools.partial(self._answer_push, connection),
        )
        connection.is_waiting, descriptor = True, connection.socket.fileno()
        binding.optimizer.push(push)
        if connection.is_waiting and descriptor in self._connections:
            self._poll.modify(descriptor, 0)  # until the answer, only its end is of interest
            connection.is_muted = True

    def _answer_push(self, connection: _Connection, answer: dict[str, Any]) -> None:
        descriptor = connection.socket.fileno()
        if self._connections.get(descriptor) is connection:
            connection.is_waiting = False
            if connection.is_muted:
                connection.is_muted = False
                self._poll.modify(descriptor, select.EPOLLIN)
            self._send(connection, answer)

    def _read(self, connection: _Connection, fields: Fields) -> tuple[dict[str, Any], Sequence[int]]:
        served = self._optimizer(fields)
        memory = connection.memory(fields.whole("region", 2**53))
        offset = fields.whole("offset", 2**62, 0)
        if offset % 16 or offset + served.nbytes > memory.size:
            rule = f"must begin at a multiple of 16 and have {served.nbytes} bytes of its region"
            raise ArgumentValueError("the message's offset", rule, offset, "ask for a larger region")
        connection.ready.wait()
        return {"step": served.copy_to(memory, offset)}, ()

    def _get(self, connection: _Connection, fields: Fields) -> tuple[dict[str, Any], Sequence[int]]:
        return {"value": self._optimizer(fields).get(fields.text("name"))}, ()

    def _set(self, connection: _Connection, fields: Fields) -> tuple[dict[str, Any], Sequence[int]]:
        self._optimizer(fields).set(fields.text("name"), fields.get("value"))
        return {}, ()

    def _config(self, connection: _Connection, fields: Fields) -> tuple[dict[str, Any], Sequence[int]]:
        return {"config": self._optimizer(fields).adam.get_config()}, ()

    def _describe(self, connection: _Connection, fields: Fields) -> tuple[dict[str, Any], Sequence[int]]:
        return {**self._optimizer(fields).description(), "clients": self.clients}, ()

    def _check(self, connection: _Connection, fields: Fields) -> tuple[dict[str, Any], Sequence[int]]:
        self._optimizer(fields).check()
        return {}, ()

    def _save(self, connection: _Connection, fields: Fields) -> tuple[dict[str, Any], Sequence[int]]:
        return {"path": str(self._optimizer(fields).save())}, ()

    def _pause(self, connection: _Connection, fields: Fields) -> tuple[dict[str, Any], Sequence[int]]:
        self._optimizer(fields).pause()
        return {}, ()

    def _resume(self, connection: _Connection, fields: Fields) -> tuple[dict[str, Any], Sequence[int]]:
        self._optimizer(fields).resume()
        return {}, ()

    def _optimizer(self, fields: Fields) -> ServedOptimizer:
        name = fields.text("optimizer")
        if name not in self.optimizers:
            rule = f"must be one of {', '.join(self.optimizers)}"
            raise ArgumentValueError("the optimizer", rule, shown(name), "pass one of them")
        return self.optimizers[name]

    def _binding(self, connection: _Connection, fields: Fields) -> _Binding:
        number = fields.whole("binding", 2**53)
        if number not in connection.bindings:
            raise ArgumentValueError("the binding", "must be one of this client's own", number, "bind first")
        return connection.bindings[number]

    def _bound_gradients(
        self, connection: _Connection, fields: Fields, before: Sequence[tuple[Any, Variable]] | None = None
    ) -> _Binding:
        """The gradients that a message names, after those before it, checked as a step does it.

        Without any `before` they are for this message alone, and may be rows.

        Indices of rows are copied before they are looked at: what lies in the client's memory, the client can change
        after the check.
        """
        served = self._optimizer(fields)
        number = fields.whole("region", 2**53)
        memory = connection.memory(number)
        pairs: list[tuple[Any, Variable]] = list(before or ())
        for entry in fields.items("gradients"):
            gradient = Fields(entry, "a gradient")
            name = gradient.text("variable")
            if name not in served.variables:
                rule = f"must be one of {', '.join(itertools.islice(served.variables, 20))}"
                raise ArgumentValueError("the variable", rule, shown(name), "pass one of the optimizer's")
            argument = f"gradient of variable {name!r}"
            values = place_in(memory.size, gradient.get("values"), argument).view(memory)
            if "indices" in gradient:
                if before is not None:
                    rule, remedy = "must be pushed without a binding", "name them in the push"
                    raise ArgumentValueError(f"{argument}, of rows,", rule, "a binding", remedy)
                connection.ready.wait()
                indices = place_in(memory.size, gradient.get("indices"), f"{argument}: its indices").view(memory)
                values = IndexedSlices(values, self.device.array(indices))
            pairs.append((values, served.variables[name]))
        served.adam.check_gradients(pairs)
        return _Binding(served, pairs, number)


def _loss(given: Any) -> float | None:
    if given is None:
        return None
    if not isinstance(given, (int, float)) or isinstance(given, bool):
        raise ArgumentTypeError("the loss", "must be a number", shown(given), "pass a float, or leave it out")
    with contextlib.suppress(OverflowError):
        return float(given)
    return float(np.inf)


def _bound(path: Path, *, is_open: bool) -> socket.socket:
    """A socket at a path, for this user alone from its first moment on; or for all, whom the server then checks."""
    name = os.fsencode(path)
    if len(name) > _PATH_BYTES:
        rule = f"must have at most {_PATH_BYTES} bytes, as a socket's name"
        raise ArgumentValueError("--socket", rule, f"{len(name)} bytes: {path}", "choose a shorter path")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    before = os.umask(0o111 if is_open else 0o177)
    try:
        _make_way(path)
        listener.bind(name)
        listener.listen(_BACKLOG)  # from now on another service finds this one; clients wait until it serves
    except OSError as error:
        listener.close()
        raise ArgumentValueError(
            "--socket", "must be a path where a socket can be made", error, "choose another"
        ) from error
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


def _make_way(path: Path) -> None:
    """Remove the socket of a service that was killed.

    Raises:
        ArgumentValueError: the service answers, or it is no socket that is there.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ArgumentValueError(
            "--socket", "must be free, or an old socket's", f"another file: {path}", "choose another"
        )
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with probe:
        try:
            probe.connect(os.fsencode(path))
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise ArgumentValueError(
        "--socket", "must be free", f"another service answers at {path}", "end it, or choose another"
    )
