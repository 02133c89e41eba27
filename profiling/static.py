"""What can a machine without a GPU see of a kernel getting worse?

    python profiling/static.py             compare with results/static.json, print what differs, exit 1
    python profiling/static.py --update    rewrite it
    python profiling/static.py --all       compile also what is of the recorded text; with --update, too

NVRTC compiles every variant for every architecture; the disassemblers tell registers, spills, shared memory and the
SASS. callgrind counts the instructions of the host's kernels. What has the recorded text and compiler is not compiled
again. Compilers of other versions than the table's give other numbers: then differences are shown, and are no failure.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from cupy.cuda import nvrtc

from gpu_adam import kernels
from gpu_adam.devices import cuda
from gpu_adam.kernels import Source
from profiling import callgrind, sass

TABLE = Path(__file__).parent / "results" / "static.json"
Table = dict[str, Any]
TOOLS = {"gpu": "nvrtc", "host": "compiler"}
"""Parts of the table, and the entries that name the compilers which they are by."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare or update; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="rewrite results/static.json")
    parser.add_argument("--only", default="", help="sources with this text in their description")
    parser.add_argument("--all", action="store_true", help="compile sources that have not changed, too")
    options = parser.parse_args(arguments)
    before = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    measured = table({} if options.all else before, options.only)
    if options.update:
        TABLE.write_text(dumped(measured if not options.only else merged(before, measured)))
        print(f"{TABLE} has {len(measured['gpu'])} GPU and {len(measured['host'])} host rows")
        return 0
    failed = False
    for part in ("sources", *TOOLS):
        lines = list(differences(before.get(part, {}), measured[part], complete=not options.only))
        same_tool = part not in TOOLS or before.get(TOOLS[part]) == measured[TOOLS[part]]
        print(*lines, sep="\n", end="\n" if lines else "")
        remark = "" if same_tool else _other(before, measured, TOOLS[part])
        print(f"{part}: {len(measured[part])} rows, {len(lines)} differ{remark}")
        failed |= bool(lines) and same_tool
    if failed:
        print("If that is meant: python profiling/static.py --update, and say why in the commit.")
    return int(failed)


def _other(before: Table, measured: Table, tool: str) -> str:
    return f" (not judged: the table is by {before.get(tool)}, this is {measured[tool]})"


def table(before: Table, only: str = "") -> Table:
    """All rows: "sources", "gpu" and "host", and by which compilers.

    A row of `before` is taken over where its source's text and its compiler are still those.
    """
    sources = [source for source in dict.fromkeys(kernels.variants()) if only in callgrind.description(source)]
    texts = {_name(source.file, source): digest(source) for source in sources}
    measured: Table = {"nvrtc": "NVRTC {}.{}".format(*nvrtc.getVersion()), "compiler": callgrind.version()}
    measured |= {"sources": texts, "gpu": {}, "host": {}}
    pairs = []
    for source, architecture in itertools.product(sources, sass.ARCHITECTURES):
        rows = unchanged(before, measured, "gpu", source, gpu_names(source, architecture))
        measured["gpu"] |= rows
        pairs += [] if rows else [(source, architecture)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        measured["gpu"] |= {name: row for found in pool.map(gpu_rows, pairs) for name, row in found}
    changed: dict[str, kernels.Kernel] = {}
    for name, kernel in callgrind.chosen_kernels().items():
        rows = unchanged(before, measured, "host", kernel.source, [name]) if only in name else {}
        measured["host"] |= rows
        changed |= {} if rows or only not in name else {name: kernel}
    measured["host"] |= callgrind.rows(changed)
    return measured


def unchanged(before: Table, measured: Table, part: str, source: Source, names: Sequence[str]) -> Table:
    """The rows of these names in `before`; none where the source's text or the part's compiler was another."""
    tool, rows, recorded = TOOLS[part], before.get(part, {}), before.get("sources", {})
    same = before.get(tool) == measured[tool] and recorded.get(_name(source.file, source)) == digest(source)
    return {name: rows[name] for name in names} if same and all(name in rows for name in names) else {}


@functools.cache
def digest(source: Source) -> Table:
    """What decides a source's rows beside the compilers: its text but for comments, its options, how it is measured."""
    text = re.sub("//.*|^#line .*", "", source.text, flags=re.M)
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    parts = (*lines, *cuda.options(source.defines), *_measured_by())
    return {"text": hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]}


@functools.cache
def _measured_by() -> tuple[str, ...]:
    scripts = (Path(str(script)) for script in (__file__, callgrind.__file__, sass.__file__))
    return tuple(path.read_text() for path in (*scripts, *sorted((kernels.directory() / "host").glob("*.h"))))


def gpu_names(source: Source, architecture: int) -> list[str]:
    """The rows of a source for an architecture: its kernels."""
    return [f"{_name(kernel, source)} sm_{architecture}" for kernel in kernels.kernel_names(source.file)]


def _name(what: str, source: Source) -> str:
    return f"{what} {callgrind.description(source)}".strip()


def gpu_rows(pair: tuple[Source, int]) -> list[tuple[str, Table]]:
    """(name, row) of every kernel of a source, for an architecture."""
    source, architecture = pair
    rows = []
    cubin = compiled(source, architecture)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = run_tool("cuobjdump", "-res-usage", str(path))
        functions = sass.functions(run_tool("nvdisasm", "-c", str(path)))
    for found in re.finditer(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage):
        name, registers, stack, shared, local = found[1], *map(int, found.groups()[1:])
        function = functions[name]
        row: Table = {
            "registers": registers,
            "spilled": stack + local,
            "shared": shared,
            "occupancy": round(sass.occupancy(architecture, registers, shared, kernels.BLOCK_SIZE), 3),
            "instructions": function.whole.instructions,
            "accesses": function.whole.text,
        }
        if function.main_loop is not None:
            row |= loop_row(name, source, function.main_loop)
        rows.append((f"{_name(name, source)} sm_{architecture}", row))
    return rows


def loop_row(name: str, source: Source, loop: sass.Code) -> Table:
    """The main loop: its accesses, and per element what it moves."""
    loaded, stored = loop.nbytes("LDG", "LD"), loop.nbytes("STG", "ST")
    row: Table = {"loop": loop.text, "loop instructions": loop.instructions}
    row["instructions per byte"] = round(loop.instructions / (loaded + stored), 3)
    element = stored_per_element(name, source)
    if element and stored:
        row["bytes per element"] = round((loaded + stored) * element / stored, 2)
    return row


def stored_per_element(name: str, source: Source) -> int:
    """Bytes of one element of the variable and its slots; 0 for a kernel that stores something else."""
    defined = dict(define.removeprefix("GPU_ADAM_").split("=") for define in source.defines)
    dtypes = [dtype for dtype, row in kernels.DTYPES.items() if row.stored == defined.get("STORED")]
    if name not in ("dense", "sparse") or not dtypes:
        return 0
    amsgrad, ema, master, accumulates = (defined[name] == "1" for name in ("AMSGRAD", "EMA", "MASTER", "ACCUMULATE"))
    slot_dtype = "bfloat16" if defined["SLOT"] != defined["WIDE"] else None
    variable = kernels.dtype_named(dtypes[0])
    rule = kernels.UpdateRule(amsgrad=amsgrad, ema=ema, master=master, accumulates=accumulates)
    slots = kernels.slots_of(rule, dtypes[0])
    return variable.itemsize + sum(spec.dtype(variable, "abs2", slot_dtype).itemsize for spec in slots)


def compiled(source: Source, architecture: int) -> bytes:
    """A cubin with the options that CuPy would give, without a device."""
    program = nvrtc.createProgram(source.text, source.file, (), ())
    options = (*cuda.options(source.defines), "-ftz=true", f"-arch=sm_{architecture}")
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError as error:
        raise SystemExit(f"{source.file} for sm_{architecture}: {nvrtc.getProgramLog(program)}") from error
    # CuPy 14.2 cuts off the last byte of the ELF file, and the disassemblers refuse it without.
    return bytes(nvrtc.getCUBIN(program)) + b"\0"


def run_tool(name: str, *arguments: str) -> str:
    """Standard output of a disassembler, from PATH or from its wheel."""
    path = shutil.which(name) or _in_wheel(name)
    environment = {**os.environ, "PATH": f"{Path(path).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True, env=environment).stdout


def _in_wheel(name: str) -> str:
    try:
        files = importlib.metadata.distribution(f"nvidia-cuda-{name}").files or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f'{name} is not installed: pip install -e ".[dev]"') from None
    return next(str(file.locate()) for file in files if file.name == name)


def differences(before: Table, after: Table, *, complete: bool) -> Iterator[str]:
    """A line for every row that differs; a row that is gone counts where the whole table was made."""
    for name in [*after, *(name for name in before if complete and name not in after)]:
        if name not in before or name not in after:
            yield f"{name}: {'new' if name in after else 'gone'}"
            continue
        old, new = before[name], after[name]
        keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
        if keys:
            yield f"{name}: " + "; ".join(f"{key} {old.get(key)} -> {new.get(key)}" for key in keys)


def merged(before: Table, part: Table) -> Table:
    """A table with some rows replaced."""
    return {**part, **{key: {**before.get(key, {}), **part[key]} for key in ("sources", *TOOLS)}}


def dumped(whole: Table) -> str:
    """As JSON with one line for each row, so that a change is a line of a diff."""
    parts = []
    for key, value in whole.items():
        if isinstance(value, dict):
            lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(value.items())]
            parts.append(f" {json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n }")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
