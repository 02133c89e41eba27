"""Ptychography: a complex object, recovered from the brightness of light that it has scattered.

A beam P stands at one place r of a transparent object O after the other. Far behind it a camera counts photons, and so
sees |F(P · O_r)|² without the phases (F is the Fourier transform, O_r the window of O at r). Because neighbouring
windows overlap, the counts I_r nevertheless fix amplitude and phase of O, but for one phase common to all of it:

    loss = Σ (|F(P · O_r)| - √I_r)² / Σ I_r

The roots of counts all have nearly the same noise. The counts are simulated from a real micrograph: the phase that a
living cell gives to light, measured by digital holography. Its absorption is made up, in proportion to the phase.

References:
    Thibault & Guizar-Sicairos, 2012, https://doi.org/10.1088/1367-2630/14/6/063004 (ptychography by minimisation);
    Müller et al., 2018, https://doi.org/10.1364/OE.26.010729 (the micrograph).
"""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import gpu_adam
from gpu_adam.demos import Demo
from gpu_adam.errors import GpuAdamError
from gpu_adam.schedules import CosineDecay

SIDE, WINDOW = 128, 48  # pixels of the object and of the camera
CROP = slice(245, 501), slice(294, 550)  # the cell and its surroundings
FIELD = 256 * 0.107  # µm, the side of that square
PHASE, ABSORPTION = 2.5, 0.4  # rad and fraction between black and white
WAVELENGTH, WAIST, DEFOCUS = 0.65, 1.2, 16.0  # µm
SCAN, JITTER = 9, 0.4  # positions along each axis; shift of each in µm: a regular grid would leave its own period open
PHOTONS = 1e7  # in each exposure, on average
SEEN = 0.01  # of the most light that a pixel gets: with less it counts as not seen


class Ptychography(Demo):
    """Recovery of the object; its score is the relative error after the common phase is removed, 0 when perfect."""

    name = "ptychography"
    default_steps = 300
    shown = "loss {0.loss:.1e}  error {0.score:6.2%}"

    def _model(self, generator: np.random.Generator) -> tuple[Sequence[gpu_adam.Variable], gpu_adam.Adam]:
        self.picture = _micrograph()
        self.truth = (1 - ABSORPTION * self.picture) * np.exp(1j * PHASE * self.picture)
        self.probe = _probe()
        self.corners = _corners(generator)
        exact = np.abs(np.fft.fft2(self._windows(self.truth) * self.probe, norm="ortho")) ** 2
        gain = PHOTONS / exact.sum((1, 2)).mean()
        counts = generator.poisson(exact * gain)
        light = np.zeros((SIDE, SIDE))
        for y, x in self.corners:
            light[y : y + WINDOW, x : x + WINDOW] += np.abs(self.probe) ** 2
        self.seen = light > SEEN * light.max()
        self.counts = counts
        self.history: list[Any] = []  # arrays on the device: reading each would wait for it

        array = self.device.array
        with self.here():
            self._amplitudes = array(np.sqrt(counts / gain).astype(np.float32))
            self._beam = array(self.probe.astype(np.complex64))
            self._target = array(np.where(self.seen, self.truth, 0).astype(np.complex64))
            self._mask = array(self.seen.astype(np.float32))
            self._transform = array(_transform(WINDOW).astype(np.complex64))
        self._scale = np.float32(gain / counts.sum())
        # An empty field of view, but not quite: through a symmetric one no light at all would fall on some pixels of
        # the camera, where |z| has no derivative, and rounding would choose the direction of the first step.
        noise = generator.normal(0, 0.01, (2, SIDE, SIDE))
        start = (1 + noise[0] + 1j * noise[1]).astype(np.complex64)
        return [gpu_adam.Variable(start, name="object")], gpu_adam.Adam(
            CosineDecay(0.3, self.default_steps, alpha=0.01)
        )

    def _windows(self, image: Any) -> Any:
        """The parts of an image [side, side] that lie in the beam: [n, window, window]."""
        # Slices, not one index array: the gradient of that would sort the numbers of all elements.
        return np.stack([image[y : y + WINDOW, x : x + WINDOW] for y, x in self.corners])

    def _far_field(self, waves: Any) -> Any:
        """The Fourier transform of waves [n, window, window] along both axes."""
        if self.xp is np:
            return np.fft.fft2(waves, norm="ortho")
        # CuPy's FFT calls cuFFT and its `@` cuBLAS, which the extras cuda12 and cuda13 do not bring. At this size
        # it costs little to multiply and add, at the price of n·window³ temporary numbers: 72 MB, several times.
        waves = (self._transform[:, :, None] * waves[:, None]).sum(2)
        return (waves[:, :, None] * self._transform).sum(3)

    def _train(self, generator: np.random.Generator) -> Any:
        [image], misfits = self.variables, []

        def loss() -> Any:
            wave = self._far_field(self._windows(image) * self._beam)
            misfits.append(np.sum((np.abs(wave) - self._amplitudes) ** 2) * self._scale)
            return misfits[0]

        self.optimizer.minimize(loss, [image])
        error = self.xp.sqrt(_square(self._aligned() - self._target) / _square(self._target))
        self.history.append(self.xp.stack([misfits[0].value, error]))
        return self.history[-1]

    def _aligned(self) -> Any:
        """The seen part of the present object, turned by the common phase that fits the truth best."""
        image = self.variables[0].value * self._mask
        overlap = (image.conj() * self._target).sum()
        return image * (overlap / abs(overlap))

    def data(self) -> bytes:
        """Return the micrograph."""
        return self.picture.tobytes()

    def notes(self) -> dict[str, Any]:
        """Return loss and error after every step, waiting for the device."""
        return {"history": self.curve().tolist()}

    def recall(self, notes: Mapping[str, Any]) -> None:
        """Continue the history."""
        with self.here():
            self.history = [self.device.array(np.array(step, np.float32)) for step in notes["history"]]
        self._last = self.history[-1] if self.history else None

    def curve(self) -> np.ndarray:
        """Return loss and error after every step, [steps, 2], waiting for the device."""
        if not self.history:
            return np.zeros((0, 2), np.float32)
        with self.here():
            return self.device.numpy(self.xp.stack(self.history))

    def result(self) -> list[tuple[str, str]]:
        """Return the error of the present object."""
        error, light = self.curve()[-1, 1], f"{len(self.corners)} exposures of {PHOTONS / 1e6:g} million photons each"
        return [
            ("error", f"{error:.2%} of the transmitted wave, in the {self.seen.mean():.0%} of the field that is lit"),
            ("light", light),
        ]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw truth, reconstruction, an exposure and the error curve into a PNG file.

        Raises:
            GpuAdamError: matplotlib is not installed.
            OSError: the file system refuses.
        """
        with self.here():
            found = self.device.numpy(self._aligned())
        figure = require("matplotlib.figure", "matplotlib").Figure(figsize=(14, 8.4), dpi=110, layout="constrained")
        axes = figure.subplots(2, 3)
        found = np.where(self.seen, found, np.nan)
        parts: list[tuple[str, Callable[[Any], Any], float, float, str, str]] = [
            ("amplitude", np.abs, 1 - ABSORPTION, 1, "gray", "transmitted amplitude"),
            ("phase", np.angle, 0, PHASE, "magma", "phase (rad)"),
        ]
        for row, (part, of, low, high, colours, unit) in enumerate(parts):
            for axis, values, title in (
                (axes[row, 0], self.truth, "true"),
                (axes[row, 1], found, "recovered where lit"),
            ):
                shown = axis.imshow(of(values), cmap=colours, vmin=low, vmax=high, extent=(0, FIELD, FIELD, 0))
                axis.set(title=f"{part}, {title}", xlabel="x (µm)", ylabel="y (µm)", facecolor="lightsteelblue")
            figure.colorbar(shown, ax=axes[row, :2].tolist(), label=unit, shrink=0.9)
        self._mark_scan(axes[0, 0])
        self._draw_exposure(figure, axes[0, 2])
        self._draw_curve(axes[1, 2])
        error, step = self.curve()[-1, 1], self.step
        title = f"Ptychography of a cell: relative error {error:.2%} after {step} steps of Adam"
        figure.suptitle(title, fontsize="x-large", fontweight="bold")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        figure.savefig(path, format="png")

    def _mark_scan(self, axis: Any) -> None:
        """The beam's positions, and the circle at which its amplitude has fallen to 1/e."""
        pixel = FIELD / SIDE
        y, x = ((self.corners + WINDOW / 2) * pixel).T
        axis.plot(x, y, ".", color="tab:orange", markersize=3, label="beam centres")
        angle = np.linspace(0, 2 * np.pi, 100)
        middle, radius = len(x) // 2, _radius()
        axis.plot(
            x[middle] + radius * np.cos(angle),
            y[middle] + radius * np.sin(angle),
            color="tab:orange",
            label="beam (1/e)",
        )
        axis.legend(loc="lower left", fontsize="small")

    def _draw_exposure(self, figure: Any, axis: Any) -> None:
        middle = len(self.counts) // 2
        photons = np.fft.fftshift(self.counts[middle]) + 1  # 0 has no logarithm
        edge = SIDE / FIELD / 2
        norm = importlib.import_module("matplotlib.colors").LogNorm(1, photons.max())
        shown = axis.imshow(photons, cmap="viridis", norm=norm, extent=(-edge, edge, edge, -edge))
        axis.set(
            title=f"exposure {middle + 1} of {len(self.counts)}, at the centre",
            xlabel="frequency in x (1/µm)",
            ylabel="frequency in y (1/µm)",
        )
        figure.colorbar(shown, ax=axis, label="photons + 1", shrink=0.9)

    def _draw_curve(self, axis: Any) -> None:
        loss, error = self.curve().T
        steps = np.arange(1, len(error) + 1)
        axis.semilogy(steps, error * 100, label="object (phase common to all removed)")
        axis.semilogy(steps, np.sqrt(loss) * 100, label="amplitudes on the camera, √loss")
        axis.set(title="relative error", xlabel="step", ylabel="relative error (%)", xlim=(0, len(error)))
        axis.set_ylim(top=300)  # room for the legend
        axis.yaxis.set_major_formatter(importlib.import_module("matplotlib.ticker").FormatStrFormatter("%g"))
        axis.grid(which="both", alpha=0.3)
        axis.legend(loc="upper right")


def require(module: str, package: str) -> Any:
    """Import a module of the extra `demo`.

    Raises:
        GpuAdamError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = 'install it: pip install "gpu-adam[demo]"'
        raise GpuAdamError("The demo ptychography", f"needs {package}", error, remedy) from error


def _micrograph() -> np.ndarray:
    """The cell, 0 black to 1 white, [side, side]: scikit-image ships the file."""
    picture: np.ndarray = require("skimage.data", "scikit-image").cell()[CROP].astype(np.float64) / 255
    block = len(picture) // SIDE
    binned: np.ndarray = picture.reshape(SIDE, block, SIDE, block).mean((1, 3))
    return binned


def _probe() -> np.ndarray:
    """A Gaussian beam out of focus, [window, window]: the bent wave front spreads the light over the camera."""
    x = (np.arange(WINDOW) - (WINDOW - 1) / 2) * FIELD / SIDE
    square = x[:, None] ** 2 + x**2
    rayleigh = np.pi * WAIST**2 / WAVELENGTH
    curvature = DEFOCUS / (DEFOCUS**2 + rayleigh**2)
    return np.exp(-square / _radius() ** 2 + 1j * np.pi / WAVELENGTH * curvature * square)


def _radius() -> float:
    """Where the beam's amplitude has fallen to 1/e, in µm."""
    return float(WAIST * np.sqrt(1 + (DEFOCUS * WAVELENGTH / (np.pi * WAIST**2)) ** 2))


def _corners(generator: np.random.Generator) -> np.ndarray:
    """The windows' first pixels (y, x), [n, 2]."""
    last = SIDE - WINDOW
    grid = np.linspace(0, last, SCAN)
    places = np.stack(np.meshgrid(grid, grid, indexing="ij"), axis=-1).reshape(-1, 2)
    shift = generator.uniform(-JITTER, JITTER, places.shape) * SIDE / FIELD
    corners: np.ndarray = np.clip(np.rint(places + shift), 0, last).astype(int)
    return corners


def _transform(n: int) -> np.ndarray:
    """The unitary Fourier transform of n numbers as a matrix."""
    k = np.arange(n)
    matrix: np.ndarray = np.exp(-2j * np.pi / n * (k[:, None] * k % n)) / np.sqrt(n)
    return matrix


def _square(z: Any) -> Any:
    return (abs(z) ** 2).sum()
