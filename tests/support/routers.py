"""The state of a random router."""

from __future__ import annotations

import torch
from torch import Tensor

from support.tiny import HIDDEN


def router_state(adapters: int = 2, groups: int = 1, hidden: int = HIDDEN, seed: int = 0) -> dict[str, Tensor]:
    """A random router; its map is large enough that tokens differ."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "map": torch.randn(groups, adapters, hidden + 1, generator=generator),
        "total": torch.randn(groups, generator=generator) / 4,
        "mean": torch.randn(hidden, generator=generator) / 20,
        "spread": torch.rand(hidden, generator=generator) / 10 + 0.05,
    }
