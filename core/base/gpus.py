"""How many GPUs torch would find, told without importing it: a device that is not here is refused at once."""

from __future__ import annotations

import ctypes
import re
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path


@lru_cache(maxsize=1)
def count() -> int | None:
    """The number of CUDA devices that this process sees, or None where only torch itself can tell."""
    built = _built_for()
    if built is None or built["hip"]:
        return None
    return _of_the_driver() if built["cuda"] else 0


def _built_for() -> dict[str, bool] | None:
    """Which devices the installed torch was built for, as its version file says."""
    spec = find_spec("torch")
    try:
        text = (Path((spec and spec.origin) or "").parent / "version.py").read_text()
    except OSError:
        return None
    found = {name: re.search(rf"^{name}\b[^=\n]*= *(.+)$", text, re.MULTILINE) for name in ("cuda", "hip")}
    return {name: match[1].strip() != "None" for name, match in found.items() if match} if all(found.values()) else None


def _of_the_driver() -> int | None:
    """What NVIDIA's driver says; it heeds CUDA_VISIBLE_DEVICES as torch does."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    number = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(number)) != 0:
        return None
    return number.value
