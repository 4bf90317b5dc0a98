"""Training reads and ends texts as generation does: the template's end of a turn is learned, and stops an answer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lora_rt.core.base.load import load_base
from lora_rt.core.generation.prompts import TextFormat
from lora_rt.core.runtime import Runtime
from lora_rt.core.step.settings import TrainSettings
from lora_rt.core.training import prepare
from lora_rt.core.training.run import train
from lora_rt.core.training.sources import DataError
from lora_rt.plugins.contract import IGNORE
from lora_rt.plugins.manager import load_modes
from support import templates
from support.templates import save_base, tokenizer

pytestmark = pytest.mark.slow

ENDS = {
    "none": (None, "<eos>"),
    "chatml": (templates.CHATML, "<|im_end|>"),
    "llama3": (templates.LLAMA3, "<|eot_id|>"),
    "gemma": (templates.GEMMA, "<end_of_turn>"),
    "qwen3": (templates.QWEN3, "<|im_end|>"),
    "mistral": (templates.MISTRAL, "<eos>"),
    "parts": (templates.PARTS, "<|im_end|>"),
}


def pairs(path: Path, count: int = 12, text: str = "ab") -> Path:
    lines = [{"scene": f"scene {number}", "text": text} for number in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def settings(base: Path, data: Path, **changes: Any) -> TrainSettings:
    plain = {"r": 8, "alpha": 16, "learning_rate": 2e-2, "epochs": 1, "batch_size": 4, "precision": "float32"}
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return TrainSettings(
        "letters", "output-only", data, **{"base": str(base), "target_modules": targets, **plain, **changes}
    )


@pytest.mark.parametrize("name", list(ENDS))
def test_the_end_of_a_turn_is_learned_and_stops_the_answer(name: str, tmp_path: Path) -> None:
    template, end = ENDS[name]
    fast = tokenizer("bytes", template)
    save_base(tmp_path / "base", fast)
    folder = tmp_path / "adapter"
    folder.mkdir()
    train(settings(tmp_path / "base", pairs(tmp_path / "d.jsonl", 24), epochs=4), load_modes(), folder)
    runtime = Runtime.load(str(tmp_path / "base"), precision="float32", device="cpu", project=tmp_path)
    assert fast.convert_tokens_to_ids(end) in runtime.text.end_ids
    assert runtime.generate("scene 3", str(folder), max_new_tokens=12) == "ab"


@pytest.mark.parametrize("name", list(ENDS))
def test_labels_are_the_answer_and_the_end_of_its_turn(name: str, tmp_path: Path) -> None:
    template, end = ENDS[name]
    fast = tokenizer("byte-level", template)
    save_base(tmp_path / "base", fast)
    chosen = settings(tmp_path / "base", pairs(tmp_path / "d.jsonl", 4, "rain<|im_end|>"))
    base = load_base(chosen.base, "float32", "cpu", for_training=True)
    text = TextFormat.of_base(base)
    objective = prepare.objective_of(chosen, load_modes(), base, text)
    for (_line, (item,)), prompt in zip(prepare._encoded(chosen, chosen.data, objective, base), range(4), strict=True):
        labels = [label for label in item.labels if label != IGNORE]
        assert labels[-1] == fast.convert_tokens_to_ids(end)
        assert fast.convert_tokens_to_ids("<|im_end|>") not in labels[:-1]
        assert [*text.prompt_ids(f"scene {prompt}"), *labels] == list(item.input_ids)


def test_chats_are_trained_on_and_measured(tmp_path: Path) -> None:
    save_base(tmp_path / "base", tokenizer("bytes", templates.CHATML))
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    lines = [{"messages": [*chat, {"role": "assistant", "content": f"a{number}"}]} for number in range(12)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = tmp_path / "adapter"
    folder.mkdir()
    result = train(settings(tmp_path / "base", tmp_path / "d.jsonl"), load_modes(), folder)
    assert result.loss_after < result.loss_before


def test_too_long_rows_are_named_by_their_lines(tmp_path: Path) -> None:
    save_base(tmp_path / "base", tokenizer("bytes", None), max_position_embeddings=64)
    lines, long = [], []
    for number in range(20):
        if number in (7, 15):
            long.append(len(lines) + 1)
        lines.append(json.dumps({"scene": f"s{number}", "text": "word " * 40 if number in (7, 15) else "ok"}))
        lines += [""] if number % 3 == 0 else []
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        train(settings(tmp_path / "base", tmp_path / "d.jsonl"), load_modes(), tmp_path / "out")
    assert [problem.split(":")[0] for problem in caught.value.problems] == [f"line {number}" for number in long]


def test_a_padding_token_that_the_model_does_not_have_is_not_used(tmp_path: Path) -> None:
    fast = tokenizer("bytes", templates.CHATML)
    size = len(fast)
    fast.add_special_tokens({"pad_token": "[PAD]"})
    save_base(tmp_path / "base", fast, vocab_size=size)
    data = pairs(tmp_path / "d.jsonl")
    folder = tmp_path / "adapter"
    folder.mkdir()
    train(settings(tmp_path / "base", data), load_modes(), folder)
    runtime = Runtime.load(str(tmp_path / "base"), precision="float32", device="cpu", project=tmp_path)
    prompts = ["hi there", "a much longer prompt than that"]
    alone = [runtime.generate(prompt, str(folder), max_new_tokens=6) for prompt in prompts]
    assert runtime.generate(prompts, str(folder), max_new_tokens=6) == alone
    assert all(loss.isfinite().all() for loss in runtime.answer_nll(prompts, ["yes", "no no no"], str(folder)))


def test_an_adapter_trained_with_another_template_is_said_once_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fast = tokenizer("bytes", templates.QWEN3)
    save_base(tmp_path / "base", fast)
    folder = tmp_path / "adapter"
    folder.mkdir()
    quick = {"enable_thinking": False}
    result = train(
        settings(tmp_path / "base", pairs(tmp_path / "d.jsonl"), template_variables=quick), load_modes(), folder
    )
    assert result.card.training["template_variables"] == '{"enable_thinking": false}'

    def notes(**how: Any) -> list[str]:
        caplog.clear()
        runtime = Runtime.load(str(tmp_path / "base"), precision="float32", device="cpu", project=tmp_path, **how)
        with caplog.at_level(logging.WARNING, "lora_rt.requests"):
            for _ in range(2):
                runtime.generate("x", str(folder), max_new_tokens=1)
        return [record.getMessage() for record in caplog.records]

    assert notes(template_variables=quick) == []
    assert [note.split(" was ")[1] for note in notes()] == [
        'trained with the template variables {"enable_thinking": false}, and they are none here'
    ]
