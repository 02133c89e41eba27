"""The recorded value: looks like an array, and writes down what is computed with it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any, NoReturn

import numpy as np

from gpu_adam.arrays import gather, namespace
from gpu_adam.autodiff.constants import shown
from gpu_adam.autodiff.operations import OPERATIONS, missing
from gpu_adam.autodiff.sparse_matrices import is_scipys_product
from gpu_adam.variables import MAKERS, make

_NO_KWARGS: Mapping[str, Any] = {}

# Methods of a ufunc that are functions of their own in `OPERATIONS`; the others have no derivative.
_UFUNC_METHODS: dict[tuple[Any, str], Callable[..., Any]] = {
    (np.add, "reduce"): np.sum,
    (np.add, "accumulate"): np.cumsum,
    (np.multiply, "reduce"): np.prod,
    (np.multiply, "accumulate"): np.cumprod,
    (np.maximum, "reduce"): np.max,
    (np.minimum, "reduce"): np.min,
    (np.fmax, "reduce"): np.nanmax,
    (np.fmin, "reduce"): np.nanmin,
    (np.logical_and, "reduce"): np.all,
    (np.logical_or, "reduce"): np.any,
    (np.logaddexp, "reduce"): np.logaddexp.reduce,
}


def _unary(ufunc: Any) -> Any:
    def operator(self: "Node") -> Any:
        return OPERATIONS[ufunc]((self,), _NO_KWARGS)

    return operator


def _binary(ufunc: Any) -> Any:
    def operator(self: "Node", other: Any) -> Any:
        return OPERATIONS[ufunc]((self, other), _NO_KWARGS)

    return operator


def _reflected(ufunc: Any) -> Any:
    def operator(self: "Node", other: Any) -> Any:
        return OPERATIONS[ufunc]((other, self), _NO_KWARGS)

    return operator


def _in_place(ufunc: Any) -> Any:
    def operator(self: "Node", other: Any) -> Any:
        result = OPERATIONS[ufunc]((self, other), _NO_KWARGS)
        # What NumPy computes without axes is a number, and a number's name moves on to the result.
        if not self.ndim or self.tape is None:
            return result
        if result.shape != self.shape:
            raise ValueError(
                f"an in-place operator must keep the shape {self.shape} (got a result of shape {result.shape}); "
                "write a = a + b instead of a += b."
            )
        if not np.can_cast(result.dtype, self.dtype, "same_kind"):
            raise TypeError(
                f"an in-place operator must keep the dtype {self.dtype} (got a result of dtype {result.dtype}); "
                "write a = a + b instead of a += b."
            )
        self.tape.overwrite(self, result if result.dtype == self.dtype else result.astype(self.dtype))
        return self

    return operator


def _method(function: Callable[..., Any]) -> Any:
    # Positional arguments pass through: CuPy's functions call a.sum(axis, dtype, out, keepdims).
    def method(self: "Node", *args: Any, **kwargs: Any) -> Any:
        return OPERATIONS[function]((self, *args), kwargs)

    return method


Origin = tuple[list[tuple[Callable[..., Any], "Node"]], Sequence[Any], Mapping[str, Any], Any, CodeType, int]
"""Where a recorded value comes from.

(vjp, recorded argument) for each argument that the gradient goes on to; the plain values of all arguments; the keyword
arguments; the function that the loss called, and the instruction of the loss that called it: see lines.py.
"""


class Node:
    """An array on the tape.

    NumPy's functions and operators accept it in place of an array (NEP 13 and NEP 18), and so do CuPy's elementwise
    functions and those that call a method of their argument.

    Attributes:
        array: what it stands for, on its device, for the rules: not to be written to.
        tape: where it is recorded; None once the differentiation is over, from when on it is a constant.
        origin: an `Origin`, or None for a variable.
        gradient: of the loss with respect to it, while the backward pass is under way.
    """

    __slots__ = ("__weakref__", "array", "gradient", "origin", "tape")
    __array_priority__ = 1000.0
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, array: Any, tape: Any, origin: Any) -> None:
        self.array = array
        self.tape = tape
        self.origin = origin
        self.gradient: Any = None

    # -- protocols
    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method == "__call__":
            return OPERATIONS[ufunc](inputs, kwargs)
        if method == "outer":
            return OPERATIONS[outer]((ufunc, *inputs), kwargs)
        try:
            function = _UFUNC_METHODS[ufunc, method]
        except KeyError:
            raise missing(f"numpy.{ufunc.__name__}.{method}") from None
        kwargs.setdefault("axis", 0)  # a ufunc reduces the first axis, a function all of them
        return OPERATIONS[function](inputs, kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if function in MAKERS:  # this is what the new array is to be like
            return make(function, namespace(self.array), args, kwargs)
        return OPERATIONS[function](args, kwargs)

    def __cupy_override_elementwise_kernel__(self, kernel: Any, *args: Any, **kwargs: Any) -> Any:
        name = kernel.name.removeprefix("cupy_")
        function = getattr(np, name, None)
        if function is None:
            raise missing(f"cupy.{name}")
        return OPERATIONS[function](args, kwargs)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        if self.tape is not None and is_scipys_product():
            no_array = np.empty((), object)
            no_array[()] = self
            return no_array
        return np.array(self._constant("a NumPy array"), dtype=dtype, copy=copy)

    def __dlpack__(self, **options: Any) -> Any:
        return self._constant("a DLPack capsule").__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._constant("a DLPack capsule").__dlpack_device__()

    def __float__(self) -> float:
        return float(self._constant("a float"))

    def __complex__(self) -> complex:
        return complex(self._constant("a complex"))

    def __int__(self) -> int:
        return int(self._constant("an int"))

    def __bool__(self) -> bool:
        return bool(self.array)  # a decision, like a comparison: constant wherever the loss is differentiable

    def item(self) -> Any:
        """The value as a Python number, once the differentiation is over."""
        return self._constant("a Python number").item()

    def _constant(self, kind: str) -> Any:
        if self.tape is not None:
            raise _not_an_array(kind)
        return self.array

    def __repr__(self) -> str:
        return f"Node({self.array!r})"

    def __format__(self, specification: str) -> str:
        return format(self.array, specification)  # printing cuts nothing off

    def __round__(self, digits: int | None = None) -> Any:
        """The nearest number of so many digits, of which none has a gradient: a constant, as numpy.round gives it."""
        if self.ndim:
            raise TypeError(f"round takes one number (got an array of shape {self.shape}); use numpy.round")
        return round(self.array.item(), digits)

    def __getattr__(self, name: str) -> Any:
        """What arrays have besides the following, once the differentiation is over."""
        if name.startswith("_") or (self.tape is not None and not hasattr(self.array, name)):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if self.tape is not None:
            raise AttributeError(
                f"a recorded array has no attribute {name!r} inside a loss; "
                f"use NumPy functions on it, or .value.{name} for that of the constant array."
            )
        return getattr(self.array, name)

    @property
    def value(self) -> Any:
        """The array as a constant; inside the loss nothing that is written to changes the recorded one."""
        return self.array if self.tape is None else shown(self.array)

    # -- copies
    def __copy__(self) -> Any:
        return np.copy(self)

    def __deepcopy__(self, memo: Any) -> Any:
        return np.copy(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._constant("a pickle").__reduce_ex__(protocol)

    # -- what arrays tell
    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    ndim = property(lambda self: self.array.ndim)
    size = property(lambda self: self.array.size)
    itemsize = property(lambda self: self.array.itemsize)
    nbytes = property(lambda self: self.array.nbytes)

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[Any]:
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self.array)))

    # -- indexing
    def __getitem__(self, key: Any) -> Any:
        return OPERATIONS[getitem]((self, key), _NO_KWARGS)

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        raise TypeError(
            "a recorded array must not be written to (got an assignment to a part of it); "
            "build the result with numpy.where, numpy.concatenate or numpy.stack."
        )

    # -- operators
    __neg__ = _unary(np.negative)
    __pos__ = _unary(np.positive)
    __abs__ = _unary(np.absolute)
    __add__, __radd__ = _binary(np.add), _reflected(np.add)
    __sub__, __rsub__ = _binary(np.subtract), _reflected(np.subtract)
    __mul__, __rmul__ = _binary(np.multiply), _reflected(np.multiply)
    __truediv__, __rtruediv__ = _binary(np.divide), _reflected(np.divide)
    __matmul__, __rmatmul__ = _binary(np.matmul), _reflected(np.matmul)
    __mod__, __rmod__ = _binary(np.remainder), _reflected(np.remainder)
    __floordiv__, __rfloordiv__ = _binary(np.floor_divide), _reflected(np.floor_divide)
    __divmod__, __rdivmod__ = _binary(np.divmod), _reflected(np.divmod)
    __pow__, __rpow__ = _binary(np.power), _reflected(np.power)
    __iadd__, __isub__ = _in_place(np.add), _in_place(np.subtract)
    __imul__, __itruediv__ = _in_place(np.multiply), _in_place(np.divide)
    __imatmul__, __ipow__ = _in_place(np.matmul), _in_place(np.power)
    __imod__, __ifloordiv__ = _in_place(np.remainder), _in_place(np.floor_divide)
    __lt__, __le__ = _binary(np.less), _binary(np.less_equal)
    __gt__, __ge__ = _binary(np.greater), _binary(np.greater_equal)
    __eq__, __ne__ = _binary(np.equal), _binary(np.not_equal)

    # -- methods
    T = property(_method(np.transpose))
    mT = property(_method(np.matrix_transpose))  # noqa: N815  # the array API's name
    real = property(_method(np.real))
    imag = property(_method(np.imag))
    all, any = _method(np.all), _method(np.any)
    argmax, argmin, argsort = _method(np.argmax), _method(np.argmin), _method(np.argsort)
    clip = _method(np.clip)
    conj = conjugate = _unary(np.conjugate)
    cumprod, cumsum = _method(np.cumprod), _method(np.cumsum)
    diagonal, trace = _method(np.diagonal), _method(np.trace)
    dot = _method(np.dot)
    flat = property(_method(np.ravel))
    flatten = ravel = _method(np.ravel)
    max, min = _method(np.max), _method(np.min)
    mean, std, var = _method(np.mean), _method(np.std), _method(np.var)
    nonzero = _method(np.nonzero)
    prod, sum = _method(np.prod), _method(np.sum)
    repeat = _method(np.repeat)
    round = _method(np.round)
    searchsorted = _method(np.searchsorted)
    squeeze = _method(np.squeeze)
    swapaxes = _method(np.swapaxes)
    take = _method(np.take)

    def astype(
        self, dtype: Any, order: str = "K", casting: str = "unsafe", subok: bool = True, copy: Any = True
    ) -> Any:
        """The array in another dtype; a constant where that is not a floating-point one."""
        return OPERATIONS[astype]((self, np.dtype(dtype)), _NO_KWARGS)

    def copy(self, order: str = "C") -> Any:
        """A new array of the same elements, by default in C order, unlike that of numpy.copy."""
        return OPERATIONS[np.copy]((self,), {"order": order})

    def view(self, dtype: Any = None, type: Any = None) -> Any:
        """The same memory as numbers of another dtype: complex ones as pairs of real ones, and back."""
        kwargs = _NO_KWARGS if type is None else {"type": type}
        return OPERATIONS[view]((self, self.dtype if dtype is None else np.dtype(dtype)), kwargs)

    def gather(self, rows: Any) -> Any:
        """What `Variable.gather` takes of a recorded variable."""
        return OPERATIONS[gather]((self, rows), _NO_KWARGS)

    def reshape(self, *shape: Any, order: str = "C", copy: Any = None) -> Any:
        """The array in another shape, given as one tuple or as integers."""
        kwargs = _NO_KWARGS if order == "C" else {"order": order}
        return OPERATIONS[np.reshape]((self, shape[0] if len(shape) == 1 else shape), kwargs)

    def transpose(self, *axes: Any) -> Any:
        """The array with its axes permuted, reversed by default."""
        return OPERATIONS[np.transpose]((self, axes[0] if len(axes) == 1 else axes or None), _NO_KWARGS)


def getitem(array: Any, key: Any) -> Any:
    """array[key], as a function: a key of `OPERATIONS`."""
    return array[key]


def astype(array: Any, dtype: Any) -> Any:
    """array.astype(dtype), as a function: a key of `OPERATIONS`."""
    return array.astype(dtype)


def view(array: Any, dtype: Any) -> Any:
    """array.view(dtype), as a function: a key of `OPERATIONS`."""
    return array.view(dtype)


def outer(ufunc: Any, a: Any, b: Any, **kwargs: Any) -> Any:
    """ufunc.outer(a, b), as a function: a key of `OPERATIONS`."""
    return ufunc.outer(a, b, **kwargs)


def _not_an_array(kind: str) -> TypeError:
    return TypeError(
        f"a recorded array must not become {kind} inside a loss, which would cut its gradient off; "
        "use NumPy functions on it, numpy.stack to join several, or .value for its value as a constant."
    )
