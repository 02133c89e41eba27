"""What an optimizer and its variables hold, to the bit: for tests that a call which raises has changed nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gpu_adam
from gpu_adam.devices import device_of


def contents(array: Any) -> tuple[str, tuple[int, ...], bytes]:
    """Dtype, shape and bytes of a Variable, or of an array on any device."""
    array = array.value if isinstance(array, gpu_adam.Variable) else array
    device = device_of(array)
    assert device is not None
    values = device.numpy(array)
    return values.dtype.str, values.shape, values.tobytes()


def snapshot(optimizer: gpu_adam.Adam, *arrays: Any) -> list[Any]:
    """Everything that a step may change."""
    weights = [(id(weight), weight.name, contents(weight)) for weight in optimizer.weights]
    return [weights, list(optimizer.get_slot_names()), [contents(array) for array in arrays]]


@contextmanager
def unchanged(optimizer: gpu_adam.Adam, *arrays: Any) -> Iterator[None]:
    """Fail if the block changes the optimizer's weights or slot names, or the variables and gradients given."""
    before = snapshot(optimizer, *arrays)
    yield
    assert snapshot(optimizer, *arrays) == before
