"""The machine: what its processor is called, the memory that is free, what a process takes and may give back; and what
stands beside every measurement: versions, and what else ran meanwhile."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from lora_rt.version import __version__

with suppress(ImportError):  # Windows has none
    import resource

_CGROUP = Path("/sys/fs/cgroup")
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "xllamacpp")


def free_bytes(device: str) -> int:
    """Bytes that a process can still take on a device ("cpu", "cuda", "cuda:N"), within its container's limit."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return min([int(psutil.virtual_memory().available), *_left_in_container()])


def give_back() -> None:
    """Let the C library return what this process has freed to the system; glibc does, others keep no such store.

    Keys and values that are kept for long lie among those that live for one answer. What is freed between them is used
    again in part only: a server of 0.9 GB grows to 1.7 in four minutes, of which 0.3 to 0.4 are free. It takes 0.03 to
    0.1 s.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return found


def _left_in_container() -> list[int]:
    """What the control group (version 2) of a container leaves; nothing where there is no limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return []
    return [max(0, int(limit) - used)] if limit.isdigit() else []


def cpu_name() -> str:
    """Linux names the processor in /proc/cpuinfo; elsewhere the platform module has to do."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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


def now(device: torch.device) -> float:
    """Seconds, once all work that was given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _driver() -> str:
    """The version of NVIDIA's driver, by the program that comes with it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
