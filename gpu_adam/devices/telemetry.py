"""What the GPU says about itself while it works: clocks, power, energy, temperature, and what slows it down (NVML)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpu_adam.devices import Device

NONE = "no telemetry"
_MEMORY_TRANSFERS_PER_CLOCK = 2
# https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html; idle and user-set clocks do not count.
_THROTTLES = {
    0x4: "power cap", 0x8: "hardware slowdown", 0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake",
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """One look at the device; None where it does not tell.

    Attributes:
        sm_mhz, memory_mhz: current clocks.
        watts: power draw.
        joules: energy since the driver was loaded.
        celsius: temperature of the chip.
        throttles: reasons for lower clocks than it could have.
    """

    sm_mhz: int | None
    memory_mhz: int | None
    watts: float | None
    joules: float | None
    celsius: int | None
    throttles: tuple[str, ...]


class Telemetry:
    """A device's NVML handle, opened by its place on the PCI bus: indices differ under CUDA_VISIBLE_DEVICES.

    Args:
        nvml: the module pynvml, initialised.
        handle: the device's.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def open(cls, device: Device) -> Telemetry | None:
        """Of a CUDA device; None on the host, without a driver, or without the package nvidia-ml-py."""
        if device.name == "host":
            return None
        try:
            import pynvml  # noqa: PLC0415  (optional)

            pynvml.nvmlInit()
            # Not by UUID, which CuPy cuts off at its first zero byte.
            place = device.xp.cuda.Device(getattr(device, "index", 0)).pci_bus_id
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByPciBusId(place))
        except Exception:  # the driver's errors are of many kinds, and none of them stops a measurement
            return None

    def names(self) -> tuple[str, str] | None:
        """NVML's index and UUID of the device, which others' figures of it have as labels; None where it has none."""
        index = self._try(self._nvml.nvmlDeviceGetIndex, self._handle)
        uuid = self._try(self._nvml.nvmlDeviceGetUUID, self._handle)
        return None if index is None or uuid is None else (str(index), uuid)

    def read(self) -> Reading:
        """The present state."""
        nvml, handle = self._nvml, self._handle
        milliwatts = self._try(nvml.nvmlDeviceGetPowerUsage, handle)
        millijoules = self._try(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        reasons = self._try(self._throttle_function(), handle) or 0
        return Reading(
            self._try(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            self._try(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
            None if milliwatts is None else milliwatts * 1e-3,
            None if millijoules is None else millijoules * 1e-3,
            self._try(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            tuple(reason for bit, reason in _THROTTLES.items() if reasons & bit),
        )

    def sheet_bandwidth(self) -> float | None:
        """Bytes per second of the data sheet: memory clock x bus width x transfers per clock."""
        mhz = self._try(self._nvml.nvmlDeviceGetMaxClockInfo, self._handle, self._nvml.NVML_CLOCK_MEM)
        bits = self._try(self._nvml.nvmlDeviceGetMemoryBusWidth, self._handle)
        return None if not mhz or not bits else _MEMORY_TRANSFERS_PER_CLOCK * mhz * 1e6 * bits / 8

    def _throttle_function(self) -> Callable[..., Any]:
        old = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons  # drivers before 535
        return getattr(self._nvml, "nvmlDeviceGetCurrentClocksEventReasons", old)  # type: ignore[no-any-return]

    def _try(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """None where the device does not support the question, as slices of a GPU and mobile ones do."""
        try:
            return function(*arguments)
        except self._nvml.NVMLError:
            return None


def between(before: Reading, after: Reading, steps: int) -> dict[str, Any]:
    """What the readings around `steps` steps say, as JSON values; a throttled run is marked."""
    known = before.joules is not None and after.joules is not None
    energy = (after.joules or 0.0) - (before.joules or 0.0)
    return {
        "sm_mhz": after.sm_mhz,
        "memory_mhz": after.memory_mhz,
        "watts": after.watts,
        "joules_per_step": energy / steps if known and energy > 0 else None,
        "celsius": after.celsius,
        "throttled": sorted({*before.throttles, *after.throttles}),
    }
