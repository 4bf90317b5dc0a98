"""Before the first pass: to which scene type a prompt belongs, where the caller did not say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_rt.plugins.contract.facts import BaseFacts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class ScenePrediction:
    """`probabilities[row, i]` of `types[i]`: (batch, types), not negative, each row adds up to 1."""

    types: Sequence[str]
    probabilities: Tensor


Registration = ScenePrediction
"""The name under which modes written for earlier versions know it."""


@dataclass(frozen=True, slots=True)
class SceneContext:
    """The prompts of the rows whose scene type is to be registered.

    `adapter`, `card` and `state` are as in `GateContext`. `hidden` is the base's early hidden state of each token,
    (batch, tokens, hidden), with no adapter applied; `mask` (batch, tokens) is 1 on real tokens and 0 on padding.
    """

    adapter: str
    card: Mapping[str, Any]
    state: Mapping[str, Tensor]
    base: BaseFacts
    hidden: Tensor
    mask: Tensor
