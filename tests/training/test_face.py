"""The public face trains and evaluates as the commands do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import lora_rt
from lora_rt.core.programs import TrainOptions
from lora_rt.core.step.settings import TrainSettings


@pytest.mark.slow
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


def test_the_keywords_of_train_are_the_settings() -> None:
    positional = {"register", "data", "mode"}
    assert set(TrainOptions.__annotations__) == {f.name for f in dataclasses.fields(TrainSettings)} - positional


def test_layers_and_scene_types_may_be_one_text(settings: Callable[..., TrainSettings]) -> None:
    plain = settings()
    with pytest.raises(lora_rt.LoraRtError, match="the nearest is 'q_proj'"):
        lora_rt.train("letters", plain.data, base=plain.base, precision="float32", target_modules="q_prj,v_proj")
    with pytest.raises(TypeError, match="rank"):
        lora_rt.train("letters", plain.data, rank=4)  # type: ignore[call-arg]


@pytest.mark.slow
def test_a_program_tunes_a_composition_and_exports_it(settings: Callable[..., TrainSettings], tmp_path: Path) -> None:
    plain = settings()
    over: dict[str, Any] = {"base": plain.base, "precision": "float32"}
    lora_rt.train("letters", plain.data, **over, r=4, alpha=8, learning_rate=2e-2, batch_size=4)
    found = lora_rt.tune("letters:0.2", plain.data, name="mine", **over, learning_rate=0.1, batch_size=4)
    document = found.document()
    assert document["metrics"]["nll_after"] < document["metrics"]["nll_before"]
    (term,) = document["terms"]
    assert term["weight"] > 0.2
    exported = lora_rt.export("mine", "peft", tmp_path / "out", base=plain.base)
    assert exported.document()["terms"][0]["weight"] == pytest.approx(term["weight"])
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as tensors:
        assert len(list(tensors.keys())) == 2 * exported.modules


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"learning_rate": float("nan")}, {"per": "word"}])
def test_settings_that_can_not_tune_are_refused_at_once(wrong: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(lora_rt.LoraRtError, match="these settings can't tune"):
        lora_rt.tune("emotion", tmp_path / "none.jsonl", **wrong)  # type: ignore[arg-type]
