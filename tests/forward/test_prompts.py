"""A pass over a prompt by a decoder's blocks is the model's own: same logits, same cache, all that adapters add."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_rt.core.forward import decoder_prompt, prompt_kernels
from lora_rt.core.forward.causal_lm import CausalLM
from lora_rt.core.runtime import Runtime
from support import decoders
from support.decoders import KINDS, SCALINGS, rope_of, rows_of_text
from support.tiny import MLP, TARGETS, Zoo, config_of, random_model

WIDE = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
NEAR = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of bases as small as these it is not done unless it is asked for; no gradients are wanted."""
    monkeypatch.setenv("LORA_RT_BLOCKS", "1")
    with torch.inference_mode():
        yield


def model_of(kind: str, **changes: Any) -> Any:
    """Heads wide enough for registers of sixteen numbers."""
    return decoders.model_of(kind, **{**WIDE, **({"head_dim": 64} if kind == "qwen3" else {}), **changes})


def read(lm: CausalLM, by_blocks: bool, ends: tuple[int, ...] = (60,), keep: Any = None) -> tuple[Tensor, Tensor]:
    """The logits of passes up to these tokens, one behind the other, where a row is not padded; and all keys."""
    ids, mask, positions = rows_of_text()
    cache, found, start = lm.new_cache(), [], 0
    for end in ends:
        now = slice(start, end)
        logits = lm.forward(ids[:, now], mask[:, :end], positions[:, now], cache=cache, keep=keep, by_blocks=by_blocks)
        seen = mask[:, now] if keep is None else mask[:, now][:, keep if torch.is_tensor(keep) else slice(-keep, None)]
        found.append(logits[seen.bool()])
        start = end
    keys = torch.stack([torch.cat([layer.keys, layer.values], -1) for layer in cache.layers])
    return torch.cat(found), keys.transpose(2, 3)[:, mask[:, : ends[-1]].bool()]


def check_same(lm: CausalLM, **given: Any) -> None:
    assert lm.prompts is not None
    for found, wanted in zip(read(lm, True, **given), read(lm, False, **given), strict=True):
        torch.testing.assert_close(found, wanted, **NEAR)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"rms_norm_eps": 0.1}],
    ids=["grouped", "ungrouped", "tied", "biased", "eps"],
)
def test_a_pass_in_float32_is_the_model_s_own(kind: str, changes: dict[str, Any]) -> None:
    lm = CausalLM(model_of(kind, **changes))
    check_same(lm)
    check_same(lm, ends=(9, 20, 60))
    check_same(lm, keep=1)
    check_same(lm, keep=torch.tensor([3, 58]), ends=(60,))


def test_rows_that_are_not_padded_and_passes_without_a_cache_are_the_same() -> None:
    lm = CausalLM(model_of("llama"))
    assert lm.prompts is not None
    ids = rows_of_text()[0]
    mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1]).expand(len(ids), -1)
    for padded in (False, None, True):
        found, wanted = (lm.forward(ids, mask, positions, padded=padded, by_blocks=one) for one in (True, False))
        torch.testing.assert_close(found, wanted, **NEAR)


def test_a_row_is_read_the_same_alone_and_beside_others() -> None:
    lm = CausalLM(model_of("llama"))
    ids, mask, positions = rows_of_text()
    whole = lm.forward(ids, mask, positions)
    for row in range(len(ids)):
        some = slice(int((mask[row] == 0).sum()), None)
        alone = lm.forward(ids[row : row + 1, some], mask[row : row + 1, some], positions[row : row + 1, some])
        torch.testing.assert_close(whole[row, some], alone[0], **NEAR)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_in_bfloat16_differs_from_the_model_s_own_by_rounding_alone(kind: str) -> None:
    """Both are as far from what float32 gives."""
    exact = read(CausalLM(model_of(kind)), False)[0]
    lm = CausalLM(model_of(kind).to(torch.bfloat16))
    assert lm.prompts is not None
    mine, own = ((read(lm, by_blocks)[0].float() - exact).abs().mean() for by_blocks in (True, False))
    assert mine <= 1.1 * own


@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_between_products_is_what_transformers_makes(
    dtype: torch.dtype, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 the very same numbers, but for a few that lie between two; most processors do not round
    to it themselves, and what LLVM would call there nobody has.
    """
    itself = prompt_kernels.rounds() and rounds
    monkeypatch.setattr(prompt_kernels, "rounds", lambda: itself)
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    dice = torch.Generator().manual_seed(5)
    tokens, heads, size, wide = 37, 3, 64, 96

    def numbers(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=dice) * scale).to(dtype)

    normed, turned, gated = prompt_kernels.kernels(dtype is torch.bfloat16)
    run = decoder_prompt._run
    x, y, weight = numbers(tokens, wide, scale=3), numbers(tokens, wide), numbers(wide)
    norm = LlamaRMSNorm(wide, eps=1e-3)
    norm.weight.data = weight
    total, found = x + y, torch.empty_like(x)
    run(normed, wide, decoder_prompt.bits_of(1e-3), tokens, x, y, weight, found)
    assert torch.equal(x, total)
    check_close(found, norm(total))
    run(normed, wide, decoder_prompt.bits_of(1e-3), tokens, x, None, weight, found)
    assert torch.equal(x, total)
    check_close(found, norm(total))

    gate, up = numbers(tokens, wide, scale=8), numbers(tokens, wide)
    gate[3, 5], up[4, 7], gate[6, 6], gate[7, 7] = float("nan"), float("inf"), 90.0, -90.0
    wanted = torch.nn.functional.silu(gate) * up
    run(gated, wide, 0, tokens, gate, up)
    check_close(gate, wanted)

    query = numbers(tokens, heads * size)
    cos, sin = numbers(tokens, size), numbers(tokens, size)
    by_heads = query.view(1, tokens, heads, size).transpose(1, 2)
    wanted, _ = apply_rotary_pos_emb(by_heads, by_heads, cos[None], sin[None])
    run(turned, heads, size, tokens, query, cos, sin)
    check_close(query.view(1, tokens, heads, size).transpose(1, 2), wanted)


def check_close(found: Tensor, wanted: Tensor) -> None:
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    if found.dtype is torch.bfloat16:
        assert same.float().mean() > 0.995
    torch.testing.assert_close(
        found, wanted, rtol=1e-2 if found.dtype is torch.bfloat16 else 1e-5, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_scaled_rope_is_scaled(scaling: str) -> None:
    check_same(CausalLM(model_of("llama", rope_parameters=rope_of(scaling))))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma", {}),
        ("gpt2", {}),
        ("mistral", {"sliding_window": 8}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"head_dim": 16}),
        ("llama", {"intermediate_size": 90}),
    ],
    ids=["gemma", "gpt2", "window", "gelu", "narrow heads", "odd width"],
)
def test_other_models_are_read_by_their_own_forward(kind: str, changes: dict[str, Any]) -> None:
    model = random_model(config_of(kind, **changes)) if kind in ("gemma", "gpt2") else model_of(kind, **changes)
    assert CausalLM(model).prompts is None


def test_small_bases_are_not_and_nobody_is_who_does_not_want_it_or_lacks_llvmlite(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of("llama")
    assert CausalLM(model).prompts is not None
    for value in ("", "0"):
        monkeypatch.setenv("LORA_RT_BLOCKS", value)
        assert CausalLM(model).prompts is None
    monkeypatch.setenv("LORA_RT_BLOCKS", "1")
    monkeypatch.setattr(prompt_kernels, "kernels", refusing)  # another release of llvmlite, say
    lm = CausalLM(model)
    assert lm.prompts is None
    assert "LORA_RT_BLOCKS=0" in caplog.text  # slower, and said
    assert read(lm, True)[0].isfinite().all()


def refusing(_narrow: bool) -> Any:
    raise RuntimeError("no such intrinsic")


def test_a_model_that_only_has_the_name_of_one_that_is_known_fails_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    own = type(model.model.norm).forward
    monkeypatch.setattr(type(model.model.norm), "forward", lambda norm, x: own(norm, x) * 1.5)
    assert CausalLM(model).prompts is None
    monkeypatch.undo()
    monkeypatch.setenv("LORA_RT_BLOCKS", "1")
    monkeypatch.setattr(decoder_prompt, "_seen", lambda *_given: None)  # padding is looked at
    assert CausalLM(model).prompts is None


def test_who_watches_or_replaces_a_part_of_a_block_gets_all_passes() -> None:
    lm = CausalLM(model_of("llama"))
    block = lm.model.model.layers[1]
    assert lm.prompts is not None
    usual = read(lm, False)[0]
    for module in (lm.model, block, block.self_attn, block.mlp, block.input_layernorm):
        seen: list[str] = []
        hook = module.register_forward_hook(lambda *_, seen=seen: seen.append("after"))
        read(lm, True)
        assert seen
        hook.remove()
    hook = block.mlp.gate_proj.register_forward_hook(lambda _module, _given, output: output * 2)
    changed = read(lm, True)[0]
    torch.testing.assert_close(changed, read(lm, False)[0], **NEAR)
    assert (changed - usual).abs().max() > 0.01
    hook.remove()
    block.mlp.act_fn = torch.nn.ReLU()
    assert torch.equal(read(lm, True)[0], read(lm, False)[0])


def test_who_watches_a_linear_layer_may_keep_what_it_is_given_and_gives() -> None:
    lm = CausalLM(model_of("qwen3"))
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(_module: Any, given: Any, output: Tensor) -> None:
        kept.extend((tensor, tensor.clone()) for tensor in (given[0], output))

    block = lm.model.model.layers[0]
    for layer in (block.self_attn.q_proj, block.mlp.gate_proj, block.mlp.down_proj, lm.model.lm_head):
        layer.register_forward_hook(keep)
    check_same(lm)
    assert kept
    assert all(torch.equal(tensor, then) for tensor, then in kept)


def test_a_layer_that_gives_something_else_is_refused_before_memory_is_torn() -> None:
    lm = CausalLM(model_of("llama"))
    assert lm.prompts is not None
    lm.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _module, _given, output: output[:, :1])
    with pytest.raises(ValueError, match="a layer gives"):
        read(lm, True)


def test_nothing_to_read_or_to_say_is_what_the_model_makes_of_it() -> None:
    lm = CausalLM(model_of("llama"))
    assert lm.prompts is not None
    ids, mask, positions = rows_of_text()
    nothing = torch.empty(0, dtype=torch.long)
    found, wanted = (lm.forward(ids, mask, positions, keep=nothing, by_blocks=one) for one in (True, False))
    assert found.shape == wanted.shape == (5, 0, wanted.shape[-1])
    with pytest.raises(RuntimeError):
        lm.forward(ids[:0], mask[:0], positions[:0])


@pytest.mark.parametrize(("name", "out"), [("mlp.up_proj", 16), ("mlp.gate_proj", 90), ("self_attn.o_proj", 1)])
def test_a_layer_of_another_width_is_refused_before_memory_is_torn(name: str, out: int) -> None:
    lm = CausalLM(model_of("llama"))
    assert lm.prompts is not None
    block = lm.model.model.layers[0]
    block.set_submodule(name, torch.nn.Linear(block.get_submodule(name).in_features, out))
    with pytest.raises((ValueError, RuntimeError), match=r"a layer gives|size of tensor"):
        read(lm, True)


def test_rope_factors_of_another_width_are_refused() -> None:
    lm = CausalLM(model_of("llama"))
    assert lm.prompts is not None
    lm.model.model.rotary_emb.register_forward_hook(lambda _m, _given, out: tuple(part[..., :1] for part in out))
    with pytest.raises(ValueError, match="rope factors"):
        read(lm, True)


def test_an_attention_that_is_chosen_later_and_training_are_the_model_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = CausalLM(model_of("llama", attention_dropout=0.5))
    assert lm.prompts is not None
    assert lm.prompts.can(None)
    monkeypatch.setattr(lm.model.config, "_attn_implementation", "eager")
    assert not lm.prompts.can(None)
    monkeypatch.undo()
    lm.model.train()
    assert not lm.prompts.can(None)


def test_gradients_are_made_by_the_model_s_own_forward() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        lm = CausalLM(model_of("llama"))
        ids, mask, positions = rows_of_text()
        assert lm.forward(ids, mask, positions).requires_grad
    assert "_prompts" not in vars(lm)  # nor is it tried then


@pytest.mark.parametrize(
    "compositions", [["one:0.7 two:0.3"], ["one:0.7", "two:-0.4", "one:0.0", "one:1.5 two:0.2", "two"]]
)
def test_adapters_add_what_they_add_to_the_model_s_own_pass(zoo: Zoo, compositions: list[str]) -> None:
    base = zoo.base("llama", **WIDE)
    with Runtime.load(base, precision="float32") as runtime:
        for seed, name in enumerate(("one", "two")):
            adapter = zoo.adapter("llama", seed=seed, targets=(*TARGETS["llama"], *MLP["llama"]), changes=WIDE)
            runtime.load_adapter(adapter, name)
        lm, (ids, mask, positions) = runtime.parts.lm, rows_of_text()
        plan = runtime.plan([[8]] * 5, compositions * (5 if len(compositions) == 1 else 1))
        assert lm.prompts is not None
        found, wanted, bare = (
            lm.forward(ids, mask, positions, plan=one, by_blocks=by_blocks)[mask.bool()]
            for one, by_blocks in ((plan, True), (plan, False), (None, True))
        )
    torch.testing.assert_close(found, wanted, **NEAR)
    assert (found - bare).abs().max() > 0.01


@pytest.mark.slow
def test_no_numba_is_loaded_for_it() -> None:
    """To import it takes half a second, and a first token comes before the first step."""
    import subprocess

    code = (
        "import sys, torch\n"
        "from lora_rt.core.forward.causal_lm import CausalLM\n"
        "from lora_rt.core.forward import prompt_kernels\n"
        "prompt_kernels.kernels(True)\n"
        "print('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("processor", ["haswell", "znver3", "skylake-avx512"])
def test_other_processors_call_nothing_that_nobody_has(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What LLVM can't make of instructions it calls by a name, and one that is unknown is called at address 0."""
    from llvmlite import binding, ir

    from lora_rt.core.native.machine_code import shared_by_threads

    monkeypatch.setattr(prompt_kernels, "rounds", lambda: False)
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    try:
        target = binding.Target.from_triple("x86_64-unknown-linux-gnu")
    except RuntimeError:
        pytest.skip("LLVM makes no code for such processors here")
    machine = target.create_target_machine(cpu=processor, features="", opt=3)
    for narrow in (True, False):
        module = ir.Module("prompt")
        for made in (prompt_kernels._normed, prompt_kernels._turned, prompt_kernels._gated):
            shared_by_threads(module, prompt_kernels._part(module, made.__name__, narrow, made), 1, made.__name__[1:])
        module.triple = machine.triple
        code = machine.emit_assembly(binding.parse_assembly(str(module)))
        assert "normed" in code
        assert "bf2" not in code  # __truncsfbf2 and its like
        assert "expf" not in code
