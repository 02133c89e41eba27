"""Choice of the device: ``set_device``, ``GPU_ADAM_DEVICE``, or ``device=`` of a variable."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
import sys
from typing import Any

from gpu_adam.devices.base import Array, Device
from gpu_adam.devices.host import HostDevice, host_device
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, DeviceError

__all__ = [
    "Array",
    "Device",
    "HostDevice",
    "describe",
    "device_of",
    "find_device",
    "get_device",
    "set_device",
    "view_of",
]

_log = logging.getLogger("gpu_adam")
_chosen: Device | None = None
_CUDA_KINDS = (2, 13)  # DLPack: device memory and managed memory


def set_device(device: str | Device) -> Device:
    """Make a device the default for new variables.

    Args:
        device: "auto" (CUDA where a device answers, else the host), "cuda" (CuPy's current device), "cuda:N", "host",
            or a device object.

    Returns:
        The device.

    Raises:
        ArgumentTypeError, ArgumentValueError: not one of these.
        DeviceError: the device is not there; the message says what is missing.
    """
    global _chosen  # noqa: PLW0603  (the one process-wide setting)
    _chosen = find_device(device)
    return _chosen


def get_device() -> Device:
    """The default device: what ``set_device`` chose last, else ``GPU_ADAM_DEVICE``, else "auto"."""
    return _chosen if _chosen is not None else set_device(os.environ.get("GPU_ADAM_DEVICE") or "auto")


def find_device(device: str | Device | None) -> Device:
    """The device of that name; None means the default device."""
    if device is None:
        return get_device()
    if isinstance(device, Device):
        return device
    if not isinstance(device, str):
        raise ArgumentTypeError("device", "must be a name or a device", type(device).__name__, "pass 'host' or 'cuda'")
    if device == "host":
        return _host()
    if device == "auto":
        return _automatic()
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise ArgumentValueError(
            "device", "must be 'auto', 'host', 'cuda' or 'cuda:N'", repr(device), "pass one of them"
        )
    return _cuda(None if match[1] is None else int(match[1]))


def device_of(obj: Any) -> Device | None:
    """The device in whose memory an array-like object lies; None where it is no array."""
    cuda = sys.modules.get("gpu_adam.devices.cuda")  # imports CuPy, without which nobody has arrays of CuPy
    index = None if cuda is None else cuda.index_of(obj)
    if index is not None:
        return _cuda(index)
    # DLPack before the array interface, which does not tell the device, and which some objects refuse to give: torch
    # raises a RuntimeError for a tensor that requires a gradient.
    if hasattr(obj, "__dlpack_device__"):
        try:
            kind, index = (int(number) for number in obj.__dlpack_device__())
        except ValueError:  # torch's device meta, which is no place
            return None
        if kind in _CUDA_KINDS:
            return _cuda(index)
        return _host() if kind == 1 else None
    if hasattr(obj, "__cuda_array_interface__"):
        place = getattr(obj, "device", None)
        return _cuda(getattr(place, "id", getattr(place, "index", None)))
    return _host() if hasattr(obj, "__array_interface__") else None


def view_of(obj: Any, device: Device, argument: str) -> Array | None:
    """The memory of `obj` as an array of `device`, without a copy; None where it does not lie there.

    Raises:
        ArgumentTypeError: the object does not hand its memory out, as a tensor that requires a gradient.
    """
    try:
        return device.view(obj)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ArgumentTypeError(
            argument, "must share its memory", error, "detach it, or wrap a copy in gpu_adam.Variable"
        ) from error


def describe() -> list[tuple[str, list[tuple[str, str]]]]:
    """What runs where: (section, facts) pairs, the last one "missing" where something is."""
    sections, missing = [], []
    try:
        sections.append(("host", _host().facts()))
    except DeviceError as error:
        missing.append(("host", str(error)))
    try:
        count = _cuda_count()
        sections += [(f"cuda:{index}", _cuda(index).facts()) for index in range(count)]
    except DeviceError as error:
        missing.append(("cuda", str(error)))
    return [*sections, *([("missing", missing)] if missing else [])]


def _host() -> HostDevice:
    return host_device()


@functools.cache
def _automatic() -> Device:
    try:
        device: Device = _cuda(None)
        _log.info("device: %s", device.name)
    except DeviceError as error:
        device = _host()
        _log.info("device: host, because %s", error)
    return device


def _cuda(index: int | None) -> Device:
    count = _cuda_count()
    from gpu_adam.devices.cuda import cuda_device, current_index  # noqa: PLC0415  (imports CuPy, which may be missing)

    index = current_index() if index is None else index
    if not 0 <= index < count:
        raise DeviceError(f"device 'cuda:{index}'", f"must be one of the {count} CUDA devices", index, "count from 0")
    return cuda_device(index)


@functools.cache
def _cuda_count() -> int:
    """How many CUDA devices answer, at least 1; else a DeviceError that says what is missing."""

    def missing(what: object, remedy: str) -> DeviceError:
        return DeviceError("device 'cuda'", "needs an NVIDIA driver, CuPy and NVRTC", what, remedy)

    install = 'pip install "gpu-adam[cuda13]" (or [cuda12] for a driver older than 580)'
    if importlib.util.find_spec("cupy") is None:
        raise missing("no CuPy", install)
    try:
        from gpu_adam.devices import cuda  # noqa: PLC0415  (imports CuPy)
    except ImportError as error:
        raise missing(f"CuPy does not import: {error}", install) from error
    try:
        count = cuda.device_count()
    except Exception as error:  # CuPy's own, which only CuPy can name
        raise missing(error, "install NVIDIA's driver, or use the device 'host'") from error
    if count == 0:
        raise missing("a driver without devices", "check CUDA_VISIBLE_DEVICES, or use the device 'host'")
    try:
        cuda.nvrtc_version()
    except Exception as error:
        raise missing(f"no NVRTC: {error}", install) from error
    return count
