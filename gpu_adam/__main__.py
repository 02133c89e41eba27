"""`gpu-adam` and `python -m gpu_adam`: errors become a sentence and an exit status."""

import sys
from collections.abc import Sequence

from gpu_adam.errors import GpuAdamError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 after an error, 2 after wrong usage, 130 after Ctrl-C.

    Args:
        arguments: without the program's name; None for the process's own.
    """
    # Not at the top: they take a fifth of a second, in which Ctrl-C is to be a sentence, too.
    try:
        from gpu_adam import cli  # noqa: PLC0415

        try:
            cli.app(arguments, prog_name="gpu-adam")
        except GpuAdamError as error:
            cli.say(str(error), "red")
            sys.exit(1)
        except OSError as error:
            cli.say(f"{error.filename or 'A file'}: {error.strerror}.", "red")
            sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("gpu-adam was interrupted.\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
