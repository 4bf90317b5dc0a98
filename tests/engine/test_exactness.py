"""The logits under a composition equal those of the dense W + sum_k w_k s_k B_k A_k, which PEFT and torch compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from support.tiny import ARCHITECTURES, MLP, TARGETS, Zoo, dense_logits, peft_model, some_ids, spec

IDS = some_ids(rows=2)
EXACT = {"atol": 1e-4, "rtol": 0.0}
QUICK_FIRST = [ARCHITECTURES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES[1:])]


def check(zoo: Zoo, architecture: str, terms: list[tuple[Path, float]]) -> None:
    runtime = zoo.runtime(architecture)
    for adapter, _ in terms:
        zoo.load(runtime, adapter)
    wanted = dense_logits(zoo.base(architecture), terms, IDS)
    base = dense_logits(zoo.base(architecture), [], IDS)
    assert (wanted - base).abs().max() > 0.05, "the adapters do too little for this test to tell anything"
    assert_close(runtime.logits(IDS, compositions=spec(terms)), wanted, **EXACT)


@pytest.mark.parametrize("architecture", QUICK_FIRST)
def test_a_mix_of_ranks_scalings_targets_and_weights_equals_the_dense_sum(zoo: Zoo, architecture: str) -> None:
    attention, mlp = TARGETS[architecture], MLP[architecture]
    plain = zoo.adapter(architecture, seed=1)
    stabilized = zoo.adapter(architecture, seed=2, r=3, lora_alpha=5, use_rslora=True, targets=[*attention, *mlp])
    patterned = zoo.adapter(
        architecture,
        seed=3,
        targets=[*attention, *mlp],
        rank_pattern={attention[0]: 2, rf"{mlp[0]}": 5},
        alpha_pattern={attention[-1]: 24},
    )
    biased = zoo.adapter(architecture, seed=4, r=4, lora_bias=True, targets=[attention[0], mlp[-1]])
    check(zoo, architecture, [(plain, 0.7), (stabilized, -0.4), (patterned, 1.6), (biased, 1.0)])


@pytest.mark.parametrize("architecture", QUICK_FIRST)
def test_every_single_adapter_equals_peft(zoo: Zoo, architecture: str) -> None:
    runtime = zoo.runtime(architecture)
    everywhere = [*TARGETS[architecture], *MLP[architecture]]
    for options in (
        {"targets": everywhere, "r": 6, "lora_alpha": 3, "seed": 5},
        {"targets": everywhere, "use_rslora": True, "lora_bias": True, "seed": 6},
    ):
        adapter = zoo.adapter(architecture, **options)
        with torch.inference_mode():
            wanted = peft_model(zoo.base(architecture), adapter)(input_ids=IDS).logits
        name = zoo.load(runtime, adapter)
        assert_close(runtime.logits(IDS, compositions=name), wanted, **EXACT)


@pytest.mark.parametrize("weight", [2.5, 1.0, 0.25, -0.5])
def test_one_weight_of_any_size_and_sign_equals_the_dense_sum(zoo: Zoo, weight: float) -> None:
    check(zoo, "llama", [(zoo.adapter("llama", seed=1), weight)])


def test_a_weight_of_zero_is_the_base_bit_for_bit(zoo: Zoo) -> None:
    runtime = zoo.runtime("llama")
    one, other = zoo.adapter("llama", seed=1), zoo.adapter("llama", seed=7)
    zoo.load(runtime, one)
    zoo.load(runtime, other)
    assert torch.equal(runtime.logits(IDS, compositions=spec([(one, 0.0)])), runtime.logits(IDS))
    alone = runtime.logits(IDS, compositions=spec([(one, 0.5)]))
    assert torch.equal(runtime.logits(IDS, compositions=spec([(one, 0.5), (other, 0.0)])), alone)


def test_a_term_that_stands_twice_counts_twice(zoo: Zoo) -> None:
    runtime = zoo.runtime("llama")
    one = zoo.adapter("llama", seed=1)
    zoo.load(runtime, one)
    twice = runtime.logits(IDS, compositions=spec([(one, 0.5), (one, 0.25)]))
    assert_close(twice, runtime.logits(IDS, compositions=spec([(one, 0.75)])), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_of_the_output_head_leaves_the_embedding_alone(zoo: Zoo, architecture: str, tied: bool) -> None:
    changes = {"tie_word_embeddings": tied}
    runtime = zoo.runtime(architecture, **changes)
    adapter = zoo.adapter(architecture, changes=changes, targets=["lm_head"], seed=8)
    zoo.load(runtime, adapter)
    wanted = dense_logits(zoo.base(architecture, **changes), [(adapter, 0.8)], IDS)
    assert_close(runtime.logits(IDS, compositions=spec([(adapter, 0.8)])), wanted, **EXACT)


def test_adapters_of_different_modules_meet_in_one_layer(zoo: Zoo) -> None:
    terms = [
        (zoo.adapter("llama", seed=11, targets=["q_proj"]), 0.9),
        (zoo.adapter("llama", seed=12, targets=["v_proj", "down_proj"], r=2), 1.1),
        (zoo.adapter("llama", seed=13, targets=["k_proj", "q_proj"], r=5), -0.7),
        (zoo.adapter("llama", seed=14, targets=["o_proj"], layers_to_transform=[1]), 2.0),
    ]
    check(zoo, "llama", terms)


@pytest.mark.slow
def test_twelve_adapters_at_once_equal_the_dense_sum(zoo: Zoo) -> None:
    check(zoo, "llama", [(zoo.adapter("llama", seed=20 + n, r=1 + n % 5), 0.1 * (n + 1)) for n in range(12)])


def test_an_adapter_stored_in_bfloat16_is_applied_in_float32(zoo: Zoo, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = zoo.adapter("llama", seed=1)
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({key: t.bfloat16() for key, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    runtime = zoo.runtime("llama", fresh=True)
    name = runtime.load_adapter(str(tmp_path), name="halved")
    wanted = dense_logits(zoo.base("llama"), [(tmp_path, 1.0)], IDS)
    assert_close(runtime.logits(IDS, compositions=name), wanted, **EXACT)
