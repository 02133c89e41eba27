"""What the documents say: their Python runs, their commands, options, extras and files are real."""

import re
from pathlib import Path

import pytest
import typer.main

import gpu_adam
from gpu_adam import cli
from gpu_adam.devices import Device
from gpu_adam.kernels import DTYPES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "cuda/README.md"]
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def texts() -> str:
    return "\n".join((ROOT / name).read_text() for name in DOCUMENTS)


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_runs_as_typed(
    device: Device,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    number: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(PYTHON[number], f"README.md, block {number}", "exec"), {"__name__": "__main__"})
    promised = re.findall(r"^print\(.*\)  # (.*)$", PYTHON[number], re.M)
    assert capsys.readouterr().out.splitlines() == promised


def test_the_first_example_is_short_and_prints() -> None:
    assert len(PYTHON) >= 2
    assert len([line for line in PYTHON[0].splitlines() if line.strip()]) <= 12
    assert "print(" in PYTHON[0]


def test_the_two_commands_come_first() -> None:
    (first,) = re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)[:1]
    assert first == 'pip install -e . && gpu-adam demo\npip install -e ".[test]" && pytest\n'


def test_commands_and_their_options_are_real() -> None:
    command = typer.main.get_command(cli.app)
    known = command.commands  # type: ignore[attr-defined]
    assert set(re.findall(r"(?:`|&& )gpu-adam (\w+)", texts())) == set(known)
    named = set(re.findall(r"`gpu-adam demo (\w+)`", README))
    assert named | {"digits"} == set(cli.DEMOS)
    options = {option for parameter in known["demo"].params for option in parameter.opts}
    (listed,) = re.findall(r"trains on real data \(([^)]*)\)", README)
    assert set(re.findall(r"--[a-z]+", listed)) == {option for option in options if option.startswith("--")}


def test_extras_are_real() -> None:
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    real = re.findall(r"^(\w+) = ", section, re.M)
    used = {extra for extras in re.findall(r"\.\[([\w,]+)\]", texts()) for extra in extras.split(",")}
    assert used <= set(real)
    assert {"cuda12", "cuda13", "zig", "test", "dev"} <= used


def test_services_and_environment_variables_are_real() -> None:
    compose = (ROOT / "docker" / "compose.yaml").read_text()
    services = re.findall(r"docker compose -f docker/compose.yaml run --rm (\S+)", README)
    assert services == re.findall(r"^  ([\w-]+):\n    build:", compose, re.M)
    sources = "".join(path.read_text() for path in (ROOT / "gpu_adam").rglob("*.py"))
    assert set(re.findall(r"`(GPU_ADAM_[A-Z]+)`", README)) == set(re.findall(r'"(GPU_ADAM_[A-Z]+)"', sources))


def test_dtypes_are_real() -> None:
    (listed,) = re.findall(r"^- Variables are (.*?)\. ", README, re.M)
    assert re.findall(r"`(\w+)`", listed) == list(DTYPES)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_files_are_there(document: str) -> None:
    text, folder = (ROOT / document).read_text(), (ROOT / document).parent
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (folder / target).exists(), f"{document} links to {target}"
    for name in re.findall(r"`((?:gpu_adam|cuda|tests|docker|profiling|\.ci)/[\w./]*)`", text):
        assert (ROOT / name).exists(), f"{document} names {name}"


def test_there_is_one_place_for_measurements() -> None:
    assert README.count("<!-- performance:begin -->\n|") == README.count("|\n<!-- performance:end -->") == 1


def test_the_changelog_knows_the_version() -> None:
    assert f"## [{gpu_adam.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
