"""Models that see speak as well without an image, also those that transformers does not count among the causal ones."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from lora_rt.core.runtime import Runtime
from lora_rt.registry.files import WEIGHTS
from support.tiny import HIDDEN, LAYERS, VOCAB, save_tokenizer, some_ids

pytestmark = pytest.mark.slow

IDS = some_ids(rows=2)
TEXT = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SIGHT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
NOW_AND_BEFORE = {  # paths of today, and those before transformers 4.52
    "llava": {"model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head"},
    "mistral3": {"model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head"},
    "qwen2_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
}


def random_model(name: str) -> Any:
    import transformers as t

    torch.manual_seed(0)
    if name == "llava":
        sees: Any = t.CLIPVisionConfig(**SIGHT, projection_dim=32)
        return t.LlavaForConditionalGeneration(
            t.LlavaConfig(text_config=t.LlamaConfig(**TEXT), vision_config=sees, image_token_index=VOCAB - 1)
        ).eval()
    if name == "mistral3":
        sees = t.PixtralVisionConfig(**SIGHT)
        text = t.MistralConfig(**TEXT, head_dim=16)
        return t.Mistral3ForConditionalGeneration(
            t.Mistral3Config(text_config=text, vision_config=sees, image_token_index=VOCAB - 1)
        ).eval()
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    special = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return t.Qwen2VLForConditionalGeneration(
        t.Qwen2VLConfig(
            text_config={**TEXT, "rope_parameters": rope},
            vision_config={"depth": 1, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 2, "mlp_ratio": 2},
            **{key: VOCAB - 1 - number for number, key in enumerate(special)},
        )
    ).eval()


def trained(model: Any, folder: Path, **options: Any) -> Tensor:
    """The logits of PEFT's model in memory, which is saved."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, task_type="CAUSAL_LM", **options)).eval()
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(folder)
    with torch.inference_mode():
        found: Tensor = adapted(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("name", NOW_AND_BEFORE)
def test_it_speaks_and_its_adapters_are_exact_under_names_of_now_and_before(name: str, tmp_path: Path) -> None:
    model = random_model(name)
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    made = {
        "all": trained(model, tmp_path / "all", target_modules="all-linear"),
        "head": trained(model, tmp_path / "head", target_modules=["q_proj"], modules_to_save=["lm_head"]),
    }
    with Runtime.load(str(tmp_path / "base"), precision="float32", device="cpu") as rt:
        for adapter, wanted in made.items():
            old = Path(shutil.copytree(tmp_path / adapter, tmp_path / f"{adapter}-old"))
            found = load_file(old / WEIGHTS)
            for now, before in NOW_AND_BEFORE[name].items():
                found = {
                    key.replace(f"base_model.model.{now}", f"base_model.model.{before}"): v for key, v in found.items()
                }
            save_file(found, old / WEIGHTS, {"format": "pt"})
            for folder in (adapter, f"{adapter}-old"):
                rt.load_adapter(str(tmp_path / folder), folder)
                assert_close(rt.logits(IDS, compositions=folder), wanted, atol=1e-4, rtol=0.0)
        both = rt.generate(["one", "two two two"], ["all", None], max_new_tokens=4)
        assert both == [rt.generate("one", "all", max_new_tokens=4), rt.generate("two two two", max_new_tokens=4)]
