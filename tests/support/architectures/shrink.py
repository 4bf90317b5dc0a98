"""The smallest configuration of an architecture that still has all of its kinds of layers."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch

from support.tiny import VOCAB

HIDDEN, MIDDLE, HEADS, GROUPS, HEAD = 64, 128, 4, 2, 16

# The first rule that matches the whole name of a field gives its value; fields that are None, 0 or lists stay.
_RULES: Mapping[str, Any] = {
    r"vocab_size_per_layer_input|(unpadded_|shape_|pronunciation_|task_type_|type_)?vocab_size": VOCAB,
    r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length)": 256,
    r"original_max_position_embeddings|max_target_positions|max_source_positions": 256,
    r"pad_token_id": 0,
    r"bos_token_id|decoder_start_token_id": 1,
    r"eos_token_id|forced_eos_token_id": 2,
    r"(moe_|shared_experts?_|moe_shared_expert_|expert_ffn_hidden_|shared_)(intermediate_)?size": HIDDEN,
    r".*intermediate_size(_mlp)?|.*ffn_dim|.*ffn_hidden_size|ffn_hidden_size|dff|dim_ff|d_inner|n_inner": MIDDLE,
    r"feed_forward_size|dense_intermediate_size": MIDDLE,
    r"hidden_size_per_layer_input|laurel_rank|hc_lowrank|router_hidden_size|o_lora_rank": 32,
    r"ple_embed_dim": HIDDEN,
    r"attention_hidden_size|lru_width": HIDDEN,
    r"hidden_size|d_model|n_embd|emb_dim|embedding_(size|dim)|.*_embedding_size|word_embed_proj_dim": HIDDEN,
    r"dim_model_base": HIDDEN,
    r"num_key_value_heads|num_kv_heads|linear_num_key_heads|swa_num_key_value_heads": GROUPS,
    r"n_heads?|num_heads|.*attention_heads|linear_num(_value)?_heads|num_query_groups": HEADS,
    r"index_n_heads": 4,
    r"(index_|swa_|linear_|linear_key_|linear_value_)?head_dim|dim_head|d_head|kv_channels|attention_head_size": HEAD,
    r"qk_nope_head_dim|v_head_dim": HEAD,
    r"qk_rope_head_dim|d_rel": 8,
    r"qk_head_dim": 24,
    r"rotary_dim": 8,
    r"q_lora_rank|kv_lora_rank": 32,
    r"index_topk": 8,
    r"(num|n|moe_num)_(local_|routed_)?experts": 4,
    r"num_experts_per_tok(en)?|moe_(k|topk)": 2,
    r"(n|num_expert|topk)_groups?": 1,
    r"first_k_dense_replace|num_dense_layers|moe_layer_start_index": 1,
    r"mamba_n_heads|mamba_num_heads|n_mamba_heads": 8,
    r"mamba_d_head|mamba_head_dim|mamba_headdim": 16,
    r"mamba_d_ssm": 128,
    r"mamba_d_state|state_size|ssm_state_size": 16,
    r"mamba_dt_rank|time_step_rank": 8,
    r"mamba_n_?groups|n_groups": 1,
    r"(mamba_)?chunk_size|attention_chunk_size": 16,
    r"sliding_window(_size)?|attention_window_size|local_attention|window_size|keep_window_size": 16,
    r"hidden_size_per_layer_input": 32,
    r"(num_|n_|encoder_|decoder_|num_decoder_|num_encoder_|num_hidden_)?layers?|num_blocks|moe_layer_end_index": 2,
    r"num_layers_per_stack": 1,
    r"num_kv_shared_layers|zero_expert_num": 2,
    r"ngram_vocab_size_base|encoder_hash_byte_group_vocab": 512,
    r"split_ngram_parts": 4,
    r"adapter_rank": 8,
    r"hc_count|hc_mult": 2,
}
# What no rule finds: fields that hang together, and lists that name all kinds of layers of a type.
_EXTRAS: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "dbrx": {
        "attn_config": {"rope_theta": 10_000.0, "kv_n_heads": GROUPS, "clip_qkv": 8},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": HIDDEN, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {
        "num_key_value_heads": HEADS,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": HEAD,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.5, 0.0]},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": HEAD},
    "nemotron": {"num_key_value_heads": GROUPS, "head_dim": HEAD},
    "reformer": {"axial_pos_embds": False},
    "hrm_text": {"num_layers_per_stack": None, "num_hidden_layers": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "xlstm": {"num_heads": 4, "chunk_size": 16, "qk_dim_factor": 1.0},
    "zamba": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HIDDEN // HEADS},
    "zamba2": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HIDDEN // HEADS, "hybrid_layer_ids": [1]},
    "zaya": {"num_experts_per_tok": 1},
}
_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attention_layers")


def tiny_config(kind: str, *, layers: int | None = None) -> Any:
    """The configuration of a model type with sizes of two digits."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind]
    plain = made()
    changes = _changes(plain, layers)
    return made(**changes | dict(_EXTRAS.get(kind, {})))


def _changes(plain: Any, layers: int | None) -> dict[str, Any]:
    fields = plain.to_dict()
    changes: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, bool) or (value is None and not name.endswith("token_id")):
            continue
        if isinstance(value, Mapping) and name.endswith("_config"):
            inner = getattr(plain, name)
            if hasattr(inner, "to_dict"):
                changes[name] = _changes(inner, layers)
            continue
        if isinstance(value, (int, float)) or name.endswith("token_id"):
            found = _rule(name)
            if found is not None and (value or name.endswith("token_id")):
                changes[name] = found
    kinds = {name: fields[name] for name in _LISTS if isinstance(fields.get(name), list) and fields[name]}
    count = max([2, *(len(dict.fromkeys(values)) for values in kinds.values())])
    for name, values in kinds.items():
        own = list(dict.fromkeys(values))
        changes[name] = [own[min(i, len(own) - 1)] for i in range(count)]
    for name in fields:
        if (
            re.fullmatch(
                r"(num_|n_|num_hidden_|encoder_|decoder_|num_decoder_)layers?|num_layers|n_layer|num_blocks", name
            )
            and fields[name]
        ):
            changes[name] = layers or count
    if fields.get("kv_lora_rank") and "num_key_value_heads" in fields:
        changes["num_key_value_heads"] = HEADS  # latent attention has no groups
        if fields.get("head_dim") == fields.get("qk_rope_head_dim"):
            changes["head_dim"] = 8
    if fields.get("num_experts_per_tok", 0) is None:
        changes["num_experts_per_tok"] = 2
    if "head_dim" in fields and fields["head_dim"] is None:
        changes["head_dim"] = HEAD
    if "is_decoder" in fields:
        changes["is_decoder"] = True
    if "tie_word_embeddings" in fields:
        changes["tie_word_embeddings"] = False  # a tied random model says one token for ever
    if "use_mamba_kernels" in fields:
        changes["use_mamba_kernels"] = False
    return changes


@functools.cache
def _rule(name: str) -> Any:
    return next((value for pattern, value in _RULES.items() if re.fullmatch(pattern, name)), None)


def random_model(config: Any, seed: int = 0) -> Any:
    """A model of float32 with random weights of a size at which every layer matters."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * (0.5 if "embed" in name else 1.0 / parameter.shape[-1] ** 0.5))
            else:
                parameter.add_(noise * 0.05)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0  # as some types have it when they are loaded
    return model
