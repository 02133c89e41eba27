"""The host device's compiler: what is missing or mistaken; that bits and denormal numbers are ours; its threads."""

import os
import shlex
import signal
import threading
import time
from pathlib import Path

import numpy as np
import processes
import pytest
from processes import FAILING_STEP, STEP, compiler_script
from reference import Array, assert_same_bits

import gpu_adam
from gpu_adam import Variable
from gpu_adam.devices import HostDevice, compiler

WITHOUT_ZIG = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "ziglang" else found(name, package)
"""
NOTHING_CHANGED = "[] [1.0, 1.0, 1.0]"


def failure(folder: Path, cxx: object, prelude: str = "") -> tuple[str, str]:
    """The class and the message of the error of a first step, which changes nothing and leaves nothing in the cache."""
    what, _, message = processes.run(prelude + FAILING_STEP, CXX=cxx, GPU_ADAM_CACHE=folder / "cache").partition("\n")
    assert what.endswith(f" {NOTHING_CHANGED}")
    assert not (folder / "cache").exists() or os.listdir(folder / "cache") == []
    return what.removesuffix(f" {NOTHING_CHANGED}"), message


def test_no_compiler(tmp_path: Path) -> None:
    """One error, which names the three ways to get one, the one that always works as a line to copy."""
    code = WITHOUT_ZIG + FAILING_STEP
    what, *message = processes.run(code, PATH="", CXX=None, GPU_ADAM_CACHE=tmp_path).splitlines()
    assert what == f"DeviceError {NOTHING_CHANGED}"
    assert message[0].startswith("the host device needs a C++ compiler (got neither $CXX nor g++ nor clang++ nor")
    assert 'pip install -e ".[zig]" && gpu-adam demo' in message
    assert message[-1] == "or g++ (apt install g++), or clang++ (apt install clang)."
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("cxx", "message"),
    [
        ("no-such-compiler -O1", "CXX must name a C++ compiler (got 'no-such-compiler'); correct it, or unset it."),
        ("/", "CXX must name a C++ compiler (got '/'); correct it, or unset it."),
        ("'' -O1", "CXX must name a C++ compiler (got ''); correct it, or unset it."),
        (
            "g++ '-O1",
            'CXX must be words as a shell reads them (got "g++ \'-O1": No closing quotation); correct it, or unset it.',
        ),
        (
            "g++ \\",
            "CXX must be words as a shell reads them (got 'g++ \\\\': No escaped character); correct it, or unset it.",
        ),
    ],
)
def test_words_that_are_no_compiler(tmp_path: Path, cxx: str, message: str) -> None:
    assert failure(tmp_path, cxx) == ("DeviceError", message)


def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "text").chmod(0o755)
    what, message = failure(tmp_path, tmp_path / "text")
    assert what == "DeviceError"
    assert message.startswith("the C++ compiler must start (got [Errno 8] Exec format error: ")
    assert message.endswith("; set CXX to another one, g++ >= 9 or clang++ >= 10.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("echo 'kernel.cpp:1: internal error 42' >&2; exit 3", ["exit status 3 from ", "internal error 42"]),
        ("kill -9 $$", ["exit status -9 from "]),
        ("printf 'caf\\351\\n' >&2; exit 1", ["exit status 1 from ", "caf\N{REPLACEMENT CHARACTER}"]),
        ("exit 0", ["exit status 0 and no library from "]),
    ],
)
def test_a_broken_compiler(tmp_path: Path, text: str, expected: list[str]) -> None:
    """The error carries the call and the compiler's log, whatever bytes that is."""
    what, message = failure(tmp_path, compiler_script(tmp_path, text))
    assert what == "KernelCompileError"
    assert message.startswith(f"the address look-up must compile as C++17 (got {expected[0]}")
    assert all(part in message for part in expected)
    assert "set CXX to another one, g++ >= 9 or clang++ >= 10" in message


@pytest.mark.parametrize("text", [': > "$out"', 'echo garbage > "$out"', 'compile -c "$@"'])
def test_what_is_no_library(tmp_path: Path, text: str) -> None:
    """An empty file, garbage, an object file: not kept."""
    find = 'for word; do [ "$last" = -o ] && out=$word; last=$word; done'
    what, message = failure(tmp_path, compiler_script(tmp_path, f"{find}\n{text}"))
    assert what == "KernelCompileError"
    assert message.startswith("the address look-up must become a library that loads (got ")
    assert message.endswith(", or TMPDIR to a directory from which code may run.")


def test_a_compiler_that_fails_for_a_kernel_only(tmp_path: Path) -> None:
    """What compiles late fails late, and still nothing has changed: no slots without a step."""
    cxx = compiler_script(tmp_path, 'for last; do :; done; grep -q __global__ "$last" && exit 1; compile "$@"')
    what, *message = processes.run(FAILING_STEP, CXX=cxx, GPU_ADAM_CACHE=tmp_path / "cache").splitlines()
    assert message[0].startswith("the kernels of dense.cu must compile as C++17")
    assert what == f"KernelCompileError {NOTHING_CHANGED}"


@pytest.mark.parametrize("condition", ["true", '[ "$1" != --version ]'])
def test_a_compiler_that_hangs(tmp_path: Path, condition: str) -> None:
    """It is ended after a while, with what it has started and what holds its output open."""
    hang = f"sleep 1000 & echo $! > {tmp_path}/child; wait"
    cxx = compiler_script(tmp_path, f'{condition} && {{ {hang}; }}; compile "$@"')
    shortly = "from gpu_adam.devices import compiler\nassert compiler.LIMIT == 120\ncompiler.LIMIT = 0.5\n"
    what, message = failure(tmp_path, cxx, shortly)
    assert what == "DeviceError"
    assert message.startswith(f"the C++ compiler must end within 0.5 s (got {cxx} ")
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not alive(child):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("what the compiler started runs on")


def alive(process: int) -> bool:
    """Whether it runs; one that has ended may still wait for its parent to ask."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


ARITHMETIC = """
import hashlib, numpy, gpu_adam
results, rng = hashlib.sha256(), numpy.random.default_rng(0)
for special, optimizer in (False, gpu_adam.Adam(0.1, global_clipnorm=0.7)), (True, gpu_adam.Adam(0.1, epsilon=0)):
    w = gpu_adam.Variable(rng.standard_normal(1000).astype("float32"))
    for _ in range(10):
        gradient = rng.standard_normal(1000).astype("float32")
        if special:
            gradient[:9] = [numpy.nan, numpy.inf, -numpy.inf, 1e-40, -0.0, 0, 1e30, 1, -1]
        optimizer.apply_gradients([(gradient, w)])
    for array in w.numpy(), *optimizer.get_weights()[1:]:
        results.update(array.tobytes())
numbers = [numpy.float32(1e-40), numpy.float64(1e-310)]
print(results.hexdigest(), [float(number * type(number)(1)) for number in numbers])
"""
"""Prints what depends on every bit, and denormal numbers times one, computed by NumPy in the thread of the steps."""


@pytest.fixture(scope="module")
def expected() -> str:
    """What it prints where $CXX, too, asks for IEEE arithmetic."""
    printed = processes.run(ARITHMETIC, CXX=f"{shlex.join(compiler.command())} -fno-fast-math -ffp-contract=off")
    assert printed.endswith("[9.99994610111476e-41, 1e-310]")
    return printed


@pytest.mark.thorough
@pytest.mark.parametrize(
    "options",
    [
        "-ffast-math",
        "-funsafe-math-optimizations -fno-signed-zeros",
        "-fassociative-math -freciprocal-math -fno-signed-zeros -fno-trapping-math -ffinite-math-only",
        "-ffp-contract=fast -O1 -Wall -Wextra -pedantic -Werror -fvisibility=hidden",
    ],
)
def test_options_in_cxx_change_no_bit(expected: str, options: str) -> None:
    """Nor do they turn denormal numbers off in the rest of the process."""
    assert processes.run(ARITHMETIC, CXX=f"{shlex.join(compiler.command())} {options}") == expected


def test_a_compiler_without_the_cxx_library(expected: str, tmp_path: Path) -> None:
    """CXX=gcc, or clang, links none; our sources need none."""
    cxx = compiler_script(tmp_path, 'case "$*" in *.cpp) set -- "$@" -nodefaultlibs -lc -lgcc;; esac; compile "$@" -O3')
    assert processes.run(ARITHMETIC, CXX=cxx, GPU_ADAM_CACHE=tmp_path / "cache") == expected


def test_clang_links_no_cxx_library(tmp_path: Path) -> None:
    """Zig, which is one, would build it first."""
    without = 'for word; do shift; [ "$word" = -nostdlib++ ] || set -- "$@" "$word"; done; compile "$@"'
    told = f'echo "$@" >> {tmp_path}/log; {without}'
    cxx = compiler_script(tmp_path, f'if [ "$1" = --version ]; then echo Some clang version 99; else {told}; fi')
    processes.run(STEP, CXX=cxx, GPU_ADAM_CACHE=tmp_path / "cache")
    calls = (tmp_path / "log").read_text().splitlines()
    assert len(calls) >= 3
    assert all(" -nostdlib++ " in call for call in calls)


@pytest.mark.parametrize("option", ["-ffast-math", "-ffinite-math-only"])
def test_a_compiler_that_insists_on_other_arithmetic(tmp_path: Path, option: str) -> None:
    """Words that it adds behind ours hold. What computes is refused; what does not leaves denormal numbers alone."""
    cxx = compiler_script(tmp_path, f'compile "$@" {option}')
    code = """
import numpy
from gpu_adam.devices import host
host._pool()
print(float(numpy.float64(1e-310) * numpy.float64(1)))
"""
    assert processes.run(code, CXX=cxx, GPU_ADAM_CACHE=tmp_path / "cache") == "1e-310"
    what, message = processes.run(FAILING_STEP, CXX=cxx, GPU_ADAM_CACHE=tmp_path / "cache").split("\n", 1)
    assert what == f"KernelCompileError {NOTHING_CHANGED}"
    assert "the compiler relaxes arithmetic, and results would have other bits" in message


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


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are kept apart on Linux alone")
@pytest.mark.parametrize("most", [1, 2])
def test_the_pool_keeps_from_the_processor_of_the_caller(most: int) -> None:
    """A thread may use the caller's processors but one, or the only one. The caller itself goes where it likes."""
    code = f"""
import os
allowed = set(sorted(os.sched_getaffinity(0))[:{most}])
os.sched_setaffinity(0, allowed)
{STEP}
masks = {{int(task): os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")}}
assert masks.pop(os.getpid()) == allowed
assert min(map(len, masks.values())) == max(1, len(allowed) - 1), (allowed, masks)
"""
    processes.run(code, GPU_ADAM_THREADS=2)


def test_threads_without_work_sleep() -> None:
    """Whatever they have looked for meanwhile: a process that waits for a second uses next to no time of processors."""
    idle = """
import time
before = time.process_time()
time.sleep(1)
print(time.process_time() - before)
"""
    assert float(processes.run(STEP + idle, GPU_ADAM_THREADS=3).splitlines()[-1]) < 0.5


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
