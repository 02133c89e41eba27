"""Gradients of a loss: call it once, read the tape backwards."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set, ValuesView
from typing import Any

import numpy as np

from gpu_adam.autodiff import cotangent
from gpu_adam.autodiff.node import Node
from gpu_adam.autodiff.rules import plain
from gpu_adam.autodiff.sparse_cotangent import SparseCotangent
from gpu_adam.autodiff.tape import HandOver, Tape
from gpu_adam.autodiff_seam import adapter, current_tracer, traced_by
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, DeviceError
from gpu_adam.variables import Variable

Loss = Callable[[], Any]

# Frameworks that differentiate what they computed themselves, by the package of the result's type.
_FRAMEWORKS = {"torch": "torch", "jax": "jax", "jaxlib": "jax"}

# What the steps of an optimizer do without, and a loss may need.
_LIBRARY = re.compile(r"lib(cublas|cublasLt|cufft|cusolver|cusparse|nvJitLink)\b")


def value_and_grad(loss: Loss, variables: Any) -> tuple[Any, Any]:
    """The value of a loss and its gradients.

    Args:
        loss: a function without arguments that computes with variables; called once.  A loss computed by JAX is called
            twice the first time: the first call ends where the loss asks for a variable as JAX's array, and JAX itself
            makes the second call.  What the loss returns is summed: an array of any shape, or a list of such.
            A buffer that the loss computes with may be filled again, unless it has several megabytes: see constants.py.
            Terms that the loss has other threads compute are recorded too.  In-place operators mean what they do in
            NumPy, or raise.
        variables: what to differentiate with respect to: a `Variable`, or a list, tuple or dict of them, nested or not.

    Returns:
        What the loss returned, as plain arrays, and the gradients in the structure of `variables`.  A gradient has the
        shape, dtype and device of its variable.  It is an `IndexedSlices` for a variable of which only rows were
        taken (`numpy.take` on the first axis, or an integer array as index), and None for one that the loss does not
        depend on.  Where an index of the loss names an element several times, its gradients are summed in order of
        occurrence, on every device.  That of a complex variable is dL/d(re) + i dL/d(im), the direction of steepest
        ascent: 2z for |z|^2.

    Raises:
        ArgumentTypeError, ArgumentValueError: the loss is not callable or returns no real floating-point numbers; a
            large array has changed since the loss used it.
        NotImplementedError: the loss uses an operation whose derivative is not known.
        DeviceError: the loss uses a library of CuPy's, cuBLAS for example, that is not installed.

    Example:
        >>> import numpy as np
        >>> from gpu_adam import Variable
        >>> z = Variable(np.array([3 + 4j]))
        >>> value, gradient = value_and_grad(lambda: np.sum(np.abs(z) ** 2), z)
        >>> float(value), gradient
        (25.0, array([6.+8.j]))
    """
    variables = structure(variables)
    value, pairs = gradients(loss, variables)
    return value, _in_structure(variables, iter([gradient for gradient, _ in pairs]))


def gradients(loss: Loss, variables: Any, grad_loss: Any = None) -> tuple[Any, list[tuple[Any, Variable]]]:
    """The value of a loss, and (gradient, variable) pairs as `Adam.apply_gradients` takes them.

    Args:
        loss: as for `value_and_grad`.
        variables: as for `value_and_grad`, or a function returning such, called after the loss.
        grad_loss: the gradient of something further with respect to the loss, which multiplies it: a number, or an
            array of the shape of the loss; for a list of losses a list of such.  None is 1.
    """
    if not callable(loss):
        raise ArgumentTypeError(
            "loss",
            "must be a callable without arguments",
            f"a {type(loss).__name__}, which is not callable",
            "put the computation into a function, which is recorded while it runs",
        )
    if current_tracer.get() is not None:
        raise NotImplementedError(
            "Gradients of gradients are not supported: a loss must not differentiate another one; "
            "compute the inner gradient before the loss."
        )
    wanted = None if callable(variables) else flatten(variables)
    tape = Tape(wanted)
    try:
        returned = traced_by(tape, _called, loss, tape)
        if wanted is None:
            wanted = flatten(variables())
        many = isinstance(returned, (list, tuple))
        if many:
            values = _start(tape, returned, cotangent.per_loss(grad_loss, len(returned)))
        else:
            values = _start(tape, [returned], [grad_loss])
        tape.backward()
        found = _finished(tape.leaves)
        return values if many else values[0], [(found.get(id(variable)), variable) for variable in wanted]
    except ImportError as error:
        missing = _missing_library(error)
        if missing is None:
            raise
        raise missing from error
    finally:
        tape.close()


def _missing_library(error: ImportError) -> DeviceError | None:
    """The error for one of CuPy's libraries that is not installed; None where something else cannot be imported."""
    found = _LIBRARY.search(str(error))
    if found is None:
        return None
    return DeviceError(
        "the loss",
        "needs NVIDIA's libraries for matrix products, linear algebra and Fourier transforms on a CUDA device",
        f"no {found[0]}",
        'install them: pip install "gpu-adam[cuda13-math]" (or [cuda12-math] beside CuPy for CUDA 12)',
    )


def _called(loss: Loss, tape: Tape) -> Any:
    """What the loss returns.

    JAX differentiates only functions that JAX calls itself.  A loss that asks for its first view of a variable, a JAX
    array, shows that the loss is one for JAX: the call is given up there, and JAX calls the loss from its beginning.
    So a JAX loss is called twice the first time; from then on its code is known, and JAX calls the loss at once.
    """
    call = adapter("jax").call if "jax" in sys.modules and adapter("jax").asks(loss) else None
    if call is None:
        try:
            return loss()
        except HandOver as asked:
            call = asked.call
            tape.nodes.clear()
    return call(loss, tape)


def structure(variables: Any) -> Any:
    """A nesting of variables as lists and dicts in the order of their keys, which can be gone through again and again.

    Args:
        variables: a `Variable`, or any nesting of lists, tuples, dicts, iterators and views of dicts' values; or a
            function that returns such, which stays as it is.

    Raises:
        ArgumentTypeError: a set, which has no order; a dict whose keys have none; a variable without derivatives.
        ArgumentValueError: there is something else in it.
    """
    return variables if callable(variables) else _ordered(variables)


def _ordered(variables: Any) -> Any:
    if isinstance(variables, Variable):
        if variables.dtype.kind not in "fcV":  # "V": the dtypes of ml_dtypes
            argument, rule = f"variable {variables.name!r}", "must be of real or complex floating-point numbers"
            raise ArgumentTypeError(argument, rule, variables.dtype, "make it with dtype='float32', say")
        return variables
    if isinstance(variables, (list, tuple, Iterator, ValuesView)):
        return [_ordered(item) for item in variables]
    if isinstance(variables, Mapping):
        try:
            keys = sorted(variables)
        except TypeError as error:
            rule = "must have keys that can be sorted, where it is a dict"
            raise ArgumentTypeError("var_list", rule, list(variables), "use texts only, say, or pass a list") from error
        return {key: _ordered(variables[key]) for key in keys}
    if isinstance(variables, Set):
        got = f"a {type(variables).__name__}, which has no order"
        raise ArgumentTypeError("var_list", "must hold the variables in an order", got, "pass a list")
    raise ArgumentValueError(
        "var_list",
        "must hold Variables only",
        f"an object of type {type(variables)}",
        "wrap arrays in gpu_adam.Variable and compute the loss with the Variable",
    )


def flatten(variables: Any) -> list[Variable]:
    """The variables in a nesting, in the order of `structure`, whose errors it raises."""
    return list(_leaves(_ordered(variables)))


def _leaves(ordered: Any) -> Iterator[Variable]:
    if isinstance(ordered, Variable):
        yield ordered
    else:
        for item in ordered.values() if isinstance(ordered, dict) else ordered:
            yield from _leaves(item)


def _in_structure(ordered: Any, found: Iterator[Any]) -> Any:
    if isinstance(ordered, Variable):
        return next(found)
    if isinstance(ordered, list):
        return [_in_structure(item, found) for item in ordered]
    if isinstance(ordered, dict):
        return {key: _in_structure(item, found) for key, item in ordered.items()}
    return list(found)  # a function returned them


def _start(tape: Tape, losses: Sequence[Any], seeds: list[Any]) -> list[Any]:
    """Give each returned loss its cotangent; the plain values of all."""
    values = list(losses)
    foreign: dict[str, list[int]] = {}
    for i, loss in enumerate(values):
        if isinstance(loss, Variable):
            loss = tape.operand(loss, loss._value)  # noqa: PLW2901
        if type(loss) is Node and loss.tape is tape:
            # A variable, or a view of one, would change with the next step.
            is_view = loss.origin is None or getattr(loss.array, "base", None) is not None
            values[i] = loss.array.copy() if is_view else loss.array
            if loss.array.dtype.kind != "f":
                cotangent.check_loss(loss.array, seeds[i])
            gradient = cotangent.seed(loss.array, seeds[i])
            loss.gradient = gradient if loss.gradient is None else loss.gradient + gradient
            continue
        framework = _FRAMEWORKS.get(type(loss).__module__.partition(".")[0])
        if framework is not None:
            foreign.setdefault(framework, []).append(i)
        else:
            values[i] = plain(loss)
            cotangent.check_loss(values[i], seeds[i])
    for framework, positions in foreign.items():
        found = adapter(framework).pull_back(tape, [losses[i] for i in positions], [seeds[i] for i in positions])
        for i, value in zip(positions, found, strict=True):
            values[i] = value
    return values


def _finished(leaves: dict[int, Node]) -> dict[int, Any]:
    """The gradients as they are handed out, by variable: arrays of their own, or row slices."""
    found: dict[int, Any] = {}
    given: set[int] = set()
    for key, leaf in leaves.items():
        gradient = leaf.gradient
        if type(gradient) is SparseCotangent:
            found[key] = gradient.slices() if gradient.rows else gradient.dense()
        elif isinstance(gradient, np.generic):
            found[key] = np.asarray(gradient)
        elif gradient is not None:
            # A view may be one of another gradient; of `a + b` both have the same.
            shared = id(gradient) in given or isinstance(gradient.base, type(gradient))
            flags = gradient.flags
            usable = flags.c_contiguous and getattr(flags, "writeable", True)
            found[key] = gradient if usable and not shared else gradient.copy(order="C")
            given.add(id(gradient))
    return found
