"""States of optax.adam and optax.adamw, and of what is chained with them.

`ScaleByAdamState` has count, mu and nu: t, m and v of `Adam(epsilon_form="paper")`, where eps_root is 0; for complex
variables with ``complex_mode="abs2"``, nu in the variable's complex dtype. A state does not say which transformation it
is of: those of adamax and nadam look the same, and mean something else. optax.amsgrad has no counterpart, as its nu_max
is the maximum of bias-corrected v, or is divided by without a correction.

References:
    https://github.com/google-deepmind/optax/blob/v0.2.8/optax/_src/transform.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpu_adam.adam import Adam
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.interop.exchange import NOT_KEPT, PAPER, Convention, Exchange, Given, imported

_CONVENTION = Convention(
    *("optax.adam", "abs2"),
    {
        **NOT_KEPT,
        "epsilon_form": PAPER,
        "maximize": (False, "only minimizes"),
        "amsgrad": (False, "keeps no maximum, and optax.amsgrad keeps that of bias-corrected v"),
    },
)
_LAST_COUNT = 2**31 - 1


def export_state(adam: Adam, variables: Mapping[str, Any] | Sequence[Any]) -> Any:
    """The state as Optax's own `ScaleByAdamState`, of arrays of JAX.

    In the state of a whole optimizer, schedules' counts included::

        state = optax.tree.set(optimizer.init(params), **export_state(adam, variables)._asdict())

    Args:
        adam: with ``epsilon_form="paper"`` and without amsgrad; it is not changed. Waits for the device.
        variables: all its variables, in a tree of JAX like that of the parameters (dicts, nested as wanted); or a list,
            which stands for a dict by their names.

    Raises:
        DeviceError: Optax is not installed.
        ArgumentTypeError, ArgumentValueError, SlotNotFoundError: as `exchange.Exchange`; a list of variables two of
            which have the same name; float64 or complex128 without JAX's option jax_enable_x64; from 2^31 steps on,
            beyond which Optax does not count.
    """
    jax, optax = imported("jax", "optax"), imported("optax", "optax")
    leaves, tree = jax.tree.flatten(_tree(adam, variables))
    exchange = Exchange(adam, leaves, _CONVENTION)
    iterations, arrays = exchange.export()
    if iterations > _LAST_COUNT:
        rule = "must be below 2^31 for Optax, which counts in int32"
        raise ArgumentValueError("iterations", rule, iterations, "let the optimizer begin a new count")
    m = [_of_jax(jax, array) for array in arrays["m"]]
    v = [_of_jax(jax, array.astype(of_m.dtype)) for array, of_m in zip(arrays["v"], m, strict=True)]
    count = jax.numpy.asarray(iterations, jax.numpy.int32)
    return optax.ScaleByAdamState(count, jax.tree.unflatten(tree, m), jax.tree.unflatten(tree, v))


def import_state(adam: Adam, state: Any, variables: Mapping[str, Any] | Sequence[Any]) -> None:
    """Go on from a state of Optax; hyperparameters stay as they are.

    Args:
        adam: with ``epsilon_form="paper"`` and without amsgrad; `build` has made its slots.
        state: a `ScaleByAdamState`, or the state of an optimizer, in which there is one.
        variables: as for `export_state`.

    Raises:
        DeviceError: JAX is not installed.
        ArgumentTypeError, ArgumentValueError, SlotNotFoundError: as `exchange.Exchange`; no such state, or several;
            another tree; other shapes or wider dtypes; nu that is not real. Nothing has changed then.
    """
    jax = imported("jax", "optax")
    leaves, tree = jax.tree.flatten(_tree(adam, variables))
    exchange = Exchange(adam, leaves, _CONVENTION)
    found = list(_states(state))
    if len(found) != 1:
        rule = "must hold one ScaleByAdamState"
        raise ArgumentTypeError("state", rule, f"{len(found)} in a {type(state).__name__}", "pass that of optax.adam")
    count, mu, nu = found[0]
    arrays = {}
    for slot, name, moments in (("m", "mu", mu), ("v", "nu", nu)):
        if jax.tree.structure(moments) != tree:
            rule, got = "must be a tree like that of the variables", jax.tree.structure(moments)
            raise ArgumentValueError(f"state.{name}", rule, got, f"pass variables in such a tree, not {tree}")
        arrays[slot] = [
            Given(f"state.{name}{jax.tree_util.keystr(path)}", np.asarray(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(moments)
        ]
    arrays["v"] = [_real(each) for each in arrays["v"]]
    exchange.restore(Given("state.count", np.asarray(count)), arrays)


def _tree(adam: Adam, variables: Any) -> Any:
    """The tree of variables: a list as a dict by name."""
    if isinstance(variables, Mapping):
        return variables
    exchange = Exchange(adam, variables, _CONVENTION)
    names = [slot.name.removeprefix(f"{adam.name}/").removesuffix("/m") for slot in exchange.slots["m"]]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ArgumentValueError("variables", "must have different names", f"{twice!r} twice", "pass a dict of them")
    return dict(zip(names, exchange.variables, strict=True))


def _states(state: Any) -> Any:
    """The states of Adam in that of an optimizer, which consists of tuples."""
    fields = getattr(state, "_fields", ())
    if "nu_max" in fields:
        rule = "must be a state of optax.adam, for optax.amsgrad's maximum is over bias-corrected v"
        remedy = "pass the state of optax.adam; there is no counterpart"
        raise ArgumentValueError("state", rule, type(state).__name__, remedy)
    if fields == ("count", "mu", "nu"):
        yield state
    elif isinstance(state, tuple):
        for part in state:
            yield from _states(part)


def _of_jax(jax: Any, array: np.ndarray) -> Any:
    """An array of JAX with the same bits."""
    made = jax.numpy.asarray(array)
    if made.dtype != array.dtype:
        rule, remedy = f"must hold {array.dtype} for this state", 'call jax.config.update("jax_enable_x64", True)'
        raise ArgumentValueError("JAX", rule, made.dtype, remedy)
    return made


def _real(given: Given) -> Given:
    """An array of nu as real numbers, which it consists of."""
    array = given.value
    if array.dtype.kind != "c":
        return given
    if array.imag.any():
        raise ArgumentValueError(given.argument, "must be real", "imaginary parts", "pass the state of optax.adam")
    return given._replace(value=array.real)
