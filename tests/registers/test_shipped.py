"""The four registers that ship, over the real default base at int4: they load by name and do what they say.

The base is fetched once and kept in pytest's cache folder. The full report, with intervals, is `make report`; here a
few held-out scenes are enough to see that what is shipped is what was measured.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_rt.core.evaluation.matrix import TextLosses, text_losses
from lora_rt.core.runtime import Runtime

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
REGISTERS = ("logic", "emotion", "body", "archetype")
SCENES = 2


@pytest.fixture(scope="module")
def runtime(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_RT_HOME", str(request.config.cache.mkdir("lora-rt-home")))
        yield Runtime.load("default")


def held_out(register: str, count: int = SCENES) -> list[dict[str, Any]]:
    lines = (ROOT / f"examples/registers/heldout/{register}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


@pytest.fixture(scope="module")
def losses(runtime: Runtime) -> dict[str, dict[str, TextLosses]]:
    """Register of the text -> "base" or adapter -> losses."""
    columns = {"base": None, **{name: name for name in REGISTERS}}
    return {text: {c: text_losses(runtime, held_out(text), spec) for c, spec in columns.items()} for text in REGISTERS}


@pytest.mark.parametrize("register", REGISTERS)
def test_a_register_gains_on_its_own_texts_and_more_than_the_others(
    register: str, losses: dict[str, dict[str, TextLosses]]
) -> None:
    row = losses[register]
    assert row["base"].mean - row[register].mean > 0.9
    assert min(row[other].mean for other in REGISTERS if other != register) - row[register].mean > 0.3


@pytest.mark.parametrize("register", REGISTERS)
def test_a_register_uses_its_scene(register: str, runtime: Runtime, losses: dict[str, dict[str, TextLosses]]) -> None:
    examples = held_out(register)
    shifted = [{**e, "scene": examples[(i + 1) % SCENES]["scene"]} for i, e in enumerate(examples)]
    assert text_losses(runtime, shifted, register).mean - losses[register][register].mean > 0.2


def test_the_mix_is_a_knob(runtime: Runtime, losses: dict[str, dict[str, TextLosses]]) -> None:
    """It lies between its ends, which are the registers alone."""
    half = [text_losses(runtime, held_out(text), "emotion:0.5 logic:0.5").mean for text in ("emotion", "logic")]
    ends = [losses["emotion"][spec].mean - losses["logic"][spec].mean for spec in ("logic", "emotion")]
    assert ends[0] > half[0] - half[1] > ends[1]


def test_greedy_answers_to_two_scenes_are_two_texts(runtime: Runtime) -> None:
    scenes = [example["scene"] for example in held_out("body")]
    texts = runtime.generate(scenes, "body", max_new_tokens=24)
    assert len(set(texts)) == SCENES


def test_a_schedule_of_joins_and_leaves_says_the_same_again(runtime: Runtime) -> None:
    """Greedy, in the few bits of the default base: what a row says may depend on its company, and on nothing else."""
    specs = ("emotion:0.7 logic:0.3", None, "registers", "emotion[.] logic", "body:1.2", "registers", "logic")
    scenes = [held_out(register, 2)[turn]["scene"] for turn in range(2) for register in REGISTERS]

    def play() -> list[tuple[list[int], str | None, str]]:
        dice = random.Random(5)
        batch, rows = runtime.batch(), []
        waiting = list(zip(scenes, specs, strict=False))
        while waiting or batch.rows:
            for scene, spec in [waiting.pop() for _ in range(min(len(waiting), dice.choice([0, 0, 1, 2])))]:
                joining = runtime.rows([scene], [spec], max_new_tokens=dice.randrange(4, 16))
                rows += joining
                batch.add(joining)
            if batch.rows and dice.random() < 0.1:
                batch.drop([dice.choice(batch.rows)])
            batch.step()
        return [(row.answer, row.ended, row.new_text()) for row in rows]

    once = play()
    assert play() == once
    assert len({text for _, _, text in once}) == len(specs)
    assert {ended is None for _, ended, _ in once} == {True, False}  # some were made to leave


def test_where_a_register_comes_from_is_said(runtime: Runtime) -> None:
    runtime.ensure("logic")
    info = runtime.adapters["logic"]
    assert info.source.startswith("shipped with lora-rt")
    assert (info.mode, info.register, info.rank) == ("output-only", "logic", 8)


def test_no_register_changes_the_base(runtime: Runtime) -> None:
    before = runtime.base_digest()
    runtime.generate("rain", "emotion:0.7 logic:0.3", max_new_tokens=4)
    runtime.unload_adapter("emotion")
    assert runtime.base_digest() == before


def begun(register: str) -> list[dict[str, str]]:
    """Prompts that end in the first sentence of a held-out text, and the rest of it."""
    parts = [(e["scene"], *re.split(r"(?<=[.!?])\s+", e["text"], maxsplit=1)) for e in held_out(register, 3)]
    return [{"scene": f"{part[0]}\n\n{part[1]}", "text": part[2]} for part in parts if len(part) == 3]


def test_the_composition_that_ships_lets_the_register_of_the_prompt_lead(runtime: Runtime) -> None:
    """It tells most prompts' types, and is better under what it finds than all four registers at their weights."""
    right = gain = count = 0
    even = " ".join(f"{name}:0.25" for name in REGISTERS)
    for register in REGISTERS:
        examples = begun(register)
        found = runtime.register_scenes([e["scene"] for e in examples], "registers")
        right += sum(max(shares, key=lambda kind: shares[kind]) == register for shares in found)
        count += len(examples)
        gain += (text_losses(runtime, examples, even).sums - text_losses(runtime, examples, "registers").sums).sum()
    assert right / count > 0.75
    assert gain > 0


@pytest.mark.parametrize("register", REGISTERS)
def test_the_composition_that_ships_tells_everyday_sentences_apart(register: str, runtime: Runtime) -> None:
    """A dozen and more that neither the corpus nor the classifier has seen."""
    lines = (ROOT / "examples/context/everyday/heldout.jsonl").read_text(encoding="utf-8").splitlines()
    sentences = [line["scene"] for line in map(json.loads, lines) if line["scene_type"] == register]
    found = runtime.register_scenes(sentences, "registers")
    assert len(sentences) >= 12
    assert sum(max(shares, key=lambda kind: shares[kind]) == register for shares in found) >= len(sentences) - 2


def test_what_the_classifier_learns_on_is_nowhere_in_what_it_is_judged_by() -> None:
    folder = ROOT / "examples/context/everyday"
    seen, judged = (
        {json.loads(line)["scene"].casefold() for line in (folder / name).read_text(encoding="utf-8").splitlines()}
        for name in ("train.jsonl", "heldout.jsonl")
    )
    assert not seen & judged
