"""A precision and a device in torch's terms: the dtype to compute in, how weights are quantized, and what is here.

Which precisions there are, and what is known of them without torch, is in `choices.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from lora_rt.core.base.choices import PRECISIONS as PRECISIONS
from lora_rt.core.base.choices import Precision as Precision
from lora_rt.core.base.choices import check_device, check_number, described
from lora_rt.core.base.choices import check_precision as check_precision
from lora_rt.core.base.choices import check_wish as check_wish
from lora_rt.errors import LoraRtError


def compute_dtype(precision: Precision) -> torch.dtype:
    """The dtype of activations. int8 computes in float16, to which bitsandbytes casts anyway (and warns)."""
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
    check_device(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        _check_cuda(chosen, precision)
    return chosen


def _check_cuda(device: torch.device, precision: Precision) -> None:
    check_number(str(device), torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if precision in ("bfloat16", "int4") and not torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name(device)
        raise LoraRtError(f"{name} does not compute in bfloat16", next_step="Use --precision float16 or int8")
