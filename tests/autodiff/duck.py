"""An array that follows CuPy's dispatch rules without a GPU, to notice a silent fall-back to NumPy.

- It never becomes a NumPy array by itself, and does not mix with one: both raise.
- NumPy functions reach it through NEP 13 and NEP 18 only, and only those that CuPy 14 has.
- Results are arrays again, 0-d ones too, never NumPy scalars.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np


def _words(text: str) -> list[str]:
    return text.split()


# Of the functions that the derivatives call, those that CuPy 14.2 has.
CUPY_HAS = {
    "numpy": _words(
        """
        abs absolute add all angle any append arange arccos arccosh arcsin arcsinh arctan arctan2 arctanh
        argmax argmin argsort array_equal asarray atleast_1d atleast_2d atleast_3d bincount bitwise_and bitwise_or
        broadcast_arrays broadcast_to cbrt ceil choose clip concatenate conjugate convolve copy copysign cos cosh
        cross cumprod cumsum deg2rad degrees diag diagonal divide divmod dot einsum empty_like equal exp exp2
        expand_dims expm1 eye fabs flatnonzero flip float_power floor floor_divide fmax fmin fmod frexp full_like
        greater greater_equal hypot imag invert isfinite isinf isnan isneginf ldexp less less_equal log log10 log1p
        log2 logaddexp logaddexp2 matmul matrix_transpose max maximum mean min minimum mod modf moveaxis multiply
        nan_to_num ndim negative nextafter not_equal ones_like outer pad positive power prod rad2deg radians ravel
        real reciprocal remainder reshape rint roll searchsorted shape sign signbit sin sinc sinh size sort sqrt
        square squeeze std subtract sum swapaxes take take_along_axis tan tanh transpose tril triu trunc unwrap var
        where zeros_like
        """
    ),
    "numpy.linalg": _words(
        """
        cholesky det eig eigh inv lstsq matrix_power norm pinv qr slogdet solve svd
        """
    ),
    "numpy.fft": _words(
        """
        fft fft2 fftn fftshift ifft ifft2 ifftn ifftshift irfft irfftn rfft rfftn
        """
    ),
}
_SCALARS = (bool, int, float, complex, np.generic)


class DuckArray:
    """An array on a device that does not exist."""

    __array_priority__ = 100

    def __init__(self, array: Any) -> None:
        self._array = np.asarray(array)

    # -- the protocols, as in CuPy
    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if ufunc.__name__ not in CUPY_HAS["numpy"]:
            return NotImplemented
        if not all(isinstance(x, (DuckArray, np.ndarray, *_SCALARS)) for x in inputs):
            return NotImplemented
        return _on_device(getattr(ufunc, method), inputs, kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        module = function.__module__.removesuffix("._linalg").removesuffix("._pocketfft")
        if function.__name__ not in CUPY_HAS.get(module, ()):
            return NotImplemented
        if not all(issubclass(t, DuckArray | np.ndarray) for t in types):
            return NotImplemented
        kwargs = {key: value for key, value in kwargs.items() if key != "like"}
        if function.__name__ in ("asarray", "arange", "eye"):  # the way in: the only functions that take host arrays
            return DuckArray(function(*map(_to_host, args), **kwargs))
        if function.__name__ in ("shape", "ndim", "size"):
            return getattr(self, function.__name__)
        if function.__name__ in ("take", "take_along_axis"):  # uploads host indices, as an index in brackets does
            args = (args[0], _to_host(args[1]), *args[2:])
            return DuckArray(function(_unwrapped(args[0]), *args[1:], **kwargs))
        return _on_device(function, args, kwargs)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    @staticmethod
    def __array_namespace__() -> Any:
        return DuckNamespace

    def get(self) -> Any:
        """The explicit way to the host."""
        return self._array

    # -- attributes and methods
    shape = property(lambda self: self._array.shape)
    dtype = property(lambda self: self._array.dtype)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    flags = property(lambda self: self._array.flags)
    base = None
    T = property(lambda self: DuckArray(self._array.T))
    real = property(lambda self: DuckArray(self._array.real))
    imag = property(lambda self: DuckArray(self._array.imag))

    def __len__(self) -> int:
        return len(self._array)

    def __bool__(self) -> bool:
        return bool(self._array)

    def __getitem__(self, key: Any) -> DuckArray:
        return DuckArray(self._array[_index(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._array[_index(key)] = _unwrapped(value)

    def __neg__(self) -> DuckArray:
        return DuckArray(-self._array)

    def __invert__(self) -> DuckArray:
        return DuckArray(~self._array)

    def __imul__(self, other: Any) -> DuckArray:
        self._array *= _unwrapped(other)
        return self

    def __repr__(self) -> str:
        return f"DuckArray({self._array!r})"


class DuckNamespace:
    """What derivatives take from the module of an array."""

    class add:  # noqa: N801  # a ufunc's name
        """The ufunc, of which `at` takes any index."""

        @staticmethod
        def at(target: DuckArray, key: Any, values: DuckArray) -> None:
            """In place, repeated elements adding up."""
            np.add.at(target._array, _index(key), _unwrapped(values))


def _unwrapped(value: Any) -> Any:
    if isinstance(value, DuckArray):
        return value._array
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type numpy.ndarray")
    if isinstance(value, tuple | list):
        return type(value)(_unwrapped(item) for item in value)
    return value


def _to_host(value: Any) -> Any:
    return value._array if isinstance(value, DuckArray) else value


def _index(key: Any) -> Any:
    # CuPy uploads NumPy index arrays, the one mixture that it allows.
    return tuple(map(_to_host, key)) if isinstance(key, tuple) else _to_host(key)


def _on_device(function: Any, args: Any, kwargs: Any) -> Any:
    result: Any = function(*map(_unwrapped, args), **{key: _unwrapped(value) for key, value in kwargs.items()})
    if result is None:
        return None
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        return cast(Any, type(result))(*map(DuckArray, result))
    return [DuckArray(part) for part in result] if isinstance(result, tuple | list) else DuckArray(result)


def _method(name: str) -> Any:
    def method(self: DuckArray, *args: Any, **kwargs: Any) -> Any:
        return _on_device(getattr(np.ndarray, name), (self, *args), kwargs)

    return method


def _operator(name: str, ufunc: Any) -> Any:
    def operator(self: DuckArray, other: Any) -> Any:
        if getattr(other, "__array_ufunc__", 0) is None:
            return NotImplemented
        return ufunc(other, self) if name.startswith("__r") else ufunc(self, other)

    return operator


for _name in _words("all any argmax astype conj conjugate copy max mean min reshape sum swapaxes transpose view"):
    setattr(DuckArray, _name, _method(_name))
for _name, _ufunc in {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide, "matmul": np.matmul, "pow": np.power,
    "mod": np.remainder, "floordiv": np.floor_divide,
}.items():  # fmt: skip
    setattr(DuckArray, f"__{_name}__", _operator(f"__{_name}__", _ufunc))
    setattr(DuckArray, f"__r{_name}__", _operator(f"__r{_name}__", _ufunc))
for _name, _ufunc in {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "and": np.bitwise_and, "or": np.bitwise_or,
}.items():  # fmt: skip
    setattr(DuckArray, f"__{_name}__", _operator(f"__{_name}__", _ufunc))
