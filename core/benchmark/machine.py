"""Which machine and versions a run was made with, and what else ran meanwhile: without these a number says nothing."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
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
        psutil.cpu_percent()  # the next time it tells of what was since
        self._start = time.monotonic(), _own_seconds()

    def others(self) -> float:
        """The share of the processor, 1 for all cores, that was used by neither this process nor its children."""
        wall, own = time.monotonic() - self._start[0], _own_seconds() - self._start[1]
        used = float(psutil.cpu_percent()) / 100
        return round(min(max(used - own / (wall * (os.cpu_count() or 1)), 0.0), 1.0), 3)


def _own_seconds() -> float:
    """Of the processor, by this process and its ended children."""
    return float(sum(psutil.Process().cpu_times()[:4]))


def versions() -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {"lora-rt": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def peak_megabytes(device: torch.device) -> float:
    """The most memory so far, in MB: of a GPU what torch has allocated, else the process' resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if status.exists():  # what `getrusage` tells here may be the peak of the process that started this one
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _driver() -> str:
    """The version of NVIDIA's driver, by the program that comes with it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
