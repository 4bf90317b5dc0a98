"""The product W x of one linear layer on a CPU: how a weight is kept does not say how it has to be multiplied.

    packed             the layer's own forward: bitsandbytes' 4-bit kernel, or torch's product of a 16-bit weight
    dequantize         the weight made dense for every product, which keeps no memory
    dequantize-wide    the same in float32
    dense              a dense copy that is kept
    dense-widened      the same, made float32 for every product
    dense-wide         a dense copy in float32 that is kept
    dense-blocked      the same, in the layout that a processor multiplies a few rows by fastest
    dense-half         a dense copy in float16 that is kept, multiplied in float32
    four-bit           a 4-bit copy that is kept, for a kernel of our own that multiplies in float32
    tiles              a dense weight where it lies, for a kernel of our own that multiplies by AMX
    as-it-lies         the same, for one that multiplies in float32

A dense weight has exactly the numbers that bitsandbytes' own dequantizing gives in the layer's compute dtype, so all
ways multiply the same numbers and differ in rounding alone: `dense` and `dequantize` have the bits of bitsandbytes' own
way on processors without AVX-512 BF16, where it dequantizes too; `dequantize-wide`, `dense-widened` and `dense-wide`
have the same bits as each other in a layer of up to a million numbers (a larger one is cast in slices). The weight
itself, what is hashed and what is saved stay as they are.

A decoding step in one call (`lora_rt.core.forward.whole_step`) multiplies by the 4-bit copy, for every number of rows
for which that is hardly slower than the fastest way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lora_rt.core.base.fused import dequantized
from lora_rt.core.multiply import as_it_lies, blocked, four_bit, half, tiled
from lora_rt.core.multiply.cpu_4bit import Forward, direct_forward

Way = Literal[
    "packed",
    "dequantize",
    "dequantize-wide",
    "dense",
    "dense-widened",
    "dense-wide",
    "dense-blocked",
    "dense-half",
    "four-bit",
    "tiles",
    "as-it-lies",
]
WAYS: tuple[Way, ...] = get_args(Way)

Copy = Literal["narrow", "half", "wide", "blocked", "four-bit"]
"""A copy of a weight: in the dtype that the layer computes in, in float16, float32, that in blocks, or in 4 bits."""

SIZES = (1, 2, 4, 8, 16, 64)
"""The least tokens of each class of products: 1, 2 to 3, 4 to 7, 8 to 15, 16 to 63, and more."""

NARROW = ("dense", "dequantize")
_KEEPS: dict[Way, Copy] = {
    "dense": "narrow",
    "dense-widened": "narrow",
    "dense-wide": "wide",
    "dense-blocked": "blocked",
    "dense-half": "half",
    "four-bit": "four-bit",
}
_SLICE = 1 << 20  # numbers: 4 MiB in float32


def keeps(way: Way) -> Copy | None:
    """The copy that a way needs; None for none."""
    return _KEEPS.get(way)


def kept_in(copy: Copy, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a dense copy of a layer that computes in `dtype`."""
    return {"narrow": dtype, "half": torch.float16}.get(copy, torch.float32)


def nbytes_of(copy: Copy, layer: nn.Linear) -> int:
    """The memory that a copy takes of a layer whose product can be made in other ways."""
    if copy == "four-bit":
        return four_bit.nbytes_of(layer.out_features, layer.in_features)
    computed = computes_in(layer)
    assert computed is not None
    return layer.out_features * layer.in_features * kept_in(copy, computed).itemsize


def computes_in(module: nn.Module) -> torch.dtype | None:
    """The dtype in which a layer on a CPU multiplies, where its product can be made in other ways; else None."""
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or weight.requires_grad or weight.is_inference():
        return None
    if is_4bit(module):
        return module.compute_dtype if _unpacked(weight) else None  # type: ignore[return-value]  # bitsandbytes' own
    return weight.dtype if type(module) is nn.Linear and weight.dtype in (torch.bfloat16, torch.float16) else None


def is_4bit(module: nn.Module) -> bool:
    """Whether it is bitsandbytes' 4-bit layer."""
    return isinstance(module, nn.Linear) and hasattr(module, "support_avx512bf16_for_cpu")


def ways_of(module: nn.Module) -> tuple[Way, ...]:
    """All ways that a layer can be multiplied in."""
    ways: tuple[Way, ...] = WAYS
    if not is_4bit(module):  # its weight is dense as it is
        ways = ("packed", "dequantize-wide", "dense-wide", "dense-blocked", "dense-half", "tiles", "as-it-lies")
    elif computes_in(module) == torch.float32:
        ways = ("packed", "dequantize", "dense", "dense-blocked", "four-bit")
    there: dict[Way, Callable[[], bool]] = {
        "dense-blocked": blocked.are_there,
        "dense-half": half.are_there,
        "four-bit": partial(four_bit.fits, module),
        "tiles": partial(_fits_tiles, module),
        "as-it-lies": partial(_fits_as_it_lies, module),
    }
    return tuple(way for way in ways if way not in there or there[way]())


def _fits_tiles(module: nn.Module) -> bool:
    weight: Any = module.weight
    return not is_4bit(module) and tiled.fits(weight) and tiled.are_there()


def _fits_as_it_lies(module: nn.Module) -> bool:
    weight: Any = module.weight
    return not is_4bit(module) and as_it_lies.fits(weight) and as_it_lies.are_there(weight.dtype)


def slice_of(width: int) -> int:
    """How many outputs of a layer with so many inputs are made at a time where its weight is cast for the product."""
    return max(64, _SLICE // width // 64 * 64)


def widened_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (..., out) of x (..., in) and a weight (out, in) of any dtype, cast to that of x some outputs at a time.

    What is cast stays in the caches, and is memory that the process has: a new page costs more than what is read and
    written there, and the output head of a base takes tens of thousands (a step of sixteen rows: 21 ms for 113).
    """
    step = slice_of(weight.shape[1])
    if weight.dtype == x.dtype or len(weight) <= step:
        return linear(x, weight.to(x.dtype), bias)
    y = x.new_empty(*x.shape[:-1], len(weight))
    for start in range(0, len(weight), step):
        some = slice(start, start + step)
        y[..., some] = linear(x, weight[some].to(x.dtype), None if bias is None else bias[some])
    return y


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a layer as numbers (out, in) in the dtype that it computes in; of a dense layer it is its own."""
    weight: Any = module.weight
    if not is_4bit(module):
        return weight.detach()  # type: ignore[no-any-return]
    state = copy.copy(weight.quant_state)
    state.dtype = module.compute_dtype
    return dequantized(weight.data, state)


def laid_out(weight: Tensor, kind: Copy, computed: torch.dtype) -> Any:
    """A dense weight (out, in) of a layer that computes in `computed`, as products with a copy of this kind read it."""
    if kind == "half":
        return half.in_half(weight.float())
    weight = weight.to(kept_in(kind, computed))
    return blocked.in_blocks(weight) if kind == "blocked" else weight


def is_vector(parameter: Tensor | None, size: int, dtype: torch.dtype) -> bool:
    """Whether a parameter is so many numbers of a dtype in a row, as loops read it."""
    if parameter is None or parameter.shape != (size,) or parameter.dtype is not dtype:
        return False
    return parameter.is_contiguous() and parameter.is_cpu


def packs(module: nn.Module) -> bool:
    """Whether bitsandbytes lays the weight out anew at its first forward, for a kernel of its own."""
    return bool(getattr(module, "support_avx512bf16_for_cpu", False)) and not module.training


def packed_forward(module: nn.Linear, dtype: torch.dtype) -> Forward:
    """The layer's own forward, its weight packed first."""
    with torch.inference_mode(False), torch.no_grad():  # in inference mode it would be packed for that mode alone
        module(torch.zeros(1, module.in_features, dtype=dtype))
    return direct_forward(module)


def _unpacked(weight: Any) -> bool:
    state = getattr(weight, "quant_state", None)
    return state is not None and not getattr(state, "packing_format_for_cpu", False)
