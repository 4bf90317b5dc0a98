"""Makes the bridge's pairs from the corpus of the four registers: train.jsonl and heldout.jsonl beside this file.

The scene of a pair is its words, comma-separated: a run-together scene would teach the adapter to glue words of the
text together. Training takes the two of each scene's four texts that keep most of its words, since a text without them
leaves nothing to compress. The held-out file takes one text per scene and turns through the registers, whatever words
those texts keep.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REGISTERS = ("logic", "emotion", "body", "archetype")
TEXTS_PER_SCENE = 2


def read(split: str) -> list[list[dict[str, Any]]]:
    """Per scene its four texts, in the order of REGISTERS."""
    files = [HERE.parent / "registers" / split / f"{register}.jsonl" for register in REGISTERS]
    columns = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [list(row) for row in zip(*columns, strict=True)]


def kept(example: dict[str, Any]) -> float:
    """The share of the scene's words that stand in the text as they are."""
    text = set(re.findall(r"\w+", example["text"].lower()))
    return sum(word.lower() in text for word in example["words"]) / len(example["words"])


def pair(example: dict[str, Any], register: str) -> dict[str, Any]:
    """One line of a pair file."""
    scene = ", ".join(example["words"])
    return {"scene": scene, "words": example["words"], "register": register, "text": example["text"]}


def training() -> Iterator[dict[str, Any]]:
    """The fullest texts of each scene; among equals the registers take turns."""
    for number, row in enumerate(read("train")):
        order = sorted(range(4), key=lambda i: (-kept(row[i]), (i - number) % 4))
        yield from (pair(row[i], REGISTERS[i]) for i in order[:TEXTS_PER_SCENE])


def held_out() -> Iterator[dict[str, Any]]:
    """One text per scene."""
    for number, row in enumerate(read("heldout")):
        yield pair(row[number % 4], REGISTERS[number % 4])


def main() -> None:
    """Write both files."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, pairs in (("train", training()), ("heldout", held_out())):
        lines = [json.dumps(item, ensure_ascii=False) for item in pairs]
        (HERE / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
