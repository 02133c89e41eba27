"""The table of slots: the arrays that an optimizer keeps beside a variable and that the kernels read and write.

The order of the table is the order of the slots in an optimizer's weights and in the kernels' struct of pointers. The
C++ side has its own list, in ``cuda/slots.cuh``; tests compare the two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gpu_adam.kernels.dtypes import DTYPES, dtype_named
from gpu_adam.kernels.variants import UpdateRule


@dataclass(frozen=True)
class SlotSpec:
    """A row of the table.

    Attributes:
        name: of the slot, as in the paper and in C++.
        is_real: whether an element is real where the variable's is complex, as the moving averages of |g|^2 are.
        is_moment: whether it is a moving average of gradients, which `Adam(slot_dtype=)` gives a dtype of its own.
        exists: whether the update of a rule has the slot.
        begins_at_variable: whether a new slot holds the variable's values, else zeros.
    """

    name: str
    is_real: bool
    is_moment: bool
    exists: Callable[[UpdateRule], bool]
    begins_at_variable: bool = False

    def dtype(self, variable_dtype: np.dtype, complex_mode: str, slot_dtype: str | None) -> np.dtype:
        """The slot's dtype beside a variable of that dtype.

        Args:
            variable_dtype: of the variable. One that is not in DTYPES gives itself.
            complex_mode: one of COMPLEX_MODES. With "real_imag" every slot has the variable's dtype.
            slot_dtype: of the moving averages of gradients; None for the one in which they are computed.
        """
        row = DTYPES.get(variable_dtype.name)
        if row is None:
            return variable_dtype
        if slot_dtype is not None and self.is_moment:
            return dtype_named(slot_dtype)
        return np.dtype(row.real_dtype if self.is_real and complex_mode == "abs2" else row.wide_dtype)


SLOT_SPECS = (
    SlotSpec("m", is_real=False, is_moment=True, exists=lambda rule: not rule.accumulates),
    SlotSpec("v", is_real=True, is_moment=True, exists=lambda rule: not rule.accumulates),
    SlotSpec("vhat", is_real=True, is_moment=True, exists=lambda rule: rule.amsgrad),
    SlotSpec("average", is_real=False, is_moment=False, exists=lambda rule: rule.ema, begins_at_variable=True),
    SlotSpec("master", is_real=False, is_moment=False, exists=lambda rule: rule.master, begins_at_variable=True),
)


@functools.lru_cache
def slots_of(rule: UpdateRule, dtype_name: str) -> tuple[SlotSpec, ...]:
    """The slots that the update of a rule reads and writes for a variable of that dtype, in order."""
    own = rule.of(dtype_name)
    return tuple([spec for spec in SLOT_SPECS if spec.exists(own)])


def slot_spec(name: str) -> SlotSpec | None:
    """The row of a slot; None for a slot that the kernels do not know, which a user may have added."""
    return next((spec for spec in SLOT_SPECS if spec.name == name), None)
