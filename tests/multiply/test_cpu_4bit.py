"""The short way to the 4-bit kernel: the same bits as bitsandbytes' own layer, or that layer's own way."""

from __future__ import annotations

import ctypes

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from lora_rt.core.multiply import cpu_4bit
from lora_rt.core.multiply.cpu_4bit import direct_forward
from support.features import lacks

packs = bnb.functional.has_avx512bf16()
needs_packing = pytest.mark.skipif(not packs, reason=lacks("AVX-512 BF16"))


def layer(out_features: int = 64, in_features: int = 128, bias: bool = False, quant_type: str = "nf4") -> nn.Module:
    torch.manual_seed(0)
    made = bnb.nn.Linear4bit(
        in_features, out_features, bias=bias, compute_dtype=torch.bfloat16, quant_type=quant_type
    ).to("cpu")
    made.eval()
    with torch.no_grad():
        made(torch.zeros(1, in_features, dtype=torch.bfloat16))
    return made


def given(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


@needs_packing
@pytest.mark.parametrize("shape", [(128,), (1, 128), (3, 128), (2, 5, 128), (1, 70, 128)])
def test_the_short_way_gives_the_same_bits(shape: tuple[int, ...]) -> None:
    module = layer()
    short = direct_forward(module)
    assert short is not module.forward, "the short way was not taken"
    with torch.no_grad():
        assert torch.equal(short(given(*shape)), module(given(*shape)))


@needs_packing
def test_inputs_that_the_kernel_does_not_take_go_the_layer_s_own_way() -> None:
    module = layer()
    short = direct_forward(module)
    with torch.no_grad():
        for x in (given(2, 128).float(), given(128, 2).t(), given(2, 256)[:, ::2]):
            assert torch.equal(short(x), module(x))


@needs_packing
def test_a_weight_that_is_unpacked_for_a_state_dict_is_packed_again_and_goes_the_short_way_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = layer()
    long: list[int] = []
    own = module.forward

    def counted(x: Tensor) -> Tensor:
        long.append(1)
        result: Tensor = own(x)
        return result

    monkeypatch.setattr(module, "forward", counted)
    short = direct_forward(module)
    with torch.no_grad():
        wanted = short(given(2, 128))
        long.clear()
        module.state_dict()
        for _ in range(3):
            assert torch.equal(short(given(2, 128)), wanted)
    assert len(long) == 1


@pytest.mark.parametrize("other", [nn.Linear(128, 64), layer(bias=True), layer(quant_type="fp4")])
def test_other_layers_keep_their_own_forward(other: nn.Module) -> None:
    assert direct_forward(other) == other.forward


@needs_packing
def test_a_kernel_that_answers_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    # One that wrote nothing would answer with what the memory held before, which may be right.
    monkeypatch.setattr(cpu_4bit, "_kernel", lambda: lambda *given: ctypes.memset(given[6], 0xFF, 2))
    module = layer()
    assert direct_forward(module) == module.forward


@needs_packing
def test_a_build_without_the_kernel_is_served_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_4bit, "_KERNEL", "no_such_symbol")
    module = layer()
    assert direct_forward(module) == module.forward


@needs_packing
def test_a_weight_that_is_replaced_is_the_one_that_counts() -> None:
    module = layer()
    short = direct_forward(module)
    torch.manual_seed(7)
    other = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu").eval()
    with torch.no_grad():
        other(given(1, 128))
        before = short(given(2, 128))
        module.weight = other.weight
        assert torch.equal(short(given(2, 128)), other(given(2, 128)))
        assert not torch.equal(short(given(2, 128)), before)
