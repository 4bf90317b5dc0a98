"""Makes an adapter that lora-rt and others can use of one that they can't: a pickle, or one that changed its base.

A pickle is read in a process of its own, tensors only. What an adapter began with is taken off by `beginnings.py`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_rt.core.export import ExportError
from lora_rt.core.generation.numbers import real
from lora_rt.registry.durable import check_new_folder, new_folder, storage_errors
from lora_rt.registry.files import CARD, CONFIG, LIMITS, STATE, WEIGHTS, UnusableFileError, open_plain

_PICKLE = "adapter_model.bin"
_SECONDS = 600
_READ = """
import sys, torch
from safetensors.torch import save_file
found = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
assert isinstance(found, dict) and all(isinstance(v, torch.Tensor) for v in found.values()), "no tensors by name"
save_file({str(k): v.contiguous().clone() for k, v in found.items()}, sys.argv[2], {"format": "pt"})
"""
_FROM_INITIAL = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written: `did` says what was done, in words."""

    folder: Path
    did: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {"folder": str(self.folder), "did": list(self.did)}


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
            from lora_rt.core.export.beginnings import taken_off

            config = taken_off(work, config, base, initial)
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


def _weights(source: Path, work: Path) -> list[str]:
    """Put the weights into the folder as safetensors; says that there was a pickle."""
    if (source / WEIGHTS).is_file():
        shutil.copyfile(source / WEIGHTS, work / WEIGHTS)
        return []
    parts = sorted(source.glob("adapter_model-*.safetensors"))
    if parts:
        from lora_rt.core.export.beginnings import join

        join(parts, work / WEIGHTS)
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
