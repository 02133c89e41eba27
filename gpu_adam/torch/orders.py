"""Parameters that lie in memory in another order than that of their elements, as channels_last has it.

Adam treats all elements alike: their order does not matter as long as parameter, gradient and slots have the same one.
In place of such a parameter the core is given a view of it with its dimensions in the order of memory, which is
contiguous, and so are the slots beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch


class Reordered:
    """A parameter without gaps whose dimensions lie in memory in another order.

    Args:
        param: the parameter.
        order: its dimensions, in the order of memory.

    Attributes:
        view: what is updated in its place.
    """

    def __init__(self, param: torch.Tensor, order: Sequence[int]) -> None:
        self._param, self._order, self._form = param, order, (param.shape, param.stride())
        self.view = param.detach().permute(order)

    def is_current(self) -> bool:
        """Whether the view shows the parameter's memory still: `data` can be exchanged."""
        param, view = self._param, self.view
        return bool(param.data_ptr() == view.data_ptr() and (param.shape, param.stride()) == self._form)

    def read(self, gradient: torch.Tensor) -> torch.Tensor:
        """A gradient of the parameter as one of the view; written out where it is sparse."""
        gradient = gradient.detach()
        return (gradient.to_dense() if gradient.is_sparse else gradient).permute(self._order)


class Orders:
    """Which of an optimizer's parameters are reordered."""

    def __init__(self) -> None:
        self._reordered: dict[int, Reordered] = {}

    def follow(self, params: Iterable[torch.Tensor]) -> None:
        """Take over how parameters lie in memory."""
        found = {}
        for param in params:
            order = _order(param)
            if order is not None:
                known = self._reordered.get(id(param))
                found[id(param)] = known if known is not None and known.is_current() else Reordered(param, order)
        self._reordered = found

    def are_current(self) -> bool:
        """Whether all reordered parameters lie where and as they did."""
        return all(each.is_current() for each in self._reordered.values())

    def lack(self, param: torch.Tensor) -> bool:
        """Whether a parameter has become a reordered one."""
        return id(param) not in self._reordered and _order(param) is not None

    def target(self, param: torch.Tensor) -> torch.Tensor:
        """What is updated in place of a parameter: it, or a view of it."""
        reordered = self._reordered.get(id(param))
        return param if reordered is None else reordered.view

    def pairs(self, pairs: list[Any]) -> list[Any]:
        """The pairs of gradients and targets, of pairs of gradients and parameters."""
        if not self._reordered:
            return pairs
        found = [(gradient, param, self._reordered.get(id(param))) for gradient, param in pairs]
        return [
            (gradient, param) if reordered is None else (reordered.read(gradient), reordered.view)
            for gradient, param, reordered in found
        ]


def shown(param: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """A tensor over a slot of what is updated in place of a parameter, with the parameter's shape and strides.

    These are those of torch.zeros_like(param, memory_format=torch.preserve_format), also where a dimension has size 1.
    """
    alike = slot.shape == param.shape and slot.stride() == param.stride()
    return slot if alike else slot.as_strided(param.shape, param.stride(), slot.storage_offset())


def _order(param: torch.Tensor) -> list[int] | None:
    """The dimensions in the order of memory.

    None where it is that of the elements, where there are gaps or overlaps, and before a lazy module's first call.
    """
    if torch.nn.parameter.is_lazy(param) or param.layout is not torch.strided or param.is_contiguous():
        return None
    order = sorted(range(param.dim()), key=param.stride, reverse=True)
    return order if param.permute(order).is_contiguous() else None
