"""A composition as one standard PEFT adapter: `adapter_config.json` and `adapter_model.safetensors`.

Every scaling is 1 (alpha is the rank, for each rank that occurs): readers that know no patterns, such as vLLM's, then
compute the same as PEFT.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_rt.core.engine.stack import Factors
from lora_rt.core.export.outline import Outline
from lora_rt.registry.files import CONFIG, WEIGHTS

_PREFIX = "base_model.model."


def write_peft_adapter(folder: Path, factors: Mapping[str, Factors], base: Outline) -> None:
    """Write the two files of an adapter; `factors` by module path, in the dtype to save."""
    _write_config(folder, factors, base)

    biased = _biased(factors)
    tensors: dict[str, Tensor] = {}
    for module, item in factors.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = item.a.contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = item.b.contiguous()
        if biased:  # in PEFT all layers have one, or none
            none = torch.zeros(item.b.shape[0], dtype=item.b.dtype)
            tensors[f"{_PREFIX}{module}.lora_B.bias"] = none if item.bias is None else item.bias
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def _write_config(folder: Path, factors: Mapping[str, Factors], base: Outline) -> None:
    ranks = {module: item.a.shape[0] for module, item in factors.items()}
    rank = max(ranks.values())
    patterns = _rank_patterns(ranks, rank)
    # Written by hand, so that PEFT need not be there: what is left out has PEFT's default in every version of it.
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": shortest_names(factors, base.linears),
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": _biased(factors),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(module in base.transposed for module in factors),
        "base_model_name_or_path": base.identity.id,
        "revision": base.identity.revision,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _biased(factors: Mapping[str, Factors]) -> bool:
    return any(item.bias is not None for item in factors.values())


def _rank_patterns(ranks: Mapping[str, int], usual: int) -> dict[str, int]:
    """The names of the modules whose rank is not the usual one, and that rank."""
    by_rank: dict[int, list[str]] = defaultdict(list)
    for module, rank in ranks.items():
        if rank != usual:
            by_rank[rank].append(module)
    return {name: rank for rank, modules in by_rank.items() for name in shortest_names(modules, ranks)}


def shortest_names(wanted: Iterable[str], among: Iterable[str]) -> list[str]:
    """Names that mean exactly the wanted modules, where a name means every module whose path ends with it.

    An end of the path such as `q_proj` or `attn.c_proj` where all modules that have it are wanted, else the whole path.
    """
    chosen = dict.fromkeys(wanted)
    taken = {end for module in among if module not in chosen for end in _ends(module)}
    return sorted({next((end for end in _ends(module) if end not in taken), module) for module in chosen})


def _ends(module: str) -> Iterator[str]:
    """The ends of a path up to its block's number: `q_proj`, `self_attn.q_proj`; the whole path where it has none."""
    parts = module.split(".")
    for start in range(len(parts) - 1, -1, -1):
        if parts[start].isdigit():
            return
        yield ".".join(parts[start:])
