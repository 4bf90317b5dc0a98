"""A GGUF file is converted once, tensor for tensor, and one that can't be read is explained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lora_rt.core.base.load import load_base
from lora_rt.core.base.source import BaseError
from lora_rt.registry import home
from support.tiny import HEADS, HIDDEN, LAYERS, VOCAB, Zoo, some_ids

pytestmark = pytest.mark.slow

IDS = some_ids()
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(file: Path, folder: Path, without: str = "") -> Path:
    """The tiny Qwen2 of a folder as llama.cpp would write it, in float32."""
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    tokens = tokenizer.convert_ids_to_tokens(range(VOCAB))
    tokens.append(tokens[8] + tokens[9])
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 8 + [gguf.TokenType.NORMAL] * (VOCAB - 7))
    writer.add_token_merges([f"{tokens[8]} {tokens[9]}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, tensor in model.state_dict().items():
        if name == without:
            continue
        for long, short in NAMES.items():
            name = name.replace(long, short)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def logits(text: str, precision: str) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = load_base(text, precision, "cpu").model(input_ids=IDS).logits
    return found.float()


@pytest.fixture(scope="module")
def qwen(zoo: Zoo) -> Path:
    """A folder whose vocabulary has the one merge that a GGUF tokenizer must have."""
    return zoo.base("qwen2", vocab_size=VOCAB + 1)


def test_a_gguf_file_becomes_the_model_that_it_holds(qwen: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", qwen)
    for precision in ("float32", "int4"):
        assert_close(logits(str(file), precision), logits(str(qwen), precision), atol=1e-5, rtol=0)
    (family,) = (path for path in home.bases().iterdir() if path.name.startswith("tiny-"))
    assert sorted(path.name for path in family.iterdir() if path.is_dir()) == ["float32", "int4"]


def cut(file: Path, folder: Path) -> None:
    write_gguf(file, folder)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


def scribble(file: Path, folder: Path) -> None:
    file.write_bytes(b"GGUF and nothing more")


def leave_out(file: Path, folder: Path) -> None:
    write_gguf(file, folder, without="model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("damage", [cut, scribble, leave_out])
def test_a_gguf_file_that_can_not_be_read_is_refused_and_nothing_kept(
    qwen: Path, tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    file = tmp_path / "broken.gguf"
    damage(file, qwen)
    with pytest.raises(BaseError) as caught:
        load_base(str(file), "int4", "cpu")
    assert "broken.gguf" in caught.value.message
    assert caught.value.next_step
    assert not list(home.bases().rglob("*.safetensors"))
