"""What NVML says, read from a stand-in of it; none on the host."""

from types import SimpleNamespace
from typing import Any

import pytest

from gpu_adam.devices import HostDevice
from gpu_adam.devices.telemetry import Telemetry, between

nvml = pytest.importorskip("pynvml", reason="the extra cuda13 brings it")


class Fake:
    """A GPU that knows its clocks and energy, and not its temperature."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM, 0
    NVMLError = nvml.NVMLError
    energy = 1000

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlDeviceGetPowerUsage": 250_000,
            "nvmlDeviceGetClockInfo": 1700,
            "nvmlDeviceGetMaxClockInfo": 2619,
            "nvmlDeviceGetMemoryBusWidth": 5120,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x1 | 0x4 | 0x40,
            "nvmlDeviceGetCurrentClocksEventReasons": 0x1 | 0x4 | 0x40,
        }

        def answer(*_: object) -> int:
            if name == "nvmlDeviceGetTotalEnergyConsumption":
                self.energy += 4000
                return self.energy
            if name not in answers:
                raise nvml.NVMLError(nvml.NVML_ERROR_NOT_SUPPORTED)
            return answers[name]

        return answer


def test_readings() -> None:
    telemetry = Telemetry(Fake(), None)
    before, after = telemetry.read(), telemetry.read()
    assert (after.sm_mhz, after.watts, after.celsius) == (1700, 250.0, None)
    assert after.throttles == ("power cap", "hardware thermal")
    found = between(before, after, 8)
    assert found["joules_per_step"] == pytest.approx(0.5)
    assert found["throttled"] == ["hardware thermal", "power cap"]
    assert telemetry.sheet_bandwidth() == pytest.approx(3352.3e9, rel=1e-4)


def test_names_are_those_of_others_figures() -> None:
    class Named(Fake):
        def __getattr__(self, name: str) -> Any:
            names = {"nvmlDeviceGetIndex": 3, "nvmlDeviceGetUUID": "GPU-12"}
            return (lambda _: names[name]) if name in names else super().__getattr__(name)

    assert Telemetry(Named(), None).names() == ("3", "GPU-12")
    assert Telemetry(Fake(), None).names() is None


def test_the_host_has_none() -> None:
    assert Telemetry.open(HostDevice(threads=1)) is None


def test_a_device_is_opened_by_its_place_on_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be another's for NVML, and CuPy cuts its UUID off."""
    places = {0: "0000:01:00.0", 1: "0000:02:00.0"}
    cuda = SimpleNamespace(Device=lambda index: SimpleNamespace(pci_bus_id=places[index]))
    device: Any = SimpleNamespace(name="cuda:1", index=1, xp=SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(nvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByPciBusId", lambda place: ("handle", place))
    telemetry = Telemetry.open(device)
    assert telemetry is not None
    assert telemetry._handle == ("handle", places[1])
