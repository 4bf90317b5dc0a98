"""A caller's own tensors of rows, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_rt.errors import LoraRtError


class BatchError(LoraRtError):
    """Token ids or a mask that the model can't be given."""


def given_batch(input_ids: Any, attention_mask: Any, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A caller's token ids and attention mask as tensors, both (rows, tokens) int64; no mask means no padding.

    Raises:
        BatchError: another shape, or what is no token of this model.
    """
    try:
        ids = torch.as_tensor(input_ids, device=device)
        mask = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask, device=device)
    except (TypeError, ValueError) as error:
        raise BatchError(
            f"input_ids or attention_mask is not a tensor: {error}", next_step="Give (batch, tokens)"
        ) from error
    if ids.dim() != 2 or 0 in ids.shape:
        raise BatchError(f"input_ids has shape {tuple(ids.shape)}", next_step="Give (batch, tokens)")
    if mask.shape != ids.shape:
        text = f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}"
        raise BatchError(text, next_step="Give them the same shape")
    if ids.is_floating_point() or bool(((ids < 0) | (ids >= vocab_size)).any()):
        text = "input_ids holds what is not a token of this base"
        raise BatchError(text, next_step=f"Give whole numbers from 0 to {vocab_size - 1}")
    return ids.long(), mask.long()
