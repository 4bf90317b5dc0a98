"""Compositions and scenes that change while a text grows: an adapter wakes up, or a scene turns, after given words.

A row has one phase per set of activation texts that have appeared so far. A text has appeared from the token on that
completes it, wherever it stands, in the prompt (template and special tokens included) or in the answer. What was
computed before is left as it is: the cache of those tokens is never made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_rt.core.generation.decode import PassInfo
from lora_rt.core.requests.rows import Row


@dataclass(frozen=True, slots=True)
class Variant:
    """One phase of every row. `mask` (rows, tokens) says at which of this pass's tokens it holds; None is at all."""

    rows: Sequence[Row]
    mask: Tensor | None = None


class Timeline:
    """Follows the rows of one request.

    Args:
        rows: the rows, with their phases.
        decode: token ids to text, special tokens included.
    """

    def __init__(self, rows: Sequence[Row], decode: Callable[[Sequence[int]], str]) -> None:
        self._rows = rows
        self._decode = decode
        self._seen: list[dict[str, int]] = [{} for _ in rows]  # text -> position of the token that completes it
        self._read = [0] * len(rows)
        self._still = [Variant(rows)]

    def variants(self, info: PassInfo) -> list[Variant]:
        """The phases that hold in this pass: one for all its tokens, or several with masks that part them."""
        if not any(row.phases for row in self._rows):
            return self._still
        for number, row in enumerate(self._rows):
            if len(self._seen[number]) < len(row.texts):
                self._search(number, row.texts, info)
        spans = [self._spans(number, info.positions[number]) for number in range(len(self._rows))]
        if all(len(row_spans) == 1 for row_spans in spans):
            return [Variant([row_spans[0][0] for row_spans in spans])]
        return self._parted(spans)

    def _search(self, number: int, texts: Sequence[str], info: PassInfo) -> None:
        ids = info.history[number][info.mask[number].bool()].tolist()
        start = max(0, self._read[number] - max(len(text.encode()) for text in texts))
        for text in texts:
            # A token has at least one byte of text, so that an unseen text ends in what is new or starts just before.
            if text not in self._seen[number] and text in self._decode(ids[start:]):
                self._seen[number][text] = self._first(ids, start, text)
        self._read[number] = len(ids)

    def _first(self, ids: Sequence[int], start: int, text: str) -> int:
        """The smallest position whose token completes the text; by halving, since what was completed stays so."""
        low, high = start, len(ids) - 1
        while low < high:
            middle = (low + high) // 2
            if text in self._decode(ids[start : middle + 1]):
                high = middle
            else:
                low = middle + 1
        return low

    def _spans(self, number: int, positions: Tensor) -> list[tuple[Row, Tensor]]:
        """The phases of one row in this pass, each with its tokens' mask (tokens,)."""
        row = self._rows[number]
        starts = sorted({0, *self._seen[number].values()})
        spans = []
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            mask = positions >= start
            if end is not None:
                mask &= positions < end
            if bool(mask.any()):
                spans.append((row.phase(text for text, first in self._seen[number].items() if first <= start), mask))
        return spans

    def _parted(self, spans: Sequence[Sequence[tuple[Row, Tensor]]]) -> list[Variant]:
        variants = []
        for index in range(max(len(row_spans) for row_spans in spans)):
            chosen = [row_spans[min(index, len(row_spans) - 1)] for row_spans in spans]
            masks = [
                mask if index < len(row_spans) else torch.zeros_like(mask)
                for (_, mask), row_spans in zip(chosen, spans, strict=True)
            ]
            variants.append(Variant([row for row, _ in chosen], torch.stack(masks)))
        return variants
