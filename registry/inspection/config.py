"""`adapter_config.json`, field by field. Everything that is wrong is collected; nothing named in it is ever imported.

A field that is not in `_KNOWN` must be empty (null, false, 0, "", [] or {}): what we do not know may change the
mathematics, and an adapter that is loaded wrong is worse than one that is refused.
"""

from __future__ import annotations

import math
import re
from typing import Any

from lora_rt.registry import strict_json
from lora_rt.registry.files import CONFIG
from lora_rt.registry.inspection.adapted import MAX_RANK, MERGE
from lora_rt.registry.inspection.kinds import of_another_kind, parts_of
from lora_rt.registry.inspection.patterns import peft_key
from lora_rt.registry.inspection.settings import LoraSettings, Pattern
from lora_rt.registry.inspection.targets import selector, target_parameters
from lora_rt.registry.strict_json import shown

MAX_SCALING = 1000.0
MAX_PATTERNS = 10_000
MAX_SLOW = 100  # of them those that Python is not trusted with
MAX_WHOLE = 100
MAX_TOKENS = 512  # each is a rank as wide as the vocabulary

_DEFAULT = 8  # PEFT's r and lora_alpha, where a configuration leaves them out
_EXACT = (
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "init_lora_weights", "lora_bias", "bias", "base_model_name_or_path",
    "target_parameters", "auto_mapping", "megatron_core", "use_dora", "modules_to_save", "trainable_token_indices",
    "ensure_weight_tying", "alora_invocation_tokens",
)  # fmt: skip
_INERT = (
    "task_type", "peft_version", "revision", "inference_mode", "lora_dropout", "fan_in_fan_out", "qalora_group_size",
    "runtime_config", "ephemeral_gpu_offload",
    # how the factors were begun; what they are now stands in the tensors
    "eva_config", "corda_config", "lora_ga_config", "loftq_config",
    # written by ms-swift, Unsloth, PEFT before 0.3 and others, read by their training alone
    "swift_type", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "loraplus_lr_ratio", "loraplus_lr_embedding",
    "model_key_mapping", "use_merged_linear", "merge_weights", "unsloth_version", "unsloth_fixed", "model_type",
    "torch_dtype", "dtype", "transformers_version", "library_name", "velora_config",
)  # fmt: skip
_REFUSED = {
    "layer_replication": "it makes the base deeper, and so makes another base; train without it",
    "use_qalora": f"QA-LoRA pools the layer's input, which a plain LoRA does not; {MERGE}",
    "use_bdlora": f"its factors are block-diagonal, which is not composed; {MERGE}",
    "kasa_config": f"KaSA changes the base's weights; {MERGE}",
    "monteclora_config": f"MonteCLoRA draws its factors anew; {MERGE}",
    "megatron_config": "it is for a model that Megatron splits; save it for the whole model",
    "enable_lora": f"it adapts parts of a fused layer (MergedLinear); {MERGE}",
    "use_qa_lora": f"QA-LoRA pools the layer's input, which a plain LoRA does not; {MERGE}",
}

_KNOWN = {*_EXACT, *_INERT, *_REFUSED, "arrow_config"}
"""`_EXACT` is checked and computed as it says, `_INERT` changes nothing once trained, `_REFUSED` is told with the way
out. What can be converted is a value of `init_lora_weights`, see `_CONVERTIBLE`."""

_UNTOUCHED_BASE = {"true", "false", "gaussian", "eva", "orthogonal", "mica"}
_CONVERSION = "convert it to a plain LoRA with lora-rt convert"
_CONVERTIBLE = {
    **dict.fromkeys(("pissa", "olora", "corda", "lora_ga"), _CONVERSION),
    "loftq": f"PEFT can not convert it: {MERGE}",
}
_CLASSES = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_HEADS = frozenset({"classifier", "score", "qa_outputs"})  # which PEFT names by itself for these tasks
_LIBRARIES = ("transformers", "transformers_modules", "unsloth", "unsloth_compiled_cache", "peft", "trl")
_EMPTY: tuple[Any, ...] = (None, False, 0, "", [], {})


def read_config(content: bytes) -> tuple[LoraSettings | None, list[str]]:
    """The settings, or None and everything that is wrong with the configuration."""
    try:
        config = strict_json.loads(content)
    except strict_json.InvalidJsonError as error:
        return None, [f"{CONFIG} {error}"]
    if not isinstance(config, dict):
        return None, [f"{CONFIG} holds {type(config).__name__}, not an object"]
    if kind := of_another_kind(config):  # its other fields mean something else than ours would
        return None, [f"{CONFIG}: {kind}"]
    problems = [*_method(config), *_surroundings(config)]
    selects, target_problems = selector(config)
    ranks, rank_problems = _patterns(config, "rank_pattern", _rank_problem)
    alphas, alpha_problems = _patterns(config, "alpha_pattern", _number_problem)
    parameters, parameter_problems = target_parameters(config)
    saves, tokens, special = _special(config)
    problems += [*special, *_invocation(config)]
    problems += [*_numbers(config), *target_problems, *parameter_problems, *rank_problems, *alpha_problems]
    if problems:
        return None, [f"{CONFIG}: {problem}" for problem in problems]
    settings = LoraSettings(
        rank=config.get("r", _DEFAULT),
        alpha=float(config.get("lora_alpha", _DEFAULT)),
        rslora=config.get("use_rslora") or False,
        lora_bias=config.get("lora_bias") or False,
        all_linear=config["target_modules"] == "all-linear",
        selects=selects,
        parameters=parameters,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        biases=config.get("bias") in ("all", "lora_only"),
        base_name=config.get("base_model_name_or_path") or "",
        dora=config.get("use_dora") or False,
        saves=saves,
        tokens=tokens,
        invocation=tuple(config.get("alora_invocation_tokens") or ()),
        ties=bool(config.get("ensure_weight_tying")),
    )
    return settings, []


def _method(config: dict[str, Any]) -> list[str]:
    filled = [field for field in _REFUSED if config.get(field) not in _EMPTY]
    method = config.get("peft_type")
    problems = [] if method == "LORA" else [f"peft_type is {shown(method)}, only 'LORA' is composed"]
    if (arrow := config.get("arrow_config")) not in _EMPTY:
        names = (
            [arrow.get(key) for key in ("task_adapter_names", "gks_adapter_names")] if isinstance(arrow, dict) else []
        )
        problems.append(f"arrow_config: it is a router over several LoRAs (Arrow){parts_of(*names)}")
    problems += [f"{field} is {shown(config[field])}: {_REFUSED[field]}" for field in filled]
    start = config.get("init_lora_weights")
    name = str(start).lower()
    way_out = next((text for begin, text in _CONVERTIBLE.items() if name.startswith(begin)), None)
    if way_out:
        problems.append(f"init_lora_weights is {shown(start)}, which changes the base's weights; {way_out}")
    elif start is not None and name not in _UNTOUCHED_BASE:
        problems.append(f"init_lora_weights is {shown(start)}, which is unknown here")
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        problems.append(f"bias is {shown(config['bias'])}, not 'none', 'all' or 'lora_only'")
    return problems


def _special(config: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]], list[str]]:
    """The modules that were trained as a whole, the tokens whose rows were, and what is wrong with both."""
    problems = []
    saves, tokens = config.get("modules_to_save") or [], config.get("trainable_token_indices") or {}
    if not isinstance(saves, list) or len(saves) > MAX_WHOLE or not all(isinstance(name, str) for name in saves):
        problems.append(f"modules_to_save is {shown(saves)}, not a list of module names")
        saves = []
    if config.get("task_type") in _CLASSES and _HEADS.intersection(saves):
        problems.append(f"task_type is {config['task_type']!r}: it was trained to classify, with a head of its own")
    if isinstance(tokens, list):
        tokens = {"": tokens}
    if not isinstance(tokens, dict) or not all(_are_tokens(ids) for ids in tokens.values()):
        problems.append(f"trainable_token_indices is {shown(tokens)}, not up to {MAX_TOKENS:,} token ids")
        tokens = {}
    return tuple(saves), {name: tuple(ids) for name, ids in tokens.items()}, problems


def _invocation(config: dict[str, Any]) -> list[str]:
    ids = config.get("alora_invocation_tokens")
    if ids is None or (_are_tokens(ids, twice=True) and not config.get("use_dora")):
        return []
    if config.get("use_dora"):
        return ["it is an aLoRA (alora_invocation_tokens) with DoRA, which PEFT does not train either"]
    return [f"alora_invocation_tokens is {shown(ids)}, not up to {MAX_TOKENS:,} token ids"]


def _are_tokens(ids: Any, *, twice: bool = False) -> bool:
    if not isinstance(ids, list) or not 0 < len(ids) <= MAX_TOKENS:
        return False
    if not twice and len({str(one) for one in ids}) != len(ids):
        return False
    return all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 1 << 24 for one in ids)


def _surroundings(config: dict[str, Any]) -> list[str]:
    problems = []
    mapping = config.get("auto_mapping")
    if mapping not in _EMPTY and not _names_a_model(mapping):
        libraries = ", ".join(_LIBRARIES)
        problems.append(
            f"auto_mapping names code to import, {shown(mapping)}; only classes of {libraries} may be named"
        )
    if config.get("megatron_core") not in (None, "megatron.core"):
        problems.append(f"megatron_core names code to import, {shown(config['megatron_core'])}")
    name = config.get("base_model_name_or_path")
    if name is not None and not isinstance(name, str):
        problems.append(f"base_model_name_or_path is {shown(name)}, not a text")
    filled = [field for field in sorted(set(config) - _KNOWN) if config[field] not in _EMPTY]
    problems += [f"{shown(field)} is {shown(config[field])}, which is not supported" for field in filled[:20]]
    if len(filled) > 20:
        problems.append(f"and {len(filled) - 20:,} more fields that are not supported")
    return problems


def _names_a_model(mapping: Any) -> bool:
    """Whether this says which class was trained, in one of the known libraries. It is not imported in any case."""
    if not isinstance(mapping, dict):
        return False
    name, library = mapping.get("base_model_class"), mapping.get("parent_library")
    path = library if isinstance(library, str) and re.fullmatch(r"[A-Za-z0-9_.]{1,200}", library) else ""
    known = path.partition(".")[0] in _LIBRARIES
    others = [value for key, value in mapping.items() if key not in ("base_model_class", "parent_library")]
    return (
        (name is None or (isinstance(name, str) and name.isidentifier()))
        and ((name is None and library is None) or known)
        and all(value is None or isinstance(value, bool | int | float | str) for value in others)
    )


def _numbers(config: dict[str, Any]) -> list[str]:
    problems = [
        f"{field} is {shown(config[field])}, not true or false"
        for field in ("use_rslora", "lora_bias", "use_dora", "fan_in_fan_out", "ensure_weight_tying")
        if config.get(field) is not None and not isinstance(config[field], bool)
    ]
    rank, alpha = config.get("r", _DEFAULT), config.get("lora_alpha", _DEFAULT)
    found = [f"r is {text}" for text in [_rank_problem(rank)] if text]
    found += [f"lora_alpha is {text}" for text in [_alpha_problem(alpha)] if text]
    if not found and isinstance(rank, int) and isinstance(alpha, int | float):
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)
        if abs(scaling) > MAX_SCALING:
            found.append(f"the scaling is {scaling:g} (alpha {alpha} at r {rank}), more than {MAX_SCALING:g}")
    return problems + found


def _rank_problem(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        return f"{shown(value)}, not a whole number from 1 to {MAX_RANK}"
    return ""


def _alpha_problem(value: Any) -> str:
    return f"{shown(value)}, with which it does nothing" if value == 0 else _number_problem(value)


def _number_problem(value: Any) -> str:
    """Of a layer's own alpha, which may be 0: that layer is left out."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_RANK * MAX_SCALING:
        return f"{shown(value)}, not a number that makes a scaling of at most {MAX_SCALING:g}"
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
    if sum(1 for pattern, _ in patterns if not pattern.quick) > MAX_SLOW:
        problems.append(f"{field} has more than {MAX_SLOW} patterns with optional parts or lookarounds")
    return patterns, problems
