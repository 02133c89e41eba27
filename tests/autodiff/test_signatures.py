"""NumPy's signatures beside the table: in no argument does a recorded value, or `out`, pass unnoticed."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpu_adam import Variable
from gpu_adam.autodiff import value_and_grad
from gpu_adam.autodiff.operations import OPERATIONS, function_name

# What to pass besides the argument in question, where one array is not enough.
OTHERS: dict[str, tuple[Any, ...]] = {
    "append": ([1.0],),
    "delete": (0,),
    "insert": (0, 1.0),
    "interp": ([0.0, 1.0], [0.0, 1.0]),
    **dict.fromkeys(("quantile", "percentile", "nanquantile", "nanpercentile"), (0.5,)),
    "array_split": (2,),
    "astype": (np.float32,),
    "broadcast_to": ((2, 2),),
    "clip": (0.0, 1.0),
    "expand_dims": (0,),
    "full_like": (1.0,),
    "matrix_power": (2,),
    "moveaxis": (0, 1),
    "pad": (1,),
    "repeat": (2,),
    "reshape": (4,),
    "roll": (1,),
    "split": (2,),
    "vsplit": (2,),
    "hsplit": (2,),
    "swapaxes": (0, 1),
    "take": (np.array([0, 1]),),
    "take_along_axis": (np.array([[0, 1]]), 0),
    "tile": (2,),
    **dict.fromkeys(
        ("dot", "inner", "outer", "vdot", "kron", "tensordot", "solve", "lstsq", "cross"), (np.ones((2, 2)),)
    ),
}
SEQUENCES = ("concatenate", "concat", "stack", "vstack", "hstack", "dstack", "column_stack")


def is_of_numpy(function: Any) -> bool:
    """Whether the function can be asked for its signature by name; the others are this package's own."""
    return not getattr(function, "__module__", "") or not str(function.__module__).startswith(("gpu_adam", "autodiff"))


def is_constant(function: Any) -> bool:
    """Whether no gradient flows through the function, of any argument."""
    return isinstance(OPERATIONS[function], functools.partial)


# Ufuncs with two results.
TWO = (np.divmod, np.frexp, np.modf)
FUNCTIONS = sorted((f for f in OPERATIONS if is_of_numpy(f) and not is_constant(f)), key=function_name)


def parameters(function: Callable[..., Any]) -> list[str]:
    """The names of what may be passed by keyword."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a ufunc, of an older NumPy
        return ["out", "where"]
    return [p.name for p in found if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]


def arguments(function: Any, matrix: Any) -> tuple[Any, ...]:
    """Some positional arguments for a function."""
    name = function.__name__
    if isinstance(function, np.ufunc) and function.nin == 2:
        return matrix, np.ones((2, 2), int if name == "ldexp" else float)
    if name in SEQUENCES:
        return ([matrix, matrix],)
    first = {
        "einsum": ("ij->j", matrix),
        "where": (True, matrix, matrix),
        "dsplit": (matrix[:, :, None], 1),
        "compress": ([True, False], matrix),
        "extract": ([True, False], matrix),
        "choose": ([0, 1], [matrix, matrix]),
        "select": ([np.array([True, False])], [matrix]),
        "bincount": ([0, 1], matrix[0]),
        "polyval": (matrix[0], matrix),
        "convolve": (matrix[0], matrix[1]),
        "correlate": (matrix[0], matrix[1]),
    }
    return first.get(name, (matrix, *OTHERS.get(name, ())))


@pytest.fixture
def x() -> Variable:
    return Variable(np.array([[2.0, 0.5], [0.5, 1.0]]))


@pytest.mark.parametrize("function", FUNCTIONS, ids=function_name)
def test_a_recorded_value_has_a_gradient_or_raises(x: Variable, function: Any) -> None:
    """In each argument in turn, by keyword, by itself and within a list."""
    b = Variable(np.array(1.0))
    given = parameters(function)
    for name in set(given) - {"dtype"}:  # NumPy takes an array for its dtype
        for value in (lambda: b, lambda: +b, lambda: [+b], lambda: ([b],)):

            def loss() -> Any:
                args = arguments(function, +x)[: given.index(name)]  # noqa: B023  # called in this turn of the loop
                result = function(*args, **{name: value()})  # noqa: B023
                return sum(np.sum(np.real(part)) for part in (result if isinstance(result, tuple) else (result,)))

            try:
                _, (_, gradient) = value_and_grad(loss, [x, b])
            except Exception:  # any error tells
                continue
            assert gradient is not None, f"{function_name(function)}({name}=)"


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if "out" in parameters(f)], ids=function_name)
def test_out_is_refused_and_stays_as_it_was(x: Variable, function: Any) -> None:
    """By keyword, and by position where NumPy takes it there."""
    buffer = np.full((2, 2), 7.0)
    with pytest.raises(NotImplementedError, match="with the argument out="):
        value_and_grad(
            lambda: np.sum(function(*arguments(function, +x), out=(buffer, None) if function in TWO else buffer)), x
        )
    assert (buffer == 7).all()


def test_out_by_position(x: Variable) -> None:
    for call in (
        lambda out: np.sum(x, 0, None, out),
        lambda out: np.mean(x, 0, None, out),
        lambda out: np.cumsum(x, 0, None, out),
        lambda out: np.max(x, 0, out),
        lambda out: np.dot(x, x, out),
        lambda out: np.take(x, [0, 1], 0, out),
        lambda out: np.concatenate([x, x], 0, out),
        lambda out: np.add(x, 1.0, out),
        lambda out: (+x).sum(0, None, out),
    ):
        buffer = np.full((2, 2), 7.0)
        with pytest.raises(NotImplementedError, match="with the argument out="):
            value_and_grad(lambda: np.sum(call(buffer)), x)  # noqa: B023  # called in this turn of the loop
        assert (buffer == 7).all()
