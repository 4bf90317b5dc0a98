"""Trains routers on texts whose register turns at a sentence, measures them on held-out ones, writes router.json.

A router is told neither where a text turns nor which registers it has. Beside it stand the best static mix that `tune`
finds on the same texts, the better register of each text alone, the oracle that knows register and turn, and a control
that was trained on the hidden states of other tokens. All losses are nats per answer token, with whole scenes resampled
for the intervals. Needs the folder that data.py makes, and keeps in it what was done, so that a run that was cut off
goes on: router.py FOLDER [--scenes N] [--seeds N] [--epochs X] [--texts N] [--kinds N]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import REGISTERS, compared, constant, losses, uniform, waking

import lora_rt
from lora_rt import Runtime

KINDS: Mapping[str, Mapping[str, str]] = {
    "softmax": {},
    "independent": {"gate": "independent"},
    "top1 (as MoLoRA)": {"gate": "top1"},
    "softmax of every layer (as LoRA-Flow)": {"groups": "0"},
}
CONTROLS: Mapping[str, Mapping[str, str]] = {
    "softmax of other tokens' states": {},
    "softmax of every layer, of other tokens' states": {"groups": "0"},  # it can still give each layer its own weights
}
SEEDED = ("softmax", "softmax of every layer (as LoRA-Flow)")
TOKENS = 24
TURNS = 20


def trained(name: str, data: Path, options: Mapping[str, str], seed: int, settings: Mapping[str, Any]) -> str | None:
    """The name of a router, or None where nothing on the way was better than the start."""
    try:
        lora_rt.tune(
            uniform(0.25), data, per="token", name=name, mode_options=options, seed=seed, **settings,
        )  # fmt: skip
    except lora_rt.LoraRtError as error:
        if "better than the start" not in error.message:
            raise
        print(f"{name}: {error}", flush=True)
        return None
    return name


def kept(folder: Path, name: str, measure: Callable[[], Any]) -> Any:
    """What was found before under this name, or now."""
    path = folder / f"{name}.json"
    if not path.exists():
        started = time.perf_counter()
        result = measure()
        folder.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(result))
        path.with_suffix(".part").replace(path)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return json.loads(path.read_text())


def static(name: str, data: Path, settings: Mapping[str, Any]) -> str:
    """The best static mix that is found from the same texts."""
    try:
        return str(lora_rt.tune(uniform(0.25), data, name=name, **settings))
    except lora_rt.LoraRtError as error:
        print(f"static: {error}", flush=True)
        return uniform(0.25)


def pair(example: Mapping[str, Any]) -> str:
    """The static mix of somebody who knows which two registers a text has, and not where it turns."""
    return " ".join(f"{register}:0.5" for register in example["scene_types"])


def cost_of_decoding(runtime: Runtime, static: str, specs: Sequence[str]) -> dict[str, float]:
    """By which share a greedy token of one row takes more processor time than under the static mix: the median of
    turns, of which each decodes under all of them.
    """

    def took(spec: str) -> float:
        started = time.process_time()
        runtime.generate("rain, tin roof, unpaid bill", spec, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
        return time.process_time() - started

    turns = [[took(spec) for spec in (static, *specs)] for _ in range(TURNS + 1)][1:]  # the first one loads
    ratios = np.median([[mine / turn[0] for mine in turn[1:]] for turn in turns], axis=0)
    return {spec: round(float(ratio) - 1, 4) for spec, ratio in zip(specs, ratios, strict=True)}


def main() -> None:
    """Train, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that data.py made")
    parser.add_argument("--scenes", type=int, default=64, help="held-out scenes, two texts each")
    parser.add_argument("--seeds", type=int, default=3, help="of the kinds in SEEDED; the others have one")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--texts", type=int, default=376, help="that are learned from")
    parser.add_argument("--kinds", type=int, default=len(KINDS), help="how many kinds of router, in the table's order")
    parser.add_argument("--no-control", action="store_true", help="leave out the one that learns from other tokens")
    given = parser.parse_args()
    settings = {"precision": given.precision, "epochs": given.epochs, "batch_size": given.batch_size}
    work = given.data / f"router-{given.texts}-{given.epochs:g}-{given.batch_size}-{given.scenes}-{given.precision}"
    work.mkdir(parents=True, exist_ok=True)
    learned = work / "turns.jsonl"
    learned.write_text("".join((given.data / "turns.jsonl").open().readlines()[: given.texts]))
    stem = work.name.replace(".", "-")  # a composition's name, so that another run's is not taken for this one's
    names: dict[str, str | None] = {}
    for kind, options in list(KINDS.items())[: given.kinds]:
        for seed in range(given.seeds if kind in SEEDED else 1):
            name = f"{stem}-{kind.split()[0]}-{'layers-' * ('layer' in kind)}{seed}"
            names[f"router, {kind}, seed {seed}"] = kept(
                work, name, partial(trained, name, learned, options, seed, settings)
            )
    tuned = kept(work, "static", partial(static, f"{stem}-static", learned, settings))
    if not given.no_control:
        for kind, options in CONTROLS.items():
            name = f"{stem}-control{'-layers' * ('layer' in kind)}"
            told = {"control": "true", **options}
            names[f"control: {kind}"] = kept(work, name, partial(trained, name, learned, told, 0, settings))
    runtime = Runtime.load("default", precision=given.precision)
    lines = list(map(json.loads, (given.data / "turning.jsonl").read_text(encoding="utf-8").splitlines()))
    whole = len(lines) // 2
    examples = [*lines[: given.scenes], *lines[whole : whole + given.scenes]]

    def table(name: str, spec: Any) -> Any:
        return np.array(kept(work, name, lambda: losses(runtime, examples, spec, constant(None)).tolist()))

    tables = {
        f"static, tuned: {tuned}": table("losses-static", constant(tuned)),
        "static 0.25 each": table("losses-even", constant(uniform(0.25))),
    }
    best = min(tables, key=lambda name: float(tables[name][:, 0].sum()))
    singles = [table(f"losses-{register}", constant(register)) for register in REGISTERS]
    tables["the better register of each text alone"] = np.stack(singles)[
        np.argmin([s[:, 0] for s in singles], axis=0), np.arange(len(examples))
    ]
    tables["each text's two registers at 0.5, told which"] = table("losses-pair", pair)
    oracle = "oracle per segment: each register alone, waking"
    tables[oracle] = table("losses-oracle", waking)
    for title, name in names.items():
        if name is not None:
            tables[title] = table(f"losses-{name}", constant(name))
    first = {kind: names[f"router, {kind}, seed 0"] for kind in list(KINDS)[: given.kinds]}
    timed = {kind: name for kind, name in first.items() if name is not None}
    costs = kept(work, "cost", lambda: cost_of_decoding(runtime, tuned, list(timed.values())))
    report = {
        "texts": len(examples),
        "learned_from": sum(1 for _ in learned.open()),
        "epochs": given.epochs,
        "batch_size": given.batch_size,
        "precision": given.precision,
        "best_static": best,
        "rows": compared(tables, np.arange(len(examples)) % given.scenes, best, oracle),
        "not_better_than_the_start": [title for title, name in names.items() if name is None],
        "cost_of_decoding": {kind: costs[name] for kind, name in timed.items()},
        "threads": torch.get_num_threads(),
    }
    (Path(__file__).parent / "router.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
