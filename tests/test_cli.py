"""`gpu-adam`: what it prints and writes, a sentence for every mistake, and Ctrl-C between two steps."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import processes
import pytest
from communicators import jobs

import gpu_adam
from gpu_adam import cli, communicators, devices
from gpu_adam.__main__ import main
from gpu_adam.demos.digits import Digits
from gpu_adam.devices import Device
from gpu_adam.state import checkpoint


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command line in this process."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return int(caught.value.code or 0), out, err


def one_line(text: str) -> str:
    """Text without the line breaks and frames that the width of the terminal makes."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("demo", ["digits", "words"])
def test_demo_reports_device_speed_and_result(device: Device, capsys: pytest.CaptureFixture[str], demo: str) -> None:
    status, out, _ = run(capsys, "demo", demo, "--device", device.name, "--steps", "3")
    assert status == 0
    assert re.search(rf"^device +{device.name}, \S", out, re.M)
    assert re.search(r"^steps/s +\d+ in \d+\.\d s", out, re.M)
    assert re.search(r"^last loss +\d\.\d{4}", out, re.M)
    assert re.search(r"^test accuracy +\d+\.\d%" if demo == "digits" else r"^near list +\w+, \w+,", out, re.M)


@pytest.mark.parametrize("demo", ["digits", "words"])
def test_watching_shows_the_gradients_and_changes_nothing(
    device: Device, capsys: pytest.CaptureFixture[str], demo: str, tmp_path: Path
) -> None:
    plain, watched = (tmp_path / name for name in ("plain", "watched"))
    assert "not finite" not in run(capsys, "demo", demo, "--steps", "3", "--save", str(plain))[1]
    assert run(capsys, "demo", demo, "--steps", "2", "--save", str(watched))[0] == 0
    status, out, _ = run(
        capsys, "demo", demo, "--steps", "3", "--watch", "--resume", str(watched), "--save", str(watched)
    )
    assert status == 0
    assert re.search(r"^last step +gradient [\d.e-]+, update [\d.e-]+ of [\d.e-]+, 0 not finite", out, re.M)
    (a, note), (b, watched_note) = checkpoint.read(plain), checkpoint.read(watched)
    assert {name: array.tobytes() for name, array in a.items()} == {name: array.tobytes() for name, array in b.items()}
    note["config"]["telemetry"] = True  # all that differs: the file tells how its optimizer was made
    assert note == watched_note


@pytest.mark.parametrize("more", [[], ["--replicated"]])
def test_several_ranks_learn_the_same_and_one_prints(more: list[str], tmp_path: Path) -> None:
    arguments = ["demo", "--distributed", "--steps", "200", *more]
    ended = jobs.run(tmp_path, 3, f"from gpu_adam.__main__ import main\nmain({arguments})")
    assert ended.status == 0, ended
    (accuracy,) = re.findall(r"^test accuracy +(\d+\.\d)%", ended.out, re.M)
    assert float(accuracy) > 85
    assert re.search(r"^ranks +3, ", ended.out, re.M)


def test_a_process_without_mpiexec_is_the_only_rank(tmp_path: Path) -> None:
    jobs.launcher()
    code = "from gpu_adam.__main__ import main\nmain(['demo', '--distributed', '--steps', '3'])"
    assert re.search(r"^ranks +1, ", processes.run(code), re.M)


def test_several_ranks_need_an_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    status, out, err = run(capsys, "demo", "--distributed")
    assert (status, out) == (1, "")
    assert "needs mpi4py and an MPI" in err
    assert 'pip install "gpu-adam[mpi]"' in err


@pytest.mark.parametrize(
    ("named", "gpus", "expected"),
    [("cuda", 8, "cuda:5"), ("auto", 8, "cuda:5"), (None, 8, "cuda:5"), (None, 1, "cuda:0"), ("cuda:1", 8, "cuda:1")],
)
def test_every_process_of_a_machine_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, named: str | None, gpus: int, expected: str
) -> None:
    runtime = SimpleNamespace(getDeviceCount=lambda: gpus)
    xp, automatic = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)), {"cuda": "cuda:0", "auto": "cuda:0"}
    monkeypatch.delenv("GPU_ADAM_DEVICE", raising=False)
    monkeypatch.setattr(cli, "local_rank", lambda: 5)
    monkeypatch.setattr(cli, "find_device", lambda name: SimpleNamespace(name=automatic.get(name, name), xp=xp))
    assert cli._own_device(named).name == expected


def test_resuming_writes_the_same_file(device: Device, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    half, resumed, whole = (str(tmp_path / name) for name in ("half", "resumed", "whole"))
    assert run(capsys, "demo", "--seed", "7", "--steps", "2", "--save", half)[0] == 0
    assert run(capsys, "demo", "--steps", "4", "--resume", half, "--save", resumed)[0] == 0
    assert run(capsys, "demo", "--seed", "7", "--steps", "4", "--save", whole)[0] == 0
    assert Path(resumed).read_bytes() == Path(whole).read_bytes()
    arrays, note = checkpoint.read(whole)
    assert note["user"] == {"demo": "digits", "seed": 7, "dtype": "float32", "master": False, "data": 0}
    assert arrays["iterations"] == 4


def test_resuming_keeps_dtype_and_masters(device: Device, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    half, resumed, whole = (str(tmp_path / name) for name in ("half", "resumed", "whole"))
    chosen = ("demo", "--dtype", "bfloat16", "--master")
    assert run(capsys, *chosen, "--steps", "2", "--save", half)[0] == 0
    assert run(capsys, "demo", "--steps", "3", "--watch", "--resume", half, "--save", half)[0] == 0
    assert run(capsys, *chosen, "--steps", "4", "--resume", half, "--save", resumed)[0] == 0
    assert run(capsys, *chosen, "--steps", "4", "--save", whole)[0] == 0
    assert Path(resumed).read_bytes() == Path(whole).read_bytes()
    arrays, note = checkpoint.read(whole)
    user = note["user"]
    assert (user["dtype"], user["master"], arrays["w1/value"].dtype.name) == ("bfloat16", True, "bfloat16")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits training saved after three steps with seed 7."""
    path = tmp_path_factory.mktemp("cli") / "saved"
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--device", "host", "--steps", "3", "--seed", "7", "--save", str(path)])
    return path


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The current directory holds one file, `text`, and lines do not break."""
    (tmp_path / "text").write_text("hello")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--steps", "0"], 2, "Invalid value for '--steps': "),
        (["--steps", "-5"], 2, "Invalid value for '--steps': "),
        (["--seed", "-1"], 2, "Invalid value for '--seed': "),
        (["letters"], 2, "'letters' is not one of 'digits', 'words', 'ptychography'."),
        (["--device", "gpu"], 1, "device must be 'auto', 'host', 'cuda' or 'cuda:N' (got 'gpu'); pass one of them."),
        (["--resume", "none"], 1, "--resume must be a file (got none); pass the FILE of an earlier --save."),
        (["--resume", "."], 1, "--resume must be a file (got .); pass the FILE of an earlier --save."),
        (["--resume", "text"], 1, "text must be a whole gpu_adam checkpoint (got File is not a zip file); pass"),
        (["--resume", "SAVED", "--steps", "3"], 1, "--steps must be above 3, the step that SAVED has reached (got 3)"),
        (["--resume", "SAVED", "--seed", "8"], 1, "--seed must be 7, as in SAVED (got 8); leave --seed out."),
        (["--dtype", "int8"], 2, "'int8' is not one of 'float32', 'float16', 'bfloat16', 'float64'."),
        (["words", "--dtype", "float16"], 1, "--dtype must be left out where the demo has no choice of it (got words)"),
        (["words", "--master"], 1, "--master must be left out where the demo has no choice of it (got words); leave"),
        (["--master"], 1, "--master must come with --dtype float16 or bfloat16, which are rounded to 16 bits (got fl"),
        (["--master", "--dtype", "float64"], 1, "which are rounded to 16 bits (got float64); leave it out."),
        (["--sparse", "deferred"], 1, "--sparse must be left out where the demo has no choice of it (got digits)"),
        (["words", "--sparse", "lazy"], 2, "'lazy' is not one of 'dense', 'deferred'."),
        (["--resume", "SAVED", "--dtype", "float16"], 1, "--dtype must be float32, as in SAVED (got float16); leave"),
        (["--resume", "SAVED", "--master"], 1, "--master must be False, as in SAVED (got True); leave --master out."),
        (["words", "--resume", "SAVED"], 1, "SAVED must hold a training of the demo words (got digits); pass a file"),
        (["words", "--distributed"], 1, "--distributed must be left out where the demo shares no batches (got words)"),
        (["--distributed", "--save", "state"], 1, "--save must be left out with --distributed (got state); leave it"),
        (["--replicated"], 1, "--replicated must be left out without --distributed (got True); leave it out."),
        (["--distributed", "--master"], 1, "--master must come with --dtype float16 or bfloat16, which are rounded to"),
        (["--distributed", "--watch"], 1, "--watch must be left out with --distributed (got True); leave it out."),
        (["--save", "none/state"], 1, "--save must be a file in a writable directory (got none/state); choose"),
        (["--save", "."], 1, "--save must be a file in a writable directory (got .); choose another path."),
    ],
)
@pytest.mark.usefixtures("folder")
def test_mistakes_are_sentences(
    capsys: pytest.CaptureFixture[str], saved: Path, arguments: list[str], status: int, message: str
) -> None:
    found, out, err = run(capsys, "demo", *(argument.replace("SAVED", str(saved)) for argument in arguments))
    assert (found, out) == (status, "")
    assert message.replace("SAVED", str(saved)) in one_line(err)


def test_a_fifo_gets_the_state(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    assert run(capsys, "demo", "--steps", "3", "--seed", "7", "--save", str(tmp_path / "pipe"))[0] == 0
    reader.join()
    assert got == [saved.read_bytes()]


def test_an_unreadable_file_is_a_sentence(
    device: Device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, saved: Path
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "read", refuse)
    assert run(capsys, "demo", "--resume", str(saved)) == (1, "", f"{saved}: Permission denied.\n")


def test_ctrl_c_finishes_the_step_and_saves(
    device: Device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train, path = Digits.train, tmp_path / "state"

    def train_and_press(self: Digits) -> None:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        train(self)

    monkeypatch.setattr(Digits, "train", train_and_press)
    before = signal.getsignal(signal.SIGINT)
    status, _, err = run(capsys, "demo", "--steps", "9", "--save", str(path))
    assert status == 130
    remedy = f"continue with: gpu-adam demo digits --steps 9 --resume {path}"
    assert err == f"The demo digits was interrupted after step 3 of 9; {remedy}.\n"
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.read(path)[0]["iterations"] == 3
    status, _, err = run(capsys, "demo", "--steps", "9")
    assert (status, err) == (
        130,
        "The demo digits was interrupted after step 3 of 9; without --save its state is gone.\n",
    )


def test_ctrl_c_before_the_training(
    device: Device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def press(self: Digits) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Digits, "train", press)
    status, _, err = run(capsys, "demo", "--save", str(tmp_path / "state"))
    assert (status, err) == (130, "The demo digits was interrupted before its first step was done.\n")
    assert list(tmp_path.iterdir()) == []


def test_info_names_what_runs_where(
    device: Device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    status, out, err = run(capsys, "info")
    assert (status, err) == (0, "")
    text = one_line(out)
    assert f"software gpu_adam {gpu_adam.__version__} Python {sys.version.split()[0]} NumPy {np.__version__}" in text
    assert f"default device {device.name}" in text
    for section, facts in (*devices.describe(), *communicators.describe()):
        assert section == "missing" or section in text
        for label, value in facts:
            if "free" not in value:  # memory, which changes
                assert f"{label} {one_line(value)}" in text or f"Missing for {label}: {one_line(value)}" in text


def test_info_says_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def describe() -> list[tuple[str, list[tuple[str, str]]]]:
        return [("host", [("threads", "2")]), ("missing", [("cuda", "device 'cuda' needs [x] CuPy.")])]

    monkeypatch.setattr(devices, "describe", describe)
    monkeypatch.setattr(communicators, "describe", lambda: [("missing", [("NCCL", "no [y] NCCL.")])])
    out = run(capsys, "info")[1]
    assert "Missing for cuda: device 'cuda' needs [x] CuPy.\n" in out
    assert "Missing for NCCL: no [y] NCCL.\n" in out
    assert "Nothing is missing" not in out
    monkeypatch.setattr(communicators, "describe", list)
    monkeypatch.setattr(devices, "describe", lambda: describe()[:1])
    assert "Nothing is missing.\n" in run(capsys, "info")[1]


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert "demo" in out
    assert "info" in out


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **options)


def test_the_default_demo_recognises_96_percent() -> None:
    result = python("-m", "gpu_adam", "demo", "--device", "host", timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    found = re.search(r"^test accuracy +(\d+\.\d)% of 357 images", result.stdout, re.M)
    assert found is not None
    assert float(found[1]) >= 96


def test_a_mistake_in_a_process_of_its_own() -> None:
    result = python("-m", "gpu_adam", "demo", "--resume", "none")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "--resume must be a file (got none); pass the FILE of an earlier --save.\n"


def test_the_library_imports_nothing_of_the_command_line() -> None:
    result = python("-c", "import gpu_adam, sys; print(sorted({'typer', 'rich', 'gpu_adam.cli'} & set(sys.modules)))")
    assert result.stdout == "[]\n"
