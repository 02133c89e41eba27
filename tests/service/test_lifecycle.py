"""Services as processes: how they begin and end, what kills leave behind, and clients that find them again."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import assert_same_bits

import gpu_adam
from gpu_adam import Adam, Variable
from gpu_adam.errors import ArgumentValueError, CheckpointError, GpuAdamError, ServiceError
from gpu_adam.service import connect
from gpu_adam.service.config import read_config
from gpu_adam.service.listener import Listener
from gpu_adam.service.server import Server
from service.running import PLAIN, SECONDS, InProcess, until

Serve = Callable[..., InProcess]


def descriptors() -> int:
    """How many this process has open, without those that garbage of other tests holds."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def saved(every: str = "", policy: str = "on_push") -> str:
    """A configuration with checkpoints."""
    entries = f'policy = "{policy}"\ncheckpoint = {{directory = "run"{every}}}\n'
    return PLAIN.replace("[optimizer.main.variables]", entries + "[optimizer.main.variables]")


WORKER = """
import sys
import numpy as np
from gpu_adam.service import connect

path, name, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
main = connect(path, name, patience=60).optimizer("main")
rng = np.random.default_rng(int(name[-1]))
for _ in range(steps):
    with main.gradients() as g:
        g["w"][...] = rng.standard_normal((6, 4)) + main.variables["w"]
        g["b"][...] = rng.standard_normal(4)
"""
"""A process that pushes; its gradients depend on what it reads."""


def worker(service: InProcess, name: str, steps: int) -> subprocess.Popen[str]:
    arguments = [str(service.path), name, str(steps)]
    return subprocess.Popen([sys.executable, "-c", WORKER, *arguments], stderr=subprocess.PIPE, text=True)


def expected(names: list[str], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """What one process makes of the same work."""
    w, b = (Variable(np.zeros(shape, np.float32), device="host") for shape in ((6, 4), (4,)))
    adam = Adam(0.01)
    generators = [np.random.default_rng(int(name[-1])) for name in names]
    for _ in range(steps):
        for rng in generators:
            g = (rng.standard_normal((6, 4)) + w.numpy()).astype(np.float32)
            adam.accumulate([(g, w), (rng.standard_normal(4).astype(np.float32), b)])
        adam.apply_gradients()
    return w.numpy(), b.numpy()


def test_processes_have_the_bits_of_one(serve_in_process: Serve) -> None:
    service = serve_in_process(
        PLAIN.replace("[optimizer.main.variables]", 'policy = "all_of=3"\n[optimizer.main.variables]')
    )
    main = service.optimizer("watching")
    workers = [worker(service, name, 50) for name in ("c2", "a0", "b1")]
    for each in workers:
        _, printed = each.communicate(timeout=SECONDS)
        assert each.returncode == 0, printed
    w, b = expected(["a0", "b1", "c2"], 50)
    assert main.iterations == 50
    assert_same_bits(main.variables["w"].numpy(), w)
    assert_same_bits(main.variables["b"].numpy(), b)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.thorough)])
def test_told_to_end(serve_in_process: Serve, number: signal.Signals) -> None:
    service = serve_in_process(saved())
    main = service.optimizer()
    for _ in range(3):
        main.apply_gradients([(np.ones(4, np.float32), main.variables["b"])])
    printed = service.end(number)
    assert printed.startswith("Serving main (on_push) on host at ")
    assert printed.endswith("The service has ended: main after 3 steps.\n")
    assert [each.name for each in (service.directory / "run").iterdir()] == ["step-000000003.npz"]


def test_a_client_finds_a_service_that_is_started_again(serve_in_process: Serve) -> None:
    service = serve_in_process(saved(", every_steps = 1"))
    main, twin = service.optimizer(), Variable(np.zeros(4, np.float32), device="host")
    b, adam = main.variables["b"], Adam(0.01)
    for round_ in range(2):
        for _ in range(4):
            main.apply_gradients([((b + 1).astype(np.float32), b)])
            adam.apply_gradients([((twin + 1).astype(np.float32), twin)])
        service.end()
        assert_same_bits(b.numpy(), twin.numpy())  # before any call of the new one: what is still mapped
        service.start("--resume")
        assert main.learning_rate == 0.01
        assert main.iterations == int(adam.iterations) == 5 * round_ + 4
        with main.gradients() as given:
            given["b"][...] = 1
        adam.apply_gradients([(np.ones(4, np.float32), twin)])
        assert_same_bits(b.numpy(), twin.numpy())


def test_gradients_that_were_written_outlive_the_service(serve_in_process: Serve) -> None:
    service = serve_in_process(saved())
    main = service.optimizer()
    with main.gradients() as given:
        given["b"][...] = 3
        service.end()
        service.start("--resume")
    assert main.iterations == 1
    np.testing.assert_allclose(main.variables["b"].numpy(), -0.01, rtol=1e-4)


def test_a_push_that_waits_is_made_again(serve_in_process: Serve) -> None:
    service = serve_in_process(saved(policy="all_of=2"))
    one, other = service.optimizer("one"), service.optimizer("other")
    ones = np.ones(4, np.float32)
    with ThreadPoolExecutor(1) as pool:
        for end in (service.end, service.kill):
            pushed = pool.submit(one.apply_gradients, [(ones, one.variables["b"])])
            until(lambda: other.describe()["waiting"] == 1)
            done = other.iterations
            end()
            service.start("--resume")
            assert other.apply_gradients([(ones, other.variables["b"])]) == pushed.result() == done + 1
            other.save()


@pytest.mark.thorough
def test_names_after_a_new_start(serve_in_process: Serve) -> None:
    service = serve_in_process(saved())
    first, named = service.connect(), service.connect("named")
    assert (first.name, named.name) == ("client-000001", "named")
    service.end()
    service.start("--resume")
    assert service.connect().name == "client-000001"
    clients = ["client-000001", "client-000002", "named"]
    assert first.optimizer("main").describe()["clients"] == clients[:2]
    assert named.optimizer("main").describe()["clients"] == clients
    assert first.name == "client-000002", "names that the service makes are those of one start"


def test_one_that_only_reads_finds_the_next_service(serve_in_process: Serve) -> None:
    service = serve_in_process(saved(", every_steps = 1"))
    reading, pushing = service.optimizer(), service.optimizer()
    b, g = reading.variables["b"], np.ones(4, np.float32)
    pushing.apply_gradients([(g, pushing.variables["b"])])
    seen = b.numpy()
    service.end()
    assert_same_bits(b.numpy(), seen)
    assert reading.iterations == 1
    service.start("--resume")
    pushing.apply_gradients([(g, pushing.variables["b"])])
    assert reading.iterations == 2
    assert (b.numpy() < seen).all()


@pytest.mark.thorough
def test_other_variables_after_a_new_start(serve_in_process: Serve) -> None:
    two = saved() + saved().replace("main", "other").replace('"run"', '"others"')
    service = serve_in_process(two)
    client = service.connect()
    main, other = client.optimizer("main"), client.optimizer("other")
    main.save(), other.save()
    service.end()
    service.file.write_text(saved() + saved().replace("main", "other").replace('"run"', '"new"').replace("[4]", "[5]"))
    service.start("--resume")
    for _ in range(2):
        with pytest.raises(ServiceError, match="optimizer 'other' must have the variables that it had"):
            other.apply_gradients([(np.ones((6, 4), np.float32), other.variables["w"])])
        assert main.apply_gradients([(np.ones(4, np.float32), main.variables["b"])]) == _ + 1
        assert main.variables["b"].numpy().all()
        assert not main.variables["w"].numpy().any()


def test_the_socket_of_another_service_stays(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first = Listener(path, is_open=False)
    os.unlink(path)  # somebody has removed it
    second = Listener(path, is_open=False)
    first.close()
    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()


def test_two_services_that_start_together(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    os.umask(umask := os.umask(0))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            Listener(path, is_open=False).socket.close()  # as one that was killed
            barrier = threading.Barrier(8)

            def start(barrier: threading.Barrier = barrier) -> Listener | None:
                barrier.wait()
                with contextlib.suppress(ArgumentValueError):
                    return Listener(path, is_open=False)
                return None

            started = [each for each in pool.map(lambda _: start(), range(8)) if each is not None]
            assert len(started) == 1
            assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
            started[0].close()
    assert os.umask(umask) == umask, "which is that of all threads"


def test_a_start_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-000000001.npz").write_bytes(b"")
    config = tmp_path / "service.toml"
    config.write_text(PLAIN.replace("main", "first") + saved())
    before = descriptors()
    for _ in range(5):
        with pytest.raises(ArgumentValueError, match="must have no checkpoints without --resume"):
            Server(read_config(config), tmp_path / "socket")
    assert descriptors() == before
    assert not (tmp_path / "socket").exists()


def test_a_restore_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    """Not the directory either: the next service, whose variables fit, has it."""
    config = tmp_path / "service.toml"
    config.write_text(saved())
    first = Server(read_config(config), tmp_path / "socket")
    first.optimizers["main"].save()
    first.close()
    before = descriptors()
    config.write_text(saved().replace("[6, 4]", "[6, 5]"))
    for _ in range(3):
        with pytest.raises(CheckpointError):
            Server(read_config(config), tmp_path / "socket", resume=True)
    assert descriptors() == before
    config.write_text(saved())
    Server(read_config(config), tmp_path / "socket", resume=True).close()


def test_a_directory_has_one_service(serve_in_process: Serve, tmp_path: Path) -> None:
    service = serve_in_process(saved())
    service.connect()
    with pytest.raises(ArgumentValueError, match="directory must be no other service's"):
        Server(read_config(service.file), tmp_path / "another", resume=True)
    service.kill()
    other = Server(read_config(service.file), tmp_path / "another", resume=True)
    other.close()


def test_one_checkpoint_that_fails_does_not_take_the_others(serve_in_process: Serve) -> None:
    service = serve_in_process(saved() + saved().replace("main", "other").replace('"run"', '"others"'))
    for name in ("main", "other"):
        optimizer = service.connect().optimizer(name)
        optimizer.apply_gradients([(np.ones(4, np.float32), optimizer.variables["b"])])
    shutil.rmtree(service.directory / "run")
    service.process.terminate()
    printed, _ = service.process.communicate(timeout=SECONDS)
    assert service.process.returncode != 0
    assert "optimizer 'main' could not finish" in printed
    assert [each.name for each in (service.directory / "others").iterdir()] == ["step-000000001.npz"]


@pytest.mark.thorough
def test_a_service_that_did_nothing_saves_nothing(serve_in_process: Serve) -> None:
    service = serve_in_process(saved())
    service.connect()
    service.end()
    service.start()
    service.connect()
    service.end()


def test_a_client_whose_process_has_a_child(serve_in_process: Serve) -> None:
    service = serve_in_process()
    watching = service.optimizer("watching")
    code = (
        "import os, sys, time\nfrom gpu_adam.service import connect\nmain = connect(sys.argv[1]).optimizer('main')\n"
        "if os.fork() == 0:\n    b = main.variables['b'].numpy()\n    try:\n        main.learning_rate\n"
        "    except Exception as error:\n        print(error, flush=True)\n    time.sleep(60)\n"
        "else:\n    time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(service.path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert "must be used by the process that connected" in process.stdout.readline()
    process.kill()
    until(lambda: watching.describe()["clients"] == ["watching"])
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_service_that_does_not_say_hello(tmp_path: Path) -> None:
    listener = Listener(tmp_path / "socket", is_open=False)
    start = time.monotonic()
    with pytest.raises(ServiceError, match=r"must answer within 0.3 s"):
        connect(listener.path, patience=0.3)
    with pytest.raises(ServiceError, match="must be reachable"):
        connect(tmp_path / ("x" * 200))
    assert time.monotonic() - start < SECONDS / 2
    listener.close()


def test_a_service_that_stays_away(serve_in_process: Serve) -> None:
    service = serve_in_process()
    main = service.connect(patience=SECONDS).optimizer("main")
    main._client._patience = 0.3
    service.end()
    with pytest.raises(
        ServiceError, match=r"the service at .* must answer within 0.3 s .*gpu-adam serve --config FILE"
    ):
        main.apply_gradients([(np.ones(4, np.float32), main.variables["b"])])
    with pytest.raises(ServiceError, match="must answer within"):
        _ = main.learning_rate
    assert not main.variables["b"].numpy().any(), "what is mapped can still be read"


def test_starts_that_are_refused(serve_in_process: Serve, tmp_path: Path) -> None:
    service = serve_in_process(saved())
    service.connect().optimizer("main").save()

    def refusal(file: Path, path: Path, **options: Any) -> str:
        with pytest.raises(GpuAdamError) as refused:
            Server(read_config(file), path, **options)
        return str(refused.value)

    assert f"must be free (got another service answers at {service.path})" in refusal(service.file, service.path)
    file, free = tmp_path / "file", tmp_path / "free"
    file.write_text("kept")
    assert "must be free, or an old socket's" in refusal(service.file, file)
    assert file.read_text() == "kept"
    assert "must have at most 107 bytes" in refusal(service.file, tmp_path / ("x" * 120))
    assert "must be a path where a socket can be made" in refusal(service.file, tmp_path / "no" / "s")
    assert "must have no checkpoints without --resume" in refusal(service.file, free)
    assert not free.exists()
    plain = tmp_path / "plain.toml"
    plain.write_text(PLAIN)
    assert "must have an entry checkpoint to resume from" in refusal(plain, free, resume=True)
    assert service.connect().optimizer("main").iterations == 0


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    arguments = ["--config", str(tmp_path / "nonesuch.toml"), "--socket", str(tmp_path / "s")]
    found = subprocess.run(
        [sys.executable, "-m", "gpu_adam", "serve", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert found.returncode != 0
    assert "nonesuch.toml" in found.stderr
    assert "Traceback" not in found.stderr


def digest(main: Any) -> str:
    return hashlib.sha256(main.variables["w"].numpy().tobytes() + main.variables["b"].numpy().tobytes()).hexdigest()


def trajectory(steps: int) -> list[str]:
    """What the state is after 0, 1, 2, ... steps of gradients of one."""
    w, b = (Variable(np.zeros(shape, np.float32), device="host") for shape in ((6, 4), (4,)))
    adam = Adam(0.01)
    found = []
    for _ in range(steps + 1):
        found.append(hashlib.sha256(w.numpy().tobytes() + b.numpy().tobytes()).hexdigest())
        adam.apply_gradients([(np.ones((6, 4), np.float32), w), (np.ones(4, np.float32), b)])
    return found


PUSHING = """
import sys
from gpu_adam.service import connect
main = connect(sys.argv[1], patience=60).optimizer("main")
print("ready", flush=True)
while True:
    with main.gradients() as g:
        g["w"].fill(7)
        g["b"].fill(7)
        g["w"].fill(1)
        g["b"].fill(1)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.thorough)])
def test_killed_clients_leave_whole_steps(serve_in_process: Serve, kills: int) -> None:
    service, rng = serve_in_process(), random.Random(kills)
    main = service.optimizer()
    descriptors = len(os.listdir(f"/proc/{service.process.pid}/fd"))
    for _ in range(kills):
        client = subprocess.Popen([sys.executable, "-c", PUSHING, str(service.path)], stdout=subprocess.PIPE, text=True)
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        time.sleep(rng.random() * 0.02)
        client.kill()
        client.communicate()
    until(lambda: len(main.describe()["clients"]) == 1)
    done = main.iterations
    assert digest(main) == trajectory(done)[done]
    assert len(os.listdir(f"/proc/{service.process.pid}/fd")) == descriptors
    service.end()


@pytest.mark.parametrize("kills", [1, pytest.param(30, marks=pytest.mark.thorough)])
def test_killed_services_leave_whole_checkpoints(serve_in_process: Serve, kills: int) -> None:
    service, rng = serve_in_process(saved(", every_steps = 5, keep = 2")), random.Random(kills)
    main = service.optimizer()
    ones = {name: np.ones(variable.shape, np.float32) for name, variable in main.variables.items()}
    expected = trajectory(400 * kills)

    def push() -> None:
        main.apply_gradients([(ones[name], variable) for name, variable in main.variables.items()])

    for _ in range(kills):
        end = time.monotonic() + rng.random() * 0.05
        while time.monotonic() < end:
            push()
        known = main.iterations
        service.kill()
        service.start("--resume")
        main.pause()  # waits for the service
        main.resume()
        assert known - 5 - 5 <= main.iterations <= known, "two intervals: the last file may not have been whole yet"
        assert digest(main) == expected[main.iterations]
        push()
    service.end()
    assert len(os.listdir(service.directory / "run")) <= 3
    assert sorted(os.listdir(service.directory)) == ["run", "service.toml"]


@pytest.mark.thorough
def test_memory_stays_flat(serve_in_process: Serve) -> None:
    """More steps, clients and regions do not take more memory (100,000 steps by hand: profiling/service.py)."""
    service = serve_in_process()

    def work() -> None:
        for _ in range(20):
            main = service.optimizer()
            for _ in range(50):
                main.apply_gradients([(np.ones(4, np.float32), main.variables["b"])])
            main.apply_gradients([(gpu_adam.IndexedSlices(np.ones((5, 4), np.float32), [0] * 5), main.variables["w"])])
            main._client.close()

    def used() -> int:
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0])

    work()
    before = used()
    for _ in range(3):
        work()
    assert used() - before < 1024, "KiB"
    service.end()
