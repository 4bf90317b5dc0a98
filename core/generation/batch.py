"""The tensors of a batch of rows of different lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (rows, tokens) int64, so that all rows end in the last column."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def positions_of(mask: Tensor) -> Tensor:
    """The position of each token counted from its row's first real token, (rows, tokens); 0 on padding before it."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
