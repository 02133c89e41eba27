"""Which devices a test runs on.

A test that takes `device` runs on the host, and on a CUDA device where one answers. `--device cuda` demands CUDA: it
runs on CUDA alone and fails without it; `--device host` leaves CUDA out. Such a test has the mark `device`. Any other
one has the mark `no_device`: it runs on the host alone, also where a GPU answers; so do the processes that it starts.

A test with the mark `long` does not run where a GPU's kernels are interpreted. One with the mark `thorough` runs where
marks are asked for on the command line: `pytest -m ""` runs every test.
"""

import gc
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

import gpu_adam
from gpu_adam import devices
from gpu_adam.errors import DeviceError


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=["host", "cuda"], help="run device tests there only; default: wherever they can"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """At most four, each with kernels to compile; none where a device is named: a GPU is tested by one process."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if config.getoption("--device") else min(4, processors)


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


_FIXTURES = frozenset({"device", "gpu", "to_device"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        has_device = not _FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))
        item.add_marker("device" if has_device else "no_device")


def pytest_collection_finish() -> None:
    """What stays to the end, all tests and imported modules, is no work for the collector, which many tests call."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Any:
    """Race detection on an emulated driver goes by words of 32 bits, which threads may share numbers of 16 bits of."""
    try:
        return (yield)
    except Exception as error:
        if "emulation: RACE" in str(error) and ".global.u16" in str(error):
            pytest.skip("two threads write the halves of a word, which the race detector takes for one number")
        raise


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[devices.Device]:
    """The device under test, made the default."""
    before = devices.get_device()
    device = gpu_adam.set_device(request.param)
    if request.node.get_closest_marker("long") and getattr(device.xp, "__emulated__", False):
        gpu_adam.set_device(before)
        pytest.skip("needs a real GPU: so many steps take minutes where kernels are interpreted")
    yield device
    gpu_adam.set_device(before)


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[devices.Device]:
    """The CUDA device, made the default."""
    wanted = request.config.getoption("--device")
    try:
        device = devices.find_device("cuda")
    except DeviceError:
        if wanted == "cuda":
            raise
        wanted = "host"
    if wanted == "host":
        pytest.skip("needs a real GPU, or an emulated one")
    before = devices.get_device()
    yield devices.set_device(device)
    devices.set_device(before)


@pytest.fixture
def emulation(gpu: devices.Device) -> Any:
    """The emulated driver, which counts what it is asked for."""
    if not getattr(gpu.xp, "__emulated__", False):
        pytest.skip("needs the emulated GPU: a real GPU counts nothing")
    return importlib.import_module("cupy._emulation")


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Threads of torch would wait for a processor where tests run beside each other."""
    torch = importlib.import_module("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def keras() -> Any:
    """Keras 3 on NumPy, without a file of settings in the user's home."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as home:
        patch.setenv("KERAS_BACKEND", "numpy")
        patch.setenv("KERAS_HOME", home)
        return pytest.importorskip("keras", minversion="3", reason="Keras 3 is not installed (extra: peers)")


@pytest.fixture(autouse=True)
def _collecting_between_tests() -> Iterator[None]:
    """No collection of garbage in the middle of a kernel that is interpreted.

    It may free a pool of device memory. A GPU then waits for its kernels. An emulated one is in the middle of one, in
    the same thread, and runs those behind it first, which read what that one has not written.
    """
    if "emulated_driver" not in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True)
def _host_by_default(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The host as the default device of a test that does not say where it runs."""
    if not _FIXTURES.isdisjoint(request.fixturenames):
        yield
        return
    before = devices.get_device()
    gpu_adam.set_device("host")
    monkeypatch.setenv("GPU_ADAM_DEVICE", "host")
    yield
    gpu_adam.set_device(before)
