"""Takes off what an adapter began with, where that was taken out of the base.

PiSSA and OLoRA take the factors that they begin with out of the base: W = W_res + s B0 A0. What they have learned is
s (BA - B0 A0), which is a plain LoRA of twice the rank:

    A' = [A; A0]    B' = [B, -B0]    r' = 2r    the same scaling s

A0 and B0 come out of the base by PEFT's own initialisation, or out of the folder where they were saved before training.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_rt.core.base.load import load_base
from lora_rt.core.base.silence import libraries_silenced
from lora_rt.core.export import ExportError
from lora_rt.registry.files import WEIGHTS
from lora_rt.registry.inspection.keys import plain_key

_FROM_BASE = ("pissa", "olora")
"""Whose first factors PEFT computes anew from the base alone, to the bit; `pissa_niter_N` draws random numbers."""


def join(parts: Iterable[Path], path: Path) -> None:
    """Write the tensors of several files into one.

    Raises:
        ExportError: one is not there, or is damaged.
    """
    save_file({k: v for part in parts for k, v in _tensors(part).items()}, path, {"format": "pt"})


def taken_off(work: Path, config: Mapping[str, Any], base: str | None, initial: Path | None) -> dict[str, Any]:
    """Take off what the adapter in a folder began with; the configuration of what is left.

    Args:
        work: the folder, whose weights become others.
        config: the adapter's.
        base, initial: as for `convert`.

    Raises:
        ExportError: it can't be told what that was.
    """
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith("loftq"):
        text = "LoftQ quantizes its base anew, which no LoRA of low rank undoes"
        raise ExportError(
            text, next_step="Merge it into the base that was saved with it, and give the result to --base"
        )
    if config.get("use_dora"):
        text = f"it is {start} with DoRA, whose change is not the difference of two LoRAs"
        raise ExportError(text, next_step="Merge it into its base with PEFT (merge_and_unload)")
    if initial is not None:
        before = _tensors(initial / WEIGHTS)
    elif start in _FROM_BASE and base is not None:
        before = _first_factors(config, base)
    elif start in _FROM_BASE:
        text = f"{start} takes its first factors out of the base, and no base is given"
        raise ExportError(text, next_step="Say which: --base FOLDER (dense), or --initial the adapter before training")
    else:
        text = f"what {start} begins with can't be computed anew from the base alone"
        raise ExportError(text, next_step="Give --initial, the folder of the adapter saved before training")
    before = {plain_key(key): tensor for key, tensor in before.items()}
    after = {plain_key(key): tensor for key, tensor in _tensors(work / WEIGHTS).items()}
    if problems := [key for key in after if ".lora_" in key and key not in before]:
        text = "the factors before training are not of the same layers"
        raise ExportError(text, problems=problems[:10], next_step="Give the base or --initial of this very adapter")
    save_file({key: _longer(key, tensor, before) for key, tensor in after.items()}, work / WEIGHTS, {"format": "pt"})
    return _doubled(config)


def _longer(key: str, after: Any, before: Mapping[str, Any]) -> Any:
    if ".lora_A." in key or key.endswith(".lora_embedding_A"):
        return torch.cat([after.float(), before[key].float()]).contiguous()
    if key.endswith((".lora_B.weight", ".lora_embedding_B")):
        return torch.cat([after.float(), -before[key].float()], dim=1).contiguous()
    return after


def _doubled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Twice the rank at the same scaling: alpha / r doubles with r, alpha / sqrt(r) with its root."""
    grows = math.sqrt(2) if config.get("use_rslora") else 2
    return {
        **config,
        "r": config["r"] * 2,
        "lora_alpha": config["lora_alpha"] * grows,
        "rank_pattern": {key: rank * 2 for key, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: alpha * grows for key, alpha in (config.get("alpha_pattern") or {}).items()},
        "init_lora_weights": True,
        **{key: None for key in ("corda_config", "lora_ga_config") if key in config},
    }


def _first_factors(config: Mapping[str, Any], base: str) -> dict[str, Any]:
    """What PEFT begins with over this base, by the keys of an adapter's file."""
    loaded = load_base(base, "float32", "cpu")
    kept = {key: value for key, value in config.items() if key not in ("peft_type", "auto_mapping", "runtime_config")}
    try:
        with libraries_silenced(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            known = {key: value for key, value in kept.items() if key in LoraConfig.__dataclass_fields__}
            adapted = get_peft_model(loaded.model, LoraConfig(**(known | {"inference_mode": False})))
            found = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        text = f"PEFT can't begin this adapter over {base}: {error}"
        raise ExportError(text[:400], next_step="Give the base that it was trained over") from error
    return {key: tensor.detach().clone() for key, tensor in found.items()}


def _tensors(file: Path) -> dict[str, Any]:
    """
    Raises:
        ExportError: the file is not there, or is damaged.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{file} can't be read: {error}", next_step="Fetch the adapter again") from error
