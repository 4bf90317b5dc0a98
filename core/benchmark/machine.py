"""Which machine and which versions a run was made with: without these a number says nothing."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from lora_rt.version import __version__

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "llama-cpp-python")


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, memory and threads; on a GPU also its name and memory (GiB)."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": str(device),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30, 1)}
    return facts


def versions() -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {"lora-rt": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    """Linux names the processor in /proc/cpuinfo; elsewhere the platform module has to do."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
