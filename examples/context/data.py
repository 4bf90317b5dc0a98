"""Makes the context mode's data out of the corpus in examples/registers.

The training scenes are parted: adapters learn on the first half, gates and classifier on the second, so that the gates
are fitted on texts that no adapter has seen. A prompt that ends in the first sentence of its text shows which
register it is in, and the answer is the rest of the text; every other example of an adapter, and every neutral example
of the gates, has the bare scene as its prompt, which shows none.

    adapters/<register>.jsonl   {"scene", "text"}
    gates.jsonl                 {"scene", "text", "scene_type"}, scene_type "neutral" for bare scenes
    heldout.jsonl               the same, of the held-out scenes, without the neutral ones
    prompts.jsonl               like gates.jsonl, every other prompt the first sentence alone: for the composition
                                `registers` over the adapters that ship, which are led by prompts of both forms
    everyday.jsonl              {"scene", "scene_type"}: prompts that teach the classifier of `registers` alone: the
                                corpus's in their other form, everyday sentences, and every other text by another hand
    turning.jsonl               {"scene", "text", "turn", "scene_types"}: after the words `turn` the register changes
    turns.jsonl                 texts of the same kind from the training scenes, in both orders of many pairs of
                                registers: from these a router learns, which is told no turn and no type
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from itertools import permutations
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent.parent / "registers"
REGISTERS = ("logic", "emotion", "body", "archetype")
TURNS = (("logic", "body"), ("emotion", "archetype"))
ADAPTER_SCENES = 188


def corpus(split: str) -> dict[str, list[dict[str, Any]]]:
    """Register -> its examples, in the same order of scenes for all."""
    paths = {register: CORPUS / split / f"{register}.jsonl" for register in REGISTERS}
    return {name: list(map(json.loads, path.read_text(encoding="utf-8").splitlines())) for name, path in paths.items()}


def parted(text: str) -> tuple[str, str]:
    """The first sentence (or clause, where there is one sentence) of a text, and the rest."""
    found = re.search(r"[.!?]['”\"]?\s+", text) or re.search(r"[;:,]\s+", text)
    assert found is not None, text
    return text[: found.end()].strip(), text[found.end() :].strip()


def begun(example: dict[str, Any]) -> dict[str, Any]:
    """An example whose prompt ends in its first sentence."""
    first, rest = parted(example["text"])
    return {"scene": f"{example['scene']}\n\n{first}", "text": rest}


def alone(example: dict[str, Any]) -> dict[str, Any]:
    """An example whose prompt is its first sentence, without its scene."""
    first, rest = parted(example["text"])
    return {"scene": first, "text": rest}


def bare(example: dict[str, Any]) -> dict[str, Any]:
    """An example whose prompt is its scene alone."""
    return {"scene": example["scene"], "text": example["text"]}


def turning(first: dict[str, Any], second: dict[str, Any], types: tuple[str, str]) -> dict[str, Any]:
    """A text that changes its register at a sentence boundary; its last words before that are `turn`."""
    example = begun(first)
    text = f"{example['text']} {second['text']}"
    return {"scene": example["scene"], "text": text, "turn": example["text"][-24:], "scene_types": list(types)}


def sentences(text: str) -> list[str]:
    """The first three of three words or more."""
    parts = (part.strip() for part in re.split(r"(?<=[.!?])['”\"]?\s+", text))
    return [part for part in parts if len(part.split()) >= 3][:3]


def everyday(split: str) -> list[dict[str, str]]:
    """Sentences as people write them, none of them from the corpus."""
    path = Path(__file__).parent / "everyday" / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def other_hand(half: int) -> list[dict[str, str]]:
    """The sentences of every other text by another hand: half 0 is learned on, half 1 is for judging."""
    texts = corpus("otherhand")
    return [
        {"scene": sentence, "scene_type": register}
        for register in REGISTERS
        for example in texts[register][half::2]
        for sentence in sentences(example["text"])
    ]


def taught(training: dict[str, list[dict[str, Any]]]) -> list[dict[str, str]]:
    """Prompts for the classifier beside those of prompts.jsonl."""
    forms = (alone, begun)
    shown = [
        {"scene": forms[number % 2](e)["scene"], "scene_type": register}
        for register in REGISTERS
        for number, e in enumerate(training[register])
    ]
    return [*shown, *everyday("train"), *other_hand(0)]


def write(path: Path, examples: Iterable[dict[str, Any]]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in examples), encoding="utf-8")


def make(folder: Path) -> None:
    """Write all files."""
    training, held_out = corpus("train"), corpus("heldout")
    for register in REGISTERS:
        mine = training[register][:ADAPTER_SCENES]
        write(folder / "adapters" / f"{register}.jsonl", (begun(e) if i % 2 else bare(e) for i, e in enumerate(mine)))
    kept = {register: training[register][ADAPTER_SCENES:] for register in REGISTERS}
    rows = zip(*kept.values(), strict=True)
    gates = [{**begun(e), "scene_type": r} for row in rows for r, e in zip(REGISTERS, row, strict=True)]
    gates += [{**bare(e), "scene_type": "neutral"} for e in kept[REGISTERS[0]]]
    write(folder / "gates.jsonl", gates)
    forms = (begun, alone)
    prompts = [
        {**forms[number % 2](e), "scene_type": r}
        for number, row in enumerate(zip(*kept.values(), strict=True))
        for r, e in zip(REGISTERS, row, strict=True)
    ]
    write(folder / "prompts.jsonl", [*prompts, *gates[-len(kept[REGISTERS[0]]) :]])
    write(folder / "everyday.jsonl", taught(training))
    pairs = list(permutations(REGISTERS, 2))
    learned = [
        turning(kept[a][number], kept[b][number], (a, b))
        for number in range(len(kept[REGISTERS[0]]))
        for a, b in (pairs[number % len(pairs)], pairs[(number + 5) % len(pairs)])
    ]
    write(folder / "turns.jsonl", learned)
    held = zip(*held_out.values(), strict=True)
    typed = ({**begun(e), "scene_type": r} for row in held for r, e in zip(REGISTERS, row, strict=True))
    write(folder / "heldout.jsonl", typed)
    turns = (turning(a, b, pair) for pair in TURNS for a, b in zip(held_out[pair[0]], held_out[pair[1]], strict=True))
    write(folder / "turning.jsonl", turns)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    make(parser.parse_args().folder)
