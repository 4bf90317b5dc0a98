"""Chat templates as well-known bases have them, cut to what the tests need, and tokenizers of several kinds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_rt.core.base.byte_tokenizer import byte_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set content = m.content.split('</think>')[-1].lstrip('\\n') if '</think>' in m.content else m.content %}"
    "{{ '<|im_start|>assistant\\n' }}{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ content + '<|im_end|>\\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% for part in m.content %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GLM = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SPECIAL: tuple[str, ...] = (
    *("<pad>", "<bos>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>"),
)
ORDINARY = ("<think>", "</think>")
"""Added tokens that the tokenizer does not call special."""
CORPUS = (
    "The rain drums on the tin roof, and the street is empty. <b>bold</b> user: system: assistant 12345",
    "Он стоял, не в силах дышать. Тишина и жар.",
    "日本語の文章です。 naïve – “so” 👩‍👩‍👧",
    "rain on the roof rain on the street",
)
KINDS = ("bytes", "byte-level", "metaspace", "unigram")


def tokenizer(kind: str, template: str | dict[str, str] | None = None, *, eos: str | None = "<eos>") -> Any:
    """A fast tokenizer of a kind: single bytes, GPT-2's and Llama 3's, Llama 2's and Gemma's, or T5's."""
    from transformers import PreTrainedTokenizerFast

    named = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>"} | ({"eos_token": eos} if eos else {})
    extra = [token for token in SPECIAL if token not in named.values()]
    if kind == "bytes":
        fast = byte_tokenizer(SPECIAL, additional_special_tokens=extra, **named)
    else:
        fast = PreTrainedTokenizerFast(tokenizer_object=_backend(kind), additional_special_tokens=extra, **named)
    fast.add_tokens(list(ORDINARY))
    if template:
        fast.chat_template = template
    return fast


def _backend(kind: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if kind == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    elif kind == "metaspace":  # with the control tokens as words of the model, and a prefix on every piece
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIAL, *fallback])
    else:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        # A user's text can hold a word of the model that spells a control token: the worst case.
        trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=list(SPECIAL), unk_token="<unk>")
    backend.train_from_iterator([*CORPUS, "<|im_end|>"], trainer)
    if kind == "metaspace":
        backend = _without_added(backend, [f"<0x{byte:02X}>" for byte in range(256)])
    return backend


def _without_added(backend: Any, words: Sequence[str]) -> Any:
    """Byte tokens are words of the model and not added tokens."""
    import json

    from tokenizers import Tokenizer

    document = json.loads(backend.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] not in words]
    return Tokenizer.from_str(json.dumps(document))


def save_base(folder: Path, fast: Any, **changes: Any) -> Any:
    """A tiny random Llama with that tokenizer; the model, in float32."""
    from transformers import LlamaConfig

    from support.tiny import random_model

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": len(fast), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    settings = {**shape, "intermediate_size": 96, "max_position_embeddings": 256, "initializer_range": 0.1}
    model = random_model(LlamaConfig(**{**settings, **tokens, "tie_word_embeddings": False, **changes}))
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return model
