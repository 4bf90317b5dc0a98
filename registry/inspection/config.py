"""`adapter_config.json`, field by field. Everything that is wrong is collected; nothing named in it is ever imported.

Fields are in three groups: those that say what the adapter computes (checked one by one), those that only describe how
it was trained (ignored), and all others, known or not, which must be empty: a field that we do not know may change the
mathematics, and an adapter that is loaded wrong is worse than one that is refused.
"""

from __future__ import annotations

import math
import re
from typing import Any

from lora_rt.registry import strict_json
from lora_rt.registry.files import CONFIG
from lora_rt.registry.inspection.patterns import peft_key
from lora_rt.registry.inspection.settings import LoraSettings, Pattern
from lora_rt.registry.inspection.targets import selector
from lora_rt.registry.strict_json import shown

MAX_RANK = 4096
MAX_SCALING = 1000.0
MAX_PATTERNS = 10_000

_CHECKED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "init_lora_weights", "lora_bias", "bias", "base_model_name_or_path",
    "auto_mapping", "megatron_core", "use_dora", "modules_to_save",
}  # fmt: skip
_DESCRIPTIVE = {
    "task_type", "peft_version", "revision", "inference_mode", "lora_dropout", "fan_in_fan_out", "eva_config",
    "qalora_group_size", "runtime_config", "ephemeral_gpu_offload", "ensure_weight_tying",
}  # fmt: skip
_UNTOUCHED_BASE = {"true", "false", "gaussian", "eva", "orthogonal", "mica"}
_CONVERTIBLE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_CONVERSION = (
    "convert it to a plain LoRA with PEFT: save_pretrained(folder, path_initial_model_for_weight_conversion=INITIAL)"
)


def read_config(content: bytes) -> tuple[LoraSettings | None, list[str]]:
    """The settings, or None and everything that is wrong with the configuration."""
    try:
        config = strict_json.loads(content)
    except strict_json.InvalidJsonError as error:
        return None, [f"{CONFIG} {error}"]
    if not isinstance(config, dict):
        return None, [f"{CONFIG} holds {type(config).__name__}, not an object"]
    problems = [*_method(config), *_surroundings(config)]
    selects, target_problems = selector(config)
    ranks, rank_problems = _patterns(config, "rank_pattern", _rank_problem)
    alphas, alpha_problems = _patterns(config, "alpha_pattern", _alpha_problem)
    problems += [*_numbers(config), *target_problems, *rank_problems, *alpha_problems]
    if problems or selects is None:
        return None, [f"{CONFIG}: {problem}" for problem in problems]
    settings = LoraSettings(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        rslora=config.get("use_rslora") or False,
        lora_bias=config.get("lora_bias") or False,
        all_linear=config["target_modules"] == "all-linear",
        selects=selects,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        base_name=config.get("base_model_name_or_path") or "",
    )
    return settings, []


def _method(config: dict[str, Any]) -> list[str]:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {shown(config.get('peft_type'))}, only 'LORA' is composed")
    if config.get("use_dora"):
        problems.append(
            "use_dora: DoRA rescales the base's output and does not add up; merge it, and extract a plain LoRA"
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CONVERTIBLE):
        problems.append(f"init_lora_weights is {shown(start)}, which changes the base's weights; {_CONVERSION}")
    elif config.get("init_lora_weights") is not None and start not in _UNTOUCHED_BASE:
        problems.append(f"init_lora_weights is {shown(config['init_lora_weights'])}, which is unknown here")
    if config.get("modules_to_save"):
        problems.append(f"modules_to_save replaces {shown(config['modules_to_save'])} of the base; train without it")
    if config.get("bias") not in (None, "none"):
        problems.append(f"bias is {shown(config['bias'])}, which replaces biases of the base; only 'none' is composed")
    return problems


def _surroundings(config: dict[str, Any]) -> list[str]:
    problems = []
    mapping = config.get("auto_mapping")
    if mapping is not None and not _is_transformers(mapping):
        problems.append(
            f"auto_mapping names code to import, {shown(mapping)}; only classes of transformers may stand there"
        )
    if config.get("megatron_core") not in (None, "megatron.core"):
        problems.append(f"megatron_core names code to import, {shown(config['megatron_core'])}")
    name = config.get("base_model_name_or_path")
    if name is not None and not isinstance(name, str):
        problems.append(f"base_model_name_or_path is {shown(name)}, not a text")
    others = sorted(set(config) - _CHECKED - _DESCRIPTIVE)
    filled = [field for field in others if config[field] not in (None, False, 0, "", [], {})]
    problems += [f"{shown(field)} is {shown(config[field])}, which is not supported" for field in filled[:20]]
    if len(filled) > 20:
        problems.append(f"and {len(filled) - 20:,} more fields that are not supported")
    return problems


def _is_transformers(mapping: Any) -> bool:
    if not isinstance(mapping, dict) or set(mapping) != {"base_model_class", "parent_library"}:
        return False
    parts = (mapping["base_model_class"], mapping["parent_library"])
    if not all(isinstance(part, str) for part in parts):
        return False
    return parts[0].isidentifier() and re.fullmatch(r"transformers\.models\.[a-z0-9_.]+", parts[1]) is not None


def _numbers(config: dict[str, Any]) -> list[str]:
    problems = [
        f"{field} is {shown(config[field])}, not true or false"
        for field in ("use_rslora", "lora_bias", "use_dora", "fan_in_fan_out")
        if config.get(field) is not None and not isinstance(config[field], bool)
    ]
    rank, alpha = config.get("r"), config.get("lora_alpha")
    found = [f"r is {text}" for text in [_rank_problem(rank)] if text]
    found += [f"lora_alpha is {text}" for text in [_alpha_problem(alpha)] if text]
    if not found and isinstance(rank, int) and isinstance(alpha, int | float):
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)
        if scaling > MAX_SCALING:
            found.append(f"the scaling is {scaling:g} (alpha {alpha} at r {rank}), more than {MAX_SCALING:g}")
    return problems + found


def _rank_problem(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        return f"{shown(value)}, not a whole number from 1 to {MAX_RANK}"
    return ""


def _alpha_problem(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_RANK * MAX_SCALING:
        return f"{shown(value)}, not a positive number that makes a scaling of at most {MAX_SCALING:g}"
    return ""


def _patterns(config: dict[str, Any], field: str, problem: Any) -> tuple[list[Pattern], list[str]]:
    found = config.get(field)
    if found is None:
        return [], []
    if not isinstance(found, dict):
        return [], [f"{field} is {shown(found)}, not an object"]
    if len(found) > MAX_PATTERNS:
        return [], [f"{field} has {len(found):,} entries, more than {MAX_PATTERNS:,}"]
    patterns: list[Pattern] = []
    problems = []
    for key, value in found.items():
        compiled = peft_key(key)
        wrong = problem(value)
        if compiled is None:
            problems.append(f"{field} has the pattern {shown(key)}, which is too complex to be matched safely")
        if wrong:
            problems.append(f"{field}[{shown(key)}] is {wrong}")
        if compiled is not None and not wrong:
            patterns.append((compiled, float(value)))
    return patterns, problems
