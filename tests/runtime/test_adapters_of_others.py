"""Adapters as trainers of all years wrote them compute what PEFT's model in memory computes; or are refused by kind.

The oracle is the model that was trained, never one that was read back from the file.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from lora_rt.core.export.run import export
from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from lora_rt.registry.files import CONFIG, WEIGHTS
from support.adapters import in_parts
from support.opens import opens
from support.tiny import HIDDEN, LAYERS, VOCAB, Zoo, peft_model, save_tokenizer, some_ids

pytestmark = pytest.mark.slow

IDS = some_ids(rows=2)
EXACT = {"atol": 1e-4, "rtol": 0.0}
Change = Callable[[Path], None]
LLAMA = "transformers.models.llama.modeling_llama"
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?\.(?:q_proj|v_proj))|"
    r"(?:\bmodel\.layers\.[\d]{1,}(?!.*\.experts\.\d)\..*?(?:self_attn|mlp).*?\.(?:q_proj|v_proj))"
)


def fields(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        found = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(found | changes))

    return change


def keys(rename: Callable[[str], str]) -> Change:
    return tensors(lambda found: {rename(key): value for key, value in found.items()})


def tensors(edit: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Change:
    def change(folder: Path) -> None:
        found = {key: value.contiguous() for key, value in edit(load_file(folder / WEIGHTS)).items()}
        save_file(found, folder / WEIGHTS, {"format": "pt"})

    return change


def nothing(folder: Path) -> None:
    """As PEFT of today saves it."""


# what the test is called: (options of the adapter, options of the base, what is done to the folder)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], Change]] = {
    "PEFT": ({}, {}, nothing),
    "PEFT with the head": ({"target_modules": ["q_proj", "lm_head"]}, {}, nothing),
    "PEFT with a tied head": ({"target_modules": ["q_proj", "lm_head"]}, {"tie_word_embeddings": True}, nothing),
    "PEFT with the head, saved in half": (
        {"target_modules": ["q_proj", "lm_head"]},
        {},
        tensors(lambda found: {k: v if "lora_" in k else v.bfloat16() for k, v in found.items()}),
    ),
    "PEFT with biases the base has not": ({"bias": "lora_only"}, {}, nothing),
    "PEFT with all biases the base has not": ({"bias": "all"}, {}, nothing),
    "keys without a prefix": ({}, {}, keys(lambda key: key.removeprefix("base_model.model."))),
    "keys with an adapter's name": ({}, {}, keys(lambda key: key.replace(".weight", ".default.weight"))),
    "keys of the inner model": ({}, {}, keys(lambda key: key.replace("model.model.model.", "model.model."))),
    "keys of a multimodal model": (
        {},
        {},
        keys(lambda key: key.replace("model.model.layers", "model.model.language_model.layers")),
    ),
    "keys of a compiled model": (
        {},
        {},
        keys(lambda key: key.replace("model.model.model", "model.model._orig_mod.model")),
    ),
    "keys of DDP": ({}, {}, keys(lambda key: f"module.{key}")),
    "keys of a module of Lightning's": ({}, {}, keys(lambda key: f"model.{key}")),
    "keys of DDP around a part": ({}, {}, keys(lambda key: key.replace("self_attn", "module.self_attn"))),
    "keys with a prefix three times": ({}, {}, keys(lambda key: f"base_model.model.base_model.model.{key}")),
    "keys of a compiled model in DDP": ({}, {}, keys(lambda key: f"_orig_mod.module.{key}")),
    "weights in parts": ({}, {}, in_parts),
    "rank-stabilised": ({"use_rslora": True}, {}, nothing),
    "ranks and alphas per module": ({"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 5}}, {}, nothing),
    "LLaMA-Factory": ({"target_modules": r"^(?!.*visual).*(?:o_proj|up_proj|v_proj|down_proj|q_proj).*"}, {}, nothing),
    "LLaMA-Factory, patched": ({"target_modules": r"^(model(?=\.).*\.(q_proj|k_proj|v_proj|o_proj))$"}, {}, nothing),
    "ms-swift": (
        {"target_modules": r"^(model)(?!.*(lm_head|output|emb|wte|shared)).*\.(q_proj|v_proj)$"},
        {},
        fields(
            swift_type="LORA",
            lora_dtype="float32",
            lorap_lr_ratio=16.0,
            lorap_emb_lr=1e-6,
            model_key_mapping=None,
            enable_lora=None,
            use_merged_linear=False,
            use_qa_lora=False,
            task_type="CAUSAL_LM",
        ),
    ),
    "an optional group": ({"target_modules": r"(?:.*\.)?(q_proj|v_proj)"}, {}, nothing),
    "an excluded pattern": ({"exclude_modules": r".*(?<!layers)\.0\..*"}, {}, nothing),
    "Unsloth": (
        {"target_modules": UNSLOTH},
        {},
        fields(
            auto_mapping={"base_model_class": "LlamaForCausalLM", "parent_library": LLAMA, "unsloth_fixed": True},
            task_type=None,
        ),
    ),
    "Unsloth that names no class": ({}, {}, fields(auto_mapping={"unsloth_fixed": True})),
    "axolotl": ({}, {}, fields(auto_mapping=None, loftq_config={}, eva_config=None, inference_mode=True)),
    "PEFT of the future": ({}, {}, fields(new_switch=False, new_list=[], new_table={}, new_text="", new_number=0)),
    "PEFT of 2023": ({}, {}, lambda folder: (folder / CONFIG).write_text(json.dumps(_of_2023(folder))) and None),
    "converted CorDA": ({}, {}, fields(corda_config={"cache_file": None, "covariance_file": "x"})),
    "converted LoRA-GA": ({}, {}, fields(lora_ga_config={"direction": "ArB2r", "scale": "stable"})),
    "begun by EVA": ({}, {}, fields(eva_config={"rho": 2.0, "tau": 0.99}, init_lora_weights="eva")),
    "half precision": ({}, {}, tensors(lambda found: {k: v.half() for k, v in found.items()})),
}


def _of_2023(folder: Path) -> dict[str, Any]:
    known = ("peft_type", "task_type", "r", "lora_alpha", "target_modules", "bias", "base_model_name_or_path")
    found = json.loads((folder / CONFIG).read_text())
    return {key: found[key] for key in known} | {"merge_weights": False, "enable_lora": None, "fan_in_fan_out": False}


@pytest.fixture(autouse=True)
def peft_is_quiet() -> Iterator[None]:
    """PEFT warns of tied heads, of biases and of what it saves beside; all of that is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trained(model: Any, folder: Path, **options: Any) -> Any:
    """PEFT's model in memory, saved the way it saves by default."""
    from peft import LoraConfig, get_peft_model

    given = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **options}
    adapted = get_peft_model(model, LoraConfig(**given)).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_((torch.randn_like(parameter) * 0.1).half())  # so that half precision loses nothing
    adapted.save_pretrained(folder)
    return adapted


def trained_over(base: Path, folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return trained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder, **options)


def logits_of(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_what_others_wrote_computes_what_was_trained(name: str, zoo: Zoo, tmp_path: Path) -> None:
    options, changes, change = VARIANTS[name]
    model = trained_over(zoo.base("llama", **changes), tmp_path / "a", **options)
    change(tmp_path / "a")
    runtime = zoo.runtime("llama", **changes)
    loaded = runtime.load_adapter(str(tmp_path / "a"), name="theirs")
    assert_close(runtime.logits(IDS, compositions=loaded), logits_of(model), **EXACT)
    with model.disable_adapter():
        assert not torch.allclose(logits_of(model), runtime.logits(IDS, compositions=loaded), atol=1e-2)


def test_a_whole_state_dict_is_taken_for_its_factors_where_the_rest_is_the_bases_own(zoo: Zoo, tmp_path: Path) -> None:
    model = trained_over(zoo.base("llama"), tmp_path / "a", modules_to_save=["lm_head"])
    found = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(found, tmp_path / "a" / WEIGHTS, {"format": "pt"})
    runtime = zoo.runtime("llama")
    runtime.load_adapter(str(tmp_path / "a"), name="theirs")
    assert_close(runtime.logits(IDS, compositions="theirs"), logits_of(model), **EXACT)
    found["base_model.model.model.norm.weight"] += 1
    save_file(found, tmp_path / "a" / WEIGHTS, {"format": "pt"})
    with pytest.raises(LoraRtError, match=r"not the base's own model\.norm\.weight") as refusal:
        runtime.load_adapter(str(tmp_path / "a"), name="other")
    assert "Save the adapter alone" in str(refusal.value.next_step)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_factors_of_few_bits_are_taken_for_what_they_are(kind: torch.dtype, zoo: Zoo, tmp_path: Path) -> None:
    trained_over(zoo.base("llama"), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tensors(lambda found: {key: value.to(kind) for key, value in found.items()})(tmp_path / "a")
    tensors(lambda found: {key: value.to(kind).float() for key, value in found.items()})(tmp_path / "b")
    runtime = zoo.runtime("llama")
    for name in "ab":
        runtime.load_adapter(str(tmp_path / name), name=name)
    assert torch.equal(runtime.logits(IDS, compositions="a"), runtime.logits(IDS, compositions="b"))


def multimodal(folder: Path) -> Any:
    """A tiny Gemma 3 with a vision tower, saved as a base."""
    import transformers as t

    text = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = t.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        image_token_index=VOCAB - 1, boi_token_index=VOCAB - 2, eoi_token_index=VOCAB - 3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = t.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


@pytest.fixture(scope="module")
def two_towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runtime, Any, Path]:
    """A runtime over a multimodal base, PEFT's model over it, and the adapter as PEFT of today saves it."""
    place = tmp_path_factory.mktemp("towers")
    base = multimodal(place / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = trained(base, place / "a", target_modules=r".*language_model.*\.(q_proj|v_proj)")
    return Runtime.load(str(place / "base"), precision="float32", device="cpu"), model, place / "a"


@pytest.mark.parametrize(
    ("written_as", "targets"),
    [
        ("model.language_model.layers", None),
        ("language_model.model.layers", None),  # transformers before 4.52
        ("language_model.model.layers", r"^language_model(?!.*vision).*\.(q_proj|v_proj)$"),
        ("model.layers", ["q_proj", "v_proj"]),  # Qwen2-VL before 4.52, and a text part trained alone
        ("layers", ["q_proj", "v_proj"]),
    ],
)
def test_the_text_part_of_a_multimodal_base_is_found_under_its_old_names(
    written_as: str, targets: Any, two_towers: tuple[Runtime, Any, Path], tmp_path: Path
) -> None:
    runtime, model, adapter = two_towers
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    keys(lambda key: key.replace("model.language_model.layers", written_as))(folder)
    if targets is not None:
        fields(target_modules=targets)(folder)
    name = runtime.load_adapter(str(folder), name="old")
    assert_close(runtime.logits(IDS, compositions=name), logits_of(model), **EXACT)


REFUSED: dict[str, tuple[dict[str, Any], Change, str]] = {
    "a head that is not the base's": (
        {"target_modules": ["q_proj", "lm_head"]},
        tensors(lambda found: {k: v if "lora_" in k else v + 0.5 for k, v in found.items()}),
        "is not the base's own lm_head.weight",
    ),
    "a head of more words": (
        {"target_modules": ["q_proj", "lm_head"]},
        tensors(lambda found: {k: v if "lora_" in k else torch.cat([v, v[:8]]) for k, v in found.items()}),
        "has 272 tokens, this base 264",
    ),
    "what was trained to classify": (
        {},
        fields(task_type="SEQ_CLS", modules_to_save=["classifier", "score"]),
        "trained to classify",
    ),
    "what DeepSpeed left in other processes": (
        {},
        tensors(lambda found: {key: torch.zeros(0) for key in found}),
        "holds nothing",
    ),
    "an image model's": (
        {},
        keys(lambda key: key.replace("base_model.model.", "lora_unet_").replace("lora_A", "lora_down")),
        "an image model",
    ),
    "another base's": (
        {},
        keys(lambda key: key.replace("layers.", "blocks.")),
        "not a linear layer of this base",
    ),
    "biases of layers that have none": (
        {"bias": "lora_only"},
        tensors(
            lambda found: {
                **found,
                "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias": torch.ones(HIDDEN),
            }
        ),
        "a weight of the base, which no adapter may replace",
    ),
    "a pickle": ({}, lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin") and None, "pickle"),
    "one of its layers missing": (
        {},
        tensors(lambda found: {k: v for k, v in found.items() if ".1." not in k or "v_proj" not in k}),
        "has no tensors",
    ),
    "one of its layers missing under old names": (
        {},
        tensors(
            lambda found: {
                k.replace("model.model.layers", "model.layers"): v
                for k, v in found.items()
                if ".1." not in k or "v_proj" not in k
            }
        ),
        "has no tensors",
    ),
    "factors of float64": ({}, tensors(lambda found: {k: v.double() for k, v in found.items()}), "is F64"),
    "a field that means something": ({}, fields(time_travel=True), "'time_travel' is True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_computed_is_refused_by_its_kind(name: str, zoo: Zoo, tmp_path: Path) -> None:
    options, change, says = REFUSED[name]
    trained_over(zoo.base("llama"), tmp_path / "a", **options)
    change(tmp_path / "a")
    with pytest.raises(LoraRtError) as refusal:
        zoo.runtime("llama").load_adapter(str(tmp_path / "a"), name="theirs")
    assert says in str(refusal.value)
    assert refusal.value.next_step
    assert refusal.value.next_step.startswith("Fetch it again") is (name in UNKNOWN)


UNKNOWN = ("one of its layers missing", "one of its layers missing under old names", "a field that means something")


def test_a_file_in_place_of_its_folder_is_told_apart(zoo: Zoo, tmp_path: Path) -> None:
    trained_over(zoo.base("llama"), tmp_path / "a")
    with pytest.raises(LoraRtError, match="is not a folder") as refusal:
        zoo.runtime("llama").load_adapter(str(tmp_path / "a" / WEIGHTS))
    assert "the folder that it lies in" in str(refusal.value.next_step)


def test_an_adapter_in_place_of_a_base_is_told_apart(zoo: Zoo, tmp_path: Path) -> None:
    trained_over(zoo.base("llama"), tmp_path / "a")
    with pytest.raises(LoraRtError, match="is an adapter's") as refusal:
        Runtime.load(str(tmp_path / "a"))
    assert "lora-rt compose" in str(refusal.value.next_step)


def test_each_weight_file_is_opened_once(zoo: Zoo, tmp_path: Path) -> None:
    made = [Path(shutil.copytree(zoo.adapter("llama", seed=seed), tmp_path / f"a{seed}")) for seed in (1, 2)]
    runtime = zoo.runtime("llama", fresh=True)
    with opens() as opened:
        runtime.logits(IDS, compositions=f"{made[0]}:0.7 {made[1]}:0.3")
    assert [opened.of(folder / WEIGHTS) for folder in made] == [1, 1]


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_saved_beside_its_factors_is_left_out_of_an_export(tied: bool, zoo: Zoo, tmp_path: Path) -> None:
    base = zoo.base("llama", tie_word_embeddings=tied)
    model = trained_over(base, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    export(str(tmp_path / "a"), "peft", tmp_path / "out", base=str(base))
    assert all("lora_" in key for key in load_file(tmp_path / "out" / WEIGHTS))
    with torch.inference_mode():
        assert_close(peft_model(base, tmp_path / "out")(input_ids=IDS).logits, logits_of(model), **EXACT)
