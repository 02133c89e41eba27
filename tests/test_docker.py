"""The images and their compose file, as far as they can be read without a docker engine."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from gpu_adam.cli import app
from gpu_adam.service.config import ServiceConfig, read_config

ROOT = Path(__file__).parent.parent
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
IMAGE = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)

Instruction = tuple[str, str]


def instructions(dockerfile: Path) -> list[Instruction]:
    """(NAME, rest of the line) of each instruction, lines that end with a backslash joined to the next."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.M).replace("\\\n", "")
    parts = (line.partition(" ") for line in text.splitlines() if line.strip())
    return [(name, rest.strip()) for name, _, rest in parts]


def stages(dockerfile: Path) -> dict[str, list[Instruction]]:
    """Each stage's instructions, those of the stages that it stands on first; "" is the last stage."""
    found: dict[str, list[Instruction]] = {}
    name = ""
    for instruction in instructions(dockerfile):
        if instruction[0] == "FROM":
            base, _, name = instruction[1].partition(" AS ")
            found[name] = list(found.get(base, []))
        found[name].append(instruction)
    return found


def of(stage: list[Instruction], wanted: str) -> list[str]:
    return [rest for name, rest in stage if name == wanted]


def copied(stage: list[Instruction]) -> set[str]:
    """What a stage copies, each to its own place."""
    sources: set[str] = set()
    for rest in of(stage, "COPY"):
        *names, target = rest.removeprefix("--chown=adam:adam ").split()
        assert target == "./" or names == [target]
        sources.update(names)
    return sources


def installs(dockerfile: Path) -> list[str]:
    return [rest for rest in of(instructions(dockerfile), "RUN") if "pip" in rest]


def services() -> dict[str, str]:
    """The text of each service of the compose file."""
    text = (ROOT / "docker" / "compose.yaml").read_text().partition("\nservices:\n")[2]
    return dict(re.findall(r"^  ([\w-]+):\n((?:^    .*\n)+)", text, re.M))


def test_there_is_an_image_for_processors_and_one_for_gpus() -> None:
    assert [dockerfile.stem for dockerfile in DOCKERFILES] == ["cpu", "cuda"]


@IMAGE
def test_the_base_is_plain_python(dockerfile: Path) -> None:
    service = ["package AS service"] if dockerfile.stem == "cpu" else []
    assert of(instructions(dockerfile), "FROM") == [
        *("python:3.12-slim AS package", "package AS test", *service, "package"),
    ]


@IMAGE
def test_nothing_runs_as_root(dockerfile: Path) -> None:
    found = stages(dockerfile)
    assert all(of(stage, "USER") == ["1000:1000"] for name, stage in found.items() if name != "package")
    assert any("useradd --uid 1000 " in rest for rest in of(found["package"], "RUN"))


@IMAGE
def test_entry_points_are_the_commands(dockerfile: Path) -> None:
    found = stages(dockerfile)
    assert of(found["test"], "ENTRYPOINT") == ['["pytest"]']
    assert of(found[""], "ENTRYPOINT") == ['["gpu-adam"]']
    assert of(found[""], "CMD") == ['["demo"]']


@IMAGE
def test_kernels_are_kept_in_a_volume_of_the_user(dockerfile: Path) -> None:
    package = stages(dockerfile)["package"]
    (volume,) = of(package, "VOLUME")
    assert any(f"GPU_ADAM_CACHE={volume}" in rest.split() for rest in of(package, "ENV"))
    assert any(f"install -d -o adam -g adam {volume} " in rest for rest in of(package, "RUN"))
    assert all(f":{volume}]" in service for service in services().values())


@IMAGE
def test_what_is_copied_exists_and_suffices(dockerfile: Path) -> None:
    found = stages(dockerfile)
    assert all((ROOT / source).exists() for source in copied(found["test"]))
    assert copied(found["package"]) == {"LICENSE", "README.md", "pyproject.toml", "cuda", "gpu_adam"}
    for_tests = {"CHANGELOG.md", "CONTRIBUTING.md", ".ci", "docker", "profiling", "tests"}
    for_tests |= {path.name for path in ROOT.glob("*.py")}
    assert copied(found["test"]) == copied(found["package"]) | for_tests


def test_the_images_install_what_ci_installs() -> None:
    """The CPU image has the README's steps, which .ci/run takes from there; the CUDA image's it takes from its file."""
    cpu, cuda = DOCKERFILES
    block = re.search(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert block is not None
    assert installs(cpu) == [*re.findall(r"pip install .*?(?= &&)", block[1]), 'pip install -e ".[serve]"']
    script = (ROOT / ".ci" / "run").read_text()
    taken = re.search(r"sed -n 's/(\^RUN )\\\((.*?)\\\)/\\1/p' docker/cuda.Dockerfile", script)
    assert taken is not None
    assert installs(cuda) == re.findall(f"{taken[1]}({taken[2]})", cuda.read_text(), re.M)
    assert len(installs(cuda)) == 2


def test_compose_has_a_demo_and_tests_for_each_image() -> None:
    found = services()
    assert list(found) == ["demo", "test", "demo-cuda", "test-cuda", "serve"]
    del found["serve"]
    for name, service in found.items():
        image, is_test = "cuda" if name.endswith("-cuda") else "cpu", name.startswith("test")
        target = ", target: test" if is_test else ""
        assert f"build: {{context: .., dockerfile: docker/{image}.Dockerfile{target}}}" in service
        assert ("command: [demo" in service) != is_test
        assert ("{driver: nvidia, count: all, capabilities: [gpu]}" in service) == (image == "cuda")


def serve_options(text: str) -> dict[str, str | None]:
    """The options of `gpu-adam serve` in a text, which the command has."""
    words = re.findall(r"--([\w-]+)(?:[= ](?!--)([^\s,\]\\]+))?", text)
    known = {option for each in get_command(app).commands["serve"].params for option in each.opts}  # type: ignore[attr-defined]
    assert {f"--{name}" for name, _ in words} <= known
    return {name: value or None for name, value in words}


def owned() -> tuple[Path, ServiceConfig]:
    """Where the example configuration has checkpoints, and what it owns."""
    config = read_config(ROOT / "docker" / "gpu-adam.toml", "host")
    checkpoint = config.optimizers["main"].checkpoint
    assert checkpoint is not None
    return checkpoint["directory"], config


def test_compose_serves_beside_its_clients_and_ends_in_peace() -> None:
    service = services()["serve"]
    assert "build: {context: .., dockerfile: docker/cpu.Dockerfile, target: service}" in service
    (command,) = re.findall(r"command: \[serve, (.*)\]", service)
    options = serve_options(command)
    assert options == {
        "config": "/etc/gpu_adam/service.toml",
        "socket": "/run/gpu_adam/socket",
        "http": "127.0.0.1:8080",
        "resume": None,
    }
    mounts = dict(each.split(":")[::-1] for each in re.findall(r"volumes: \[(.*)\]", service)[0].split(", "))
    directory, _ = owned()
    (package,) = (rest for rest in of(stages(DOCKERFILES[0])["package"], "RUN") if "useradd" in rest)
    for path in (Path(options["socket"] or "").parent, directory.parent):
        assert str(path) in mounts
        assert str(path) in package.split()  # else the volume would be root's
    assert "target: /etc/gpu_adam/service.toml}" in service
    assert f"http://{options['http']}/v1/health/ready" in service
    assert "network_mode: host" in service  # or nobody would reach a loopback address
    assert "stop_grace_period: 2m" in service


def test_the_unit_serves_from_what_systemd_makes() -> None:
    unit = configparser.RawConfigParser(strict=False, comment_prefixes="#")
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string((ROOT / "docker" / "gpu-adam.service").read_text().replace("\\\n", ""))
    service = unit["Service"]
    options = serve_options(service["ExecStart"])
    assert options["socket"] == f"/run/{service['RuntimeDirectory']}/socket"
    assert owned()[0].is_relative_to(f"/var/lib/{service['StateDirectory']}")
    assert f"GPU_ADAM_CACHE=/var/cache/{service['CacheDirectory']} " in service["Environment"]
    assert "resume" in options
    assert service["Restart"] == "on-failure"
    assert int(service["TimeoutStopSec"]) >= 60
    assert not {"MemoryDenyWriteExecute", "PrivateDevices", "ProtectClock", "PrivateUsers"} & set(service)


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd")
    text = (ROOT / "docker" / "gpu-adam.service").read_text()
    unit = tmp_path / "gpu-adam.service"
    unit.write_text(re.sub(r"/opt/gpu_adam/bin/gpu-adam|User=adam", "/bin/true", text).replace("\n/bin/true\n", "\n"))
    ended = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
