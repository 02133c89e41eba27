"""The exceptions: which builtins they are, the four parts of their text, and that they travel between processes."""

import copy
import inspect
import pickle

import pytest

from gpu_adam import errors
from gpu_adam.errors import GpuAdamError

BUILTINS: dict[type[GpuAdamError], type[Exception]] = {
    errors.ArgumentTypeError: TypeError,
    errors.ArgumentValueError: ValueError,
    errors.CheckpointError: ValueError,
    errors.SparseIndexError: IndexError,
    errors.SlotNotFoundError: KeyError,
    errors.ConcurrentStepError: RuntimeError,
    errors.DistributedError: RuntimeError,
    errors.ServiceError: RuntimeError,
    errors.DeviceError: RuntimeError,
    errors.KernelCompileError: RuntimeError,
}
ALL: list[type[GpuAdamError]] = [GpuAdamError, *BUILTINS]


def test_none_is_left_out() -> None:
    classes = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    assert {kind for kind in classes if kind.__module__ == errors.__name__} == {*ALL, errors.CheckpointWarning}
    tree = errors.__doc__ or ""
    assert all(error.__name__ in tree for error in ALL), "the tree in the module's docstring is whole"


@pytest.mark.parametrize(("error", "builtin"), BUILTINS.items())
def test_each_is_a_builtin_too(error: type[GpuAdamError], builtin: type[Exception]) -> None:
    with pytest.raises(builtin, match="must"):
        raise error("beta_1", "must lie in [0, 1)", 1.5, "pass 0.9, say")
    assert issubclass(error, GpuAdamError)
    assert error.__doc__


def test_a_kernel_that_does_not_compile_is_a_device_error() -> None:
    assert issubclass(errors.KernelCompileError, errors.DeviceError)


@pytest.mark.parametrize("error", ALL)
def test_a_message_has_four_parts(error: type[GpuAdamError]) -> None:
    raised = error("beta_1", "must lie in [0, 1)", 1.5, "pass 0.9, say")
    assert str(raised) == "beta_1 must lie in [0, 1) (got 1.5); pass 0.9, say."
    assert (raised.argument, raised.rule, raised.got, raised.remedy) == (
        "beta_1",
        "must lie in [0, 1)",
        1.5,
        "pass 0.9, say",
    )


@pytest.mark.parametrize("error", ALL)
def test_copies(error: type[GpuAdamError]) -> None:
    raised = error("beta_1", "must lie in [0, 1)", 1.5, "pass 0.9, say")
    for again in (pickle.loads(pickle.dumps(raised)), copy.copy(raised), copy.deepcopy(raised)):
        assert type(again) is error
        assert str(again) == str(raised)
        assert again.args == raised.args
        assert vars(again) == vars(raised)
