"""What a bridge does on held-out pairs, each figure beside its controls.

Every mean has a 95% bootstrap interval over pairs, every comparison one of the paired differences.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from lora_rt import TextLosses, ratio_interval, text_losses
from lora_rt.plugins.modes.bridge.directions import DIRECTIONS, Direction
from lora_rt.plugins.modes.bridge.hyper import HyperBridge, onward
from lora_rt.plugins.modes.bridge.words import chrf, f1, guesses, literal_and_hidden, wanted_words, words_of

if TYPE_CHECKING:
    from lora_rt import Runtime

Examples = Sequence[Mapping[str, Any]]
Document = dict[str, Any]

_ROWS = 8  # texts at once

_INSTRUCTIONS: Mapping[Direction, str] = {
    "compress": "Name the three or four most important words of this text, separated by commas.\n\n",
    "expand": "Write two sentences about this scene.\n\n",
}


class InstructedBase(HyperBridge):
    """The untrained base, asked in plain words: what any adapter has to beat."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime, None)

    def prompt(self, direction: Direction, content: str) -> str:
        """An instruction, then the scene or text."""
        return _INSTRUCTIONS[direction] + content


@dataclass(frozen=True, slots=True)
class BridgeSettings:
    """What is measured.

    `among` scenes to choose from, `candidates` of the reranked round trip, the `seed` of both, and an adapter trained
    on scene -> text alone (`one_direction`) to compare the forward direction with.
    """

    among: int = 20
    candidates: int = 4
    seed: int = 0
    one_direction: str | None = None


def measure_bridge(
    runtime: Runtime,
    adapter: str,
    examples: Examples,
    settings: BridgeSettings,
    advance: Callable[[str], None] = lambda _what: None,
) -> Document:
    """All sections, by name.

    Args:
        runtime: the base.
        adapter: a reference, or a composition with the bridge in it.
        examples: pairs that it was not trained on, with "scene", "text" and, where they are known, "words".
        settings: sizes, seed and comparison.
        advance: hears of each finished section.
    """
    bridge, base = HyperBridge(runtime, adapter), InstructedBase(runtime)
    document: Document = {}
    for name, section in SECTIONS.items():
        document[name] = section(bridge, base, examples, settings)
        advance(name)
    return document


def lengths(runtime: Runtime, examples: Examples) -> list[int]:
    """How many tokens the longest question of each pair takes, with its answer: either direction, base or bridge."""
    text = runtime.text

    def length(asks: HyperBridge, pair: Mapping[str, Any], direction: Direction) -> int:
        given, answer = ("text", "scene") if direction == "compress" else ("scene", "text")
        return len(text.prompt_ids(asks.prompt(direction, pair[given]))) + len(text.answer_ids(pair[answer]))

    asking = (HyperBridge(runtime, None), InstructedBase(runtime))
    return [max(length(one, pair, direction) for one in asking for direction in DIRECTIONS) for pair in examples]


def compression(bridge: HyperBridge, base: HyperBridge, examples: Examples, settings: BridgeSettings) -> Document:
    """text -> scene: keyword F1 and exact match, beside guesses of the same length and the instructed base."""
    texts = [e["text"] for e in examples]
    found = [words_of(scene) for scene in bridge.compress(texts)]
    wanted = [wanted_words(e) for e in examples]
    own = _f1s(found, wanted)
    controls: dict[str, list[float]] = {"base": _f1s([words_of(s) for s in base.compress(texts)], wanted)}
    for i, text in enumerate(texts):
        other = wanted[(i + 1) % len(wanted)]
        for name, score in guesses(text, wanted[i], len(found[i]), other, settings.seed + i).items():
            controls.setdefault(name, []).append(score)
    best = max((name for name in controls if name != "base"), key=lambda name: float(np.mean(controls[name])))
    return {
        "f1": figure(own),
        "exact": figure(_same(found, wanted)),
        "controls": {name: figure(scores) for name, scores in controls.items()},
        "best_control": best,
        "ratio_to_best_control": float(np.mean(own) / max(float(np.mean(controls[best])), 1e-9)),
        "minus_best_control": figure(np.subtract(own, controls[best])),
        "recall": _recalls(found, texts, wanted),
        "samples": [
            {"text": t, "scene": ", ".join(w), "found": ", ".join(f)}
            for t, w, f in list(zip(texts, wanted, found, strict=True))[:6]
        ],
    }


def from_scenes(bridge: HyperBridge, base: HyperBridge, examples: Examples, settings: BridgeSettings) -> Document:
    """scene -> text -> scene: keyword F1 and exact match, with and without reranked candidates, and the base's."""
    scenes = [e["scene"] for e in examples]
    wanted = [wanted_words(e) for e in examples]

    def back(by: HyperBridge, texts: Sequence[str]) -> Document:
        found = [words_of(scene) for scene in onward(by.compress, texts)]
        return {"f1": figure(_f1s(found, wanted)), "exact": figure(_same(found, wanted))}

    greedy = bridge.expand(scenes)
    reranked = bridge.expand(scenes, candidates=settings.candidates, seed=settings.seed)
    return {
        "greedy": back(bridge, greedy),
        f"best_of_{settings.candidates}": back(bridge, reranked),
        "base": back(base, base.expand(scenes)),
        "samples": [
            {"scene": s, "greedy": g, "reranked": r} for s, g, r in list(zip(scenes, greedy, reranked, strict=True))[:6]
        ],
    }


def from_texts(bridge: HyperBridge, _base: HyperBridge, examples: Examples, _settings: BridgeSettings) -> Document:
    """text -> scene -> text: chrF (0 to 100), beside the expansion of the true scene and of another text's scene."""
    texts = [e["text"] for e in examples]
    through = onward(bridge.expand, bridge.compress(texts))
    own = chrf(through, texts)
    other = chrf(through[1:] + through[:1], texts)
    return {
        "chrf": figure(own),
        "true_scene": figure(chrf(bridge.expand([e["scene"] for e in examples]), texts)),
        "another_text": figure(other),
        "minus_another_text": figure(np.subtract(own, other)),
    }


def ranking(bridge: HyperBridge, base: HyperBridge, examples: Examples, settings: BridgeSettings) -> Document:
    """How often the right scene has the highest score among several, by log p(scene | text) and by PMI."""
    among = min(settings.among, len(examples))
    drawn = random.Random(settings.seed)
    rows = [[i, *drawn.sample([j for j in range(len(examples)) if j != i], among - 1)] for i in range(len(examples))]
    scenes = [examples[j]["scene"] for row in rows for j in row]
    texts = [examples[i]["text"] for i, row in enumerate(rows) for _ in row]
    document: Document = {"among": among}
    for name, by in (("bridge", bridge), ("base", base)):
        likelihood = np.array(by.log_likelihoods("compress", texts, scenes)).reshape(-1, among)
        prior = np.array(by.log_likelihoods("compress", [""] * len(examples), [e["scene"] for e in examples]))
        pmi = likelihood - prior[np.array(rows)]
        document[name] = {"logp": figure(likelihood.argmax(1) == 0), "pmi": figure(pmi.argmax(1) == 0)}
    return document


def forward(bridge: HyperBridge, base: HyperBridge, examples: Examples, settings: BridgeSettings) -> Document:
    """scene -> text: nats per token, and what the second direction costs the first."""
    own = text_losses(bridge.runtime, examples, bridge.composition)
    plain = text_losses(bridge.runtime, examples, None)
    asked = text_losses(bridge.runtime, [{**e, "scene": base.prompt("expand", e["scene"])} for e in examples], None)
    document: Document = {
        "bridge": own.mean,
        "base": plain.mean,
        "instructed_base": asked.mean,
        "gain_over_base": _per_token(plain, own),
    }
    if settings.one_direction is not None:
        alone = text_losses(bridge.runtime, examples, settings.one_direction)
        document |= {"one_direction": alone.mean, "cost_of_both_directions": _per_token(own, alone)}
    return document


def bits(bridge: HyperBridge, _base: HyperBridge, examples: Examples, _settings: BridgeSettings) -> Document:
    """Bits per character of the text: scene and text together under the bridge, the text alone under the base.

    The base's is the lower of two: the text as the beginning of a document, and as an answer to "Write a short text."
    """
    scenes, texts = [e["scene"] for e in examples], [e["text"] for e in examples]
    characters = np.array([len(text) for text in texts])
    scene = -np.array(bridge.log_likelihoods("compress", [""] * len(scenes), scenes)) / np.log(2)
    given = -np.array(bridge.log_likelihoods("expand", scenes, texts)) / np.log(2)
    asked = text_losses(bridge.runtime, [{"scene": "Write a short text.", "text": text} for text in texts], None).sums
    alone = min(asked, raw_losses(bridge.runtime, texts), key=lambda losses: float(losses.sum())) / np.log(2)
    joint = scene + given
    return {
        "scene_and_text": _ratio(joint, characters),
        "scene": _ratio(scene, characters),
        "text_given_scene": _ratio(given, characters),
        "base_text_alone": _ratio(alone, characters),
        "saved": _ratio(alone - joint, characters),
    }


SECTIONS: Mapping[str, Callable[[HyperBridge, HyperBridge, Examples, BridgeSettings], Document]] = {
    "compress": compression,
    "scene_text_scene": from_scenes,
    "text_scene_text": from_texts,
    "ranking": ranking,
    "forward": forward,
    "bits_per_character": bits,
}


def raw_losses(runtime: Runtime, texts: Sequence[str]) -> NDArray[np.float64]:
    """The summed negative log-likelihood in nats of each text under the base, as the beginning of a document; (texts,).

    The text follows the token that begins a document, or ends one where the tokenizer has none.
    """
    tokenizer = runtime.tokenizer
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rows = [torch.tensor([int(first), *tokenizer(text, add_special_tokens=False).input_ids]) for text in texts]
    losses = np.zeros(len(rows))
    for start in range(0, len(rows), _ROWS):
        batch = rows[start : start + _ROWS]
        ids, mask = (pad_sequence(part, batch_first=True) for part in (batch, list(map(torch.ones_like, batch))))
        logits = runtime.logits(ids, mask)[:, :-1].flatten(0, 1).float().cpu()
        nll = cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").view(len(batch), -1)
        losses[start : start + len(batch)] = (nll * mask[:, 1:]).sum(1).numpy()
    return losses


def figure(values: Sequence[float] | Sequence[bool] | NDArray[Any]) -> Document:
    """The mean over pairs and its interval."""
    return _ratio(np.asarray(values, dtype=np.float64), np.ones(len(values), dtype=np.int64))


def _ratio(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> Document:
    return {"mean": float(sums.sum() / counts.sum()), "ci": list(ratio_interval(sums, counts))}


def _per_token(worse: TextLosses, better: TextLosses) -> Document:
    return _ratio(worse.sums - better.sums, worse.tokens)


def _f1s(found: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> list[float]:
    return [f1(f, w) for f, w in zip(found, wanted, strict=True)]


def _same(found: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> list[bool]:
    return [set(f) == set(w) for f, w in zip(found, wanted, strict=True)]


def _recalls(found: Sequence[Sequence[str]], texts: Sequence[str], wanted: Sequence[Sequence[str]]) -> Document:
    """The share of scene words that are found, of those that stand in the text and of those that it hides."""
    split = [literal_and_hidden(t, w) for t, w in zip(texts, wanted, strict=True)]
    document = {}
    for name, words in zip(("literal", "hidden"), zip(*split, strict=True), strict=True):
        hits = np.array([len(set(w) & set(f)) for w, f in zip(words, found, strict=True)], dtype=np.float64)
        counts = np.array([len(w) for w in words])
        document[name] = {"words": int(counts.sum()), **(_ratio(hits, counts) if counts.sum() else {})}
    return document
