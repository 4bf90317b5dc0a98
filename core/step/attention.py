"""The attention of a training step: of packed rows each to itself; on a CPU in float32, where the model has 16 bits.

torch's attention kernel for CPUs has a backward pass that is several times slower in bfloat16 and float16 than in
float32: on an AMD EPYC, 8 x 9 heads of 64 took 106 ms at 85 tokens and 1,115 ms at 256, against 35 and 242 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_rt.core.base.shape import ForwardPass, device_of, pad_right, vocabulary_of
from lora_rt.core.base.upstream import attention_of, can_attend_otherwise
from lora_rt.core.step.packing import NAME as PACKING
from lora_rt.core.step.packing import Packing

NAME = "lora_rt_float32_sdpa"
BY_ROWS = "lora_rt_sdpa_by_rows"
_TRIED = (
    ((3, 5, 7, 11, 13, 17), (3, 5, 19, 23)),
    ((3, 5, 29, 31, 37, 41), (3, 5, 19, 23)),
)  # their second rows are alike
_FAR = 0.05  # of a logit's size: more than what rounding changes in 16 bits


def attend_in_float32(model: Any) -> None:
    """Let a model attend that way from now on; one that does not take attention functions stays as it is."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if inner.dtype not in (torch.bfloat16, torch.float16) or attention_of(inner.config) != "sdpa":
        return
    if not can_attend_otherwise(inner):
        return
    _use(inner, NAME, _attend)


def attend_by_rows(model: Any, longest: int) -> bool:
    """Let a model take packed rows from now on; whether it can, which is tried. If not, it stays as it is.

    To be called behind `attend_in_float32`.

    Args:
        model: a causal model, with PEFT's around it or not; in train mode or not, which is kept.
        longest: the tokens of the longest row to come; no window of attention may be narrower.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    text, before, training = (
        inner.config.get_text_config(decoder=True),
        attention_of(inner.config),
        model.training,
    )
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    forward = ForwardPass.of(model)
    if before not in ("sdpa", NAME) or any(window is not None and window < longest for window in windows):
        return False
    if not (forward.takes_positions and forward.takes_columns and can_attend_otherwise(inner)):
        return False
    able = False
    _use(inner, BY_ROWS, _attend_by_rows)
    try:
        with torch.no_grad():
            able = _keeps_packed_rows_apart(model.eval(), forward)
    finally:
        model.train(training)
        if not able:
            inner.set_attn_implementation(before)
    return able


def _use(inner: Any, name: str, attend: Callable[..., tuple[Tensor, None]]) -> None:
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    inner.set_attn_implementation(name)


def _keeps_packed_rows_apart(model: Any, forward: ForwardPass) -> bool:
    """Whether packed rows have the logits of padded ones, and no bit of them depends on the other rows."""
    device, vocabulary = device_of(model), vocabulary_of(model.config)
    found = []
    try:
        for rows in _TRIED:
            ids, mask = pad_right([[token % vocabulary for token in row] for row in rows], device)
            packing = Packing.of({"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)})
            found.append(model(**packing.arguments(forward)).logits[0])
        alone = model(**forward.arguments(ids[1:, :4], mask[1:, :4])).logits[0, :-1]
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError):  # it takes no such arguments
        return False
    one, two = (logits[-3:] for logits in found)  # those of the second row
    return torch.equal(one, two) and bool((one - alone).float().norm() <= _FAR * alone.float().norm())


def _attend_by_rows(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    """Of a packed row (1, heads, tokens, size), or of rows as they are."""
    packing: Packing | None = rest.pop(PACKING, None)
    if packing is None:
        return _attend(module, query, key, value, attention_mask, **rest)
    query, key, value = (packing.unpacked(x) for x in (query, key, value))
    found, weights = _attend(module, query, key, value, None, **rest)
    return packing.packed(found), weights


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    """transformers' own function for torch's kernel, on a CPU on float32; all three (rows, heads, tokens, size)."""
    if not query.is_cpu:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)  # type: ignore[no-any-return]
    mask = attention_mask
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    found, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **rest)
    return found.to(query.dtype), weights
