"""A step by a decoder's blocks is the model's own step: same logits, same cache, everything that adapters add."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_rt.core.forward import decoder
from lora_rt.core.forward.causal_lm import CausalLM
from lora_rt.core.native import compiled
from lora_rt.core.runtime import Runtime
from lora_rt.plugins.contract import Gate
from support.decoders import CHANGES, KINDS, SCALINGS, model_of, rope_of, rows_of_text
from support.tiny import MLP, TARGETS, Zoo

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not compiled.is_there(), reason="numba is not installed"),
]


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of bases as small as these it is not done unless it is asked for; as in every step there are no gradients."""
    monkeypatch.setenv("LORA_RT_BLOCKS", "1")
    with torch.inference_mode():
        yield


def steps(lm: CausalLM, by_blocks: bool, first: int = 9) -> Tensor:
    """The logits of all steps behind the first tokens, (rows, steps, vocab)."""
    ids, mask, positions = rows_of_text()
    cache = lm.new_cache()
    lm.forward(ids[:, :first], mask[:, :first], positions[:, :first], cache=cache, keep=1)
    found = [
        lm.forward(ids[:, n - 1 : n], mask[:, :n], positions[:, n - 1 : n], cache=cache, keep=1, by_blocks=by_blocks)
        for n in range(first + 1, ids.shape[1] + 1)
    ]
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 4}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"rms_norm_eps": 0.1}],
    ids=["grouped", "ungrouped", "tied", "biased", "eps"],
)
def test_a_step_in_float32_is_the_model_s_own(kind: str, changes: dict[str, Any]) -> None:
    lm = CausalLM(model_of(kind, **changes))
    assert lm.blocks is not None
    torch.testing.assert_close(steps(lm, True), steps(lm, False), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_bfloat16_differs_from_the_model_s_own_by_rounding_alone(kind: str) -> None:
    """Both are as far from what float32 gives."""
    exact = steps(CausalLM(model_of(kind)), False)
    lm = CausalLM(model_of(kind).to(torch.bfloat16))
    assert lm.blocks is not None
    mine, own = ((steps(lm, by_blocks).float() - exact).abs().mean() for by_blocks in (True, False))
    assert mine <= 1.1 * own


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_scaled_rope_is_scaled(scaling: str) -> None:
    lm = CausalLM(model_of("llama", rope_parameters=rope_of(scaling)))
    assert lm.blocks is not None
    torch.testing.assert_close(steps(lm, True), steps(lm, False), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("gemma", {}), ("gpt2", {}), ("mistral", {"sliding_window": 8}), ("llama", {"hidden_act": "gelu"})],
)
def test_other_models_are_stepped_by_their_own_forward(kind: str, changes: dict[str, Any]) -> None:
    assert CausalLM(model_of(kind, **changes)).blocks is None


def test_a_model_that_only_has_the_name_of_one_that_is_known_fails_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    for block in model.model.layers:  # as an upgrade of transformers might
        norm = block.post_attention_layernorm
        norm.forward = lambda x, own=norm.forward: own(x) * 1.5
    assert CausalLM(model).blocks is None
    with torch.inference_mode(False):
        model = model_of("llama")
    own = type(model.model.norm).forward
    monkeypatch.setattr(type(model.model.norm), "forward", lambda norm, x: own(norm, x) * 1.5)
    assert CausalLM(model).blocks is None
    monkeypatch.undo()
    monkeypatch.setenv("LORA_RT_BLOCKS", "1")
    model.model.layers[0].self_attn.scaling *= 2
    assert CausalLM(model).blocks is not None  # what the model itself reads is read


def test_small_bases_are_not_and_nobody_is_who_does_not_want_it_or_lacks_numba(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of("llama")
    assert CausalLM(model).blocks is not None
    for value in ("", "0"):
        monkeypatch.setenv("LORA_RT_BLOCKS", value)
        assert CausalLM(model).blocks is None
    monkeypatch.setenv("LORA_RT_BLOCKS", "1")
    monkeypatch.setattr(compiled, "is_there", lambda: False)
    assert CausalLM(model).blocks is None
    monkeypatch.undo()
    monkeypatch.setenv("LORA_RT_BLOCKS", "1")
    monkeypatch.setitem(sys.modules, "lora_rt.core.forward.kernels", None)  # numba says that numpy is too new, say
    monkeypatch.delattr("lora_rt.core.forward.kernels", raising=False)
    lm = CausalLM(model)
    assert lm.blocks is None
    assert "LORA_RT_BLOCKS=0" in caplog.text  # slower, and said
    assert steps(lm, True).isfinite().all()


def test_who_watches_or_replaces_a_part_of_a_block_gets_all_steps() -> None:
    lm = CausalLM(model_of("llama"))
    seen: list[str] = []
    block = lm.model.model.layers[1]
    assert lm.blocks is not None
    assert lm.blocks.can(lm.new_cache())
    for module in (lm.model, lm.model.model, block, block.self_attn, block.mlp, block.input_layernorm):
        hook = module.register_forward_hook(lambda *_: seen.append("after"))
        assert not lm.blocks.can(lm.new_cache())
        hook.remove()
        hook = module.register_forward_pre_hook(lambda *_: seen.append("before"))
        assert not lm.blocks.can(lm.new_cache())
        hook.remove()
    usual = steps(lm, False)
    hook = block.mlp.register_forward_hook(lambda _module, _given, output: output * 2)
    assert (steps(lm, True) - usual).abs().max() > 0.01
    hook.remove()
    hook = block.mlp.gate_proj.register_forward_hook(lambda _module, _given, output: output * 2)
    changed = steps(lm, True)
    torch.testing.assert_close(changed, steps(lm, False), atol=2e-5, rtol=1e-4)
    assert (changed - usual).abs().max() > 0.01
    hook.remove()
    assert lm.blocks.can(lm.new_cache())
    hook = block.register_forward_hook(decoder.silent(lambda *_: None))
    assert lm.blocks.can(lm.new_cache())
    hook.remove()


def test_it_may_be_asked_for_where_gradients_are_made_and_does_not_make_any() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        lm = CausalLM(model_of("llama"))
        assert lm.blocks is not None
        assert not lm.blocks.can(lm.new_cache())
        assert steps(lm, True).requires_grad
    assert lm.blocks.can(lm.new_cache())


def test_a_row_without_a_number_does_not_touch_the_others() -> None:
    lm = CausalLM(model_of("llama"))
    assert lm.blocks is not None
    ids, mask, positions = rows_of_text()
    caches = [lm.new_cache() for _ in range(2)]
    for cache in caches:
        lm.forward(ids[:, :9], mask[:, :9], positions[:, :9], cache=cache, keep=1)
    caches[1].layers[0].keys[2, 0, 4] = float("nan")
    clean, found = (lm.blocks(ids[:, 9:10], positions[:, 9:10], mask[:, :10], cache) for cache in caches)
    assert found[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], clean[others])


def test_a_mask_of_another_width_than_the_cache_is_refused() -> None:
    lm = CausalLM(model_of("llama"))
    assert lm.blocks is not None
    ids, mask, positions = rows_of_text()
    cache = lm.new_cache()
    lm.forward(ids[:, :9], mask[:, :9], positions[:, :9], cache=cache, keep=1)
    with pytest.raises(ValueError, match="5, 11"):
        lm.blocks(ids[:, 9:10], positions[:, 9:10], mask[:, :11], cache)
    with pytest.raises(ValueError, match="1, 10"):
        lm.blocks(ids[:, 9:10], positions[:, 9:10], mask[:1, :10], cache)
    assert cache.get_seq_length() == 9


def test_the_exponential_of_the_loops_is_that_of_numpy() -> None:
    import numpy as np

    from lora_rt.core.forward.kernels import silu_gated

    x = np.linspace(-86, 87, 500_001, dtype=np.float32)[None, None]
    out, wide = np.empty_like(x), np.empty_like(x)
    silu_gated(x, np.ones_like(x), out, wide)
    wanted = x.astype(np.float64) / (1 + np.exp(-x.astype(np.float64)))
    assert np.abs(out - wanted).max() < 1e-5
    assert (np.abs(out - wanted) <= 1e-6 * np.abs(wanted)).all()
    x[..., 7] = np.nan
    silu_gated(x, np.ones_like(x), out, wide)
    assert np.isnan(out).nonzero()[2].tolist() == [7]


def test_blocks_that_differ_in_size_are_not_stepped_so() -> None:
    model = model_of("llama")
    with torch.inference_mode(False):
        wide = model_of("llama", intermediate_size=192)
    model.model.layers[1].mlp = wide.model.layers[1].mlp
    assert CausalLM(model).blocks is None


def test_what_is_replaced_after_the_trial_is_not_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    def other() -> CausalLM:
        with torch.inference_mode(False):
            lm = CausalLM(model_of("llama"))
        assert lm.blocks is not None
        return lm

    lm = other()
    lm.model.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    assert torch.equal(steps(lm, True), steps(lm, False))
    lm = other()
    lm.model.model.layers[0] = other().model.model.layers[0]
    assert torch.equal(steps(lm, True), steps(lm, False))
    lm = other()
    attention = lm.model.model.layers[0].self_attn
    attention.q_norm = torch.nn.Identity()  # which a model of this kind does not have, and its own forward passes by
    assert not lm.blocks.can(lm.new_cache())  # type: ignore[union-attr]
    lm = other()
    lm.model.to(torch.bfloat16)
    assert torch.equal(steps(lm, True), steps(lm, False))
    lm = other()
    kind = type(lm.model.model.layers[0].self_attn)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *given, **named: own(*given, **named))
    assert not lm.blocks.can(lm.new_cache())  # type: ignore[union-attr]
    assert CausalLM(lm.model).blocks is None  # a window that it may have is not seen in so few tokens
    monkeypatch.undo()


def test_who_watches_a_linear_layer_may_keep_what_it_is_given_and_gives() -> None:
    lm = CausalLM(model_of("qwen3"))
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(_module: Any, given: Any, output: Tensor) -> None:
        kept.extend((tensor, tensor.clone()) for tensor in (given[0], output))

    block = lm.model.model.layers[0]
    for layer in (block.self_attn.q_proj, block.mlp.down_proj, lm.model.lm_head):
        layer.register_forward_hook(keep)
    steps(lm, True)
    assert lm.blocks is not None
    assert kept
    assert all(torch.equal(tensor, then) for tensor, then in kept)


def test_a_hook_at_the_first_look_does_not_decide_for_ever_and_one_for_all_modules_counts() -> None:
    lm = CausalLM(model_of("llama"))
    hook = lm.model.model.layers[0].register_forward_hook(lambda *_: None)
    assert lm.blocks is None
    hook.remove()
    assert lm.blocks is not None
    assert lm.blocks.can(lm.new_cache())
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not lm.blocks.can(lm.new_cache())
    hook.remove()


def test_the_default_dtype_of_others_is_nothing_to_it() -> None:
    lm, usual = CausalLM(model_of("llama")), CausalLM(model_of("llama"))
    assert lm.blocks is not None
    wanted = steps(usual, False)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = steps(lm, True)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def answers(runtime: Runtime, specs: list[str | None], **settings: Any) -> list[list[int]]:
    prompts = ["ab" * (3 + 2 * n) for n in range(len(specs))]
    rows = runtime.rows(prompts, specs, max_new_tokens=12, min_new_tokens=12, **settings)
    batch = runtime.batch()
    batch.add(rows[:-1])
    for _ in range(3):
        batch.step()
    batch.add(rows[-1:])
    while batch.rows:
        batch.step()
    return [row.answer for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_says_what_it_says_by_the_model_s_own_forward(
    zoo: Zoo, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    everywhere = [*TARGETS[kind], *MLP[kind]]
    with torch.inference_mode(False):
        adapters = [
            zoo.adapter(kind, seed=1, targets=everywhere),
            zoo.adapter(kind, seed=2, targets=["q_proj", "down_proj"], r=3, use_rslora=True),
            zoo.adapter(kind, seed=3, targets=everywhere, r=4, lora_bias=True),
            zoo.adapter(kind, seed=4, targets=["v_proj", "up_proj"], use_dora=True),
            zoo.adapter(kind, seed=5, targets=["embed_tokens", "lm_head", "o_proj"]),
        ]
    many: list[str | None] = [
        f"{adapters[0].name}:0.7 {adapters[1].name}:-0.4",
        f"{adapters[2].name}:1.3",
        None,
        f"{adapters[3].name}:0.8 {adapters[0].name}:0.2",
        f"{adapters[4].name}:0.5 {adapters[1].name}:0.5",
        f"{adapters[0].name}",
    ]
    found = []
    for value in ("1", "0"):
        monkeypatch.setenv("LORA_RT_BLOCKS", value)
        with torch.inference_mode(False), zoo.runtime(kind, fresh=True, **CHANGES.get(kind, {})) as runtime:
            for adapter in adapters:
                runtime.load_adapter(str(adapter), adapter.name)
            asked = [many, many[:2], [many[5]], [many[3]], [f"{adapters[n % 2].name}:0.{n}" for n in range(1, 10)]]
            found.append([answers(runtime, specs) for specs in asked])
    assert found[0] == found[1]
    assert len({tuple(row) for row in found[0][0]}) > 1


def test_gates_of_ranks_and_heads_act_in_a_step(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = zoo.adapter("llama", seed=1, targets=[*TARGETS["llama"], *MLP["llama"]])
    for gate in (Gate(ranks=torch.rand(2, 1, 1, 8)), Gate(heads=torch.rand(2, 1, 1, 4)), Gate(ranks=torch.tensor(0.3))):
        found = []
        for value in ("1", "0"):
            monkeypatch.setenv("LORA_RT_BLOCKS", value)
            with torch.inference_mode(False), zoo.runtime("llama", fresh=True) as runtime:
                runtime.load_adapter(str(adapter), "one")
                lm, bank = runtime.parts.lm, runtime.parts.bank
                assert (lm.blocks is not None) == (value == "1")
                plan = bank.plan([{"one": 0.9}], {"one": gate})
                ids, mask, positions = rows_of_text(3, 20)
                cache = lm.new_cache()
                with torch.inference_mode():
                    lm.forward(ids[:, :9], mask[:, :9], positions[:, :9], plan=plan, cache=cache, keep=1)
                    found += [
                        lm.forward(
                            ids[:, n - 1 : n], mask[:, :n], positions[:, n - 1 : n], plan=plan, cache=cache, keep=1
                        )
                        for n in range(10, 21)
                    ]
        half = len(found) // 2
        for one, other in zip(found[:half], found[half:], strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
