"""Before the first pass: to which scene type a prompt belongs, where the caller did not say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_rt.plugins.contract.view import AdapterView

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
class SceneContext(AdapterView):
    """The prompts of the rows whose scene type is to be registered.

    `hidden` is the base's early hidden state of each token,
    (batch, tokens, hidden), with no adapter applied; `mask` (batch, tokens) is 1 on real tokens and 0 on padding.
    """

    hidden: Tensor
    mask: Tensor
