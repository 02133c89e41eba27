"""gpu_adam: tf.keras.optimizers.Adam of TensorFlow 2.0 as CUDA kernels, on NVIDIA GPUs and on the CPU."""

from gpu_adam import schedules
from gpu_adam.adam import Adam
from gpu_adam.devices import get_device, set_device
from gpu_adam.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CheckpointError,
    DeviceError,
    GpuAdamError,
    KernelCompileError,
    SlotNotFoundError,
    SparseIndexError,
)
from gpu_adam.schedules import (
    CosineDecay,
    CosineDecayRestarts,
    ExponentialDecay,
    InverseTimeDecay,
    LearningRateSchedule,
    PiecewiseConstantDecay,
    PolynomialDecay,
)
from gpu_adam.variables import IndexedSlices, Variable

__version__ = "0.1.0"

__all__ = [
    "Adam",
    "ArgumentTypeError",
    "ArgumentValueError",
    "CheckpointError",
    "CosineDecay",
    "CosineDecayRestarts",
    "DeviceError",
    "ExponentialDecay",
    "GpuAdamError",
    "IndexedSlices",
    "InverseTimeDecay",
    "KernelCompileError",
    "LearningRateSchedule",
    "PiecewiseConstantDecay",
    "PolynomialDecay",
    "SlotNotFoundError",
    "SparseIndexError",
    "Variable",
    "get_device",
    "schedules",
    "set_device",
]
