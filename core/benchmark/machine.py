"""Which machine and versions a run was made with, and what else ran meanwhile: without these a number says nothing."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from typing import Any

import psutil
import torch

from lora_rt.core.base.machine import cpu_name
from lora_rt.version import __version__

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "xllamacpp")


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, memory and threads; on a GPU also its name, memory (GiB) and driver."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": str(device),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30, 1)}
        facts |= {"driver": _driver(), "cuda": torch.version.cuda}
    return facts


class Watch:
    """What else the machine does from now on; `load` is how many processes ran or waited in the minute before."""

    def __init__(self) -> None:
        self.load = round(psutil.getloadavg()[0], 2)
        self._start = _times()

    def others(self) -> float:
        """The share of the processor, 1 for all cores, that was used by neither this process nor its children."""
        wall, used, own = (now - then for now, then in zip(_times(), self._start, strict=True))
        return round(min(max((used - own) / (wall * (os.cpu_count() or 1)), 0.0), 1.0), 3)


def versions() -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {"lora-rt": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _times() -> tuple[float, float, float]:
    """Seconds: on the clock, of the processor by anybody, and by this process and its ended children."""
    all_of_it, own = psutil.cpu_times(), psutil.Process().cpu_times()
    waiting = all_of_it.idle + getattr(all_of_it, "iowait", 0.0)
    twice = sum(getattr(all_of_it, name, 0.0) for name in ("guest", "guest_nice"))  # Linux has them within user
    return time.monotonic(), sum(all_of_it) - waiting - twice, sum(own[:4])


def _driver() -> str:
    """The version of NVIDIA's driver, by the program that comes with it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
