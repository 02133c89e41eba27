"""What do checkpoints take beside numpy.savez and safetensors, and how long does an asynchronous one hold a loop up?

    python profiling/checkpoint.py                          1 GiB of slots, and 100,000 variables, on the host
    python profiling/checkpoint.py --mib 256 --turns 9 --folder /mnt/disk

A state is the slots m and v of float32 variables. It is written to --folder, read back from the page cache and checked.
All writers sync their file. gpu_adam also writes beside the old file, renames and syncs the directory, and computes a
checksum of each array, which its reader compares. The candidates take turns; figures are medians over the turns.

"held up" is how long `save(asynchronous=True)` takes to return, beside a copy of all slots to memory that is as new as
that of the save.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import gpu_adam
from gpu_adam.bench.tables import markdown

Arrays = Mapping[str, np.ndarray]
Calls = dict[str, tuple[Callable[[Path], object], Callable[[Path], Arrays | None]]]
"""What writes a file and what reads it, for each candidate, whose name ends with the file's suffix.

What reads returns arrays, or None where it has put them into the optimizer.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="of slots, in variables of 32 MiB")
    parser.add_argument("--variables", type=int, default=100_000, help="of 16 elements, in the second table")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a directory of the disk; default: the temporary one")
    options = parser.parse_args(arguments)
    gpu_adam.set_device("host")
    large, many = f"{options.mib} MiB", f"{options.variables} variables"
    states = {large: (max(1, options.mib // 64), 8 << 20), many: (options.variables, 16)}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for title, shape in states.items():
            rows = times(built(*shape), Path(folder), options.turns)
            print(markdown((title, "save", "of safetensors", "load", "of safetensors"), rows), end="\n\n", flush=True)
        rows = [(title, *held_up(built(*shape), Path(folder), options.turns)) for title, shape in states.items()]
        print(markdown(("asynchronous", "held up", "a copy", "quotient"), rows))


def built(count: int, size: int) -> gpu_adam.Adam:
    """An optimizer whose slots hold random numbers."""
    numbers = np.random.default_rng(0).random(size, np.float32)
    variables = [gpu_adam.Variable(numbers, name=f"layer{number}/kernel") for number in range(count)]
    adam = gpu_adam.Adam()
    adam.build(variables)
    adam.apply_gradients([(numbers, variable) for variable in variables])
    return adam


def times(adam: gpu_adam.Adam, folder: Path, turns: int) -> list[tuple[str, ...]]:
    """A row for each candidate: seconds to save and to load, and how many times those of safetensors."""
    arrays, candidates = adam.export(), candidates_of(adam)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, (write, read) in candidates.items():
            path = folder / f"state{Path(name).suffix}"
            begin = time.perf_counter()
            write(path)
            middle = time.perf_counter()
            found = read(path)
            end = time.perf_counter()
            check(arrays, adam.export() if found is None else found)
            seconds[name].append((middle - begin, end - middle))
    medians = {name: [statistics.median(each) for each in zip(*pairs, strict=True)] for name, pairs in seconds.items()}
    *_, (peer_save, peer_load) = medians.values()
    return [
        (name, f"{save:.2f} s", f"{save / peer_save:.2f}", f"{load:.2f} s", f"{load / peer_load:.2f}")
        for name, (save, load) in medians.items()
    ]


def candidates_of(adam: gpu_adam.Adam) -> Calls:
    """The candidates; the last is the one that the others are compared with."""
    import safetensors.numpy  # noqa: PLC0415  (not for --help)

    arrays = adam.export()

    def by_numpy(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            synced(file)

    def by_safetensors(path: Path) -> None:
        safetensors.numpy.save_file(arrays, path)
        with open(path, "rb+") as file:
            synced(file)

    def load_by_numpy(path: Path) -> Arrays:
        with np.load(path) as archive:
            return {name: archive[name] for name in archive.files}

    return {
        "gpu_adam, .npz": (adam.save, adam.load),
        "gpu_adam, .safetensors": (adam.save, adam.load),
        "numpy.savez, .npz": (by_numpy, load_by_numpy),
        "safetensors, .safetensors": (by_safetensors, safetensors.numpy.load_file),
    }


def held_up(adam: gpu_adam.Adam, folder: Path, turns: int) -> tuple[str, str, str]:
    """Seconds until an asynchronous save returns, seconds of a copy of all slots, and their quotient."""
    held, copied = [], []
    for _ in range(turns):
        begin = time.perf_counter()
        copies = [weight.value.copy() for weight in adam.weights]
        copied.append(time.perf_counter() - begin)
        del copies
        begin = time.perf_counter()
        pending = adam.save(folder / "state.npz", asynchronous=True)
        held.append(time.perf_counter() - begin)
        assert pending is not None
        pending.wait()
    quotient = statistics.median(a / b for a, b in zip(held, copied, strict=True))
    return f"{statistics.median(held):.3f} s", f"{statistics.median(copied):.3f} s", f"{quotient:.2f}"


def synced(file: Any) -> None:
    """Wait until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def check(arrays: Arrays, found: Arrays) -> None:
    """Raise unless what was read is what was written."""
    for name, array in arrays.items():
        if found[name].tobytes() != array.tobytes():
            raise AssertionError(f"{name} was not read as it was written")


if __name__ == "__main__":
    main()
