"""The wheel, built through the sdist: what is in it, and a step with it where nothing else of the project is."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEP = """
import pathlib, sys
import numpy as np
import gpu_adam
from gpu_adam import kernels
assert pathlib.Path(gpu_adam.__file__).is_relative_to(sys.prefix), gpu_adam.__file__
assert kernels.directory().is_relative_to(sys.prefix), kernels.directory()
gpu_adam.set_device("host")
w = gpu_adam.Variable(np.zeros(5, np.float32))
assert gpu_adam.Adam(0.5).apply_gradients([(np.ones(5, np.float32), w)]) == 1
print(w.numpy().round(3))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, without this process's Python paths."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist of a clone that has more than the project in it, and the wheel of the sdist."""
    directory = tmp_path_factory.mktemp("dist")
    probe = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory / "probe"), "hatchling"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("the wheel's build needs a package index, and none answers")
    clone = directory / "clone"
    shutil.copytree(ROOT, clone, ignore=lambda folder, names: {".git", *(n for n in names if is_foreign(folder, n))})
    installed = clone / "environment" / "lib" / "site-packages" / "package"
    installed.mkdir(parents=True)
    for path in (installed / "module.py", clone / "environment" / "pyvenv.cfg", clone / "notes.txt", clone / "try.py"):
        path.touch()
    run(sys.executable, "-m", "build", "--outdir", directory, clone, cwd=directory)
    return directory


def is_foreign(folder: str, name: str) -> bool:
    """Whether a folder of the checkout is an environment or a cache, and may be large."""
    return name.endswith("_cache") or (Path(folder) / name / "pyvenv.cfg").exists()


def only(directory: Path, pattern: str) -> Path:
    (path,) = directory.glob(pattern)
    return path


def relative(root: Path, *patterns: str) -> set[str]:
    return {str(path.relative_to(root)) for pattern in patterns for path in root.glob(pattern)}


@pytest.mark.thorough
def test_the_wheel_has_all_it_needs_in_one_package(dist: Path) -> None:
    with zipfile.ZipFile(only(dist, "*.whl")) as wheel:
        names = set(wheel.namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"gpu_adam"}
    kernels = relative(ROOT, "cuda/*.cu", "cuda/*.cuh", "cuda/host/*.h", "cuda/host/*.cpp")
    assert len(kernels) > 10
    assert {f"gpu_adam/{name}" for name in kernels} <= names
    assert relative(ROOT, "gpu_adam/**/*.py", "gpu_adam/data/*.*", "gpu_adam/**/*.html", "gpu_adam/py.typed") <= names
    assert {name for name in names if name.endswith("licenses/LICENSE")}
    assert not {name for name in names if "__pycache__" in name}


@pytest.mark.thorough
def test_the_sdist_is_the_project_and_nothing_else(dist: Path) -> None:
    with tarfile.open(only(dist, "*.tar.gz")) as sdist:
        members = [name.partition("/")[2] for name in sdist.getnames()]
    names = set(members)
    assert len(members) == len(names)
    files = ("*.md", "LICENSE", "pyproject.toml", ".gitignore")
    folders = (".ci", "cuda", "docker", "gpu_adam", "profiling", "tests")
    clone = dist / "clone"
    found = relative(clone, *files, *(f"{folder}/**/*" for folder in folders))
    wanted = {name for name in found if (clone / name).is_file() and "__pycache__" not in name}
    assert len(wanted) > 200
    assert wanted <= names
    assert {name.partition("/")[0] for name in names - wanted} == {"PKG-INFO"}


@pytest.mark.thorough
def test_the_installed_wheel_steps(dist: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", "fresh", cwd=tmp_path)
    scripts = tmp_path / "fresh" / "bin"
    pip = (sys.executable, "-m", "pip", "--python", scripts / "python")
    run(*pip, "install", "--no-compile", only(dist, "*.whl"), cwd=tmp_path)
    assert run(scripts / "python", "-c", STEP, cwd=tmp_path) == "[-0.5 -0.5 -0.5 -0.5 -0.5]\n"
    assert "gpu_adam" in run(scripts / "gpu-adam", "info", cwd=tmp_path)
