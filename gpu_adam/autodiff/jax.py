"""Losses computed by JAX, differentiated by JAX.

    optimizer.minimize(lambda: jnp.mean((x @ w + b - y) ** 2), [w, b])

with `x` and `y` arrays of JAX: its operators ask a variable for a `view` of itself, and so does `jnp.asarray(w)`.  (The
functions of `jax.numpy` do not; they take `jnp.asarray(w)` or `view(w)`.  A function compiled by `jax.jit` takes views
as arguments: asked for inside, it would keep the first step's.)

JAX differentiates functions, not what they return, so it is JAX that has to call the loss.  That a loss is one of JAX
shows when it asks for its first view: there it is unwound, and begun again by JAX.  This happens once, then its code is
known.  Where not even that is wanted, or only a part of a larger loss is JAX's, name the part:

    from gpu_adam.autodiff.jax import differentiable

    @differentiable  # a function of arrays; compiled
    def squared_error(w, b):
        return jnp.mean((x @ w + b - y) ** 2)

    optimizer.minimize(lambda: squared_error(w, b) + 0.01 * np.sum(w * w), [w, b])

On a CUDA device JAX reads the memory of the variables.  On the CPU it gets a copy at every call, because it takes the
arrays it is given to be immutable, while an optimizer overwrites its variables.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import jax
import jax.numpy as jnp
import numpy as np

from gpu_adam.arrays import namespace
from gpu_adam.autodiff.cotangent import check_kind, check_shape
from gpu_adam.autodiff.lines import caller
from gpu_adam.autodiff.node import Node
from gpu_adam.autodiff.rules import conj, plain, settled, traced
from gpu_adam.autodiff.tape import HandOver, Tape
from gpu_adam.autodiff_seam import current_tracer
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.variables import Variable


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
        values = [arg.array if i in wanted else settled(arg, f"argument {i}", function) for i, arg in enumerate(args)]
        # JAX reads an array on a device where it lies, and in the backward pass again.
        kept = [i for i, v in enumerate(values) if i not in wanted and hasattr(v, "__cuda_array_interface__")]
        given = [_to_jax(value.copy() if wanted and i in kept else value) for i, value in enumerate(values)]
        if not wanted and any(isinstance(value, jax.core.Tracer) for value in given):  # views: JAX is at work already
            return compiled(*given)

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
        if not sources:
            return result
        tape = sources[0][1].tape
        tape.nodes.append(Node(result, tape, (sources, (), {}, function, *caller(2))))
        return tape.nodes[-1]

    return call


class _Pullback:
    """JAX's pullback gives the gradients of all arguments at once: they are computed for the first that asks."""

    def __init__(self, pullback: Callable[..., Any]) -> None:
        self.pullback = pullback
        self.cotangent: Any = None
        self.found: tuple[Any, ...] = ()

    def __call__(self, position: int, g: Any, y: Any) -> Any:
        if self.cotangent is not g:
            # JAX's gradients of complex arrays, and the cotangents that it wants, are the conjugates of ours.
            self.cotangent, self.found = g, self.pullback(jnp.conj(_to_jax(g)))
        return conj(_from_jax(self.found[position], y))


class _Call:
    """A loss that JAX is calling: `jax.vjp` differentiates with respect to views of all variables that it can take.

    Attributes:
        views: what stands for the variables, by their ids.
        asked: the ids of those that the loss has asked for.
        pull: from the gradients of the JAX arrays that the loss returned to those of the views.
    """

    def __init__(self) -> None:
        self.views: dict[int, Any] = {}
        self.asked: set[int] = set()
        self.pull: Callable[..., Any] = lambda cotangent: ({},)


# Losses that have asked for a view: their code, as many are a new lambda at every step; callable objects themselves.
_ASKING: WeakSet[Any] = WeakSet()


def _identity(loss: Callable[..., Any]) -> Any:
    while isinstance(loss, functools.partial):
        loss = loss.func
    return getattr(loss, "__code__", loss)


def asks(loss: Callable[..., Any]) -> bool:
    """Whether a loss has asked for a view before."""
    with contextlib.suppress(TypeError):  # an object without hash
        return _identity(loss) in _ASKING
    return False


def call(loss: Callable[..., Any], tape: Tape) -> Any:
    """What the loss returns, called by JAX."""
    with contextlib.suppress(TypeError):  # an object without hash, or without weak references
        _ASKING.add(_identity(loss))
    current = tape.views["jax"] = _Call()
    returned: Any = None

    def of_views(views: dict[int, Any]) -> list[Any]:
        nonlocal returned
        current.views = views
        returned = loss()
        return [one for one in _listed(returned) if isinstance(one, jax.Array)]

    try:
        outputs, current.pull = jax.vjp(of_views, _views(tape))
    except jax.errors.UnexpectedTracerError as error:
        raise ArgumentValueError(
            "loss",
            "must not ask for a view inside a function compiled by jax.jit, which keeps it for later calls",
            "an array of an earlier call",
            "pass the views to the function, or use gpu_adam.autodiff.jax.differentiable",
        ) from error
    values = iter(outputs)
    given = [next(values) if isinstance(one, jax.Array) else one for one in _listed(returned)]
    return given if isinstance(returned, (list, tuple)) else given[0]


def _views(tape: Tape) -> dict[int, Any]:
    """The variables as JAX's arrays, without those that it cannot take: an error only if they are asked for."""
    found = {}
    for key, variable in tape.variables.items():
        with contextlib.suppress(ArgumentValueError, TypeError, RuntimeError):
            found[key] = _to_jax(variable._value)
    return found


def view(variable: Variable) -> Any:
    """A JAX array with the contents of a variable; `jax.numpy.asarray` and JAX's operators ask for it themselves.

    Inside a loss that is being differentiated, the array that JAX differentiates with respect to.
    """
    tape = current_tracer.get()
    if not isinstance(tape, Tape) or not (tape.all or id(variable) in tape.leaves):
        return _to_jax(variable._value)
    if tape.all:
        raise ArgumentValueError(
            "var_list",
            "must hold the variables of a loss that JAX differentiates, which has to know them before",
            "a callable",
            "pass the variables themselves",
        )
    if "jax" not in tape.views:
        raise HandOver(call)
    current = tape.views["jax"]
    if id(variable) not in current.views:
        _check_width(variable._storage)
        raise ArgumentValueError(
            f'variable "{variable.name}"',
            "must have a dtype and lie on a device that JAX can take",
            f"dtype {variable.dtype} on {variable.device.name}",
            "compute with it by NumPy's or CuPy's functions",
        )
    current.asked.add(id(variable))
    return current.views[id(variable)]


def pull_back(tape: Tape, losses: list[Any], seeds: list[Any]) -> list[Any]:
    """Add the gradients of JAX losses to the leaves of the tape; the losses' values."""
    for loss, seed in zip(losses, seeds, strict=True):
        check_kind(loss.dtype.kind, f"a JAX array of dtype {loss.dtype}", seed)
    current = tape.views.get("jax")
    if current is not None and current.asked:
        (found,) = current.pull([jnp.conj(_cotangent(loss, seed)) for loss, seed in zip(losses, seeds, strict=True)])
        for key in current.asked:
            leaf = tape.leaves[key]
            contribution = conj(_from_jax(found[key], leaf.array))
            leaf.gradient = contribution if leaf.gradient is None else leaf.gradient + contribution
    return [jnp.copy(loss) for loss in losses]  # one may be a view, whose memory the next step changes


def _listed(returned: Any) -> Sequence[Any]:
    return returned if isinstance(returned, (list, tuple)) else [returned]


def _cotangent(loss: Any, seed: Any) -> Any:
    if seed is None:
        return jnp.ones_like(loss)
    seed = jnp.asarray(plain(seed))
    check_shape(tuple(seed.shape), tuple(loss.shape))
    seed = seed if loss.dtype.kind == "c" else seed.real
    return jnp.broadcast_to(seed.astype(loss.dtype), loss.shape)


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
