"""Runs every test that asks for a `case` on the cases of its class that it applies to, and on the devices there are."""

import sys
from collections.abc import Callable, Generator
from typing import Any

import pytest

from gpu_adam.devices import find_device
from gpu_adam.errors import DeviceError

from .cases import Case
from .duck import DuckArray


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        applies: Callable[[Case], bool] = {
            "test_hips_autograd": lambda case: case.hips,
            "test_single_precision": lambda case: case.narrow,
        }.get(metafunc.function.__name__, lambda case: True)
        metafunc.parametrize("case", [case for case in metafunc.cls.cases if applies(case)], ids=str)
    if "to_device" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--device")
        devices: dict[str, Callable[[Any], Any]] = {}
        if chosen != "cuda":
            devices["duck"] = DuckArray
        try:
            if chosen != "host":
                devices["cuda"] = find_device("cuda").array
        except DeviceError:
            if chosen == "cuda":
                raise
        metafunc.parametrize("to_device", list(devices.values()), ids=list(devices))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, Any, Any]:
    """Skips what an emulated driver has no function of cuSOLVER for; with one that has them the test runs."""
    try:
        return (yield)
    except Exception as error:
        is_emulated = getattr(sys.modules.get("cupy"), "__emulated__", False)
        if is_emulated and ("CUSOLVER_STATUS_NOT_SUPPORTED" in str(error) or "CUSOLVERError" in str(error)):
            pytest.skip("needs a real GPU: this emulated driver lacks a function of cuSOLVER")
        raise
