"""SASS read as text: what a kernel loads and stores, and its main loop (output of ``nvdisasm -c``)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_FUNCTION = re.compile(r"^\s*\.section\s+\.text\.(\w+)", re.M)
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_ACCESS = re.compile(r"^(LDG|STG|LD|ST|LDL|STL)\.")  # global, generic, local (spilled)
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Code:
    """Instructions of a piece of a kernel.

    Attributes:
        instructions: how many.
        accesses: memory instructions by name and width in bytes, as ("LDG", 16).
    """

    instructions: int
    accesses: Counter[tuple[str, int]]

    def nbytes(self, *names: str) -> int:
        """Bytes that a thread moves by the accesses of these names."""
        return sum(width * count for (name, width), count in self.accesses.items() if name in names)

    @property
    def text(self) -> str:
        """The accesses in words: "3 LDG.16, 3 STG.16"."""
        return ", ".join(f"{count} {name}.{width}" for (name, width), count in sorted(self.accesses.items()))


@dataclass(frozen=True)
class Function:
    """A kernel.

    Attributes:
        whole: all of it.
        main_loop: the innermost loop with the widest accesses of global memory; None where no loop has any.
    """

    whole: Code
    main_loop: Code | None


def functions(text: str) -> dict[str, Function]:
    """Every kernel of a disassembly by its name."""
    starts = list(_FUNCTION.finditer(text))
    ends = [start.start() for start in starts[1:]] + [len(text)]
    return {start[1]: _function(text[start.end() : end]) for start, end in zip(starts, ends, strict=True)}


def _function(text: str) -> Function:
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif instruction := _INSTRUCTION.match(line):
            names.append(instruction[1])
            target = _TARGET.search(instruction[2])
            if instruction[1].startswith("BRA") and target and target[1] in labels:
                loops.append((labels[target[1]], len(names)))
    innermost = [loop for loop in loops if not any(_inside(other, loop) for other in loops)]
    codes = [_code(names[begin:end]) for begin, end in innermost]
    moving = [code for code in codes if code.nbytes("LDG", "STG", "LD", "ST")]
    return Function(_code(names), max(moving, key=_width, default=None))


def _inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def _width(code: Code) -> tuple[float, int]:
    """Bytes per access of global memory, then bytes."""
    nbytes = code.nbytes("LDG", "STG", "LD", "ST")
    count = sum(count for (name, _), count in code.accesses.items() if name in ("LDG", "STG", "LD", "ST"))
    return nbytes / count, nbytes


def _code(names: list[str]) -> Code:
    accesses: Counter[tuple[str, int]] = Counter()
    for name in names:
        if access := _ACCESS.match(name):
            widths = [_WIDTHS[part] for part in name.split(".") if part in _WIDTHS]
            accesses[access[1], widths[0] if widths else 4] += 1
    return Code(len(names), accesses)


# https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities: threads, blocks, KiB of shared memory
# of a multiprocessor; each has 65,536 registers, given out by 256 to a warp. From 8.0 on a block takes 1 KiB more.
_LIMITS = {
    75: (1024, 16, 64),
    80: (2048, 32, 164),
    86: (1536, 16, 100),
    89: (1536, 24, 100),
    90: (2048, 32, 228),
    100: (2048, 32, 228),
    120: (1536, 24, 100),
}
ARCHITECTURES = tuple(_LIMITS)


def occupancy(architecture: int, registers: int, shared: int, block_size: int) -> float:
    """Resident threads of a multiprocessor as a fraction of what it can hold, where nothing but the kernel limits."""
    threads, blocks, shared_kib = _LIMITS[architecture]
    warps = -(-block_size // 32)
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // per_warp // warps if registers else blocks
    reserved = 1024 if architecture >= 80 else 0
    by_shared = shared_kib * 1024 // (shared + reserved) if shared else blocks
    return min(blocks, threads // (32 * warps), by_registers, by_shared) * 32 * warps / threads
