"""Python programs in processes of their own, with an environment of which a test knows every variable."""

import os
import subprocess
import sys
from pathlib import Path

import gpu_adam
from gpu_adam.devices import compiler

ROOT = Path(gpu_adam.__file__).parents[1]

STEP = """
import hashlib, numpy, gpu_adam
gpu_adam.set_device("host")
variable = gpu_adam.Variable(numpy.linspace(-1, 1, 100_000))
optimizer = gpu_adam.Adam(0.1)
for step in range(3):
    optimizer.apply_gradients([(numpy.cos(variable.numpy() + step), variable)])
print(hashlib.sha256(variable.numpy().tobytes()).hexdigest())
"""
"""Three steps on the host; prints what the variable became."""

FAILING_STEP = """
import numpy, gpu_adam
variable, optimizer = gpu_adam.Variable(numpy.ones(3), device="host"), gpu_adam.Adam()
try:
    optimizer.apply_gradients([(numpy.ones(3), variable)])
except gpu_adam.GpuAdamError as error:
    print(type(error).__name__, optimizer.weights, variable.numpy().tolist())
    print(error)
"""
"""One step that is expected to raise; prints the error's class, the weights, the variable, and the message."""


def environment(folders: tuple[Path, ...] = (), **variables: object) -> dict[str, str]:
    """The environment of a child, which runs on the host unless `GPU_ADAM_DEVICE` is given.

    `folders` come before gpu_adam's on its path; a variable that is None is left out.
    """
    kept = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR", "XDG_CACHE_HOME", "GPU_ADAM_CACHE", "CXX")
    chosen: dict[str, object] = {name: os.environ.get(name) for name in kept}
    chosen |= {"PYTHONPATH": os.pathsep.join(map(str, (*folders, ROOT))), "GPU_ADAM_DEVICE": "host"}
    chosen |= variables
    return {name: str(value) for name, value in chosen.items() if value is not None}


def compiler_script(folder: Path, text: str) -> Path:
    """A compiler of our own; "$@" are the arguments, `compile` the real one, in a hurry."""
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\ncompile() {{ {" ".join(compiler.command())} "$@" -O0; }}\n{text}\n')
    path.chmod(0o755)
    return path


def start(
    code: str, folders: tuple[Path, ...] = (), prefix: tuple[str | Path, ...] = (), **variables: object
) -> "subprocess.Popen[str]":
    """Start a program with these environment variables; `prefix` are the words of a command that runs it."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", code],
        env=environment(folders, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
    )


def output_of(process: "subprocess.Popen[str]") -> str:
    """What the program printed; it must succeed."""
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    return text.strip()


def run(code: str, folders: tuple[Path, ...] = (), prefix: tuple[str | Path, ...] = (), **variables: object) -> str:
    """What a program prints, which must succeed."""
    return output_of(start(code, folders, prefix, **variables))
