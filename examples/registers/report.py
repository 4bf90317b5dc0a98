"""Measures what the four registers do on the held-out scenes and writes report.json beside this file.

Everything is measured on texts and scenes that no adapter was trained on: the held-out ones, which are in the corpus's
own manner, and apart from them those of otherhand/, 12 scenes in each of four others (clipped, winding, spoken,
chronicle). Needs scikit-learn for the independent word
classifier; `make report` installs it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_rt import Runtime, TextLosses, ratio_interval, text_losses

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

HERE = Path(__file__).parent
REGISTERS = ("logic", "emotion", "body", "archetype")
KNOBS = (("emotion", "logic"), ("body", "archetype"), ("logic", "body"))
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
    """The same for texts in other manners than the corpus has, all of them and each manner apart."""
    result = likelihoods(runtime, texts, adapters)
    manners = dict.fromkeys(e["manner"] for e in texts[REGISTERS[0]])
    result["manners"] = {
        manner: likelihoods(runtime, {r: [e for e in texts[r] if e["manner"] == manner] for r in REGISTERS}, adapters)
        for manner in manners
    }
    return result


def greedy(runtime: Runtime, scenes: Sequence[str], composition: str) -> list[str]:
    """The greedy answer to every scene."""
    texts: list[str] = []
    for start in range(0, len(scenes), 16):
        texts += runtime.generate(scenes[start : start + 16], composition, max_new_tokens=60)
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


def main() -> None:
    """Measure, print a summary, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = "register=reference; by default each register's own name"
    parser.add_argument("adapters", nargs="*", metavar="ADAPTER", help=what)
    given = dict(item.split("=", 1) for item in parser.parse_args().adapters)
    adapters = {register: given.get(register, register) for register in REGISTERS}
    training, held = read("train"), read("heldout")
    classifier = word_classifier(training)
    held_texts = [(e["text"], r) for r in REGISTERS for e in held[r]]
    runtime = Runtime.load("default")
    started = time.perf_counter()
    report = {
        "scenes": {"train": len(training["logic"]), "heldout": len(held["logic"])},
        "classifier_on_real_held_out_texts": float(np.mean([classifier.predict([t])[0] == r for t, r in held_texts])),
        **likelihoods(runtime, held, adapters),
        "other_hand": other_hand(runtime, read("otherhand"), adapters),
        "generations": generations(runtime, [e["scene"] for e in held["logic"]], classifier, adapters),
        "knobs": {"/".join(pair): knob(runtime, held, classifier, adapters, pair) for pair in KNOBS},
    }
    report["seconds"] = round(time.perf_counter() - started)
    (HERE / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(report, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
