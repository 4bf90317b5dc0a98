"""The precisions of the base: float32, bfloat16, float16, int8 and int4 (NF4 with double quantization); its device.

What can be said of both without torch is said without importing it.
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
from typing import TYPE_CHECKING, Any, Literal, get_args

from lora_rt.errors import LoraRtError, UsageError

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "bfloat16", "float16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Wish = Literal["auto", "packed", "dequantize", "dense"]
WISHES: tuple[Wish, ...] = get_args(Wish)
VARIABLE = "LORA_RT_MULTIPLY"
QUANTIZED: tuple[Precision, ...] = ("int8", "int4")


def check_precision(name: str) -> Precision:
    """The precision of that name.

    Raises:
        UsageError: there is none.
    """
    for precision in PRECISIONS:
        if name == precision:
            return precision
    raise UsageError(f"there is no precision {name!r}", next_step=f"Use one of: {', '.join(PRECISIONS)}")


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
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"there is no device {device!r}", next_step="Use auto, cpu, cuda or cuda:N")
    if device.startswith("cuda") and (here := gpu_count()) is not None:
        _check_number(device, here)


def _check_number(device: str, here: int) -> None:
    """Raises LoraRtError where a machine with so many CUDA devices does not have this one."""
    if not here:
        raise LoraRtError(
            "no CUDA device is available here", next_step="Use --device cpu, or install a CUDA build of torch"
        )
    if int(device.partition(":")[2] or 0) >= here:
        raise LoraRtError(f"there is no {device}: this machine has {here}", next_step=f"Use cuda:0 to cuda:{here - 1}")


def compute_dtype(precision: Precision) -> torch.dtype:
    """The dtype of activations. int8 computes in float16, to which bitsandbytes casts anyway (and warns)."""
    import torch

    return {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "int8": torch.float16,
        "int4": torch.bfloat16,
    }[precision]


def quantization_config(precision: Precision) -> Any:
    """The transformers configuration that quantizes at loading; None for the dense precisions."""
    from transformers import BitsAndBytesConfig

    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if precision == "int4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype("int4"),
        )
    return None


def precision_of(model: Any) -> str:
    """How a loaded model keeps its weights: one of `PRECISIONS`, or in words what others have quantized it to."""
    how = getattr(model.config, "quantization_config", None)
    if how is not None:
        return described(how if isinstance(how, dict) else how.to_dict())
    foreign = {type(module).__module__.partition(".")[0] for module in model.modules() if _is_packed(module)}
    if foreign:
        return f"quantized ({', '.join(sorted(foreign))})"
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.dim() > 1]
    return str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.") if dtypes else "unknown"


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


def _is_packed(module: Any) -> bool:
    """Whether a layer says that it is linear, and keeps its weight in another form than numbers of 16 or 32 bits."""
    if not all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features")):
        return False
    weight = getattr(module, "weight", None)
    if callable(weight) and not hasattr(weight, "dtype"):
        return True
    if weight is None or hasattr(weight, "__tensor_flatten__"):
        return True
    return not (weight.is_floating_point() and weight.dtype.itemsize > 1)


def choose_device(device: str, precision: Precision) -> torch.device:
    """The device to load on; "auto" is the first GPU if there is one, else the CPU.

    Raises:
        LoraRtError: the device does not exist here, or lacks the precision.
    """
    import torch

    check_device(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        _check_cuda(chosen, precision)
    return chosen


def _check_cuda(device: torch.device, precision: Precision) -> None:
    import torch

    _check_number(str(device), torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if precision in ("bfloat16", "int4") and not torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name(device)
        raise LoraRtError(f"{name} does not compute in bfloat16", next_step="Use --precision float16 or int8")


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
