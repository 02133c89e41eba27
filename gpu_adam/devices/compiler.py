"""From a kernel's source text to a library of machine code: the host device's compiler and how it is called."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from gpu_adam import kernels
from gpu_adam.devices.base import PACK_BYTES
from gpu_adam.errors import DeviceError, KernelCompileError
from gpu_adam.kernels import Source

ANOTHER = "set CXX to another one, g++ >= 9 or clang++ >= 10"
"""What to do about a compiler."""

LIMIT = 120
"""Seconds that a call of the compiler may take."""

_X86 = platform.machine() == "x86_64"

# They stand behind the words of $CXX: of two options that contradict each other, compilers take the last.
_FLAGS = [
    *("-std=c++17", "-O3", "-march=native"),
    # The bits: whatever $CXX or the compiler's defaults allow, arithmetic is IEEE's, in the order of the source. Each
    # option by its own name, for GCC lets -fno-fast-math take back what -ffast-math set, and nothing else.
    *("-fno-fast-math", "-fno-unsafe-math-optimizations", "-fno-associative-math", "-fno-reciprocal-math"),
    *("-fsigned-zeros", "-fno-finite-math-only", *(["-mfpmath=sse"] if _X86 else [])),
    # No contraction to multiply-add. The speed: without errno and traps the loops become vector code.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # 16-byte packs look at arrays of numbers, as they do in CUDA.
    "-fno-strict-aliasing",
    # Where a processor has 64-byte vectors: float64's flushing in software takes a fifth less time in them.
    *(["-mprefer-vector-width=512"] if _X86 else []),
]
_LIBRARY = [
    *("-shared", "-fPIC", "-pthread", "-fvisibility=default"),
    "-w",  # for a $CXX with -Werror: nobody reads warnings here
    # Nothing of the C++ library: zig would build it first, for 45 s, and gcc does not link it.
    "-fno-exceptions",
    # Without the start files, of which crtfastmath.o, for -ffast-math or -mdaz-ftz, would turn denormal numbers off in
    # the thread that loads the library, and so in NumPy.
    "-nostartfiles",
]


def command() -> list[str]:
    """The C++ compiler's command: ``$CXX``, g++, clang++ or the wheel ziglang, the first found.

    Raises:
        DeviceError: where there is none.
    """
    words = os.environ.get("CXX", "")
    try:
        given = shlex.split(words)
    except ValueError as error:
        rule = "must be words as a shell reads them"
        raise DeviceError("CXX", rule, f"{words!r}: {error}", "correct it, or unset it") from error
    if given:
        if shutil.which(given[0]) is None:
            raise DeviceError("CXX", "must name a C++ compiler", repr(given[0]), "correct it, or unset it")
        return given
    for name in ("g++", "clang++"):
        if shutil.which(name) is not None:
            return [name]
    if importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    raise DeviceError(
        "the host device",
        "needs a C++ compiler",
        "neither $CXX nor g++ nor clang++ nor the package ziglang",
        'install one as a wheel:\n\npip install -e ".[zig]" && gpu-adam demo\n\n'
        "or g++ (apt install g++), or clang++ (apt install clang)",
    )


def flags() -> list[str]:
    """The options that make a kernel's bits and its speed."""
    return list(_FLAGS)


def source_text(source: Source, *, faithful: bool) -> str:
    """The kernel's source as plain C++: a shim before it, an entry point for each kernel behind it."""
    shim = "faithful.h" if faithful else "fast.h"
    pack = "sizeof(GPU_ADAM_STORED)" if not faithful else str(PACK_BYTES)
    entries = "".join(f"GPU_ADAM_ENTRY({name})\n" for name in kernels.kernel_names(source.file))
    defines = "".join(f"#define {define.replace('=', ' ', 1)}\n" for define in source.defines)
    return f'{defines}#define GPU_ADAM_PACK_BYTES {pack}\n#include "{shim}"\n{source.text}{entries}'


def identity(text: str) -> bytes:
    """All that decides what the library of a source text is: the text, the compiler and its call, the processor."""
    call = command()
    shims = [path.read_text() for path in sorted((kernels.directory() / "host").glob("*.h"))]
    parts = (text, *shims, *_call(call), compiler_version(tuple(call)), processor_name(full=True))
    return "\0".join(parts).encode(errors="surrogateescape")


def compile_library(text: str, what: str, work: Path, kept: Path) -> Path:
    """Compile a source text.

    Args:
        text: C++17 that needs nothing of the C++ library.
        what: the text, in an error's words.
        work: directory for the source, the library and all that the compiler writes on the way.
        kept: directory in which the compiler may keep files of its own; zig does.

    Returns:
        The library, in `work`.

    Raises:
        KernelCompileError: the compiler fails, or makes no file.
        DeviceError: it does not start, or does not end.
    """
    source, library = work / "kernel.cpp", work / "kernel.so"
    source.write_text(text)
    include = f"-I{kernels.directory() / 'host'}"
    call = [*_call(command()), include, "-o", str(library), str(source)]
    zig = {"ZIG_GLOBAL_CACHE_DIR": str(kept / "zig"), "ZIG_LOCAL_CACHE_DIR": str(work)}
    result = _run(call, {**zig, **os.environ, "TMPDIR": str(work)})
    if result.returncode != 0 or not library.is_file():
        status = f"exit status {result.returncode}{' and no library' if result.returncode == 0 else ''}"
        raise KernelCompileError(
            what,
            "must compile as C++17",
            f"{status} from {shlex.join(call)}\n{result.stderr.strip()}\n",
            ANOTHER,
        )
    return library


def _call(command: list[str]) -> list[str]:
    clang = "clang" in compiler_version(tuple(command))  # zig's is one, too
    return [*command, *_FLAGS, *_LIBRARY, *(["-nostdlib++"] if clang else [])]


def _run(call: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the compiler; what it writes is this user's alone, and after LIMIT it is ended with all that it started."""
    try:
        process = subprocess.Popen(
            call,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            umask=0o077,
        )
    except OSError as error:
        raise DeviceError("the C++ compiler", "must start", f"{error}: {shlex.join(call)}", ANOTHER) from error
    with process:
        try:
            output, log = process.communicate(timeout=LIMIT)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise DeviceError(
                    "the C++ compiler", f"must end within {LIMIT} s", shlex.join(call), ANOTHER
                ) from error
            raise
    return subprocess.CompletedProcess(call, process.returncode, output, log)


@functools.cache
def compiler_version(command: tuple[str, ...]) -> str:
    """The first line that the compiler prints of its version.

    Raises:
        DeviceError: it does not start, or does not end.
    """
    lines = _run([*command, "--version"], os.environ).stdout.splitlines()
    return lines[0].strip() if lines else "unknown version"


@functools.cache
def processor_name(*, full: bool = False) -> str:
    """The processor's model; with `full` also its instruction sets, on which -march=native depends."""
    facts: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", errors="replace") as lines:
            for line in lines:
                if not line.strip():
                    break
                label, _, text = line.partition(":")
                facts[label.strip()] = text.strip()
    except OSError:
        pass
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name + facts.get("flags", facts.get("Features", "")) if full else name
