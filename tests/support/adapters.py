"""Small, valid adapters made of numbers alone: no torch, no PEFT, a millisecond each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

HIDDEN, MIDDLE, LAYERS = 16, 32, 2
SIZES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (8, HIDDEN),
    "self_attn.v_proj": (8, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.up_proj": (MIDDLE, HIDDEN),
    "mlp.down_proj": (HIDDEN, MIDDLE),
}
LINEARS = {f"model.layers.{layer}.{name}": size for layer in range(LAYERS) for name, size in SIZES.items()}
LINEARS["lm_head"] = (64, HIDDEN)

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "megatron_core": "megatron.core",
    "inference_mode": True,
    "peft_version": "0.21.2",
}
BASE = {"id": "tests/tiny-base", "revision": None, "digest": "d" * 16}
CARD: dict[str, Any] = {
    "schema_version": 1,
    "register": "emotion",
    "mode": "output-only",
    "base": BASE,
    "scene_types": [],
    "data_sha256": "0" * 64,
    "seed": 0,
    "metrics": {"gain_nats_per_token": 1.19},
    "licence": "Apache-2.0",
}


def tensors(rank: int = 4, targets: tuple[str, ...] = ("q_proj", "v_proj"), seed: int = 0) -> dict[str, np.ndarray]:
    """A and B of every targeted module, named as PEFT names them."""
    random = np.random.default_rng(seed)
    found = {}
    for module, (out_features, in_features) in LINEARS.items():
        if module.endswith(targets):
            a, b = (rank, in_features), (out_features, rank)
            found[f"base_model.model.{module}.lora_A.weight"] = random.normal(0, 0.1, a).astype(np.float32)
            found[f"base_model.model.{module}.lora_B.weight"] = random.normal(0, 0.1, b).astype(np.float32)
    return found


def adapter_files(*, card: bool = True, seed: int = 0, base: dict[str, Any] | None = None) -> dict[str, bytes]:
    """The files of a good adapter, by name."""
    files = {
        "adapter_config.json": json.dumps(CONFIG, indent=2).encode(),
        "adapter_model.safetensors": save(tensors(seed=seed)),
        "README.md": b"# an adapter\n",
    }
    if card:
        files["register.json"] = json.dumps(CARD | {"base": base or BASE}, indent=2).encode()
    return files


def write_adapter(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    """Write the files of an adapter into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (files or adapter_files()).items():
        (folder / name).write_bytes(content)
    return folder


def in_parts(folder: Path) -> None:
    """Cut the weights of an adapter into two files with an index, as PEFT saves large ones."""
    from safetensors.torch import load_file, save_file

    whole = folder / "adapter_model.safetensors"
    found = load_file(whole)
    whole.unlink()
    places: dict[str, str] = {}
    for number in (0, 1):
        part = {key: found[key] for key in sorted(found)[number::2]}
        name = f"adapter_model-0000{number + 1}-of-00002.safetensors"
        save_file(part, folder / name, {"format": "pt"})
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in found.values())}, "weight_map": places}
    (folder / f"{whole.name}.index.json").write_text(json.dumps(index))
