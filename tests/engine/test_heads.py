"""Heads are found by what reaches what: in fused projections, too, a gate for one head acts on that head alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_rt.core.base.roles import roles_of
from lora_rt.core.base.shape import heads_of
from lora_rt.core.engine.bank import AdapterBank
from lora_rt.core.engine.resident import BankError, ResidentAdapter
from lora_rt.core.engine.stack import Factors
from lora_rt.plugins.contract import Gate
from support.architectures.shrink import random_model, tiny_config

IDS = torch.arange(10).view(2, 5) + 8


def adapted(model: Any, *roles: str) -> AdapterBank:
    """A bank with one adapter `one` on the first layer of these roles."""
    bank = AdapterBank(model, torch.float32)
    name = next(site.name for site in bank.topology.sites if set(roles) & set(roles_of(site.name)))
    site = bank.topology.sites[bank.topology.by_name[name]]
    torch.manual_seed(3)
    factors = Factors(torch.randn(4, site.in_features) * 0.3, torch.randn(site.out_features, 4) * 0.3)
    bank.add(ResidentAdapter("one", {name: factors}, "output-only"))
    return bank


def run(model: Any, bank: AdapterBank, gate: Gate | None) -> None:
    plan = bank.plan([{"one": 1.0}], {"one": gate})
    assert plan is not None
    with torch.inference_mode(), plan.running(*IDS.shape):
        model(input_ids=IDS)


@pytest.mark.parametrize("kind", ["phi3", "falcon", "mpt", "gpt_bigcode", "codegen", "bloom", "gpt_neox"])
def test_a_gate_over_a_fused_projection_acts_on_its_heads(kind: str) -> None:
    model = random_model(tiny_config(kind))
    bank = adapted(model, "query")
    heads = heads_of(model.config).queries
    output = next(site.module for site in bank.topology.sites if roles_of(site.name) == ("output",))
    seen: list[Tensor] = []
    handle = output.register_forward_pre_hook(lambda _module, given: seen.append(given[0].reshape(10, heads, -1)))
    run(model, bank, Gate(heads=torch.zeros(heads)))
    several = False
    for head in range(heads):
        run(model, bank, Gate(heads=torch.eye(heads)[head]))
        moved = ((seen[-1] - seen[0]).abs().amax(dim=(0, 2)) > 1e-6).nonzero().flatten().tolist()
        axis = next(
            a for n, a in bank.topology.heads.items() if bank.topology.sites[n].name in bank.residents["one"].factors
        )
        group = {h for h in range(heads) if h // axis.pool == head // axis.pool}
        assert head in moved
        assert set(moved) <= group
        several |= len(moved) > 1
    assert several == (axis.pool > 1)
    handle.remove()


def test_a_gate_for_heads_is_refused_where_there_are_none() -> None:
    model = random_model(tiny_config("mamba"))
    bank = AdapterBank(model, torch.float32)
    site = next(site for site in bank.topology.sites if site.name.endswith("x_proj"))
    factors = Factors(torch.randn(2, site.in_features), torch.randn(site.out_features, 2))
    bank.add(ResidentAdapter("one", {site.name: factors}, "output-only"))
    run(model, bank, Gate(ranks=torch.tensor([0.5])))
    with pytest.raises(BankError, match="this base has none that can be told"):
        run(model, bank, Gate(heads=torch.ones(4)))
