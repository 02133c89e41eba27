"""The kernels in faithful mode under ASan and UBSan: clean as they are, and every mistake put into them is noticed."""

import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from gpu_adam import kernels
from gpu_adam.devices import compiler, libraries

HARNESS = Path(__file__).parent / "sanitized" / "harness.cpp"

pytestmark = pytest.mark.thorough

# Without optimisation, every access is made and checked; the arithmetic is the same.
FLAGS = (
    *("-std=c++17", "-O0", "-g0", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)

# The rules of the variants, one for each dtype by turns; every second dtype has its scalars staged in memory.
RULES = kernels.update_rules("float64")[::-1]
RULE_OF = {dtype: RULES[number % len(RULES)] for number, dtype in enumerate(kernels.DTYPES)}
RULE_OF |= {dtype: kernels.update_rules(dtype)[-1] for dtype in kernels.HALVES}
STAGED = list(kernels.DTYPES)[1::2]
RULE_OF |= {dtype: RULE_OF[dtype]._replace(measured=True) for dtype in STAGED}


MUTATED = ("float32", "float64")  # only the latter measures, by which its blocks have barriers more


class Mutant(NamedTuple):
    """A mistake: `old` stands once in `file`, and becomes `new`, in which MUTANT is true if this mistake is to be made.

    `test` runs into it, and says so in words that match `noticed`; in the kernels of `dtype`, one of MUTATED.
    """

    file: str
    old: str
    new: str
    test: str
    noticed: str
    dtype: str = "float32"


WRONG = r"wrong result: .* expected"
DEADLOCK = r"gpu_adam: block \d+: "
OVERRUN = r"AddressSanitizer: (heap-buffer-overflow|SEGV)|runtime error: index \d+ out of bounds"
MISPLACED = f"{WRONG}|{OVERRUN}"
MISALIGNED = r"runtime error: .* misaligned address"


def without_barrier(file: str, test: str, before: str, after: str) -> Mutant:
    """The barrier between these two texts is left out."""
    barrier = "__syncthreads();"
    new = f"{before}if (!MUTANT) {barrier}{after}"
    return Mutant(file, f"{before}{barrier}{after}", new, test, MISPLACED)


def without_step(before: str) -> Mutant:
    """The lanes of a warp do not wait for each other behind this text."""
    return Mutant("sort.cuh", f"{before}__syncwarp();", f"{before}if (!MUTANT) __syncwarp();", "sort", MISPLACED)


MUTANTS = {
    "a sum's barrier before the tree": without_barrier(
        "norm.cu", "norm", "lanes[group * PACK + k] = sum[k];\n    }\n    ", "\n"
    ),
    "a barrier for a part of the block": Mutant(
        "norm.cu",
        "        __syncthreads();\n    }\n    return",
        "        if (!MUTANT || threadIdx.x < 16) __syncthreads();\n    }\n    return",
        "norm",
        DEADLOCK,
    ),
    "an element too many": Mutant("norm.cu", "i + k < n &&", "i + k < n + MUTANT &&", "norm", OVERRUN),
    "lanes added in another order": Mutant(
        "norm.cu",
        "lanes[lane] += lanes[lane + half];",
        "lanes[lane] += lanes[MUTANT ? 2 * half - 1 - lane : lane + half];",
        "norm",
        WRONG,
    ),
    "a count that goes on in the next launch": Mutant(
        "norm.cu", "norm.written[sums.which] = 0;", "norm.written[sums.which] = MUTANT;", "norm", WRONG
    ),
    "a pack too early": Mutant("memory.cuh", "PACK - past;", "PACK - past - MUTANT;", "dense", MISALIGNED),
    "a tail too late": Mutant("memory.cuh", "tail + j - head, ", "tail + j - head + MUTANT, ", "dense", OVERRUN),
    "an element twice": Mutant(
        "memory.cuh",
        "j < head + range.size - tail; j += blockDim.x)",
        "j < head + range.size - tail; j += MUTANT ? 1 : blockDim.x)",
        "dense",
        WRONG,
    ),
    "a gradient taken for aligned": Mutant(
        "memory.cuh", "return PACK == 1 ||", "return MUTANT || PACK == 1 ||", "dense", MISALIGNED
    ),
    "a last chunk as long as the others": Mutant(
        "tensor_table.cuh", "left < GPU_ADAM_CHUNK ?", "left < GPU_ADAM_CHUNK && !MUTANT ?", "dense", OVERRUN
    ),
    "a barrier before measures are added": without_barrier(
        "memory.cuh", "dense", "theta[k] += own.theta[lane];\n        ", "\n        for (int half"
    )._replace(dtype="float64"),
    "a barrier while measures are added": without_barrier(
        "memory.cuh", "sparse", "theta[k] += theta[k + half];\n            ", ""
    )._replace(dtype="float64"),
    "measures of no thread": Mutant(
        "memory.cuh",
        "if (k < half && k + half < threads)",
        "if (k < half && k + half < threads + MUTANT)",
        "dense",
        MISPLACED,
        "float64",
    ),
    "a wrong shuffle": Mutant("sort.cuh", "inclusive, d);", "inclusive, d + MUTANT);", "sort", MISPLACED),
    "a lane too few": Mutant("sort.cuh", "if (lane >= d)", "if (lane >= d + MUTANT)", "sort", MISPLACED),
    "a lane outside its mask": Mutant(
        "sort.cuh", "(32 - lanes_of_warp())", "(MUTANT ? 1 : 32 - lanes_of_warp())", "sort", DEADLOCK
    ),
    "a scan's barrier after the warps": without_barrier("sort.cuh", "sort", "warp_sums[warp] = inclusive;\n    ", "\n"),
    "the barrier after keys are read": without_barrier("sort.cu", "sort", "errors));\n    }\n    ", "\n"),
    "the barrier after rows are read again": without_barrier("sort.cu", "sort", "(key_at(indices, i));\n    ", "\n"),
    "the barrier after digits are counted": without_barrier("sort.cuh", "sort", "1u);\n    });\n    ", "\n"),
    "the barrier before keys move": without_barrier("sort.cuh", "sort", "- 1;\n    ", "\n    for_each_key"),
    "the barrier after keys have moved": without_barrier("sort.cuh", "sort", "key);\n    });\n    ", "\n"),
    "the barrier before the next count": without_barrier("sort.cu", "sort", "", "  // before the next run's counts"),
    "a warp in step before it looks for equal digits": without_step("found, self);\n    "),
    "a warp in step before equal digits are forgotten": without_step("lanes = found;\n    "),
    "a warp in step before a digit's first key counts": without_step("+ rank;\n        "),
    "keys left over": Mutant(
        "sort.cuh", "(count + unit - 1) / unit", "(count + (MUTANT ? 0 : unit - 1)) / unit", "sort", MISPLACED
    ),
    "a key behind the last": Mutant("sort.cuh", "run.end - 1);", "run.end - 1 + MUTANT);", "sort", OVERRUN),
    "a digit of a row twice": Mutant(
        "sort.cu", "DIGIT_BITS * (pass - 1)", "DIGIT_BITS * (pass - (MUTANT ? 2 : 1))", "sort", WRONG
    ),
    "the barrier before rows are summed": without_barrier("sparse.cu", "sparse", "", "\n        sum_rows("),
    "the barrier before the next tile": without_barrier("sparse.cu", "sparse", "", "  // before the next tile's zeros"),
    "a row too far": Mutant(
        "sparse.cu", "if (row[middle] < wanted)", "if (row[middle] < wanted + MUTANT)", "sparse", WRONG
    ),
    "a last piece as long as the others": Mutant(
        "sparse.cu", "left < GPU_ADAM_TILE ?", "left < GPU_ADAM_TILE && !MUTANT ?", "sparse", OVERRUN
    ),
    "duplicates summed backwards": Mutant(
        "sparse.cu",
        "column[keys.position[j] * row_size]",
        "column[keys.position[MUTANT ? last - 1 - (j - k) : j] * row_size]",
        "sparse",
        WRONG,
    ),
}


def definitions(dtype: str) -> list[str]:
    defines = kernels.sparse(dtype, RULE_OF[dtype], staged=dtype in STAGED).source.defines
    return [f"-D{define}" for define in (*defines, "GPU_ADAM_PACK_BYTES=16")]


@functools.cache
def flags() -> tuple[str, ...]:
    """What the compiler understands; the tests are skipped where it has no sanitizers."""
    probe = ["-x", "c++", "-", "-o", os.devnull]
    # g++ leaves shared memory, which is in a section of its own, unguarded without this. clang++ does not know it.
    for candidate in ((*FLAGS, "-fsanitize-sections=gpu_adam_shared"), FLAGS):
        call = [*compiler.command(), *candidate, *probe]
        if subprocess.run(call, input="int main() {}", text=True, capture_output=True, check=False).returncode == 0:
            return candidate
    pytest.skip("needs a C++ compiler with AddressSanitizer and UndefinedBehaviorSanitizer")


def built(cuda: Path, defines: list[str]) -> Path:
    """The harness with the kernels of the directory `cuda`, from the kernel cache or compiled into it."""
    texts = [path.read_text() for path in [HARNESS, *sorted(cuda.glob("*.cu*")), *sorted(cuda.glob("host/*.h"))]]
    call = [*compiler.command(), *flags(), *defines]
    identity = "\0".join([*texts, *call, compiler.compiler_version(tuple(compiler.command()))])
    path = libraries.directory() / f"test-{hashlib.sha256(identity.encode()).hexdigest()[:32]}"
    if not path.exists():
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        call += [f"-I{cuda}", f"-I{cuda / 'host'}", "-o", str(partial), str(HARNESS)]
        compiled = subprocess.run(call, capture_output=True, text=True, check=False)
        assert compiled.returncode == 0, compiled.stderr
        partial.replace(path)
    return path


class Programs(NamedTuple):
    """The harness by dtype with the kernels as they are, and with all mistakes, none of them made unless asked for."""

    clean: dict[str, Path]
    mutated: dict[str, Path]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Everything compiled, side by side."""
    copies = tmp_path_factory.mktemp("sanitized") / "cuda"
    shutil.copytree(kernels.directory(), copies)
    for number, (name, mutant) in enumerate(MUTANTS.items(), 1):
        text = (copies / mutant.file).read_text()
        assert text.count(mutant.old) == 1, f"{name}: {mutant.old!r} is not in {mutant.file}, or not once"
        new = mutant.new.replace("MUTANT", f"(mutant == {number})")
        (copies / mutant.file).write_text(text.replace(mutant.old, new))
    switches = {dtype: definitions(dtype) for dtype in kernels.DTYPES}
    jobs = [(copies, switches[dtype]) for dtype in MUTATED]
    jobs += [(kernels.directory(), defines) for defines in switches.values()]
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(built, *zip(*jobs, strict=True)))
    return Programs(dict(zip(switches, paths[len(MUTATED) :], strict=True)), dict(zip(MUTATED, paths, strict=False)))


Run = Future["subprocess.CompletedProcess[str]"]


def run(program: Path, mutant: int, *tests: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": ""}
    call = [str(program), str(mutant), *tests]
    return subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300, check=False)


class Runs(NamedTuple):
    """What the programs say: as they are, by dtype; with each mistake; and with mistakes of which none is made."""

    clean: dict[str, Run]
    mistaken: dict[str, Run]
    without_mistake: dict[str, Run]


@pytest.fixture(scope="module")
def runs(programs: Programs) -> Iterator[Runs]:
    """Every run, two at a time; a test waits for its own."""
    with ThreadPoolExecutor(2) as pool:
        everything = ["dense", "sparse", "norm", "sort"]
        # Rows are sorted without a dtype.
        tests = {dtype: everything[: 4 if dtype == "float32" else 3] for dtype in programs.clean}
        clean = {dtype: pool.submit(run, program, 0, *tests[dtype]) for dtype, program in programs.clean.items()}
        mistaken = {
            name: pool.submit(run, programs.mutated[mutant.dtype], number, mutant.test)
            for number, (name, mutant) in enumerate(MUTANTS.items(), 1)
        }
        yield Runs(clean, mistaken, {d: pool.submit(run, path, 0, *everything) for d, path in programs.mutated.items()})
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_kernels_are_clean_and_right(runs: Runs, dtype: str) -> None:
    result = runs.clean[dtype].result()
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"[1-9]\d+ launches, [1-9]\d{5,} comparisons\n", result.stdout)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_noticed(runs: Runs, name: str) -> None:
    result = runs.mistaken[name].result()
    assert result.returncode != 0, f"{MUTANTS[name].test} passed"
    assert re.search(MUTANTS[name].noticed, result.stderr), result.stderr[:2000]


@pytest.mark.parametrize("dtype", MUTATED)
def test_the_copies_are_right_until_a_mistake_is_made(runs: Runs, dtype: str) -> None:
    """So that a mistake is what a failure above comes from."""
    result = runs.without_mistake[dtype].result()
    assert result.returncode == 0, result.stderr
