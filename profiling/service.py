"""What does a push through a service take, beside a local step, an HTTP body, and a queue between processes?

    python profiling/service.py                    payloads of 4 KiB to 64 MiB, in about two minutes
    python profiling/service.py --quick            two small payloads: whether it works
    python profiling/service.py --json profiling/results/service.json
    python profiling/service.py --soak             besides, 8 processes for 60 s, and what one process makes of the same
                                                   work; 100,000 steps, and what they leave in memory

Every candidate steps a variable of its own by the same gradient; all take turns. A time begins when the gradient is
there and ends when the step is done and known to be: the gradient is written into shared memory before it begins, for
there it would be computed. `memory` is what one copy of the gradient takes.

    local        Adam.apply_gradients in this process
    service      the end of `with main.gradients()`
    service, +copy   main.apply_gradients, which copies the gradient into shared memory
    messages     a push's message and its answer, through a process that does nothing else: the least that two take
    HTTP         the gradient as the body of a POST to a server of http.server on loopback, which steps
    queue        the gradient through multiprocessing.Queue to a process that steps
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import http.server
import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import gpu_adam
from gpu_adam import Adam, Variable
from gpu_adam.bench.tables import duration, markdown
from gpu_adam.devices import find_device
from gpu_adam.service import RemoteOptimizer, connect
from gpu_adam.service.messages import ConnectionLostError, Receiver, send

KIB, MIB = 2**10, 2**20
PAYLOADS = [4 * KIB, 64 * KIB, MIB, 16 * MIB, 64 * MIB]
HEADER = ["payload", "candidate", "p50", "p99", "p99.9", "pushes/s", "GB/s", "times local"]

Push = Callable[[], object]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small payloads, few pushes")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each payload and candidate")
    parser.add_argument("--soak", action="store_true", help="besides, 8 processes, 100,000 steps")
    parser.add_argument("--json", type=Path, help="a file for the results")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seconds = 0.05
    results: dict[str, Any] = {"facts": facts()}
    results["payloads"] = [of_payload(n, options.seconds) for n in (PAYLOADS[:2] if options.quick else PAYLOADS)]
    if options.soak:
        seconds, steps = (1.0, 500) if options.quick else (60.0, 100_000)
        results["soak"] = {"processes": of_processes(seconds), "memory": of_memory(steps)}
    results["facts"]["load after"] = os.getloadavg()
    print(tables(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def tables(results: dict[str, Any]) -> str:
    """What was found, for people."""
    found = results["facts"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    loads = f"load {found['load before'][0]:.1f} to {found['load after'][0]:.1f}"
    parts = [f"{found['processor']}, {found['cores']} cores, {found['date']}, {loads}; {versions}."]
    parts.append(markdown(HEADER, rows(results["payloads"])))
    if "soak" in results:
        worked, memory = results["soak"]["processes"], results["soak"]["memory"]
        parts.append(
            f"{worked['processes']} processes, synchronous, {worked['seconds']:.0f} s, {worked['steps']} steps: "
            f"{worked['elements that differ']} of 10,000 elements differ from what one process makes of the same work. "
            f"After {memory['steps']} steps the service has {memory['KiB more']['service']} KiB more, "
            f"a client {memory['KiB more']['client']}."
        )
    return "\n\n".join(parts)


def facts() -> dict[str, Any]:
    """Where and when this is measured."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": dict(find_device("host").facts())["processor"],
        "cores": len(os.sched_getaffinity(0)),
        "load before": os.getloadavg(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "gpu_adam": gpu_adam.__version__},
    }


def of_payload(nbytes: int, seconds: float) -> dict[str, Any]:
    """The times of pushes of so many bytes, for each candidate."""
    gradient = np.ones(nbytes // 4, np.float32)
    copy = np.empty_like(gradient)
    with contextlib.ExitStack() as opened:
        candidates: dict[str, Push] = {
            "memory": functools.partial(np.copyto, copy, gradient),
            "local": local(gradient),
            **opened.enter_context(served(gradient)),
            "messages": opened.enter_context(by_messages()),
            "HTTP": opened.enter_context(by_http(gradient)),
            "queue": opened.enter_context(by_queue(gradient)),
        }
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for push in candidates.values():
            push()
        turns = 5
        for _ in range(turns):
            for name, push in candidates.items():
                end = time.perf_counter() + seconds / turns
                while (start := time.perf_counter()) < end:
                    push()
                    times[name].append(time.perf_counter() - start)
    return {"bytes": nbytes, "times": {name: summary(each) for name, each in times.items()}}


def summary(times: list[float]) -> dict[str, float]:
    """Quantiles, where there are enough times for them."""
    ordered = sorted(times)
    found = {"pushes": float(len(times)), "mean": statistics.fmean(times), "p50": ordered[len(ordered) // 2]}
    for name, share in (("p99", 0.99), ("p99.9", 0.999)):
        if len(times) * (1 - share) >= 1:
            found[name] = ordered[int(len(ordered) * share)]
    return found


def rows(payloads: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Of the table."""
    for each in payloads:
        base = each["times"]["local"]["p50"]
        for name, found in each["times"].items():
            quantiles = [duration(found[q]) if q in found else "too few" for q in ("p50", "p99", "p99.9")]
            rate = f"{1 / found['mean']:.0f}"
            speed = "" if name == "messages" else f"{each['bytes'] / found['mean'] / 1e9:.2f}"
            yield [size(each["bytes"]), name, *quantiles, rate, speed, f"{found['p50'] / base:.2f}"]


def size(nbytes: int) -> str:
    """So many bytes, for people."""
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


# The candidates.


def local(gradient: np.ndarray) -> Push:
    """A step in this process."""
    variable, adam = Variable(np.zeros_like(gradient), device="host"), Adam(0.01)
    return lambda: adam.apply_gradients([(gradient, variable)])


@contextlib.contextmanager
def service(config: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A service of a configuration: its socket, and its process."""
    with tempfile.TemporaryDirectory() as directory:
        file, path = Path(directory, "service.toml"), str(Path(directory, "socket"))
        file.write_text(config)
        command = [sys.executable, "-m", "gpu_adam", "serve", "--config", str(file), "--socket", path]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                yield path, process
            finally:
                process.terminate()


def config_of(shape: list[int], policy: str = "on_push") -> str:
    """A service with one variable."""
    optimizer = f'device = "host"\n[optimizer.main]\npolicy = "{policy}"\nconfig = {{learning_rate = 0.01}}\n'
    return f"{optimizer}[optimizer.main.variables]\nw = {{shape = {shape}}}\n"


@contextlib.contextmanager
def served(gradient: np.ndarray) -> Iterator[dict[str, Push]]:
    """A push into a service."""
    with service(config_of(list(gradient.shape))) as (path, _), connect(path, patience=60) as client:
        optimizer = client.optimizer("main")
        with optimizer.gradients() as given:
            given["w"][...] = gradient
        variable = optimizer.variables["w"]
        yield {
            "service": functools.partial(push_what_is_there, optimizer),
            "service, +copy": lambda: optimizer.apply_gradients([(gradient, variable)]),
        }


def push_what_is_there(optimizer: RemoteOptimizer) -> None:
    """Push the gradient that lies in shared memory."""
    with optimizer.gradients() as given:
        given["w"]


def answer_messages(end: socket.socket) -> None:
    """The process at the other end of `by_messages`."""
    receiver, answer = Receiver(), {"step": 123456, "staleness": 0}
    with contextlib.suppress(ConnectionLostError):
        while True:
            receiver.receive_with_descriptors(end)
            send(end, answer)


@contextlib.contextmanager
def by_messages() -> Iterator[Push]:
    """A message and its answer, read and written as the service and its clients do."""
    mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = multiprocessing.get_context("spawn").Process(target=answer_messages, args=(other,), daemon=True)
    process.start()
    other.close()
    receiver, message = Receiver(), {"op": "push", "binding": 3, "read": 123456}

    def push() -> None:
        send(mine, message)
        receiver.receive_with_descriptors(mine)

    yield push
    mine.close()
    process.join()


class Stepping(http.server.BaseHTTPRequestHandler):
    """Steps by the body of each POST."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    step: Callable[[np.ndarray], int]

    def do_POST(self) -> None:
        """Step."""
        body = bytearray(int(self.headers["Content-Length"]))
        view = memoryview(body)
        while view:
            view = view[self.rfile.readinto(view) :]
        answer = str(type(self).step(np.frombuffer(body, np.float32))).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def stepper(elements: int) -> Callable[[np.ndarray], int]:
    """A function that steps a variable of its own by a gradient."""
    variable, adam = Variable(np.zeros(elements, np.float32), device="host"), Adam(0.01)
    return lambda gradient: int(adam.apply_gradients([(gradient, variable)]) or 0)


def step_for_http(elements: int, port: Any) -> None:
    """The process at the other end of `by_http`."""
    Stepping.step = staticmethod(stepper(elements))
    server = http.server.HTTPServer(("127.0.0.1", 0), Stepping)
    port.send(server.server_port)
    server.serve_forever()


@contextlib.contextmanager
def by_http(gradient: np.ndarray) -> Iterator[Push]:
    """A POST over one connection."""
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    process = context.Process(target=step_for_http, args=(gradient.size, other), daemon=True)
    process.start()
    connection = http.client.HTTPConnection("127.0.0.1", mine.recv())
    body = gradient.view(np.uint8).data

    def push() -> None:
        connection.request("POST", "/", body, {"Content-Length": str(len(body))})
        connection.getresponse().read()

    yield push
    connection.close()
    process.kill()
    process.join()


def step_for_queue(elements: int, gradients: Any, answers: Any) -> None:
    """The process at the other end of `by_queue`."""
    step = stepper(elements)
    while True:
        answers.put(step(gradients.get()))


@contextlib.contextmanager
def by_queue(gradient: np.ndarray) -> Iterator[Push]:
    """A gradient through one queue, the answer through another."""
    context = multiprocessing.get_context("spawn")
    gradients, answers = context.Queue(), context.Queue()
    process = context.Process(target=step_for_queue, args=(gradient.size, gradients, answers), daemon=True)
    process.start()

    def push() -> None:
        gradients.put(gradient)
        answers.get()

    yield push
    process.kill()
    process.join()


# What lasts.

WORKER = """
import sys, time
import numpy as np
from gpu_adam.service import connect

path, number, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
main = connect(path, f"worker-{number}", patience=60).optimizer("main")
rng, end = np.random.default_rng(number), time.time() + seconds
steps = 0
while True:
    with main.gradients() as g:
        # All stop at the same step: the one after which the first has no time left.
        g["w"][...] = rng.standard_normal(10_000) + main.variables["w"]
    steps += 1
    if main.variables["stop"].numpy() < 0:
        break
    if number == 0 and time.time() > end:
        with main.gradients() as g:
            g["w"][...] = rng.standard_normal(10_000) + main.variables["w"]
            g["stop"][...] = 1
        steps += 1
        break
print(steps)
"""


def of_processes(seconds: float, number: int = 8) -> dict[str, Any]:
    """Processes that push together for a time, and one that does the same work: are all bits equal?"""
    config = config_of([10_000], f"all_of={number}") + "stop = {shape = []}\n"
    with service(config) as (path, _), connect(path, patience=60) as client:
        start = time.perf_counter()
        command = [sys.executable, "-c", WORKER, path]
        workers = [
            subprocess.Popen([*command, str(n), str(seconds)], stdout=subprocess.PIPE, text=True) for n in range(number)
        ]
        counts = [int(each.communicate()[0]) for each in workers]
        taken = time.perf_counter() - start
        found = client.optimizer("main")
        result, steps = found.variables["w"].numpy(), found.iterations
    w, adam = Variable(np.zeros(10_000, np.float32), device="host"), Adam(0.01)
    generators = [np.random.default_rng(n) for n in range(number)]
    for _ in range(steps):
        for rng in generators:
            adam.accumulate([((rng.standard_normal(10_000) + w.value).astype(np.float32), w)])
        adam.apply_gradients()
    differing = int((w.numpy().view(np.uint32) != result.view(np.uint32)).sum())
    return {"processes": number, "seconds": taken, "steps": steps, "counts": counts, "elements that differ": differing}


def of_memory(steps: int) -> dict[str, Any]:
    """How much more memory a service and a client take after so many steps, in KiB."""
    with service(config_of([1000])) as (path, process), connect(path, patience=60) as client:
        optimizer = client.optimizer("main")
        pids = {"service": process.pid, "client": os.getpid()}
        before: dict[str, int] = {}
        for step in range(steps + 1000):
            if step == 1000:  # what is made once is there
                before = {name: anonymous(pid) for name, pid in pids.items()}
            with optimizer.gradients() as given:
                given["w"][...] = 1
        more = {name: anonymous(pid) - before[name] for name, pid in pids.items()}
    return {"steps": steps, "KiB more": more}


def anonymous(pid: int) -> int:
    """Anonymous memory of a process, in KiB."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")[2].split()[0])


if __name__ == "__main__":
    main()
