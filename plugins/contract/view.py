"""What hooks see of one adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_rt.plugins.contract.facts import BaseFacts

if TYPE_CHECKING:
    from torch import Tensor


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
