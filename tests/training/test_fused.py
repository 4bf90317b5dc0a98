"""Layers with their adapters as one product, and norms, have the outputs and gradients of PEFT and transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_rt.core.multiply.product import Product
from lora_rt.core.multiply.ways import SIZES, Way
from lora_rt.core.step.fused import fuse
from lora_rt.core.step.norms import lean_norms

TOKENS = (3, 7)


class Base(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40, bias=True, dtype=dtype)
        self.second = nn.Linear(40, 16, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return made


class Attention(nn.Module):
    """q, k and v of one input, of which q and v are adapted, and an o of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, width) for width in (24, 8, 24))
        self.o = nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        made: torch.Tensor = self.o(torch.tanh(q) * v * k.sum(-1, keepdim=True))
        return made


def attention(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q", "v", "o"], rank_pattern={"v": 6}, lora_dropout=dropout)
    model = get_peft_model(Attention().requires_grad_(False), config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


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


def test_what_a_fused_layer_gives_may_be_written_into_as_llama_4_does() -> None:
    plain = adapted(torch.float32).base_model.model.first
    fused = copy.deepcopy(plain)
    x = torch.randn(*TOKENS, 24)
    fuse(fused, lambda: False)
    found = []
    for layer in (plain, fused):
        layer(x).mul_(2.0).square().sum().backward()
        found.append(layer.lora_A["default"].weight.grad)
    assert torch.allclose(*found, rtol=1e-4, atol=1e-4)


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


def narrow_products(model: Any, x: torch.Tensor) -> int:
    """Products of a step's forward pass whose result has no more columns than an input's adapters have ranks."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found = []

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default and made.shape[-1] in (4, 6, 10):
                found.append(made.shape)
            return made

    with Count():  # type: ignore[no-untyped-call]
        model(x)
    return len(found)


def test_layers_that_read_one_input_share_one_product_with_a_and_keep_pefts_gradients() -> None:
    plain = attention()
    fused = copy.deepcopy(plain)
    assert fuse(fused, lambda: False) == 3
    x = torch.randn(*TOKENS, 24)
    assert narrow_products(fused, x) == 3  # nothing has shown yet which layers read one input
    with torch.no_grad():
        fused(x)
    assert narrow_products(fused, x) == 2
    one, two = step(plain, x), step(fused, x)
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-5 * one[name].norm(), name


def test_a_layer_that_gets_another_input_than_was_seen_is_made_of_what_it_gets() -> None:
    model = attention()
    x, other = torch.randn(2, *TOKENS, 24)
    inner = model.get_base_model()
    wanted = inner.v(other)
    fuse(model, lambda: False)
    with torch.no_grad():
        model(x)
    inner.q(x)
    assert torch.allclose(inner.v(other), wanted, atol=1e-5)
    inner.q(x)
    x.copy_(other)
    assert torch.allclose(inner.v(x), wanted, atol=1e-5)


def test_dropout_is_drawn_once_for_an_input_and_as_often_as_it_is_told() -> None:
    model = attention(dropout=0.25)
    fuse(model, lambda: False)
    inner = model.get_base_model()
    x = torch.eye(24).repeat(200, 1)  # each row asks for one place
    with torch.no_grad():
        model(x)
    base = {name: getattr(inner, name).get_base_layer()(x) for name in ("q", "v")}
    q, v = inner.q(x), inner.v(x)
    dropped = [(made - base[name]).abs().amax(-1) == 0 for name, made in (("q", q), ("v", v))]
    assert dropped[0].equal(dropped[1])
    assert abs(dropped[0].float().mean() - 0.25) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_have_the_outputs_and_gradients_of_transformers(dtype: torch.dtype) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    plain = LlamaRMSNorm(24, 1e-5)
    nn.init.normal_(plain.weight)
    plain = plain.to(dtype).requires_grad_(False)
    lean = copy.deepcopy(plain)
    assert lean_norms(nn.ModuleList([lean])) == 1
    x = torch.randn(*TOKENS, 24).to(dtype)
    one, two = step(plain.float(), x.float()), step(lean, x)
    for name in one:
        near = 1e-4 if dtype is torch.float32 else 0.02
        assert (one[name] - two[name].float()).norm() <= near * one[name].norm(), name
    assert lean_norms(GemmaRMSNorm(24).requires_grad_(False)) == 0
