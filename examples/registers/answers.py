"""Writes the registers' answers to held-out scenes into answers.json, for people to read, and counts what can be told.

40 greedy and 40 sampled ones (as `compose` samples) of each register; what was written is kept, so that a run that was
cut off goes on. Whoever reads them notes in "faults" of each answer what is wrong with it, letters of `FAULTS`:
answers.py [--texts N] [--penalty X]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from report import HERE, REGISTERS, read, word_classifier

from lora_rt import Runtime

FAULTS = {
    "g": "not grammatical, or words that are none",
    "s": "leaves the scene, or takes little of it",
    "e": "does not end properly",
    "r": "says again what it has said",
    "n": "makes no sense, though its grammar is right",
}
SAMPLED = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
TOKENS = 128


def repeats(text: str) -> bool:
    """Whether four words in a row stand in it twice."""
    words = text.lower().split()
    fours = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(set(fours)) < len(fours)


def written(runtime: Runtime, scenes: list[str], way: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The answers of all registers, in one batch; the seed of each is the number of its scene."""
    rows = [(register, number, scene) for register in REGISTERS for number, scene in enumerate(scenes)]
    registers, seeds, prompts = (list(column) for column in zip(*rows, strict=True))
    texts = runtime.generate(prompts, registers, max_new_tokens=TOKENS, seed=seeds, **way)
    found: dict[str, list[dict[str, Any]]] = {register: [] for register in REGISTERS}
    for (register, _, scene), text in zip(rows, texts, strict=True):
        found[register].append({"scene": scene, "text": text, "faults": None})
    return found


def main() -> None:
    """Write what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=40, help="per register and way")
    parser.add_argument("--out", type=Path, default=HERE / "answers.json")
    parser.add_argument(
        "--penalty", type=float, default=1.0, help="on repetition in greedy answers, as a way of its own"
    )
    parser.add_argument("--only", choices=["greedy", "sampled"])
    options = parser.parse_args()
    classifier = word_classifier(read("train"))
    scenes = [e["scene"] for e in read("heldout")["logic"]][: options.texts]
    name = "greedy" if options.penalty == 1 else f"greedy, penalty {options.penalty:g}"
    ways: dict[str, dict[str, Any]] = {name: {"repetition_penalty": options.penalty}, "sampled": SAMPLED}
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    runtime = Runtime.load("default")
    for way in [name] if options.only == "greedy" else ["sampled"] if options.only else ways:
        if way not in found:
            found[way] = written(runtime, scenes, ways[way])
            options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        for register in REGISTERS:
            texts = [answer["text"] for answer in found[way][register]]
            right = sum(classifier.predict(texts) == register)
            ended = sum(text.rstrip("\"'”’").endswith((".", "!", "?")) for text in texts)
            again = sum(map(repeats, texts))
            print(f"{way}, {register}: {right} told, {ended} ended, {again} repeat, of {len(texts)}", flush=True)


if __name__ == "__main__":
    main()
