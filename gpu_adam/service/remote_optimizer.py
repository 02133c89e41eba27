"""An optimizer of a service, to a client: variables that read like local ones, steps by gradients in shared memory."""

from __future__ import annotations

import contextlib
import importlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpu_adam import schedules
from gpu_adam.devices import Array, find_device
from gpu_adam.devices.base import SharedEvent, SharedMemory
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, GpuAdamError, ServiceError
from gpu_adam.rules import real_number, shown
from gpu_adam.schedules import LearningRateSchedule
from gpu_adam.service.layout import LINE, Place, placed
from gpu_adam.service.messages import LARGEST, SETTABLE, ConnectionLostError, close_all
from gpu_adam.service.sequence import StepSequence
from gpu_adam.step.gradients import dtype_read, on_device
from gpu_adam.step.guard import checked_scale
from gpu_adam.step.request import checked_pair, listed, without_gradient
from gpu_adam.variables import IndexedSlices, Variable

if TYPE_CHECKING:
    from gpu_adam.service.client import Client

_READ_SECONDS = 0.05  # how long a reader tries by itself, before the server copies for it
_BINDINGS_KEPT = 16


class RemoteVariable(Variable):
    """A variable of a service. It reads like a local one, in expressions and losses too, and is changed by steps alone.

    What is read is whole: as it was between two steps. It is a copy, made anew after a step. While the service is away,
    it reads as it was.
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
        return self._optimizer._live(self)

    @property
    def _value(self) -> Array:
        return self._optimizer._copy_of(self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is a variable of its own.
        return Variable, (self.numpy(), self.trainable, self._name, None, self._device)

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

    def __contains__(self, name: object) -> bool:
        return name in self._arrays  # which asks for nothing

    def __setitem__(self, name: str, values: Any) -> None:
        self[name][...] = values

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


@dataclass
class _Mapped:
    """What a client has of an optimizer over one connection.

    Attributes:
        connection: its number.
        sequence: the sequence counter.
        arrays: the variables' memory, by name.
        done: the event that the service records.
        region: this client's memory for gradients, with its number.
        copies: the same for copies of all variables.
        views: the places of `region` in which gradients like the variables lie, by name.
        bindings: the numbers of what is bound in `region`.
    """

    connection: int
    sequence: StepSequence
    arrays: dict[str, Array]
    done: SharedEvent
    region: tuple[int, SharedMemory] | None = None
    copies: tuple[int, SharedMemory] | None = None
    views: dict[str, Array] | None = None
    bindings: dict[tuple[_Part, ...], int] = field(default_factory=dict)


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

    def __init__(self, client: Client, name: str) -> None:
        vars(self).update(name=name, variables={})
        self._client, self.staleness = client, None
        self._places: dict[str, Place] = {}
        self._is_frozen = self._is_writing = False
        self._copies: dict[str, tuple[Array, tuple[int, int]]] = {}  # with connection and version
        self._read_step: int | None = None
        self._mapped = self._attached()

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
            grad_scale: what the gradients are to be divided by, a number > 0.

        Returns:
            The number of the step that the push became part of, or with "every=T" is going to be. With "all_of=N" the
            call waits for the others. None where the device may leave steps out.

        Raises:
            As `Adam.apply_gradients`; ServiceError: the service is gone, or a client is that had a part in the step.
        """
        self._check_not_writing()
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
            memory, device = self._region(nbytes), self._client.device
            begin = device.address(memory)
            inside = range(begin, begin + memory.size)
            # What lies there itself, an array of an earlier block of gradients(), would be overwritten before its turn.
            sources = [array.copy() if device.address(array) in inside else array for array in arrays]
            for array, place in zip(sources, places, strict=True):
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
        Within the block nothing else is pushed, and after it the arrays are not to be written to.

        Args:
            grad_scale: as for `apply_gradients`.
        """
        self._client._check_usable()
        self._check_not_writing()
        self._is_writing = True
        try:
            memory = self._region(self._nbytes)
            given = Gradients(self._views_of(memory))
            yield given
        finally:
            self._is_writing = False
        parts = tuple([part for part in self._whole if part.variable in given.asked])
        self._push(parts, lambda: self._write_again(memory), given.loss, grad_scale)

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
        """A block in which all variables read as they were at one point between two steps; it gets the steps done.

        Inside of another such block it is that one's point.
        """
        if self._is_frozen:
            assert self._read_step is not None
            yield self._read_step
            return
        self._client._look()
        step = self._copy(list(self.variables))
        self._is_frozen = True
        try:
            yield step
        finally:
            self._is_frozen = False

    # What the service knows.

    @property
    def iterations(self) -> int:
        """The steps done."""
        self._client._look()
        return self._current().sequence.step

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
            ServiceError: the service's configuration has no checkpoints, or it is paused while gradients wait.
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
        if name in SETTABLE:
            value = self._request({"op": "get", "name": name})["value"]
            return schedules.deserialize(value) if isinstance(value, dict) else value
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name[:1] == "_" or name in ("staleness", "policy"):
            super().__setattr__(name, value)
        elif name in SETTABLE:
            self._request({"op": "set", "name": name, "value": _as_json(name, value)})
        else:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r} that can be assigned")

    def __repr__(self) -> str:
        return f"<optimizer {self.name!r} of {self._client!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        rule, remedy = "must stay in the process that connected", "connect in each process"
        raise ServiceError(f"optimizer {self.name!r}", rule, "a copy", remedy)

    # Memory.

    def _request(self, message: dict[str, Any]) -> dict[str, Any]:
        return self._client._request({**message, "optimizer": self.name})

    def _current(self) -> _Mapped:
        """What is mapped over the present connection; of the last one, while there is none."""
        client = self._client
        if client._connections != self._mapped.connection and client._socket is not None:
            with contextlib.suppress(ConnectionLostError):
                self._mapped = self._attached()
        return self._mapped

    def _attached(self) -> _Mapped:
        """The service's memory, mapped over the present connection."""
        client = self._client
        connection = client._connections
        answer, descriptors = client._exchange({"op": "attach", "optimizer": self.name})
        try:
            host, handles = find_device("host"), answer["memories"]
            layout = host.map_memory(handles[0], descriptors[0]).array
            status = host.map_memory(handles[1], descriptors[1]).array
            entries = json.loads(layout.tobytes())
            places = {name: Place(offset, tuple(shape), dtype) for name, offset, shape, dtype in entries}
            if self.variables and places != self._places:
                rule, remedy = "must have the variables that it had", "connect again"
                raise ServiceError(f"optimizer {self.name!r}", rule, "others, after a new start", remedy)
            parameters = client.device.map_memory(handles[2], descriptors[2] if len(descriptors) > 2 else -1).array
        finally:
            close_all(descriptors)
        self._places, self.policy, self._counts_exactly = places, answer["policy"], answer["counts"]
        self._nbytes = max((-(-(p.offset + p.nbytes) // LINE) * LINE for p in places.values()), default=0)
        self._whole = tuple([_Part(name, place, None) for name, place in places.items()])
        arrays = {name: place.view(parameters) for name, place in places.items()}
        for name, array in arrays.items():
            if name in self.variables:
                self.variables[name]._move_to(array)
            else:
                self.variables[name] = RemoteVariable(self, name, array)
        return _Mapped(connection, StepSequence(status), arrays, client.device.map_event(answer["done"]))

    def _forget_regions(self) -> None:
        """Give up the memory that this client may write to."""
        mapped = self._mapped
        for _, memory in filter(None, (mapped.region, mapped.copies)):
            memory.close()
        mapped.region = mapped.copies = mapped.views = None
        mapped.bindings.clear()

    def _new_region(self, nbytes: int) -> tuple[int, SharedMemory]:
        answer, descriptors = self._client._exchange({"op": "region", "bytes": nbytes})
        try:
            descriptor = descriptors[0] if descriptors else -1
            return answer["region"], self._client.device.map_memory(answer["memory"], descriptor)
        finally:
            close_all(descriptors)

    def _region(self, nbytes: int) -> Array:
        """This client's memory for gradients, of so many bytes or more, which may be written to from now on."""

        def memory() -> Array:
            mapped = self._current()
            if mapped.region is None or mapped.region[1].array.size < nbytes:
                if mapped.region is not None:
                    number, old = mapped.region
                    mapped.region = mapped.views = None
                    mapped.bindings.clear()
                    old.close()
                    self._client._exchange({"op": "free", "region": number})
                mapped.region = self._new_region(max(nbytes, self._nbytes))
            return mapped.region[1].array

        found = self._client._insist(memory)
        self._wait_for_steps()
        return found

    def _views_of(self, memory: Array) -> dict[str, Array]:
        mapped = self._mapped
        if mapped.views is None:
            mapped.views = {name: place.view(memory) for name, place in self._places.items()}
        return mapped.views

    def _write_again(self, written: Array) -> None:
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
            self._mapped.done.wait()

    def _own_variable(self, target: Any, argument: str) -> RemoteVariable:
        variable = self.variables.get(getattr(target, "name", ""))
        if variable is None or variable is not target:
            rule, remedy = f"must have a variable of optimizer {self.name!r}", "pass one of its variables"
            raise ArgumentValueError(argument, rule, shown(target), remedy)
        return variable

    # Pushing.

    def _check_not_writing(self) -> None:
        if self._is_writing:
            rule, remedy = "must end before anything else is pushed", "push after it, or by another client"
            raise ServiceError("the block of gradients()", rule, "a push inside of it", remedy)

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
        client._check_usable()
        message: dict[str, Any] = {"op": "push"}
        if loss is not None:
            message["loss"] = float(real_number("loss", loss))
        if grad_scale is not None:
            message["scale"] = real_number("grad_scale", checked_scale(grad_scale))
        with client._lock:  # no other thread writes to this memory before the service has read it
            while True:
                with client.device.activate():
                    write()
                    client._tell()
                before, was_sent = self._mapped.sequence.step, False
                if self._read_step is not None and self._read_step <= before:  # else it was an earlier service's
                    message["read"] = self._read_step
                try:
                    named = self._named(parts)
                    was_sent = True
                    answer, _ = client._exchange({**message, **named})
                except ConnectionLostError:
                    client._connect(client._patience)
                    if was_sent and (self.iterations > before or not self._counts_exactly):
                        rule, remedy = "must be known to be part of a step or not", "look at iterations, and go on"
                        got = f"the connection was lost before the answer; {before} steps then, {self.iterations} now"
                        raise ServiceError("the push", rule, got, remedy) from None
                else:
                    if "draining" not in answer:
                        self.staleness = answer["staleness"]
                        step: int | None = answer["step"]
                        return step
                    client._connect(client._patience)

    def _named(self, parts: tuple[_Part, ...]) -> dict[str, Any]:
        """How a push names its gradients: by a binding, which the service has checked, or one by one where rows are."""
        mapped = self._mapped
        if mapped.region is None:
            raise ConnectionLostError
        where = {"optimizer": self.name, "region": mapped.region[0]}
        if any(part.indices is not None for part in parts):
            return {**where, "gradients": [part.to_json() for part in parts]}
        bindings, exchange = mapped.bindings, self._client._exchange
        if parts not in bindings:
            if len(bindings) == _BINDINGS_KEPT:
                oldest = next(iter(bindings))
                exchange({"op": "unbind", "binding": bindings.pop(oldest)})
            more: dict[str, Any] = {}
            try:
                for some in _in_messages([part.to_json() for part in parts]):
                    answer, _ = exchange({"op": "bind", **where, "gradients": some, **more})
                    more = {"binding": answer["binding"]}
            except GpuAdamError:
                if more:
                    exchange({"op": "unbind", **more})
                raise
            bindings[parts] = more["binding"]
        return {"binding": bindings[parts]}

    # Reading.

    def _live(self, variable: RemoteVariable) -> Array:
        """A variable's memory."""
        self._client._look()
        self._read_step = self._current().sequence.step
        self._wait_for_steps()
        return variable._storage

    def _copy_of(self, name: str) -> Array:
        """A whole copy of a variable, made anew where something has changed since the last one."""
        if not self._is_frozen:
            self._client._look()
        known = self._copies.get(name)
        if known is None or not (self._is_frozen or known[1] == self._point()):
            self._copy([name])
            known = self._copies[name]
        return known[0]

    def _point(self) -> tuple[int, int]:
        """What tells one state of the variables from another: the connection, and the sequence counter."""
        mapped = self._current()
        return mapped.connection, mapped.sequence.version

    def _copy(self, names: list[str]) -> int:
        """Copy some variables, all as they were at the same point between two steps; the steps done by then."""
        mapped = self._current()
        found = None
        if self._client.device.xp is np:
            found = mapped.sequence.whole(lambda: {n: mapped.arrays[n].copy() for n in names}, _READ_SECONDS)
        copies, step, version = self._copied_by_server(names) if found is None else found
        for name, copy in copies.items():
            if isinstance(copy, np.ndarray):
                copy.flags.writeable = False
            self._copies[name] = copy, (self._mapped.connection, version)
        self._read_step = step
        return step

    def _copied_by_server(self, names: list[str]) -> tuple[dict[str, Array], int, int]:
        """The same, by the service between two steps: it is enqueued in the order of the steps."""
        client, places = self._client, self._places

        def copied() -> tuple[dict[str, Array], int, int]:
            mapped = self._current()
            if mapped.copies is None:
                mapped.copies = self._new_region(self._nbytes)
            number, memory = mapped.copies
            with client.device.activate():
                client._tell()
                answer, _ = client._exchange({"op": "read", "optimizer": self.name, "region": number})
                mapped.done.wait()
                copies = {name: places[name].view(memory.array).copy() for name in names}
                client._tell()  # until when the region is read from, whichever stream asks for the next copy
                return copies, answer["step"], answer["version"]

        return client._insist(copied)


def _in_messages(parts: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The parts in lists that fit into a message each; one list at least."""
    some: list[dict[str, Any]] = []
    size = 0
    for part in parts:
        more = len(json.dumps(part))
        if some and size + more > LARGEST // 2:
            yield some
            some, size = [], 0
        some.append(part)
        size += more
    yield some


def _as_json(name: str, value: Any) -> Any:
    """A hyperparameter's value as JSON has it; the service says what is wrong with it."""
    if isinstance(value, LearningRateSchedule):
        return schedules.serialize(value)
    if isinstance(value, np.bool_):
        return bool(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    with contextlib.suppress(TypeError, ValueError):
        return float(value)
    raise ArgumentTypeError(name, "must be a number or a schedule", shown(value), "pass a float")
