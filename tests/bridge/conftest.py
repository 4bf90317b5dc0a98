"""A tiny base, pairs of a toy language, and bridges trained on them in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_rt.core.runtime import Runtime
from lora_rt.core.step.settings import TrainSettings
from lora_rt.core.training.run import TrainResult, train
from lora_rt.plugins.manager import load_modes
from lora_rt.plugins.modes.bridge.hyper import HyperBridge
from support.pairs import PAIRS, write_lines
from support.tiny import Zoo


def settings_of(zoo: Zoo, folder: Path, **changes: Any) -> TrainSettings:
    """A run of a second or two over a tiny Llama, long enough to learn eight pairs of one letter."""
    data = write_lines(folder / "pairs.jsonl", PAIRS)
    plain: dict[str, Any] = {
        "register": "bridge",
        "mode": "bridge",
        "data": data,
        "held_out": data,
        "base": str(zoo.base("llama", max_position_embeddings=1024)),
        "precision": "float32",
        "r": 8,
        "alpha": 16,
        "target_modules": ("all-linear",),
        "dropout": 0.0,
        "learning_rate": 1e-2,
        "epochs": 30,
        "batch_size": 24,
    }
    return TrainSettings(**{**plain, **changes})


@pytest.fixture
def train_bridge(zoo: Zoo, tmp_path: Path) -> Callable[..., TrainResult]:
    """Trains a bridge under settings that differ from the plain ones as given."""

    def run(**changes: Any) -> TrainResult:
        out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
        out.mkdir()
        return train(settings_of(zoo, tmp_path, **changes), load_modes(), out)

    return run


@pytest.fixture(scope="session")
def learned(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Runtime, Path]:
    """A runtime, and a bridge that has learned PAIRS, with a quarter of its ranks reserved to each direction."""
    folder = tmp_path_factory.mktemp("bridge")
    out = folder / "bridge"
    out.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_RT_HOME", str(folder / "home"))
        train(settings_of(zoo, folder, options={"reserve": "0.25", "prior": "1"}, epochs=60), load_modes(), out)
    return zoo.runtime("llama", fresh=True, max_position_embeddings=1024), out


@pytest.fixture
def bridge(learned: tuple[Runtime, Path]) -> HyperBridge:
    """The learned bridge."""
    runtime, folder = learned
    return HyperBridge(runtime, str(folder), batch_size=3)
