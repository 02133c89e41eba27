"""Derivatives of Fourier transforms.

A transform is linear, so its vjp is its adjoint: the transform the other way, scaled by what this way was scaled by.
"""

# the arguments of NumPy's functions, in their order

from typing import Any

import numpy as np

from gpu_adam.autodiff.rules import Operand, composed, derivative

# fft is the sum times 1, 1/sqrt(n) or 1/n; the inverse whose scale is the same has the other name.
_ADJOINT_NORM: dict[Any, Any] = {None: "forward", "backward": "forward", "ortho": "ortho", "forward": "backward"}


def _resized(g: Any, shape: tuple[int, ...]) -> Any:
    """The adjoint of cutting or zero-padding an array of `shape` before its transform."""
    if g.shape == shape:
        return g
    g = g[tuple(slice(n) for n in shape)]
    return np.pad(g, [(0, n - m) for n, m in zip(shape, g.shape, strict=True)])


def _fft_vjp(g: Any, y: Any, a: Any, n: Any = None, axis: int = -1, norm: Any = None, out: Any = None) -> Any:
    return _resized(np.fft.ifft(g, axis=axis, norm=_ADJOINT_NORM[norm]), a.shape)


def _ifft_vjp(g: Any, y: Any, a: Any, n: Any = None, axis: int = -1, norm: Any = None, out: Any = None) -> Any:
    return _resized(np.fft.fft(g, axis=axis, norm=_ADJOINT_NORM[norm]), a.shape)


def _rfft_vjp(g: Any, y: Any, a: Any, n: Any = None, axis: int = -1, norm: Any = None, out: Any = None) -> Any:
    # Of the full spectrum only a half is returned: the other half has no gradient.
    n = a.shape[axis] if n is None else n
    return _resized(np.fft.ifft(g, n, axis=axis, norm=_ADJOINT_NORM[norm]).real, a.shape)


def _irfft_vjp(g: Any, y: Any, a: Any, n: Any = None, axis: int = -1, norm: Any = None, out: Any = None) -> Any:
    half = np.fft.rfft(g, axis=axis, norm=_ADJOINT_NORM[norm])
    # Frequencies strictly between 0 and Nyquist stand for themselves and their mirror image.
    twice = [slice(None)] * half.ndim
    twice[axis] = slice(1, (g.shape[axis] + 1) // 2)
    half[tuple(twice)] *= 2
    return _resized(half, a.shape)


derivative(np.fft.fft, _fft_vjp)
derivative(np.fft.ifft, _ifft_vjp)
derivative(np.fft.rfft, _rfft_vjp)
derivative(np.fft.irfft, _irfft_vjp)


# -- several axes
def _axes(a: Any, s: Any, axes: Any) -> tuple[int, ...]:
    if axes is not None:
        return tuple(axes)
    return tuple(range(-(a.ndim if s is None else len(s)), 0))


def _fftn_vjp(g: Any, y: Any, a: Any, s: Any = None, axes: Any = None, norm: Any = None, out: Any = None) -> Any:
    return _resized(np.fft.ifftn(g, axes=_axes(a, s, axes), norm=_ADJOINT_NORM[norm]), a.shape)


def _ifftn_vjp(g: Any, y: Any, a: Any, s: Any = None, axes: Any = None, norm: Any = None, out: Any = None) -> Any:
    return _resized(np.fft.fftn(g, axes=_axes(a, s, axes), norm=_ADJOINT_NORM[norm]), a.shape)


derivative(np.fft.fftn, _fftn_vjp)
derivative(np.fft.ifftn, _ifftn_vjp)


@composed(np.fft.fft2)
def _fft2(a: Operand, s: Any = None, axes: Any = (-2, -1), norm: Any = None, out: Any = None) -> Any:
    return np.fft.fftn(a, s=s, axes=axes, norm=norm)


@composed(np.fft.ifft2)
def _ifft2(a: Operand, s: Any = None, axes: Any = (-2, -1), norm: Any = None, out: Any = None) -> Any:
    return np.fft.ifftn(a, s=s, axes=axes, norm=norm)


@composed(np.fft.rfftn)
def _rfftn(a: Operand, s: Any = None, axes: Any = None, norm: Any = None, out: Any = None) -> Any:
    *others, last = _axes(a, s, axes)
    half = np.fft.rfft(a, None if s is None else s[-1], axis=last, norm=norm)
    return np.fft.fftn(half, s=None if s is None else s[:-1], axes=others, norm=norm) if others else half


@composed(np.fft.irfftn)
def _irfftn(a: Operand, s: Any = None, axes: Any = None, norm: Any = None, out: Any = None) -> Any:
    *others, last = _axes(a, s, axes)
    if others:
        a = np.fft.ifftn(a, s=None if s is None else s[:-1], axes=others, norm=norm)
    return np.fft.irfft(a, None if s is None else s[-1], axis=last, norm=norm)


@composed(np.fft.rfft2)
def _rfft2(a: Operand, s: Any = None, axes: Any = (-2, -1), norm: Any = None, out: Any = None) -> Any:
    return _rfftn(a, s, axes, norm)


@composed(np.fft.irfft2)
def _irfft2(a: Operand, s: Any = None, axes: Any = (-2, -1), norm: Any = None, out: Any = None) -> Any:
    return _irfftn(a, s, axes, norm)


@composed(np.fft.hfft)
def _hfft(a: Operand, n: Any = None, axis: int = -1, norm: Any = None, out: Any = None) -> Any:
    return np.fft.irfft(np.conjugate(a), n, axis=axis, norm=_ADJOINT_NORM[norm])


@composed(np.fft.ihfft)
def _ihfft(a: Operand, n: Any = None, axis: int = -1, norm: Any = None, out: Any = None) -> Any:
    return np.conjugate(np.fft.rfft(a, n, axis=axis, norm=_ADJOINT_NORM[norm]))


derivative(np.fft.fftshift, lambda g, y, a, axes=None: np.fft.ifftshift(g, axes))
derivative(np.fft.ifftshift, lambda g, y, a, axes=None: np.fft.fftshift(g, axes))
