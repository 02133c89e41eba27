"""The dtype table: one row for each dtype that the kernels know. A row more is a dtype more."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gpu_adam.errors import ArgumentValueError


@dataclass(frozen=True)
class Dtype:
    """A row of the dtype table.

    Attributes:
        stored: C type of an element of a variable in memory.
        wide: C type of the same element in a slot; another one where the variable's is of 16 bits.
        stored_real: C type of an element of ``v`` in a slot, and of the scalars of a step in memory.
        value: C type in which an element is computed with.
        real: C type in which ``v`` and the scalars of a step are computed with.
        wide_dtype: NumPy's name of ``wide``.
        real_dtype: NumPy's name of ``stored_real``, in which the scalars of a step are computed on the host.
        ftz: whether the processor's own mode (FTZ, "flush to zero") flushes denormals, rather than the kernels' code.
    """

    stored: str
    wide: str
    stored_real: str
    value: str
    real: str
    wide_dtype: str
    real_dtype: str
    ftz: bool

    @property
    def defines(self) -> tuple[str, ...]:
        """The row as preprocessor definitions."""
        return (
            f"GPU_ADAM_STORED={self.stored}",
            f"GPU_ADAM_WIDE={self.wide}",
            f"GPU_ADAM_STORED_REAL={self.stored_real}",
            f"GPU_ADAM_VALUE={self.value}",
            f"GPU_ADAM_REAL={self.real}",
            f"GPU_ADAM_FTZ={int(self.ftz)}",
        )


_FLOAT = ("float", "float", "float", "float", "float32", "float32")
DTYPES = {
    "float32": Dtype("float", *_FLOAT, ftz=True),
    "float64": Dtype("double", "double", "double", "Double", "Double", "float64", "float64", ftz=False),
    "complex64": Dtype(
        "ComplexFloat", "ComplexFloat", "float", "ComplexFloat", "float", "complex64", "float32", ftz=True
    ),
    "complex128": Dtype(
        *("StoredComplexDouble", "StoredComplexDouble", "double", "ComplexDouble", "Double", "complex128", "float64"),
        ftz=False,
    ),
    "float16": Dtype("Float16", *_FLOAT, ftz=True),
    "bfloat16": Dtype("BFloat16", *_FLOAT, ftz=True),
}

MIXING = tuple(name for name, row in DTYPES.items() if row.value == "float")
"""The dtypes of gradients that a variable of one of these may have: all are computed with in float32."""

HALVES = tuple(name for name, row in DTYPES.items() if row.stored != row.wide)
"""The dtypes of 16 bits, which are rounded when they are stored."""


@functools.cache
def dtype_named(name: str) -> np.dtype:
    """NumPy's dtype of that name, or the one that the package ml_dtypes adds, imported when it is first asked for.

    Raises:
        TypeError: there is none.
    """
    if name == "bfloat16":
        importlib.import_module("ml_dtypes")
    return np.dtype(name)


def dtype_row(dtype: np.dtype, argument: str) -> Dtype:
    """The row of `dtype`, or an ArgumentValueError that names `argument` and lists the dtypes there are."""
    row = DTYPES.get(dtype.name)
    if row is None:
        known = ", ".join(DTYPES)
        raise ArgumentValueError(argument, f"must have one of the dtypes {known}", dtype.name, "cast it to one of them")
    return row


COMPLEX_MODES = ("abs2", "real_imag")
"""How a complex variable is updated: by |g|^2, or real and imaginary part as if they were two real elements."""


class Layout(NamedTuple):
    """How a variable's elements, and its gradient's, appear to the kernels.

    Attributes:
        dtype: name of a row of the dtype table.
        parts: kernel elements per element of the variable: 2 for complex ones in the mode "real_imag", else 1.
        gradient: name of the gradient's row.
    """

    dtype: str
    parts: int
    gradient: str
