"""Fourier transforms."""

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam.autodiff import value_and_grad
from gpu_adam.devices import Device

from .cases import DerivativeTests, both, case, random

NORMS = (None, "backward", "ortho", "forward")


class TestFourier(DerivativeTests):
    """Each transform, each norm, other lengths."""

    cases = (
        *(
            one
            for name in ("fft", "ifft", "irfft", "hfft")
            for norm in NORMS
            for one in both(
                f"{name}-{norm}",
                lambda np, x, f=name, norm=norm: getattr(np.fft, f)(x, axis=0, norm=norm),
                (5, 3),
                hips=False,
            )
        ),
        *(
            one
            for name in ("fft", "ifft", "irfft")
            for n in (4, 6, 7)
            for one in both(
                f"{name}-length-{n}", lambda np, x, f=name, n=n: getattr(np.fft, f)(x, n), (3, 5), hips=False
            )
        ),
        *(
            case(
                f"{name}-{norm}",
                lambda np, x, f=name, norm=norm: getattr(np.fft, f)(x, axis=0, norm=norm),
                (5, 3),
                hips=False,
            )
            for name in ("rfft", "ihfft")
            for norm in NORMS
        ),
        *(
            case(f"{name}-length-{n}", lambda np, x, f=name, n=n: getattr(np.fft, f)(x, n), (3, 5), hips=False)
            for name in ("rfft", "ihfft")
            for n in (4, 5, 6)
        ),
        *(
            one
            for name in ("fft2", "ifft2", "fftn", "ifftn", "irfft2", "irfftn")
            for norm in (None, "ortho")
            for one in both(
                f"{name}-{norm}",
                lambda np, x, f=name, norm=norm: getattr(np.fft, f)(x, norm=norm),
                (2, 3, 4),
                hips=False,
            )
        ),
        *both("fft2-shape", lambda np, x: np.fft.fft2(x, (3, 5)), (2, 4, 4), hips=False),
        *both("fft2-axes", lambda np, x: np.fft.fft2(x, axes=(0, 2)), (2, 3, 4), hips=False),
        *both("fftn-shape", lambda np, x: np.fft.fftn(x, (5, 2), axes=(0, 1)), (4, 3, 2), hips=False),
        *both("irfftn-shape", lambda np, x: np.fft.irfftn(x, (2, 6), axes=(1, 0)), (4, 3, 2), hips=False),
        case("rfftn", lambda np, x: np.fft.rfftn(x), (2, 3, 4), hips=False),
        case("rfftn-shape", lambda np, x: np.fft.rfftn(x, (3, 5), axes=(0, 2)), (2, 3, 4), hips=False),
        case("rfft2", lambda np, x: np.fft.rfft2(x), (3, 4), hips=False),
        case("rfftn-one-axis", lambda np, x: np.fft.rfftn(x, axes=(0,))[:2], (3, 4), hips=False),
        *both("shift", lambda np, x: np.fft.fftshift(x) * np.fft.ifftshift(x, axes=1), (3, 4)),
        *both("hips", lambda np, x: np.fft.ifft2(np.fft.fft2(x) * 2) + np.fft.fftn(x), (4, 4)),
        *both("intensity", lambda np, x: np.abs(np.fft.fft2(x, norm="ortho")) ** 2, (4, 4), hips=False),
    )


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_types_stay(device: Device, dtype: type) -> None:
    z = Variable(random((4, 4), True).astype(dtype))
    value, gradient = value_and_grad(lambda: np.sum(np.abs(np.fft.fft2(z)) ** 2), z)
    assert gradient.dtype == dtype
    assert value.dtype == np.zeros(1, dtype).real.dtype
