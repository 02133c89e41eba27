"""Instructions per element of the host's kernels, counted by valgrind's callgrind: exact, the same on every machine.

The kernels are compiled for AVX2, not for the processor at hand: valgrind does not know AVX-512.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_adam import kernels
from gpu_adam.devices import compiler

MISSING = "no valgrind"
CHUNKS = 16
_FLAGS = [flag for flag in compiler.flags() if flag != "-march=native"]
_ARCHITECTURE = ["-mavx2", "-mfma", "-mf16c"]
_ENTRIES = {"dense": "dense_entry", "sparse": "sparse_entry", "square_sums": "square_sums_entry"}

# Behind the kernel's own text, which has the structs. Arrays of ones: the count does not depend on values.
_COMMON = """
#include <stdlib.h>
template <typename T> static T* ones(long long n) {
    T* const p = static_cast<T*>(aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64));
    for (long long i = 0; i < n; ++i) p[i] = T{1};
    return p;
}
static StepScalars scalars = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
static const StepScalars* staged = GPU_ADAM_STAGED ? &scalars : nullptr;
static MeasuredSums measured = {ones<double>(1024), ones<double>(1024)};
static Slots slots(long long n) {
#define ONES(slot, Memory, Register, present) ones<Memory>(n),
    return {GPU_ADAM_SLOTS(ONES)};
}
static const double factor_value = 1.0;
static const double* factors = GPU_ADAM_CLIP ? &factor_value : nullptr;
static long long stride = 0;
typedef void (*Entry)(void**, long long, long long, long long, int);
"""
_DENSE = """
static const long long CHUNKS = %d, N = CHUNKS * GPU_ADAM_CHUNK;
static TensorTable dense_table() {
    static Tensor tensor = {slots(N), N, 0};
    static const Gradient* gradient = ones<Gradient>(N);
    static int chunk_tensor[CHUNKS] = {};
    return {&tensor, &gradient, chunk_tensor, CHUNKS};
}
"""
_MAIN = {
    "dense": _DENSE
    + """
int main() {
    TensorTable table = dense_table();
    void* arguments[] = {&table, &factors, &stride, &scalars, &staged, &measured};
    volatile Entry entry = dense_entry;  // a call that is not inlined, for callgrind to see
    entry(arguments, 0, CHUNKS, CHUNKS, 1);
}
""",
    "square_sums": _DENSE
    + """
int main() {
    TensorTable table = dense_table();
    double* sums = ones<double>(CHUNKS);
    static const unsigned long long* found = nullptr;
    Norm norm = {ones<double>(1), ones<unsigned long long>(1), 0, 1};
    *norm.written = 0;
    void* arguments[] = {&table, &scalars, &staged, &sums, &found, &norm};
    volatile Entry entry = square_sums_entry;  // a call that is not inlined, for callgrind to see
    entry(arguments, 0, CHUNKS, CHUNKS, 1);
}
""",
    "sparse": """
static const long long WIDTH = 16, N = %d * GPU_ADAM_CHUNK, ROWS = N / WIDTH, COUNT = ROWS / 8;
int main() {
    const long long per_tile = GPU_ADAM_TILE / WIDTH, tiles = (ROWS + per_tile - 1) / per_tile;
    EmbeddingTable table = {slots(N), ROWS, WIDTH, per_tile, 1, tiles};
    Keys keys = {ones<long long>(COUNT), ones<long long>(COUNT)};
    for (long long i = 0; i < COUNT; ++i) keys.row[i] = 8 * i, keys.position[i] = i;
    Indices indices = {keys.row, 1, COUNT, ROWS};
    Gradient* values = ones<Gradient>(COUNT * WIDTH);
    static IndexErrors error = {};
    IndexErrors* errors = &error;
    void* arguments[] = {&table, &indices, &keys, &values, &factors, &scalars, &staged, &errors, &measured};
    volatile Entry entry = sparse_entry;  // a call that is not inlined, for callgrind to see
    entry(arguments, 0, tiles, tiles, 1);
}
""",
}


def version() -> str:
    """The compiler's and valgrind's."""
    if shutil.which("valgrind") is None:
        return MISSING
    valgrind = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    version = subprocess.run([*compiler.command(), "--version"], capture_output=True, text=True, check=True).stdout
    return f"{version.splitlines()[0]}, {valgrind}"


def rows(chosen: Mapping[str, kernels.Kernel]) -> dict[str, Any]:
    """{"instructions per element": ...} of kernels by their names; nothing where valgrind is missing."""
    if shutil.which("valgrind") is None:
        return {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        counts = list(pool.map(instructions, chosen.values()))
    elements = CHUNKS * kernels.CHUNK
    return {
        label: {"instructions per element": round(count / elements, 2)}
        for label, count in zip(chosen, counts, strict=True)
    }


SWITCHES = {
    **{
        word: (word.upper(), 1)
        for word in ("amsgrad", "ema", "adjust", "clip", "master", "stochastic", "accumulate", "measure")
    },
    "staged": ("STAGED", 1),
    "captured": ("STAGED", 2),
    "scaled": ("ADJUST", 2),
    "bounded": ("CLIP", 2),
}
"""Words for the switches of a variant, as names and numbers of the preprocessor."""


def description(source: kernels.Source) -> str:
    """Dtypes and switches of a source in words: "bfloat16 gradient=float32 master", say."""
    defined = dict(define.removeprefix("GPU_ADAM_").split("=") for define in source.defines)
    names = {row.stored: dtype for dtype, row in kernels.DTYPES.items()}
    words = [names[defined["STORED"]]] if "STORED" in defined else []
    words += [
        f"{word}={names[defined[name]]}"
        for word, name, usual in (("gradient", "GRADIENT", "STORED"), ("slots", "SLOT", "WIDE"))
        if defined.get(name) != defined.get(usual)
    ]
    words += [word for word, (name, value) in SWITCHES.items() if defined.get(name) == str(value)]
    return " ".join(words)


def chosen_kernels() -> dict[str, kernels.Kernel]:
    """The kernels that are counted, of every dtype and variant, by their names."""
    return {f"{kernel.name} {description(kernel.source)}": kernel for kernel in _kernels()}


def _kernels() -> Iterator[kernels.Kernel]:
    for dtype in kernels.DTYPES:
        for make in (kernels.dense, kernels.sparse):
            for rule in kernels.update_rules(dtype):
                yield make(dtype, rule)
        yield kernels.dense(dtype, kernels.GUARDED)
        if dtype not in kernels.HALVES:
            yield kernels.dense(dtype, kernels.ACCUMULATION)
        for bounded in (False, True):
            yield kernels.norm(dtype, "square_sums", kernels.UpdateRule(bounded=bounded))
    for dtype, rule, gradient in kernels.MIXED_UPDATES:
        yield kernels.dense(dtype, rule, gradient=gradient)


def instructions(kernel: kernels.Kernel) -> int:
    """Instructions of one launch over CHUNKS chunks."""
    text = compiler.source_text(kernel.source, faithful=False) + _COMMON + _MAIN[kernel.name] % CHUNKS
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "kernel.cpp", Path(folder) / "kernel"
        source.write_text(text)
        include = f"-I{kernels.directory() / 'host'}"
        files = ["-o", str(program), str(source)]
        subprocess.run([*compiler.command(), *_FLAGS, *_ARCHITECTURE, include, *files], check=True)
        call = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out", "--collect-atstart=no"]
        call += [f"--toggle-collect={_ENTRIES[kernel.name]}", str(program)]
        result = subprocess.run(call, capture_output=True, text=True, check=False)
    found = re.search(r"Collected : (\d+)", result.stderr)
    if result.returncode != 0 or found is None:
        raise SystemExit(f"callgrind failed on {kernel.name}: {result.stderr}")
    return int(found[1])
