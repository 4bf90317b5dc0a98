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
from support.tiny import Zoo


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


EXAMPLES = [{"scene": "ab", "text": "cd"}]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"r": "8"}, "r is '8'; it must be a whole number"),
        ({"r": 8.0}, "r is 8.0; it must be a whole number"),
        ({"batch_size": 2.5}, "batch_size is 2.5; it must be a whole number"),
        ({"learning_rate": "x"}, "learning_rate is 'x'; it must be a number"),
        ({"epochs": 1e9}, "epochs is 1000000000.0; it must be above 0 and at most 10,000"),
        ({"early_stop": True}, "early_stop is True; it must be a whole number"),
        ({"special_tokens": "no"}, "special_tokens is 'no'; it must be true or false"),
        ({"target_modules": None}, "target_modules is None; it must be a list of texts"),
        ({"options": ["a"]}, "options is ['a']; it must be a mapping"),
    ],
)
def test_a_setting_of_another_kind_is_named_before_anything_is_loaded(setting: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(lora_rt.LoraRtError) as error:
        lora_rt.train("letters", tmp_path / "none.jsonl", base=tmp_path, **setting)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: lora_rt.train("letters", EXAMPLES), "data is a list"),  # type: ignore[arg-type]
        (lambda: lora_rt.train("letters", "a.jsonl", held_out=EXAMPLES), "held_out is a list"),  # type: ignore[arg-type]
        (lambda: lora_rt.tune("a", EXAMPLES), "data is a list"),  # type: ignore[arg-type]
        (lambda: lora_rt.tune(None, "a.jsonl"), "there is no composition"),  # type: ignore[arg-type]
        (lambda: lora_rt.evaluate("ab", {"d": EXAMPLES}), "compositions is one text"),
        (lambda: lora_rt.evaluate(["a"], {"d": []}), "the data 'd' has no examples"),
        (lambda: lora_rt.evaluate(["a"], {"d": [{"scene": "x"}]}), '"text" is missing'),
        (lambda: lora_rt.evaluate(["a"], {"d": [5]}), "example 1: a int, not an object"),  # type: ignore[list-item]
        (lambda: lora_rt.evaluate(["a"], 5), "data is a int"),  # type: ignore[arg-type]
        (lambda: lora_rt.export("a", "onnx", "out"), "there is no format 'onnx'"),  # type: ignore[arg-type]
        (lambda: lora_rt.export("a", "PEFT", "out"), "there is no format 'PEFT'"),  # type: ignore[arg-type]
        (lambda: lora_rt.export("a", "peft", "out", dtype="float16"), "'float16' is not a dtype"),  # type: ignore[arg-type]
        (lambda: lora_rt.prepare(5), "a base is a int"),  # type: ignore[arg-type]
        (lambda: lora_rt.Composition.parse(5), "it is a int"),  # type: ignore[arg-type]
        (lambda: lora_rt.Registry().resolve(5), "5 is not a reference"),  # type: ignore[arg-type]
    ],
)
def test_what_a_program_can_not_mean_is_refused_by_name(call: Callable[[], object], said: str) -> None:
    with pytest.raises(lora_rt.LoraRtError) as error:
        call()
    assert said in str(error.value)


def test_compositions_may_be_mappings_and_bases_paths(
    settings: Callable[..., TrainSettings], zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[object] = []
    own = lora_rt.Runtime.close
    monkeypatch.setattr(lora_rt.Runtime, "close", lambda runtime: closed.append(runtime) or own(runtime))
    base, adapter = Path(settings().base), str(zoo.adapter("llama", seed=1))
    over: dict[str, Any] = {"base": base, "precision": "float32", "device": "cpu"}
    found = lora_rt.evaluate([{adapter: 0.5}, f"{adapter}:0.5"], {"d": EXAMPLES}, **over).document()["nll"]["d"]
    assert len(set(found.values())) == 2  # the base, and one loss of both spellings
    assert len(closed) == 1  # nobody else has it


@pytest.mark.slow
def test_examples_in_both_files_are_counted(
    settings: Callable[..., TrainSettings], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    plain = settings()
    lora_rt.train(
        "letters",
        plain.data,
        held_out=plain.data,
        base=Path(plain.base),
        precision="float32",
        r=2,
        epochs=0.1,
        out=tmp_path / "out",
    )
    assert any("held-out examples are trained on as well" in record.getMessage() for record in caplog.records)
