"""The public face trains and evaluates as the commands do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lora_rt
from lora_rt.core.step.settings import TrainSettings


def test_a_program_trains_measures_and_finds_its_adapter(
    settings: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    plain = settings()
    over = {"base": plain.base, "precision": "float32"}
    chosen = {"r": 4, "alpha": 8, "learning_rate": 2e-2, "epochs": 2, "batch_size": 4}
    trained = lora_rt.train("letters", plain.data, **over, **chosen)
    assert trained.document()["nll"][1] < trained.document()["nll"][0]
    assert [item.name for item in lora_rt.Registry(project=tmp_path).store.installed()] == ["letters"]
    nll = lora_rt.evaluate(["letters"], {"mine": plain.data}, **over).document()["nll"]["mine"]
    assert nll["letters"] < nll["base"]
