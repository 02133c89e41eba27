"""The slots of a variable that takes another one's place: the same values, or rows of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_adam.conversion import as_numbers, on_host
from gpu_adam.devices import Array
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, SparseIndexError
from gpu_adam.state.adam_state import AdamState
from gpu_adam.variables import Variable


def successors(state: AdamState, old: Variable, new: Variable, index: Any) -> dict[str, Array]:
    """What the slots of `new` hold, by slot name.

    Args:
        state: has the slots of `old`.
        old: the variable that goes.
        new: the variable that comes.
        index: whole numbers [n], the rows of `old` that `new` continues; None for all of them.

    Raises:
        ArgumentTypeError, ArgumentValueError: another dtype, device or shape; an index that is no list of rows.
        SparseIndexError: a row out of range.
    """
    rows = None if index is None else _rows(index, old)
    expected = old.shape if rows is None else (len(rows), *old.shape[1:])
    for what, is_right, wanted, got in (
        ("lie on", new.device.name == old.device.name, old.device.name, new.device.name),
        ("have dtype", new.dtype == old.dtype, old.dtype, new.dtype),
        ("have shape", new.shape == expected, expected, new.shape),
    ):
        if not is_right:
            raise ArgumentValueError(f"new variable {new.name!r}", f"must {what} {wanted}", got, "pass one that fits")
    slots = {name: state.slot(old, name) for name in state.names if state.has_slot(old, name)}
    with old.device.activate():
        places = None if rows is None else old.device.array(rows)
        return {
            name: slot.value if places is None or slot.shape != old.shape else slot.value[places]
            for name, slot in slots.items()
        }


def _rows(index: Any, old: Variable) -> np.ndarray:
    if old.ndim == 0:
        raise ArgumentValueError("index", "must be None for a variable without rows", "an index", "leave it out")
    remedy = "pass numpy.flatnonzero(mask), say"
    rows = on_host(as_numbers(index.value if isinstance(index, Variable) else index, "index", remedy))
    rows = rows.astype(np.int64) if rows.size == 0 else rows
    if rows.dtype.kind not in "iu" or rows.ndim != 1:
        got = f"shape {rows.shape}, dtype {rows.dtype}"
        raise ArgumentTypeError("index", "must be a list of row numbers", got, remedy)
    outside = np.flatnonzero((rows < 0) | (rows >= old.shape[0]))
    if outside.size:
        position = int(outside[0])
        rule = f"must lie in [0, {old.shape[0]})"
        raise SparseIndexError(f"index[{position}]", rule, int(rows[position]), "pass rows of the old variable")
    return rows
