"""The three kinds of entries in the table of operations, and how to add one.

    derivative(np.exp, lambda g, y, x: g * conj(y))      # one vjp per argument, called as vjp(g, y, *arguments)
    composed(np.outer, outer)                            # a function of operations that have entries
    constant(np.floor)                                   # no gradient flows through it

A vjp (vector-Jacobian product) turns g, the gradient of the loss with respect to the result y, into the one with
respect to its argument.  Gradients point uphill, for complex values too: dL/d(re) + i dL/d(im), so that |z|^2 gives 2z.
A holomorphic function therefore multiplies g by the *conjugate* of its derivative.

A parameter whose name begins with an underscore is one that the vjp does not read: a constant in its place is not kept
for the backward pass (see constants.py).

A vjp need not undo broadcasting, return the dtype or drop the imaginary part of a real argument's gradient: `fit` does.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from typing import Annotated, Any

import numpy as np

from gpu_adam.autodiff.constants import COPIED_BYTES
from gpu_adam.autodiff.lines import caller
from gpu_adam.autodiff.node import Node
from gpu_adam.autodiff.operations import OPERATIONS, function_name, missing
from gpu_adam.autodiff.sparse_matrices import is_sparse, multiplies_as_matrix
from gpu_adam.autodiff_seam import operand
from gpu_adam.variables import Variable

Vjp = Callable[..., Any]

Operand = Annotated[Any, "operand"]
"""Marks a parameter of a composed function that takes an array: it gets a recorded value or an array."""

Operands = Annotated[Any, "operands"]
"""Marks a parameter of a composed function that takes a sequence of arrays."""

OperandOrNumber = Annotated[Any, "operand or number"]
"""Like `Operand`, but a Python number stays one, so that it does not widen what it meets."""

OperandsOrNumbers = Annotated[Any, "operands or numbers"]
"""Like `Operands`, but Python numbers stay numbers."""

# Types of arguments that need no look: numbers; what holds no recorded value; what cannot change.
_NUMBERS = {bool, int, float, complex}
_PLAIN = {np.ndarray, *_NUMBERS}
_FIXED = {str, type(None), *_NUMBERS}

# A method, not numpy.conjugate, which copies real arrays.
conj: Callable[[Any], Any] = methodcaller("conjugate")


class Primitive:
    """An operation that knows its derivative.

    Args:
        function: what to call on plain arrays.
        vjps: one per positional argument; None where the result does not depend on it differentiably.
        of: the function that a user calls, if another one; errors name it.
    """

    __slots__ = ("function", "keywords", "most", "of", "out", "read", "vjps")

    def __init__(
        self, function: Callable[..., Any], vjps: "Sequence[Vjp | None] | Each", *, of: Callable[..., Any] | None = None
    ) -> None:
        self.function = function
        self.of = of or function
        self.vjps = vjps
        known = [vjps.vjp] if isinstance(vjps, Each) else [vjp for vjp in vjps if vjp is not None]
        signatures = [list(inspect.signature(vjp).parameters.values()) for vjp in known]
        self.keywords = frozenset(parameter.name for signature in signatures for parameter in signature)
        self.most = _EVERY.stop if isinstance(vjps, Each) else len(vjps)
        self.out = _EVERY.stop
        if isinstance(vjps, Each):
            is_read = not any(p.kind is p.VAR_POSITIONAL and p.name.startswith("_") for p in signatures[0])
            self.read: range | frozenset[int] = _EVERY if is_read else frozenset()
            return
        read = set[int]()
        for own, vjp in enumerate(vjps):
            if vjp is not None:
                names = [parameter.name for parameter in inspect.signature(vjp).parameters.values()][2:]
                read |= {i for i, name in enumerate(names) if i != own and not name.startswith("_")}
                self.out = names.index("out") if "out" in names else self.out  # which `read` holds too
        self.read = frozenset(read)

    # Every operation of a loss comes through here: what is written out in place of a call is worth its time.
    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any = None) -> Any:  # noqa: PLR0912
        """Compute the result of the arguments, unless it is already known, and record it."""
        values = []
        sources = []
        constants: tuple[int, ...] = ()
        for position, arg in enumerate(args):
            if type(arg) is not Node and type(arg) not in _PLAIN:
                if isinstance(arg, Variable):
                    arg = operand(arg)  # noqa: PLW2901
                elif self.of is np.multiply and multiplies_as_matrix(arg):
                    return OPERATIONS[np.matmul](args, kwargs)
                else:
                    arg = self._taken(position, arg, args)  # noqa: PLW2901
            if type(arg) is not Node:
                values.append(arg)
                if type(arg) not in _NUMBERS and position in self.read:
                    constants += (position,)
                continue
            values.append(arg.array)
            if arg.tape is not None:
                if position >= self.most:
                    raise missing(f"{function_name(self.of)} with respect to argument {position}")
                vjp = self.vjps[position]
                if vjp is not None:
                    sources.append((vjp, arg))
        if constants and self.out in constants and values[self.out] is not None:
            raise missing(f"{function_name(self.of)} with the argument out=")
        is_fixed = not kwargs or (kwargs.keys() <= self.keywords and _FIXED.issuperset(map(type, kwargs.values())))
        if not is_fixed:
            kwargs = self._checked(kwargs)
        if result is None:
            result = self.function(*values, **kwargs)
        if not sources:
            return result
        tape = sources[0][1].tape
        for position in constants:
            value = values[position]
            is_small = type(value) is np.ndarray and value.nbytes <= COPIED_BYTES
            values[position] = value.copy("K") if is_small else tape.constants.kept(value, self.of)
        if not is_fixed:
            kwargs = {key: tape.constants.kept(value, self.of) for key, value in kwargs.items()}
        node = Node(result, tape, (sources, values, kwargs, self.of, *caller()))
        tape.nodes.append(node)
        return node

    def _taken(self, position: int, arg: Any, args: tuple[Any, ...]) -> Any:
        """An argument that is no recorded value, array or number: converted in an array's place."""
        if position < self.most and (self.vjps[position] is not None or isinstance(self.of, np.ufunc)):
            return taken(arg, args, self.of)
        return settled(arg, f"argument {position}", self.of)

    def _checked(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keyword arguments without those that say nothing; what the vjp does not know must not pass unnoticed."""
        given = {}
        for keyword, value in kwargs.items():
            if isinstance(value, (Node, Variable)) and is_recorded(value):
                raise TypeError(
                    f"{function_name(self.of)}: a recorded array must be passed by position "
                    f"(got the keyword argument {keyword})"
                )
            if keyword in self.keywords and not (keyword == "out" and value is not None):
                given[keyword] = settled(value, f"the argument {keyword}=", self.of)
            elif value is not None:
                raise missing(f"{function_name(self.of)} with the argument {keyword}=")
        return given


# Positions of the arguments of a function that takes any number of them.
_EVERY = range(2**31)


def record(
    result: Any,
    sources: list[tuple[Vjp, Node]],
    values: Sequence[Any],
    kwargs: Mapping[str, Any],
    operation: Callable[..., Any],
) -> Any:
    """Put a result on the tape of its sources.

    Args:
        result: a new array.
        sources: the arguments whose gradient is wanted, each with its vjp.
        values: of all arguments, plain; what the vjps read of them must not change.
        kwargs: of the call.
        operation: the function that the loss called.
    """
    tape = sources[0][1].tape
    node = Node(result, tape, (sources, values, kwargs, operation, *caller()))
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
    OPERATIONS[function] = Primitive(function, vjps)


def composed(*functions: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: what the decorated function computes is what each of `functions` means for recorded arrays.

    Its parameters are those of NumPy's function.  Those that take arrays are marked as `Operand` or `Operands`; a
    recorded value in the place of another one raises, as does `out`.  What `**kwargs` takes is passed on.
    """

    def enter(implementation: Callable[..., Any]) -> Callable[..., Any]:
        known = inspect.signature(implementation).parameters
        by_position = [p for p in known.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        further = next((p for p in known.values() if p.kind is p.VAR_POSITIONAL), None)
        passed_on = next((p for p in known.values() if p.kind is p.VAR_KEYWORD), None)
        function = functions[0]
        as_arrays = not isinstance(function, np.ufunc)

        def entry(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            every = (*args, *kwargs.values()) if kwargs else args

            def argument(parameter: Any, value: Any, name: str) -> Any:
                if name == "out" and value is not None:
                    raise missing(f"{function_name(function)} with the argument out=")
                kind = parameter.annotation
                if kind in _SEQUENCES and isinstance(value, (list, tuple)):
                    return [taken(item, every, function, numbers=as_arrays and kind in _CONVERTED) for item in value]
                if kind in _ARRAYS and value is not None:
                    return taken(value, every, function, numbers=as_arrays and kind in _CONVERTED)
                return settled(value, f"the argument {name}=", function)

            given = {}
            for key, value in kwargs.items():
                if key in known or passed_on:
                    given[key] = argument(known.get(key, passed_on), value, key)
                elif value is not None:
                    raise missing(f"{function_name(function)} with the argument {key}=")
            extra = args[len(by_position) :]
            first = [
                argument(parameter, arg, parameter.name) for parameter, arg in zip(by_position, args, strict=False)
            ]
            if further:
                extra = tuple(argument(further, arg, further.name) for arg in extra)
            return implementation(*first, *extra, **given)

        for each in functions:
            OPERATIONS[each] = entry
        return implementation

    return enter


_CONVERTED = (Operand, Operands)
_SEQUENCES = (Operands, OperandsOrNumbers)
_ARRAYS = (*_CONVERTED, OperandOrNumber, OperandsOrNumbers)


def constant(*functions: Callable[..., Any]) -> None:
    """Enter operations through which no gradient flows: comparisons, roundings, questions about shape and dtype."""
    for function in functions:
        OPERATIONS[function] = functools.partial(_call_plain, function)


def register_vjp(function: Callable[..., Any], *vjps: Vjp | None) -> Callable[..., Any]:
    """Teach a function its derivative: one of your own, or one of NumPy's that has none here.

    Args:
        function: of arrays, returning a new array; for example a wrapper around a `cupy.RawKernel`.
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


# -- arguments
def traced(value: Any) -> Any:
    """What stands for an argument: a variable's recorded or plain value, anything else itself."""
    return operand(value) if isinstance(value, Variable) else value


def taken(value: Any, others: Sequence[Any], function: Callable[..., Any], *, numbers: bool = False) -> Any:
    """An argument in the place of an array, as a recorded value or an array: whatever NumPy converts is converted.

    Args:
        value: the argument.
        others: the arguments of the call; a converted one goes to where their arrays lie.
        function: that was called; errors name it.
        numbers: whether Python's numbers are converted too.
    """
    value = traced(value)
    if (
        value is None
        or isinstance(value, str)
        or type(value) in (Node, np.ndarray)
        or (type(value) in _NUMBERS and not numbers)
    ):
        return value
    if isinstance(value, (np.ma.MaskedArray, np.matrix, np.poly1d)):
        raise TypeError(
            f"{function_name(function)}: a recorded array must not meet a {type(value).__name__}, "
            "whose operators mean something else; convert it with numpy.asarray or its method filled."
        )
    if isinstance(value, np.generic) or hasattr(value, "__array_function__"):
        return value
    if is_sparse(value):
        if function is not np.matmul or value.ndim != 2:
            raise missing(f"{function_name(function)} of a sparse operand of {value.ndim} dimensions")
        return value
    package = type(value).__module__.partition(".")[0].removesuffix("lib")
    if package in ("torch", "jax"):  # it would take the result with it
        raise TypeError(
            f"{function_name(function)}: a recorded array must not meet one of another framework "
            f"(got one of {package}); compute with the variable's view, gpu_adam.autodiff.{package}.view, "
            "or convert the other array with numpy.asarray."
        )
    if is_recorded(value):
        return np.stack([taken(item, (*value, *others), function, numbers=True) for item in value])
    return np.asarray(plain(value), like=first_array(others))


def first_array(values: Any) -> Any:
    """The first array among some arguments, in nested lists and tuples too."""
    for value in values:
        found = first_array(value) if isinstance(value, (list, tuple)) else plain(value)
        if hasattr(found, "__array_function__"):
            return found
    return None


def settled(value: Any, place: str, function: Callable[..., Any]) -> Any:
    """An argument in a place where a recorded value has no derivative: variables without gradient as their values.

    Raises:
        NotImplementedError: it is or holds a recorded value.
    """
    if value is None or type(value) in _PLAIN or isinstance(value, str):
        return value
    if is_recorded(value):
        raise missing(f"{function_name(function)} with respect to {place}")
    return plain(value)


def is_recorded(value: Any) -> bool:
    """Whether an argument is a recorded value, or a list, tuple or dict that holds one."""
    if isinstance(value, (list, tuple)):
        return any(map(is_recorded, value))
    if isinstance(value, dict):
        return any(map(is_recorded, value.values()))
    value = traced(value)
    return type(value) is Node and value.tape is not None


def plain(value: Any) -> Any:
    """An argument without its recording, in nested lists and tuples too."""
    if type(value) is Node:
        return value.array
    if isinstance(value, Variable):
        return value._value
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


def own(array: Any) -> Any:
    """A new array that nobody else can write to, as an argument: it need not be copied."""
    return Node(array, None, None)


# -- for the vjps
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
