"""gpu_adam: tf.keras.optimizers.Adam of TensorFlow 2.0 as CUDA kernels, on NVIDIA GPUs and on the CPU."""

import importlib
from typing import TYPE_CHECKING, Any

from gpu_adam import schedules
from gpu_adam.adam import Adam
from gpu_adam.devices import get_device, set_device
from gpu_adam.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CheckpointError,
    CheckpointWarning,
    ConcurrentStepError,
    DeviceError,
    DistributedError,
    GpuAdamError,
    KernelCompileError,
    ServiceError,
    SlotNotFoundError,
    SparseIndexError,
)
from gpu_adam.loss_scale import LossScale
from gpu_adam.schedules import (
    CosineDecay,
    CosineDecayRestarts,
    ExponentialDecay,
    InverseTimeDecay,
    LearningRateSchedule,
    LinearCosineDecay,
    PiecewiseConstantDecay,
    PolynomialDecay,
)
from gpu_adam.state.manager import CheckpointManager
from gpu_adam.step.guard import Telemetry
from gpu_adam.variables import IndexedSlices, Variable

if TYPE_CHECKING:
    from gpu_adam.autodiff import register_vjp, value_and_grad

__version__ = "0.1.0"

__all__ = [
    "Adam",
    "ArgumentTypeError",
    "ArgumentValueError",
    "CheckpointError",
    "CheckpointManager",
    "CheckpointWarning",
    "ConcurrentStepError",
    "CosineDecay",
    "CosineDecayRestarts",
    "DeviceError",
    "DistributedError",
    "ExponentialDecay",
    "GpuAdamError",
    "IndexedSlices",
    "InverseTimeDecay",
    "KernelCompileError",
    "LearningRateSchedule",
    "LinearCosineDecay",
    "LossScale",
    "PiecewiseConstantDecay",
    "PolynomialDecay",
    "ServiceError",
    "SlotNotFoundError",
    "SparseIndexError",
    "Telemetry",
    "Variable",
    "get_device",
    "register_vjp",
    "schedules",
    "set_device",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    # The derivatives take as long to import as all the rest; a process that brings its own gradients does without.
    # "np" is not in __all__: a star import must not put it in NumPy's place.
    if name in ("autodiff", "communicators", "distributed", "interop", "np", "service", "torch"):
        return importlib.import_module(f"gpu_adam.{name}")
    if name in ("register_vjp", "value_and_grad"):
        return getattr(importlib.import_module("gpu_adam.autodiff"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
