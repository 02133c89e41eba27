"""The service over HTTP: what the endpoints tell and change, who may ask, how much, figures for Prometheus."""

# ruff: noqa: E402  (what needs the extra is imported where it is installed)

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed (extra: serve)")
httpx = pytest.importorskip("httpx", reason="httpx is not installed (extra: dev)")

from prometheus_client.parser import text_string_to_metric_families

from gpu_adam import Adam
from gpu_adam.devices.telemetry import Reading, Telemetry
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.service import Client, control_plane, endpoints, gatekeeper
from gpu_adam.service.config import read_config
from gpu_adam.service.control_plane import ControlPlane
from gpu_adam.service.metrics import Metrics
from gpu_adam.service.server import Server
from service.browser import CHROMIUM, Browser
from service.running import SECONDS, InProcess, InThread, until

pytestmark = pytest.mark.no_device

CONFIG = """
[optimizer.main]
config = {learning_rate = 0.01, telemetry = true}
checkpoint = {directory = "run"}
[optimizer.main.variables]
w = {shape = [3, 2]}
b = {shape = [2], dtype = "float64"}
[optimizer.careful]
config = {learning_rate = 0.5, skip_nonfinite = true}
[optimizer.careful.variables]
w = {shape = [4]}
[optimizer.plain.variables]
w = {shape = [4]}
"""
TOKEN = "correct-horse-battery"
FOUR_PARTS = {"error", "argument", "rule", "got", "remedy", "message"}


class Served(InThread):
    """A service in a thread of this process, with a control plane.

    Args:
        directory: for all its files.
        token: what requests must bring, or None.
    """

    def __init__(self, directory: Path, token: str | None = None) -> None:
        super().__init__(directory, CONFIG)
        token_file = None if token is None else written(directory / "token", token)
        self.plane = ControlPlane(self.server, "127.0.0.1:0", token_file)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.http = httpx.Client(base_url=self.plane.address, headers=headers, timeout=SECONDS)

    def get(self, path: str) -> Any:
        """What an endpoint answers."""
        answer = self.http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def figures(self) -> dict[str, dict[str, float]]:
        """What Prometheus would have: values by name and optimizer."""
        found: dict[str, dict[str, float]] = {}
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                assert (sample.labels["gpu"], sample.labels["UUID"]) == ("", "")
                found.setdefault(sample.name, {})[sample.labels["optimizer"]] = sample.value
        return found

    def connection(self) -> socket.socket:
        """A connection to the port."""
        return socket.create_connection(self.plane._socket.getsockname()[:2], timeout=SECONDS)

    def begin_to_end(self) -> None:
        """Have the service finish, and do not wait for it."""
        self._is_over = True
        self.server.call(lambda: None)

    def close(self) -> None:
        """End clients, control plane and service."""
        self.http.close()
        self.plane.close()
        super().close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    service = Served(tmp_path)
    yield service
    service.close()


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Served]:
    service = Served(tmp_path, TOKEN)
    yield service
    service.close()


def written(path: Path, token: str, mode: int = 0o600) -> Path:
    path.write_text(token + "\n")
    path.chmod(mode)
    return path


def refusal(answer: Any, status: int) -> dict[str, str]:
    """What a failure says, which has four parts and their sentence."""
    assert answer.status_code == status, answer.text
    found: dict[str, str] = answer.json()
    assert set(found) == FOUR_PARTS
    assert found["message"] == f"{found['argument']} {found['rule']} (got {found['got']}); {found['remedy']}."
    return found


def push(client: Client, name: str, value: float, loss: float | None = None) -> None:
    """A step of an optimizer, all of whose gradients have this value."""
    optimizer = client.optimizer(name)
    pairs = [(np.full(each.shape, value, each.dtype), each) for each in optimizer.variables.values()]
    optimizer.apply_gradients(pairs, loss=loss)


# What is told.


def test_it_lives_and_is_ready(served: Served) -> None:
    assert served.get("/v1/health/live") == {"status": "live"}
    assert served.get("/v1/health/ready") == {"status": "ready"}


def test_an_optimizer_is_described(served: Served) -> None:
    client = served.connect("actor-0")
    push(client, "main", 2.0, loss=0.75)
    found = served.get("/v1/optimizers/main")
    assert found["name"] == "main"
    assert (found["policy"], found["steps"], found["pushes"], found["loss"]) == ("on_push", 1, 1, 0.75)
    assert (found["learning_rate"], found["paused"], found["clients"]) == (0.01, False, ["actor-0"])
    assert found["telemetry"]["grad_norm"] == pytest.approx(2 * np.sqrt(8))
    quiet = served.get("/v1/optimizers/plain")
    assert (quiet["steps"], quiet["steps_per_second"], quiet["parameter_bytes"], quiet["clients"]) == (0, 0.0, 512, [])
    assert {name for name, value in quiet.items() if value is None} == {
        *("step_seconds", "staleness", "loss", "checkpoint_age_seconds", "nonfinite_steps", "telemetry"),
    }
    assert [each["name"] for each in served.get("/v1/optimizers")] == ["main", "careful", "plain"]


def test_variables_have_names_shapes_and_dtypes(served: Served) -> None:
    assert served.get("/v1/optimizers/main/variables") == [
        {"name": "w", "shape": [3, 2], "dtype": "float32"},
        {"name": "b", "shape": [2], "dtype": "float64"},
    ]


def test_the_service_tells_who_is_there(served: Served) -> None:
    assert served.get("/v1/service")["clients"] == []
    first, _ = served.connect("actor-0"), served.connect("actor-1")
    push(first, "plain", 1.0)
    until(lambda: served.get("/v1/service")["clients"] == ["actor-0", "actor-1"])
    found = served.get("/v1/service")
    assert (found["device"], found["gpu"]) == ("host", None)
    assert found["client_bytes"] > 0
    assert served.get("/v1/optimizers/plain")["clients"] == ["actor-0"]
    first.close()
    until(lambda: served.get("/v1/optimizers/plain")["clients"] == [])


def test_the_gpu_tells_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading(sm_mhz=1700, memory_mhz=None, watts=250.5, joules=1.0, celsius=61, throttles=("power cap",))
    stand_in = SimpleNamespace(read=lambda: reading, names=lambda: ("3", "GPU-12"))
    monkeypatch.setattr(Telemetry, "open", lambda device: stand_in)
    served = Served(tmp_path)
    try:
        said = {"watts": 250.5, "sm_mhz": 1700, "memory_mhz": None, "celsius": 61, "throttles": ["power cap"]}
        assert served.get("/v1/service")["gpu"] == said
        monkeypatch.setattr(served.server.device, "name", "cuda:1")
        assert endpoints.Access(served.server)._names() == ("3", "GPU-12")
        monkeypatch.setattr(stand_in, "names", lambda: None)
        assert endpoints.Access(served.server)._names() == ("1", served.server.device.identity)
    finally:
        monkeypatch.undo()
        served.close()


def test_a_loss_without_a_number_in_json_is_null(served: Served) -> None:
    push(served.connect("actor-0"), "plain", 1.0, loss=float("nan"))
    assert served.get("/v1/optimizers/plain")["loss"] is None


# What is changed.


def test_hyperparameters_are_read_and_assigned(served: Served) -> None:
    path = "/v1/optimizers/main/hyperparameters"
    values = {each["name"]: each["value"] for each in served.get(path)}
    assert (values["learning_rate"], values["beta_2"], values["clipnorm"], values["amsgrad"]) == (
        0.01,
        0.999,
        None,
        False,
    )
    for name, value in (("learning_rate", 0.25), ("clipnorm", 2.0), ("amsgrad", True), ("clipnorm", None)):
        answer = served.http.put(f"{path}/{name}", json={"value": value})
        assert (answer.status_code, answer.json()) == (200, {"name": name, "value": value})
        assert served.get(f"{path}/{name}") == {"name": name, "value": value}
    assert served.connect("actor-0").optimizer("main").learning_rate == 0.25


def test_a_schedule_may_be_assigned(served: Served) -> None:
    schedule = {
        "class_name": "ExponentialDecay",
        "config": {"initial_learning_rate": 0.5, "decay_steps": 1, "decay_rate": 0.5, "staircase": False, "name": None},
    }
    path = "/v1/optimizers/plain/hyperparameters/learning_rate"
    assert served.http.put(path, json={"value": schedule}).json()["value"]["class_name"] == "ExponentialDecay"
    client = served.connect("actor-0")
    for rate in (0.5, 0.25, 0.125):
        assert served.get("/v1/optimizers/plain")["learning_rate"] == rate
        push(client, "plain", 1.0)


def test_what_is_refused_locally_is_refused_with_the_same_sentence(served: Served) -> None:
    wrong = {"beta_1": 1.5, "learning_rate": "fast", "clipnorm": -1, "epsilon": None, "amsgrad": 3, "decay": [1]}
    for name, value in wrong.items():
        with pytest.raises((ArgumentTypeError, ArgumentValueError)) as local:
            setattr(Adam(), name, value)
        path = f"/v1/optimizers/main/hyperparameters/{name}"
        before = served.get(path)
        found = refusal(served.http.put(path, json={"value": value}), 422)
        assert (found["error"], found["message"]) == (type(local.value).__name__, str(local.value))
        assert served.get(path) == before


def test_a_paused_optimizer_keeps_pushes(served: Served) -> None:
    client = served.connect("actor-0")
    assert served.http.post("/v1/optimizers/plain/pause").json()["paused"] is True
    thread = threading.Thread(target=push, args=(client, "plain", 1.0))
    thread.start()
    until(lambda: served.get("/v1/optimizers/plain")["waiting"] == 1)
    assert served.get("/v1/optimizers/plain")["steps"] == 0
    assert served.http.post("/v1/optimizers/plain/resume").json()["paused"] is False
    thread.join()
    assert served.get("/v1/optimizers/plain")["steps"] == 1


def test_a_checkpoint_is_written_now(served: Served) -> None:
    push(served.connect("actor-0"), "main", 1.0)
    answer = served.http.post("/v1/optimizers/main/checkpoint")
    assert answer.status_code == 200
    assert Path(answer.json()["path"]).is_file()
    assert served.get("/v1/optimizers/main")["checkpoint_age_seconds"] >= 0


def test_a_checkpoint_that_cannot_be_written_is_a_sentence(served: Served) -> None:
    assert "entry checkpoint" in refusal(served.http.post("/v1/optimizers/plain/checkpoint"), 409)["message"]
    directory = served.directory / "run"
    directory.mkdir(exist_ok=True)
    directory.rename(served.directory / "elsewhere")
    directory.write_text("a file")
    assert "checkpoint must be written" in refusal(served.http.post("/v1/optimizers/main/checkpoint"), 500)["message"]
    directory.unlink()
    directory.mkdir()


def test_what_does_not_exist_is_refused(served: Served) -> None:
    assert "main, careful, plain" in refusal(served.http.get("/v1/optimizers/other"), 404)["rule"]
    refusal(served.http.get("/nothing"), 404)
    answer = served.http.delete("/v1/optimizers/main")
    refusal(answer, 405)
    assert answer.headers["Allow"] == "GET"
    path = "/v1/optimizers/main/hyperparameters"
    assert served.http.patch(f"{path}/decay").headers["Allow"] == "GET, PUT"
    assert "learning_rate" in refusal(served.http.get(f"{path}/colour"), 422)["rule"]
    bodies: list[Any] = [{}, [], {"value": 1, "colour": 2}]
    for body in bodies:
        refusal(served.http.put(f"{path}/learning_rate", json=body), 422)
    refusal(
        served.http.put(f"{path}/learning_rate", content=b"\xff{", headers={"Content-Type": "application/json"}), 400
    )
    deep = b'{"value":' * 400 + b"1" + b"}" * 400
    refusal(served.http.put(f"{path}/learning_rate", content=deep, headers={"Content-Type": "application/json"}), 422)


def test_a_service_at_work_is_not_waited_for_endlessly(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was not done in time is not done later."""
    monkeypatch.setattr(endpoints, "CALL_SECONDS", 0.1)
    step_is_done = threading.Event()
    served.server.call(step_is_done.wait)
    path = "/v1/optimizers/main/hyperparameters/learning_rate"
    assert "at work" in refusal(served.http.put(path, json={"value": 0.125}), 503)["got"]
    step_is_done.set()
    monkeypatch.undo()
    assert served.get(path)["value"] == 0.01


# Events, and the end.


def events(answer: Any) -> Iterator[Any]:
    """What events say: their data, or their name."""
    for line in answer.iter_lines():
        if line.startswith("data: {") and line != "data: {}":
            yield json.loads(line.removeprefix("data: "))
        elif line.startswith("event: "):
            yield line


def test_events_tell_what_happens(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "EVENT_SECONDS", 0.02)
    client = served.connect("actor-0")
    with served.http.stream("GET", "/v1/events") as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        stream = events(answer)
        assert next(stream)["service"]["clients"] == ["actor-0"]
        push(client, "plain", 1.0, loss=0.5)
        found = next(each for event in stream for each in event["optimizers"][2:] if each["steps"])
        assert (found["name"], found["loss"]) == ("plain", 0.5)


def test_so_many_streams_are_served(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "MOST_STREAMS", 2)
    monkeypatch.setattr(endpoints, "EVENT_SECONDS", 0.02)
    with served.http.stream("GET", "/v1/events") as one, served.http.stream("GET", "/v1/events") as two:
        streams = [events(one), events(two)]  # which end with the iterators
        assert all(next(stream) for stream in streams)
        assert "at most 2" in refusal(served.http.get("/v1/events"), 503)["rule"]

    def is_served() -> bool:
        with served.http.stream("GET", "/v1/events") as again:
            return bool(again.status_code == 200)

    until(is_served)  # those that are closed make room


def test_a_service_that_ends_is_not_ready_and_ends_its_streams(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "EVENT_SECONDS", 0.02)
    is_finished = threading.Event()
    finish = served.server.optimizers["main"].finish
    monkeypatch.setattr(served.server.optimizers["main"], "finish", lambda: (is_finished.wait(SECONDS), finish()))
    with served.http.stream("GET", "/v1/events") as answer:
        stream = events(answer)
        next(stream)
        served.begin_to_end()
        *_, last = stream
        assert last == "event: end"
    assert "ending" in refusal(served.http.get("/v1/health/ready"), 503)["rule"]
    assert served.get("/v1/health/live") == {"status": "live"}
    for path in ("/v1/optimizers", "/v1/events", "/metrics"):
        refusal(served.http.get(path), 503)
    is_finished.set()


def test_closing_ends_streams_and_the_thread(served: Served) -> None:
    host, port = served.plane._socket.getsockname()
    with served.http.stream("GET", "/v1/events") as answer:
        stream = events(answer)
        next(stream)
        served.plane.close()
        assert list(stream)[-1] == "event: end"
    assert not served.plane._thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port))


# Figures.


def test_figures_count(served: Served) -> None:
    client = served.connect("actor-0")
    names = ("main", "careful", "plain")
    before = served.figures()
    assert before["gpu_adam_steps_total"] == dict.fromkeys(names, 0)
    assert "gpu_adam_checkpoint_age_seconds" not in before
    assert before["gpu_adam_clients"] == dict.fromkeys(names, 0)
    for value in (1.0, np.nan, 1.0):
        for name in names:
            push(client, name, value)
    push(client, "plain", 1.0)
    client.optimizer("main").save()
    found = served.figures()
    assert not [name for name in found if name.endswith("_created")]
    assert found["gpu_adam_steps_total"] == {"main": 3, "careful": 3, "plain": 4}
    assert found["gpu_adam_step_duration_seconds_count"] == {"main": 3, "careful": 3, "plain": 4}
    assert all(0 < seconds < SECONDS for seconds in found["gpu_adam_step_duration_seconds_sum"].values())
    assert found["gpu_adam_nonfinite_gradients_total"] == {"main": 1, "careful": 1}
    assert found["gpu_adam_clients"] == dict.fromkeys(names, 1)
    assert set(found["gpu_adam_checkpoint_age_seconds"]) == {"main"}
    assert served.figures()["gpu_adam_nonfinite_gradients_total"] == {"main": 1, "careful": 1}


def test_figures_have_the_labels_of_dcgm_exporter(tmp_path: Path) -> None:
    (tmp_path / "service.toml").write_text(CONFIG)
    server = Server(read_config(tmp_path / "service.toml", "host"), tmp_path / "socket")
    try:
        text = Metrics(server, "3", "GPU-1234").text().decode()
    finally:
        server.close()
    assert 'gpu_adam_steps_total{UUID="GPU-1234",gpu="3",optimizer="main"} 0.0' in text
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert samples
    assert all('UUID="GPU-1234",gpu="3",' in line for line in samples)


# Who may ask.


def test_a_token_is_demanded_of_all_but_the_page_and_health(guarded: Served) -> None:
    for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": TOKEN}):
        for path in ("/v1/optimizers", "/v1/events", "/metrics", "/v1/openapi.json", "/nothing"):
            answer = httpx.get(guarded.plane.address + path, headers=headers)
            assert refusal(answer, 401)["argument"] == "the request"
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        for path in ("/v1/health/live", "/v1/health/ready", "/"):
            assert httpx.get(guarded.plane.address + path, headers=headers).status_code == 200
        url = f"{guarded.plane.address}/v1/optimizers/main/hyperparameters/learning_rate"
        refusal(httpx.put(url, headers=headers, json={"value": 1.0}), 401)
    assert guarded.get("/v1/optimizers/main")["learning_rate"] == 0.01
    assert guarded.http.get("/v1/optimizers", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
    assert TOKEN not in guarded.http.get("/v1/openapi.json").text


def test_a_token_is_demanded_under_any_name_of_the_machine(guarded: Served) -> None:
    assert guarded.http.get("/v1/optimizers", headers={"Host": "gpu-box.example:8080"}).status_code == 200


def test_pages_that_name_servers_lead_here_are_refused(served: Served) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1:80", "[::2]", "[", ""):
        for path in ("/v1/optimizers", "/", "/v1/health/live"):
            assert refusal(served.http.get(path, headers={"Host": host}), 403)["argument"] == "the header Host"
    for host in ("localhost", "localhost:1", "127.0.0.1", "127.1.2.3:99", "[::1]:5"):
        assert served.http.get("/v1/optimizers", headers={"Host": host}).status_code == 200


def test_other_pages_cannot_change_anything(served: Served) -> None:
    path = "/v1/optimizers/plain/pause"
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://["):
        assert refusal(served.http.post(path, headers={"Origin": origin}), 403)["argument"] == "the header Origin"
    assert served.get("/v1/optimizers/plain")["paused"] is False
    assert "access-control-allow-origin" not in served.http.get("/v1/optimizers", headers={"Origin": "null"}).headers
    assert served.http.post(path, headers={"Origin": served.plane.address}).status_code == 200


def test_bodies_are_short(served: Served) -> None:
    path = "/v1/optimizers/main/hyperparameters/learning_rate"
    long = b'{"value": 0.5' + b" " * gatekeeper.MOST_BODY + b"}"
    refusal(served.http.put(path, content=long, headers={"Content-Type": "application/json"}), 413)
    refusal(served.http.put(path, content=iter([long]), headers={"Content-Type": "application/json"}), 413)
    assert served.get(path)["value"] == 0.01
    with served.connection() as connection:  # nobody waits for a body that is announced to be long
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_bodies_come_soon(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gatekeeper, "BODY_SECONDS", 0.1)
    with served.connection() as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_connections_without_requests_are_closed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_plane, "IDLE_SECONDS", 0.2)
    whole = b"GET /v1/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for sent in (b"", whole[:30], whole, whole + whole[:30]):
        with served.connection() as connection, contextlib.suppress(ConnectionResetError):
            connection.sendall(sent)
            while connection.recv(4096):
                pass
    until(lambda: not served.plane._server.server_state.connections)


def test_headers_are_short(served: Served) -> None:
    with served.connection() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * (2 * control_plane.MOST_HEADER))
        assert connection.recv(100).startswith(b"HTTP/1.1 4")


def test_so_many_connections_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_plane, "MOST_CONNECTIONS", 4)
    served = Served(tmp_path)
    try:
        connections = [served.connection() for _ in range(40)]
        until(lambda: len(served.plane._server.server_state.connections) == 8)
        for connection in connections:
            connection.close()
        until(lambda: not served.plane._server.server_state.connections)
        assert served.get("/v1/health/live") == {"status": "live"}
    finally:
        served.close()


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "127.0.0.1:x", ":80", "127.0.0.1:99999", "no.such.host.invalid:0", ""]
)
def test_an_address_that_is_none_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(ArgumentValueError, match="--http"):
        control_plane._listening(address, needs_loopback=True)


def test_others_reach_it_with_a_token_only() -> None:
    for address in ("0.0.0.0:0", "[::]:0"):
        with pytest.raises(ArgumentValueError, match="loopback address where no token"):
            control_plane._listening(address, needs_loopback=True)
    listener = control_plane._listening("0.0.0.0:0", needs_loopback=False)
    with listener, pytest.raises(ArgumentValueError, match="Address already in use"):
        control_plane._listening(f"127.0.0.1:{listener.getsockname()[1]}", needs_loopback=True)
    control_plane._listening("localhost:0", needs_loopback=True).close()


def test_a_token_that_others_know_or_guess_is_refused(tmp_path: Path) -> None:
    assert gatekeeper.read_token(written(tmp_path / "good", TOKEN)) == TOKEN.encode()
    for mode in (0o640, 0o604, 0o644):
        with pytest.raises(ArgumentValueError, match="this user's alone"):
            gatekeeper.read_token(written(tmp_path / f"{mode:o}", TOKEN, mode))
    for text in ("", "x" * 15, "two words, as it is", "correct-hörse-battery"):
        with pytest.raises(ArgumentValueError, match="at least 16 visible ASCII characters") as refused:
            gatekeeper.read_token(written(tmp_path / "bad", text))
        assert not text or text not in str(refused.value)
    with pytest.raises(FileNotFoundError):
        gatekeeper.read_token(tmp_path / "none")


# What is there to read.


def test_the_description_is_complete(served: Served) -> None:
    document = served.get("/v1/openapi.json")
    operations = [each for path in document["paths"].values() for each in path.values()]
    assert len({each["operationId"] for each in operations}) == len(operations) == 14
    for each in operations:
        assert each["summary"]
        assert each["description"]
        for status, answer in each["responses"].items():
            (content,) = answer["content"].values()
            is_failure = content["schema"].get("$ref") == "#/components/schemas/Failure"
            assert is_failure == (int(status) >= 400)
            assert content["schema"]
        assert all(parameter["description"] for parameter in each.get("parameters", []))
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert "securitySchemes" not in document["components"]


def test_the_description_tells_of_the_token(guarded: Served) -> None:
    document = guarded.get("/v1/openapi.json")
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    for path, methods in document["paths"].items():
        for each in methods.values():
            assert (each.get("security") == [{"HTTPBearer": []}]) == (not path.startswith("/v1/health"))


def test_the_page_needs_nothing_from_elsewhere(served: Served) -> None:
    answer = served.http.get("/")
    assert answer.headers["Content-Type"].startswith("text/html")
    assert set(re.findall(r"https?://[^\"']*", answer.text)) == {"http://www.w3.org/2000/svg"}
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


# The command.


def address_of(service: InProcess) -> str:
    """Where the control plane of a process is."""
    assert service.process.stdout is not None
    line = service.process.stdout.readline()
    match = re.search(r" and (http://\S+);", line)
    assert match is not None, line
    return match[1]


def test_the_command_serves_and_ends_with_status_0(serve_in_process: Callable[..., InProcess]) -> None:
    service = serve_in_process(CONFIG, "--http", "127.0.0.1:0", "--device", "host")
    address = address_of(service)
    with httpx.stream("GET", f"{address}/v1/events") as answer:
        stream = events(answer)
        next(stream)
        assert "after 0 steps" in service.end()
        assert list(stream)[-1] == "event: end"


def command(directory: Path, *arguments: str, **environment: str) -> str:
    """What the command prints that fails."""
    (directory / "service.toml").write_text(CONFIG)
    call = [sys.executable, "-m", "gpu_adam", "serve", "--config", str(directory / "service.toml"), "--device", "host"]
    ended = subprocess.run(
        [*call, "--socket", str(directory / "socket"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        env={**os.environ, "COLUMNS": "500", **environment},
    )
    assert ended.returncode == 1, ended
    assert not os.path.lexists(directory / "socket")
    return ended.stdout + ended.stderr


def test_the_command_refuses_in_a_sentence(tmp_path: Path) -> None:
    assert "loopback address where no token" in command(tmp_path, "--http", "0.0.0.0:0")
    assert "--token-file must come with --http" in command(tmp_path, "--token-file", str(tmp_path / "token"))
    (tmp_path / "fastapi.py").write_text("raise ImportError('No module named fastapi')")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    printed = command(tmp_path, "--http", "127.0.0.1:0", PYTHONPATH=path)
    assert 'pip install "gpu-adam[serve]"' in printed
    assert len(printed.splitlines()) == 1


# What takes long.


@pytest.mark.thorough
def test_schemathesis_finds_nothing(serve_in_process: Callable[..., InProcess], tmp_path: Path) -> None:
    """Requests that the description allows and forbids get what it promises, whoever sends them.

    Not asked: that each assignment of the right type is taken, for what a hyperparameter may be depends on which one it
    is; and for the stream, which does not end.
    """
    pytest.importorskip("schemathesis", reason="schemathesis is not installed (extra: dev)")
    token = written(tmp_path / "token", TOKEN)
    service = serve_in_process(CONFIG, "--http", "127.0.0.1:0", "--device", "host", "--token-file", str(token))
    address = address_of(service)
    ended = subprocess.run(
        [
            *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"),
            *(f"{address}/v1/openapi.json", "--header", f"Authorization: Bearer {TOKEN}", "--no-color"),
            *("--checks", "all", "--exclude-checks", "positive_data_acceptance", "--exclude-path", "/v1/events"),
            *("--max-examples", "50", "--seed", "1", "--workers", "1"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=10 * SECONDS,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"Operations:\s+13 selected / 14 total", ended.stdout), ended.stdout
    assert "Traceback" not in service.end()


@pytest.mark.thorough
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_shows_and_changes_a_service(guarded: Served, tmp_path: Path) -> None:
    client = guarded.connect("actor-0")
    push(client, "main", 2.0, loss=0.75)
    browser = Browser(tmp_path / "profile")

    def text(number: int) -> str:
        """What the card of an optimizer says."""
        found: str = browser.run(f"document.querySelectorAll('section')[{number}].innerText")
        return found

    def click(card: int, button: int) -> None:
        browser.run(f"document.querySelectorAll('section')[{card}].querySelectorAll('button')[{button}].click()")

    def set_rate(value: str) -> None:
        browser.run(f"document.querySelector('section input').value = {value!r}")
        click(0, 2)

    try:
        browser.open(f"{guarded.plane.address}/")
        browser.until("!document.getElementById('door').hidden")
        browser.run(f"document.getElementById('token').value = {TOKEN!r}")
        browser.run("document.getElementById('door').requestSubmit()")
        browser.until("document.querySelectorAll('section').length === 3")
        assert browser.run("document.getElementById('state').innerText") == "live"
        for shown in ("main", "on_push", "1 steps", "loss\n0.75", "learning rate\n0.01", "actor-0", "gradient norm"):
            assert shown in text(0)
        assert "gradient norm" not in text(2)

        push(client, "main", 2.0, loss=0.5)
        browser.until("document.querySelector('section').innerText.includes('loss\\n0.5')")
        assert browser.run("document.querySelector('section path.line').getAttribute('d')").startswith("M")

        set_rate("0.25")
        browser.until("document.querySelector('.note').innerText === 'The learning rate is 0.25.'")
        assert guarded.get("/v1/optimizers/main")["learning_rate"] == 0.25
        set_rate("fast")
        with pytest.raises(ArgumentTypeError) as local:
            Adam().learning_rate = "fast"
        browser.until(f"document.querySelector('.note').innerText === {json.dumps(str(local.value))}")

        click(2, 0)
        until(lambda: guarded.get("/v1/optimizers/plain")["paused"])
        browser.until("document.querySelectorAll('section')[2].querySelector('button').innerText === 'Resume'")
        click(2, 0)
        until(lambda: not guarded.get("/v1/optimizers/plain")["paused"])
        click(0, 1)
        until(lambda: guarded.get("/v1/optimizers/main")["checkpoint_age_seconds"] is not None)
        browser.until("document.querySelector('.note').innerText.startsWith('Written: ')")

        browser("Emulation.setDeviceMetricsOverride", width=320, height=800, deviceScaleFactor=1, mobile=True)
        assert browser.run("document.documentElement.scrollWidth") == 320
        browser.open(f"{guarded.plane.address}/#token={TOKEN}")  # the same page: it is the address of its beginning
        browser("Page.reload")
        browser.until("document.querySelectorAll('section').length === 3")
        assert browser.run("location.hash") == ""

        guarded.plane.close()
        browser.until("document.getElementById('state').className === 'gone'")
        assert all(url.startswith((guarded.plane.address, "data:")) for url in browser.requests)
        said = [each for each in browser.complaints if "Failed to load resource" not in each]
        assert not said  # nothing was thrown, and nothing that the page has is against its policy
    finally:
        browser.close()
