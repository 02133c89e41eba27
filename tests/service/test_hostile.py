"""Whatever a client sends, the service refuses in a sentence, or disconnects, and goes on; others notice nothing."""

from __future__ import annotations

import json
import mmap
import os
import random
import socket
import stat
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpu_adam import IndexedSlices
from gpu_adam.errors import ArgumentValueError, ServiceError
from gpu_adam.service import client as client_module
from gpu_adam.service import connect
from gpu_adam.service import connection as connection_module
from gpu_adam.service.messages import LARGEST, VERSION
from service.running import PLAIN, InThread, until

Serve = Callable[..., InThread]


class Raw:
    """A client that sends what it likes."""

    def __init__(self, service: InThread, *, says_hello: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(str(service.path))
        self.socket.settimeout(30)
        if says_hello:
            assert "server" in self.ask(op="hello", version=VERSION)

    def ask(self, **message: Any) -> dict[str, Any]:
        """The answer to a message of these fields."""
        return self.answer(json.dumps(message).encode())

    def answer(self, data: bytes) -> dict[str, Any]:
        """The answer to bytes."""
        self.socket.send(data)
        received, descriptors, _, _ = socket.recv_fds(self.socket, LARGEST, 4)
        for descriptor in descriptors:
            os.close(descriptor)
        found: dict[str, Any] = json.loads(received)
        return found

    def refusal(self, **message: Any) -> str:
        """What a message of these fields is refused by: a class, and a sentence."""
        kind, argument, rule, got, remedy = self.ask(**message)["error"]
        return f"{kind}: {argument} {rule} (got {got}); {remedy}."

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()


def assert_goes_on(service: InThread) -> None:
    """A step of a well-behaved client has the bits of a first step."""
    with connect(service.path, patience=30) as client:
        main = client.optimizer("main")
        before = main.iterations
        assert main.apply_gradients([(np.ones(4, np.float32), main.variables["b"])]) == before + 1


def test_first_messages(serve: Serve) -> None:
    service = serve()
    with Raw(service, says_hello=False) as raw:
        assert raw.refusal(op="attach", optimizer="main").startswith("ServiceError: the first message of a client")
        versions: list[Any] = [0, 2, "1", None, [], 1e999]
        for version in versions:
            text = raw.refusal(op="hello", version=version)
            assert text.startswith("ServiceError: the protocol's version must be 1 (got ")
        for name in ("", "x" * 65, "a b", "a/b", "é\n", 3, ["a"]):
            assert "name must be " in raw.refusal(op="hello", version=1, name=name)
        assert raw.ask(op="hello", version=1, name="raw")["name"] == "raw"
        assert "must say hello once" in raw.refusal(op="hello", version=1, name="raw")
    with Raw(service, says_hello=False) as raw, Raw(service, says_hello=False) as other:
        raw.ask(op="hello", version=1, name="a")
        assert "must not be that of another client" in other.refusal(op="hello", version=1, name="a")
    assert_goes_on(service)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"op": "nonesuch"}, "the message's op must be one of hello, attach"),
        ({}, "the message's op must be a text (got None)"),
        ({"op": "attach", "optimizer": "x"}, "the optimizer must be one of main"),
        ({"op": "attach", "optimizer": {}}, "must be a text"),
        ({"op": "region", "bytes": -1}, "must lie in [0, "),
        ({"op": "region", "bytes": 2**70}, "must lie in [0, "),
        ({"op": "region", "bytes": 1.5}, "must be a whole number"),
        ({"op": "region", "bytes": True}, "must be a whole number"),
        ({"op": "free", "region": 99}, "the region must be one of this client's own"),
        ({"op": "push", "binding": 99}, "the binding must be one of this client's own"),
        ({"op": "push"}, "the message's optimizer must be a text"),
        ({"op": "read", "optimizer": "main", "region": 1, "offset": 2**40}, "of its region"),
        ({"op": "read", "optimizer": "main", "region": 1, "offset": 3}, "must begin at a multiple of 16"),
        ({"op": "get", "optimizer": "main", "name": "_state"}, "the hyperparameter must be one of learning_rate"),
        ({"op": "set", "optimizer": "main", "name": "save", "value": 3}, "the hyperparameter must be one of"),
        ({"op": "set", "optimizer": "main", "name": "learning_rate"}, "learning_rate must be a real number"),
        ({"op": "set", "optimizer": "main", "name": "learning_rate", "value": {"class_name": "os.system"}}, "must"),
        ({"op": "set", "optimizer": "main", "name": "beta_1", "value": {"a": 1}}, "beta_1 must be a real number"),
    ],
)
def test_refusals(serve: Serve, message: dict[str, Any], text: str) -> None:
    service = serve()
    with Raw(service) as raw:
        assert raw.ask(op="region", bytes=4096)["region"] == 1
        assert text in raw.refusal(**message)
        assert raw.ask(op="get", optimizer="main", name="beta_1") == {"value": 0.9}
    assert_goes_on(service)


@pytest.mark.parametrize(
    "values",
    [
        None, [], {}, "x", [0], [0, [4]], [0, [4], "object"], [0, [4], "O"], [0, 4, "float32"], [0, [4.0], "float32"],
        [-16, [4], "float32"], [8, [4], "float32"], [1 << 62, [4], "float32"], [1 << 80, [4], "float32"],
        [4096, [4], "float32"], [4096 - 8, [4], "float32"], [0, [1 << 40, 1 << 40], "float32"], [0, [-4], "float32"],
        [0, [1] * 65, "float32"], [0, [1] * 33, "float32"], [0, [1 << 63, 0], "float32"], [0, [2049], "float16"],
    ],
)  # fmt: skip
def test_places_outside_of_a_region(serve: Serve, values: Any) -> None:
    service = serve()
    with Raw(service) as raw:
        region = raw.ask(op="region", bytes=4096)["region"]
        for where in ("values", "indices"):
            gradient = {"variable": "b", "values": [0, [4], "float32"], where: values}
            push = {"optimizer": "main", "region": region, "gradients": [gradient]}
            assert "gradient of variable 'b'" in raw.refusal(op="push", **push) or where == "indices"
            assert "error" in raw.ask(op="bind", **push)
    assert service.server.optimizers["main"].adam.iterations == 0
    assert_goes_on(service)


def test_a_binding_is_of_one_optimizer_and_in_one_region(serve: Serve) -> None:
    service = serve(PLAIN + PLAIN.replace("main", "other"))
    gradient = [{"variable": "b", "values": [0, [4], "float32"]}]
    with Raw(service) as raw:
        one, two = (raw.ask(op="region", bytes=4096)["region"] for _ in range(2))
        bind = {"op": "bind", "optimizer": "main", "region": one, "gradients": gradient}
        binding = raw.ask(**bind)["binding"]
        for wrong in ({"region": two}, {"optimizer": "other"}):
            assert "must be of one optimizer and in one region" in raw.refusal(**{**bind, "binding": binding, **wrong})
        assert raw.ask(op="push", binding=binding)["step"] == 1
    assert service.server.optimizers["other"].iterations == 0
    assert_goes_on(service)


def test_answers_that_are_too_large(serve: Serve) -> None:
    service = serve()
    with Raw(service) as raw:
        name = "é" * 15_000
        text = raw.refusal(op="set", optimizer="main", name="learning_rate", value={"class_name": name, "config": {}})
        assert len(text) < 9000
        boundaries = list(range(30_000))
        schedule = {"boundaries": boundaries, "values": [0.1] * 30_001}
        served = service.server.optimizers["main"]
        served.set("learning_rate", {"class_name": "PiecewiseConstantDecay", "config": schedule})
        assert "must fit into a message of 131072 bytes" in raw.refusal(
            op="get", optimizer="main", name="learning_rate"
        )
        assert raw.ask(op="get", optimizer="main", name="beta_1") == {"value": 0.9}
    assert_goes_on(service)


def test_regions_of_others(serve: Serve) -> None:
    service = serve()
    gradient = [{"variable": "b", "values": [0, [4], "float32"]}]
    with Raw(service) as mine, Raw(service) as other:
        region = mine.ask(op="region", bytes=4096)["region"]
        for _ in range(3):
            assert "must be one of this client's own" in other.refusal(
                op="push", optimizer="main", region=region, gradients=gradient
            )
        binding = mine.ask(op="bind", optimizer="main", region=region, gradients=gradient)["binding"]
        assert "must be one of this client's own" in other.refusal(op="push", binding=binding)
        mine.ask(op="free", region=region)
        assert "must be one of this client's own" in mine.refusal(op="push", binding=binding)
    assert_goes_on(service)


def test_limits_of_a_client(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "MOST_BINDINGS", 5)
    monkeypatch.setattr(connection_module, "MOST_REGIONS", 64)
    service = serve("client_memory = 1_000_000\n" + _plain())
    with Raw(service) as raw:
        assert "must take at most 1000000 bytes together" in _until_refused(
            lambda: raw.ask(op="region", bytes=300_000), 4
        )
        for number in (1, 2, 3):
            raw.ask(op="free", region=number)
        assert "and be at most 64" in _until_refused(lambda: raw.ask(op="region", bytes=0), 65)
        gradient = [{"variable": "b", "values": [0, [4], "float32"]}]
        raw.ask(op="free", region=10)
        region = raw.ask(op="region", bytes=4096)["region"]
        bind = {"op": "bind", "optimizer": "main", "region": region, "gradients": gradient}
        assert "the bindings of a client must be at most 5" in _until_refused(lambda: raw.ask(**bind), 6)
    assert_goes_on(service)


def _plain() -> str:
    return "[optimizer.main]\n[optimizer.main.variables]\nw = {shape = [6, 4]}\nb = {shape = [4]}\n"


def _until_refused(ask: Callable[[], dict[str, Any]], times: int) -> str:
    answers = [ask() for _ in range(times)]
    assert ["error" in answer for answer in answers] == [False] * (times - 1) + [True]
    return " ".join(map(str, answers[-1]["error"]))


def test_what_is_no_message(serve: Serve) -> None:
    service = serve()
    deep = b'{"op":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    digits = b'{"op":"region","bytes":' + b"9" * 20_000 + b"}"
    for data in (b"x", b"[]", b"3", b"null", b"\xff\xfe", b'{"op"', b'"hello"', deep, digits, b" " * LARGEST):
        with Raw(service) as raw:
            kind, argument, rule, _, _ = raw.answer(data)["error"]
            assert (kind, argument) == ("ServiceError", "a message"), rule
    with Raw(service) as raw:
        try:
            raw.socket.send(b" " * (LARGEST + 1))
        except OSError:
            return  # so large a datagram cannot be sent here at all
        assert "must be a JSON object of at most" in json.loads(raw.socket.recv(LARGEST))["error"][2]
    assert_goes_on(service)


def test_descriptors_that_a_client_sends_are_closed(serve: Serve) -> None:
    service = serve()
    with Raw(service) as raw:
        before = len(os.listdir("/proc/self/fd"))
        message = json.dumps({"op": "get", "optimizer": "main", "name": "beta_1"}).encode()
        for _ in range(100):
            socket.send_fds(raw.socket, [message], [0, 0, 0])
            assert json.loads(raw.socket.recv(LARGEST)) == {"value": 0.9}
        assert len(os.listdir("/proc/self/fd")) == before
    assert_goes_on(service)


def test_one_that_does_not_read_is_disconnected(serve: Serve) -> None:
    service = serve()
    with Raw(service) as raw:
        raw.socket.setblocking(False)
        message = json.dumps({"op": "config", "optimizer": "main"}).encode()
        is_connected = True
        while is_connected:
            try:
                raw.socket.send(message)
            except BlockingIOError:
                assert_goes_on(service)
            except OSError:
                is_connected = False
        assert_goes_on(service)
    until(lambda: not service.server._connections)


def test_too_many_clients(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_LEAST_SECONDS", 30)  # a refusal that gets lost would end in "must answer"
    service = serve(most_clients=20)
    taken = []
    for _ in range(1000):
        raw = Raw(service, says_hello=False)
        taken.append(raw)
        if len(taken) > 40:
            taken.pop(20).socket.close()
    until(lambda: len([each for each in service.server._connections.values() if each.refusal is None]) == 20)
    for raw in taken[20:]:
        raw.socket.close()
    for patience in (30, *[0] * 50):  # the first one waits for its place in the queue
        with pytest.raises(ServiceError, match=r"the clients must be at most 20 at once .*raise --max-clients"):
            service.connect(patience=patience)
    for raw in taken:
        raw.socket.close()
    service.close_clients()
    until(lambda: not service.server._connections)
    assert_goes_on(service)


def test_indices_that_change_after_the_check(serve: Serve) -> None:
    """What is checked is a copy: the memory of a client may change at any time."""
    service = serve()
    with Raw(service) as raw:
        region = raw.ask(op="region", bytes=4096)["region"]
        served = service.server.optimizers["main"]
        entry = {"variable": "w", "values": [0, [1, 4], "float32"], "indices": [512, [1], "int64"]}
        push = {"optimizer": "main", "region": region, "gradients": [entry]}
        apply = served.adam.apply_gradients

        def hostile(pairs: Any, **options: Any) -> Any:
            memory = next(iter(service.server._connections.values())).memory(region)
            memory[512:520].view(np.int64)[0] = 10**9
            return apply(pairs, **options)

        served.adam.apply_gradients = hostile  # type: ignore[assignment, method-assign]
        assert raw.ask(op="push", **push)["step"] == 1
        served.adam.apply_gradients = apply  # type: ignore[method-assign]
        assert "must lie in [0, 6)" in raw.refusal(op="push", **push)


def test_parameters_cannot_be_written(serve: Serve) -> None:
    service = serve()
    with Raw(service) as raw:
        raw.socket.send(json.dumps({"op": "attach", "optimizer": "main"}).encode())
        _, descriptors, _, _ = socket.recv_fds(raw.socket, LARGEST, 4)
        for descriptor in descriptors:
            size = os.fstat(descriptor).st_size
            with pytest.raises(PermissionError):
                mmap.mmap(descriptor, size)
            with pytest.raises(PermissionError):
                os.write(descriptor, b"x")
            for wrong in (0, 2 * size):
                with pytest.raises(PermissionError):
                    os.ftruncate(descriptor, wrong)
            os.close(descriptor)


def test_only_this_user(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_LEAST_SECONDS", 30)
    service = serve()
    assert stat.S_IMODE(os.stat(service.path).st_mode) == 0o600
    monkeypatch.setattr(service.server, "_users", {os.getuid() + 1})
    with pytest.raises(ServiceError, match=r"the user must be this service's, or one of --allow-uid"):
        service.connect(patience=0)
    shared = serve(allow_users=[os.getuid() + 1])
    assert stat.S_IMODE(os.stat(shared.path).st_mode) == 0o666
    assert_goes_on(shared)


def mutated(rng: random.Random, message: bytes) -> bytes:
    data = bytearray(message)
    for _ in range(rng.randrange(1, 4)):
        kind, place = rng.randrange(4), rng.randrange(len(data) + 1)
        if kind == 0:
            data[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 5)))
        elif kind == 1:
            del data[place : place + rng.randrange(1, 20)]
        elif kind == 2:
            data[place:place] = rng.choice([b"-1", b"1e999", b"null", b"[]", b"{}", b"99999999999999999999", b'"'])
        elif place < len(data):
            data[place] = rng.randrange(256)
    return bytes(data) or b"x"


def test_generated_messages(serve: Serve) -> None:
    """10,000 of them, by clients that come and go, beside one whose steps go on undisturbed."""
    rng = random.Random(0)
    service = serve(most_clients=8)
    main = service.optimizer("good")
    gradient = [{"variable": "b", "values": [0, [4], "float32"]}]
    rows = [{"variable": "w", "values": [0, [2, 4], "float32"], "indices": [512, [2], "int64"]}]
    known = [
        {"op": "hello", "version": 1, "name": "x"},
        {"op": "attach", "optimizer": "main"},
        {"op": "region", "bytes": 4096},
        {"op": "bind", "optimizer": "main", "region": 1, "gradients": gradient},
        {"op": "push", "binding": 2, "read": 3, "loss": 0.5, "scale": 2.0},
        {"op": "push", "optimizer": "main", "region": 1, "gradients": rows},
        {"op": "read", "optimizer": "main", "region": 1, "offset": 0},
        {"op": "get", "optimizer": "main", "name": "beta_1"},
        {"op": "set", "optimizer": "main", "name": "beta_1", "value": 0.9},
        {"op": "config", "optimizer": "main"},
        {"op": "describe", "optimizer": "main"},
        {"op": "unbind", "binding": 2},
        {"op": "free", "region": 1},
    ]
    messages = [json.dumps(message).encode() for message in known]
    sent = refused = 0
    while sent < 10_000:
        with Raw(service, says_hello=rng.random() < 0.9) as raw:
            raw.answer(messages[2])
            for _ in range(rng.randrange(1, 200)):
                message = rng.choice(messages)
                answer = raw.answer(message if rng.random() < 0.3 else mutated(rng, message))
                sent, refused = sent + 1, refused + ("error" in answer)
        if rng.random() < 0.3:
            before = main.iterations
            assert main.apply_gradients([(np.zeros(4, np.float32), main.variables["b"])]) == before + 1
    assert 1000 < refused < 9000
    until(lambda: len(service.server._connections) == 1)
    assert np.isfinite(main.variables["b"].numpy()).all()


def test_a_message_that_does_not_fit(serve: Serve) -> None:
    text = "".join(f"v{n:05} = {{shape = [1]}}\n" for n in range(3000))
    main = serve("[optimizer.main]\n[optimizer.main.variables]\n" + text).optimizer()
    one = np.ones(1, np.float32)
    slices = IndexedSlices(one, [0])
    with pytest.raises(ArgumentValueError, match="what is sent must fit into a message of 131072 bytes"):
        main.apply_gradients([(slices, variable) for variable in main.variables.values()])
    assert main.apply_gradients([(one, variable) for variable in main.variables.values()]) == 1
    with main.gradients() as given:
        for array in given.values():
            array[...] = 1
    assert main.iterations == 2
    assert all(variable.numpy() < 0 for variable in main.variables.values())
