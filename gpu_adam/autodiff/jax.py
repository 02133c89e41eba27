"""Functions of JAX inside a loss, differentiated by JAX.

    from gpu_adam.autodiff.jax import differentiable

    @differentiable
    def squared_error(w, b):
        return jnp.mean((x @ w + b - y) ** 2)

    optimizer.minimize(lambda: squared_error(w, b), [w, b])

JAX differentiates functions, not what they return: the function must be known before it is called, hence the wrapper.
On a CUDA device JAX reads the memory of the variables.  On the CPU it gets a copy at every call, because it takes the
arrays it is given to be immutable, while an optimizer overwrites its variables.
"""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from gpu_adam.autodiff.node import Node
from gpu_adam.autodiff.rules import conj, namespace, plain, record, traced
from gpu_adam.autodiff.tape import Tape
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError


def differentiable(function: Callable[..., Any]) -> Callable[..., Any]:
    """A JAX function that can be called on variables and recorded arrays inside a loss.

    Args:
        function: a pure function of arrays, returning one array; it is compiled by `jax.jit`.

    Returns:
        A function of variables and arrays that returns a recorded array (outside a loss, a plain one) on the device of
        its first argument, to go on computing with or to return as the loss.
    """
    compiled = jax.jit(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        args = tuple(map(traced, args))
        wanted = [i for i, arg in enumerate(args) if type(arg) is Node and arg.tape is not None]
        values = [plain(arg) for arg in args]
        given = [_to_jax(value) for value in values]

        def of_wanted(*chosen: Any) -> Any:
            complete = list(given)
            for i, value in zip(wanted, chosen, strict=True):
                complete[i] = value
            return compiled(*complete)

        result, pullback = jax.vjp(of_wanted, *(given[i] for i in wanted))
        if not isinstance(result, jax.Array):
            raise ArgumentTypeError(
                f"{getattr(function, '__name__', 'the function')}()",
                "must return one JAX array",
                f"a {type(result).__name__}",
                "return the loss alone",
            )
        pull = _Pullback(pullback)
        sources: list[Any] = [(functools.partial(pull, position), args[i]) for position, i in enumerate(wanted)]
        result = _from_jax(result, values[0])
        return record(result, sources, values, {}) if sources else result

    return call


class _Pullback:
    """JAX's pullback gives the gradients of all arguments at once: they are computed for the first that asks."""

    def __init__(self, pullback: Callable[..., Any]) -> None:
        self.pullback = pullback
        self.upstream: Any = None
        self.found: tuple[Any, ...] = ()

    def __call__(self, position: int, g: Any, y: Any, *values: Any) -> Any:
        if self.upstream is not g:
            # JAX's gradients of complex arrays, and the upstream ones that it wants, are the conjugates of ours.
            self.upstream, self.found = g, self.pullback(jnp.conj(_to_jax(g)))
        return conj(_from_jax(self.found[position], y))


def pull_back(tape: Tape, losses: list[Any], seeds: list[Any]) -> NoReturn:
    """Refuse a bare JAX array, of which nobody knows how it was computed."""
    raise ArgumentTypeError(
        "loss()",
        "must not return a bare JAX array, whose history JAX does not keep",
        f"a {type(losses[0]).__name__}",
        "wrap the function that computes it in gpu_adam.autodiff.jax.differentiable",
    )


def _to_jax(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        _check_width(value)
        return jnp.array(value, copy=True)
    if hasattr(value, "__cuda_array_interface__"):
        _check_width(value)
        return jax.dlpack.from_dlpack(value)
    return value


def _check_width(value: Any) -> None:
    if value.dtype in (np.float64, np.complex128) and not jax.config.jax_enable_x64:
        raise ArgumentValueError(
            "a variable or array for JAX",
            "must be float32 or complex64 while JAX computes in 32 bits",
            f"dtype {value.dtype}",
            'call jax.config.update("jax_enable_x64", True), or use narrower variables',
        )


def _from_jax(array: Any, like: Any) -> Any:
    if isinstance(like, np.ndarray | np.generic) or not hasattr(like, "dtype"):
        return np.asarray(array)
    return namespace(like).from_dlpack(array)
