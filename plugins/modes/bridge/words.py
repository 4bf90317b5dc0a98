"""Two texts compared: a scene as a set of words, beside what a guess of the same length finds, and chrF."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_rt import LoraRtError

# Articles, pronouns, auxiliaries and the commonest prepositions and conjunctions: what no scene is made of.
_LISTED = (
    "a an the this that these those there here i me my we us our you your he him his she her hers it its they "
    "them their who whom whose which what when where why how am is are was were be been being do does did have "
    "has had will would shall should can could may might must not no nor and or but if so as than then too very "
    "of in on at to from by for with into onto s t d ll ve re m "
)
_FUNCTION_WORDS = frozenset(_LISTED.split())
_DRAWS = 50


def words_of(text: str) -> list[str]:
    """The different content words of a text in their order, lower case, any script; all words where none is content."""
    found = dict.fromkeys(re.findall(r"\w+", text.lower()))
    return [word for word in found if word not in _FUNCTION_WORDS] or list(found)


def wanted_words(example: Mapping[str, Any]) -> list[str]:
    """The words of an example's scene: its "words" where it has them, since a scene may be written run together."""
    words = example.get("words")
    return [str(word).lower() for word in words] if words else words_of(str(example["scene"]))


def f1(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """The harmonic mean of precision and recall over two sets of words; 0 where either is empty."""
    hits = len(set(predicted) & set(wanted))
    return 2 * hits / (len(set(predicted)) + len(set(wanted))) if hits else 0.0


def guesses(text: str, wanted: Sequence[str], length: int, other: Sequence[str], seed: int) -> dict[str, float]:
    """The F1 of guesses of `length` words: the first, last and random content words of the text, and another scene.

    Random words are the mean over 50 draws.
    """
    words = words_of(text)
    length = max(1, min(length, len(words)))
    drawn = random.Random(seed)
    return {
        "first words": f1(words[:length], wanted),
        "last words": f1(words[-length:], wanted),
        "random words": sum(f1(drawn.sample(words, length), wanted) for _ in range(_DRAWS)) / _DRAWS if words else 0.0,
        "another scene": f1(other, wanted),
    }


def literal_and_hidden(text: str, wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """The wanted words that stand in the text as they are, and those that it inflects or paraphrases."""
    there = set(re.findall(r"\w+", text.lower()))
    return [word for word in wanted if word in there], [word for word in wanted if word not in there]


def chrf(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """chrF (Popović 2015) as sacrebleu computes it: the score of each text against its reference, 0 to 100.

    Raises:
        LoraRtError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise LoraRtError("chrF needs sacrebleu", next_step="Install it with: pip install 'lora-rt[chrf]'") from error
    metric = CHRF()
    return [float(metric.sentence_score(t, [r]).score) for t, r in zip(texts, references, strict=True)]
