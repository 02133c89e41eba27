"""The public surface: exactly these names, on the package and on its classes."""

import inspect
from typing import Any

import gpu_adam
from gpu_adam import errors, schedules

ERRORS = {
    "ArgumentTypeError", "ArgumentValueError", "CheckpointError", "CheckpointWarning", "ConcurrentStepError",
    "DeviceError", "DistributedError", "GpuAdamError", "KernelCompileError", "ServiceError",
    "SlotNotFoundError", "SparseIndexError",
}  # fmt: skip
SCHEDULES = {
    "CosineDecay", "CosineDecayRestarts", "ExponentialDecay", "InverseTimeDecay", "LearningRateSchedule",
    "LinearCosineDecay",
    "PiecewiseConstantDecay", "PolynomialDecay",
}  # fmt: skip
OTHERS = {
    "Adam", "CheckpointManager", "IndexedSlices", "LossScale", "Telemetry", "Variable", "get_device", "register_vjp",
    "schedules", "set_device", "value_and_grad",
}  # fmt: skip
INTEROP = ["keras", "optax", "torch"]

ADAM = {
    "accumulate", "add_slot", "add_weight", "amsgrad", "apply_gradients", "beta_1", "beta_2", "build", "capture",
    "check_errors", "check_gradients", "clipnorm", "clipvalue", "complex_mode", "decay", "discard_accumulated",
    "epsilon", "exclude_from_weight_decay",
    "export", "finalize_variable_values", "flavour", "forget", "from_config", "get_config", "get_gradients",
    "get_group", "get_slot", "get_slot_names", "get_updates", "get_weights", "global_clipnorm", "iterations", "l2",
    "learning_rate", "load", "loss_scale", "lr", "minimize", "name", "overwrite_by_averages", "read_telemetry",
    "replace", "restore", "save", "set_group", "set_weights", "skipped_steps", "stage", "synchronize", "variables",
    "weight_decay", "weights",
}  # fmt: skip
VARIABLE = {
    "assign", "assign_add", "assign_sub", "constrain", "constraint", "device", "dtype", "gather", "name", "ndim",
    "numpy", "over", "shape", "size", "trainable", "value",
}  # fmt: skip
MANAGER = {"guard", "restore_latest", "save", "step", "wait"}
SLICES = {"dense", "dense_shape", "indices", "norm", "numpy", "shape", "values"}


def public(obj: Any) -> set[str]:
    return {name for name in dir(obj) if not name.startswith("_")}


def test_names_of_the_package() -> None:
    assert set(gpu_adam.__all__) == ERRORS | SCHEDULES | OTHERS
    assert gpu_adam.__all__ == sorted(gpu_adam.__all__)
    assert all(getattr(gpu_adam, name) is getattr(errors, name) for name in ERRORS)
    assert all(getattr(gpu_adam, name) is getattr(schedules, name) for name in SCHEDULES)
    assert gpu_adam.__version__.count(".") == 2
    modules = {name for name in public(gpu_adam) if inspect.ismodule(getattr(gpu_adam, name))}
    assert public(gpu_adam) - modules - {"Any", "TYPE_CHECKING"} <= set(gpu_adam.__all__), "the rest is not meant"
    assert all(callable(getattr(gpu_adam, name)) for name in set(gpu_adam.__all__) - {"schedules"})


def test_each_library_has_two_functions() -> None:
    assert gpu_adam.interop.__all__ == INTEROP
    for name in INTEROP:
        module = getattr(gpu_adam.interop, name)
        own = {each for each in public(module) if getattr(getattr(module, each), "__module__", "") == module.__name__}
        assert {"export_state", "import_state"} <= own <= {"export_state", "import_state", "numbers_of"}, name
        assert all(inspect.getdoc(getattr(module, each)) for each in own)


def test_names_of_the_classes() -> None:
    assert public(gpu_adam.Adam()) == ADAM
    assert public(gpu_adam.Variable(1.0, device="host")) == VARIABLE
    assert public(gpu_adam.IndexedSlices([1.0], [0])) == SLICES
    assert public(gpu_adam.CheckpointManager) == MANAGER


def test_everything_public_says_what_it_does() -> None:
    for name in set(gpu_adam.__all__) - {"schedules"}:
        assert inspect.getdoc(getattr(gpu_adam, name)), name
    for kind, names in (
        (gpu_adam.Adam, ADAM - {"amsgrad"}),
        (gpu_adam.Variable, VARIABLE - {"trainable"}),
        (gpu_adam.CheckpointManager, MANAGER),
        (gpu_adam.IndexedSlices, SLICES - {"values", "indices", "dense_shape"}),
    ):
        for name in names:
            assert inspect.getdoc(getattr(kind, name)), name


def test_parameters() -> None:
    """Names and order of what users write by keyword or by position."""
    expected: dict[Any, list[str]] = {
        gpu_adam.Adam.apply_gradients: [
            *("self", "grads_and_vars", "name", "experimental_aggregate_gradients", "grad_scale"),
        ],
        gpu_adam.Adam.build: ["self", "var_list"],
        gpu_adam.Adam.add_slot: ["self", "var", "slot_name", "initializer", "shape"],
        gpu_adam.Adam.add_weight: [
            "self", "name", "shape", "dtype", "initializer", "trainable", "synchronization", "aggregation",
        ],
        gpu_adam.Adam.get_slot: ["self", "var", "slot_name"],
        gpu_adam.Adam.forget: ["self", "variable"],
        gpu_adam.Adam.replace: ["self", "old", "new", "index"],
        gpu_adam.Adam.set_weights: ["self", "weights"],
        gpu_adam.Adam.export: ["self"],
        gpu_adam.Adam.restore: ["self", "arrays"],
        gpu_adam.Adam.save: ["self", "path", "variables", "asynchronous", "on_busy", "user"],
        gpu_adam.Adam.load: ["self", "path", "variables"],
        gpu_adam.CheckpointManager: [
            "directory", "optimizer", "variables", "every_steps", "every_seconds", "keep",
        ],
        gpu_adam.Adam.from_config: ["config", "custom_objects"],
        **{interop.export_state: ["adam", "variables"] for interop in (gpu_adam.interop.torch, gpu_adam.interop.optax)},
        gpu_adam.interop.keras.export_state: ["adam", "variables", "legacy"],
        **{getattr(gpu_adam.interop, name).import_state: ["adam", "state", "variables"] for name in INTEROP},
        gpu_adam.Variable: ["initial_value", "trainable", "name", "dtype", "device", "constraint"],
        gpu_adam.IndexedSlices: ["values", "indices", "dense_shape"],
        gpu_adam.set_device: ["device"],
        gpu_adam.get_device: [],
    }  # fmt: skip
    for function, names in expected.items():
        assert list(inspect.signature(function).parameters) == names, function
