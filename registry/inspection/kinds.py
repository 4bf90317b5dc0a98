"""What a folder is that is not a LoRA of PEFT's form: its kind in one line, and the way out.

Told by names alone: of files, of fields of the configuration, of tensors. Nothing is opened for it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_rt.registry.files import CONFIG, PICKLES, WEIGHTS, shard_number
from lora_rt.registry.strict_json import shown

_MLX = "written by MLX, whose LoRA has other names and turned matrices; convert it to PEFT's form first"
_DIFFUSERS = "a LoRA of an image model (diffusers), not of a language model"

_FEW = 10  # LoRAs that are named
_OTHERS = (  # of PEFT 0.21 and before
    "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "BONE", "C3A", "CARTRIDGE", "CPT", "DEFT", "DELORA", "FOURIERFT",
    "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "LILY", "MISS", "OFT", "OSF", "PEANUT", "POLY", "PSOFT", "PVERA",
    "RANDLORA", "ROAD", "SHADOW", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "WAVEFT",
)  # fmt: skip
_METHODS = {
    "IA3": "IA3, not LoRA",
    "LOHA": "LoHa, not LoRA",
    "LOKR": "LoKr, not LoRA",
    "ADALORA": "AdaLoRA, not plain LoRA: its values are in lora_E; fold them in and save a LoRA",
    "VERA": "VeRA, not LoRA: its matrices are drawn from a seed",
    "XLORA": "X-LoRA, a router over several LoRAs",
    "PROMPT_TUNING": "PROMPT_TUNING (prompt tuning), not LoRA",
    "P_TUNING": "P_TUNING (prompt tuning), not LoRA",
    "PREFIX_TUNING": "PREFIX_TUNING (prefix tuning), not LoRA",
    "MULTITASK_PROMPT_TUNING": "MULTITASK_PROMPT_TUNING (prompt tuning), not LoRA",
    "LN_TUNING": "LN_TUNING (layer norms), not LoRA",
    **{name: f"{name}, not LoRA" for name in _OTHERS},
}
_MARKS = (  # a part of a tensor's name, and what it tells
    ("lora_E", "of AdaLoRA, not plain LoRA"),
    ("lora_ranknum", "of AdaLoRA, not plain LoRA"),
    ("ia3_l", "of IA3, not LoRA"),
    ("hada_w", "of LoHa, not LoRA"),
    ("lokr_w", "of LoKr, not LoRA"),
    ("vera_lambda", "of VeRA, not LoRA"),
    ("oft_", "of OFT, not LoRA"),
    ("boft_", "of BOFT, not LoRA"),
    ("prompt_embeddings", "of prompt tuning, not LoRA"),
    ("internal_xlora_classifier", "of X-LoRA, a router over several LoRAs"),
    ("lora_a", _MLX),
    ("lora_b", _MLX),
    ("lora_unet_", _DIFFUSERS),
    (".lora.down", _DIFFUSERS),
    (".lora.up", _DIFFUSERS),
    ("lora_down", "in kohya's form, not PEFT's; convert it to PEFT's form first"),
    ("lora_up", "in kohya's form, not PEFT's; convert it to PEFT's form first"),
    ("lora_", "no tensor that is known of a LoRA"),
)


def of_tensor(key: str) -> str:
    """What a tensor is that is no factor of a LoRA."""
    found = next((text for mark, text in _MARKS if mark in key), None)
    return found or "a weight of the base, which no adapter may replace"


def of_another_kind(config: Mapping[str, Any]) -> str:
    """What a configuration is of, where it is of a known kind that is not PEFT's LoRA; else empty."""
    method = config.get("peft_type")
    if method is None and {"fine_tune_type", "lora_parameters", "lora_layers"} & set(config):
        return _MLX
    if method is None and "model_type" in config and "architectures" in config:
        return "the configuration of a whole model, not of an adapter; use its folder with --base"
    known = _METHODS.get(method, "") if isinstance(method, str) else ""
    return known + parts_of(config.get("adapters")) if method == "XLORA" else known


def parts_of(*given: Any) -> str:
    """The LoRAs that a router chooses from, for the end of a line: X-LoRA's by name and place, Arrow's by name."""
    named = [f"{k} ({v})" for one in given if isinstance(one, Mapping) for k, v in one.items()]
    named += [str(name) for one in given if isinstance(one, list) for name in one]
    few = ", ".join(shown(name) for name in named[:_FEW]) + (f" and {len(named) - _FEW} more" if named[_FEW:] else "")
    return f": {few}" if named else ""


def way_out(problems: Iterable[str], folder: Path) -> str:
    """What to do about an adapter that is refused."""
    said = " ".join(problems)
    ways = (
        ("with lora-rt convert", f"Run: lora-rt convert {shlex.quote(str(folder))} --out NEW_FOLDER --base BASE"),
        ("lora-rt convert", f"Run: lora-rt convert {shlex.quote(str(folder))} --out NEW_FOLDER"),
        ("--allow-base-mismatch", "Use the base that it names, or say --allow-base-mismatch"),
        ("merge it", "Merge it into its base with PEFT (merge_and_unload), and give the result to --base"),
        ("router over", "Use the LoRAs that it chooses from, with weights of yours"),
        ("train without", "Train without it, or merge it into its base and give the result to --base"),
        ("not LoRA", "Train a LoRA, or merge it into its base and give the result to --base"),
        ("to classify", "Train it with task_type CAUSAL_LM, or use it with transformers' own class for its task"),
        ("use it with --base", f"Say: --base {shlex.quote(str(folder))}"),
        ("an image model", "Use it with diffusers"),
        ("PEFT's form first", "Save it anew in PEFT's form: adapter_config.json, and lora_A and lora_B of every layer"),
        ("is not a folder", "Give the folder that it lies in, with its adapter_config.json"),
        ("symbolic link", "Copy the files themselves into one folder, and give that"),
        ("are loaded", "Save its tensors anew in float32 (safetensors.torch: load_file, float(), save_file)"),
        ("holds nothing", "Save it anew where it was trained, with all its weights gathered first (DeepSpeed, FSDP)"),
        ("matched safely", "Write the names of the modules out in its adapter_config.json, in place of the pattern"),
        ("adapter may replace", "Save the adapter alone (PEFT's save_pretrained), or merge it and give that to --base"),
        ("of this base", "Use the base that it was trained on: --base BASE"),
        ("by r or rank_pattern", "Correct r and rank_pattern in its adapter_config.json, or fetch it again"),
        ("should be", "Use the base that it was trained on: --base BASE"),
    )
    return next((way for mark, way in ways if mark in said), "Fetch it again, or ask its author for a LoRA of PEFT")


def missing_weights(names: Iterable[str]) -> str:
    """Why a folder with these files has no weights of an adapter, in one line."""
    there = sorted(names)
    if WEIGHTS in there:
        return ""
    counts = {shard[1] for name in there if (shard := shard_number(name))}
    shards = {shard[0] for name in there if (shard := shard_number(name))}
    if len(counts) > 1:
        return f"the parts of {WEIGHTS} are of different sets"
    if counts:
        lacking = sorted(set(range(1, max(counts) + 1)) - shards)
        return f"of the {max(counts)} parts of {WEIGHTS}, number {lacking[0]} is missing" if lacking else ""
    return f"{WEIGHTS} is missing{_instead(there)}"


def of_folder(names: Iterable[str]) -> str:
    """What a folder without an adapter is, where that can be told from its files; empty where it can't."""
    there = sorted(names)
    return _instead(there).removeprefix("; ") if CONFIG not in there and WEIGHTS not in there else ""


def _instead(names: list[str]) -> str:
    if "adapters.safetensors" in names or "adapters.npz" in names:
        return f"; {_MLX}"
    if any(name.endswith(".gguf") for name in names):
        return "; a .gguf is an adapter for llama.cpp: get the PEFT folder that it was made of"
    pickles = [name for name in names if name.endswith(PICKLES) and name.startswith("adapter")]
    if pickles:
        return f"; {shown(pickles[0])} is a pickle, which is never opened here: lora-rt convert reads it apart"
    if any(name.startswith(("model", "pytorch_model")) and name.endswith((".safetensors", *PICKLES)) for name in names):
        return "; it holds a whole model (merged, or all of it trained), not an adapter: use it with --base"
    if any(name.startswith("pytorch_lora_weights") for name in names):
        return f"; it is {_DIFFUSERS}"
    others = [name for name in names if name.endswith(PICKLES)]
    return f"; {shown(others[0])} is a pickle, which is never opened" if others else ""
