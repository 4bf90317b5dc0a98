"""What a hook may know of the base: numbers and names, never the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SceneType = str | Mapping[str, float] | None
"""The field a scene belongs to: one name, a distribution over names (sums to 1), or None where it is not known."""


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """The base that is in memory.

    `id`, `revision` and `digest` name it (see `lora_rt.registry.card.BaseIdentity`); the counts are those of its
    configuration. `heads` are query heads, `kv_heads` key/value heads (fewer under grouped-query attention).
    """

    id: str
    revision: str | None
    digest: str
    precision: str
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
