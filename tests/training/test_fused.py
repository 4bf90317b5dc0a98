"""A layer and its adapter as one product have the outputs and the gradients of PEFT, however the base is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_rt.core.base.multiply import SIZES, Product, Way
from lora_rt.core.step.fused import fuse

TOKENS = (3, 7)


class Base(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40, bias=True, dtype=dtype)
        self.second = nn.Linear(40, 16, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return made


def adapted(dtype: torch.dtype, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["first", "second"], lora_dropout=dropout)
    model = get_peft_model(Base(dtype).requires_grad_(False), config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def step(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and all gradients, that of the input too."""
    given = x.clone().requires_grad_()
    y = model(given)
    y.float().square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": given.grad, **grads}


def test_in_float32_outputs_and_gradients_are_pefts_own() -> None:
    plain = adapted(torch.float32)
    fused = copy.deepcopy(plain)
    assert fuse(fused, lambda: False) == 2
    x = torch.randn(*TOKENS, 24)
    one, two = step(plain, x), step(fused, x)
    assert one.keys() == two.keys()
    assert len(one) == 6
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("way", [None, "packed", "dense-wide", "dequantize-wide"])
def test_over_a_base_of_16_bits_they_are_those_of_exact_arithmetic(way: Way | None) -> None:
    narrow = adapted(torch.bfloat16)
    exact = copy.deepcopy(narrow).float()
    for module in [m.get_base_layer() for m in narrow.modules() if hasattr(m, "lora_A")]:
        if way is not None:
            module.forward = Product(module, [way] * len(SIZES))
    assert fuse(narrow, lambda: False) == 2
    x = torch.randn(*TOKENS, 24).bfloat16()
    one, two = step(exact, x.float()), step(narrow, x)
    for name in one:
        apart = (one[name] - two[name].float()).norm() / one[name].norm()
        assert apart < 0.02, name


def test_dropout_acts_on_the_adapter_alone_and_is_the_same_forth_and_back() -> None:
    model = adapted(torch.float32, dropout=0.5)
    assert fuse(model, lambda: False) == 2
    x = torch.randn(*TOKENS, 24)

    def loss(given: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        made: torch.Tensor = model(given).square().sum()
        return made

    given = x.clone().requires_grad_()
    loss(given).backward()  # type: ignore[no-untyped-call]
    assert given.grad is not None
    way = torch.randn_like(x)
    by_hand = (loss(x + 1e-3 * way) - loss(x - 1e-3 * way)) / 2e-3
    assert torch.allclose((given.grad * way).sum(), by_hand, rtol=2e-2)
    assert model.eval()(x).equal(model(x))


def test_a_gate_on_the_rank_axis_is_seen() -> None:
    model = adapted(torch.float32)
    x = torch.randn(*TOKENS, 24)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.lora_A["default"].register_forward_hook(lambda _m, _a, hidden: hidden * 0)
    gate = [True]
    fuse(model, lambda: gate[0])
    with model.disable_adapter():
        base = model(x)
    assert model(x).equal(base)
    gate[0] = False
    assert not model(x).allclose(base)
