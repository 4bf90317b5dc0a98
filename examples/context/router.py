"""Trains routers on texts whose register turns at a sentence, measures them on held-out ones, writes router.json.

A router is told neither where a text turns nor which registers it has. Beside it stand the best static mix that `tune`
finds on the same texts, the better register of each text alone, the oracle that knows register and turn, and a control
that was trained on the hidden states of other rows. All losses are nats per answer token, with whole scenes resampled
for the intervals. Needs the folder that data.py makes: router.py FOLDER [--scenes N] [--seeds N] [--epochs X]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import REGISTERS, compared, constant, losses, uniform, waking

import lora_rt
from lora_rt import Runtime
from lora_rt.errors import LoraRtError

KINDS: Mapping[str, Mapping[str, str]] = {
    "softmax": {},
    "independent": {"gate": "independent"},
    "top1 (as MoLoRA)": {"gate": "top1"},
    "softmax of every layer (as LoRA-Flow)": {"groups": "0"},
}
TOKENS = 64


def trained(name: str, data: Path, options: Mapping[str, str], seed: int, settings: Mapping[str, Any]) -> str | None:
    """The name of a router, or None where nothing on the way was better than the start."""
    try:
        lora_rt.tune(
            uniform(0.25), data, per="token", name=name, mode_options={"hidden-layers": "4", **options}, seed=seed,
            **settings,
        )  # fmt: skip
    except LoraRtError as error:
        print(f"{name}: {error}", flush=True)
        return None
    return name


def tokens_per_second(runtime: Runtime, spec: str) -> float:
    """Greedy decoding of one row, the best of three."""
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        runtime.generate("rain, tin roof, unpaid bill", spec, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
        best = max(best, TOKENS / (time.perf_counter() - started))
    return round(best, 2)


def main() -> None:
    """Train, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that data.py made")
    parser.add_argument("--scenes", type=int, default=64, help="held-out scenes, two texts each")
    parser.add_argument("--seeds", type=int, default=3, help="of the first kind of router; the others have one")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--precision", default="int4")
    given = parser.parse_args()
    settings = {"precision": given.precision, "epochs": given.epochs}
    learned = given.data / "turns.jsonl"
    names: dict[str, str | None] = {}
    for kind, options in KINDS.items():
        for seed in range(given.seeds if kind == "softmax" else 1):
            names[f"router, {kind}, seed {seed}"] = trained(f"router-{len(names)}", learned, options, seed, settings)
    names["control: softmax of other rows' states"] = trained(
        "router-control", learned, {"control": "true"}, 0, settings
    )
    try:
        tuned = str(lora_rt.tune(uniform(0.25), learned, name="router-static", **settings))
    except LoraRtError as error:
        tuned = uniform(0.25)
        print(f"static: {error}", flush=True)
    runtime = Runtime.load("default", precision=given.precision)
    lines = list(map(json.loads, (given.data / "turning.jsonl").read_text(encoding="utf-8").splitlines()))
    whole = len(lines) // 2
    examples = [*lines[: given.scenes], *lines[whole : whole + given.scenes]]
    tables = {
        f"static, tuned: {tuned}": losses(runtime, examples, constant(tuned), constant(None)),
        "static 0.25 each": losses(runtime, examples, constant(uniform(0.25)), constant(None)),
    }
    best = min(tables, key=lambda name: float(tables[name][:, 0].sum()))
    singles = [losses(runtime, examples, constant(register), constant(None)) for register in REGISTERS]
    tables["the better register of each text alone"] = np.stack(singles)[
        np.argmin([s[:, 0] for s in singles], axis=0), np.arange(len(examples))
    ]
    oracle = "oracle per segment: each register alone, waking"
    tables[oracle] = losses(runtime, examples, waking, constant(None))
    for title, name in names.items():
        if name is not None:
            tables[title] = losses(runtime, examples, constant(name), constant(None))
    first = next((name for name in names.values() if name is not None), None)
    report = {
        "texts": len(examples),
        "learned_from": sum(1 for _ in learned.open()),
        "epochs": given.epochs,
        "precision": given.precision,
        "best_static": best,
        "rows": compared(tables, np.arange(len(examples)) % given.scenes, best, oracle),
        "not_better_than_the_start": [title for title, name in names.items() if name is None],
        "tokens_per_second": {spec: tokens_per_second(runtime, spec) for spec in (tuned, first) if spec},
        "threads": torch.get_num_threads(),
    }
    (Path(__file__).parent / "router.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
