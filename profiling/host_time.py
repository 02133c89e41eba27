"""What does a step on CUDA cost the host, apart from the driver?  The time of ``apply_gradients``, until it returns.

    python profiling/host_time.py [CHECKOUT ...]

Several checkouts of the project are measured by turns, in processes of their own, so that a machine that is busy for a
while slows all of them alike; the table has a column for each. Shown are microseconds, the best of the rounds' medians.

On a GPU the steps are what they are, the driver's time for each launch included. Where CuPy runs on an emulated driver
(``cupy.__emulated__``), the entry points that a step calls do nothing while the clock runs: the table then says what
Python and CuPy cost. A captured step's nodes are counted in the graph that CUDA prints.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import platform
import re
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROUNDS = 3
SECONDS = 0.4  # of each row in each round
NODES = "captured step, graph nodes"
ROOT = Path(__file__).resolve().parents[1]

Pairs = list[tuple[Any, Any]]


# What a step calls of the driver, each as x86-64 code that returns success at once; those that answer a question say 0.
_DONE = bytes.fromhex("31c0 c3")
_ANSWER_1 = bytes.fromhex("c70700000000") + _DONE  # to where the first argument points
_ANSWER_2 = bytes.fromhex("c70600000000") + _DONE
# cudaPointerAttributes{device memory, device 0, the pointer, no host pointer}
_ATTRIBUTES = bytes.fromhex("c70702000000 c7470400000000 48897708 48c7471000000000") + _DONE
_CODE = {
    **dict.fromkeys(("cuLaunchKernel", "cudaMemcpy", "cudaMemcpyAsync", "cudaMemsetAsync"), _DONE),
    **dict.fromkeys(("cudaEventRecord", "cudaEventQuery", "cudaSetDevice", "cudaGraphLaunch"), _DONE),
    "cudaGetDevice": _ANSWER_1,
    "cudaStreamIsCapturing": _ANSWER_2,
    "cudaPointerGetAttributes": _ATTRIBUTES,
}


def _functions(path: str) -> Iterator[tuple[str, int]]:
    """The functions in the symbol table of a 64-bit ELF file, with their offsets."""
    data = Path(path).read_bytes()
    sections_at = struct.unpack_from("<Q", data, 40)[0]
    size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, sections_at + size * number) for number in range(count)]
    for _, kind, _, _, offset, length, link, *_ in sections:
        if kind not in (2, 11):  # the complete table, or the table of what other libraries may call
            continue
        names = sections[link][4]
        for at in range(offset, offset + length, 24):
            name, info, _, _, value, _ = struct.unpack_from("<IBBHQQ", data, at)
            if info & 15 == 2 and value:  # a function that is defined here
                text = data[names + name : data.index(b"\0", names + name)].decode()
                yield text.removesuffix("_ptsz"), value


class _Symbol(ctypes.Structure):
    """``Dl_info`` of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _place(function: Any) -> tuple[int, str]:
    """Where the library of a loaded function begins in memory, and its file."""
    found = _Symbol()
    if not ctypes.CDLL(None).dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(found)):
        raise SystemExit("an emulated driver is measured where its library can be found; dladdr does not find it")
    return int(found.base), os.fsdecode(found.file)


@contextlib.contextmanager
def free_driver() -> Iterator[None]:
    """On an emulated driver: what a step calls of it does nothing meanwhile."""
    if platform.machine() != "x86_64":
        raise SystemExit("an emulated driver is taken out of the measurement on x86-64 only")
    runtime = importlib.import_module("cupy_backends.cuda.api.runtime").__file__
    libc = ctypes.CDLL(None)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    changed = []
    for library, function in ((str(runtime), "PyInit_runtime"), ("libcuda.so.1", "cuInit")):
        base, path = _place(getattr(ctypes.CDLL(library), function))
        for name, offset in set(_functions(path)):
            if name in _CODE:
                address, code = base + offset, _CODE[name]
                libc.mprotect(address & ~4095, 8192, 7)  # readable, writeable, executable
                changed.append((address, ctypes.string_at(address, len(code))))
                ctypes.memmove(address, code, len(code))
    hooks = importlib.import_module("cupy.cuda.memory_hook").get_memory_hooks()
    kept = dict(hooks)
    hooks.clear()
    try:
        yield
    finally:
        hooks.update(kept)
        for address, code in changed:
            ctypes.memmove(address, code, len(code))


class _TorchLike:
    """Stands for torch's tensor on a GPU where torch has none, in checkouts that read nothing but its interface."""

    def __init__(self, array: Any) -> None:
        self._array, self.device = array, array.device

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return dict(self._array.__cuda_array_interface__)


def _rows() -> dict[str, tuple[dict[str, Any], Callable[[], list[Pairs]]]]:
    """For each row the optimizer's arguments, and a function that makes the pairs of some steps, taken by turns."""
    import cupy  # noqa: PLC0415  (after the emulated driver, where there is one)
    import numpy as np  # noqa: PLC0415

    import gpu_adam  # noqa: PLC0415

    def variables(count: int, shape: Any = (1,)) -> list[Any]:
        return [gpu_adam.Variable(np.ones(shape, np.float32), device="cuda") for _ in range(count)]

    def dense(count: int, turns: int) -> list[Pairs]:
        targets = variables(count)
        return [[(cupy.ones(1, np.float32), target) for target in targets] for _ in range(turns)]

    def sparse(rows: int) -> list[Pairs]:
        target = variables(1, (10_000, 1))[0]
        values, indices = cupy.ones((rows, 1), np.float32), cupy.arange(rows, dtype=np.int64)
        return [[(gpu_adam.IndexedSlices(values, indices), target)]]

    def torch() -> list[Pairs]:
        targets = variables(100)
        make = _torch_tensors()
        return [list(zip(make(len(targets)), targets, strict=True)) for _ in range(2)]

    return {
        "one tensor, same gradients": ({}, lambda: dense(1, 1)),
        "one tensor, new gradients": ({}, lambda: dense(1, 2)),
        "one tensor, global norm": ({"global_clipnorm": 1.0}, lambda: dense(1, 1)),
        "sparse, 128 rows": ({}, lambda: sparse(128)),
        "sparse, 5000 rows": ({}, lambda: sparse(5000)),
        "1000 tensors, same gradients": ({}, lambda: dense(1000, 1)),
        "1000 tensors, new gradients": ({}, lambda: dense(1000, 2)),
        "100 gradients of torch, new": ({}, torch),
    }


def _torch_tensors() -> Callable[[int], list[Any]]:
    """A function that makes gradients of torch, or what stands for them where torch has no GPU."""
    import cupy  # noqa: PLC0415

    try:
        torch = importlib.import_module("torch")
    except ImportError:
        torch = None
    if torch is not None and torch.cuda.is_available():
        return lambda count: [torch.ones(1, device="cuda") for _ in range(count)]
    device = type(importlib.import_module("gpu_adam").get_device())
    if torch is None or not hasattr(device, "torch_device"):  # or a checkout whose steps do not know torch's tensors
        return lambda count: [_TorchLike(cupy.ones(1, "float32")) for _ in range(count)]
    # Tensors in host memory pass for such on the GPU: launches that do nothing do not read them.
    device.torch_device = lambda self, torch: torch.device("cpu")
    return lambda count: [torch.ones(1) for _ in range(count)]


def _replays() -> dict[str, Callable[[], Any]]:
    """What replays a captured step, or prepares the launch of one that was captured by other means."""
    import cupy  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    import gpu_adam  # noqa: PLC0415

    if not hasattr(gpu_adam.Adam, "capture"):  # an older checkout
        return {}
    calls: dict[str, Callable[[], Any]] = {}
    for name, count in (("one tensor", 1), ("1000 tensors", 1000)):
        variables = [gpu_adam.Variable(np.ones(1, np.float32), device="cuda") for _ in range(count)]
        pairs = [(cupy.ones(1, np.float32), variable) for variable in variables]
        optimizer = gpu_adam.Adam()
        optimizer.apply_gradients(pairs)
        calls[f"{name}, replay"] = optimizer.capture(functools.partial(optimizer.apply_gradients, pairs)).replay
        _captured(optimizer, pairs)
        calls[f"{name}, stage"] = optimizer.stage
    return calls


def _median(steps: Sequence[Callable[[], Any]], wait: Callable[[], Any]) -> float:
    """Microseconds of a step, of those that are taken by turns."""
    clock, samples = time.perf_counter, list[float]()
    for number in range(10):
        steps[number % len(steps)]()
    gc.collect()
    gc.disable()  # a collection among a thousand gradients is no step's time
    end = clock() + SECONDS
    while clock() < end or len(samples) < 20:
        for step in steps:
            start = clock()
            step()
            samples.append(clock() - start)
        wait()
    gc.enable()
    return 1e6 * statistics.median(samples)


def _graph_nodes() -> int:
    """How many nodes the graph of a captured step of two tensors has."""
    import cupy  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    import gpu_adam  # noqa: PLC0415

    variables = [gpu_adam.Variable(np.ones(3, np.float32), device="cuda") for _ in range(2)]
    pairs = [(cupy.ones(3, np.float32), variable) for variable in variables]
    optimizer = gpu_adam.Adam()
    optimizer.apply_gradients(pairs)
    dot = _captured(optimizer, pairs).debug_dot_str()
    return len(set(re.findall(r'^\s*("?\w+"?)\s*\[', dot if isinstance(dot, str) else dot.decode(), re.MULTILINE)))


def _captured(optimizer: Any, pairs: Pairs) -> Any:
    """The graph of a step."""
    import cupy  # noqa: PLC0415

    stream = cupy.cuda.Stream(non_blocking=True)
    optimizer.synchronize()
    with stream:
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
        optimizer.apply_gradients(pairs)
        return stream.end_capture()


def measured() -> dict[str, Any]:
    """The rows of the checkout that Python finds, and where the steps ran."""
    import cupy  # noqa: PLC0415

    import gpu_adam  # noqa: PLC0415
    from gpu_adam.devices import find_device  # noqa: PLC0415

    emulated = getattr(cupy, "__emulated__", False)
    device = gpu_adam.set_device("cuda")
    place = "emulated driver, launches that do nothing" if emulated else dict(device.facts())["GPU"]
    found: dict[str, Any] = {NODES: _graph_nodes()}
    replays, wait = _replays(), _nothing if emulated else device.synchronize
    with free_driver() if emulated else contextlib.nullcontext():
        for name, (options, make) in _rows().items():
            step = gpu_adam.Adam(**options).apply_gradients
            found[name] = _median([functools.partial(step, pairs) for pairs in make()], wait)
        found.update({name: _median([replay], wait) for name, replay in replays.items()})
    # What older checkouts have too.
    processor = dict(find_device("host").facts())["processor"]
    facts = f"{place}; CuPy {cupy.__version__}, Python {platform.python_version()}, {processor}"
    return {"facts": facts, "rows": found}


def _nothing() -> None:
    """Launches that do nothing need no wait."""


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The results of each checkout's rounds as Markdown: the best of the rounds."""
    lines = [f"| microseconds | {' | '.join(results)} |", "|---|" + "---|" * len(results)]
    for name in dict.fromkeys(name for rounds in results.values() for name in rounds[0]["rows"]):
        best = [min(round_["rows"].get(name, "") for round_ in rounds) for rounds in results.values()]
        lines.append(f"| {name} | {' | '.join(f'{x:.1f}' if isinstance(x, float) else str(x) for x in best)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[ROOT], help="folders; default: this one")
    parser.add_argument("--one-round", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one_round:
        print(json.dumps(measured()))
        return 0
    results: dict[str, list[dict[str, Any]]] = {str(checkout): [] for checkout in options.checkouts}
    for _ in range(ROUNDS):
        for checkout, rounds in results.items():
            path = os.pathsep.join([str(Path(checkout).resolve()), os.environ.get("PYTHONPATH", "")])
            command = [sys.executable, str(Path(__file__).resolve()), "--one-round"]
            done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True, stdout=subprocess.PIPE)
            rounds.append(json.loads(done.stdout))
    print(next(iter(results.values()))[0]["facts"])
    print()
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
