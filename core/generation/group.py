"""Rows of a batch that share passes, side by side in one cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic

import torch
from torch import Tensor

from lora_rt.core.base.shape import pad_left, pad_right
from lora_rt.core.forward import caches
from lora_rt.core.forward.causal_lm import CausalLM
from lora_rt.core.generation.row import R


class Group(Generic[R]):
    """Rows that share passes: `ids` and `mask` (rows, width), padded on the left, and the cache of the first columns.

    `read` is how many columns lie in the cache; without a cache every pass reads all of them. Rows that are only read
    stand in groups of their own, padded on the right: no token of theirs looks at padding, in whatever model.
    """

    def __init__(self, lm: CausalLM, rows: list[R], ids: Tensor, mask: Tensor, cache: Any, read: int) -> None:
        self._lm = lm
        self.rows = rows
        self.ids = ids
        self.mask = mask
        self.cache = cache
        self.read = read

    @classmethod
    def begun(cls, lm: CausalLM, rows: list[R], *, caching: bool = True) -> Group[R]:
        """Rows of which nothing has been read, or the same beginning: all have the same `begin`.

        Args:
            caching: keep keys and values where the model has such.
        """
        pad = pad_left if rows[0].wanted is None else pad_right
        ids, mask = pad([[*row.ids, *row.answer] for row in rows], lm.device)
        cache, read = rows[0].begin or (lm.new_cache() if caching and lm.keeping != "none" else None, 0)
        if read and rows[0].wanted is not None:  # others may begin with it, in other groups too, and a pass extends it
            every = torch.zeros(len(rows), dtype=torch.long, device=ids.device)
            cache = caches.joined(lm.new_cache(), [(cache, every)], read)
        for row in rows:
            row.begin = None  # read again, it begins at its beginning
        return cls(lm, list(rows), ids, mask, cache, read)

    @property
    def width(self) -> int:
        """The columns, padding included."""
        return self.ids.shape[1]

    @property
    def padded(self) -> bool:
        """Whether a row is shorter than the group is wide."""
        return any(row.length < self.width for row in self.rows)

    @property
    def wanted(self) -> range | None:
        """The columns whose logits rows that are only read want; None where they speak, which wants the last one."""
        places = [row.wanted for row in self.rows if row.wanted is not None]
        return range(min(one.start for one in places), max(one.stop for one in places)) if places else None

    def hand_out(self, logits: Tensor, columns: range) -> None:
        """Give rows that are only read the logits that they want, of those of some columns (rows, columns, vocab)."""
        for row, own in zip(self.rows, logits, strict=True):
            assert row.wanted is not None
            row.logits = own[row.wanted.start - columns.start : row.wanted.stop - columns.start]  # (wanted, vocab)

    def append(self, tokens: Sequence[int | None]) -> None:
        """One more column. A row that has ended gets any token: it leaves before the next pass."""
        column = torch.tensor([[token or 0] for token in tokens], device=self.ids.device)
        self.ids = torch.cat([self.ids, column], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(column)], dim=1)

    def keep(self, numbers: list[int]) -> None:
        """Forget all other rows, and the padding that only they needed."""
        if len(numbers) < len(self.rows):
            rest = self.part(numbers) if numbers else None
            self.rows = rest.rows if rest else []
            if rest:
                self.ids, self.mask, self.cache, self.read = rest.ids, rest.mask, rest.cache, rest.read

    def part(self, numbers: list[int]) -> Group[R]:
        """Some of the rows, as a group of their own."""
        return joined(self._lm, [(self, numbers)])


def united(lm: CausalLM, groups: list[Group[R]]) -> Group[R]:
    if len(groups) == 1:
        return groups[0]
    return joined(lm, [(group, list(range(len(group.rows)))) for group in groups])


def joined(lm: CausalLM, parts: list[tuple[Group[R], list[int]]]) -> Group[R]:
    """Rows of one or several groups in one group, which is as wide as its longest row.

    Where it is read, all of its parts are read alike: up to the last column, or not at all.

        a   t h e s         width 4, read 3        a   t h e s     width 4, read 3: of both the last column is new
        b   h i             width 2, read 1   ->   b   . . h i     b's one key and value now end where a's three do
    """
    rows = [group.rows[number] for group, numbers in parts for number in numbers]
    cut = [(group, torch.tensor(numbers, device=group.ids.device)) for group, numbers in parts]
    width = max(int(group.mask[index].sum(-1).max()) for group, index in cut)  # of real tokens, not of padding
    ids = torch.cat([caches.fitted(group.ids[index], width, dim=1) for group, index in cut])  # (rows, width)
    mask = torch.cat([caches.fitted(group.mask[index], width, dim=1) for group, index in cut])
    first = parts[0][0]
    if first.cache is None:
        return Group(lm, rows, ids, mask, None, 0)
    read = width - (first.width - first.read)
    if read <= 0:
        return Group(lm, rows, ids, mask, lm.new_cache(), 0)
    cache = caches.joined(lm.new_cache(), [(group.cache, index) for group, index in cut], read)
    return Group(lm, rows, ids, mask, cache, read)
