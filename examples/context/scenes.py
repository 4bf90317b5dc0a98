"""Counts of how many prompts the composition `registers` tells the scene type, and writes scenes.json beside this file.

Three kinds of prompts that it has not learned on: the first sentences of held-out texts, everyday sentences, and
sentences of texts by another hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from data import REGISTERS, begun, corpus, everyday, other_hand

from lora_rt import Runtime

BATCH = 32


def told(runtime: Runtime, prompts: Sequence[Mapping[str, str]], composition: str) -> dict[str, list[int]]:
    """By type: of how many prompts it is told, and how many there are."""
    ordered = sorted(prompts, key=lambda prompt: len(prompt["scene"]))
    result = {register: [0, 0] for register in REGISTERS}
    for start in range(0, len(ordered), BATCH):
        batch = ordered[start : start + BATCH]
        for prompt, shares in zip(
            batch, runtime.register_scenes([p["scene"] for p in batch], composition), strict=True
        ):
            count = result[prompt["scene_type"]]
            count[0] += max(shares, key=lambda kind: shares[kind]) == prompt["scene_type"]
            count[1] += 1
    return result


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--composition", default="registers")
    parser.add_argument("--precision", default="int4")
    given = parser.parse_args()
    held_out = [{**begun(e), "scene_type": r} for r, rows in corpus("heldout").items() for e in rows]
    kinds = {"held-out": held_out, "everyday": everyday("heldout"), "another hand": other_hand(1)}
    runtime = Runtime.load("default", precision=given.precision)
    runtime.ensure(given.composition)
    report = {
        "precision": given.precision,
        **{kind: told(runtime, prompts, given.composition) for kind, prompts in kinds.items()},
    }
    (Path(__file__).parent / "scenes.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
