"""Ranks that fail in a training, and ranks that mean something else: the job ends and says why, or goes on."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import processes
import pytest
from communicators import jobs

import gpu_adam

RANKS = 3

TRAINING = """
import os, random, signal, sys, threading, time
import numpy as np
import gpu_adam
from gpu_adam.communicators import Mpi
from gpu_adam.distributed import ShardedAdam

def train(step):
    optimizer.apply_gradients([(np.full(v.shape, step, v.dtype), v) for v in variables])

with Mpi(device="host", timeout={timeout}) as communicator:
    print("process", os.getpid(), flush=True)
    fails, numbers = communicator.rank == 1, communicator._comm.allgather(os.getpid())
    variables = [gpu_adam.Variable(np.ones(shape, np.float32)) for shape in ((100, 70), (5,), (5000,))]
    optimizer = ShardedAdam(communicator, bucket_bytes=20_000, global_clipnorm=1.0, skip_nonfinite=True)
    for step in range({steps}):
        if step == 3 and fails:
            {fails}
        train(step)
    print("trained", int(optimizer.iterations.numpy()), flush=True)
"""


def ended(folder: Path, fails: str, timeout: float = 300, steps: int = 10**9) -> jobs.Ended:
    """What became of a training in which rank 1 fails, of which no process may be left."""
    job = jobs.run(folder, RANKS, TRAINING.format(fails=fails, timeout=timeout, steps=steps))
    _check_gone(job.out)
    return job


def _check_gone(out: str) -> None:
    found = [int(process) for process in re.findall(r"^process (\d+)", out, re.MULTILINE)]
    assert len(found) == RANKS, out
    deadline = time.monotonic() + 10
    while any(map(jobs.is_alive, found)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(jobs.is_alive, found)), "a process is left behind"


def test_a_training_without_failures(tmp_path: Path) -> None:
    """Which the others are."""
    job = ended(tmp_path, "pass", steps=10)
    assert job.status == 0, job
    assert job.out.count("trained 10") == RANKS


RAISES = """
            class Own(Exception):
                pass
            class Raising:
                left = random.Random({seed}).randrange(900)  # lines of the package that a step executes
                def __call__(self, frame, event, argument):
                    return self.line if "gpu_adam" in frame.f_code.co_filename else None
                def line(self, frame, event, argument):
                    self.left -= 1
                    if self.left == 0:
                        raise Own("of its own")
                    return self.line
            sys.settrace(Raising())"""


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.thorough) for k in (1, 2))])
def test_a_rank_that_raises_anywhere_in_a_step(seed: int, tmp_path: Path) -> None:
    job = ended(tmp_path, RAISES.format(seed=seed))
    assert job.status != 0, job
    assert "Own: of its own" in job.err, job
    assert "Rank 1 of 3 ends the job." in job.err, job
    assert job.err.count("Traceback") == 1, "only the rank that failed says so"


def _delayed(call: str, seconds: float) -> str:
    return f"threading.Timer({seconds}, {call}).start()"


KILLED = "os.kill, (os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.thorough) for k in range(1, 10))])
def test_a_rank_that_is_killed(seed: int, tmp_path: Path) -> None:
    begin = time.monotonic()
    job = ended(tmp_path, _delayed(KILLED, random.Random(seed).uniform(0, 0.2)))
    assert job.status != 0, job
    assert time.monotonic() - begin < jobs.SECONDS / 2
    assert "trained" not in job.out


STOPPED = """
            def go_on():
                time.sleep({seconds})
                os.kill(numbers[1], signal.SIGCONT)
                os._exit(0)
            if not os.fork():
                go_on()
            os.kill(os.getpid(), signal.SIGSTOP)"""


@pytest.mark.thorough
def test_a_rank_that_is_stopped_for_a_while_goes_on(tmp_path: Path) -> None:
    job = ended(tmp_path, STOPPED.format(seconds=1), steps=10)
    assert job.status == 0, job
    assert job.out.count("trained 10") == RANKS


@pytest.mark.thorough
def test_a_rank_that_is_stopped_for_too_long_ends_the_job(tmp_path: Path) -> None:
    job = ended(tmp_path, STOPPED.format(seconds=3), timeout=1, steps=10)
    assert job.status != 0, job
    assert re.search(
        r"DistributedError: rank [02] of 3 must hear from the others within 1 s \(got 1 s\); look for", job.err
    )
    assert "trained" not in job.out


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            "optimizer.set_group(variables[0], weight_decay=0.1)",
            "DistributedError: rank 0 must make the same calls as t",
        ),
        ("optimizer.build([])", "DistributedError: rank 0 must make the same calls as the others"),
        (
            "break",
            "must hear from the others within 1 s (got 1 s); look for a rank that is stopped, slow or at another",
        ),
        ("variables[0] = 5", "AttributeError: 'int' object has no attribute 'shape'"),
    ],
    ids=["a group", "build", "fewer steps", "no variable"],
)
def test_a_rank_that_makes_another_call(call: str, words: str, tmp_path: Path) -> None:
    job = ended(tmp_path, call, timeout=1)
    assert job.status != 0, job
    assert words in job.err, job


@pytest.mark.thorough
def test_an_interrupt_of_one_rank(tmp_path: Path) -> None:
    job = ended(tmp_path, _delayed("os.kill, (os.getpid(), signal.SIGINT)", 0.05))
    assert job.status != 0, job
    assert "KeyboardInterrupt" in job.err, job
    assert "Rank 1 of 3 ends the job." in job.err, job


def test_an_interrupt_of_all(tmp_path: Path) -> None:
    """As a terminal sends it, to the launcher's group of processes."""
    script = tmp_path / "script.py"
    script.write_text(TRAINING.format(fails='print("training", flush=True)', timeout=300, steps=10**9))
    command = [jobs.launcher(), "-n", str(RANKS), sys.executable, str(script)]
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen(command, env=processes.environment(GPU_ADAM_THREADS=1), cwd=tmp_path, **options) as job:
        assert job.stdout is not None
        out = ""
        while "training" not in out:
            out += job.stdout.readline()
        os.killpg(job.pid, signal.SIGINT)
        try:
            out += job.communicate(timeout=jobs.SECONDS)[0]
        except subprocess.TimeoutExpired:
            job.terminate()
            pytest.fail(f"the job hangs:\n{out}{job.communicate()[0]}")
    assert job.returncode != 0
    _check_gone(out)


DISAGREEING = """
import json
from pathlib import Path
import numpy as np
import gpu_adam
from gpu_adam.communicators import Mpi
from gpu_adam.distributed import ShardedAdam
from gpu_adam.errors import DistributedError

OWN = {
    "nothing": {}, "beta_1": {"beta_1": 0.8}, "less": {"global_clipnorm": None}, "more": {"clipvalue": 1.0},
    "deterministic": {"deterministic": True}, "bucket_bytes": {"bucket_bytes": 77}, "shape": {}, "dtype": {},
    "name": {}, "fewer": {}, "order": {}, "version": {}, "gradients": {},
}
found = {}
with Mpi(device="host", timeout=30) as communicator:
    rank, version = communicator.rank, gpu_adam.__version__
    for what, own in OWN.items():
        differs = rank == 1
        variables = [
            gpu_adam.Variable(np.ones(shape, dtype), name=name)
            for shape, dtype, name in [
                ((2, 3), "float32", "a"),
                ((6,) if differs and what == "shape" else (5,), "float16" if differs and what == "dtype" else "float32",
                 "other" if differs and what == "name" else "b"),
                ((4,), "float32", "c"),
            ]
        ]
        variables = variables[:2] if differs and what == "fewer" else variables
        variables = variables[::-1] if differs and what == "order" else variables
        gpu_adam.__version__ = "0.0.1" if differs and what == "version" else version
        optimizer = ShardedAdam(communicator, **{"global_clipnorm": 1.0, **(own if differs else {})})
        halves = differs and what == "gradients"
        try:
            optimizer.apply_gradients([(np.ones(v.shape, "float16" if halves else v.dtype), v) for v in variables])
            found[what] = ""
        except DistributedError as error:
            found[what] = str(error)
            assert int(optimizer.iterations.numpy()) == 0
            assert all(v.numpy().tobytes() == np.ones(v.shape, v.dtype).tobytes() for v in variables)
Path(f"{rank}.json").write_text(json.dumps(found))
"""

DIFFERENT = {
    "nothing": None,
    "beta_1": ("beta_1 = 0.9", "beta_1 = 0.8"),
    "less": ("global_clipnorm = 1.0", "global_clipnorm = None"),
    "more": ("clipvalue = None", "clipvalue = 1.0"),
    "deterministic": ("deterministic = False", "deterministic = True"),
    "bucket_bytes": ("bucket_bytes = 33554432", "bucket_bytes = 77"),
    "shape": ("variable 'b', (5,), float32", "variable 'b', (6,), float32"),
    "dtype": ("variable 'b', (5,), float32", "variable 'b', (5,), float16"),
    "name": ("variable 'b', (5,), float32", "variable 'other', (5,), float32"),
    "fewer": ("variable 'c', (4,), float32", "nothing"),
    "order": ("variable 'a', (2, 3), float32", "variable 'c', (4,), float32"),
    "version": (f"gpu_adam {gpu_adam.__version__}", "gpu_adam 0.0.1"),
    "gradients": ("gradients of float32 for variable 'a'", "gradients of float16 for variable 'a'"),
}
"""What rank 0 has, and rank 1."""


def test_the_first_difference_is_named_on_all_ranks(tmp_path: Path) -> None:
    """And nothing has changed: the same processes go on with other optimizers."""
    job = jobs.run(tmp_path, RANKS, DISAGREEING)
    assert job.status == 0, job
    for rank in range(RANKS):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.keys() == DIFFERENT.keys()
        for what, different in DIFFERENT.items():
            words = ""
            if different is not None:
                rule, remedy = (
                    "must do what rank 0 does",
                    "run the same program with the same arguments in all ranks.",
                )
                words = f"rank 1 {rule}, {different[0]} (got {different[1]}); {remedy}"
            assert found[what] == words, what
