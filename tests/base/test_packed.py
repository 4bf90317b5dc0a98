"""A base that is called int4 says how much of it is."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lora_rt.core.base.load import load_base
from lora_rt.core.base.packed import packed_share, remark
from support.tiny import Zoo, config_of, random_model, save_tokenizer


def mixtral(folder: Path) -> Path:
    import transformers as t

    config = t.MixtralConfig(
        vocab_size=264, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, num_local_experts=4, max_position_embeddings=64, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    random_model(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_fused_experts_stay_dense_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lora_rt.base"):
        base = load_base(str(mixtral(tmp_path / "mixtral")), "int4", "cpu")
    attention = 2 * (2 * 64 * 64 + 2 * 32 * 64)
    experts, routers = 2 * 4 * 3 * 64 * 96, 2 * 4 * 64
    share, left = packed_share(base.model)
    assert share == pytest.approx(attention / (attention + experts + routers), abs=0.02)
    assert left[0] == "the experts"
    assert f"int4: {share:.0%} of the weights; the experts" in caplog.text
    assert "stay bfloat16" in caplog.text


def test_a_base_that_is_what_it_is_called_says_nothing(zoo: Zoo) -> None:
    assert remark(load_base(str(zoo.base("llama")), "int4", "cpu").model, "int4") is None
    assert remark(random_model(config_of("llama")), "float32") is None
