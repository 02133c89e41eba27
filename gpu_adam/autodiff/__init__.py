"""Gradients of a loss written with NumPy's functions, for arrays of NumPy and of CuPy.

    value_and_grad(loss, variables)     the loss and its gradients
    register_vjp(function, vjp)         a derivative for a function of your own

A loss computes with `Variable`s as if they were arrays.  While it runs, a variable hands out a `Node` (node.py), which
looks like an array and enters every NumPy function called on it, with its derivative, on a `Tape` (tape.py).  The tape
is read backwards once and thrown away.  What each function's derivative is stands in a table, `OPERATIONS`
(operations.py; rules.py says how to add to it), filled by one module per kind: elementwise, reductions, shapes,
indexing, linalg, decompositions, norms, einsum, fft, masked (reductions), statistics, samples (of functions).

Values never leave their device: everything is done by NumPy functions, which hand CuPy arrays to CuPy.
"""

from typing import Any

from gpu_adam.autodiff import (  # noqa: F401  # fill the table
    decompositions,
    einsum,
    elementwise,
    fft,
    indexing,
    linalg,
    masked,
    norms,
    reductions,
    samples,
    shapes,
    statistics,
)
from gpu_adam.autodiff.gradients import flatten, gradients, value_and_grad
from gpu_adam.autodiff.rules import register_vjp
from gpu_adam.autodiff_seam import adapter

__all__ = ["flatten", "gradients", "register_vjp", "value_and_grad"]


def __getattr__(name: str) -> Any:
    if name in ("jax", "torch"):  # which take seconds to import
        return adapter(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
