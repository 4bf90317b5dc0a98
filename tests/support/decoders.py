"""What the tests of a decoder's passes share: small models, rows of which some are padded, ropes that are scaled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from support.tiny import config_of, random_model

KINDS = ("llama", "mistral", "qwen2", "qwen3")
SCALINGS = ("llama3", "linear", "yarn")
CHANGES: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}}


def model_of(kind: str, **changes: Any) -> Any:
    """A random model in float32 whose norms are not all 1."""
    with torch.inference_mode(False):
        model = random_model(config_of(kind, **{**CHANGES.get(kind, {}), **changes}))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data += torch.randn_like(parameter) * 0.1
    return model


def rows_of_text(rows: int = 5, tokens: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions (rows, tokens); of several rows two are padded."""
    ids = torch.randint(8, 260, (rows, tokens), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, :7] = 0
        mask[-1, :2] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def rope_of(scaling: str) -> dict[str, Any]:
    """The parameters of a scaled rope."""
    rope: dict[str, Any] = {"rope_type": scaling, "rope_theta": 10000.0, "factor": 4.0}
    if scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    if scaling == "yarn":
        rope |= {"original_max_position_embeddings": 32}
    return rope
