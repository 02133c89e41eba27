"""The exceptions, each also the builtin that Keras users catch.

    GpuAdamError
    ├── ArgumentTypeError   (TypeError)     an object of the wrong kind
    ├── ArgumentValueError  (ValueError)    the right kind, but outside the rule: range, shape, dtype, device, overlap
    ├── CheckpointError     (ValueError)    a file that is not a checkpoint, or does not fit this optimizer
    ├── SparseIndexError    (IndexError)    a row index outside its variable
    ├── SlotNotFoundError   (KeyError)      no such slot
    ├── ConcurrentStepError (RuntimeError)  a call of an optimizer while another one is at work
    ├── DistributedError    (RuntimeError)  ranks that do not answer in time, or an engine between them that fails
    ├── ServiceError        (RuntimeError)  a service that does not answer, or refuses
    └── DeviceError         (RuntimeError)  a device, driver or compiler that is not there
        └── KernelCompileError              a kernel that does not compile

A message has four parts: which argument, the rule, the value, what to do. What goes on in spite of a mishap warns:

    CheckpointWarning (UserWarning)             a checkpoint that is skipped, or cannot be removed
"""


class GpuAdamError(Exception):
    """Base of everything that gpu_adam raises on purpose.

    Args:
        argument: which argument or object is meant, as the caller wrote it.
        rule: what must hold, starting with a verb ("must lie in [0, 1)").
        got: the offending value, shortened where it is long.
        remedy: the next move, as an imperative.
    """

    def __init__(self, argument: str, rule: str, got: object, remedy: str) -> None:
        super().__init__(argument, rule, got, remedy)
        self.argument, self.rule, self.got, self.remedy = argument, rule, got, remedy

    def __str__(self) -> str:
        return f"{self.argument} {self.rule} (got {self.got}); {self.remedy}."


class ArgumentTypeError(GpuAdamError, TypeError):
    """An argument is an object of the wrong kind."""


class ArgumentValueError(GpuAdamError, ValueError):
    """An argument has the right kind and a value outside its rule."""


class CheckpointError(GpuAdamError, ValueError):
    """A file is not a checkpoint of this optimizer."""


class SparseIndexError(GpuAdamError, IndexError):
    """A row index of a sparse gradient lies outside its variable."""


class SlotNotFoundError(GpuAdamError, KeyError):
    """A slot was asked for that does not exist."""


class ConcurrentStepError(GpuAdamError, RuntimeError):
    """An optimizer was called while another call of it was at work."""


class DistributedError(GpuAdamError, RuntimeError):
    """Other ranks do not answer in time, or the engine that moves arrays between ranks fails."""


class ServiceError(GpuAdamError, RuntimeError):
    """A service of optimizers does not answer, or refuses what it was asked for."""


class DeviceError(GpuAdamError, RuntimeError):
    """A device, its driver or its compiler is not there."""


class KernelCompileError(DeviceError):
    """A kernel does not compile; the message carries the compiler's log."""


class CheckpointWarning(UserWarning):
    """A checkpoint is skipped because it is damaged, or cannot be removed."""
