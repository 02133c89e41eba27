"""NVRTC compiles kernels without a GPU; registers, spills and widths of loads.

All of one generation's, and for every generation the float32 updates and the sort: profiling/static.py has compiled the
rest when its text changed, as profiling/results/static.json says. The results are kept in the kernel cache.
"""

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gpu_adam import kernels
from gpu_adam.devices import libraries

cupy = pytest.importorskip("cupy", reason="needs CuPy and NVRTC, of the extra cuda13 or cuda12", exc_type=ImportError)
if getattr(cupy, "__emulated__", False):
    pytest.skip("asks nothing of a driver: runs where none is emulated", allow_module_level=True)

from cupy.cuda import nvrtc  # noqa: E402  (after the check that it is there)

from gpu_adam.devices import cuda  # noqa: E402

try:
    VERSION = nvrtc.getVersion()
except RuntimeError as missing:
    pytest.skip(f"needs NVRTC, of the extra cuda13 or cuda12: {missing}", allow_module_level=True)

ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]

EVERYTHING = kernels.UpdateRule(amsgrad=True, bounded=True)
DENSE_FLOAT32 = [kernels.dense("float32", rule).source for rule in kernels.update_rules()]
SORT = kernels.sort("sort_rows").source
EXAMINED = {*DENSE_FLOAT32, kernels.sparse("float32", EVERYTHING).source, SORT}


def kept(identity: str, suffix: str, make: Callable[[], bytes]) -> bytes:
    """What `make` returns, from the kernel cache or put there."""
    path = libraries.directory() / f"test-{hashlib.sha256(identity.encode()).hexdigest()[:32]}{suffix}"
    if not path.exists():
        result = make()
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_bytes(result)
        partial.replace(path)
    return path.read_bytes()


def identity_of(source: kernels.Source, architecture: str) -> str:
    return "\0".join([source.text, *options(source, architecture), str(VERSION)])


def examined(architecture: str) -> Collection[kernels.Source]:
    """The sources whose machine code for a GPU generation is looked at."""
    return kernels.variants() if architecture == "sm_90" else EXAMINED


def options(source: kernels.Source, architecture: str) -> tuple[str, ...]:
    """What CuPy passes to NVRTC on such a GPU."""
    return (*cuda.options(source.defines), "-ftz=true", f"-arch={architecture}")


@functools.cache
def cubin(source: kernels.Source, architecture: str) -> bytes:
    """The machine code of a source's kernels: an ELF file."""

    def compiled() -> bytes:
        program = nvrtc.createProgram(source.text, source.file, (), ())
        try:
            nvrtc.compileProgram(program, options(source, architecture))
            return bytes(nvrtc.getCUBIN(program)) + b"\0"  # CuPy drops the last byte
        except nvrtc.NVRTCError as error:
            raise AssertionError(f"{source}: {nvrtc.getProgramLog(program)}") from error
        finally:
            nvrtc.destroyProgram(program)

    return kept(identity_of(source, architecture), ".cubin", compiled)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """A GPU generation, what is looked at compiled for it side by side."""
    name = str(request.param)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(lambda source: cubin(source, name), examined(name)))
    return name


@functools.cache
def tool(name: str) -> str:
    """Path of one of NVIDIA's binary tools; the test is skipped where it is not installed."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    folders = [str(path) for place in places for path in sorted(Path(place).glob("*/bin"))]
    found = shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip(f"needs {name}, of the extra dev")
    return found


def output(name: str, *arguments: str) -> str:
    folder = str(Path(tool(name)).parent)  # cuobjdump calls others of them
    environment = {**os.environ, "PATH": os.pathsep.join([folder, os.environ.get("PATH", "")])}
    result = subprocess.run([tool(name), *arguments], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def resources(source: kernels.Source, architecture: str, folder: Path) -> dict[str, dict[str, int]]:
    """REG, STACK, SHARED and LOCAL of every kernel: registers, and bytes."""
    (folder / "kernel.cubin").write_bytes(cubin(source, architecture))
    text = output("cuobjdump", "-res-usage", str(folder / "kernel.cubin"))
    found = re.findall(r"Function (\w+):\s*(REG:.*)", text)
    return {name: {label: int(n) for label, n in re.findall(r"([A-Z]+):(\d+)", figures)} for name, figures in found}


def sass(source: kernels.Source, architecture: str, folder: Path) -> str:
    """The instructions, as text."""

    def disassembled() -> bytes:
        (folder / "kernel.cubin").write_bytes(cubin(source, architecture))
        return output("nvdisasm", "-c", "-ndf", str(folder / "kernel.cubin")).encode()

    return kept(f"{identity_of(source, architecture)}\0sass", ".sass", disassembled).decode()


def test_what_compiles_has_all_its_kernels(architecture: str) -> None:
    for source in examined(architecture):
        code = cubin(source, architecture)
        assert code.startswith(b"\x7fELF")
        for name in kernels.kernel_names(source.file):
            assert f".text.{name}\0".encode() in code


@pytest.mark.parametrize("architecture", ["sm_90"], indirect=True)
@pytest.mark.parametrize("update", [kernels.dense, kernels.sparse], ids=["dense", "sparse"])
@pytest.mark.parametrize("staged", [1, 2])
def test_staged_scalars_cost_no_spill(
    architecture: str, update: Callable[..., kernels.Kernel], staged: int, tmp_path: Path
) -> None:
    kernel = update("float32", EVERYTHING, staged=staged)
    assert kernel.source not in kernels.variants()
    figures = resources(kernel.source, architecture, tmp_path)[kernel.name]
    assert figures["STACK"] == figures["LOCAL"] == 0
    assert figures["REG"] <= 64


def test_dense_float32_kernels_take_at_most_64_registers(architecture: str, tmp_path: Path) -> None:
    """Or fewer than 1024 threads fit on a multiprocessor, and latency shows."""
    for source in DENSE_FLOAT32:
        assert 0 < resources(source, architecture, tmp_path)["dense"]["REG"] <= 64


def test_nothing_spills(architecture: str, tmp_path: Path) -> None:
    """The dense float32 updates have no stack at all; elsewhere a float64 number or three are the compiler's choice."""
    for source in examined(architecture):
        used = resources(source, architecture, tmp_path)
        assert set(used) == set(kernels.kernel_names(source.file))
        for name, figures in used.items():
            assert figures["STACK"] <= (0 if source in DENSE_FLOAT32 else 24), (source, name, figures)
            assert figures["LOCAL"] == 0, (source, name, figures)


CASES = [("sm_75", "float32"), ("sm_120", "float32"), *(("sm_90", dtype) for dtype in kernels.DTYPES)]


@pytest.mark.parametrize("update", [kernels.dense, kernels.sparse], ids=["dense", "sparse"])
@pytest.mark.parametrize(("architecture", "dtype"), CASES, indirect=["architecture"])
def test_global_loads_and_stores_are_16_bytes_wide(
    architecture: str, dtype: str, update: Callable[..., kernels.Kernel], tmp_path: Path
) -> None:
    """One load and one store at least for each array; none by the generic path, which looks up what memory is meant."""
    kernel = update(dtype, EVERYTHING)
    assert kernel.source in examined(architecture)
    instructions = re.findall(r"\b((?:LD|ST)G?\.E[\w.]*)", sass(kernel.source, architecture, tmp_path))
    wide = np.dtype(kernels.DTYPES[dtype].real_dtype).itemsize == np.dtype(dtype).itemsize
    written = 4 if wide else 2  # theta and m; v and vhat, unless an element of theirs is half as wide
    read = written + (1 if kernel.name == "dense" else 0)  # the gradient, which sparse has in shared memory
    assert sum(name.startswith("LDG.E.128") for name in instructions) >= read, instructions
    assert sum(name.startswith("STG.E.128") for name in instructions) >= written, instructions
    assert [name for name in instructions if not name.startswith(("LDG", "STG"))] == []


def test_the_sort_knows_which_memory_it_accesses(architecture: str, tmp_path: Path) -> None:
    """Global or shared: a generic access looks up which of the two is meant, every time."""
    code = sass(SORT, architecture, tmp_path)
    instructions = re.findall(r"\b((?:LD|ST)[GS]?)(?:\.E)?[. ]", code)
    assert set(instructions) == {"LDG", "LDS", "STG", "STS"}
