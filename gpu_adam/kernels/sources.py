"""The text of the kernels: where ``cuda/`` lies, a file with its headers as one text, the kernels that it defines."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """One file of ``cuda/`` with its definitions: a unit of compilation.

    Attributes:
        file: name of the ``.cu`` file.
        defines: preprocessor definitions, as NAME=VALUE.
    """

    file: str
    defines: tuple[str, ...]

    @property
    def text(self) -> str:
        """The source with its headers written out, so that an edited header changes the compilers' cache keys."""
        return _inlined(self.file)


@dataclass(frozen=True)
class Kernel:
    """A ``__global__`` function of a compiled source."""

    source: Source
    name: str


def kernel_names(file: str) -> list[str]:
    """The ``__global__`` functions that a file of ``cuda/`` defines, in order."""
    return re.findall(
        r'^extern "C" __global__ void __launch_bounds__\(\d+\)\s+(\w+)\(', (directory() / file).read_text(), re.M
    )


@functools.cache
def directory() -> Path:
    """Where the kernel sources lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "cuda", package.parent / "cuda"):
        if (candidate / "dense.cu").is_file():
            return candidate
    raise FileNotFoundError(f"gpu_adam's kernel sources are neither in {package} nor beside it; install gpu_adam again")


@functools.cache
def _inlined(file: str) -> str:
    seen: set[str] = set()

    def lines(name: str) -> list[str]:
        seen.add(name)
        out = [f'#line 1 "{name}"']
        for number, line in enumerate((directory() / name).read_text().splitlines(), 1):
            include = re.fullmatch(r'#include "([\w.]+)"', line)
            if include is None:
                out.append("" if line == "#pragma once" else line)
            elif include[1] not in seen:
                out += [*lines(include[1]), f'#line {number + 1} "{name}"']
            else:
                out.append("")
        return out

    return "\n".join(lines(file)) + "\n"
