"""Which devices a test runs on.

A test that takes `device` runs on the host, and on a CUDA device where one answers. `--device cuda` demands CUDA: it
runs on CUDA alone and fails without it; `--device host` leaves CUDA out.
"""

from collections.abc import Iterator

import pytest

import gpu_adam
from gpu_adam import devices
from gpu_adam.errors import DeviceError


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=["host", "cuda"], help="run device tests there only; default: wherever they can"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", _names(metafunc.config), indirect=True)


def _names(config: pytest.Config) -> list[str]:
    chosen = config.getoption("--device")
    if chosen is not None:
        return [str(chosen)]
    try:
        devices.find_device("cuda")
    except DeviceError:
        return ["host"]
    return ["host", "cuda"]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[devices.Device]:
    """The device under test, made the default."""
    before = devices.get_device()
    yield gpu_adam.set_device(request.param)
    gpu_adam.set_device(before)
