"""The three kinds of entries in the table of operations, and how to add one.

    derivative(np.exp, lambda g, y, x: g * conj(y))      # one vjp per argument, called as vjp(g, y, *arguments)
    composed(np.outer, outer)                            # a function of operations that have entries
    constant(np.floor)                                   # no gradient flows through it

A vjp (vector-Jacobian product) turns g, the gradient of the loss with respect to the result y, into the one with
respect to its argument.  Gradients point uphill, for complex values too: dL/d(re) + i dL/d(im), so that |z|^2 gives 2z.
A holomorphic function therefore multiplies g by the *conjugate* of its derivative.

A vjp need not undo broadcasting, return the dtype or drop the imaginary part of a real argument's gradient: `fit` does.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from typing import Any

import numpy as np

from gpu_adam.autodiff.node import Node
from gpu_adam.autodiff.operations import OPERATIONS, function_name, missing
from gpu_adam.autodiff_seam import operand
from gpu_adam.variables import Variable

Vjp = Callable[..., Any]

# The types of most arguments that are not recorded: arrays of NumPy and numbers.
_PLAIN = {np.ndarray, bool, int, float, complex}

# A method, not numpy.conjugate, which copies real arrays.
conj: Callable[[Any], Any] = methodcaller("conjugate")


class Primitive:
    """An operation that knows its derivative.

    Args:
        function: what to call on plain arrays.
        vjps: one per positional argument; None where the result does not depend on it differentiably.
        of: the function that a user calls, if another one; errors name it.
        arrays_only: whether each argument is an array (a ufunc's are), so that lists among them are converted.
    """

    __slots__ = ("arrays_only", "function", "keywords", "of", "vjps")

    def __init__(
        self,
        function: Callable[..., Any],
        vjps: "Sequence[Vjp | None] | Each",
        *,
        of: Callable[..., Any] | None = None,
        arrays_only: bool = False,
    ) -> None:
        self.function = function
        self.of = of or function
        self.vjps = vjps
        self.arrays_only = arrays_only
        self.keywords = _keywords(vjps)

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any = None) -> Any:
        """Compute the result of the arguments, unless it is already known, and record it."""
        values = []
        sources = []
        for position, arg in enumerate(args):
            if isinstance(arg, Variable):
                arg = operand(arg)  # noqa: PLW2901
            if type(arg) is not Node:
                values.append(arg if type(arg) in _PLAIN else self._constant(arg, args))
                continue
            values.append(arg.value)
            if arg.tape is not None:
                try:
                    vjp = self.vjps[position]
                except IndexError:
                    raise missing(f"{function_name(self.of)} with respect to argument {position}") from None
                if vjp is not None:
                    sources.append((vjp, arg))
        if kwargs:
            kwargs = self._checked(kwargs)
        if result is None:
            result = self.function(*values, **kwargs)
        return record(result, sources, values, kwargs) if sources else result

    def _constant(self, arg: Any, args: tuple[Any, ...]) -> Any:
        """An argument that is not recorded; those of other frameworks would take the result with them."""
        package = type(arg).__module__.partition(".")[0].removesuffix("lib")
        if self.arrays_only and package in ("torch", "jax"):
            raise TypeError(
                f"{function_name(self.of)}: a recorded array must not meet one of another framework "
                f"(got one of {package}); compute with the variable's view, gpu_adam.autodiff.{package}.view, "
                "or convert the other array with numpy.asarray."
            )
        if not self.arrays_only or type(arg) is not list:
            return arg
        others = (plain(other) for other in args)
        like = next((other for other in others if hasattr(other, "__array_function__")), None)
        return np.asarray(arg, like=like)

    def _checked(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keyword arguments without those that say nothing; what the vjp does not know must not pass unnoticed."""
        given = kwargs
        if not kwargs.keys() <= self.keywords:
            given = {key: value for key, value in kwargs.items() if key in self.keywords or value is not None}
        for keyword, value in given.items():
            if isinstance(value, (Node, Variable)):
                raise TypeError(
                    f"{function_name(self.of)}: a recorded array must be passed by position "
                    f"(got the keyword argument {keyword})"
                )
            if keyword not in self.keywords:
                raise missing(f"{function_name(self.of)} with the argument {keyword}=")
        return given


def record(result: Any, sources: list[tuple[Vjp, Node]], values: list[Any], kwargs: Mapping[str, Any]) -> Any:
    """Put a result on the tape of its sources: the arguments whose gradient is wanted, each with its vjp."""
    tape = sources[0][1].tape
    node = Node(result, tape, (sources, values, kwargs))
    tape.nodes.append(node)
    return node


class Each:
    """The vjps of a function of any number of arrays: vjp(position, g, y, *arguments)."""

    def __init__(self, vjp: Vjp) -> None:
        self.vjp = vjp

    def __getitem__(self, position: int) -> Vjp:
        return functools.partial(self.vjp, position)


# -- how to add an entry
def derivative(function: Callable[..., Any], *vjps: Vjp | None) -> None:
    """Enter an operation with one vjp per positional argument."""
    OPERATIONS[function] = Primitive(function, vjps, arrays_only=isinstance(function, np.ufunc))


def composed(*functions: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: what the decorated function computes is what each of `functions` means for recorded arrays."""

    def enter(implementation: Callable[..., Any]) -> Callable[..., Any]:
        known = inspect.signature(implementation).parameters

        def entry(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            given = {key: traced(value) for key, value in kwargs.items() if key in known or value is not None}
            if not given.keys() <= known.keys():
                raise missing(f"{function_name(functions[0])} with the argument {min(given.keys() - known.keys())}=")
            return implementation(*map(traced, args), **given)

        for function in functions:
            OPERATIONS[function] = entry
        return implementation

    return enter


def constant(*functions: Callable[..., Any]) -> None:
    """Enter operations through which no gradient flows: comparisons, roundings, questions about shape and dtype."""
    for function in functions:
        OPERATIONS[function] = functools.partial(_call_plain, function)


def register_vjp(function: Callable[..., Any], *vjps: Vjp | None) -> Callable[..., Any]:
    """Teach a function its derivative: one of your own, or one of NumPy's that has none here.

    Args:
        function: of arrays, returning an array; for example a wrapper around a `cupy.RawKernel`.
        *vjps: one per positional argument, each called as `vjp(g, result, *args, **kwargs)` with plain arrays, where
            `g` is the gradient of the loss with respect to the result; it returns the one with respect to its
            argument.  None for an argument without a gradient.

    Returns:
        The function to call inside a loss, on variables, on recorded arrays and on plain ones.  (A NumPy function may
        be called by its own name as well.)

    Example:
        >>> import numpy as np
        >>> cube = register_vjp(lambda x: x**3, lambda g, y, x: g * 3 * x**2)
        >>> float(cube(np.float64(2)))
        8.0
    """
    primitive = Primitive(function, vjps)
    OPERATIONS[function] = primitive

    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        return primitive(args, kwargs)

    return recorded


# -- for the vjps
def traced(value: Any) -> Any:
    """What stands for an argument: a variable's recorded or plain value, anything else itself."""
    return operand(value) if isinstance(value, Variable) else value


def plain(value: Any) -> Any:
    """An argument without its recording, in nested lists and tuples too."""
    if type(value) is Node:
        return value.value
    if isinstance(value, Variable):
        return value.value
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


def fit(gradient: Any, value: Any) -> Any:
    """A contribution to the gradient of `value`, with the shape and dtype of `value`."""
    if gradient.shape != value.shape:
        gradient = unbroadcast(gradient, value.shape)
    if gradient.dtype != value.dtype:
        if gradient.dtype.kind == "c" and value.dtype.kind != "c":
            gradient = gradient.real
        gradient = gradient.astype(value.dtype)
    return gradient


def unbroadcast(array: Any, shape: tuple[int, ...]) -> Any:
    """The adjoint of broadcasting from `shape`: sums over the axes that broadcasting added or stretched."""
    added = array.ndim - len(shape)
    if added > 0:
        array = array.sum(axis=0 if added == 1 else tuple(range(added)))
    if array.shape == shape:
        return array
    stretched = tuple(axis for axis, (n, m) in enumerate(zip(array.shape, shape, strict=True)) if n != m)
    return array.sum(axis=stretched, keepdims=True)


def _call_plain(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return function(*map(plain, args), **{key: plain(value) for key, value in kwargs.items()})


def _keywords(vjps: Sequence[Vjp | None] | Each) -> frozenset[str]:
    if isinstance(vjps, Each):
        return frozenset(inspect.signature(vjps.vjp).parameters)
    return frozenset(name for vjp in vjps if vjp is not None for name in inspect.signature(vjp).parameters)
