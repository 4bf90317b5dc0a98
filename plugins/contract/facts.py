"""What a hook may know of the base (numbers and names, never the model), of one adapter, and of scene types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

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


@dataclass(frozen=True, slots=True)
class AdapterView:
    """One adapter over one base: the common part of `GateContext`, `SceneContext` and `ComposeContext.view(i)`.

    `adapter` is its (resident) name, `card` its register.json, `state` the tensors of its mode.safetensors (on the
    CPU; each look gives a copy).
    """

    adapter: str
    card: Mapping[str, Any]
    state: Mapping[str, Tensor]
    base: BaseFacts


@dataclass(frozen=True, slots=True)
class ScenePrediction:
    """`probabilities[row, i]` of `types[i]`: (batch, types), not negative, each row adds up to 1."""

    types: Sequence[str]
    probabilities: Tensor


Registration = ScenePrediction
"""The name under which modes written for earlier versions know it."""


@dataclass(frozen=True, slots=True)
class SceneContext(AdapterView):
    """The prompts of the rows whose scene type is to be recognized.

    `hidden` is the base's early hidden state of each token,
    (batch, tokens, hidden), with no adapter applied; `mask` (batch, tokens) is 1 on real tokens and 0 on padding.
    """

    hidden: Tensor
    mask: Tensor
