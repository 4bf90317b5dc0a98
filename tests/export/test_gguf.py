"""A GGUF adapter changes the base as the composition does: every delta, a merged file, and llama.cpp itself."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lora_rt.core.engine.stack import Factors
from lora_rt.core.export import ExportError
from lora_rt.core.export.gguf import write_gguf_adapter
from support.exports import Export
from support.gguf import llama_arrays, llama_rows, read_deltas, write_llama
from support.tiny import HEADS, VOCAB, Zoo, deltas, dense_logits, dense_model, some_ids

pytestmark = pytest.mark.slow

TOKENS = [f"t{number}" for number in range(VOCAB)]


def wanted(base: Path, terms: Sequence[tuple[Path, float]], module: str) -> torch.Tensor:
    """PEFT's own change of one weight, summed over the terms."""
    found = [weight * deltas(base, adapter)[module][0] for adapter, weight in terms if module in deltas(base, adapter)]
    return torch.stack(found).sum(0)


def test_a_llama_adapter_holds_the_sum_in_the_order_of_llama_cpp(zoo: Zoo, exported: Export, pool: list[Path]) -> None:
    base, terms = zoo.base("llama"), [(pool[0], 0.7), (pool[2], -1.3), (pool[3], 2.0)]
    done = exported(" ".join(f"{path}:{weight}" for path, weight in terms), "gguf")
    fields, found = read_deltas(done.path / "adapter.gguf")
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] == "llama"
    places = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    places |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
    places |= {"ffn_down": "mlp.down_proj"}
    config = dense_model(base, []).config
    assert len(found) == 2 * len(places)
    for name, delta in found.items():
        _, block, leaf, _ = name.split(".")
        change = wanted(base, terms, f"model.layers.{block}.{places[leaf]}")
        ordered = change[torch.from_numpy(llama_rows(config, f"blk.{block}.{leaf}", len(change)))]
        assert_close(torch.from_numpy(delta), ordered, atol=1e-6, rtol=1e-5)


def test_added_to_a_gguf_base_it_speaks_as_the_composition(zoo: Zoo, exported: Export, tmp_path: Path) -> None:
    """transformers' GGUF reader undoes the order of rows; nothing of the product takes part in that."""
    from transformers import AutoModelForCausalLM

    base = zoo.base("llama")
    terms = [(zoo.adapter("llama", seed=1, r=4), 0.7), (zoo.adapter("llama", seed=2, r=6, use_rslora=True), -0.6)]
    done = exported(" ".join(f"{path}:{weight}" for path, weight in terms), "gguf")
    plain = dense_model(base, [])
    arrays = llama_arrays(plain)
    for name, delta in read_deltas(done.path / "adapter.gguf")[1].items():
        arrays[name] = arrays[name] + delta
    write_llama(tmp_path / "merged.gguf", plain.config, arrays, TOKENS)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="merged.gguf", dtype=torch.float32).eval()
    ids = some_ids(rows=2)
    with torch.inference_mode():
        found = merged(input_ids=ids).logits
    assert_close(found, dense_logits(base, terms, ids), atol=1e-4, rtol=0.0)
    assert not torch.allclose(found, plain(input_ids=ids).logits, atol=1e-2)


def llama_cpp() -> str | None:
    """A Python that has llama.cpp: the one that `LLAMA_CPP_PYTHON` names, or this one."""
    if named := os.environ.get("LLAMA_CPP_PYTHON"):
        return named
    return sys.executable if any(importlib.util.find_spec(name) for name in ("llama_cpp", "xllamacpp")) else None


@pytest.mark.skipif(llama_cpp() is None, reason="llama.cpp is not installed (llama-cpp-python, or xllamacpp)")
@pytest.mark.parametrize("chosen", [(0, 1), (0, 2, 4)], ids=["one rank", "several ranks"])
def test_llama_cpp_speaks_as_the_composition(
    zoo: Zoo, exported: Export, pool: list[Path], tmp_path: Path, chosen: tuple[int, ...]
) -> None:
    base = zoo.base("llama")
    terms = [(pool[index], weight) for index, weight in zip(chosen, (0.8, -0.7, 1.5), strict=False)]
    done = exported(" ".join(f"{path}:{weight}" for path, weight in terms), "gguf")
    plain = dense_model(base, [])
    gguf = write_llama(tmp_path / "base.gguf", plain.config, llama_arrays(plain), TOKENS)
    prompts = [some_ids(tokens=7, seed=seed)[0].tolist() for seed in range(3)]
    script, interpreter = Path(__file__).with_name("llama_cpp_run.py"), llama_cpp()
    assert interpreter is not None
    command = [interpreter, str(script), str(gguf), str(done.path / "adapter.gguf"), json.dumps(prompts)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    answer = next(line for line in ran.stdout.splitlines() if line.startswith("ANSWER "))
    found = torch.tensor(json.loads(answer.removeprefix("ANSWER ")))
    composed = dense_logits(base, terms, torch.tensor(prompts))[:, -1].log_softmax(-1)
    assert_close(found, composed, atol=2e-3, rtol=0.0)
    assert not torch.allclose(found, plain(input_ids=torch.tensor(prompts)).logits[:, -1].log_softmax(-1), atol=5e-2)


def test_one_rank_is_its_alpha_and_several_have_none(exported: Export, pool: list[Path]) -> None:
    """llama.cpp divides alpha by each tensor's own rank, and leaves both out where alpha is 0."""
    one = read_deltas(exported(f"{pool[0]}:0.5 {pool[1]}", "gguf").path / "adapter.gguf")[0]
    several = read_deltas(exported(f"{pool[0]} {pool[2]}", "gguf").path / "adapter.gguf")[0]
    assert (one["adapter.lora.alpha"], several["adapter.lora.alpha"]) == (10.0, 0.0)


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3", "gemma", "gpt2", "gpt_neox"])
def test_other_architectures_keep_their_own_order(zoo: Zoo, exported: Export, architecture: str) -> None:
    base, adapter = zoo.base(architecture), zoo.adapter(architecture, seed=3)
    fields, found = read_deltas(exported(f"{adapter}:-0.5", "gguf", architecture).path / "adapter.gguf")
    names = {"mistral": "llama", "gpt_neox": "gptneox"}
    assert fields["general.architecture"] == names.get(architecture, architecture)
    own = deltas(base, adapter)
    assert len(found) == len(own)
    config = dense_model(base, []).config
    leaves = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    leaves |= {"c_attn": "attn_qkv", "c_proj": "attn_output", "query_key_value": "attn_qkv", "dense": "attn_output"}
    for module, (change, _) in own.items():
        leaf = leaves[module.rpartition(".")[2]]
        if "mlp" in module:
            leaf = "ffn_down"
        block = next(part for part in module.split(".") if part.isdigit())
        if architecture == "mistral":
            change = change[torch.from_numpy(llama_rows(config, f"blk.{block}.{leaf}", len(change)))]
        if module.endswith("query_key_value"):  # [q k v] of each head becomes all q, all k, all v
            heads = change.reshape(HEADS, 3, -1, change.shape[1])
            change = torch.cat([heads[:, part].reshape(-1, change.shape[1]) for part in range(3)])
        assert_close(torch.from_numpy(found[f"blk.{block}.{leaf}.weight"]), -0.5 * change, atol=1e-6, rtol=1e-5)


def test_half_precision_is_rounded_once(exported: Export, pool: list[Path]) -> None:
    whole = read_deltas(exported(f"{pool[0]}:0.5", "gguf").path / "adapter.gguf")[1]
    for dtype, error in ((torch.float16, 2**-10), (torch.bfloat16, 2**-7)):
        half = read_deltas(exported(f"{pool[0]}:0.5", "gguf", dtype=dtype).path / "adapter.gguf")[1]
        for name, delta in whole.items():
            assert 0 < np.abs(half[name] - delta).max() <= 2 * error * np.abs(delta).max()


def test_an_unknown_architecture_is_refused_with_the_known_ones(zoo: Zoo, exported: Export, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"gpt_neox, granite, llama.*the base is a opt"):
        exported(str(zoo.adapter("opt")), "gguf", "opt")
    assert list(tmp_path.glob("*export-*")) == []


def test_biases_and_tied_heads_are_refused_with_every_layer(zoo: Zoo, exported: Export, pool: list[Path]) -> None:
    with pytest.raises(ExportError, match="holds no biases, and 3 layers have one") as caught:
        exported(f"{pool[0]} {pool[5]}", "gguf")
    assert "lm_head: it has a bias" in caught.value.problems
    tied = {"tie_word_embeddings": True}
    adapter = zoo.adapter("llama", changes=tied, seed=8, targets=("lm_head", "q_proj"))
    with pytest.raises(ExportError, match="have no place") as caught:
        exported(str(adapter), "gguf", base=zoo.base("llama", **tied))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["lm_head"]


def test_a_layer_that_llama_cpp_does_not_know_is_named(tmp_path: Path) -> None:
    config = SimpleNamespace(
        model_type="qwen2", num_hidden_layers=1, tie_word_embeddings=False, num_attention_heads=4, num_key_value_heads=2
    )
    factors = {f"model.layers.0.{leaf}": Factors(torch.ones(2, 4), torch.ones(4, 2)) for leaf in ("odd", "odder")}
    with pytest.raises(ExportError, match="2 layers") as caught:
        write_gguf_adapter(tmp_path / "x.gguf", factors, config)
    assert ["odd:" in caught.value.problems[0], "odder:" in caught.value.problems[1]] == [True, True]
    assert not (tmp_path / "x.gguf").exists()
