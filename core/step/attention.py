"""The attention of a training step on a CPU: in float32, where the model computes in 16 bits.

torch's attention kernel for CPUs has a backward pass that is several times slower in bfloat16 and float16 than in
float32: on an AMD EPYC, 8 x 9 heads of 64 took 106 ms at 85 tokens and 1,115 ms at 256, against 35 and 242 ms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAME = "lora_rt_float32_sdpa"


def attend_in_float32(model: Any) -> None:
    """Let a model attend that way from now on; one that does not take attention functions stays as it is."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if inner.dtype not in (torch.bfloat16, torch.float16) or inner.config._attn_implementation != "sdpa":
        return
    if not inner._can_set_attn_implementation():
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    inner.set_attn_implementation(NAME)


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    """transformers' own function for torch's kernel, on float32; query, key and value (rows, heads, tokens, size)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = attention_mask
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    found, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **rest)
    return found.to(query.dtype), weights
