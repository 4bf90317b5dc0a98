"""Per request: the weights of a mode's terms, given the whole request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_rt.plugins.contract.facts import BaseFacts, SceneType
from lora_rt.plugins.contract.view import AdapterView

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TermFacts:
    """One term of the request: the resident name, the weight that the user gave, its mode and its register.json.

    `state` are the tensors of its mode.safetensors.
    """

    name: str
    weight: float
    mode: str
    card: Mapping[str, Any]
    state: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ComposeContext:
    """One row of a request. `mine` are the indices in `terms` of the terms whose weights this mode decides."""

    terms: Sequence[TermFacts]
    mine: Sequence[int]
    prompt: str | None
    scene_type: SceneType
    base: BaseFacts

    def view(self, index: int) -> AdapterView:
        """The adapter of one term, as the other hooks see it."""
        term = self.terms[index]
        return AdapterView(term.name, term.card, term.state, self.base)
