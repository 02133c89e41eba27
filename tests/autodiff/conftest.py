"""Runs every test that asks for a `case` on the cases of its class that it applies to, and on the devices there are."""

from collections.abc import Callable
from typing import Any

import pytest

from .cases import Case
from .duck import DuckArray


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        applies: Callable[[Case], bool] = {
            "test_hips_autograd": lambda case: case.hips,
            "test_single_precision": lambda case: case.narrow,
        }.get(metafunc.function.__name__, lambda case: True)
        metafunc.parametrize("case", list(filter(applies, metafunc.cls.cases)), ids=str)
    if "to_device" in metafunc.fixturenames:
        devices = devices_there()
        metafunc.parametrize("to_device", list(devices.values()), ids=list(devices))


def devices_there() -> dict[str, Callable[[Any], Any]]:
    """How to make an array on each device: one that does not exist, and a GPU where one answers."""
    devices: dict[str, Callable[[Any], Any]] = {"duck": DuckArray}
    try:
        import cupy  # noqa: PLC0415  # optional

        if cupy.cuda.runtime.getDeviceCount():
            devices["cuda"] = cupy.asarray
    except Exception:  # no CuPy, no driver, no device: each says so in its own way
        pass
    return devices
