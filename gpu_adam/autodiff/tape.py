"""The tape: what was computed during one call of a loss, and the way back through it."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from gpu_adam.autodiff.constants import Constants, shown
from gpu_adam.autodiff.lines import Line, add_line, caller
from gpu_adam.autodiff.node import Node
from gpu_adam.autodiff.rules import fit
from gpu_adam.autodiff.sparse_cotangent import SparseCotangent
from gpu_adam.errors import ArgumentValueError


class HandOver(BaseException):  # not an Exception, which the loss might catch
    """Unwinds a loss that has turned out to be one for another framework to call.

    Args:
        call: what to do in place of calling the loss.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


class Tape:
    """The recording of one loss.

    Nodes are kept in the order of their creation, so that each comes after its arguments and the list read backwards
    is a valid order for the backward pass.  Whatever happens, `close` must be called: it takes the nodes off the tape,
    which frees them and makes constants of those that the loss has kept.

    Args:
        variables: the only ones to record; None for all.
    """

    def __init__(self, variables: Iterable[Any] | None = None) -> None:
        self.nodes: list[Node] = []
        self.leaves: dict[int, Node] = {}
        self.variables: dict[int, Any] = {}  # of the leaves, whose arrays may be behind
        self.constants = Constants()
        self.all = variables is None
        for variable in variables or ():
            self._watch(variable)
        # What stands for the variables in other frameworks, kept here by their adapters.
        self.views: dict[str, Any] = {}

    def operand(self, variable: Any, array: Any) -> Any:
        """The recorded value of a variable; its plain value if it is not watched or cannot have a gradient.

        A leaf has the variable's memory, and is handed out here alone: what a rule reads of it later was up to date
        when the operation was recorded.
        """
        leaf = self.leaves.get(id(variable))
        if leaf is None and self.all:
            leaf = self._watch(variable)
        return self.constants.of_variable(array) if leaf is None else leaf

    def watches(self, variable: Any) -> bool:
        """Whether the variable's gradient is wanted."""
        return self.all or id(variable) in self.leaves

    def shown(self, array: Any) -> Any:
        """The array of a variable, to be looked at."""
        return shown(array)

    def _watch(self, variable: Any) -> Node | None:
        array = variable._storage
        if array.dtype.kind in "biu":
            return None
        self.variables[id(variable)] = variable
        return self.leaves.setdefault(id(variable), Node(array, self, None))  # another thread may have been faster

    def refuse_overwrite(self, variable: Any) -> None:
        """Raise: the backward pass needs the values that the loss was computed with."""
        raise ArgumentValueError(
            f'variable "{variable.name}"',
            "must not be overwritten while a loss is being differentiated",
            "an assignment inside the loss",
            "move it out of the loss",
        )

    def overwrite(self, node: Node, result: Any) -> None:
        """Let a node stand for a result, recorded last, from now on: an in-place operation.

        What was computed with the node before gets a new node in its place, which stands for what the node stood for.

        Raises:
            TypeError: an array would change that other recorded values show as well.
        """
        if node.origin is None or any(np.may_share_memory(node.array, value) for value in _arrays(node.origin[1])):
            raise _not_alone("a variable, or a view of another array")
        nodes = self.nodes
        first = len(nodes) - 1
        while nodes[first] is not node:
            first -= 1
        later = nodes[first + 1 :]
        if any(np.may_share_memory(node.array, other.array) for other in later):
            raise _not_alone("an array of which views were taken")
        former = Node(node.array, self, node.origin)
        for other in later:
            sources = other.origin[0]
            sources[:] = [(vjp, former if source is node else source) for vjp, source in sources]
        nodes[first] = former
        if type(result) is Node and nodes[-1] is result:
            nodes.pop()
            node.array, node.origin = result.array, result.origin
        else:  # a constant, as of a floor division
            node.array, node.origin = result, ([], (), {}, np.copy, *caller())
        nodes.append(node)

    def backward(self) -> None:
        """From the gradients of the results to those of the leaves; every node is freed as soon as it is done.

        Raises:
            ArgumentValueError: a constant has changed since the loss used it.
            Exception: what a rule raises; its message names the line of the loss.
        """
        nodes = self.nodes
        try:
            while nodes:
                node = nodes.pop()
                gradient = node.gradient
                if gradient is not None:
                    if type(gradient) is SparseCotangent:
                        gradient = gradient.dense()
                    sources, values, kwargs, _, _, _ = node.origin
                    for vjp, source in sources:
                        contribution = vjp(gradient, node.array, *values, **kwargs)
                        array = source.array
                        if contribution.dtype is not array.dtype or contribution.shape != array.shape:
                            contribution = fit(contribution, array)
                        source.gradient = contribution if source.gradient is None else source.gradient + contribution
                node.origin = node.gradient = node.tape = None
        except Exception as error:
            add_line(error, Line(*node.origin[3:]))
            raise
        self.constants.check()

    def close(self) -> None:
        """Take everything off the tape."""
        for node in (*self.nodes, *self.leaves.values()):
            node.origin = node.gradient = node.tape = None
        self.all = False
        self.nodes.clear()
        self.leaves.clear()
        self.variables.clear()
        self.views.clear()
        self.constants.clear()


def _arrays(values: Any) -> list[Any]:
    return [value for value in values if hasattr(value, "__array_function__")]


def _not_alone(got: str) -> TypeError:
    return TypeError(
        f"an in-place operator must change an array that nothing else shows (got {got}); "
        "write a = a + b instead of a += b."
    )
