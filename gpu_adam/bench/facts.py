"""Facts about the machine: what a reader needs to judge a number."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import gpu_adam
from gpu_adam.devices import Device, describe

_PACKAGES = (
    "numpy", "cupy-cuda13x", "cupy-cuda12x", "torch", "jax", "optax", "warp-lang", "thinc", "tensorflow",
    "tensorflow-cpu", "keras", "tf-keras",
)  # fmt: skip
_UNKNOWN_CACHE = 2**26


def machine() -> dict[str, Any]:
    """Date, processor, devices and versions, as JSON values."""
    versions = {"gpu_adam": gpu_adam.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    hidden = {"kernel cache"}  # a path in somebody's home
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "devices": {
            section: {label: value for label, value in facts if label not in hidden}
            for section, facts in describe()
            if section != "missing"
        },
        "versions": versions,
    }


def cache_bytes(device: Device) -> int:
    """Size of the last cache before memory."""
    if device.name != "host":
        properties = device.xp.cuda.runtime.getDeviceProperties(getattr(device, "index", 0))
        return int(properties.get("l2CacheSize") or _UNKNOWN_CACHE)
    sizes = [_cache_size(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=_UNKNOWN_CACHE)


def _cache_size(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KM]?)", text.strip())
    return int(found[1]) * {"": 1, "K": 2**10, "M": 2**20}[found[2]] if found else _UNKNOWN_CACHE


def free_bytes(device: Device) -> int:
    """Memory that a workload may take."""
    if device.name != "host":
        with device.activate():
            return int(device.xp.cuda.runtime.memGetInfo()[0])
    try:
        (line,) = re.findall(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
        return int(line) * 1024
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
