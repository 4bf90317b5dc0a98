"""A base that trains and speaks (nonsense) in milliseconds: a random Llama of two layers over the 256 bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_rt.core.base.byte_tokenizer import byte_tokenizer

_SPECIAL = ["<|user|>", "<|answer|>", "<|end|>"]
_TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|answer|>{% endif %}"
)


def tiny_base(folder: Path, *, seed: int = 0) -> Path:
    """Write the base (0.5 MB, float32) into `folder` and return that: an ordinary folder of transformers.

    Args:
        folder: made if it is not there.
        seed: of the random weights.
    """
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # large enough that the next token depends on the text
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    """One token per byte, and the three of the chat template."""
    *others, end = _SPECIAL
    tokenizer = byte_tokenizer(_SPECIAL, eos_token=end, pad_token=end, additional_special_tokens=others)
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
