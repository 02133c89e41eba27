"""The host device's compiler, its cache of kernels, and its threads: what is missing, shared, forked, concurrent."""

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import processes
import pytest
from processes import FAILING_STEP, STEP
from reference import Array, assert_same_bits

import gpu_adam
from gpu_adam import Variable
from gpu_adam.devices import HostDevice
from gpu_adam.devices.compiler import cache_directory, command

WITHOUT_ZIG = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "ziglang" else found(name, package)
"""
NOTHING_CHANGED = "[] [1.0, 1.0, 1.0]"


def script(folder: Path, text: str) -> Path:
    """A compiler of our own; "$@" are the arguments, `compile` the real one, in a hurry."""
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\ncompile() {{ {" ".join(command())} "$@" -O0; }}\n{text}\n')
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Path]:
    """A cache that one process has filled, what that process printed, and the log of its compiler's calls."""
    folder = tmp_path_factory.mktemp("warm")
    cxx = script(folder, f'echo "$@" >> {folder}/log; compile "$@"')
    return folder / "cache", processes.run(STEP, GPU_ADAM_CACHE=folder / "cache", CXX=cxx), folder / "log"


def test_no_compiler(tmp_path: Path) -> None:
    """One error, which names the three ways to get one."""
    code = WITHOUT_ZIG + FAILING_STEP
    text = processes.run(code, PATH="", CXX=None, GPU_ADAM_CACHE=tmp_path)
    what, message = text.splitlines()
    assert what == f"DeviceError {NOTHING_CHANGED}"
    assert message.startswith("the host device needs a C++ compiler (got neither $CXX nor g++ nor clang++ nor")
    for way in ("apt install g++", "apt install clang", 'pip install "gpu-adam[zig]"'):
        assert way in message
    assert os.listdir(tmp_path) == []


def test_a_compiler_that_is_not_there(tmp_path: Path) -> None:
    what, message = processes.run(FAILING_STEP, CXX="no-such-compiler -O1", GPU_ADAM_CACHE=tmp_path).splitlines()
    assert what == f"DeviceError {NOTHING_CHANGED}"
    assert message == "CXX must name a C++ compiler (got 'no-such-compiler'); correct it, or unset it."


def test_a_broken_compiler(tmp_path: Path) -> None:
    """The error carries the compiler's log and the call."""
    cxx = script(tmp_path, "echo 'kernel.cpp:1: internal error 42' >&2; exit 3")
    what, *message = processes.run(FAILING_STEP, CXX=cxx, GPU_ADAM_CACHE=tmp_path / "cache").splitlines()
    assert what == f"KernelCompileError {NOTHING_CHANGED}"
    text = "\n".join(message)
    assert "must compile as C++17 (got exit status 3 from" in text
    assert "internal error 42" in text
    assert "set CXX to g++ >= 9 or clang++ >= 10" in text
    assert os.listdir(tmp_path / "cache") == []


def test_a_compiler_that_fails_for_a_kernel_only(tmp_path: Path) -> None:
    """What compiles late fails late, and still nothing has changed: no slots without a step."""
    cxx = script(tmp_path, 'for last; do :; done; grep -q __global__ "$last" && exit 1; compile "$@"')
    what, *message = processes.run(FAILING_STEP, CXX=cxx, GPU_ADAM_CACHE=tmp_path / "cache").splitlines()
    assert message[0].startswith("the kernels of dense.cu must compile as C++17")
    assert what == f"KernelCompileError {NOTHING_CHANGED}"


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = processes.run(FAILING_STEP, GPU_ADAM_CACHE=tmp_path / "file" / "cache")
    what, message = text.splitlines()
    assert what == f"DeviceError {NOTHING_CHANGED}"
    assert message.startswith("the kernel cache must be a writeable directory (got ")
    assert message.endswith("; set GPU_ADAM_CACHE to one that is.")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU_ADAM_CACHE, else gpu_adam in XDG_CACHE_HOME, else in ~/.cache."""
    monkeypatch.setenv("GPU_ADAM_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_directory() == tmp_path / "a"
    monkeypatch.delenv("GPU_ADAM_CACHE")
    assert cache_directory() == tmp_path / "b" / "gpu_adam"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == tmp_path / "c" / ".cache" / "gpu_adam"


def test_a_second_process_compiles_nothing(warm: tuple[Path, str, Path]) -> None:
    cache, printed, log = warm
    files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert files
    assert all(path.suffix == ".so" for path in files)
    calls = log.read_text()
    assert calls.count("kernel.cpp") == len(files)
    assert processes.run(STEP, GPU_ADAM_CACHE=cache, CXX=cache.parent / "compiler") == printed
    assert log.read_text().removeprefix(calls).split() == ["--version"]
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == files


def test_processes_that_start_together(tmp_path: Path, warm: tuple[Path, str, Path]) -> None:
    """Each finds nothing or a whole library, and none leaves anything behind."""
    cxx = warm[0].parent / "compiler"
    together = [processes.start(STEP, GPU_ADAM_CACHE=tmp_path / "cache", CXX=cxx) for _ in range(2)]
    assert [processes.output_of(process) for process in together] == [warm[1]] * 2
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted(
        path.name for path in warm[0].iterdir()
    )


def test_another_compiler_has_files_of_its_own(tmp_path: Path, warm: tuple[Path, str, Path]) -> None:
    """Another command, another version: what one has compiled is not taken for the other's."""
    cache = tmp_path / "cache"
    shutil.copytree(warm[0], cache)
    cxx = script(tmp_path, 'if [ "$1" = --version ]; then echo another 1.0; else compile "$@"; fi')
    assert processes.run(STEP, GPU_ADAM_CACHE=cache, CXX=cxx) == warm[1]
    assert len(list(cache.iterdir())) == 2 * len(list(warm[0].iterdir()))


def test_a_child_after_fork_has_threads_of_its_own() -> None:
    """The parent's do not exist there: a launch that waited for them would wait for ever."""
    code = STEP.replace("range(3)", "range(2)") + """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
child = os.fork()
signal.alarm(60)
optimizer.apply_gradients([(numpy.cos(variable.numpy() + 2), variable)])
print(hashlib.sha256(variable.numpy().tobytes()).hexdigest(), flush=True)
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
else:
    os._exit(0)
"""  # fmt: skip
    alone = processes.run(STEP, GPU_ADAM_THREADS=1)
    before, *after = processes.run(
        "import sys; sys.stdout.reconfigure(line_buffering=True)\n" + code, GPU_ADAM_THREADS=4
    ).splitlines()
    assert before != alone
    assert after == [alone, alone]


def training(seed: int, threads: int) -> Array:
    """What a training becomes whose launches are large enough for several threads."""
    rng = np.random.default_rng(seed)
    variable = Variable(rng.standard_normal(100_000), device=HostDevice(threads=threads))
    optimizer = gpu_adam.Adam(0.1, clipnorm=1.0)
    for _ in range(15):
        optimizer.apply_gradients([(np.cos(variable.value), variable)])
    return variable.numpy()


def test_the_number_of_threads_changes_no_bit() -> None:
    expected = training(0, 1)
    for threads in (2, 3, 8):
        assert_same_bits(training(0, threads), expected, f"{threads} threads")


def test_steps_in_several_threads_at_once() -> None:
    """Each of its own optimizer: they share the pool, and nothing else."""
    expected = [training(seed, 1) for seed in range(4)]
    found: dict[int, Array] = {}

    def run(seed: int) -> None:
        found[seed] = training(seed, 4)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for seed in range(4):
        assert_same_bits(found[seed], expected[seed], f"thread {seed}")
