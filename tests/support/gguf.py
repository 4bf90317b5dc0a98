"""Tiny models as GGUF files, and adapters read back: the order of rows is taken from transformers' own GGUF reader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

Arrays = dict[str, npt.NDArray[np.float32]]


def llama_rows(config: Any, tensor: str, rows: int) -> npt.NDArray[np.int64]:
    """Which row of a Llama in transformers is each row in llama.cpp; made by undoing what the reader does."""
    settings = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
    }
    read = LlamaTensorProcessor(settings).process(np.arange(rows)[:, None], f"{tensor}.weight").weights[:, 0]
    return np.argsort(read)


def llama_arrays(model: Any) -> Arrays:
    """A Llama's weights by the names and in the order of llama.cpp."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    found: Arrays = {}
    for key, value in model.state_dict().items():
        name = f"{names[key.removesuffix('.weight')]}.weight"
        array = value.detach().float().numpy()
        found[name] = array[llama_rows(model.config, name.removesuffix(".weight"), len(array))]
    return found


def write_llama(
    path: Path, config: Any, arrays: Arrays, tokens: list[str], *, control: int = 0, template: str = ""
) -> Path:
    """A whole GGUF model in float32, with a vocabulary of tokens of which the last is the last two before it merged.

    The first `control` of them are control tokens.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL] * control + [gguf.TokenType.NORMAL] * (len(tokens) - control)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{tokens[-3]} {tokens[-2]}"])
    if template:
        writer.add_chat_template(template)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, array in arrays.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_deltas(path: Path) -> tuple[Mapping[str, Any], Arrays]:
    """The fields of a GGUF adapter, and the change of each weight tensor, (out, in), as llama.cpp computes it."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    arrays = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    alpha = fields["adapter.lora.alpha"]
    deltas: Arrays = {}
    for name in [key.removesuffix(".lora_a") for key in arrays if key.endswith(".lora_a")]:
        a, b = arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"]
        scale = alpha / b.shape[1] if alpha else 1.0  # llama-adapter.h, get_scale
        deltas[name] = np.float32(scale) * (b @ a)
    assert len(arrays) == 2 * len(deltas)
    return fields, deltas
