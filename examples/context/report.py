"""Measures the context mode on held-out scenes and writes report.json beside this file.

All losses are nats per answer token.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from lora_rt import Composition, Runtime

REGISTERS = ("logic", "emotion", "body", "archetype")
GRID = (0.25, 0.5)
SEED = 0
BATCH = 16
RESAMPLES = 4000

Losses = NDArray[np.float64]  # (examples, 2): summed nats, tokens


def losses(runtime: Runtime, examples: Sequence[Mapping[str, Any]], spec: Any, scene: Any) -> Losses:
    """`spec(example)` and `scene(example)` say under what each example's text is scored."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["scene"]) + len(examples[i]["text"]))
    result = np.zeros((len(examples), 2))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        rows = [examples[i] for i in chosen]
        found = runtime.answer_nll(
            [e["scene"] for e in rows],
            [e["text"] for e in rows],
            [spec(e) for e in rows],
            scenes=[scene(e) for e in rows],
        )
        for i, loss in zip(chosen, found, strict=True):
            result[i] = float(loss.sum()), len(loss)
    return result


def mean(table: Losses) -> float:
    """Nats per token."""
    return float(table[:, 0].sum() / table[:, 1].sum())


def resampled(groups: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Indices of examples, for whole scenes drawn with replacement."""
    rng = np.random.default_rng(SEED)
    members = [np.flatnonzero(groups == scene) for scene in np.unique(groups)]
    return [np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))]) for _ in range(RESAMPLES)]


def interval(values: Sequence[float]) -> list[float]:
    """The middle 95%."""
    return [round(float(x), 4) for x in np.quantile(values, [0.025, 0.975])]


def compared(
    tables: Mapping[str, Losses], groups: NDArray[np.int64], best: str, oracle: str
) -> dict[str, dict[str, Any]]:
    """Per row: its loss, its paired gain over the best static composition, and its share of the way to the oracle."""
    draws = resampled(groups)
    rows = {}
    for name, table in tables.items():
        gain = [mean(tables[best][d]) - mean(table[d]) for d in draws]
        whole = [mean(tables[best][d]) - mean(tables[oracle][d]) for d in draws]
        rows[name] = {
            "nll": round(mean(table), 4),
            "gain_over_best_static": round(mean(tables[best]) - mean(table), 4),
            "gain_ci": interval(gain),
            "way_to_oracle": round((mean(tables[best]) - mean(table)) / (mean(tables[best]) - mean(tables[oracle])), 3),
            "way_ci": interval([a / b for a, b in zip(gain, whole, strict=True)]),
        }
    return rows


def constant(value: Any) -> Callable[[Any], Any]:
    """A spec or scene that is the same for all."""
    return lambda _example: value


def uniform(weight: float) -> str:
    """All four at one weight."""
    return " ".join(f"{register}:{weight}" for register in REGISTERS)


def shuffled(examples: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """A wrong type for every example, drawn by the seed."""
    rng = np.random.default_rng(SEED)
    others = {r: [other for other in REGISTERS if other != r] for r in REGISTERS}
    return {id(e): str(rng.choice(others[e["scene_type"]])) for e in examples}


def load_ablated(runtime: Runtime, adapters: Path, left_out: str, suffix: str) -> None:
    """The fitted adapters once more, with a tensor of their state as it was before the fit."""
    with tempfile.TemporaryDirectory() as scratch:
        for register in REGISTERS:
            folder = Path(shutil.copytree(adapters / register, Path(scratch) / register))
            state = load_file(folder / "mode.safetensors")
            save_file({**state, left_out: torch.zeros_like(state[left_out])}, folder / "mode.safetensors")
            runtime.load_adapter(str(folder), f"{register}-{suffix}")


def renamed(static: str, suffix: str) -> str:
    """A composition over the adapters of `load_ablated`."""
    return " ".join(term.replace(":", f"-{suffix}:") for term in static.split())


def held_out(runtime: Runtime, examples: list[dict[str, Any]], static: str, tuned: str) -> dict[str, Any]:
    """The first table: texts of one register."""
    wrong = shuffled(examples)
    even = dict.fromkeys(REGISTERS, 1 / len(REGISTERS))
    neutral = constant("neutral")
    statics = {f"static {w} each": losses(runtime, examples, constant(uniform(w)), neutral) for w in GRID}
    statics[f"static {static}"] = losses(runtime, examples, constant(static), neutral)
    statics[f"static, tuned: {tuned}"] = losses(runtime, examples, constant(tuned), neutral)
    best = min(statics, key=lambda name: mean(statics[name]))
    tables = {
        "base": losses(runtime, examples, constant(None), neutral),
        **statics,
        "oracle: the register alone": losses(runtime, examples, lambda e: e["scene_type"], neutral),
        "gate, true type": losses(runtime, examples, constant(static), lambda e: e["scene_type"]),
        "gate, registered type": losses(runtime, examples, constant(static), constant(None)),
        "gate, shuffled type": losses(runtime, examples, constant(static), lambda e: wrong[id(e)]),
        "mean gate": losses(runtime, examples, constant(static), constant(even)),
        "scale of each type alone": losses(
            runtime, examples, constant(renamed(static, "scale")), lambda e: e["scene_type"]
        ),
        "gates of layers and heads alone": losses(
            runtime, examples, constant(renamed(static, "gates")), lambda e: e["scene_type"]
        ),
    }
    groups = np.arange(len(examples)) // len(REGISTERS)
    registered = registered_types(runtime, examples)
    right = [max(shares, key=shares.get) == e["scene_type"] for shares, e in zip(registered, examples, strict=True)]
    return {
        "texts": len(examples),
        "best_static": best,
        "rows": compared(tables, groups, best, "oracle: the register alone"),
        "registered_right": round(float(np.mean(right)), 4),
    }


def registered_types(runtime: Runtime, examples: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """What the classifier makes of every prompt."""
    return [
        shares
        for start in range(0, len(examples), BATCH)
        for shares in runtime.register_scenes([e["scene"] for e in examples[start : start + BATCH]], REGISTERS[0])
    ]


def turning(runtime: Runtime, examples: list[dict[str, Any]], static: str) -> dict[str, Any]:
    """The harder table: texts whose register changes at a sentence boundary."""
    neutral = constant("neutral")

    def pair(weight: float) -> Callable[[Any], str]:
        return lambda e: " ".join(f"{r}:{weight}" for r in e["scene_types"])

    singles = [losses(runtime, examples, constant(register), neutral) for register in REGISTERS]
    oracle = np.stack(singles)[np.argmin([s[:, 0] for s in singles], axis=0), np.arange(len(examples))]
    statics = {f"static {w} each": losses(runtime, examples, constant(uniform(w)), neutral) for w in GRID[:1]}
    statics["static, the text's two registers at 0.5"] = losses(runtime, examples, pair(0.5), neutral)
    best = min(statics, key=lambda name: mean(statics[name]))
    tables = {
        **statics,
        "oracle: one register per text": oracle,
        "gate, first type throughout": losses(runtime, examples, constant(static), lambda e: e["scene_types"][0]),
        "gate per segment": losses(runtime, examples, constant(static), segments),
        "oracle per segment: each register alone, waking": losses(runtime, examples, waking, neutral),
    }
    groups = np.arange(len(examples)) % (len(examples) // 2)
    rows = compared(tables, groups, best, "oracle: one register per text")
    for row in rows.values():  # the best static composition lies beyond this oracle: there is no way to it
        del row["way_to_oracle"], row["way_ci"]
    draws = resampled(groups)
    ahead = [mean(oracle[d]) - mean(tables["gate per segment"][d]) for d in draws]
    return {
        "texts": len(examples),
        "best_static": best,
        "rows": rows,
        "gate_per_segment_ahead_of_oracle": {
            "mean": round(mean(oracle) - mean(tables["gate per segment"]), 4),
            "ci": interval(ahead),
        },
    }


def segments(example: Mapping[str, Any]) -> str:
    """A scene that turns at the sentence boundary."""
    first, second = example["scene_types"]
    return f"{first} {Composition.parse(second).waking(example['turn'])}"


def waking(example: Mapping[str, Any]) -> str:
    """The first register until the sentence boundary, the second from there on."""
    first, second = example["scene_types"]
    return f"{first} {Composition.parse(f'{first}:-1 {second}').waking(example['turn'])}"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="the folder that data.py made")
    parser.add_argument("adapters", type=Path, help="the folder of the fitted adapters")
    parser.add_argument("static", help="the weights that the gates were fitted around: logic:0.35,emotion:0.35,...")
    parser.add_argument("tuned", help="the static weights that `lora-rt tune` found on the same data")
    parser.add_argument("scenes", type=int, nargs="?", help="how many held-out scenes are measured; all if left out")
    given = parser.parse_args()
    data, adapters = given.data, given.adapters
    static, tuned = (weights.replace(",", " ") for weights in (given.static, given.tuned))
    runtime = Runtime.load("default")
    for register in REGISTERS:
        runtime.load_adapter(str((adapters / register).absolute()), register)
    load_ablated(runtime, adapters, left_out="theta", suffix="scale")
    load_ablated(runtime, adapters, left_out="scale", suffix="gates")
    started = time.perf_counter()
    read = {
        n: list(map(json.loads, (data / f"{n}.jsonl").read_text(encoding="utf-8").splitlines()))
        for n in ("heldout", "turning")
    }
    scenes = given.scenes or len(read["heldout"]) // len(REGISTERS)
    whole = len(read["turning"]) // 2
    read["heldout"] = read["heldout"][: scenes * len(REGISTERS)]
    read["turning"] = [*read["turning"][:scenes], *read["turning"][whole : whole + scenes]]
    report = {
        "seed": SEED,
        "mix": static,
        "tuned": tuned,
        "scenes": scenes,
        "heldout": held_out(runtime, read["heldout"], static, tuned),
    }
    print(json.dumps(report, indent=1), flush=True)
    report["turning"] = turning(runtime, read["turning"], static)
    report["seconds"] = round(time.perf_counter() - started)
    (Path(__file__).parent / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["turning"], indent=1))


if __name__ == "__main__":
    main()
