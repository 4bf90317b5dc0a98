"""Bases whose numbers depend on how long a row is, or on its padding: a row beside others is still the row alone."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

from lora_rt.core.runtime import Runtime
from support.architectures.checks import Subject
from support.tiny import random_model, save_tokenizer, some_ids

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "long_factor": [4.0 + i for i in range(8)],
    "short_factor": [1.0] * 8,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
    "factor": 8.0,
}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}),
    "window": ("mistral", {"sliding_window": 8}),
    "recurrent": (
        "recurrent_gemma",
        {"attention_window_size": 16, "lru_width": 64, "block_types": ["recurrent", "attention"], "head_dim": 16},
    ),
    "convolutions": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lengths")


def runtime_of(folder: Path, kind: str) -> Runtime:
    place = folder / kind
    if not place.exists():
        model_type, fields = KINDS[kind]
        config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **fields})
        random_model(config).save_pretrained(place)
        save_tokenizer(place, chat=False)
    return Runtime.load(place, precision="float32", device="cpu", project=folder)


def decoded(runtime: Runtime, rows: list[list[int]], steps: int = 12, **options: Any) -> list[list[int | None]]:
    found = list(runtime.decode(rows, max_new_tokens=steps, min_new_tokens=steps, **options))
    return [list(row) for row in zip(*found, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_other_lengths_change_nothing_in_a_row(folder: Path, kind: str) -> None:
    runtime = runtime_of(folder, kind)
    lengths = (10, 60, 28, 30, 7, 10)
    rows = [some_ids(1, length, seed=number)[0].tolist() for number, length in enumerate(lengths)]
    if kind == "dynamic":
        assert runtime.parts.lm.capacity == 128  # four times what is stated
    alone = [decoded(runtime, [row])[0] for row in rows]
    assert decoded(runtime, rows) == alone
    assert len({tuple(answer) for answer in alone}) > 1, "the model says something"
    width = max(lengths)
    for left in (True, False):
        ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            ids[number, place], mask[number, place] = torch.tensor(row), 1
        together = runtime.logits(ids, mask)
        for number, row in enumerate(rows):
            own = runtime.logits([row])[0]
            assert_close(together[number][mask[number].bool()], own, atol=1e-3, rtol=0.0)


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "recurrent"])
def test_growing_past_the_switch_is_what_transformers_generates(folder: Path, kind: str) -> None:
    runtime = runtime_of(folder, kind)
    ids = some_ids(1, 28, seed=3)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32).eval()
    wanted = model.generate(ids, max_new_tokens=16, min_new_tokens=16, do_sample=False)[0, 28:].tolist()
    assert decoded(runtime, ids.tolist(), 16)[0] == wanted


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
@pytest.mark.parametrize("length", [12, 40, 70])
def test_a_prompt_that_may_be_read_in_chunks_is_read_under_the_factors_of_all_of_it(
    folder: Path, kind: str, length: int
) -> None:
    runtime = runtime_of(folder, kind)
    found = []
    for chunk in (None, 8):
        (row,) = runtime.rows(["a" * length], max_new_tokens=3, min_new_tokens=3)
        row.likely, steps = 0, 0
        batch = runtime.batch(chunk=chunk)
        batch.add([row])
        while batch.rows and steps < length:
            batch.step()
            steps += 1
        assert len(row.answer) == 3
        found.append(torch.tensor([one.logprob for one in row.scores]))
    assert_close(*found, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize(("kind", "steps"), [("jamba", 3), ("zamba", 3), ("lfm2_moe", 6)])
def test_a_model_that_goes_on_from_its_state_with_a_single_token_reads_prompts_at_once(
    kind: str, steps: int, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runtime = Subject(kind, tmp_path).runtime
    (row,) = runtime.rows(["a longer prompt"], max_new_tokens=3, min_new_tokens=3)
    assert runtime.parts.lm.keeping == "apart"
    alone = list(runtime.decode([row.ids], max_new_tokens=3, min_new_tokens=3))
    batch, taken = runtime.batch(chunk=-(-row.length // 4)), 0
    batch.add([row])
    while batch.rows:
        batch.step()
        taken += 1
    assert [[token] for token in row.answer] == alone
    assert taken == steps


def test_answers_are_scored_by_the_factors_of_the_whole_row(folder: Path) -> None:
    runtime = runtime_of(folder, "longrope")
    prompt, answers = "a" * 25, ["b" * 4, "c" * 20]
    batch = runtime.answer_nll([prompt] * 2, answers)
    choices = runtime.choices_nll(prompt, answers)
    for answer, one, other in zip(answers, batch, choices, strict=True):
        alone = runtime.answer_nll([prompt], [answer])[0]
        assert_close(one, alone, atol=1e-4, rtol=0.0)
        assert_close(other, alone, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_threads_with_rows_of_other_lengths_do_not_meet(folder: Path, kind: str) -> None:
    runtime = runtime_of(folder, kind)
    rows = [some_ids(1, length, seed=length)[0].tolist() for length in (8, 50, 70)]
    alone = [decoded(runtime, [row])[0] for row in rows]
    found: dict[int, list[Any]] = {number: [] for number in range(len(rows))}

    def work(number: int) -> None:
        found[number] += [decoded(runtime, [rows[number]])[0] for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [answer] * 3 for number, answer in enumerate(alone)}
