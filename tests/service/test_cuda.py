"""A service on a CUDA device: what is enqueued by several processes comes in the right order, and no host waits.

The processes are threads here, each on a stream of its own; `interprocess` has what CUDA does between processes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import interprocess
import numpy as np
import pytest
from reference import assert_same_bits

from gpu_adam import Adam, IndexedSlices, Variable
from gpu_adam.devices import Device, find_device
from gpu_adam.errors import DeviceError, SparseIndexError
from gpu_adam.service import Client, connect
from gpu_adam.service.config import read_config
from gpu_adam.service.server import Server

SECONDS = 20  # more than anything here takes
PATIENCE = 5
SHAPES = {"w": (6, 4), "b": (3,), "h": (40,)}
DTYPES = {"w": "float32", "b": "float32", "h": "float16"}
CONFIG = """
device = "{device}"
[optimizer.main]
config = {{learning_rate = 0.05, amsgrad = true}}
policy = "{policy}"
{lines}
[optimizer.main.variables]
w = {{initial = "w.npy"}}
b = {{initial = "b.npy"}}
h = {{initial = "h.npy"}}
"""
_Result = TypeVar("_Result")
_alive: list[Any] = []
"""Gradients, which are read from until all that is enqueued is done."""


@pytest.fixture(params=["at once", "as late as can be", "seed 1", "seed 2"])
def schedule(request: pytest.FixtureRequest, emulation: Any) -> Iterator[None]:
    """In what order work runs that may run later."""
    with contextlib.ExitStack() as stack:
        if request.param != "at once":
            seed = int(request.param[5:]) if request.param.startswith("seed") else None
            stack.enter_context(emulation.asynchronous(seed=seed))
        yield


class Process:
    """A thread that is taken for a process, with a stream of its own.

    Args:
        device: on which the stream is.
    """

    def __init__(self, device: Device) -> None:
        self._device, self._threads = device, ThreadPoolExecutor(1)
        self.stream = self._threads.submit(self._made_stream).result(SECONDS)

    def _made_stream(self) -> Any:
        with self._device.activate():
            return self._device.xp.cuda.Stream(non_blocking=True)

    def start(self, function: Callable[[], _Result]) -> Future[_Result]:
        """Have it call a function."""

        def called() -> _Result:
            with self._device.activate(), self.stream:
                return function()

        return self._threads.submit(called)

    def run(self, function: Callable[[], _Result]) -> _Result:
        """Have it call a function; what that returns."""
        return self.start(function).result(SECONDS)

    def end(self) -> None:
        """Wait for the thread's end."""
        self._threads.shutdown()


class Service:
    """A service in a process, and processes with clients.

    Args:
        directory: for the configuration and the socket.
        device: where the variables lie.
        policy: of the optimizer "main".
        more: TOML, at the end.
        lines: TOML, of the optimizer.
    """

    def __init__(
        self, directory: Path, device: Device, policy: str = "on_push", more: str = "", lines: str = ""
    ) -> None:
        for name, value in initial().items():
            np.save(directory / f"{name}.npy", value)
        self.device, self.path, self._is_over = device, directory / "socket", False
        file = directory / "service.toml"
        file.write_text(CONFIG.format(device=device.name, policy=policy, lines=lines) + more)
        self.process = Process(device)
        self.server = self.process.run(lambda: Server(read_config(file), self.path))
        self._served = self.process.start(self._serve)
        self._clients: list[tuple[Process, Client]] = []

    def _serve(self) -> None:
        self.server.run(lambda: self._is_over)

    def call(self, function: Callable[[], _Result]) -> _Result:
        """Have the server's thread call a function."""
        return self.server.call(function).result(SECONDS)

    def client(self, name: str, device: Device | None = None) -> tuple[Process, Any]:
        """A process with a client, and its optimizer; what the test has made by then is complete."""
        self.device.xp.cuda.Device().synchronize()
        process = Process(device or self.device)
        client = process.run(lambda: connect(self.path, name, PATIENCE))
        self._clients.append((process, client))
        return process, process.run(lambda: client.optimizer("main"))

    def end(self) -> None:
        """End clients and service."""
        for process, client in self._clients:
            with contextlib.suppress(TimeoutError):  # where a test has failed
                process.start(client.close).result(5)
        self._is_over = True
        self.server.call(bool)
        self._served.result(SECONDS)
        self.process.run(self.server.close)
        for process, _ in self._clients:
            process.end()
        self.process.end()


@pytest.fixture
def processes(gpu: Device, emulation: Any) -> Iterator[interprocess.Processes]:
    """Threads that share memory like processes."""
    with interprocess.processes(gpu.xp) as made:
        yield made


@pytest.fixture
def serve(gpu: Device, processes: interprocess.Processes, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """A function that starts a service, which ends with the test."""
    with contextlib.ExitStack() as ends:

        def start(policy: str = "on_push", device: Device = gpu, more: str = "", lines: str = "") -> Service:
            service = Service(tmp_path, device, policy, more, lines)
            ends.callback(service.end)
            return service

        yield start
    gc.collect()  # clients, whose memory is unmapped with them
    for number in range(gpu.xp.cuda.runtime.getDeviceCount()):
        gpu.xp.cuda.Device(number).synchronize()
    _alive.clear()


def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.002)


def numbers(seed: int, name: str) -> Any:
    return np.random.default_rng([seed, len(name), ord(name[0])]).standard_normal(SHAPES[name]).astype(DTYPES[name])


def initial() -> dict[str, Any]:
    return {name: numbers(99, name) for name in SHAPES}


class Local:
    """The same variables in one process."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.adam = Adam(0.05, amsgrad=True)
        self.variables = {name: Variable(value, name=name, device=device) for name, value in initial().items()}
        self.adam.build(self.variables.values())

    def values(self) -> dict[str, Any]:
        """What the variables are by now."""
        return {name: variable.numpy() for name, variable in self.variables.items()}

    def pairs(self, gradients: dict[str, Any]) -> list[Any]:
        """What a step takes."""
        return [(gradient, self.variables[name]) for name, gradient in gradients.items()]


def dense(device: Device, seed: int) -> dict[str, Any]:
    _alive.append({name: device.array(numbers(seed, name)) for name in SHAPES})
    return dict(_alive[-1])


def rows(device: Device, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 9))
    values = rng.standard_normal((count, 4)).astype(np.float32)
    indices = rng.integers(0, SHAPES["w"][0], count)
    slices = IndexedSlices(device.array(values), device.array(indices))
    _alive.append({"w": slices, "b": device.array(numbers(seed, "b"))})
    return dict(_alive[-1])


def written(main: Any, gradients: dict[str, Any]) -> None:
    """Push by writing into the shared memory."""
    with main.gradients() as g:
        for name, gradient in gradients.items():
            g[name][...] = gradient


def applied(main: Any, gradients: dict[str, Any]) -> None:
    main.apply_gradients([(gradient, main.variables[name]) for name, gradient in gradients.items()])


def values_of(main: Any) -> dict[str, Any]:
    return {name: variable.numpy() for name, variable in main.variables.items()}


def assert_same_values(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_bits(actual[name], value)


@pytest.mark.parametrize(("push", "made"), [(written, dense), (applied, dense), (applied, rows)])
def test_the_steps_are_those_of_one_process(
    gpu: Device, serve: Any, emulation: Any, schedule: None, push: Any, made: Any
) -> None:
    """Whatever the streams do: each gradient is complete when it is read, and read when the next one is written."""
    with emulation.uncounted():
        steps, local = [made(gpu, seed) for seed in range(5)], Local(gpu)
        for gradients in steps:
            local.adam.apply_gradients(local.pairs(gradients))
        process, main = serve().client("a")
    process.run(lambda: [push(main, gradients) for gradients in steps])
    with emulation.uncounted():
        assert_same_values(process.run(lambda: values_of(main)), local.values())
        assert main.iterations == 5


@pytest.mark.parametrize(("push", "made"), [(written, dense), (applied, dense), (applied, rows)])
def test_nobody_waits_for_the_device(
    gpu: Device, serve: Any, emulation: Any, schedule: None, push: Any, made: Any
) -> None:
    """And nothing is copied to the host, nor allocated, on either side."""
    with emulation.uncounted():
        steps = [made(gpu, seed) for seed in (1, 2, 1, 2, 1, 2)]
        process, main = serve().client("a")
    process.run(lambda: [push(main, gradients) for gradients in steps[:2]])  # what is made once is made now
    emulation.reset()
    process.run(lambda: [push(main, gradients) for gradients in steps[2:]])
    counters = emulation.counters
    assert counters.syncs == []
    assert counters.d2h_bytes == 0
    assert counters.device_allocations == 0


def test_a_read_copies_without_a_wait(gpu: Device, serve: Any, emulation: Any, schedule: None) -> None:
    """What was read stays as it was, whatever is pushed before the device has come to the copy."""
    with emulation.uncounted():
        steps, local, expected = [dense(gpu, seed) for seed in range(4)], Local(gpu), [initial()]
        for gradients in steps:
            local.adam.apply_gradients(local.pairs(gradients))
            expected.append(local.values())
        process, main = serve().client("a")

    def read() -> dict[str, Any]:
        return {name: variable.value for name, variable in main.variables.items()}

    def train() -> list[dict[str, Any]]:
        found = []
        for gradients in steps:
            written(main, gradients)
            found.append(read())
        return found

    found = [process.run(read)]
    process.run(lambda: main._region(main._nbytes))  # the memory is there from now on
    emulation.reset()
    found += process.run(train)
    assert emulation.counters.syncs == []
    for actual, wanted in zip(found, expected, strict=True):
        assert_same_values(process.run(lambda: {n: gpu.numpy(v) for n, v in actual.items()}), wanted)  # noqa: B023


def test_reads_on_several_streams(gpu: Device, serve: Any, emulation: Any, schedule: None) -> None:
    """A copy that one stream makes is not overwritten by what the next stream asks for."""
    with emulation.uncounted():
        steps, local, expected = [dense(gpu, seed) for seed in range(4)], Local(gpu), []
        for gradients in steps:
            local.adam.apply_gradients(local.pairs(gradients))
            expected.append(local.values())
        service = serve()
        (process, main), (other, same) = service.client("a"), service.client("b")

    def read() -> dict[str, Any]:
        with gpu.xp.cuda.Stream(non_blocking=True):
            return {name: variable.value for name, variable in same.variables.items()}

    found = []
    for gradients in steps:
        process.run(functools.partial(written, main, gradients))
        found.append(other.run(read))
    gpu.xp.cuda.Device().synchronize()
    for actual, wanted in zip(found, expected, strict=True):
        assert_same_values({name: gpu.numpy(value) for name, value in actual.items()}, wanted)


def test_the_memory_itself(gpu: Device, serve: Any, emulation: Any, schedule: None) -> None:
    """From the first moment, and after each step."""
    with emulation.uncounted():
        steps, local, expected = [dense(gpu, seed) for seed in range(3)], Local(gpu), [initial()]
        for gradients in steps:
            local.adam.apply_gradients(local.pairs(gradients))
            expected.append(local.values())
        process, main = serve().client("a")

    def live() -> dict[str, Any]:
        return {name: variable.live.copy() for name, variable in main.variables.items()}

    def train() -> list[dict[str, Any]]:
        found = [live()]
        for gradients in steps:
            written(main, gradients)
            found.append(live())
        return [{name: gpu.numpy(value) for name, value in values.items()} for values in found]

    for actual, wanted in zip(process.run(train), expected, strict=True):
        assert_same_values(actual, wanted)


def test_a_snapshot_is_of_one_step(gpu: Device, serve: Any, emulation: Any, schedule: None) -> None:
    with emulation.uncounted():
        steps, local, expected = [dense(gpu, seed) for seed in range(4)], Local(gpu), [initial()]
        for gradients in steps:
            local.adam.apply_gradients(local.pairs(gradients))
            expected.append(local.values())
        service = serve()
        (process, main), (other, same) = service.client("a"), service.client("b")

    def look(gradients: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with same.snapshot() as step:
            process.run(lambda: applied(main, gradients))
            return step, values_of(same)

    for gradients in steps:
        step, found = other.run(functools.partial(look, gradients))
        assert_same_values(found, expected[step])
    assert main.iterations == 4


def test_the_mean_of_two_clients(gpu: Device, serve: Any, emulation: Any, schedule: None) -> None:
    """Of gradients that two processes write at the same time, in the order of their names."""
    with emulation.uncounted():
        steps, local = [(dense(gpu, seed), dense(gpu, seed + 10)) for seed in range(4)], Local(gpu)
        for both in steps:
            for gradients in both:
                local.adam.accumulate(local.pairs(gradients))
            local.adam.apply_gradients()
        service = serve("all_of=2")
        clients = [service.client("a"), service.client("b")]

    def push(number: int) -> None:
        for both in steps:
            written(clients[number][1], both[number])

    done = [clients[number][0].start(functools.partial(push, number)) for number in (1, 0)]
    for each in done:
        each.result(SECONDS)
    process, main = clients[0]
    assert_same_values(process.run(lambda: values_of(main)), local.values())


def test_what_is_pushed_within_a_time(gpu: Device, serve: Any, emulation: Any, schedule: None) -> None:
    with emulation.uncounted():
        steps, local = [dense(gpu, seed) if seed % 3 else rows(gpu, seed) for seed in range(6)], Local(gpu)
        service = serve("every=1000")
        process, main = service.client("a")
    tick = service.server.optimizers["main"].tick
    for number, gradients in enumerate(steps):
        process.run(lambda: applied(main, gradients))  # noqa: B023
        if number in (2, 5):
            service.call(tick)
    with emulation.uncounted():
        for number, gradients in enumerate(steps):
            local.adam.accumulate(local.pairs(gradients))
            if number in (2, 5):
                local.adam.apply_gradients()
        assert_same_values(process.run(lambda: values_of(main)), local.values())
    assert main.iterations == 2


def test_minimize(gpu: Device, serve: Any, emulation: Any, schedule: None) -> None:
    """On CUDA without the loss, which would have to be waited for."""
    with emulation.uncounted():
        local = Local(gpu)
        target = gpu.array(numbers(7, "w"))
        service = serve()
        process, main = service.client("a")

    def loss_of(w: Any, b: Any) -> Any:
        return ((w - target) ** 2).sum() + (b * b).sum()

    def minimize(of: Any, variables: Any, times: int) -> None:
        w, b = variables["w"], variables["b"]
        for _ in range(times):
            of.minimize(lambda: loss_of(w, b), [w, b])

    process.run(lambda: minimize(main, main.variables, 1))
    emulation.reset()
    process.run(lambda: minimize(main, main.variables, 3))
    assert emulation.counters.syncs == []
    minimize(local.adam, local.variables, 4)
    with emulation.uncounted():
        assert_same_values(process.run(lambda: values_of(main)), local.values())


def test_two_threads_of_a_client(gpu: Device, serve: Any, emulation: Any, schedule: None) -> None:
    """A push that waits for its step is not called complete by what another thread does meanwhile."""
    more = CONFIG.format(device=gpu.name, policy="on_push", lines="").replace("main", "second").partition("[")
    with emulation.uncounted():
        gradients, local = dense(gpu, 1), Local(gpu)
        local.adam.apply_gradients(local.pairs(gradients))
        service = serve(more="".join(more[1:]))
        process, main = service.client("a")
        thread, second = Process(gpu), process.run(lambda: main._client.optimizer("second"))
        for each in (main, second):
            process.run(lambda: each._region(each._nbytes))  # noqa: B023
    first = service.server.optimizers["main"]
    service.call(first.pause)
    pushed = process.start(lambda: written(main, gradients))
    while not service.call(lambda: first._held):
        """The push is on its way."""
    also = thread.start(lambda: written(second, gradients))
    time.sleep(0.05)  # for the other thread to do what it can
    service.call(first.resume)
    for each in (pushed, also):
        each.result(SECONDS)
    thread.end()
    with emulation.uncounted():
        assert_same_values(process.run(lambda: values_of(main)), local.values())
        assert_same_values(process.run(lambda: values_of(second)), local.values())


def test_rows_that_are_not_there(
    gpu: Device, serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, emulation: Any, schedule: None
) -> None:
    """They are left out; who asks is told, and the log where the service waits for its device anyway."""
    with emulation.uncounted():
        service = serve(lines=f'checkpoint = {{directory = "{tmp_path / "run"}"}}')
        good, local = rows(gpu, 3), Local(gpu)
        bad = IndexedSlices(gpu.array(np.ones((2, 4), np.float32)), gpu.array(np.array([1, 6])))
        left = IndexedSlices(gpu.array(np.ones((1, 4), np.float32)), gpu.array(np.array([1])))
        for gradients in ({"w": left}, good, {"w": left}):
            local.adam.apply_gradients(local.pairs(gradients))
        process, main = service.client("a")
    process.run(lambda: applied(main, {"w": bad}))
    process.run(lambda: applied(main, good))
    with pytest.raises(
        SparseIndexError, match=r"IndexedSlices.indices\[1\] of variable 'w' must lie in \[0, 6\) \(got 6\)"
    ):
        process.run(main.check_errors)
    process.run(main.check_errors)
    process.run(lambda: applied(main, {"w": bad}))
    with caplog.at_level(logging.WARNING, "gpu_adam"):
        process.run(main.save)
    assert "optimizer 'main' was pushed rows that it does not have: IndexedSlices.indices[1]" in caplog.text
    assert_same_values(process.run(lambda: values_of(main)), local.values())


def test_memory_is_given_back(gpu: Device, serve: Any, emulation: Any, schedule: None) -> None:
    """Where a client goes, with work of it and of its last step in the streams; and where it needs more."""
    with emulation.uncounted():
        service = serve()
        steps = [dense(gpu, seed) for seed in range(2)]
        process, main = service.client("a")
        process.run(lambda: written(main, steps[0]))
        before = service.call(gpu.xp.cuda.runtime.memGetInfo)
        other, same = service.client("b")
    other.run(lambda: written(same, steps[1]))
    other.run(lambda: same.variables["w"].value)
    assert service.call(gpu.xp.cuda.runtime.memGetInfo)[0] <= before[0] - 2 * 2**21
    other.run(lambda: same._region(2**21 + 1))
    assert service.call(gpu.xp.cuda.runtime.memGetInfo)[0] <= before[0] - 3 * 2**21
    other.run(same._client.close)
    service.call(bool)
    until(lambda: service.call(lambda: service.server.clients) == ["a"])
    gpu.xp.get_default_memory_pool().free_all_blocks()
    assert service.call(gpu.xp.cuda.runtime.memGetInfo)[0] >= before[0] - 2**21


def test_a_client_that_ends_before_it_pushes(
    gpu: Device, serve: Any, processes: Any, emulation: Any, schedule: None
) -> None:
    """What it has enqueued is nobody's, and disturbs nobody."""
    with emulation.uncounted():
        steps, local = [dense(gpu, seed) for seed in range(3)], Local(gpu)
        for gradients in steps:
            local.adam.apply_gradients(local.pairs(gradients))
        service = serve()
        process, main = service.client("a")

    def half(main: Any) -> None:
        with contextlib.suppress(ZeroDivisionError), main.gradients() as g:
            g["w"][...] = steps[0]["w"]
            raise ZeroDivisionError

    for gradients in steps:
        other, same = service.client("b")
        other.run(lambda: half(same))  # noqa: B023
        other.run(same._client._disconnect)  # as the system does where it was killed
        process.run(lambda: written(main, gradients))  # noqa: B023
        until(lambda: service.call(lambda: service.server.clients) == ["a"])
        other.run(same._client.close)
        processes.faults.clear()  # who is killed unmaps nothing before
    assert_same_values(process.run(lambda: values_of(main)), local.values())


def test_a_client_that_connects_again(gpu: Device, serve: Any, processes: Any, emulation: Any) -> None:
    """It unmaps what it had, once; a second client of its process has the same memory."""
    service = serve()
    process, main = service.client("a")
    process.run(lambda: written(main, dense(gpu, 1)))
    process.run(lambda: values_of(main))
    process.run(lambda: main._client._connect(10))
    assert list(processes.mapped.values()) == [1, 0, 0]
    process.run(lambda: written(main, dense(gpu, 2)))
    twin = process.run(lambda: connect(service.path, "twin", PATIENCE))
    same = process.run(lambda: twin.optimizer("main"))
    assert list(processes.mapped.values()) == [2, 0, 0, 1]
    assert_same_values(process.run(lambda: values_of(same)), process.run(lambda: values_of(main)))
    process.run(twin.close)
    process.run(lambda: written(main, dense(gpu, 3)))
    assert main.iterations == 3


def need_two_devices(gpu: Device) -> None:
    if gpu.xp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs a real GPU, or an emulated one, and another beside it")


def test_two_devices_with_other_numbers(gpu: Device, serve: Any, emulation: Any) -> None:
    """The service's is found by what names it; the client's current one is another."""
    need_two_devices(gpu)
    there = find_device("cuda:1")
    assert len({find_device(f"cuda:{number}").identity for number in range(2)}) == 2
    local = Local(there)
    steps = [dense(there, seed) for seed in range(3)]
    for gradients in steps:
        local.adam.apply_gradients(local.pairs(gradients))
    with there.activate():
        there.xp.cuda.Device().synchronize()
    process, main = serve(device=there).client("a", gpu)
    assert main._client.device is there

    def train() -> None:
        applied(main, steps[0])
        applied(main, steps[1])
        with there.activate():
            written(main, steps[2])

    process.run(train)
    assert_same_values(process.run(lambda: values_of(main)), local.values())
    b = main.variables["b"]
    process.run(lambda: main.minimize(lambda: 2 * (b * b).sum(), [b]))
    assert process.run(lambda: b.live).device.id == 1
    assert main.iterations == 4


def test_the_names_of_devices(gpu: Device, monkeypatch: pytest.MonkeyPatch, emulation: Any) -> None:
    """CuPy cuts a UUID off at its first zero byte, so that it alone would not tell two GPUs apart."""
    need_two_devices(gpu)
    monkeypatch.setattr(gpu.xp.cuda.runtime, "getDeviceProperties", lambda index: {"uuid": b"\1"})
    assert len({find_device(f"cuda:{number}").identity for number in range(2)}) == 2


@pytest.mark.parametrize("call", ["ipcGetMemHandle", "ipcGetEventHandle"])
def test_a_device_that_cannot_share(
    gpu: Device, processes: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, emulation: Any, call: str
) -> None:
    """The service does not start, and says why."""
    error = gpu.xp.cuda.runtime.CUDARuntimeError(801)

    def refused(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(gpu.xp.cuda.runtime, call, refused)
    with pytest.raises(DeviceError, match=r"cudaErrorNotSupported.*--ipc=host, not on WSL or Tegra"):
        Service(tmp_path, gpu)
    assert not (tmp_path / "socket").exists()


@pytest.mark.parametrize("call", ["ipcOpenMemHandle", "ipcOpenEventHandle"])
def test_a_client_that_cannot_map(
    gpu: Device, serve: Any, monkeypatch: pytest.MonkeyPatch, emulation: Any, call: str
) -> None:
    """In a container of its own, say: it is told why, and the service goes on."""
    service = serve()

    def refused(*arguments: Any) -> None:
        raise gpu.xp.cuda.runtime.CUDARuntimeError(801)

    with monkeypatch.context() as patch:
        patch.setattr(gpu.xp.cuda.runtime, call, refused)
        with pytest.raises(DeviceError, match=r"\(got cudaErrorNotSupported.*see that both processes run on one"):
            service.client("a")
    process, main = service.client("b")
    process.run(lambda: written(main, dense(gpu, 1)))
    assert main.iterations == 1


def test_events_that_run_out(gpu: Device, serve: Any, monkeypatch: pytest.MonkeyPatch, emulation: Any) -> None:
    """One client is refused; the service goes on."""
    service = serve()
    process, main = service.client("a")

    def refused(*arguments: Any) -> None:
        raise gpu.xp.cuda.runtime.CUDARuntimeError(2)

    with monkeypatch.context() as patch:
        patch.setattr(gpu.xp.cuda.runtime, "eventCreateWithFlags", refused)
        with pytest.raises(DeviceError, match="cudaErrorMemoryAllocation"):
            service.client("b")
    process.run(lambda: written(main, dense(gpu, 1)))
    assert main.iterations == 1


def test_memory_that_runs_out(gpu: Device, serve: Any, monkeypatch: pytest.MonkeyPatch, emulation: Any) -> None:
    """A region is refused; the service goes on."""
    service = serve()
    process, main = service.client("a")

    def refused(*arguments: Any) -> None:
        raise gpu.xp.cuda.runtime.CUDARuntimeError(2)

    with monkeypatch.context() as patch:
        patch.setattr(gpu.xp.cuda, "Memory", refused)
        with pytest.raises(DeviceError, match="must have 2097152 bytes that processes can share"):
            process.run(lambda: written(main, dense(gpu, 1)))
    process.run(lambda: written(main, dense(gpu, 1)))
    assert main.iterations == 1
