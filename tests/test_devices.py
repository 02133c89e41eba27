"""Choosing a device by name, environment and arrays; what is missing where there is none; what an import brings in."""

import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import reference
from captures import captured
from reference import assert_same_bits
from snapshots import unchanged

import gpu_adam
from gpu_adam import Adam, IndexedSlices, Variable, devices
from gpu_adam.devices import Device, HostDevice, find_device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, DeviceError

SHOW = """
import gpu_adam
try:
    print(gpu_adam.get_device().name)
except gpu_adam.GpuAdamError as error:
    print(type(error).__name__, error)
"""
WITHOUT_CUPY = """
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "cupy" else found(name, package)
"""
STANDIN = """
class ndarray: pass
class Device:
    def __init__(self, index): self.id = index
class cuda:
    Device = Device
    class runtime:
        class CUDARuntimeError(RuntimeError): pass
        def getDeviceCount(): return 2
        def getDevice(): return 1
    class nvrtc:
        def getVersion(): return 13, 0
"""


def standin(folder: Path, more: str = "") -> tuple[Path]:
    """A folder with a package `cupy` that says what devices there are, and no more."""
    (folder / "cupy").mkdir()
    (folder / "cupy" / "__init__.py").write_text(STANDIN + more)
    return (folder,)


def test_the_default_device(device: Device) -> None:
    """The fixture has set it: what is made without a device lies there."""
    assert gpu_adam.get_device() is device
    assert Variable(1.0).device is device
    host = gpu_adam.set_device("host")
    assert isinstance(host, HostDevice)
    assert gpu_adam.get_device() is host
    assert gpu_adam.set_device(device) is device
    assert repr(device) == f"<gpu_adam device {device.name}>"


def test_names(device: Device) -> None:
    assert find_device(device.name) is device
    assert find_device(device) is device
    assert find_device(None) is device
    assert find_device("host") is find_device("host")
    assert device.name in ("host", "cuda:0")
    assert find_device("auto").name in ("host", "cuda:0")


@pytest.mark.parametrize("name", ["", "gpu", "cpu", "cuda:", "cuda:x", "cuda:-1", "cuda 0", "HOST", "host:0"])
def test_names_that_are_none(name: str) -> None:
    before = gpu_adam.get_device()
    with pytest.raises(ArgumentValueError, match=r"device must be 'auto', 'host', 'cuda' or 'cuda:N' \(got '"):
        gpu_adam.set_device(name)
    for wrong in (3, None.__class__, b"host", ["host"]):
        with pytest.raises(ArgumentTypeError, match="device must be a name or a device"):
            gpu_adam.set_device(wrong)  # type: ignore[arg-type]
    assert gpu_adam.get_device() is before


def test_devices_of_arrays(device: Device) -> None:
    assert devices.device_of(device.array(np.ones(2))) is device
    assert devices.device_of(Variable(np.ones(2))) is device
    assert devices.device_of(np.ones(2)) is find_device("host")
    for other in (None, 1.0, [1.0], "host", object()):
        assert devices.device_of(other) is None


def test_arrays_of_a_device(device: Device) -> None:
    """The interface that everything else is written against."""
    values = np.arange(6.0).reshape(2, 3)
    array: Any = device.array(values[:, ::2], np.dtype(np.float32))
    assert array.flags.c_contiguous
    assert device.numpy(array).tolist() == [[0, 2], [3, 5]]
    assert device.numpy(array).dtype == np.float32
    same: Any = device.view(array)
    assert same is array
    assert device.view([1.0]) is None
    assert device.address(array[1:]) == device.address(array) + 8
    assert device.address(device.empty(3, np.dtype(np.float64))) % 16 == 0
    for skip in range(4):
        memory = device.array(np.zeros(9, np.float32))
        zeros = device.zeros((2, 2), np.dtype(np.float32), like=memory[skip:])
        assert device.address(zeros) % 16 == device.address(memory[skip:]) % 16
        assert device.numpy(zeros).tolist() == [[0, 0], [0, 0]]
    labels = dict(device.facts())
    assert all(labels.values())


def neighbour(device: Device) -> Device:
    """The second device of this kind, where there are two; else the device itself."""
    try:
        return device if device.name == "host" else find_device("cuda:1")
    except DeviceError:
        return device


def test_variables_of_several_devices_in_one_step(device: Device) -> None:
    """Each is updated where it lies, whichever device is current."""
    places = [device, neighbour(device), find_device("host"), device]
    initial = [np.linspace(-1, 1, 5) + k for k in range(4)]
    variables = [Variable(x, device=place) for x, place in zip(initial, places, strict=True)]
    optimizer, oracle = gpu_adam.Adam(0.1, amsgrad=True), reference.Adam(initial, 0.1, amsgrad=True)
    rows = np.array([4, 0, 4])
    for _ in range(2):
        slices = IndexedSlices(places[1].array(initial[2][:3]), places[1].array(rows))
        gradients = [initial[1], reference.densified(initial[2][:3], rows, initial[0]), initial[3], initial[0]]
        placed = [place.array(g) for g, place in zip(gradients, places, strict=True)]
        optimizer.apply_gradients(zip([placed[0], slices, *placed[2:]], variables, strict=True))
        oracle.step(gradients)
    for variable, place, expected in zip(variables, places, oracle.variables, strict=True):
        assert variable.device is place
        assert optimizer.get_slot(variable, "m").device is place
        assert_same_bits(variable.numpy(), expected)
    variables[1].assign(np.zeros(5)).assign_add(np.ones(5))
    assert variables[1].numpy().tolist() == [1] * 5
    optimizer.set_weights(optimizer.get_weights())
    copied, copies = copy.deepcopy((optimizer, variables))
    assert copied.get_slot(copies[1], "v").device is places[1]


def test_graphs_of_several_devices_that_decide_are_not_staged_together(gpu: Device) -> None:
    """Each device has a count of its own; one of an optimizer's is staged."""
    other, optimizer, graphs = neighbour(gpu), gpu_adam.Adam(0.1, skip_nonfinite=True), list[Any]()
    kept = list[Any]()
    if other is gpu:
        pytest.skip("needs a real GPU, or an emulated one, and another beside it")

    def capture_on(place: Device) -> int:
        variable, gradient = Variable(np.ones(3), device=place), place.array(np.ones(3))
        kept.append(gradient)  # a graph reads it again
        with place.activate(), gpu.xp.cuda.Stream(non_blocking=True):
            place.synchronize()
            optimizer.apply_gradients([(gradient, variable)])
            count = int(optimizer.iterations)
            with captured(place, graphs):
                optimizer.apply_gradients([(gradient, variable)])
        return count

    assert capture_on(gpu) == 1
    with gpu.activate():
        assert optimizer.stage() is None
        graphs[0].launch()
    assert capture_on(other) == 3
    words = rf"stage must find steps with skip_nonfinite, .* on one device \(got \['{gpu.name}', '{other.name}'\]\)"
    with pytest.raises(ArgumentValueError, match=words):
        optimizer.stage()


def test_a_variable_of_another_device_than_the_current_one(device: Device) -> None:
    """Assignments, expressions, methods, weights, files and losses compute where the variable lies."""
    other = neighbour(device)
    start = np.linspace(-1, 1, 5)
    variable, optimizer = Variable(start, device=other), gpu_adam.Adam(0.1)
    for value in (np.ones(5), [1.0] * 5, Variable(np.ones(5), device=other), Variable(np.ones(5), device=device)):
        variable.assign(start).assign(value).assign_add(value).assign_sub(device.array(np.full(5, 0.5)))
        variable += 1.0
        assert variable.numpy().tolist() == [2.5] * 5
    variable.assign(start)
    variable[1:3] = 7.0
    expected = np.array([-1, 7, 7, 0.5, 1])
    for found in (variable + 1, 1 + variable, np.add(variable, 1)):
        assert devices.device_of(found) is other
        assert other.numpy(found).tolist() == (expected + 1).tolist()
    for found in (variable.sum(), np.sum(variable), np.add.reduce(variable)):
        assert float(found) == pytest.approx(14.5)
    assert other.numpy(np.where(variable > 0, variable, 0)).tolist() == [0, 7, 7, 0.5, 1]
    assert float(variable[3]) == 0.5
    for count in (1, 2):
        assert optimizer.minimize(lambda: np.sum(variable**2), [variable]) == count
    assert optimizer.get_gradients(lambda: variable * 3, [variable])[0].tolist() == [3] * 5
    assert (variable.numpy() < expected).tolist() == [False, True, True, True, True]


def test_weights_of_another_device_than_the_current_one(device: Device, tmp_path: Path) -> None:
    other = neighbour(device)
    variable, optimizer = Variable(np.ones(5), device=other), gpu_adam.Adam(0.1)
    optimizer.apply_gradients([(other.array(np.ones(5)), variable)])
    before = optimizer.get_weights()
    optimizer.save(tmp_path / "state.npz")
    for number, slot in enumerate(optimizer.weights[1:]):
        slot.assign(np.full(5, float(number)))
    optimizer.load(tmp_path / "state.npz")
    for actual, expected in zip(optimizer.get_weights(), before, strict=True):
        assert_same_bits(np.asarray(actual), np.asarray(expected))
    for value in (np.full(5, 3, np.float32), device.array(np.full(5, 3.0)), Variable(np.full(5, 3), device=device)):
        optimizer.set_weights([7, value, value])
        assert [weight.tolist() for weight in optimizer.get_weights()] == [7, [3] * 5, [3] * 5]


@pytest.mark.parametrize("start", ["host", "device", "neighbour"])
@pytest.mark.parametrize("end", ["host", "device", "neighbour"])
def test_values_that_come_from_another_device(device: Device, start: str, end: str) -> None:
    """They are copied, after what the current stream of their device has still to do and before what comes then."""
    places = {"host": find_device("host"), "device": device, "neighbour": neighbour(device)}
    source = Variable(np.zeros(1000), device=places[start])
    source.assign(np.arange(1000.0))
    copied = Variable(source, device=places[end])
    cast = Variable(source.value, dtype="float32", device=places[end])
    assigned = Variable(np.zeros(1000), device=places[end]).assign(source).assign(source.value)
    source.assign(np.full(1000, np.nan))
    for variable in (copied, cast, assigned):
        assert variable.device is places[end]
        assert variable.numpy().tolist() == list(range(1000))


def test_parts_of_a_gradient_on_another_device(device: Device) -> None:
    """Nothing is copied between devices without being asked for: not even row numbers."""
    other = neighbour(device)
    variable, optimizer = Variable(np.ones((3, 2)), device=device), gpu_adam.Adam()
    for values_place, rows_place, whole_place in (
        (other, device, device),
        (device, other, device),
        (device, device, other),
    ):
        slices = IndexedSlices(values_place.array(np.ones((2, 2))), rows_place.array(np.array([0, 2])))
        whole = whole_place.array(np.ones((3, 2)))
        pairs = [(slices, variable), (whole, variable)]
        if other is device:
            optimizer.apply_gradients(pairs)
        else:
            with unchanged(optimizer, variable), pytest.raises(ArgumentValueError, match=f"must lie on {device.name}"):
                optimizer.apply_gradients(pairs)


# In processes of their own.


def test_an_import_brings_in_nothing_heavy() -> None:
    code = processes.STEP + "import sys, json; print(json.dumps(sorted(sys.modules)))"
    modules = set(json.loads(processes.run(code).splitlines()[-1]))
    assert "numpy" in modules
    assert not modules & {
        "cupy",
        "rich",
        "typer",
        "ml_dtypes",
        "torch",
        "jax",
        "zipfile",
        "gpu_adam.cli",
        "gpu_adam.devices.cuda",
    }


def test_the_environment_chooses(tmp_path: Path) -> None:
    """Unless `set_device` has been called."""
    code = """
import os, gpu_adam
for name in ("host", "cuda:0", "cuda", "tpu", "host"):
    os.environ["GPU_ADAM_DEVICE"] = name
    gpu_adam.devices._chosen = None
    try:
        print(gpu_adam.get_device().name)
    except gpu_adam.GpuAdamError as error:
        print(type(error).__name__, error)
gpu_adam.set_device("cuda:1")
print(gpu_adam.get_device().name, gpu_adam.find_device(None).name)
""".replace("gpu_adam.find_device", "gpu_adam.devices.find_device")
    *names, wrong, host, chosen = processes.run(code, standin(tmp_path)).splitlines()
    assert names == ["host", "cuda:0", "cuda:1"], "cuda is CuPy's current device"
    assert wrong.startswith("ArgumentValueError device must be 'auto', 'host', 'cuda' or 'cuda:N' (got 'tpu')")
    assert host == "host"
    assert chosen == "cuda:1 cuda:1"


def test_auto_takes_cuda_where_it_answers_and_says_so_once(tmp_path: Path) -> None:
    code = "import logging; logging.basicConfig(level=logging.INFO)\n" + SHOW + SHOW
    text = processes.run(code, standin(tmp_path), GPU_ADAM_DEVICE=None)
    assert text.splitlines() == ["INFO:gpu_adam:device: cuda:1", "cuda:1", "cuda:1"]
    said, *names = processes.run(WITHOUT_CUPY + code, GPU_ADAM_DEVICE="auto").splitlines()
    assert said.startswith(
        "INFO:gpu_adam:device: host, because device 'cuda' needs an NVIDIA driver, CuPy and NVRTC (got no"
    )
    assert names == ["host", "host"]


INSTALL = 'pip install "gpu-adam[cuda13]"'


@pytest.mark.parametrize(
    ("more", "missing", "remedy"),
    [
        (None, "no CuPy", INSTALL),
        (
            "raise ImportError('libcudart.so.13: cannot open')",
            "CuPy does not import: libcudart.so.13: cannot open",
            INSTALL,
        ),
        (
            "def fail(): raise cuda.runtime.CUDARuntimeError('cudaErrorInsufficientDriver')\n"
            "cuda.runtime.getDeviceCount = fail",
            "cudaErrorInsufficientDriver",
            "install NVIDIA's driver",
        ),
        ("cuda.runtime.getDeviceCount = lambda: 0", "a driver without devices", "check CUDA_VISIBLE_DEVICES"),
        (
            "def fail(): raise RuntimeError('libnvrtc.so')\ncuda.nvrtc.getVersion = fail",
            "no NVRTC: libnvrtc.so",
            INSTALL,
        ),
    ],
)
def test_what_is_missing_for_cuda(tmp_path: Path, more: str | None, missing: str, remedy: str) -> None:
    folders, before = ((), WITHOUT_CUPY) if more is None else (standin(tmp_path, more), "")
    code = before + "import gpu_adam, pickle\n" + """
for ask in (gpu_adam.set_device, lambda name: gpu_adam.Variable(1.0, device=name)):
    try:
        ask("cuda:0")
    except gpu_adam.DeviceError as error:
        print(error)
print(gpu_adam.set_device("auto").name, gpu_adam.Variable(1.0).device.name)
""" + "from gpu_adam import devices; print(dict(devices.describe())['missing'])"  # fmt: skip
    first, second, automatic, described = processes.run(code, folders).splitlines()
    assert first == second
    assert first.startswith(f"device 'cuda' needs an NVIDIA driver, CuPy and NVRTC (got {missing}); {remedy}")
    assert automatic == "host host"
    assert missing in described


def test_a_device_number_that_is_none(tmp_path: Path) -> None:
    text = processes.run(SHOW, standin(tmp_path), GPU_ADAM_DEVICE="cuda:2")
    assert text == "DeviceError device 'cuda:2' must be one of the 2 CUDA devices (got 2); count from 0."


def test_threads_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_ADAM_THREADS", "3")
    assert HostDevice().threads == 3
    assert HostDevice(threads=2).threads == 2
    for wrong in ("0", "-1", "x", "1.5", ""):
        monkeypatch.setenv("GPU_ADAM_THREADS", wrong)
        with pytest.raises(
            ArgumentValueError, match=rf"GPU_ADAM_THREADS must be a whole number >= 1 \(got '{wrong}'\); set"
        ):
            HostDevice()
    monkeypatch.delenv("GPU_ADAM_THREADS")
    assert HostDevice().threads >= 1


def test_sharing_processors_changes_no_bit() -> None:
    """Threads that sleep sooner are waked by the next launch; other devices have no such threads."""
    first, second = (Variable(np.zeros(300_000, np.float32), device=HostDevice(threads=4)) for _ in range(2))
    optimizers, gradient = (Adam(0.1), Adam(0.1)), np.linspace(-1, 1, 300_000, dtype=np.float32)
    for _ in range(3):
        optimizers[0].apply_gradients([(gradient, first)])
    second.device.share_processors()
    for step in range(3):
        optimizers[1].apply_gradients([(gradient, second)])
        time.sleep(0.001 * step)
    assert_same_bits(second.numpy(), first.numpy())


def test_processes_of_one_launcher_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPU_ADAM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(7), raising=False)
    for ranks, threads in ((None, 7), (1, 7), (2, 3), (7, 1), (9, 1)):
        if ranks is not None:
            monkeypatch.setenv("MPI_LOCALNRANKS", str(ranks))
        assert HostDevice().threads == threads
