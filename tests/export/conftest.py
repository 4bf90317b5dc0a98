"""Exports over tiny bases, and adapters that differ in rank, scaling and layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_rt.core.export.run import Exported, export
from support.exports import Export
from support.tiny import Zoo


@pytest.fixture
def exported(zoo: Zoo, tmp_path: Path) -> Export:
    """`exported(spec, to="peft", architecture="llama", **options)` in a folder of its own."""
    count = iter(range(1_000))

    def run(spec: str, to: Any = "peft", architecture: str = "llama", **options: Any) -> Exported:
        base = str(options.pop("base", None) or zoo.base(architecture))
        return export(spec, to, tmp_path / f"export-{next(count)}", base=base, **options)

    return run


@pytest.fixture(scope="session")
def pool(zoo: Zoo) -> list[Path]:
    """Llama adapters: plain, rank-stabilised, with patterns, on the MLP, in one layer, with biases."""
    return [
        zoo.adapter("llama", seed=1, r=4),
        zoo.adapter("llama", seed=2, r=6, use_rslora=True, lora_alpha=5),
        zoo.adapter("llama", seed=3, r=8, rank_pattern={"k_proj": 3}, alpha_pattern={"v_proj": 40}),
        zoo.adapter("llama", seed=4, r=2, targets=("gate_proj", "up_proj", "down_proj")),
        zoo.adapter("llama", seed=5, r=5, targets=("q_proj", "down_proj"), layers_to_transform=[1]),
        zoo.adapter("llama", seed=6, r=3, targets=("v_proj", "lm_head"), lora_bias=True),
    ]
