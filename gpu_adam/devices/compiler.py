"""From a kernel's source text to a library of machine code: the host device's compiler and its cache on disk."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_adam import kernels
from gpu_adam.devices.base import PACK_BYTES
from gpu_adam.errors import DeviceError, KernelCompileError
from gpu_adam.kernels import Source

_FLAGS = [
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread"),
    # The bits: no contraction to multiply-add. The speed: without errno and traps the loops become vector code.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # 16-byte packs look at arrays of numbers, as they do in CUDA.
    "-fno-strict-aliasing",
    # Where a processor has 64-byte vectors: float64's flushing in software takes a fifth less time in them.
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
]


def command() -> list[str]:
    """The C++ compiler's command: ``$CXX``, g++, clang++ or the wheel ziglang, the first found.

    Raises:
        DeviceError: where there is none.
    """
    given = shlex.split(os.environ.get("CXX", ""))
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
        "install g++ (apt install g++), or clang++ (apt install clang), or a compiler as a wheel "
        '(pip install "gpu-adam[zig]")',
    )


def flags() -> list[str]:
    """The options that make a kernel's bits and its speed."""
    return list(_FLAGS)


def cache_directory() -> Path:
    """Where compiled kernels are kept: ``GPU_ADAM_CACHE``, or gpu_adam in the user's cache directory."""
    given = os.environ.get("GPU_ADAM_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpu_adam"


def source_text(source: Source, *, faithful: bool) -> str:
    """The kernel's source as plain C++: a shim before it, an entry point for each kernel behind it."""
    shim = "faithful.h" if faithful else "fast.h"
    pack = "sizeof(GPU_ADAM_STORED)" if not faithful else str(PACK_BYTES)
    entries = "".join(f"GPU_ADAM_ENTRY({name})\n" for name in kernels.kernel_names(source.file))
    defines = "".join(f"#define {define.replace('=', ' ', 1)}\n" for define in source.defines)
    return f'{defines}#define GPU_ADAM_PACK_BYTES {pack}\n#include "{shim}"\n{source.text}{entries}'


def library_file(text: str, what: str) -> str:
    """Path of the library of a source text, from the cache or compiled into it."""
    call = command()
    shims = "".join(path.read_text() for path in sorted((kernels.directory() / "host").glob("*.h")))
    identity = "\0".join((text, shims, *call, *_FLAGS, compiler_version(tuple(call)), processor_name(full=True)))
    directory = cache_directory()
    path = directory / f"host-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.so"
    if not path.exists():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory) as work:
                _compile(call, text, Path(work), what)
                # Atomic, so that processes that start together each find nothing or a whole library.
                (Path(work) / "kernel.so").replace(path)
        except OSError as error:
            raise DeviceError(
                "the kernel cache", "must be a writeable directory", error, "set GPU_ADAM_CACHE to one that is"
            ) from error
    return str(path)


def _compile(command: list[str], text: str, work: Path, what: str) -> None:
    (work / "kernel.cpp").write_text(text)
    include = f"-I{kernels.directory() / 'host'}"
    call = [*command, *_FLAGS, include, "-o", str(work / "kernel.so"), str(work / "kernel.cpp")]
    result = subprocess.run(call, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise KernelCompileError(
            what,
            "must compile as C++17",
            f"exit status {result.returncode} from {shlex.join(call)}\n{result.stderr.strip()}\n",
            "try another compiler: set CXX to g++ >= 9 or clang++ >= 10",
        )


@functools.cache
def compiler_version(command: tuple[str, ...]) -> str:
    """The first line that the compiler prints of its version."""
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    return lines[0].strip() if lines else "unknown version"


@functools.cache
def processor_name(*, full: bool = False) -> str:
    """The processor's model; with `full` also its instruction sets, on which -march=native depends."""
    facts: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if not line.strip():
                    break
                label, _, text = line.partition(":")
                facts[label.strip()] = text.strip()
    except OSError:
        pass
    name = facts.get("model name") or platform.processor() or platform.machine()
    return name + facts.get("flags", facts.get("Features", "")) if full else name
