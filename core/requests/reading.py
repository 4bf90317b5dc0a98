"""From verified files to an adapter in memory: reads the tensors that the inspection allowed, folds the scaling in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lora_rt.core.engine.bank import ResidentAdapter
from lora_rt.core.engine.stack import Factors
from lora_rt.registry.inspection import InspectedAdapter


def read_adapter(inspected: InspectedAdapter, name: str) -> ResidentAdapter:
    """The factors of every module, B (and a bias) already times alpha/r or alpha/sqrt(r), in float32."""
    factors: dict[str, Factors] = {}
    with safe_open(inspected.weights, framework="pt") as file:
        for module in inspected.modules:
            bias = file.get_tensor(module.bias_key).float() * module.scaling if module.bias_key else None
            # A copy: what safetensors gives is a view of the file, and would change with it.
            a = file.get_tensor(module.a_key).to(torch.float32, copy=True)
            b = file.get_tensor(module.b_key).float() * module.scaling
            factors[module.module] = Factors(a, b, bias)
    card: Mapping[str, Any] = inspected.card.model_dump() if inspected.card else {}
    return ResidentAdapter(name, factors, inspected.mode, card, _state(inspected))


def _state(inspected: InspectedAdapter) -> dict[str, Tensor]:
    if inspected.state is None:
        return {}
    with safe_open(inspected.state, framework="pt") as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  # safe_open is no mapping
