"""The evaluation: words and controls by hand, and the sections on a good bridge and on one that does nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_rt.core.runtime import Runtime
from lora_rt.plugins.modes.bridge.hyper import HyperBridge
from lora_rt.plugins.modes.bridge.measure import SECTIONS, BridgeSettings, measure_bridge, raw_losses
from lora_rt.plugins.modes.bridge.table import bridge_table
from lora_rt.plugins.modes.bridge.words import chrf, f1, guesses, literal_and_hidden, wanted_words, words_of
from support.pairs import DOCUMENT, PAIRS

pytestmark = pytest.mark.slow

TEXT = "The baker sleeps; his loaves are warm, and the oven hums."


def test_words_are_the_different_content_words_of_any_script() -> None:
    assert words_of("The baker's loaves, and the LOAVES") == ["baker", "loaves"]
    assert words_of(DOCUMENT["scene"]) == ["тишинажарвход"]
    assert words_of("...") == []
    assert words_of("Here and there") == ["here", "and", "there"]


def test_a_scene_that_is_written_run_together_is_judged_by_its_words() -> None:
    assert wanted_words({"scene": "warmloaves", "words": ["Warm", "loaves"]}) == ["warm", "loaves"]
    assert wanted_words({"scene": "warm loaves"}) == ["warm", "loaves"]


def test_f1_is_that_of_two_sets() -> None:
    assert f1(["baker", "oven"], ["baker", "asleep", "warm"]) == pytest.approx(2 * 1 / 5)
    assert f1([], ["baker"]) == f1(["oven"], ["baker"]) == 0.0
    assert f1(["warm", "baker"], ["baker", "warm"]) == 1.0


def test_guesses_have_the_length_of_the_prediction() -> None:
    found = guesses(TEXT, ["baker", "warm"], 2, ["oven"], seed=0)
    assert found["first words"] == f1(["baker", "sleeps"], ["baker", "warm"])
    assert found["last words"] == f1(["oven", "hums"], ["baker", "warm"])
    assert found["another scene"] == 0.0
    # Two of six words, drawn at random: on average a third of each of the two is found.
    assert found["random words"] == pytest.approx(1 / 3, abs=0.12)


def test_words_that_a_text_hides_are_told_from_literal_ones() -> None:
    assert literal_and_hidden(TEXT, ["baker", "asleep", "warm"]) == (["baker", "warm"], ["asleep"])


def test_chrf_is_100_for_the_text_itself_and_less_for_another() -> None:
    same, other = chrf([TEXT, "nothing like it"], [TEXT, TEXT])
    assert same == pytest.approx(100)
    assert other < 30


def test_the_loss_of_a_plain_text_does_not_depend_on_its_neighbours(learned: tuple[Runtime, Path]) -> None:
    runtime, _folder = learned
    together = raw_losses(runtime, ["abc", "a longer text", "b"])
    assert together == pytest.approx(
        [raw_losses(runtime, [text])[0] for text in ("abc", "a longer text", "b")], rel=1e-4
    )


@pytest.fixture(scope="module")
def document(learned: tuple[Runtime, Path]) -> dict[str, Any]:
    """All sections of the good bridge on what it learned."""
    runtime, folder = learned
    settings = BridgeSettings(among=4, candidates=2, one_direction=str(folder))
    return measure_bridge(runtime, str(folder), PAIRS, settings)


def test_a_good_bridge_is_good_in_every_section(document: dict[str, Any]) -> None:
    assert set(document) == set(SECTIONS)
    assert document["compress"]["f1"] == {"mean": 1.0, "ci": [1.0, 1.0]}
    assert document["scene_text_scene"]["greedy"]["exact"]["mean"] == 1.0
    assert document["text_scene_text"]["chrf"]["mean"] == pytest.approx(100)
    assert document["ranking"]["bridge"]["pmi"]["mean"] == 1.0
    assert document["forward"]["gain_over_base"]["ci"][0] > 0
    assert document["bits_per_character"]["saved"]["ci"][0] > 0


def test_the_controls_stand_beside_it_and_are_worse(document: dict[str, Any]) -> None:
    controls = document["compress"]["controls"]
    assert set(controls) == {"base", "first words", "last words", "random words", "another scene"}
    assert max(control["mean"] for control in controls.values()) < 0.5
    assert document["compress"]["minus_best_control"]["ci"][0] > 0
    assert document["scene_text_scene"]["base"]["f1"]["mean"] < 0.5


def test_an_adapter_costs_nothing_against_itself(document: dict[str, Any]) -> None:
    assert document["forward"]["cost_of_both_directions"]["mean"] == pytest.approx(0.0, abs=1e-6)


def test_a_bridge_that_does_nothing_finds_nothing(learned: tuple[Runtime, Path]) -> None:
    runtime, folder = learned
    settings = BridgeSettings(among=4)
    muted = SECTIONS["compress"](HyperBridge(runtime, f"{folder}:0"), HyperBridge(runtime, None), PAIRS, settings)
    assert muted["f1"]["mean"] < 0.5
    assert muted["minus_best_control"]["ci"][0] <= 0


def test_the_table_has_a_line_for_every_claim(document: dict[str, Any]) -> None:
    from io import StringIO

    from rich.console import Console

    page = StringIO()
    Console(file=page, width=200).print(bridge_table(document, "[bridge]"))
    for words in ("[bridge]", "keyword F1", "best of 2", "chrF", "PMI", "second direction", "bits per character"):
        assert words in page.getvalue()
