"""bitsandbytes repacks weights in place: what a second model over the same weights shares, and what is its own."""

from __future__ import annotations

import torch

from lora_rt.core.base.random_base import random_base
from lora_rt.core.base.repacking import over_the_same_weights


def test_a_copy_shares_all_but_the_weights_that_are_repacked_and_their_scales() -> None:
    model = random_base("tiny", "int4", "cpu").model
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    repacked, plain = model.model.layers[0].self_attn.q_proj, model.model.layers[1].self_attn.q_proj
    repacked.support_avx512bf16_for_cpu = True
    made = over_the_same_weights(model)
    own, shared = made.model.layers[0].self_attn.q_proj, made.model.layers[1].self_attn.q_proj
    assert own.weight is not repacked.weight
    assert torch.equal(own.weight, repacked.weight)
    assert own.quant_state is own.weight.quant_state
    assert own.quant_state is not repacked.quant_state
    assert (shared.weight, shared.quant_state) == (plain.weight, plain.quant_state)
    assert shared is not plain
    others = [p for p in made.parameters() if p is not own.weight]
    assert all(a is b for a, b in zip(others, (p for p in model.parameters() if p is not repacked.weight), strict=True))
