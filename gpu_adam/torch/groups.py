"""The parameters of a group: how often each was updated, and which are updated alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from gpu_adam.devices.native_tensors import are_same
from gpu_adam.hyperparameters import Cohort
from gpu_adam.torch.numbers import Numbers

_FEW = 8  # parameters of a cohort, on the average


class Group:
    """A parameter group of an optimizer, as a step sees it.

    torch counts the steps of each parameter: one without a gradient is not updated, and not counted. Parameters that
    have been updated equally often, and in the same steps, are a cohort. Cohorts are divided where a step updates some
    of their parameters and others not, or somebody has written a count; they are never united. Where they have become
    small each parameter is one.

    Args:
        group: the optimizer's, with a list of parameters.

    Attributes:
        group: as above.
        params: its parameters.
        steps: how often each was updated, as `optimizer.state` shows it: elements of one float32 tensor in host memory.
    """

    def __init__(self, group: dict[str, Any]) -> None:
        self.group, self.params = group, list(group["params"])
        count = len(self.params)
        steps = torch.zeros(count, dtype=torch.float32, device="cpu")
        self.steps, self._counts = list(steps.unbind()), steps.numpy()
        self._present = self._all = np.ones(count, bool)
        self._numbers: Numbers | None = None
        self._divide(np.zeros((1, count)))

    def is_of(self, group: Mapping[str, Any]) -> bool:
        """Whether this is the group, with the parameters that it had."""
        return group is self.group and are_same(torch, group["params"], self.params)

    @property
    def numbers(self) -> Numbers:
        """What the group's parameters are updated by now."""
        if self._numbers is None or not self._numbers.are_of(self.group):
            self._numbers = Numbers(self.group)
        return self._numbers

    def begin_anew(self, counts: Mapping[int, float]) -> None:
        """Take it that nobody knows the cohorts.

        Args:
            counts: the steps done by parameters, by the id of each that has done any.
        """
        self._counts[:] = [counts.get(id(param), 0.0) for param in self.params]
        self._is_told[:] = False

    def prepare(self, count: int) -> list[tuple[Any, Cohort]]:
        """Give the cohorts their values for a step.

        Args:
            count: how many of the parameters have a gradient, at least one.

        Returns:
            Parameters with a gradient that come to be in another cohort than before, or in their first one, with it.
        """
        counts, firsts, cohort_of = self._counts, self._firsts, self._cohort_of
        is_whole = count == len(self.params)
        present = self._all if is_whole else np.array([param.grad is not None for param in self.params])
        is_one = is_whole and len(firsts) == 1
        alike = counts == counts[firsts][cohort_of] if not is_one else counts == counts[0]
        if not is_whole:
            alike &= present == present[firsts][cohort_of]
        if np.count_nonzero(alike) < len(alike):
            self._divide(np.stack([cohort_of, counts, present]))
        numbers = self.numbers
        for first, cohort in zip(self._firsts.tolist(), self._cohorts, strict=True):
            if present[first]:
                cohort.hyper, cohort.flavour = numbers.hyper, numbers.flavour
        self._present = present
        if np.count_nonzero(self._is_told) == len(self._is_told):
            return []
        new = np.flatnonzero(present & ~self._is_told).tolist()
        return [(self.params[n], self._cohorts[self._cohort_of[n]]) for n in new]

    def note_told(self) -> None:
        """Take it that the controller knows the cohorts of what `prepare` returned."""
        self._is_told |= self._present

    def _divide(self, keys: np.ndarray) -> None:
        """Make cohorts of the parameters with equal columns of `keys`."""
        _, self._firsts, inverse = np.unique(keys, axis=1, return_index=True, return_inverse=True)
        self._cohort_of = inverse.reshape(-1)
        if _FEW * len(self._firsts) > len(self.params) > _FEW:
            # The cohorts are going to be divided to the end, and every division makes launches anew.
            self._firsts = self._cohort_of = np.arange(len(self.params))
        members = [np.flatnonzero(self._cohort_of == number) for number in range(len(self._firsts))]
        self._cohorts = [Cohort(self._counts, each) for each in members]
        self._is_told = np.zeros(len(self.params), bool)
