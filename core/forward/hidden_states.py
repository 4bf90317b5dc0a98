"""The base's early hidden state: a pass that stops after the first blocks, with no adapter applied.

After none of them it is what the first block is given: the embeddings, as the base scales and places them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from lora_rt.core.base.shape import blocks_of, width_of
from lora_rt.core.engine.heads import Reached
from lora_rt.core.forward import caches
from lora_rt.core.forward.causal_lm import CausalLM
from lora_rt.core.forward.decoder import silent
from lora_rt.errors import LoraRtError

_wanted: ContextVar[int | None] = ContextVar("lora_rt_early", default=None)
_QUARTER = 4  # where an adapter does not say how deep: a quarter of the blocks
_ROWS = 64  # whose keys and values are kept, per batch and in all depths


class EarlyHidden:
    """Gives the output of one of the first blocks, or their input. Its hooks do nothing outside `__call__`."""

    def __init__(self, lm: CausalLM, layers: int) -> None:
        self.lm = lm
        self._layers = layers
        self._size = width_of(lm.model.config)
        self._hooks: dict[int, Any] = {}
        self._lock = Lock()

    def depth(self, wanted: int | None) -> int:
        """How many blocks run: what an adapter's card says, a quarter of them where it says nothing.

        Raises:
            LoraRtError: the base has fewer.
        """
        if wanted is None:
            return max(1, self._layers // _QUARTER)
        if not 0 <= wanted <= self._layers:
            text = f"an adapter reads the hidden state after {wanted} blocks, and this base has {self._layers}"
            raise LoraRtError(text, next_step="Use the base that it was trained for")
        return wanted

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks.values():
            hook.remove()

    def __call__(
        self, ids: Tensor, mask: Tensor, positions: Tensor, depth: int | None = None, cache: Any = None
    ) -> Tensor:
        """(rows, tokens, hidden) for ids and positions (rows, tokens); the rows may share a pass.

        Args:
            ids, positions: of this pass.
            mask: (rows, all tokens so far), 0 on padding.
            depth: after how many blocks; see `depth`.
            cache: of the tokens before, which the pass extends.
        """
        blocks = self.depth(depth)
        self._hook(blocks)
        token = _wanted.set(blocks)
        try:
            with torch.inference_mode():
                self.lm.forward(ids, mask, positions, cache=cache, by_blocks=False)
        except Reached as reached:
            rows, tokens = ids.shape
            return _of_one_stream(reached.x, rows, tokens, self._size).to(ids.device)
        finally:
            _wanted.reset(token)
        raise RuntimeError("the model has no blocks to stop at")

    def _hook(self, blocks: int) -> None:
        def stop(_module: nn.Module, _arguments: Any, output: Any) -> None:
            if _wanted.get() == blocks:
                raise Reached(output[0] if isinstance(output, tuple) else output)

        def refuse(_module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            if _wanted.get() == 0:
                hidden = (one for one in (*given, *named.values()) if torch.is_tensor(one) and one.is_floating_point())
                raise Reached(next(hidden))  # by whatever name, it is what blocks are given first

        with self._lock:
            if blocks in self._hooks:
                return
            found = blocks_of(self.lm.model)
            self._hooks[blocks] = (
                found[blocks - 1].register_forward_hook(silent(stop))
                if blocks
                else found[0].register_forward_pre_hook(silent(refuse), with_kwargs=True)
            )


def _of_one_stream(hidden: Tensor, rows: int, tokens: int, size: int | None) -> Tensor:
    """(rows, tokens, size) of what a base's blocks hand on, which may be several states of each token: their mean.

    They stand on an axis of their own (Gemma 3n's first, DeepSeek V4's third), side by side (Qwen 4), or, where a model
    predicts further tokens, behind the tokens (ProphetNet): of these the first ones are the tokens' own.
    """
    if hidden.dim() == 4:
        return hidden.mean(0 if hidden.shape[1:3] == (rows, tokens) else 2)
    if size is not None and hidden.shape[-1] != size and not hidden.shape[-1] % size:
        return hidden.view(*hidden.shape[:-1], -1, size).mean(-2)
    return hidden[:, :tokens]


@dataclass(slots=True, eq=False)
class _Read:
    """What was read of some rows: ids and mask (rows, tokens), the cache of the first blocks, and what they gave,
    (rows, tokens, hidden).
    """

    depth: int
    ids: Tensor
    mask: Tensor
    cache: Any
    hidden: Tensor | None = None

    def holds(self, ids: Tensor, mask: Tensor) -> bool:
        """Whether it is of these very rows."""
        return torch.equal(self.ids, ids) and torch.equal(self.mask, mask)


class EarlyHistory:
    """The early hidden states of a running batch: each pass reads its new tokens alone, and the first blocks' cache.

    Where rows have joined or left, what was read of each is found by its tokens, cut out and padded anew, as the batch
    does with its own cache.
    """

    def __init__(self, early: EarlyHidden) -> None:
        self._early = early
        self._read: list[_Read] = []  # the latest first

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor, new: int, depth: int | None = None) -> Tensor:
        """(rows, all tokens so far, hidden); ids, mask and positions likewise, the last `new` are this pass's."""
        lm, before = self._early.lm, ids.shape[1] - new
        blocks = self._early.depth(depth)
        # Where a base counts positions by its cache, a pass that fills none would begin at the first one again. Rows
        # that are padded on the right do not go on from here, nor lie as they would have to beside others.
        unkept = lm.keeping != "shared" or lm.rope.varies or not (blocks or lm.takes_positions)
        if unkept or not bool(mask[:, -1].all()):
            return self._early(ids, mask, positions, blocks)
        reads = [read for read in self._read if read.depth == blocks]
        known = next((read for read in reads if read.holds(ids[:, :before], mask[:, :before])), None)
        if known is None:
            known = self._of_rows(reads, ids, mask, new) or _Read(blocks, ids[:, :0], mask[:, :0], lm.new_cache())
        self._read = [read for read in self._read if read is not known]  # a pass that fails leaves half of it
        start = known.ids.shape[1]
        # Without a block nothing is looked back at, and nothing would be put into a cache.
        seen, cache = (mask, known.cache) if blocks else (mask[:, start:], None)
        hidden = self._early(ids[:, start:], seen, positions[:, start:], blocks, cache)
        known.ids, known.mask = ids.clone(), mask.clone()
        known.hidden = hidden if known.hidden is None else torch.cat([known.hidden, hidden], 1)
        self._read = _newest([known, *self._read])
        return known.hidden

    def _of_rows(self, reads: Sequence[_Read], ids: Tensor, mask: Tensor, new: int) -> _Read | None:
        """What was read of these rows beside others, where the same number of tokens is left to read of each."""
        rows = _tokens_of(ids, mask)
        there = {tokens: (one, n) for one in reads for n, tokens in enumerate(_tokens_of(one.ids, one.mask)) if tokens}
        for rest in sorted({len(rows[0]) - len(tokens) for tokens in there}):
            if not new <= rest < min(map(len, rows)):
                continue
            found = [place for row in rows if (place := there.get(row[: len(row) - rest])) is not None]
            if len(found) == len(rows):
                return self._side_by_side(found, ids[:, :-rest], mask[:, :-rest])
        return None

    def _side_by_side(self, found: Sequence[tuple[_Read, int]], ids: Tensor, mask: Tensor) -> _Read:
        """Rows of several reads as one; ids and mask (rows, columns) of what was read of them.

        A read of which every row is among them is not kept beside it.
        """
        columns, depth = ids.shape[1], found[0][0].depth
        numbers = [(one, torch.tensor([n], device=ids.device)) for one, n in found]
        cache = self._early.lm.new_cache()
        if depth:
            cache = caches.joined(cache, [(one.cache, row) for one, row in numbers], columns)
        states = [caches.fitted(one.hidden[row], columns, dim=1) for one, row in numbers if one.hidden is not None]
        taken = Counter(id(one) for one, _ in found)
        self._read = [one for one in self._read if taken[id(one)] < len(one.ids)]
        return _Read(depth, ids, mask, cache, torch.cat(states))


def _newest(reads: Sequence[_Read]) -> list[_Read]:
    """The first of them, and of the others as many as have `_ROWS` rows with it."""
    rows = itertools.accumulate(len(read.ids) for read in reads)
    return [
        read for place, (read, all_rows) in enumerate(zip(reads, rows, strict=True)) if not place or all_rows <= _ROWS
    ]


def _tokens_of(ids: Tensor, mask: Tensor) -> list[tuple[int, ...]]:
    """Of each row its tokens without the padding."""
    return [tuple(row[seen].tolist()) for row, seen in zip(ids, mask.bool(), strict=True)]
