"""The shape of the package: who imports whom, read from the sources."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import gpu_adam
from gpu_adam import kernels

PACKAGE = Path(gpu_adam.__file__).parent
ROOT = "gpu_adam"

# A module imports only from lower floors, or from an earlier one of its own floor. A folder is one place, whose modules
# may import each other: a file that moves within its folder edits nothing here.
FLOORS = [
    ["errors", "arrays", "nvtx", "autodiff_seam", "rules", "uninterrupted", "held_signals"],
    ["kernels"],
    ["schedules", "devices", "communicators"],
    ["conversion", "behind", "variables", "loss_scale", "hyperparameters"],
    ["state"],
    ["step"],
    # What is differentiated knows nothing of optimizers.
    ["autodiff"],
    ["adam", "np"],
    ["interop", "torch", "distributed"],
    [""],
    ["service"],
    ["demos"],
    ["bench", "files"],
    ["cli"],
    ["__main__"],
]
ORDER = [place for floor in FLOORS for place in floor]


def place_of(module: str) -> int:
    """Where a module, or its folder, stands in the order, from below."""
    return ORDER.index(module.partition(".")[0])


def module_of(path: Path) -> str:
    """Dotted name below the package; "" is the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str) -> set[str]:
    """Full dotted names that a module imports, anywhere in it; of `from a import b` a.b where that is a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            base = node.module or ""
            for alias in node.names:
                below = f"{base}.{alias.name}".removeprefix(f"{ROOT}.")
                found.add(f"{ROOT}.{below}" if base.split(".")[0] == ROOT and below in SOURCES else base)
    return found


def own_imports_of(module: str) -> set[str]:
    """The package's own modules among them, without the package's name."""
    names = {name for name in imports_of(module) if name.split(".")[0] == ROOT}
    return {name.removeprefix(ROOT).removeprefix(".") for name in names}


def test_every_module_has_a_floor() -> None:
    """And every floor's modules exist."""
    assert {place_of(module) for module in SOURCES} == set(range(len(ORDER)))


@pytest.mark.parametrize("module", [module for module in SOURCES if module])
def test_imports_go_down(module: str) -> None:
    place, folder = place_of(module), module.partition(".")[0]
    above = {
        name
        for name in own_imports_of(module)
        if place_of(name) >= place and not (name.partition(".")[0] == folder and name != module)
    }
    assert not above, f"{module} imports {sorted(above)}, which do not lie below it"


def test_only_commands_display() -> None:
    """The optimizer is imported without what the command line needs."""
    for module in SOURCES:
        if place_of(module) <= place_of(""):
            assert not {name.split(".")[0] for name in imports_of(module)} & {"rich", "typer"}, module


def test_one_module_imports_cupy() -> None:
    """The others work where it is not installed, and do not wait for it where it is."""
    importing = [module for module in SOURCES if "cupy" in {name.split(".")[0] for name in imports_of(module)}]
    assert importing == ["devices.cuda"]


def test_differentiation_stands_alone() -> None:
    """It uses arrays, variables and errors, and nothing of the optimizer."""
    for module in SOURCES:
        if module.startswith("autodiff"):
            others = {name for name in own_imports_of(module) if not name.startswith("autodiff")}
            assert others <= {"errors", "arrays", "autodiff_seam", "variables"}, module


def test_nobody_asks_which_device_it_is() -> None:
    """Controller, updates and optimizer know devices by their interface: no branch on a device's name or kind."""
    for module in SOURCES:
        if module.partition(".")[0] in ("step", "state", "adam"):
            assert not {"devices.cuda", "devices.host"} & own_imports_of(module), module


def test_cuda_is_no_package() -> None:
    """CuPy imports the namespace package `cuda`, which a regular one of that name would hide."""
    assert not list(kernels.directory().rglob("*.py"))


@pytest.mark.parametrize("path", ["autodiff", "autodiff.torch", "autodiff.jax"])
def test_derivatives_are_attributes_imported_when_asked_for(path: str) -> None:
    _, _, framework = path.partition(".")
    if framework:
        pytest.importorskip(framework)
    code = (
        "import sys, gpu_adam\n"
        "assert 'gpu_adam.autodiff' not in sys.modules\n"
        "gpu_adam.autodiff.gradients\n"
        "assert not {'torch', 'jax'} & set(sys.modules)\n"
        f"assert gpu_adam.{path} is sys.modules['gpu_adam.{path}']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["gpu_adam", "gpu_adam.autodiff"])
def test_what_is_not_there_is_an_attribute_error(module: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nonesuch'"):
        importlib.import_module(module).nonesuch  # noqa: B018
