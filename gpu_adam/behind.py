"""What is asked for the contents of an array that is behind: some of its rows lack steps that were already done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from gpu_adam.devices import Array


class Behind(Protocol):
    """Brings the rows of a variable, or of a slot, up to date: bit for bit as if each step had moved all of them.

    A variable that has one asks it before anything looks at contents, or writes them. So it must hold that

    - to ask again changes nothing, and neither does a gradient that was computed in between;
    - the array stays where it is, and rows that are up to date keep their bits;
    - it may be asked while a loss is being differentiated, and whichever device is current;
    - work that it has enqueued is done before what its caller enqueues next on the current stream.
    """

    def owner(self) -> Any:
        """The state of the optimizer that defers the rows, while there is one."""

    def settle(self) -> None:
        """Bring every row up to date; nothing where they are."""

    def bring_up_to_date(self, rows: Array) -> None:
        """Bring these rows up to date.

        Args:
            rows: their numbers, a contiguous one-dimensional array of int32 or int64 on the variable's device. They may
                repeat; numbers outside [0, rows) are left out.
        """
