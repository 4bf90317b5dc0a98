"""Examples of prompts and answers as tokens, in batches of like length."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

from lora_rt.core.generation.prompts import TextFormat
from lora_rt.core.requests.activation import is_scene_type
from lora_rt.core.training.data import Pairs, check_fit, read_pairs
from lora_rt.core.training.sources import DataError

_POOL = 8  # batches whose examples are sorted by length together


@dataclass(frozen=True, slots=True)
class Item:
    """One example: tokens of prompt and answer, and the scene type where its line states one."""

    prompt: Sequence[int]
    answer: Sequence[int]
    scene_type: str | None = None


def read_lines(path: Path, *fields: str) -> Pairs:
    """The examples of a file that have these fields, whose scene types can be named.

    Raises:
        DataError: listing every bad line.
    """
    return read_pairs(path, fields, _strange_type, chats=True)


def as_items(lines: Sequence[Mapping[str, Any]], text: TextFormat, limit: int) -> list[Item]:
    """The examples in a base's tokens; without a text they are prompts alone.

    Raises:
        DataError: some have more than `limit`, prompt and answer.
    """
    items = [
        Item(
            text.prompt_ids(line["scene"]),
            text.answer_ids(line["text"]) if "text" in line else [],
            line.get("scene_type"),
        )
        for line in lines
    ]
    check_fit(lines, [len(item.prompt) + len(item.answer) for item in items], limit)
    return items


def _strange_type(line: Mapping[str, Any]) -> list[str]:
    """A type that nobody could name with --scene, or that another differs from by a blank."""
    kind = line.get("scene_type")
    if not isinstance(kind, str) or is_scene_type(kind):
        return []
    return [f'"scene_type" is {kind[:40]!r}: it is one word, without blanks, commas, "+" and brackets']


def held_out(items: Sequence[Item], seed: int) -> tuple[list[Item], list[Item]]:
    """The items without, and those of, a tenth of each scene type (at least one) that is drawn by the seed.

    A type with one example alone is not held out.

    Raises:
        DataError: nothing can be held out.
    """
    dice = random.Random(seed)
    aside: set[int] = set()
    for kind in dict.fromkeys(item.scene_type for item in items):
        mine = [index for index, item in enumerate(items) if item.scene_type == kind]
        aside.update(dice.sample(mine, max(1, round(0.1 * len(mine)))) if len(mine) > 1 else [])
    if not aside:
        text = "there are too few examples to hold some out, by which the fit is judged"
        raise DataError(text, next_step="Give at least two, and two of each scene type")
    return [x for i, x in enumerate(items) if i not in aside], [x for i, x in enumerate(items) if i in aside]


def steps(items: Sequence[Item], size: int, epochs: float, seed: int) -> Iterator[list[Item]]:
    """The batches of so many passes over the items, each in another random order, the last one perhaps cut short."""
    if not items:
        return iter(())
    rng = random.Random(seed)
    count = max(1, round(epochs * -(-len(items) // size)))
    endless = chain.from_iterable(_batches(items, size, rng) for _ in repeat(None))
    return islice(endless, count)


def _batches(items: Sequence[Item], size: int, rng: random.Random) -> Iterator[list[Item]]:
    """All items once, in random order, with those of like length in one batch."""
    order = rng.sample(list(items), len(items))
    pools = [order[start : start + size * _POOL] for start in range(0, len(order), size * _POOL)]
    cut: list[list[Item]] = []
    for pool in pools:
        pool.sort(key=lambda item: len(item.prompt) + len(item.answer))
        cut += [pool[start : start + size] for start in range(0, len(pool), size)]
    yield from rng.sample(cut, len(cut))


def chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """The items in their order, so many at a time."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def chance(items: Sequence[Item]) -> float:
    """The share of the most frequent scene type."""
    kinds = [item.scene_type for item in items]
    return max(map(kinds.count, kinds)) / len(items)
