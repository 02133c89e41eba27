"""The line of a loss that recorded an operation, for errors that come up long after the line was run."""

import sys
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import numpy as np

from gpu_adam.autodiff.operations import function_name

_PACKAGE = Path(__file__).parents[1]
# Between a line of a loss and the record of it: this package, and NumPy's and CuPy's functions of Python.
_BETWEEN = (
    *(str(_PACKAGE / name) for name in ("autodiff", "autodiff_seam.py", "np.py", "variables.py")),
    *(str(Path(np.__file__).parent), str(Path(np.__file__).parents[1] / "cupy")),
)


class _Between(dict[str, bool]):
    """Whether a file lies between, by its name."""

    def __missing__(self, name: str) -> bool:
        found = self[name] = name.startswith(_BETWEEN)
        return found


_is_between = _Between()


class Line(NamedTuple):
    """An operation, and the instruction of the loss that called it."""

    operation: Any
    code: CodeType
    instruction: int

    @classmethod
    def of_caller(cls, operation: Any) -> "Line":
        """The line of the loss that is running."""
        return cls(operation, *caller())

    def __str__(self) -> str:
        lines = [line for start, end, line in self.code.co_lines() if start <= self.instruction < end]
        number = lines[0] if lines and lines[0] else self.code.co_firstlineno
        return f'by {function_name(self.operation)} in "{self.code.co_filename}", line {number}, in {self.code.co_name}'


def caller(depth: int = 3) -> tuple[CodeType, int]:
    """The code that called an operation, and where in it: cheaper than the number of the line.

    Args:
        depth: so many calls from here may be the loss's own: what lies nearer is not looked at, which saves time.
    """
    frame: Any = sys._getframe(depth)
    code = frame.f_code
    while _is_between[code.co_filename] and frame.f_back is not None:
        frame = frame.f_back
        code = frame.f_code
    return code, frame.f_lasti


def add_line(error: Exception, line: Line) -> None:
    """Add to the message of an error of the backward pass what it is the derivative of."""
    note = f"This is the derivative of what was recorded {line}."
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:  # Python 3.10
        error.args = (*error.args, note)
