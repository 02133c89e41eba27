"""A client of a service: one connection, which is made anew where the service is started again."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gpu_adam.devices import Device, find_device
from gpu_adam.errors import ArgumentValueError, ServiceError
from gpu_adam.rules import FINITE_NOT_NEGATIVE, real_number
from gpu_adam.service.messages import (
    VERSION,
    ConnectionLostError,
    Receiver,
    close_all,
    raise_refusal,
    send,
)
from gpu_adam.service.paths import default_socket
from gpu_adam.service.remote_optimizer import RemoteOptimizer

_PATIENCE = FINITE_NOT_NEGATIVE._replace(remedy="pass the seconds to wait")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5  # seconds between two tries to connect
_LEAST_SECONDS = 0.05  # for a service that is there to say hello
_NOT_THERE = (FileNotFoundError, ConnectionRefusedError, ConnectionResetError, BlockingIOError, TimeoutError)
_Result = TypeVar("_Result")


def connect(path: str | os.PathLike[str] | None = None, name: str | None = None, patience: float = 10.0) -> Client:
    """Connect to a service.

    Args:
        path: of its socket; by default the one that `gpu-adam serve` takes by default.
        name: of this client, which no other one has: the gradients of several clients are added in the order of their
            names. By default the service makes one, in the order in which clients come.
        patience: seconds >= 0 to wait for a service that is not there yet, or is started again.

    Raises:
        ServiceError: no service answers, or one of another version; or it refuses this client.
    """
    _PATIENCE.check("patience", real_number("patience", patience))
    return Client(Path(default_socket() if path is None else path), name, patience)


class Client:
    """A connection to a service.

    Several threads may read and ask, and wait for each other; one at a time may push.

    Args:
        path, name, patience: see `connect`.

    Attributes:
        path: as above.
        name: the one that was given, or that the service has made; a service that is started again makes another one.
        optimizers: the names of the service's optimizers.
        device: where variables and gradients lie.
    """

    device: Device
    name: str

    def __init__(self, path: Path, name: str | None, patience: float) -> None:
        self.path, self._given_name, self._patience = path, name, patience
        self._lock, self._receiver = threading.RLock(), Receiver()
        self._closed = threading.Event()
        self._process = os.getpid()
        self._socket: socket.socket | None = None
        self._opened: dict[str, RemoteOptimizer] = {}
        self.optimizers: list[str] = []
        self._connections = 0  # how many there were; who keeps what belongs to one notes its number
        self._connect(patience)
        _clients.add(self)

    def optimizer(self, name: str) -> RemoteOptimizer:
        """One of the service's optimizers.

        Raises:
            ArgumentValueError: there is none of that name.
            ServiceError: the service is gone.
        """
        with self._lock:
            if name not in self._opened:
                self._opened[name] = self._insist(lambda: RemoteOptimizer(self, name))
            return self._opened[name]

    def close(self) -> None:
        """End the connection. The service forgets what this client wrote and nobody has used.

        A call in another thread that waits for the service raises a ServiceError.
        """
        self._closed.set()
        if not self._lock.acquire(blocking=False):
            waiting = self._socket
            if waiting is not None:
                with contextlib.suppress(OSError):
                    waiting.shutdown(socket.SHUT_RDWR)
            self._lock.acquire()
        try:
            self._disconnect()
        finally:
            self._lock.release()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<gpu_adam client {self.name!r} of the service at {self.path}>"

    def _request(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a message, which is sent again where the service was started again meanwhile."""
        return self._insist(lambda: self._exchange(message)[0])

    def _insist(self, function: Callable[[], _Result]) -> _Result:
        """What a function returns, which is called again over a new connection where it loses the old one."""
        while True:
            try:
                return function()
            except ConnectionLostError:
                self._connect(self._patience)

    def _exchange(self, message: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """The answer to a message, with its descriptors, over this connection.

        Raises:
            ConnectionLostError: the connection has ended.
            What the service raised.
        """
        with self._lock:
            self._check_usable()
            if self._socket is None:
                raise ConnectionLostError
            try:
                send(self._socket, message)
                answer, descriptors = self._receiver.receive_with_descriptors(self._socket)
            except ArgumentValueError:  # nothing was sent
                raise
            except BaseException:  # also Ctrl-C: the answer to this message must not become the next one's
                self._disconnect()
                raise
        try:
            raise_refusal(answer)
        except BaseException:
            close_all(descriptors)
            raise
        return answer, descriptors

    def _check_usable(self) -> None:
        if self._closed.is_set():
            raise ServiceError("the client", "must be open", "it was closed", "connect again")
        if os.getpid() != self._process:
            rule, remedy = "must be used by the process that connected", "connect in each process"
            raise ServiceError("the client", rule, "a copy in a child process", remedy)

    def _look(self) -> None:
        """Notice that the service is gone, and connect to the one that has taken its place, if it is there already.

        Who only reads sends no messages, and would go on reading what nobody writes to any more.
        """
        if self._closed.is_set() or os.getpid() != self._process or not self._lock.acquire(blocking=False):
            return  # or another thread waits for an answer, and is going to notice
        try:
            if self._socket is not None:
                with contextlib.suppress(BlockingIOError):
                    self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                    self._disconnect()  # it is at its end
        except OSError:
            self._disconnect()
        finally:
            self._lock.release()
        if self._socket is None:
            with contextlib.suppress(ServiceError):
                self._connect(0)

    def _connect(self, patience: float) -> None:
        """Connect anew, within so many seconds; one try at least."""
        end, pause = time.monotonic() + patience, _FIRST_PAUSE
        with self._lock:
            while True:
                self._check_usable()
                self._disconnect()
                try:
                    return self._say_hello(max(_LEAST_SECONDS, end - time.monotonic()))
                except (ConnectionLostError, *_NOT_THERE) as error:
                    if time.monotonic() + pause > end:
                        rule, remedy = f"must answer within {patience:g} s", "start it: gpu-adam serve --config FILE"
                        raise ServiceError(f"the service at {self.path}", rule, _reason(error), remedy) from None
                except OSError as error:
                    remedy = "check the path, and who may use it"
                    raise ServiceError(f"the service at {self.path}", "must be reachable", error, remedy) from None
                self._closed.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _say_hello(self, seconds: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._socket.settimeout(seconds)
        try:
            self._socket.connect(os.fsencode(self.path))
            name = {} if self._given_name is None else {"name": self._given_name}
            answer, _ = self._exchange({"op": "hello", "version": VERSION, **name})
            self.device = _device_of(answer["device"])
            self._ready = self.device.map_event(answer["ready"])
            self.name, self.optimizers = answer["name"], answer["optimizers"]
            self._socket.settimeout(None)
        except BaseException:
            self._disconnect()
            raise
        self._connections += 1

    def _tell(self) -> None:
        """Let `ready` stand for what is enqueued on the current stream too, besides what it has stood for."""
        with self._lock:
            self._ready.wait()
            self._ready.record()

    def _disconnect(self) -> None:
        """End this connection; what is mapped of it for writing goes first, before the service frees it."""
        for optimizer in self._opened.values():
            optimizer._forget_regions()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _leave_to_parent(self) -> None:
        """Give up the copy of the connection in a child process, which would keep it open after the parent's end."""
        self._lock = threading.RLock()  # another thread of the parent may have held the old one
        if self._socket is not None:
            self._socket.close()
            self._socket = None


_clients = weakref.WeakSet[Client]()


def _leave_all_to_parent() -> None:
    for client in _clients:
        client._leave_to_parent()


os.register_at_fork(after_in_child=_leave_all_to_parent)


def _device_of(identity: str) -> Device:
    """This process's device that has an identity: devices may have other numbers here."""
    if identity == "host":
        return find_device("host")
    device = find_device("cuda")
    for index in range(device.xp.cuda.runtime.getDeviceCount()):
        found = find_device(f"cuda:{index}")
        if found.identity == identity:
            return found
    raise ServiceError("the service's device", "must be visible here", identity, "see CUDA_VISIBLE_DEVICES")


def _reason(error: Exception) -> str:
    return "the connection ended" if isinstance(error, ConnectionLostError) else str(error)
