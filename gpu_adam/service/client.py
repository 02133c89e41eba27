"""A client of a service: variables that read like local ones, and steps by gradients in shared memory."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from gpu_adam import schedules
from gpu_adam.devices import Array, Device, find_device
from gpu_adam.devices.base import SharedMemory
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, ServiceError
from gpu_adam.rules import shown
from gpu_adam.schedules import LearningRateSchedule
from gpu_adam.service.layout import LINE, Place, placed
from gpu_adam.service.messages import (
    VERSION,
    ConnectionLostError,
    Receiver,
    raise_refusal,
    send,
)
from gpu_adam.service.paths import default_socket
from gpu_adam.service.sequence import StepSequence
from gpu_adam.step.gradients import dtype_read, on_device
from gpu_adam.step.request import checked_pair, listed, without_gradient
from gpu_adam.variables import IndexedSlices, Variable

_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.5  # seconds between two tries to connect
_READ_SECONDS = 0.05  # how long a reader tries by itself, before the server copies for it
_BINDINGS_KEPT = 16
_PARTS_AT_ONCE = 500  # gradients that are bound by one message
_Result = TypeVar("_Result")
_CLIPS = ("clipvalue", "clipnorm", "global_clipnorm")


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
    return Client(Path(default_socket() if path is None else path), name, patience)


class Client:
    """A connection to a service.

    It is to be used by one thread at a time: where one waits for the service, others wait for it, but for `close`.

    Args:
        path, name, patience: see `connect`.

    Attributes:
        path, name: as above.
        optimizers: the names of the service's optimizers.
        device: where variables and gradients lie.
    """

    device: Device

    def __init__(self, path: Path, name: str | None, patience: float) -> None:
        self.path, self.name, self._patience = path, name, patience
        self._lock, self._receiver = threading.RLock(), Receiver()
        self._process = os.getpid()
        self._socket: socket.socket | None = None
        self._is_closed = False
        self._opened: dict[str, RemoteOptimizer] = {}
        self.optimizers: list[str] = []
        with self._lock:
            self._connect()

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
        self._is_closed = True
        if not self._lock.acquire(blocking=False):
            waiting = self._socket
            if waiting is not None:
                with contextlib.suppress(OSError):
                    waiting.shutdown(socket.SHUT_RDWR)
            self._lock.acquire()
        try:
            for optimizer in self._opened.values():
                optimizer._forget()  # before the service hears of the end, and frees what is mapped
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
        """What a function returns, which is called again after a new connection where it loses the old one."""
        while True:
            try:
                return function()
            except ConnectionLostError:
                self._reconnect()

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
            _close(descriptors)
            raise
        return answer, descriptors

    def _check_usable(self) -> None:
        if self._is_closed:
            raise ServiceError("the client", "must be open", "it was closed", "connect again")
        if os.getpid() != self._process:
            rule, remedy = "must be used by the process that connected", "connect in each process"
            raise ServiceError("the client", rule, "a copy in a child process", remedy)

    def _reconnect(self) -> None:
        """Connect again, and map anew what optimizers have of the service's memory."""
        with self._lock:
            while True:
                self._check_usable()
                for optimizer in self._opened.values():
                    optimizer._forget()
                self._disconnect()
                self._connect()
                try:
                    for optimizer in self._opened.values():
                        optimizer._attach()
                    return
                except ConnectionLostError:
                    continue

    def _connect(self) -> None:
        end, pause = time.monotonic() + self._patience, _FIRST_PAUSE
        while True:
            try:
                self._say_hello()
                return
            except (ConnectionLostError, OSError) as error:
                self._disconnect()
                if time.monotonic() + pause > end:
                    rule, remedy = f"must answer within {self._patience:g} s", "start it: gpu-adam serve --config FILE"
                    raise ServiceError(f"the service at {self.path}", rule, _reason(error), remedy) from None
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            except BaseException:
                self._disconnect()
                raise

    def _say_hello(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._socket.connect(os.fsencode(self.path))
        hello = {"op": "hello", "version": VERSION, **({} if self.name is None else {"name": self.name})}
        answer, _ = self._exchange(hello)
        self.name, self.optimizers = answer["name"], answer["optimizers"]
        self.device = _device_of(answer["device"])
        self.ready = self.device.map_event(answer["ready"])

    def _tell(self) -> None:
        """Let `ready` stand for what is enqueued on the current stream too, besides what it has stood for."""
        with self._lock:
            self.ready.wait()
            self.ready.record()

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class RemoteVariable(Variable):
    """A variable of a service. It reads like a local one, in expressions and losses too, and is changed by steps alone.

    What is read is whole: as it was between two steps. It is a copy, made anew after a step.
    """

    def __init__(self, optimizer: RemoteOptimizer, name: str, array: Array) -> None:
        self._optimizer = optimizer
        self._device, self._storage, self._name = optimizer._client.device, array, name
        self.trainable, self._constraint = True, None

    @property
    def live(self) -> Array:
        """The memory that the service updates, without a copy; read-only on the host.

        It is whole as long as no step is made: between the steps of a client that takes part in all of them, say. What
        is enqueued on the current stream from now on follows the last step.
        """
        self._optimizer._wait_for_steps()
        return self._storage

    @property
    def _value(self) -> Array:
        return self._optimizer._copy_of(self._name)

    def _check_updatable(self) -> None:
        rule, remedy = "must be updated by its service", "call apply_gradients of the client's optimizer"
        raise ServiceError(f"variable {self._name!r}", rule, "an optimizer of this process", remedy)

    def _change(self, operation: Callable[[Array], object]) -> None:
        rule, remedy = "must be changed by steps, for it is the service's", "push gradients, or assign to a copy"
        raise ServiceError(f"variable {self._name!r}", rule, "an assignment", remedy)


class Gradients(Mapping[str, Array]):
    """Memory for the gradients of some variables, by their names. What was asked for is pushed, and nothing else.

    An array's contents are undefined until they are written.

    Attributes:
        asked: the names that were asked for.
        loss: to be set to what the loss was, for those who look at the service.
    """

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays, self.asked, self.loss = arrays, set[str](), None

    loss: float | None

    def __getitem__(self, name: str) -> Array:
        array = self._arrays[name]
        self.asked.add(name)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


class _Part(NamedTuple):
    """A gradient in this client's memory: its variable's name, and the places of its values, and of indices of rows."""

    variable: str
    values: Place
    indices: Place | None

    def to_json(self) -> dict[str, Any]:
        rows = {} if self.indices is None else {"indices": self.indices.to_json()}
        return {"variable": self.variable, "values": self.values.to_json(), **rows}


class RemoteOptimizer:
    """An optimizer of a service.

    Its hyperparameters are attributes that are read from the service and assigned there: `learning_rate`, `beta_1`,
    `beta_2`, `epsilon`, `decay`, `weight_decay`, `l2`, `clipvalue`, `clipnorm`, `global_clipnorm`, `amsgrad`.

    Attributes:
        name: the service's.
        variables: `RemoteVariable` by name.
        policy: when pushes become steps: "on_push", "all_of=N" or "every=T".
        staleness: how many steps were made between this client's last look at the variables and the step that its last
            push became part of, that one not counted; None where that is not known.
    """

    name: str
    variables: dict[str, RemoteVariable]
    policy: str
    staleness: int | None
    _views: tuple[Array, dict[str, Array]] | None

    def __init__(self, client: Client, name: str) -> None:
        vars(self).update(name=name, variables={})
        self._client, self._frozen, self.staleness = client, False, None
        self._places: dict[str, Place] = {}
        self._attach()

    # Steps.

    def build(self, var_list: Iterable[Any]) -> None:
        """Nothing: the variables' slots are there since the service's start. For loops that know `Adam.build`.

        Raises:
            ArgumentValueError: what is no variable of this optimizer.
        """
        for number, variable in enumerate(var_list):
            self._own_variable(variable, f"var_list[{number}]")

    def apply_gradients(
        self, grads_and_vars: Iterable[Any], loss: float | None = None, grad_scale: float | None = None
    ) -> int | None:
        """Push gradients: copy them into shared memory, and wait until the service has taken them.

        Args:
            grads_and_vars: (gradient, variable) pairs, as for `Adam.apply_gradients`; the variables are those of
                `variables`.
            loss: what the loss was, for those who look at the service.
            grad_scale: what the gradients are to be divided by, > 0.

        Returns:
            The number of the step that the push became part of, or with "every=T" is going to be. With "all_of=N" the
            call waits for the others. None where the device may leave steps out.

        Raises:
            As `Adam.apply_gradients`; ServiceError: the service is gone, or a client is that had a part in the step.
        """
        pairs = []
        without = []
        for number, pair in enumerate(listed(grads_and_vars)):
            gradient, target = checked_pair(pair, number)
            variable = self._own_variable(target, f"grads_and_vars[{number}]")
            if gradient is None:
                without.append(variable.name)
            else:
                pairs.append((gradient, variable))
        if without and pairs:
            warnings.warn(without_gradient(without), UserWarning, stacklevel=2)
        arrays = self._arrays(pairs)
        places, nbytes = placed((array.shape, array.dtype.name) for array in arrays)

        def write() -> None:
            memory = self._region(nbytes)
            for array, place in zip(arrays, places, strict=True):
                place.view(memory)[...] = array

        left = iter(places)
        parts = [_Part(v.name, next(left), next(left) if isinstance(g, IndexedSlices) else None) for g, v in pairs]
        return self._push(tuple(parts), write, loss, grad_scale)

    @contextmanager
    def gradients(self, grad_scale: float | None = None) -> Iterator[Gradients]:
        """A block that writes gradients into shared memory; at its end they are pushed, without a copy.

        ::

            with main.gradients() as g:
                numpy.matmul(x.T, error, out=g["w"])
                g["b"][...] = error.sum(0)

        Pushed are the gradients that were asked for, in the order of the variables. Where the block raises, nothing is.

        Args:
            grad_scale: as for `apply_gradients`.
        """
        memory = self._region(self._nbytes)
        if self._views is None or self._views[0] is not memory:
            self._views = memory, {name: place.view(memory) for name, place in self._places.items()}
        given = Gradients(self._views[1])
        yield given
        parts = tuple([part for part in self._whole if part.variable in given.asked])
        self._push(parts, lambda: self._have_again(memory), given.loss, grad_scale)

    def minimize(self, loss: Callable[[], Any], var_list: Any, grad_loss: Any = None) -> int | None:
        """Differentiate a loss and push the gradients.

        The loss sees all variables as they were at one point between two steps. The service is told what it was, but
        on CUDA, where the host does not wait for it.

        Args:
            loss: a function without arguments, as for `Adam.minimize`.
            var_list: variables of this optimizer.
            grad_loss: multiplies the gradient.

        Returns:
            As `apply_gradients`.
        """
        with self.snapshot(), self._client.device.activate():
            value, pairs = importlib.import_module("gpu_adam.autodiff").gradients(loss, var_list, grad_loss)
        # On CUDA the host would have to wait for the loss.
        return self.apply_gradients(pairs, float(np.sum(value)) if self._client.device.xp is np else None)

    @contextmanager
    def snapshot(self) -> Iterator[int]:
        """A block in which all variables read as they were at one point between two steps; it gets the steps done."""
        self._frozen, step = True, self._copy(list(self.variables))
        try:
            yield step
        finally:
            self._frozen = False

    # What the service knows.

    @property
    def iterations(self) -> int:
        """The steps done."""
        return self._sequence.step

    def get_config(self) -> dict[str, Any]:
        """The optimizer's configuration, as `Adam.get_config`."""
        config: dict[str, Any] = self._request({"op": "config"})["config"]
        return config

    def describe(self) -> dict[str, Any]:
        """What the service says of the optimizer: its pace, losses, clients, and so on."""
        return self._request({"op": "describe"})

    def save(self) -> Path:
        """Have the service write a checkpoint; its path, once it is durable.

        Raises:
            ServiceError: the service's configuration has no checkpoints.
        """
        return Path(self._request({"op": "save"})["path"])

    def check_errors(self) -> None:
        """Have the service wait for its device, and raise what that could not say earlier.

        Raises:
            SparseIndexError: on CUDA, an index outside its variable that some client has pushed since the last check;
                such rows were left out.
        """
        self._request({"op": "check"})

    def pause(self) -> None:
        """Have the service make no steps: pushes wait."""
        self._request({"op": "pause"})

    def resume(self) -> None:
        """Have the service make steps again."""
        self._request({"op": "resume"})

    def __getattr__(self, name: str) -> Any:
        if name in _HYPERPARAMETERS:
            value = self._request({"op": "get", "name": name})["value"]
            return schedules.deserialize(value) if isinstance(value, dict) else value
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HYPERPARAMETERS:
            self._request({"op": "set", "name": name, "value": _as_json(name, value)})
        elif name.startswith("_") or name in ("staleness", "policy"):
            super().__setattr__(name, value)
        else:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r} that can be assigned")

    def __repr__(self) -> str:
        return f"<optimizer {self.name!r} of {self._client!r}>"

    # Memory.

    def _request(self, message: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self._client._request({**message, "optimizer": self.name})
        return answer

    def _attach(self) -> None:
        """Map the service's memory, and have nothing of an earlier connection."""
        client = self._client
        answer, descriptors = client._exchange({"op": "attach", "optimizer": self.name})
        try:
            host = find_device("host")
            memories = [host.map_memory(answer["memories"][number], descriptors[number]) for number in range(2)]
            layout, status = (memory.array for memory in memories)
            entries = json.loads(layout.tobytes())
            places = {name: Place(offset, tuple(shape), dtype) for name, offset, shape, dtype in entries}
            if self.variables and places != self._places:
                rule, remedy = "must have the variables that it had", "connect again"
                raise ServiceError(f"optimizer {self.name!r}", rule, "others, after a new start", remedy)
            descriptor = descriptors[2] if len(descriptors) > 2 else -1
            self._parameters = client.device.map_memory(answer["memories"][2], descriptor)
        finally:
            _close(descriptors)
        self._sequence, self._places = StepSequence(status), places
        self._nbytes = max((-(-(p.offset + p.nbytes) // LINE) * LINE for p in places.values()), default=0)
        self._done = client.device.map_event(answer["done"])
        self.policy = answer["policy"]
        for name, place in places.items():
            array = place.view(self._parameters.array)
            if name in self.variables:
                self.variables[name]._move_to(array)
            else:
                self.variables[name] = RemoteVariable(self, name, array)
        self._forget_copies()
        self._own: tuple[int, SharedMemory] | None = None  # the region, with its number
        self._copies_region: tuple[int, SharedMemory] | None = None
        self._whole = tuple([_Part(name, place, None) for name, place in places.items()])
        self._views = None
        self._bindings: dict[tuple[_Part, ...], int] = {}

    def _forget(self) -> None:
        """Give up what is mapped."""
        for _, memory in filter(None, (self._own, self._copies_region)):
            memory.close()
        self._own = self._copies_region = self._views = None

    def _new_region(self, nbytes: int) -> tuple[int, SharedMemory]:
        answer, descriptors = self._client._exchange({"op": "region", "bytes": nbytes})
        try:
            descriptor = descriptors[0] if descriptors else -1
            return answer["region"], self._client.device.map_memory(answer["memory"], descriptor)
        finally:
            _close(descriptors)

    def _region(self, nbytes: int) -> Array:
        """This client's memory for gradients, of so many bytes or more, which may be written to from now on."""
        if self._own is None or self._own[1].array.size < nbytes:
            self._client._insist(lambda: self._have_region(max(nbytes, self._nbytes)))
        assert self._own is not None
        self._wait_for_steps()
        return self._own[1].array

    def _have_region(self, nbytes: int) -> None:
        if self._own is not None:
            number, memory = self._own
            self._own, self._bindings, self._views = None, {}, None
            memory.close()
            self._client._exchange({"op": "free", "region": number})
        self._own = self._new_region(nbytes)

    def _have_again(self, written: Array) -> None:
        """Have what was written also after the service was started again, where the memory has outlived it."""
        memory = self._region(written.size)
        if memory is not written:
            if self._client.device.xp is not np:
                rule, remedy = "must stay until gradients are pushed", "compute them again"
                raise ServiceError("the service", rule, "it was started again", remedy)
            memory[: written.size] = written

    def _wait_for_steps(self) -> None:
        """Have the current stream follow what the service has enqueued."""
        with self._client.device.activate():
            self._done.wait()

    def _own_variable(self, target: Any, argument: str) -> RemoteVariable:
        variable = self.variables.get(getattr(target, "name", ""))
        if variable is None or variable is not target:
            rule, remedy = f"must have a variable of optimizer {self.name!r}", "pass one of its variables"
            raise ArgumentValueError(argument, rule, shown(target), remedy)
        return variable

    # Pushing.

    def _arrays(self, pairs: list[tuple[Any, RemoteVariable]]) -> list[Array]:
        """The arrays that gradients consist of, one after the other: of slices the values, then the indices."""
        arrays: list[Array] = []
        device = self._client.device
        for gradient, variable in pairs:
            argument = f"gradient of variable {variable.name!r}"
            dtype = dtype_read(gradient, variable)
            if isinstance(gradient, IndexedSlices):
                arrays.append(on_device(gradient.values, device, f"values of {argument}", dtype))
                arrays.append(on_device(gradient.indices, device, f"indices of {argument}", None))
            else:
                arrays.append(on_device(gradient, device, argument, dtype))
        return arrays

    def _push(
        self,
        parts: tuple[_Part, ...],
        write: Callable[[], object],
        loss: float | None,
        grad_scale: float | None,
    ) -> int | None:
        """Push what `write` writes, again where the service was started again before it had taken it."""
        client = self._client
        message: dict[str, Any] = {"op": "push"}
        if loss is not None:
            message["loss"] = float(loss)
        if grad_scale is not None:
            message["scale"] = float(grad_scale)
        if self._read_step is not None:
            message["read"] = self._read_step
        while True:
            with client.device.activate():
                write()
                client._tell()
            before, was_sent = self.iterations, False
            try:
                named = self._named(parts)
                was_sent = True
                answer, _ = client._exchange({**message, **named})
            except ConnectionLostError:
                client._reconnect()
                if was_sent and self.iterations > before:
                    rule, remedy = "must be known to be part of a step or not", "look at iterations, and go on"
                    got = f"the service was started again after it; {before} steps then, {self.iterations} now"
                    raise ServiceError("the push", rule, got, remedy) from None
            else:
                if "draining" not in answer:
                    self.staleness = answer["staleness"]
                    step: int | None = answer["step"]
                    return step
                client._reconnect()

    def _named(self, parts: tuple[_Part, ...]) -> dict[str, Any]:
        """How a push names its gradients: by a binding, which the service has checked, or one by one where rows are."""
        assert self._own is not None
        where = {"optimizer": self.name, "region": self._own[0]}
        if any(part.indices is not None for part in parts):
            return {**where, "gradients": [part.to_json() for part in parts]}
        exchange = self._client._exchange
        if parts not in self._bindings:
            if len(self._bindings) == _BINDINGS_KEPT:
                oldest = next(iter(self._bindings))
                exchange({"op": "unbind", "binding": self._bindings.pop(oldest)})
            more: dict[str, Any] = {}
            for start in range(0, max(1, len(parts)), _PARTS_AT_ONCE):
                some = [part.to_json() for part in parts[start : start + _PARTS_AT_ONCE]]
                answer, _ = exchange({"op": "bind", **where, "gradients": some, **more})
                more = {"binding": answer["binding"]}
            self._bindings[parts] = more["binding"]
        return {"binding": self._bindings[parts]}

    # Reading.

    def _forget_copies(self) -> None:
        self._copies: dict[str, tuple[Array, int]] = {}
        self._read_step: int | None = None

    def _copy_of(self, name: str) -> Array:
        """A whole copy of a variable, made anew where steps were made since the last one."""
        copy, step = self._copies.get(name, (None, None))
        if copy is None or not (self._frozen or step == self.iterations):
            self._copy([name])
            copy, _ = self._copies[name]
        return copy

    def _copy(self, names: list[str]) -> int:
        """Copy some variables, all of them as they were at the same point between two steps; the steps done by then."""
        arrays = {name: self.variables[name]._storage for name in names}
        found = None
        if self._client.device.xp is np:
            found = self._sequence.whole(lambda: {n: array.copy() for n, array in arrays.items()}, _READ_SECONDS)
        copies, step = self._copied_by_server(names) if found is None else found
        for name, copy in copies.items():
            if isinstance(copy, np.ndarray):
                copy.flags.writeable = False
            self._copies[name] = copy, step
        self._read_step = step
        return step

    def _copied_by_server(self, names: list[str]) -> tuple[dict[str, Array], int]:
        """The same, by the service between two steps: it is enqueued in the order of the steps."""
        client, places = self._client, self._places

        def copied() -> tuple[dict[str, Array], int]:
            if self._copies_region is None:
                self._copies_region = self._new_region(self._nbytes)
            number, memory = self._copies_region
            with client.device.activate():
                client._tell()
                answer, _ = client._exchange({"op": "read", "optimizer": self.name, "region": number})
                self._done.wait()
                copies = {name: places[name].view(memory.array).copy() for name in names}
                client._tell()  # until when the region is read from, whichever stream asks for the next copy
                return copies, answer["step"]

        return client._insist(copied)


def _as_json(name: str, value: Any) -> Any:
    """A hyperparameter's value as JSON has it; the service says what is wrong with it."""
    if isinstance(value, LearningRateSchedule):
        return schedules.serialize(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    with contextlib.suppress(TypeError, ValueError):
        return float(value)
    raise ArgumentTypeError(name, "must be a number or a schedule", shown(value), "pass a float")


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


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


_HYPERPARAMETERS = frozenset(
    ("learning_rate", "beta_1", "beta_2", "epsilon", "decay", "weight_decay", "l2", "amsgrad", *_CLIPS)
)
