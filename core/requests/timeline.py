"""What a row is under at each of its tokens: compositions that are changed while it runs, and words that wake adapters.

A row's turns are the compositions that it was given, each from a position on. Each of them has one phase per set of
activation texts that have appeared so far. A text has appeared from the token on that completes it, wherever it stands,
in the prompt (template and special tokens included) or in the answer. An aLoRA acts from the first of its tokens on,
where they stand last in what the row was given, as in PEFT. What was computed before is left as it is: the
cache of those tokens is never made again.

    tokens     I  say  So  :  four  and  then      turn 1 from 0: logic[So:]     turn 2 from 6: logic:0.5[So:] body
    spans     |base       |logic        |logic:0.5 body
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_rt.core.engine.resident import ResidentAdapter
from lora_rt.core.requests.rows import Row, Waking


@dataclass(frozen=True, slots=True)
class Variant:
    """One phase of every row of a pass. `mask` (rows, tokens) says at which tokens it holds; None is at all."""

    rows: Sequence[Row]
    mask: Tensor | None = None


class Timeline:
    """Follows one row.

    Args:
        row: what it is under from its first token on.
        decode: token ids to text, special tokens included.
        given: how many tokens the row begins with.
    """

    def __init__(self, row: Row, decode: Callable[[Sequence[int]], str], given: int | None = None) -> None:
        self._decode = decode
        self._given = given
        self._turns: list[tuple[int, Row]] = [(0, row)]
        self._seen: dict[Waking, int] = {}  # text -> position of the token that completes it
        self._read = 0

    @property
    def row(self) -> Row:
        """What it was last told to be under."""
        return self._turns[-1][1]

    @property
    def still(self) -> bool:
        """Whether the row is under one thing from its first token to its last."""
        return len(self._turns) == 1 and not self.row.phases

    @property
    def adapters(self) -> set[ResidentAdapter]:
        """Every adapter that it is, was or may come to be under."""
        rows = [one for _, row in self._turns for one in (row, *row.phases.values())]
        return {adapter for row in rows for adapter in row.adapters.values()}

    @property
    def unheard(self) -> list[str]:
        """The texts that adapters of the row wait for and that have not appeared."""
        return [text for text in self.row.texts if isinstance(text, str) and text not in self._seen]

    @property
    def company(self) -> Hashable:
        """See `lora_rt.core.generation.batch.DecodingRow.company`."""
        if not any(adapter.apart for adapter in self.adapters):
            return None
        if not self.still or not self.row.static:
            return id(self)
        own = self.row
        return tuple(sorted((n, w, id(own.adapters.get(n))) for n, w in own.weights.items() if w)), own.scene_type

    def turn(self, position: int, row: Row) -> None:
        """From this position on the row is under something else."""
        self._turns = [*(turn for turn in self._turns if turn[0] < position), (position, row)]
        self._read = 0  # its texts may have appeared long ago

    def spans(self, tokens: Sequence[int], positions: Tensor) -> list[tuple[Row, Tensor]]:
        """The phases of a pass in order, each with the mask (tokens,) of its tokens.

        Args:
            tokens: all that the row has so far. positions: (tokens,) of those that the pass reads.
        """
        self._search(tokens, {text for _, row in self._turns for text in row.texts})
        starts = sorted({*(start for start, _ in self._turns), *self._seen.values()})
        spans = []
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            mask = positions >= start  # (tokens,)
            if end is not None:
                mask &= positions < end
            if bool(mask.any()):
                row = next(row for first, row in reversed(self._turns) if first <= start)
                seen = [text for text in row.texts if self._seen.get(text, start + 1) <= start]
                spans.append((row.phase(seen), mask))
        return spans

    def _search(self, tokens: Sequence[int], wakings: set[Waking]) -> None:
        for waking in wakings - self._seen.keys():
            if not isinstance(waking, str) and (place := _last(tokens[: self._given], waking)) is not None:
                self._seen[waking] = place
        missing = [text for text in wakings if isinstance(text, str) and text not in self._seen]
        if not missing:
            return
        start = max(0, self._read - max(len(text.encode()) for text in missing))
        read = self._decode(tokens[start:])
        for text in missing:
            # A token has at least one byte of text, so that an unseen text ends in what is new or starts just before.
            if text in read:
                self._seen[text] = self._first(tokens, start, text)
        self._read = len(tokens)

    def _first(self, tokens: Sequence[int], start: int, text: str) -> int:
        """The smallest position whose token completes the text; by halving, since what was completed stays so."""
        low, high = start, len(tokens) - 1
        while low < high:
            middle = (low + high) // 2
            if text in self._decode(tokens[start : middle + 1]):
                high = middle
            else:
                low = middle + 1
        return low


def _last(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where these tokens begin for the last time."""
    first, length = wanted[0], len(wanted)
    places = (n for n in range(len(tokens) - length, -1, -1) if tokens[n] == first)
    return next((n for n in places if list(tokens[n : n + length]) == list(wanted)), None)


def variants(timelines: Sequence[Timeline], tokens: Sequence[Sequence[int]], positions: Tensor) -> list[Variant]:
    """The phases that hold in a pass: one for all its tokens, or several with masks that part them.

    Args:
        timelines, tokens: of each row, `tokens` being all that it has so far.
        positions: (rows, tokens) of the pass.
    """
    everywhere = torch.ones_like(positions[0], dtype=torch.bool)  # (tokens,)
    spans = [
        [(timeline.row, everywhere)] if timeline.still else timeline.spans(own, places)
        for timeline, own, places in zip(timelines, tokens, positions, strict=True)
    ]
    if all(len(of_row) == 1 for of_row in spans):
        return [Variant([of_row[0][0] for of_row in spans])]
    return [_variant(spans, index) for index in range(max(len(of_row) for of_row in spans))]


def _variant(spans: Sequence[Sequence[tuple[Row, Tensor]]], index: int) -> Variant:
    """The phase of this number of every row; a row that has fewer is in none of its tokens in it."""
    chosen = [of_row[min(index, len(of_row) - 1)] for of_row in spans]  # by row: its phase and (tokens,)
    masks = [
        mask if index < len(of_row) else torch.zeros_like(mask) for (_, mask), of_row in zip(chosen, spans, strict=True)
    ]
    return Variant([row for row, _ in chosen], torch.stack(masks))  # (rows, tokens)
