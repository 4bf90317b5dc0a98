"""Makes an adapter that lora-rt and others can use of one that they can't: a pickle, or one that changed its base.

A pickle is read in a process of its own, tensors only. PiSSA and OLoRA take the factors that they begin with out of the
base: W = W_res + s B0 A0. What they have learned is s (BA - B0 A0), which is a plain LoRA of twice the rank:

    A' = [A; A0]    B' = [B, -B0]    r' = 2r    the same scaling s

A0 and B0 come out of the base by PEFT's own initialisation, or out of the folder where they were saved before training.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_rt.core.base.silence import libraries_silenced
from lora_rt.core.export import ExportError
from lora_rt.core.generation.numbers import real
from lora_rt.registry.durable import check_new_folder, new_folder, storage_errors
from lora_rt.registry.files import CARD, CONFIG, LIMITS, STATE, WEIGHTS, UnusableFileError, open_plain
from lora_rt.registry.inspection.keys import plain_key

_PICKLE = "adapter_model.bin"
_SECONDS = 600
_READ = """
import sys, torch
from safetensors.torch import save_file
found = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
assert isinstance(found, dict) and all(isinstance(v, torch.Tensor) for v in found.values()), "no tensors by name"
save_file({str(k): v.contiguous().clone() for k, v in found.items()}, sys.argv[2], {"format": "pt"})
"""
_FROM_BASE = ("pissa", "olora")
"""Whose first factors PEFT computes anew from the base alone, to the bit; `pissa_niter_N` draws random numbers."""
_FROM_INITIAL = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written: `did` says what was done, in words."""

    folder: Path
    did: tuple[str, ...]


def convert(source: Path, folder: Path, *, base: str | None = None, initial: Path | None = None) -> Converted:
    """Write a plain LoRA in safetensors.

    Args:
        source: the adapter's folder.
        folder: a new one.
        base: the dense base that the adapter was trained over, where its first factors come out of it.
        initial: the folder in which the adapter was saved before it was trained, in place of `base`.

    Raises:
        ExportError: it can't be converted, with what can be done instead.
    """
    check_new_folder(folder)
    config, did = _config(source), []
    with tempfile.TemporaryDirectory(prefix="lora-rt-convert-") as scratch:
        work = Path(scratch) / "adapter"
        work.mkdir()
        for name in (CARD, STATE, "README.md"):
            if (source / name).is_file():
                shutil.copyfile(source / name, work / name)
        did += _weights(source, work)
        start = str(config.get("init_lora_weights")).lower()
        if start.startswith((*_FROM_INITIAL, "loftq")):
            config = _plain(work, config, start, base, initial)
            did.append(f"what {start} began with is taken off: rank {config['r']}")
        if not did:
            place = source if source.is_absolute() else f"./{source}"
            step = f"There is nothing to convert; see what it is: lora-rt show {place}"
            raise ExportError(f"{source} is a plain LoRA in safetensors", next_step=step)
        (work / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
        with new_folder(folder) as made, storage_errors("the adapter"):
            for file in work.iterdir():
                shutil.copyfile(file, made / file.name)
    return Converted(folder, tuple(did))


def _config(source: Path) -> dict[str, Any]:
    try:
        with open_plain(source / CONFIG, LIMITS[CONFIG]) as (file, _):
            found = json.loads(file.read(LIMITS[CONFIG] + 1))
    except (OSError, ValueError, UnusableFileError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        text = f"{source}/{CONFIG} can't be read: {reason}" if source.is_dir() else f"there is no folder {source}"
        raise ExportError(text, next_step="Give the folder of an adapter") from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise ExportError(f"{source} is not a LoRA of PEFT", next_step="Give the folder of one")
    found = {"r": 8, "lora_alpha": 8, **found}  # PEFT's own, where a configuration says none
    if odd := [f"{key} is {found[key]!r:.40}" for key in ("r", "lora_alpha") if real(found[key]) is None]:
        raise ExportError(f"{source}/{CONFIG} can't be read", problems=odd, next_step="Give the folder of an adapter")
    return found


def _tensors(file: Path) -> dict[str, Any]:
    """
    Raises:
        ExportError: the file is not there, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{file} can't be read: {error}", next_step="Fetch the adapter again") from error


def _weights(source: Path, work: Path) -> list[str]:
    """Put the weights into the folder as safetensors; says that there was a pickle."""
    if (source / WEIGHTS).is_file():
        shutil.copyfile(source / WEIGHTS, work / WEIGHTS)
        return []
    parts = sorted(source.glob("adapter_model-*.safetensors"))
    if parts:
        from safetensors.torch import save_file

        save_file({k: v for part in parts for k, v in _tensors(part).items()}, work / WEIGHTS, {"format": "pt"})
        return ["its parts are one file"]
    if not (source / _PICKLE).is_file():
        raise ExportError(f"{source} holds neither {WEIGHTS} nor {_PICKLE}", next_step="Fetch the adapter again")
    command = [sys.executable, "-I", "-c", _READ, str(source / _PICKLE), str(work / WEIGHTS)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        text = f"{source / _PICKLE} was not read in {_SECONDS // 60} minutes"
        raise ExportError(text, next_step="Save the adapter as safetensors where it was trained") from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        text = f"{source / _PICKLE} does not hold tensors alone, and nothing else is read: {reason[:200]}"
        raise ExportError(text, next_step="Save the adapter as safetensors where it was trained")
    return ["its pickle is a safetensors file"]


def _plain(work: Path, config: Mapping[str, Any], start: str, base: str | None, initial: Path | None) -> dict[str, Any]:
    """Take off what the adapter began with; the configuration of what is left."""
    from safetensors.torch import save_file

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
    import torch

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
    from lora_rt.core.base.load import load_base

    loaded = load_base(base, "float32", "cpu")
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

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
