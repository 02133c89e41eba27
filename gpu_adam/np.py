"""NumPy's functions for losses that run on any device: `from gpu_adam import np`.

Arrays made from numbers and shapes alone (`zeros`, `arange`, `linspace`, `asarray` of a list or of an array in host
memory, ...) lie on the default device, see `gpu_adam.set_device`.  Every other function is NumPy's own, which hands
CuPy arrays to CuPy, and what a loss computes from its variables to the derivatives.  CuPy's own functions know nothing
of derivatives, but for the elementwise ones and a few others.

Example:
    >>> from gpu_adam import Variable, np, value_and_grad
    >>> w = Variable([1.0, 2.0, 3.0])
    >>> value, gradient = value_and_grad(lambda: np.sum(w * np.arange(3)), w)
    >>> gradient.tolist()
    [0.0, 1.0, 2.0]
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy

from gpu_adam.autodiff.rules import is_recorded, taken
from gpu_adam.devices import get_device
from gpu_adam.variables import Variable

_MAKERS = (
    *("arange", "bartlett", "blackman", "empty", "eye", "full", "geomspace", "hamming", "hanning"),
    *("identity", "indices", "kaiser", "linspace", "logspace", "ones", "tri", "zeros"),
)


def __getattr__(name: str) -> Any:
    return getattr(numpy, name)


def array(a: Any, dtype: Any = None, copy: bool = True, **options: Any) -> Any:
    """`numpy.array` on the default device; of a variable or of what a loss computed, a copy that the loss records."""
    if isinstance(a, Variable) or is_recorded(a):
        recorded = asarray(a, dtype)
        return recorded.copy() if copy else recorded
    return _made("array", (a,), {"dtype": dtype, "copy": copy, **options})


def asarray(a: Any, dtype: Any = None, **options: Any) -> Any:
    """`numpy.asarray` on the default device; of a variable or of what a loss computed, what the loss computes with."""
    if isinstance(a, Variable) or is_recorded(a):
        value = taken(a, (), numpy.asarray)
        return value if dtype is None else value.astype(dtype)
    return _made("asarray", (a,), {"dtype": dtype, **options})


def _made(name: str, args: Any, options: Any) -> Any:
    if options.get("like") is not None:
        return getattr(numpy, name)(*args, **options)
    device = get_device()
    module: Any = device.xp
    for part in name.split("."):
        module = getattr(module, part)
    with device.activate():
        return module(*args, **options)


def _maker(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def maker(*args: Any, **options: Any) -> Any:
        # An array among the arguments decides where the result lies.
        if any(hasattr(arg, "__array_function__") and type(arg) is not numpy.ndarray for arg in args):
            return original(*args, **options)
        return _made(name, args, options)

    return maker


class _Fourier(SimpleNamespace):
    """`numpy.fft`, whose frequencies lie on the default device."""

    def __getattr__(self, name: str) -> Any:
        return getattr(numpy.fft, name)


globals().update({name: _maker(name, getattr(numpy, name)) for name in _MAKERS})
fft = _Fourier(**{name: _maker(f"fft.{name}", getattr(numpy.fft, name)) for name in ("fftfreq", "rfftfreq")})
