"""A base that is called int4 says how much of it is."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_rt.core.base.load import load_base
from lora_rt.core.base.packed import packed_share, remark
from support.architectures.shrink import random_model as random_of_type
from support.architectures.shrink import tiny_config
from support.tiny import Zoo, config_of, random_model, save_tokenizer, some_ids

pytestmark = pytest.mark.slow


def mixtral(folder: Path) -> Path:
    import transformers as t

    config = t.MixtralConfig(
        vocab_size=264, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, num_local_experts=4, max_position_embeddings=64, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    random_model(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_fused_experts_are_packed_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = mixtral(tmp_path / "mixtral")
    dense = load_base(str(folder), "bfloat16", "cpu").model
    with caplog.at_level(logging.WARNING, "lora_rt.base"):
        model = load_base(str(folder), "int4", "cpu").model
    share, _ = packed_share(model)
    assert share > 0.95
    assert not caplog.records
    for name, leaf in ((n, leaf) for n in range(2) for leaf in ("gate_up_proj", "down_proj")):
        packed, whole = (getattr(one.model.layers[name].mlp.experts, leaf) for one in (model, dense))
        assert packed.shape == whole.shape
        wanted = torch.stack([of_bitsandbytes(one) for one in whole])
        assert torch.equal(torch.stack([packed[number] for number in range(len(packed))]), wanted)
        assert sum(buffer.nbytes for buffer in packed.buffers()) < 0.4 * whole.nbytes  # tiny: the levels weigh most


def of_bitsandbytes(weight: Tensor) -> Tensor:
    """What a linear layer of bitsandbytes would keep of it."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    kept = Params4bit(weight.detach().clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    kept = kept.to("cpu")
    found: Tensor = dequantize_4bit(kept.data, kept.quant_state)
    return found


def test_a_mixture_in_four_bits_computes_with_its_unpacked_weights(tmp_path: Path) -> None:
    base = load_base(str(mixtral(tmp_path / "mixtral")), "int4", "cpu")
    ids = some_ids(rows=2)
    with torch.inference_mode():
        found = base.model(input_ids=ids).logits.float()
        for block in base.model.model.layers:
            experts = block.mlp.experts
            del experts.forward
            for leaf in ("gate_up_proj", "down_proj"):
                packed = getattr(experts, leaf)
                delattr(experts, leaf)
                setattr(experts, leaf, nn.Parameter(torch.stack([packed[n] for n in range(len(packed))])))
        wanted = base.model(input_ids=ids).logits.float()
    assert (found - wanted).abs().max() < 0.05 * wanted.std()


def test_the_experts_of_a_base_that_is_trained_over_stay_dense_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lora_rt.base"):
        base = load_base(str(mixtral(tmp_path / "mixtral")), "int4", "cpu", for_training=True)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *(("deepseek_v3", "int8"), ("deepseek_v3", "int4"), ("mamba", "int8"), ("mamba", "int4")),
        *(("dots3_note_text", "int8"), ("inkling2_text", "int8")),
    ],
)
def test_models_that_packed_layers_do_not_fit_run_nevertheless(tmp_path: Path, kind: str, precision: str) -> None:
    """Latent attention gives a layer in 8 bits four axes; Mamba multiplies with a layer's weight itself, Dots 3 casts
    to its dtype, and of Inkling 2 transformers reads some back without their scales."""
    model = random_of_type(tiny_config(kind))
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    ids = some_ids(rows=2)
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits
        found = load_base(str(tmp_path), precision, "cpu").model(input_ids=ids).logits.float()
    likeness = torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0)
    assert likeness > (0.98 if precision == "int8" else 0.5)  # random weights are the worst case of four bits
