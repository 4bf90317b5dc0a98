"""The engine alone, over a tiny model: a bank, and logits under plans, without prompts, modes or a runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_rt.core.base.shape import positions_of
from lora_rt.core.engine.bank import AdapterBank
from lora_rt.core.engine.plan import Plan
from lora_rt.core.engine.resident import ResidentAdapter
from lora_rt.core.forward.causal_lm import CausalLM
from lora_rt.core.requests.reading import read_adapter
from lora_rt.plugins.contract import Gate
from lora_rt.registry.inspection import inspect_adapter


class Engine:
    """One model and its bank. `add` makes an adapter resident under its folder's name."""

    def __init__(self, base: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.bank = AdapterBank(self.model, torch.float32)
        self.lm = CausalLM(self.model)

    def read(self, adapter: Path) -> ResidentAdapter:
        shapes = self.bank.topology.shapes
        return read_adapter(inspect_adapter(adapter, name=adapter.name, linears=shapes, load=True), adapter.name)

    def add(self, *adapters: Path) -> None:
        for adapter in adapters:
            self.bank.add(self.read(adapter))

    def plan(
        self, weights: Mapping[str, float] | Sequence[Mapping[str, float]], gates: Mapping[str, Gate] | None = None
    ) -> Plan | None:
        return self.bank.plan([weights] if isinstance(weights, Mapping) else weights, gates)

    def logits(self, ids: Tensor, plan: Plan | None, columns: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            return self.lm.forward(ids, mask, positions_of(mask), plan=plan, keep=columns)
