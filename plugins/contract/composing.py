"""Several adapters: the weights of a mode's terms in one request, and named compositions that a mode decides for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_rt.plugins.contract.facts import AdapterView, BaseFacts, SceneType

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


@dataclass(frozen=True, slots=True)
class MixtureContext:
    """What is to be mixed, before anything is fitted.

    `adapters` and `weights` are those of the static composition that the fit starts from, in one order; `scene_types`
    those that the data names, in the order of the data and without "neutral". `options` are the mode's own, as given to
    `tune`. `hidden(depth)` gives the base's early hidden states after so many blocks (None: a quarter of them) on some
    of the data's tokens, (tokens, hidden), with no adapter applied.
    """

    adapters: Sequence[str]
    weights: Sequence[float]
    scene_types: Sequence[str]
    options: Mapping[str, str]
    base: BaseFacts
    hidden: Callable[[int | None], Tensor]


@dataclass(frozen=True, slots=True)
class Mixture:
    """What is fitted, and kept with the composition.

    `state` are the tensors that `lora_rt_joint_gate` (and `lora_rt_scene`) will read in `composition.state`; those
    through which a gradient leads are fitted, the others stay as they are. Every gate is 1 under the state given here.
    `card` holds whatever else the mode wants to find in `composition.card`: JSON. `hidden_layers` says after how many
    blocks the hooks get the early hidden state: 0 is what the first block is given, the tokens' embeddings, and None a
    quarter of the blocks. `shares` says that a token's gates share out one sum of weights among the adapters: then the
    state is first fitted to what each adapter says alone, which is many times as fast as the fit that follows.
    """

    state: Mapping[str, Tensor]
    card: Mapping[str, Any] = field(default_factory=dict)
    hidden_layers: int | None = None
    shares: bool = False
