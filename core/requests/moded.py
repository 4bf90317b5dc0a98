"""Named compositions with a mode of their own, which decides for their adapters together in every pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from lora_rt.plugins.contract import AdapterView, BaseFacts
from lora_rt.registry.compositions import NamedComposition, NamedCompositions
from lora_rt.registry.errors import StoreError


@dataclass(frozen=True, slots=True, eq=False)
class ModedComposition:
    """One such composition in memory: what its mode's hooks see of it."""

    name: str
    mode: str
    card: Mapping[str, Any]
    state: Mapping[str, Tensor]

    def view(self, base: BaseFacts) -> AdapterView:
        """What its mode's hooks see of it."""
        return AdapterView(self.name, self.card, self.state, base)


def read_moded(named: NamedComposition, compositions: NamedCompositions) -> ModedComposition:
    """A composition with the tensors of its mode.

    Raises:
        StoreError: they are missing, other ones, or no tensors.
    """
    try:
        state = load(compositions.state(named))
    except SafetensorError as error:
        text = f"the tensors of the composition {named.name!r} can't be read: {error}"
        raise StoreError(text, next_step="Tune it again with: lora-rt tune") from error
    return ModedComposition(named.name, named.mode, named.mode_card, state)
