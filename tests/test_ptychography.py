"""The demo ptychography: it finds the object, continues bit for bit, and draws what it found."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_adam import GpuAdamError
from gpu_adam.__main__ import main
from gpu_adam.demos import ptychography
from gpu_adam.demos.ptychography import Ptychography
from gpu_adam.devices import Device
from gpu_adam.state import checkpoint


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same experiment with pixels of twice the width: a step takes a quarter of the time."""
    pytest.importorskip("skimage")
    monkeypatch.setattr(ptychography, "SIDE", 64)
    monkeypatch.setattr(ptychography, "WINDOW", 24)


@pytest.fixture
def tiny(coarse: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An experiment for a few steps."""
    monkeypatch.setattr(ptychography, "SIDE", 32)
    monkeypatch.setattr(ptychography, "WINDOW", 12)
    monkeypatch.setattr(ptychography, "SCAN", 4)


@pytest.mark.long
@pytest.mark.usefixtures("coarse")
def test_finds_the_object(device: Device) -> None:
    demo = Ptychography()
    for _ in range(100):
        demo.train()
    assert demo.measure().score < 0.02
    # The same error from the definition, in float64: over what was lit, after the best common phase.
    found, truth = demo.variables[0].numpy()[demo.seen].astype(complex), demo.truth[demo.seen]
    phase = np.vdot(found, truth)
    error = np.linalg.norm(found * phase / abs(phase) - truth) / np.linalg.norm(truth)
    assert demo.measure().score == pytest.approx(error, rel=1e-3)
    assert demo.seen.mean() > 0.75
    assert demo.curve()[0, 1] > 0.3
    assert demo.result()[0] == (
        "error",
        f"{error:.2%} of the transmitted wave, in the {demo.seen.mean():.0%} of the field that is lit",
    )


def test_the_real_size_finds_the_object() -> None:
    pytest.importorskip("skimage")
    demo = Ptychography()
    assert (demo.variables[0].shape, demo.counts.shape) == ((128, 128), (81, 48, 48))
    for _ in range(75):
        demo.train()
    assert demo.measure().score < 0.02


@pytest.mark.usefixtures("tiny")
def test_loss_is_that_of_the_definition(device: Device) -> None:
    demo = Ptychography(seed=4)
    start = demo.variables[0].numpy().astype(complex)
    demo.train()
    waves = np.stack([start[y : y + 12, x : x + 12] for y, x in demo.corners]) * demo.probe
    amplitudes = np.abs(np.fft.fft2(waves, norm="ortho"))
    gain = ptychography.PHOTONS / np.mean(
        [
            (np.abs(np.fft.fft2(demo.truth[y : y + 12, x : x + 12] * demo.probe, norm="ortho")) ** 2).sum()
            for y, x in demo.corners
        ]
    )
    expected = ((amplitudes - np.sqrt(demo.counts / gain)) ** 2).sum() / (demo.counts / gain).sum()
    assert demo.measure().loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("tiny")
def test_transform_by_products_is_the_fourier_transform(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = Ptychography()
    waves = np.random.default_rng(0).normal(size=(2, 3, 12, 12)).astype(np.float32)
    waves = waves[0] + 1j * waves[1]
    monkeypatch.setattr(demo, "xp", None)  # neither NumPy's nor any other library's transform
    found = device.numpy(demo._far_field(device.array(waves)))
    np.testing.assert_allclose(found, np.fft.fft2(waves, norm="ortho"), atol=1e-6)
    assert found.dtype == np.complex64


@pytest.mark.usefixtures("tiny")
def test_resuming_continues_bit_for_bit(device: Device, tmp_path: Path) -> None:
    whole, half = Ptychography(seed=5), Ptychography(seed=5)
    for _ in range(2):
        half.train()
    half.save(tmp_path / "state")
    half = Ptychography.resume(tmp_path / "state")
    assert (half.seed, half.step) == (5, 2)
    assert half.measure().score == half.curve()[-1, 1]
    while half.step < 4:
        half.train()
    for _ in range(4):
        whole.train()
    half.save(tmp_path / "half")
    whole.save(tmp_path / "whole")
    assert (tmp_path / "half").read_bytes() == (tmp_path / "whole").read_bytes()
    assert half.curve().tobytes() == whole.curve().tobytes()
    assert half.curve().shape == (4, 2)
    assert Ptychography(seed=6).variables[0].numpy().tobytes() != Ptychography(seed=5).variables[0].numpy().tobytes()


@pytest.mark.usefixtures("tiny")
def test_saved_before_the_first_step(device: Device, tmp_path: Path) -> None:
    Ptychography().save(tmp_path / "state")
    assert Ptychography.resume(tmp_path / "state").curve().shape == (0, 2)


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `gpu-adam demo` in this process."""
    with pytest.raises(SystemExit) as caught:
        main(["demo", *map(str, arguments)])
    return int(caught.value.code or 0), *capsys.readouterr()


@pytest.mark.usefixtures("tiny")
def test_command_line_draws_and_saves(device: Device, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    picture, state = tmp_path / "picture", tmp_path / "state"  # PNG, whatever the name
    arguments = ["ptychography", "--device", device.name, "--plot", picture]
    status, out, err = run(capsys, *arguments, "--steps", 2, "--save", state)
    assert (status, err) == (0, "")
    assert "error" in out
    assert "\npicture " in out
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    first = image.imread(picture, format="png")
    height, width, _ = first.shape
    assert (height, width) > (800, 1200)
    # Every one of the six panels holds a picture, not a single colour.
    for row in range(2):
        for column in range(3):
            panel = first[row * height // 2 :, column * width // 3 :][: height // 2, : width // 3, :3]
            assert len(np.unique((panel * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 20
    assert run(capsys, *arguments, "--steps", 3, "--resume", state)[0] == 0
    assert (image.imread(picture, format="png") != first).any()
    assert checkpoint.read(state)[0]["iterations"] == 2


def test_other_demos_have_no_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sentence = "--plot must be left out where there is no picture (got digits); leave it out.\n"
    assert run(capsys, "digits", "--plot", tmp_path / "a.png") == (1, "", sentence)


def test_a_picture_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, err = run(capsys, "ptychography", "--plot", tmp_path / "none" / "a.png")
    assert status == 1
    assert err.startswith("--plot must be a file in a writable directory (got ")


@pytest.mark.parametrize("missing", ["skimage", "matplotlib"])
def test_without_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == missing] + [missing, f"{missing}.data"]:
        monkeypatch.setitem(sys.modules, name, None)
    if missing == "skimage":
        package = "scikit-image"
        with pytest.raises(GpuAdamError, match="needs scikit-image"):
            Ptychography()
        status, out, err = run(capsys, "ptychography")
    else:
        package = "matplotlib"
        status, out, err = run(capsys, "ptychography", "--plot", tmp_path / "a.png")
    assert (status, out) == (1, "")
    assert err.startswith(f"The demo ptychography needs {package} (got ")
    assert err.endswith('install it: pip install "gpu-adam[demo]".\n')
