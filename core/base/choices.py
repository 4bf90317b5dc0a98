"""What may be chosen of a base: a precision, a device, a way to multiply; and whether they can be had, without torch.

int4 is NF4 with double quantization.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from lora_rt.errors import LoraRtError, UsageError
from lora_rt.plugins.contract.options import PRECISIONS as PRECISIONS
from lora_rt.plugins.contract.options import Precision as Precision
from lora_rt.plugins.contract.options import check_precision as check_precision
from lora_rt.plugins.contract.options import known_device

Wish = Literal["auto", "packed", "dequantize", "dense"]
WISHES: tuple[Wish, ...] = get_args(Wish)
VARIABLE = "LORA_RT_MULTIPLY"
QUANTIZED: tuple[Precision, ...] = ("int8", "int4")


def check_wish(name: str | None) -> Wish:
    """How weights are to be multiplied on a CPU: as given, else as `$LORA_RT_MULTIPLY` says, else "auto".

    Raises:
        UsageError: there is no such way.
    """
    chosen = name or os.environ.get(VARIABLE) or "auto"
    for wish in WISHES:
        if chosen == wish:
            return wish
    text = f"there is no way {chosen!r} to multiply weights"
    raise UsageError(text, next_step=f"Use one of: {', '.join(WISHES)}")


def check_device(device: str) -> None:
    """Whether a device can be called that, and is here as far as that is known without importing torch.

    Raises:
        UsageError: it can't be.
        LoraRtError: it is not here.
    """
    if known_device(device).startswith("cuda") and (here := gpu_count()) is not None:
        check_number(device, here)


def check_number(device: str, here: int) -> None:
    """Raises LoraRtError where a machine with so many CUDA devices does not have this one."""
    if not here:
        raise LoraRtError(
            "no CUDA device is available here", next_step="Use --device cpu, or install a CUDA build of torch"
        )
    if int(device.partition(":")[2] or 0) >= here:
        raise LoraRtError(f"there is no {device}: this machine has {here}", next_step=f"Use cuda:0 to cuda:{here - 1}")


def described(how: Mapping[str, Any]) -> str:
    """A `quantization_config` in words: "int4" and "int8" as we make them, else "gptq, 4 bits"."""
    method = str(how.get("quant_method", "an unknown format")).rpartition(".")[2].lower()
    if how.get("load_in_4bit"):
        kind = how.get("bnb_4bit_quant_type", "fp4")
        return "int4" if kind == "nf4" else f"bitsandbytes, {kind}"
    if how.get("load_in_8bit"):
        return "int8"
    bits, kind = _first_of(how, ("bits", "w_bit", "nbits"), int), _first_of(how, ("_type", "weights", "format"), str)
    detail = f"{bits} bits" if bits is not None else kind
    return f"{method}, {detail}" if detail else method


def _first_of(how: Mapping[str, Any], names: Sequence[str], kind: type) -> Any:
    """The first value of that kind under one of these names, however deep it lies."""
    found = next((how[name] for name in names if isinstance(how.get(name), kind)), None)
    deeper = (_first_of(value, names, kind) for value in how.values() if isinstance(value, Mapping))
    return found if found is not None else next((value for value in deeper if value is not None), None)


@lru_cache(maxsize=1)
def gpu_count() -> int | None:
    """The number of CUDA devices that this process sees, found without torch; None where only torch can tell."""
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
