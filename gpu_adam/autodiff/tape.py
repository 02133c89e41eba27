"""The tape: what was computed during one call of a loss, and the way back through it."""

from collections.abc import Callable, Iterable
from typing import Any

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
        self.all = variables is None
        for variable in variables or ():
            self._watch(variable)
        # What stands for the variables in other frameworks, kept here by their adapters.
        self.views: dict[str, Any] = {}

    def operand(self, variable: Any) -> Any:
        """The recorded value of a variable; its plain value if it is not watched or cannot have a gradient."""
        leaf = self.leaves.get(id(variable))
        if leaf is None and self.all:
            leaf = self._watch(variable)
        return variable.value if leaf is None else leaf

    def _watch(self, variable: Any) -> Node | None:
        value = variable.value
        if value.dtype.kind in "biu":
            return None
        leaf = self.leaves[id(variable)] = Node(value, self, None)
        return leaf

    def refuse_overwrite(self, variable: Any) -> None:
        """Raise: the backward pass needs the values that the loss was computed with."""
        raise ArgumentValueError(
            f'variable "{variable.name}"',
            "must not be overwritten while a loss is being differentiated",
            "an assignment inside the loss",
            "move it out of the loss",
        )

    def backward(self) -> None:
        """From the gradients of the results to those of the leaves; every node is freed as soon as it is done."""
        nodes = self.nodes
        while nodes:
            node = nodes.pop()
            gradient = node.gradient
            if gradient is not None:
                if type(gradient) is SparseCotangent:
                    gradient = gradient.dense()
                sources, values, kwargs = node.origin
                for vjp, source in sources:
                    contribution = vjp(gradient, node.value, *values, **kwargs)
                    value = source.value
                    if contribution.dtype is not value.dtype or contribution.shape != value.shape:
                        contribution = fit(contribution, value)
                    source.gradient = contribution if source.gradient is None else source.gradient + contribution
            node.origin = node.gradient = node.tape = None

    def close(self) -> None:
        """Take everything off the tape."""
        for node in (*self.nodes, *self.leaves.values()):
            node.origin = node.gradient = node.tape = None
        self.nodes.clear()
        self.leaves.clear()
        self.views.clear()
