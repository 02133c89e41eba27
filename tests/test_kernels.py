"""The kernels: structs as both languages see them, their sources, and the same bits whatever runs them."""

import ctypes
import functools
import itertools
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import reference
from reference import Array, assert_same_bits

import gpu_adam
from gpu_adam import IndexedSlices, Variable, kernels
from gpu_adam.devices import HostDevice, compiler, host
from gpu_adam.kernels import sources
from gpu_adam.step.index_errors import IndexErrors
from gpu_adam.step.row_sort import RowSorter
from gpu_adam.uninterrupted import make_all

DTYPES = list(kernels.DTYPES)
FILES = sorted({source.file for source in kernels.variants()})

# Structs.


def mirrors(dtype: str) -> dict[str, np.dtype[Any]]:
    """The NumPy dtype of every C struct that crosses the border, for one row of the dtype table."""
    return {
        "StepScalars": kernels.step_scalars(kernels.DTYPES[dtype].real_dtype),
        "Slots": kernels.SLOT_POINTERS,
        "Tensor": kernels.TENSOR,
        "TensorTable": kernels.TENSOR_TABLE,
        "EmbeddingTable": kernels.EMBEDDING_TABLE,
        "DeferredTable": kernels.DEFERRED_TABLE,
        "StepLog": kernels.STEP_LOG,
        "LoggedStep": kernels.logged_step(kernels.DTYPES[dtype].real_dtype),
        "Indices": kernels.INDICES,
        "Keys": kernels.KEYS,
        "IndexErrors": kernels.INDEX_ERRORS,
        "MeasuredSums": kernels.MEASURED_SUMS,
        "Norm": kernels.NORM,
        "Guard": kernels.GUARD,
        "GuardPlace": kernels.GUARD_PLACE,
        "Candidates": kernels.CANDIDATES,
        "GuardRows": kernels.GUARD_ROWS,
        "LossScale": kernels.LOSS_SCALE,
    }


def declared(struct: str, text: str) -> list[str]:
    """The names of a C struct's members, in order; those of the struct of slots are the list of slots."""
    if struct == "Slots":
        return [name for name, *_ in listed_slots(text)]
    body = re.search(rf"^struct {struct} {{\n(.*?)^}};", text, re.MULTILINE | re.DOTALL)
    assert body is not None, f"no struct {struct}"
    statements = re.sub("//.*", "", body[1]).split(";")[:-1]
    return [name for statement in statements for name in re.findall(r"(\w+)\s*(?:,|$)", statement)]


def listed_slots(text: str) -> list[tuple[str, ...]]:
    """The rows of GPU_ADAM_SLOTS: name, type in memory, type in registers, presence."""
    body = re.search(r"#define GPU_ADAM_SLOTS\(SLOT\)((?:.*\\\n)*.*)", text)
    assert body is not None
    return [tuple(row.split(", ")) for row in re.findall(r"SLOT\((.*?)\)", body[1])]


def test_every_struct_of_the_python_side_is_compared() -> None:
    structs = {name for name, value in vars(kernels).items() if isinstance(value, np.dtype)}
    compared = mirrors("float32").values()
    assert {name for name in structs if any(getattr(kernels, name) is dtype for dtype in compared)} == structs


@pytest.mark.parametrize("dtype", DTYPES)
def test_structs_have_the_same_fields_sizes_and_offsets(dtype: str, tmp_path: Path) -> None:
    """A field that only one side has shows in the names; a wrong type in a size or an offset."""
    text = "".join(path.read_text() for path in sorted(kernels.directory().glob("*.cu*")))
    python = mirrors(dtype)
    assert {name: declared(name, text) for name in python} == {name: list(d.names or ()) for name, d in python.items()}

    lines = [f'printf("{name} %zu\\n", sizeof({name}));' for name in python]
    for name, struct in python.items():
        for field in struct.names or ():
            place = f"offsetof({name}, {field}), sizeof({name}::{field})"
            lines.append(f'printf("{name}.{field} %zu %zu\\n", {place});')
    printed = output_of(lines, kernels.UpdateRule(), dtype, tmp_path)

    expected = {name: [struct.itemsize] for name, struct in python.items()}
    for name, struct in python.items():
        for field, (kind, offset, *_) in (struct.fields or {}).items():
            expected[f"{name}.{field}"] = [offset, kind.itemsize]
    found = [line.split() for line in printed.splitlines()]
    assert {name: list(map(int, figures)) for name, *figures in found} == expected


def output_of(statements: list[str], rule: kernels.UpdateRule, dtype: str, folder: Path) -> str:
    """What a C++ program prints that knows the kernels and does this."""
    program = [
        *(f"#define {define.replace('=', ' ', 1)}" for define in kernels.sparse(dtype, rule).source.defines),
        "#define GPU_ADAM_PACK_BYTES 16",
        "#include <stdio.h>",
        *(f'#include "{file}"' for file in ("fast.h", "dense.cu", "norm.cu", "sparse.cu", "deferred.cu", "guard.cu")),
        "int main() {",
        *statements,
        "}",
    ]
    (folder / "program.cpp").write_text("\n".join(program))
    directory = kernels.directory()
    include = [f"-I{directory}", f"-I{directory / 'host'}"]
    call = [*compiler.command(), "-std=c++17", *include, "program.cpp", "-o", "program"]
    compiled = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    return subprocess.run([folder / "program"], capture_output=True, text=True, check=True).stdout


# Slots.


@pytest.mark.thorough
@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_two_lists_of_slots_agree(amsgrad: bool, ema: bool, tmp_path: Path) -> None:
    """Name, order, size of an element and presence; complex64, whose real and complex elements differ in size."""
    rule = kernels.UpdateRule(amsgrad=amsgrad, ema=ema)
    show = "#define SHOW(slot, Memory, Register, present) "
    show += 'printf(#slot " %zu %zu %d\\n", sizeof(Memory), sizeof(Register), bool(present));'
    lines = output_of([show, "GPU_ADAM_SLOTS(SHOW)"], rule, "complex64", tmp_path).splitlines()
    sizes = [spec.dtype(np.dtype(np.complex64), "abs2", None).itemsize for spec in kernels.SLOT_SPECS]
    assert lines == [
        "theta 8 8 1",
        *(f"{spec.name} {n} {n} {spec.exists(rule):d}" for spec, n in zip(kernels.SLOT_SPECS, sizes, strict=True)),
    ]


@pytest.mark.thorough
def test_moved_slots_and_absent_ones(tmp_path: Path) -> None:
    """A slot that a kernel has moves by elements; one that it has not stays null."""
    statements = [
        "alignas(16) static ComplexFloat complex[8]; static float real[8];",
        "const Slots slots = {complex, complex, real, nullptr, nullptr, nullptr}, moved = slots.at(3);",
        'printf("%ld %ld %ld ", moved.theta - complex, moved.m - complex, moved.v - real);',
        'printf("%d %d", moved.vhat == nullptr, moved.average == nullptr);',
    ]
    assert output_of(statements, kernels.UpdateRule(), "complex64", tmp_path) == "3 3 3 1 1"


def test_slots_of_a_rule() -> None:
    names = {(r.amsgrad, r.ema): [spec.name for spec in kernels.slots_of(r, "float64")] for r in kernels.update_rules()}
    assert names == {
        (False, False): ["m", "v"],
        (True, False): ["m", "v", "vhat"],
        (False, True): ["m", "v", "average"],
        (True, True): ["m", "v", "vhat", "average"],
    }
    master = kernels.UpdateRule(master=True)
    assert [spec.name for spec in kernels.slots_of(master, "float16")] == ["m", "v", "master"]
    assert [spec.name for spec in kernels.slots_of(master, "float32")] == ["m", "v"]
    assert kernels.slot_spec("vhat") is kernels.SLOT_SPECS[2]
    assert kernels.slot_spec("theta") is kernels.slot_spec("a user's") is None


@pytest.mark.parametrize(
    ("dtype", "mode", "v"),
    [
        ("float32", "abs2", "float32"),
        ("complex64", "abs2", "float32"),
        ("complex128", "abs2", "float64"),
        ("complex64", "real_imag", "complex64"),
        ("int32", "abs2", "int32"),
    ],
)
def test_dtypes_of_slots(dtype: str, mode: str, v: str) -> None:
    """Moving averages of |g|^2 are real in the mode "abs2"; a dtype that the kernels do not know gives itself."""
    variable = np.dtype(dtype)
    dtypes = {spec.name: spec.dtype(variable, mode, None) for spec in kernels.SLOT_SPECS}
    wide = {"m": variable, "average": variable, "master": variable}
    assert dtypes == {**wide, "v": np.dtype(v), "vhat": np.dtype(v)}


def test_addresses_of_slots_that_are_missing_are_null() -> None:
    assert kernels.slot_pointers({"m": 2, "theta": 1, "v": 3}) == (1, 2, 3, 0, 0, 0)
    assert kernels.struct(kernels.SLOT_POINTERS, *kernels.slot_pointers({"vhat": 4})).tolist() == [(0, 0, 0, 4, 0, 0)]


# Sources.


@pytest.mark.parametrize("file", FILES)
def test_text_holds_every_header_once(file: str) -> None:
    text = kernels.Source(file, ()).text
    assert "#include" not in text
    begun = re.findall(r'^#line 1 "(.*)"$', text, re.MULTILINE)
    assert len(begun) == len(set(begun))
    assert set(begun) == {file, *headers_of(file)}
    for header in begun:
        first_line = (kernels.directory() / header).read_text().splitlines()[0]
        assert text.count(first_line) == 1


@functools.cache
def headers_of(file: str) -> frozenset[str]:
    included = re.findall('^#include "(.*)"', (kernels.directory() / file).read_text(), re.MULTILINE)
    return frozenset(included).union(*(headers_of(header) for header in included))


@pytest.mark.parametrize("file", FILES)
def test_line_numbers_are_those_of_the_files(file: str) -> None:
    """What a compiler complains about can be found."""
    name, number = "", 0
    checked = set()
    for line in kernels.Source(file, ()).text.splitlines():
        directive = re.fullmatch(r'#line (\d+) "(.*)"', line)
        if directive is not None:
            number, name = int(directive[1]), directive[2]
            continue
        if line:
            assert (kernels.directory() / name).read_text().splitlines()[number - 1] == line
            checked.add(name)
        number += 1
    assert checked == {file, *headers_of(file)}


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of cuda/ that takes its place."""
    shutil.copytree(kernels.directory(), tmp_path / "cuda")
    for module in (kernels, sources):
        monkeypatch.setattr(module, "directory", lambda: tmp_path / "cuda")
    sources._inlined.cache_clear()
    yield tmp_path / "cuda"
    sources._inlined.cache_clear()


@pytest.mark.parametrize("file", FILES)
def test_an_edited_header_changes_the_text(edited: Path, file: str) -> None:
    before = kernels.Source(file, ()).text
    for name in (file, *headers_of(file)):
        original = (edited / name).read_text()
        (edited / name).write_text(original + "// edited\n")
        sources._inlined.cache_clear()
        assert kernels.Source(file, ()).text != before, name
        (edited / name).write_text(original)


def test_an_edited_shim_gives_another_library(edited: Path) -> None:
    text = compiler.source_text(kernels.sort("sort_rows").source, faithful=True)
    seen = [compiler.identity(text)]
    assert compiler.identity(text) == seen[0]
    for shim in sorted((edited / "host").glob("*.h")):
        shim.write_text(shim.read_text() + "// edited\n")
        seen.append(compiler.identity(text))
    assert len(set(seen)) == len(seen) >= 4


@pytest.mark.parametrize("file", FILES)
def test_kernel_names_are_all_global_functions(file: str) -> None:
    code = re.sub("//.*", "", (kernels.directory() / file).read_text())
    after = code.split("__global__")[1:]
    names = [re.findall(r"(\w+)\s*\(", re.sub(r"__launch_bounds__\s*\(\d+\)", "", part))[0] for part in after]
    assert names
    assert kernels.kernel_names(file) == names


def test_variants_are_distinct_and_complete() -> None:
    variants = kernels.variants()
    assert len(set(variants)) == len(variants)
    chosen = [(rule.amsgrad, rule.clip, rule.ema, rule.adjusts) for rule in kernels.update_rules()]
    assert {choice[:2] for choice in chosen} == set(itertools.product((False, True), (0, 1, 2)))
    assert {(False, 0, True, False), (False, 0, False, True), (True, 2, True, True)} <= set(chosen)
    updates = {
        update(dtype, rule).source
        for dtype, update in itertools.product(DTYPES, (kernels.dense, kernels.sparse))
        for rule in kernels.update_rules(dtype)
    }
    staged = {
        update(dtype, rule, staged=staged).source
        for dtype, update in itertools.product(DTYPES, (kernels.dense, kernels.sparse))
        for rule in kernels.update_rules(dtype)
        for staged in (1, 2)
    }
    mixed = {kernels.dense(dtype, rule, gradient=gradient).source for dtype, rule, gradient in kernels.MIXED_UPDATES}
    assert not mixed & updates
    assert len(staged) == 2 * len(updates)
    assert not staged & updates
    rules = (kernels.UpdateRule(), kernels.UpdateRule(bounded=True), kernels.GUARDED)
    norms = {
        kernels.norm(dtype, name, rule).source
        for dtype, name, rule in itertools.product(DTYPES, kernels.kernel_names("norm.cu"), rules)
    }
    guards = {kernels.guard(name).source for name in kernels.kernel_names("guard.cu")}
    guarded = {
        update(dtype, rule).source
        for dtype, update in itertools.product(DTYPES, (kernels.dense, kernels.sparse))
        for rule in (kernels.GUARDED, kernels.MEASURED)
    }
    sorts = {kernels.sort(name).source for name in kernels.kernel_names("sort.cu")}
    wide = [dtype for dtype in DTYPES if dtype not in kernels.HALVES]
    sums = {update(dtype, kernels.ACCUMULATION).source for dtype in wide for update in (kernels.dense, kernels.sparse)}
    deferred = {
        kernels.deferred(dtype, rule).source
        for dtype in DTYPES
        for rule in (kernels.UpdateRule(), kernels.update_rules(dtype)[-1])
    } | {kernels.deferred("float32", kernels.GUARDED).source}
    assert set(variants) == updates | mixed | norms | sorts | guards | guarded | sums | deferred


@pytest.mark.parametrize("update", [kernels.dense, kernels.sparse])
def test_rules_that_differ_in_nothing_a_kernel_knows_have_one_kernel(update: Callable[..., kernels.Kernel]) -> None:
    rule = kernels.UpdateRule(norm="each")
    for other in (rule._replace(norm="global"), rule._replace(complex_mode="real_imag")):
        assert update("float32", other) is update("float32", rule)
    bounded = rule._replace(bounded=True)
    assert update("float32", bounded) is update("float32", bounded._replace(norm=None))
    assert update("float32", bounded) is not update("float32", rule)


def test_layouts() -> None:
    complex64, float64 = np.dtype(np.complex64), np.dtype(np.float64)
    assert kernels.UpdateRule().layout(complex64, complex64) == ("complex64", 1, "complex64")
    assert kernels.UpdateRule("real_imag").layout(complex64, complex64) == ("float32", 2, "float32")
    assert kernels.UpdateRule("real_imag").layout(float64, float64) == ("float64", 1, "float64")
    assert kernels.UpdateRule().layout(np.dtype(np.float16), np.dtype(np.float32)) == ("float16", 1, "float32")


# The same bits.

FAST = HostDevice(threads=1)

# Any launch shape and any number of threads gives the bits of FAST.
LAUNCHES = {
    "2 threads": HostDevice(threads=2),
    "3 threads": HostDevice(threads=3),
    "1 block": HostDevice(threads=1, max_blocks=1),
    "2 blocks": HostDevice(threads=2, max_blocks=2),
    "97 blocks": HostDevice(threads=3, max_blocks=97),
    "blocks of 1": HostDevice(block_size=1),
    "blocks of 32, 97 of them": HostDevice(block_size=32, max_blocks=97),
    "blocks of 96, 2 of them": HostDevice(block_size=96, max_blocks=2),
    "blocks of 256": HostDevice(block_size=256),
}

# amsgrad and every clipping, with two variants of each kernel.
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad, clipvalue": {"amsgrad": True, "clipvalue": 0.75},
    "amsgrad, clipnorm": {"amsgrad": True, "clipnorm": 5.0},
    "amsgrad, clipvalue, global_clipnorm": {"amsgrad": True, "clipvalue": 2.0, "global_clipnorm": 20.0},
}

STEPS = 2


WIDE = [name for name in DTYPES if name not in kernels.HALVES]
QUICK = ("float32", "complex128")  # one word and four: between them lie the others
SOME_DTYPES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.thorough) for name in WIDE]


@pytest.fixture(scope="module", params=SOME_DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    """A row of the dtype table, its libraries compiled side by side. Those of 16 bits have tests/test_halves.py."""
    name = str(request.param)
    needed = [kernels.norm(name, "square_sums").source, kernels.sort("sort_rows").source]
    for update in (kernels.dense, kernels.sparse):
        needed += [update(name, kernels.UpdateRule(amsgrad=on, bounded=on)).source for on in (False, True)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(host._library, *zip(*itertools.product(needed, (False, True)), strict=True)))
    return name


def numbers(rng: np.random.Generator, shape: Any, dtype: str) -> Array:
    x: Array = rng.standard_normal(shape)
    return (x + 1j * rng.standard_normal(shape)).astype(dtype) if np.dtype(dtype).kind == "c" else x.astype(dtype)


def special(dtype: str) -> Array:
    """Numbers at which devices could differ."""
    limits = np.finfo(dtype)
    tiny, huge = limits.tiny, limits.max
    return np.array([0, -0.0, tiny, tiny / 4, -tiny / 4, huge, -huge, np.inf, -np.inf, np.nan], dtype)


class Placed:
    """An array whose address lies `offset` elements behind a 16-byte boundary, between guards that must not change."""

    def __init__(self, values: Array, offset: int) -> None:
        self._memory = FAST.empty(offset + values.size + 4, values.dtype)
        self._memory.fill(np.nan)
        self._end = offset + values.size
        self._offset = offset
        self.array: Array = self._memory[offset : self._end].reshape(values.shape)
        self.array[...] = values
        assert values.size == 0 or (self.array.ctypes.data - offset * values.itemsize) % 16 == 0

    def check_guards(self) -> None:
        """Fail if what lies before or behind the array has changed."""
        assert np.isnan(self._memory[: self._offset]).all()
        assert np.isnan(self._memory[self._end :]).all()


class Work(NamedTuple):
    """What is stepped: variables by name with their offsets, and the gradients of every step with theirs."""

    initial: dict[str, tuple[Array, int]]
    gradients: list[dict[str, Any]]


DENSE_SIZES = (1, 2, 3, 5, 4095, 4096, 4097, 4099, 10001)


def work(dtype: str, *, finite: bool) -> Work:
    """Dense and sparse variables of odd sizes at odd addresses; unless `finite`, with special numbers in gradients."""
    rng = np.random.default_rng(7)
    tile = kernels.tile_size(dtype)
    initial: dict[str, tuple[Array, int]] = {}
    for number, size in enumerate(DENSE_SIZES):
        initial[f"dense {size}"] = numbers(rng, size, dtype), number % 4
    tables = {(300, 1): 4500, (50, 7): 120, (13, tile + 5): 9, (2, 3, 5): 2, (9, 4): 0}
    for number, shape in enumerate(tables):
        initial[f"sparse {shape}"] = numbers(rng, shape, dtype), (number + 1) % 4
    gradients: list[dict[str, Any]] = []
    for step in range(STEPS):
        of_step: dict[str, Any] = {}
        for number, (name, (values, _)) in enumerate(initial.items()):
            count = tables.get(values.shape)
            shape = values.shape if count is None else (count, *values.shape[1:])
            gradient = numbers(rng, shape, dtype)
            if not finite and gradient.size >= 100 and number % 2:
                # In the same places in every step: m and v would hide a denormal number that comes once.
                gradient.reshape(-1)[7:77:7] = special(dtype)
            offset = (3 * number + step) % 4  # the variable's for some of them
            if count is None:
                of_step[name] = gradient, offset
            else:
                kind = (np.int32, np.int64)[(number + step) % 2]
                indices = rng.integers(0, values.shape[0], count).astype(kind)
                of_step[name] = gradient, offset, indices
        gradients.append(of_step)
    return Work(initial, gradients)


@functools.cache
def works(dtype: str, finite: bool) -> Work:
    return work(dtype, finite=finite)


def stepped(device: HostDevice, job: Work, config: dict[str, Any], *, one_launch: bool = True) -> dict[str, Array]:
    """Every variable and slot after all steps, taken in one call for all variables or one call for each."""
    placed = {name: Placed(values, offset) for name, (values, offset) in job.initial.items()}
    variables = {name: Variable.over(place.array, device, name) for name, place in placed.items()}
    shared = gpu_adam.Adam(0.1, **config)
    optimizers = {name: shared if one_launch else gpu_adam.Adam(0.1, **config) for name in variables}
    for of_step in job.gradients:
        kept, pairs = [], []
        for name, (values, offset, *indices) in of_step.items():
            place = Placed(values, offset)
            kept.append((place, values))
            gradient = IndexedSlices(place.array, indices[0]) if indices else place.array
            pairs.append((gradient, variables[name]))
        if one_launch:
            shared.apply_gradients(pairs)
        else:
            for pair in pairs:
                optimizers[pair[1].name].apply_gradients([pair])
        for place, values in kept:
            place.check_guards()
            assert_same_bits(place.array, values, "a gradient")
    for place in placed.values():
        place.check_guards()
    results = {name: np.array(place.array) for name, place in placed.items()}
    for name, optimizer in optimizers.items():
        for slot in optimizer.get_slot_names():
            results[f"{slot} of {name}"] = optimizer.get_slot(variables[name], slot).numpy()
    return results


@functools.cache
def fast_results(dtype: str, mode: str) -> dict[str, Array]:
    return stepped(FAST, job_of(dtype, mode), MODES[mode])


def job_of(dtype: str, mode: str) -> Work:
    """A norm over one NaN is NaN everywhere, and would compare nothing."""
    return works(dtype, "norm" in mode)


def assert_same(actual: dict[str, Array], expected: dict[str, Array], what: str) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert_same_bits(actual[name], array, f"{what}: {name}")


@pytest.mark.thorough
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("mode", MODES)
def test_any_launch_gives_the_same_bits(dtype: str, mode: str, launch: str) -> None:
    assert_same(stepped(LAUNCHES[launch], job_of(dtype, mode), MODES[mode]), fast_results(dtype, mode), launch)


@pytest.mark.thorough
@pytest.mark.parametrize("mode", [mode for mode in MODES if "global" not in mode])
def test_one_launch_per_variable_gives_the_same_bits(dtype: str, mode: str) -> None:
    for device in (FAST, LAUNCHES["blocks of 96, 2 of them"]):
        alone = stepped(device, job_of(dtype, mode), MODES[mode], one_launch=False)
        assert_same(alone, fast_results(dtype, mode), "one launch per variable")


def test_threads_that_take_runs_of_blocks_give_the_same_bits() -> None:
    """So many blocks that a thread fetches several at a time; and two launches at once, one of which gets no pool."""
    rng = np.random.default_rng(8)
    size = 100 * kernels.CHUNK + 5
    initial, gradient = (numbers(rng, size, "float32") for _ in range(2))

    def result(threads: int) -> dict[str, Array]:
        variable = Variable(initial, device=HostDevice(threads=threads))
        optimizer = gpu_adam.Adam(0.1, clipnorm=1.0)
        for _ in range(3):
            optimizer.apply_gradients([(gradient, variable)])
        return {"variable": variable.numpy(), "v": optimizer.get_slot(variable, "v").numpy()}

    expected = result(1)
    for threads in (2, 3, 5):
        assert_same(result(threads), expected, f"{threads} threads")
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(result, [2] * 6):
            assert_same(found, expected, "two launches at once")


@pytest.mark.parametrize("sparse", [False, True])
def test_launches_that_try_fetching_ahead_give_the_same_bits(sparse: bool) -> None:
    """Launches so large that their blocks go in turns, until the trial is over; smaller ones have no turns."""
    rng = np.random.default_rng(9)
    chunks = 300
    initial, gradient = (numbers(rng, (chunks, kernels.CHUNK), "float32") for _ in range(2))
    rows = np.arange(0, chunks, 2)
    if sparse:
        gradient[1::2] = 0

    def result(part: Array, threads: int) -> dict[str, Array]:
        variable = Variable(initial[part], device=HostDevice(threads=threads))
        optimizer = gpu_adam.Adam(0.1)
        inside = np.flatnonzero(np.isin(part, rows))
        slices = gpu_adam.IndexedSlices(gradient[part[inside]], inside)
        for _ in range(5):
            optimizer.apply_gradients([(slices if sparse else gradient[part], variable)])
        return {"variable": variable.numpy(), "v": optimizer.get_slot(variable, "v").numpy()}

    everything = np.arange(chunks)
    parts = [result(part, 1) for part in np.array_split(everything, 3)]
    expected = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for threads in (1, 2):
        assert_same(result(everything, threads), expected, f"{threads} threads")


@pytest.mark.parametrize("mode", ["plain", "amsgrad, clipvalue"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.thorough)], indirect=True)
def test_fast_mode_gives_the_reference_bits(dtype: str, mode: str) -> None:
    """What all the launches above are compared with. The oracle knows real numbers only."""
    job, config = job_of(dtype, mode), dict(MODES[mode])
    bound = config.pop("clipvalue", np.inf)
    oracle = reference.Adam([values for values, _ in job.initial.values()], 0.1, **config)
    for of_step in job.gradients:
        dense = []
        for name, (values, _, *indices) in of_step.items():
            clipped = np.clip(values, -bound, bound).astype(dtype)
            dense.append(reference.densified(clipped, indices[0], job.initial[name][0]) if indices else clipped)
        oracle.step(dense)
    results = fast_results(dtype, mode)
    for number, name in enumerate(job.initial):
        assert_same_bits(results[name], oracle.variables[number], name)
        assert_same_bits(results[f"m of {name}"], oracle.m[number], f"m of {name}")
        assert_same_bits(results[f"v of {name}"], oracle.v[number], f"v of {name}")


def test_staged_scalars_give_the_same_bits() -> None:
    """Read where the kernel is to look, while all other places hold other numbers; zeros are what was never staged."""
    numbers_of_a_step = (0.01, 0.1, 0.001, 1e-7, -1, 0.5, 0.9, 0, 1, 0.75, 1, 1)
    scalars = kernels.struct(kernels.step_scalars("float32"), 0, *numbers_of_a_step)
    garbage = kernels.struct(scalars.dtype, 0, *[np.nan] * len(numbers_of_a_step))
    zeros, null = np.zeros_like(scalars), kernels.pointer(0)
    garbage["clip_value"] = np.inf
    results = []
    for staged, argument, in_memory, frozen in (
        (0, scalars, None, None),
        (1, garbage, scalars, None),
        (2, garbage, scalars, garbage),
        (2, garbage, scalars, None),
        (2, scalars, zeros, None),
        (2, garbage, zeros, scalars),
    ):
        rng = np.random.default_rng(1)
        theta, m, v, g = (np.abs(numbers(rng, 37, "float32")) for _ in range(4))
        addresses = {name: array.ctypes.data for name, array in (("theta", theta), ("m", m), ("v", v))}
        tensor = kernels.struct(kernels.TENSOR, kernels.slot_pointers(addresses), 37, 0, 0, 0)
        gradients, chunk_tensor = np.array([g.ctypes.data], np.uint64), np.zeros(1, np.int32)
        places = [array.ctypes.data for array in (tensor, gradients, chunk_tensor)]
        table = kernels.struct(kernels.TENSOR_TABLE, *places, 1, 0 if frozen is None else frozen.ctypes.data)
        given = [argument, null if in_memory is None else kernels.pointer(in_memory.ctypes.data)]
        kernel = kernels.dense("float32", kernels.UpdateRule(bounded=True), staged=staged)
        FAST.prepare(kernel, [table, null, kernels.scalar(0), *given, kernels.struct(kernels.MEASURED_SUMS, 0, 0)])(1)
        results.append({"theta": theta, "m": m, "v": v})
    assert np.isfinite(results[0]["theta"]).all()
    for result in results[1:]:
        assert_same(result, results[0], "staged")


# The sort of row numbers.

SORTERS = {
    "fast": HostDevice(threads=2),
    "fast, 1 block": HostDevice(threads=1, max_blocks=1),
    "blocks of 1": HostDevice(block_size=1, max_blocks=2),
    "blocks of 32": HostDevice(block_size=32),
    "blocks of 96": HostDevice(block_size=96, max_blocks=2),
    "blocks of 256": HostDevice(block_size=256),
}


class Sorted(NamedTuple):
    """Keys in order, the positions they came from, and the note of errors."""

    rows: Array
    positions: Array
    errors: Any


def sort_on(device: HostDevice, indices: Array, rows: int) -> Sorted:
    errors = IndexErrors(Variable(np.zeros((1, 1), np.float32), device=device))
    sorter = RowSorter(device, rows, errors)
    sorter.bind(indices)
    make_all(sorter.calls())
    row, position = (read_memory(int(sorter.keys[name][0]), len(indices)) for name in ("row", "position"))
    return Sorted(row, position, errors.array.view(kernels.INDEX_ERRORS)[0])


def read_memory(address: int, count: int) -> Array:
    return np.array((ctypes.c_longlong * count).from_address(address), np.int64)


def expected_sort(indices: Array, rows: int) -> tuple[Array, Array]:
    keys = np.where((indices < 0) | (indices >= rows), rows, indices.astype(np.int64))
    positions = np.argsort(keys, kind="stable")
    return keys[positions], positions


INDICES: dict[str, Callable[[np.random.Generator, int, int], Array]] = {
    "random": lambda rng, count, rows: rng.integers(0, rows, count),
    "all equal": lambda rng, count, rows: np.full(count, rows - 1),
    "sorted": lambda rng, count, rows: np.sort(rng.integers(0, rows, count)),
    "backwards": lambda rng, count, rows: np.sort(rng.integers(0, rows, count))[::-1].copy(),
    "out of range": lambda rng, count, rows: rng.integers(-rows, 2 * rows, count),
}


@pytest.mark.thorough
@pytest.mark.parametrize("launch", SORTERS)
@pytest.mark.parametrize(
    ("kind", "index_dtype"), [*((kind, "int64") for kind in INDICES), ("random", "int32"), ("out of range", "int32")]
)
def test_sort_is_numpys_stable_one(launch: str, kind: str, index_dtype: str) -> None:
    rng = np.random.default_rng(3)
    runs = kernels.SORT_RUN
    shapes = [
        (1, 1),
        (2, 127),
        (33, 128),
        (257, 70_000),
        (runs, 300),
        (runs + 1, 4095),
        (3 * runs - 7, 256),
        (10001, 17),
    ]
    shapes += [(100, kernels.SORT_ROWS - 1), (100, kernels.SORT_ROWS)]
    if index_dtype == "int64":
        shapes += [(100, 2**40), (runs + 5, 2**33 + 1)]
    for count, rows in shapes:
        indices = INDICES[kind](rng, count, rows).astype(index_dtype)
        result = sort_on(SORTERS[launch], indices, rows)
        keys, positions = expected_sort(indices, rows)
        assert_same_bits(result.rows, keys, f"rows of {count} indices")
        assert_same_bits(result.positions, positions, f"positions of {count} indices")
        bad = np.flatnonzero((indices < 0) | (indices >= rows))
        assert result.errors["count"] == len(bad)
        assert result.errors["first_position"] == (bad[0] if len(bad) else np.iinfo(np.uint64).max)


def test_a_sort_of_nothing_touches_nothing() -> None:
    result = sort_on(FAST, np.zeros(0, np.int64), 5)
    assert result.errors == kernels.NO_INDEX_ERRORS[()]


@pytest.mark.parametrize("value", [-(2**63), 2**63 - 1, -1])
def test_the_largest_indices_are_out_of_range(value: int) -> None:
    indices = np.array([1, value, 0])
    for device in SORTERS.values():
        result = sort_on(device, indices, 2)
        assert result.rows.tolist() == [0, 1, 2]
        assert result.positions.tolist() == [2, 0, 1]
        assert (result.errors["count"], result.errors["first_position"]) == (1, 1)


def test_a_sorter_sorts_again_and_notes_errors_until_they_are_read() -> None:
    """Buffers grow and are used again; the count goes on, and the first position is the smallest one seen."""
    errors = IndexErrors(Variable(np.zeros((4, 1), np.float32), device=FAST))
    sorter = RowSorter(FAST, 4, errors)
    for indices in ([3, 9, 0], list(range(4)) * 2000, [0, 0, -1, 7], [2]):
        array = np.array(indices, np.int64)
        sorter.bind(array)
        make_all(sorter.calls())
        keys, positions = expected_sort(array, 4)
        assert_same_bits(read_memory(int(sorter.keys["row"][0]), len(indices)), keys)
        assert_same_bits(read_memory(int(sorter.keys["position"][0]), len(indices)), positions)
    assert errors.array.view(kernels.INDEX_ERRORS)[0].tolist() == (3, 1, 0, 0)


# Norms.

BOTH_MODES = {"fast": FAST, "faithful": LAUNCHES["blocks of 96, 2 of them"]}
ULP = 2.0**-53  # largest relative error of one rounding


def factors(
    device: HostDevice, gradients: list[Array], limit: float, bound: float = np.inf, *, is_global: bool = False
) -> Array:
    """A factor for each gradient, or one for all, by the pass over the table and over each array, which must agree."""
    dtype = gradients[0].dtype.name
    chunks = [-(-gradient.size // kernels.CHUNK) for gradient in gradients]
    first = np.cumsum([0, *chunks])
    tensors = np.zeros(len(gradients), kernels.TENSOR)
    tensors["size"], tensors["first_chunk"] = [g.size for g in gradients], first[:-1]
    pointers = np.array([g.ctypes.data for g in gradients], np.uint64)
    chunk_tensor = np.repeat(np.arange(len(gradients), dtype=np.int32), chunks)
    addresses = (tensors.ctypes.data, pointers.ctypes.data, chunk_tensor.ctypes.data)
    table = kernels.struct(kernels.TENSOR_TABLE, *addresses, int(first[-1]), 0)
    scalars = np.zeros(1, kernels.step_scalars(kernels.DTYPES[dtype].real_dtype))
    scalars["clip_value"] = bound
    null = kernels.pointer(0)
    rule = kernels.UpdateRule(bounded=bool(np.isfinite(bound)))

    def norm_struct(out: Array) -> Array:
        return kernels.struct(kernels.NORM, out.ctypes.data, written.ctypes.data, int(len(out) > 1), limit)

    sums, alone = (np.full(first[-1] + 1, -7.0) for _ in range(2))
    out = np.full(1 if is_global else len(gradients), np.nan)
    written = np.zeros(len(out), np.uint64)
    arguments = [table, scalars, null, kernels.pointer(sums.ctypes.data), null, norm_struct(out)]
    launch = device.prepare(kernels.norm(dtype, "square_sums", rule), arguments)
    for _ in range(2):  # the second one finds the counters as the first one did
        launch(int(first[-1]))
        assert not written.any()
    for number, (gradient, begin, count) in enumerate(zip(gradients, first, chunks, strict=False)):
        place = kernels.pointer(alone.ctypes.data + 8 * int(begin))
        values, size, own = kernels.pointer(gradient.ctypes.data), kernels.scalar(gradient.size), np.full(1, np.nan)
        arguments = [values, size, scalars, null, place, null, norm_struct(own)]
        device.prepare(kernels.norm(dtype, "square_sums_of", rule), arguments)(count)
        if not is_global:
            assert_same_bits(own, out[number : number + 1], "square_sums_of and square_sums")
    assert_same_bits(alone, sums, "square_sums_of and square_sums")
    assert sums[-1] == -7
    if is_global:
        assert_same_bits(global_factor(device, dtype, sums[:-1], limit), out, "the last block and clip_by_global_norm")
    return out


def global_factor(device: HostDevice, dtype: str, sums: Array, limit: float) -> Array:
    """The factor of one norm from its sums."""
    out = np.full(1, np.nan)
    begin, end = kernels.pointer(sums.ctypes.data), kernels.pointer(out.ctypes.data)
    arguments = [begin, kernels.scalar(len(sums)), np.array([limit]), end]
    device.prepare(kernels.norm(dtype, "clip_by_global_norm"), arguments)(1)
    return out


def norms(device: HostDevice, gradients: list[Array], bound: float = np.inf) -> Array:
    """The norm of each gradient, from its factor when everything is clipped: 2 roundings more, tiny / (tiny / norm)."""
    tiny = 2.0**-100
    return np.asarray(tiny / factors(device, gradients, tiny, bound))


def parts(x: Array) -> Array:
    """Real and imaginary parts as float64."""
    real = x.real.dtype
    return x.reshape(-1).view(real).astype(np.float64)


def exact_norm(x: Array, scale: float = 1.0) -> float:
    """The norm, scaled before it is squared so that the exact sum does not overflow."""
    scaled = parts(x) * scale
    return math.sqrt(math.fsum(scaled * scaled)) / scale


def tolerance(size: int) -> float:
    """Relative error of a norm of `size` elements.

    A term is rounded at most 3 times (two squares and their sum where it is complex), here and in the exact sum. A
    chunk adds at most 4 terms to a lane and then 10 levels of a tree; so does the sum over chunks, with chunks / 1024
    of them to a lane. The root halves the error of what is under it, and rounds once, here and in the exact norm; so
    do the two divisions of `norms`.
    """
    chunks = -(-size // kernels.CHUNK)
    roundings = 3 + 3 + 4 + 10 + -(-chunks // 1024) + 10
    return 1.01 * (roundings / 2 + 2 + 2) * ULP


NORM_SIZES = (1, 2, 3, 31, 1023, 1024, 1025, 4095, 4096, 4097, 10001)


def gradients_at(rng: np.random.Generator, dtype: str, shift: int) -> list[Array]:
    return [Placed(numbers(rng, size, dtype), (number + shift) % 4).array for number, size in enumerate(NORM_SIZES)]


@pytest.mark.thorough
@pytest.mark.parametrize("bound", [np.inf, 0.5])
def test_norms_have_the_same_bits_whatever_the_launch_and_the_address(dtype: str, bound: float) -> None:
    expected = norms(FAST, gradients_at(np.random.default_rng(11), dtype, 0), bound)
    for shift, (launch, device) in enumerate(LAUNCHES.items()):
        gradients = gradients_at(np.random.default_rng(11), dtype, shift)
        assert_same_bits(norms(device, gradients, bound), expected, launch)
        for number in (0, 7):  # one by one, without ends
            assert_same_bits(norms(device, [gradients[number]], bound), expected[number : number + 1], launch)
        total, fast_total = (factors(d, gradients, 1.0, bound, is_global=True) for d in (device, FAST))
        assert_same_bits(total, fast_total, f"global norm, {launch}")


def test_norms_are_right(dtype: str) -> None:
    gradients = gradients_at(np.random.default_rng(12), dtype, 0)
    found = norms(FAST, gradients)
    for norm, gradient in zip(found, gradients, strict=True):
        assert norm == pytest.approx(exact_norm(gradient), rel=tolerance(gradient.size), abs=0)
    total = sum(gradient.size for gradient in gradients)
    everything = np.concatenate(gradients)
    scale = factors(FAST, gradients, 0.25, is_global=True)[0]
    assert scale == pytest.approx(0.25 / exact_norm(everything), rel=tolerance(total), abs=0)


def test_a_norm_of_many_chunks(dtype: str) -> None:
    """More chunks than lanes, so that a lane adds several of them: sums written by hand."""
    rng = np.random.default_rng(13)
    sums = rng.random(3 * 1024 + 5)
    expected = math.sqrt(math.fsum(sums))
    results = [1 / global_factor(device, dtype, sums, 1.0)[0] for device in (FAST, *LAUNCHES.values())]
    assert len(set(results)) == 1
    assert results[0] == pytest.approx(expected, rel=1.01 * ((4 + 10) / 2 + 4) * ULP, abs=0)


def test_elements_are_bounded_before_the_norm(dtype: str) -> None:
    x = np.array([3, -4, 0.25, 0], dtype)
    assert norms(FAST, [x], 1.0)[0] == pytest.approx(math.sqrt(1 + 1 + 0.0625), rel=2 * ULP, abs=0)


@pytest.mark.parametrize("launch", BOTH_MODES)
def test_factors_of_small_and_large_norms(dtype: str, launch: str) -> None:
    """min(1, c / n): nothing happens to what is short enough."""
    device = BOTH_MODES[launch]
    gradients = [np.array([3, 4], dtype), np.array([0, 0, 0], dtype), np.array([0.25], dtype)]
    assert factors(device, gradients, 2.0).tolist() == [2 / 5, 1, 1]
    assert factors(device, gradients[1:], 2.0, is_global=True).tolist() == [1]
    assert factors(device, gradients[:2], 2.0, is_global=True).tolist() == [2 / 5]


@pytest.mark.parametrize("launch", BOTH_MODES)
def test_huge_float32_values_do_not_overflow(launch: str) -> None:
    for name in DTYPES:
        if kernels.DTYPES[name].real_dtype == "float64" or name in kernels.HALVES:
            continue
        x = np.full(5000, np.finfo(np.float32).max, name)
        (norm,) = norms(BOTH_MODES[launch], [x])
        assert norm == pytest.approx(exact_norm(x, 2.0**-100), rel=tolerance(x.size), abs=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("launch", BOTH_MODES)
def test_a_norm_that_is_not_finite_makes_its_factors_nan(dtype: str, launch: str, bad: float) -> None:
    device = BOTH_MODES[launch]
    gradients = [np.ones(5000, dtype), np.ones(3, dtype)]
    gradients[0][4097] = bad
    first, second = factors(device, gradients, 1.0)
    assert np.isnan(first)
    assert second == 1 / math.sqrt(3)
    assert np.isnan(factors(device, gradients, 1.0, is_global=True)).all()
