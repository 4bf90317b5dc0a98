"""Measures the composition `registers`, and the same fitted under other seeds, and writes scenes.json beside this file.

Of how many prompts does it tell the scene type? Three kinds that it has not learned on: the first sentences of
held-out texts, everyday sentences, and sentences of texts by another hand. And what does it gain on the held-out texts
that begin with those first sentences, in nats per answer token, with whole scenes resampled for the intervals?
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from data import REGISTERS, begun, corpus, everyday, make, other_hand
from registers import fit
from report import compared, constant, losses, uniform

from lora_rt import Registry, Runtime

BATCH = 32
STATIC, OWN = "static 0.25 each", "the text's own register alone"


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


def gains(runtime: Runtime, examples: Sequence[Mapping[str, Any]], compositions: Sequence[str]) -> dict[str, Any]:
    """Per way to weigh the four registers: its loss, and its gain over even weights, on texts of one register each."""
    tables = {
        STATIC: losses(runtime, examples, constant(uniform(0.25)), constant(None)),
        OWN: losses(runtime, examples, lambda e: e["scene_type"], constant(None)),
    }
    for name in compositions:
        tables[f"{name}, type told"] = losses(runtime, examples, constant(name), lambda e: e["scene_type"])
        tables[f"{name}, type recognized"] = losses(runtime, examples, constant(name), constant(None))
    scenes = np.arange(len(examples)) % (len(examples) // len(REGISTERS))
    return compared(tables, scenes, STATIC, OWN)


def main() -> None:
    """Fit what is missing, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--seeds", type=int, default=1, help="above 1, it is fitted again under others")
    given = parser.parse_args()
    compositions = ["registers", *(f"registers-seed-{seed}" for seed in range(1, given.seeds))]
    with tempfile.TemporaryDirectory() as data:
        make(Path(data))
        for seed, name in enumerate(compositions):
            if Registry().compositions.look_up(name) is None:
                fit(name, Path(data), seed)
    held_out = [{**begun(e), "scene_type": r} for r, rows in corpus("heldout").items() for e in rows]
    kinds = {"held-out": held_out, "everyday": everyday("heldout"), "another hand": other_hand(1)}
    runtime = Runtime.load("default", precision=given.precision)
    for name in (*compositions, *REGISTERS):
        runtime.ensure(name)
    report = {
        "precision": given.precision,
        "told": {
            name: {kind: told(runtime, prompts, name) for kind, prompts in kinds.items()} for name in compositions
        },
        "gains": gains(runtime, held_out, compositions),
    }
    (Path(__file__).parent / "scenes.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
