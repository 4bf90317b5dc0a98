"""Measures what the four registers do on the held-out scenes and writes report.json beside this file.

Everything is measured on texts and scenes that no adapter was trained on: the held-out ones, which are in the corpus's
own manner, and apart from them those of otherhand/, 12 scenes in each of four others (clipped, winding, spoken,
chronicle). Needs scikit-learn for the independent word classifier; `make report` installs it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_rt import Runtime, TextLosses, ratio_interval, text_losses

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

HERE = Path(__file__).parent
REGISTERS = ("logic", "emotion", "body", "archetype")
KNOBS = (("emotion", "logic"), ("body", "archetype"), ("logic", "body"))
PENALTY = 1.1  # compose's own
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)
INSTRUCTION = "{scene}\n\nWrite two sentences about this scene in the register of {register}."


def read(split: str) -> dict[str, list[dict[str, Any]]]:
    """Register -> its examples, in the same order of scenes for all registers."""
    return {
        register: [json.loads(line) for line in (HERE / split / f"{register}.jsonl").read_text().splitlines()]
        for register in REGISTERS
    }


def word_classifier(texts: dict[str, list[dict[str, Any]]]) -> Pipeline:
    """Naive Bayes over words, fitted on real training texts: it has never seen an adapter's output."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(CountVectorizer(lowercase=True), MultinomialNB(alpha=0.3))
    classifier.fit([e["text"] for r in REGISTERS for e in texts[r]], [r for r in REGISTERS for _ in texts[r]])
    return classifier


def gain(better: TextLosses, worse: TextLosses) -> dict[str, Any]:
    """How many nats per token `better` saves over `worse`, with a 95% interval over scenes."""
    difference = worse.sums - better.sums
    return {"mean": float(difference.sum() / better.tokens.sum()), "ci": ratio_interval(difference, better.tokens)}


def found_out(
    runtime: Runtime, scenes: Sequence[str], classifier: Pipeline, adapters: dict[str, str]
) -> dict[str, float]:
    """Register -> the share of its greedy texts, repetition held back as `compose` does, that are put there."""
    texts = {register: greedy(runtime, scenes, adapters[register], PENALTY) for register in REGISTERS}
    return {register: float(np.mean(classifier.predict(texts[register]) == register)) for register in REGISTERS}


def share_strictly_falling(rows: np.ndarray) -> float:
    """The share of rows that fall at every step; rows (scenes, steps)."""
    return float((np.diff(rows, axis=1) < 0).all(axis=1).mean())


def likelihoods(runtime: Runtime, held: dict[str, list[dict[str, Any]]], adapters: dict[str, str]) -> dict[str, Any]:
    """Gains over the base, over an instruction, over the other adapters, and over a wrong scene."""
    losses = {r: {a: text_losses(runtime, held[r], adapters[a]) for a in REGISTERS} for r in REGISTERS}
    result: dict[str, Any] = {}
    winners = []
    for register in REGISTERS:
        examples = held[register]
        base = text_losses(runtime, examples, None)
        prompts = [{**e, "scene": INSTRUCTION.format(scene=e["scene"], register=register)} for e in examples]
        shifted = [{**e, "scene": examples[(i + 1) % len(examples)]["scene"]} for i, e in enumerate(examples)]
        own = losses[register][register]
        others = [losses[register][a] for a in REGISTERS if a != register]
        winners.append(np.all([own.sums < other.sums for other in others], axis=0))
        result[register] = {
            "base_nll": base.mean,
            "own_nll": own.mean,
            "gain_over_base": gain(own, base),
            "gain_over_instruction": gain(own, text_losses(runtime, prompts, None)),
            "own_minus_best_other": min(gain(own, other)["mean"] for other in others),
            "own_gain_minus_mean_other": float(np.mean([gain(own, other)["mean"] for other in others])),
            "true_scene_over_wrong": gain(own, text_losses(runtime, shifted, adapters[register])),
            "nll": {a: losses[register][a].mean for a in REGISTERS},
        }
    return {"registers": result, "own_adapter_lowest": float(np.mean(winners))}


def other_hand(runtime: Runtime, texts: dict[str, list[dict[str, Any]]], adapters: dict[str, str]) -> dict[str, Any]:
    """Gain and selectivity on texts in other manners than the corpus has, all of them and each manner apart."""
    columns = {"base": None, **adapters}
    losses = {r: {a: text_losses(runtime, texts[r], spec) for a, spec in columns.items()} for r in REGISTERS}
    manners = {r: np.array([e["manner"] for e in texts[r]]) for r in REGISTERS}

    def of(manner: str | None) -> dict[str, Any]:
        found = {}
        for r in REGISTERS:
            mine = np.ones(len(manners[r]), dtype=bool) if manner is None else manners[r] == manner
            part = {a: TextLosses(x.sums[mine], x.tokens[mine]) for a, x in losses[r].items()}
            others = [part[a] for a in REGISTERS if a != r]
            found[r] = {
                "texts": int(mine.sum()),
                "base_nll": part["base"].mean,
                "gain_over_base": gain(part[r], part["base"]),
                "own_minus_best_other": min(gain(part[r], x)["mean"] for x in others),
                "own_adapter_lowest": float(np.mean(np.all([part[r].sums < x.sums for x in others], axis=0))),
            }
        return found

    named = dict.fromkeys(str(manner) for manner in manners[REGISTERS[0]])
    return {"all": of(None), **{manner: of(manner) for manner in named}}


def greedy(runtime: Runtime, scenes: Sequence[str], composition: str, penalty: float = 1.0) -> list[str]:
    """The greedy answer to every scene."""
    texts: list[str] = []
    for start in range(0, len(scenes), 16):
        part = scenes[start : start + 16]
        texts += runtime.generate(part, composition, max_new_tokens=60, repetition_penalty=penalty)
    return texts


def generations(
    runtime: Runtime, scenes: Sequence[str], classifier: Pipeline, adapters: dict[str, str]
) -> dict[str, Any]:
    """Whether greedy texts sound like their register, and whether two scenes ever give one text."""
    result = {}
    for register in REGISTERS:
        texts = greedy(runtime, scenes, adapters[register])
        right = float(np.mean(classifier.predict(texts) == register))
        result[register] = {
            "classified_right": right,
            "distinct": len(set(texts)),
            "of": len(texts),
            "samples": dict(zip(scenes[:6], texts, strict=False)),
        }
    return result


def knob(
    runtime: Runtime,
    held: dict[str, list[dict[str, Any]]],
    classifier: Pipeline,
    adapters: dict[str, str],
    pair: tuple[str, str],
) -> dict[str, Any]:
    """`a:w b:1-w`: does the difference of the two losses, and the classifier's share, move with w?"""
    first, second = pair
    differences, shares = [], []
    scenes = [e["scene"] for e in held[first]]
    for w in STEPS:
        spec = f"{adapters[first]}:{w} {adapters[second]}:{1 - w}"
        a, b = (text_losses(runtime, held[r], spec) for r in pair)
        differences.append(a.sums / a.tokens - b.sums / b.tokens)
        shares.append(float(np.mean(classifier.predict(greedy(runtime, scenes[:32], spec)) == first)))
    return {
        "strictly_monotone": share_strictly_falling(np.stack(differences, axis=1)),
        "mean_difference": [float(d.mean()) for d in differences],
        "classified_as_first": shares,
    }


def kept(folder: Path, name: str, measure: Callable[[], Any]) -> Any:
    """What was measured before under this name, or now; a run that was cut off goes on from there."""
    path = folder / f"{name}.json"
    if not path.exists():
        started = time.perf_counter()
        result = measure()
        folder.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(result, indent=1, ensure_ascii=False))
        path.with_suffix(".part").replace(path)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return json.loads(path.read_text())


def trained(work: Path, seed: int) -> dict[str, str]:
    """The registers once more, of another seed: register -> folder."""
    for register in REGISTERS:
        if not (work / register / "register.json").exists():
            lora_rt = shutil.which("lora-rt", path=str(Path(sys.executable).parent)) or "lora-rt"
            command = ["sh", str(HERE / "train.sh"), lora_rt, register, str(work / register)]
            subprocess.run(command, check=True, env={**os.environ, "SEED": str(seed)})
    return {register: str((work / register).absolute()) for register in REGISTERS}


def numbered(texts: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Each text with its number among those of its manner."""
    return {
        register: [{**e, "number": sum(x["manner"] == e["manner"] for x in rows[:i])} for i, e in enumerate(rows)]
        for register, rows in texts.items()
    }


def over_seeds(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, least and most of what each register gains, one run per seed."""
    values = {
        register: {
            key: [x["mean"] if isinstance(x := run["registers"][register][key], dict) else x for run in found]
            for key in ("gain_over_base", "own_minus_best_other")
        }
        for register in REGISTERS
    }
    return {
        register: {key: {"mean": float(np.mean(x)), "range": [min(x), max(x)]} for key, x in keys.items()}
        for register, keys in values.items()
    }


def main() -> None:
    """Measure, print a summary, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = "register=reference; by default each register's own name"
    parser.add_argument("adapters", nargs="*", metavar="ADAPTER", help=what)
    parser.add_argument(
        "--work",
        type=Path,
        default=HERE.parents[1] / "out" / "registers",
        help="what was measured is kept here, to go on from",
    )
    parser.add_argument("--texts", type=int, help="of another hand, per register and manner; all 12 if left out")
    parser.add_argument("--only", choices=["otherhand"], help="leave out the rest")
    parser.add_argument("--seeds", type=int, default=1, help="above 1, the registers are trained again under others")
    options = parser.parse_args()
    given = dict(item.split("=", 1) for item in options.adapters)
    adapters = {register: given.get(register, register) for register in REGISTERS}
    training, held, other = read("train"), read("heldout"), read("otherhand")
    other = {r: [e for e in rows if e["number"] < (options.texts or len(rows))] for r, rows in numbered(other).items()}
    runtime = Runtime.load("default")
    for adapter in adapters.values():
        runtime.ensure(adapter)
    # What was measured of other adapters is of no use.
    work = (
        options.work
        / hashlib.sha256("".join(runtime.adapters[a].sha256 for a in runtime.adapters).encode()).hexdigest()[:12]
    )
    scenes = [e["scene"] for e in held["logic"]]
    by_another = kept(work, f"otherhand-{options.texts or 12}", lambda: other_hand(runtime, other, adapters))
    (HERE / "otherhand.json").write_text(json.dumps(by_another, indent=1) + "\n")
    if options.only:
        return
    classifier = word_classifier(training)
    real = {r: float(np.mean(classifier.predict([e["text"] for e in held[r]]) == r)) for r in REGISTERS}
    again = partial(found_out, runtime, scenes, classifier, adapters)
    report = {
        "scenes": {"train": len(training["logic"]), "heldout": len(held["logic"])},
        "classifier_on_real_held_out_texts": real,
        **kept(work, "heldout", lambda: likelihoods(runtime, held, adapters)),
        "generations": kept(work, "generations", lambda: generations(runtime, scenes, classifier, adapters)),
        "generations_with_penalty": kept(work, f"generations-{PENALTY}", again),
        "knobs": {
            "/".join(pair): kept(work, "-".join(pair), partial(knob, runtime, held, classifier, adapters, pair))
            for pair in KNOBS
        },
    }
    runs = [report]
    for seed in range(1, options.seeds):
        other_seed = trained(options.work / f"seed-{seed}", seed)
        runs.append(kept(work, f"seed-{seed}", partial(likelihoods, runtime, held, other_seed)))
    report["seeds"] = {"count": len(runs), **over_seeds(runs)}
    (HERE / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(report, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
