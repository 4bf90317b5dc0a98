"""The matrix: its numbers are those of the logits, its intervals cover, its pictures and tables hold every cell."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from lora_rt.core.base.picture import PlotError
from lora_rt.core.cli.wrapping import show_table
from lora_rt.core.evaluation.matrix import BASE, Matrix, TextLosses, evaluate, ratio_interval, text_losses
from lora_rt.core.evaluation.shown import matrix_table, plot_matrix
from lora_rt.core.generation.prompts import prompt_ids
from lora_rt.core.requests.composition import Composition
from lora_rt.errors import LoraRtError
from support.tiny import Zoo
from support.words import answer_ids

EXAMPLES = [
    {"scene": "ab", "text": "some text"},
    {"scene": "a longer scene", "text": "x"},
    {"scene": "c", "text": "yz yz"},
]


def test_losses_equal_those_read_off_the_logits(zoo: Zoo) -> None:
    runtime = zoo.runtime("llama")
    losses = text_losses(runtime, EXAMPLES, None)
    for i, example in enumerate(EXAMPLES):
        prompt, answer = prompt_ids(runtime.tokenizer, example["scene"]), answer_ids(runtime.tokenizer, example["text"])
        chances = runtime.logits(torch.tensor([[*prompt, *answer]])).log_softmax(-1)[0]
        by_hand = -sum(float(chances[len(prompt) - 1 + t, token]) for t, token in enumerate(answer))
        assert losses.sums[i] == pytest.approx(by_hand, abs=1e-3)
        assert losses.tokens[i] == len(answer)


def test_the_document_has_every_cell_in_the_contracts_form(zoo: Zoo) -> None:
    document = evaluate(zoo.runtime("llama"), {"letters": EXAMPLES}, []).document()
    assert set(document) == {"nll", "ci", "examples"}
    low, high = document["ci"]["letters"][BASE]
    assert low <= document["nll"]["letters"][BASE] <= high
    assert document["examples"] == {"letters": 3}


def test_losses_that_are_no_numbers_are_no_table(zoo: Zoo) -> None:
    spec = f"{zoo.adapter('llama', seed=1)}:1e30"
    with pytest.raises(LoraRtError, match="not numbers any more") as caught:
        evaluate(zoo.runtime("llama"), {"letters": EXAMPLES}, {"huge": Composition.of(spec)})  # type: ignore[dict-item]
    assert caught.value.problems == ("huge on letters",)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        tokens = random.integers(20, 60, 64)
        sums = tokens * random.normal(3.0, 0.5, 64)
        low, high = ratio_interval(sums, tokens, seed=trial)
        hits += low <= 3.0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def small_matrix() -> Matrix:
    def losses(nats: float) -> TextLosses:
        return TextLosses(np.array([nats * 10, nats * 20]), np.array([10, 20]))

    return Matrix(
        {"emotion": {BASE: losses(5.0), "emotion": losses(3.5)}, "logic": {BASE: losses(4.0), "emotion": losses(4.4)}}
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_holds_every_cell_however_narrow_the_terminal_is(terminal: bool) -> None:
    console = Console(width=20, record=True, file=io.StringIO(), force_terminal=terminal)
    show_table(console, *matrix_table(small_matrix()))
    text = console.export_text()
    assert all(number in text for number in ("5.00", "3.50", "4.00", "4.40"))


@pytest.mark.slow
def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    plot_matrix(small_matrix(), tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    with pytest.raises(PlotError, match="can't be written"):
        plot_matrix(small_matrix(), tmp_path / "no" / "such" / "folder.png")
