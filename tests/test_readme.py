"""What the documents say: their Python runs, their commands, options, extras, files and headings are real."""

import contextlib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
from service.running import InThread

import gpu_adam
from gpu_adam import cli
from gpu_adam.devices import Device
from gpu_adam.kernels import DTYPES
from gpu_adam.state import checkpoint

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PACKAGE, FORMAT, KERNELS = "gpu_adam/README.md", "gpu_adam/state/README.md", "cuda/README.md"
RANKS, SERVICE = "gpu_adam/distributed/README.md", "gpu_adam/service/README.md"
DOCUMENTS = [
    "README.md",
    PACKAGE,
    FORMAT,
    RANKS,
    SERVICE,
    KERNELS,
    "profiling/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]


def blocks(document: str) -> list[str]:
    """The Python of a document, block by block."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.M | re.S)


BLOCKS = [(document, number) for document in DOCUMENTS for number in range(len(blocks(document)))]


def texts() -> str:
    return "\n".join((ROOT / name).read_text() for name in DOCUMENTS)


def run(block: str, title: str = "a block") -> dict[str, Any]:
    """Run a block as a program; its names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(block, title, "exec"), names)
    return names


@contextlib.contextmanager
def the_service(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The service of the configuration in its document, where a client finds it by default."""
    (config,) = re.findall(r"^```toml\n(.*?)^```", (ROOT / SERVICE).read_text(), re.M | re.S)
    np.save(directory / "b.npy", np.zeros(10, np.float32))
    service = InThread(directory, f'device = "host"\n{config}')
    monkeypatch.setenv("GPU_ADAM_SOCKET", str(service.path))
    yield
    service.close()


@pytest.mark.parametrize(("document", "number"), BLOCKS)
def test_python_runs_as_typed(
    device: Device,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    document: str,
    number: int,
) -> None:
    block = blocks(document)[number]
    imported = re.findall(r"^(?:import|from) (\w+)", block, re.M)
    if "cupy" in imported and device.xp is np:
        pytest.skip("needs a real GPU, or an emulated one")
    for module in imported:
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed (extra: peers)")
    monkeypatch.chdir(tmp_path)
    with the_service(tmp_path, monkeypatch) if document == SERVICE else contextlib.nullcontext():
        run(block, f"{document}, block {number}")
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", block, re.M)
    assert capsys.readouterr().out.splitlines() == promised


def test_every_specification_has_a_program() -> None:
    for document in ("README.md", PACKAGE, FORMAT, RANKS, SERVICE, KERNELS):
        assert any("print(" in block for block in blocks(document)), document


def test_the_loop_goes_on_from_its_checkpoint(device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (loop,) = [block for block in blocks("README.md") if "adam.load(" in block]

    def end(folder: str, block: str) -> tuple[int, bytes]:
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        names = run(block)
        return int(names["adam"].iterations), names["z"].numpy().tobytes()

    at_once = end("at once", loop)
    assert loop.count("adam.iterations < 200") == 1
    interrupted = end("in two parts", loop.replace("adam.iterations < 200", "adam.iterations < 130"))
    (file,) = (tmp_path / "in two parts").iterdir()
    assert checkpoint.read(file)[0]["iterations"] == 100
    resumed = end("in two parts", loop)
    assert (at_once[0], interrupted[0], resumed[0]) == (200, 130, 200)
    assert resumed[1] == at_once[1] != interrupted[1]


def test_the_first_example_is_short_and_prints() -> None:
    first = blocks("README.md")[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 12
    assert "print(" in first


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
    for document in ("README.md", PACKAGE, FORMAT, RANKS, SERVICE):
        for line in (ROOT / document).read_text().splitlines():
            assert len(line) <= 120 or line.startswith("|"), f"{document}: {line}"


def test_the_two_commands_come_first() -> None:
    (first,) = re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)[:1]
    assert first == 'pip install -e . && gpu-adam demo\npip install -e ".[test]" && pytest\n'


def test_commands_and_their_options_are_real() -> None:
    command = typer.main.get_command(cli.app)
    known = command.commands  # type: ignore[attr-defined]
    assert set(re.findall(r"(?:`|&& )gpu-adam (\w+)", texts())) == set(known)
    named = set(re.findall(r"gpu-adam demo (\w+)`", texts()))
    assert named | {"digits"} == set(cli.DEMOS)
    options = {option for parameter in known["demo"].params for option in parameter.opts}
    (listed,) = re.findall(r"trains on real data \(([^)]*)\)", texts())
    assert set(re.findall(r"--[a-z]+", listed)) == {option for option in options if option.startswith("--")}


def test_extras_are_real() -> None:
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    real = re.findall(r"^(\w+) = ", section, re.M)
    used = {extra for extras in re.findall(r"\.\[([\w,]+)\]", texts()) for extra in extras.split(",")}
    assert used <= set(real)
    assert {"cuda12", "cuda13", "zig", "test", "dev"} <= used


def test_services_and_environment_variables_are_real() -> None:
    compose = (ROOT / "docker" / "compose.yaml").read_text()
    services = re.findall(r"docker compose -f docker/compose.yaml (?:run --rm|up) (\S+)$", texts(), re.M)
    assert services == re.findall(r"^  ([\w-]+):\n    build:", compose, re.M)
    sources = "".join(path.read_text() for path in (ROOT / "gpu_adam").rglob("*.py"))
    assert set(re.findall(r"^\| `(GPU_ADAM_[A-Z]+)`", texts(), re.M)) == set(
        re.findall(r'"(GPU_ADAM_[A-Z]+)"', sources)
    )


def test_dtypes_are_real() -> None:
    (listed,) = re.findall(r"^- Variables are (.*?)\. ", (ROOT / KERNELS).read_text(), re.M)
    assert re.findall(r"`(\w+)`", listed) == list(DTYPES)


def headings(text: str) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_files_are_there(document: str) -> None:
    text, folder = (ROOT / document).read_text(), (ROOT / document).parent
    for name, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        target = folder / name if name else ROOT / document
        assert target.exists(), f"{document} links to {name}"
        assert not anchor or anchor in headings(target.read_text()), f"{document} links to {name}#{anchor}"
    for name in re.findall(r"`((?:gpu_adam|cuda|tests|docker|profiling|\.ci)/[\w./]*)`", text):
        assert (ROOT / name).exists(), f"{document} names {name}"


def test_pictures_are_small() -> None:
    pictures = re.findall(r"!\[.+\]\((.*)\)", README)
    assert pictures
    for name in pictures:
        assert (ROOT / name).stat().st_size < 150_000, name


def test_there_is_one_place_for_measurements() -> None:
    assert README.count("<!-- performance:begin -->\n|") == README.count("|\n<!-- performance:end -->") == 1


def test_the_changelog_knows_the_version() -> None:
    assert f"## [{gpu_adam.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
