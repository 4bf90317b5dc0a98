"""How the next tokens are chosen: for all rows at once, greedy or sampled, by numbers that belong to each row alone.

scores    (rows, vocabulary)     seen as blocks of 32 tokens
bests     (rows, blocks)         the largest score of each block
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Collection, Sequence
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_rt.core.generation.drawing import BLOCK, SMALL, Draw, Drawing, tokens_at, values_of
from lora_rt.core.generation.sampling import Sampling
from lora_rt.core.native import compiled

_log = logging.getLogger("lora_rt.generation")

_AT_ONCE = 32  # random numbers
_TRIES = 64  # after which a small nucleus is looked for by sorting
_WIDEST = torch.finfo(torch.float32).max


class RowSampler:
    """What one row's choice depends on besides its scores: settings, random numbers, and the tokens it has said."""

    def __init__(self, sampling: Sampling, seed: int | None) -> None:
        self.sampling = sampling
        self._generator: torch.Generator | None = None
        if not sampling.greedy:
            self._generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        self._numbers: list[float] = []  # the last one is next
        self.penalised: dict[int, None] = {}  # tokens whose scores the repetition penalty changes

    def said(self, token: int) -> None:
        """Note a token of the answer."""
        if self.sampling.repetition_penalty != 1.0:
            self.penalised[token] = None

    def uniform(self) -> float:
        """The row's next random number, from 0 to below 1."""
        if not self._numbers:  # some at once take as long as one, and are the same
            self._numbers = torch.rand(_AT_ONCE, generator=self._generator, dtype=torch.float64).tolist()[::-1]
        return self._numbers.pop()


def choose(
    logits: Tensor, rows: Sequence[RowSampler], forbidden: Sequence[Collection[int]] | None = None
) -> list[int | None]:
    """One token per row, or None where a row's scores are not numbers.

    Args:
        logits: (rows, vocabulary), of the last position. They may be changed.
        rows: settings and state of each.
        forbidden: tokens that each row may not take now.
    """
    scores = _adjusted(logits, rows, forbidden or [()] * len(rows))  # (rows, vocabulary) float32
    bests = _best_of_blocks(scores)  # (rows, blocks), read by both ways below: the vocabulary is gone through once
    best = bests.amax(-1)  # (rows,); a NaN wins over every number, so one check finds it wherever it stands
    fine = best.isfinite().tolist()
    warm = [number for number, row in enumerate(rows) if fine[number] and not row.sampling.greedy]
    taken = [number for number, row in enumerate(rows) if fine[number] and row.sampling.greedy]
    chosen: list[int | None] = [None] * len(rows)
    for numbers, way in ((taken, _most_likely), (warm, _drawn)):
        if numbers:
            # Picking rows copies a vocabulary for each, so that is not done where all rows go one way.
            part = (scores, bests) if len(numbers) == len(rows) else (scores[numbers], bests[numbers])
            for number, token in zip(numbers, way(*part, [rows[number] for number in numbers]), strict=True):
                chosen[number] = token
    return chosen


def _adjusted(logits: Tensor, rows: Sequence[RowSampler], forbidden: Sequence[Collection[int]]) -> Tensor:
    """Scores under the repetition penalties (Keskar et al. 2019), without the forbidden tokens."""
    scores = logits.float().contiguous()
    if any(row.penalised for row in rows):
        where = _places([row.penalised for row in rows], scores.device)
        strengths = [row.sampling.repetition_penalty for row in rows]
        penalty = torch.from_numpy(np.repeat(strengths, [len(row.penalised) for row in rows])).to(scores.device)
        old = scores[where].double()
        # In double precision and back within the range of float32: a tiny penalty makes numbers huge, not infinite.
        new = torch.where(old > 0, old / penalty, old * penalty).clamp(-_WIDEST, _WIDEST)
        scores[where] = torch.where(old.isfinite(), new, old).float()  # the clamp would make a number of -inf
    if any(forbidden):
        scores[_places(forbidden, scores.device)] = -torch.inf
    return scores


def _places(tokens: Sequence[Collection[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Row and token of some tokens of each row, (n,) both."""
    counts = [len(of_row) for of_row in tokens]
    rows = np.repeat(np.arange(len(tokens)), counts)
    return torch.from_numpy(np.stack([rows, np.fromiter(chain(*tokens), np.int64, sum(counts))])).to(device).unbind(0)


def _best_of_blocks(scores: Tensor) -> Tensor:
    """The largest score of every block, (rows, blocks); the last block may be a short one."""
    whole = scores.shape[1] // BLOCK * BLOCK
    best = scores[:, :whole].reshape(len(scores), -1, BLOCK).amax(-1)
    return best if whole == scores.shape[1] else torch.cat([best, scores[:, whole:].amax(-1, keepdim=True)], dim=1)


def _most_likely(scores: Tensor, bests: Tensor, _rows: Sequence[RowSampler]) -> list[int]:
    """The best token of every row, the first one of equals."""
    best = bests.argmax(-1, keepdim=True)  # (rows, 1): the block, and then 32 tokens of it instead of all
    found: list[int] = tokens_at(best, values_of(scores, best).argmax(-1, keepdim=True))[:, 0].tolist()
    return found


def _drawn(scores: Tensor, bests: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """A token for every row, drawn."""
    many = scores.shape[1]
    settings = [
        Draw(
            heat=row.sampling.temperature or 1.0,
            top_p=row.sampling.top_p,
            top_k=k if 0 < (k := row.sampling.top_k) < many else torch.inf,
            uniform=row.uniform(),
        )
        for row in rows
    ]
    if scores.is_cpu and many > SMALL and compiled.is_there() and (kernel := _kernel()) is not None:
        return _by_kernel(kernel, scores, bests, settings, again=lambda number: rows[number].uniform())
    drawing = Drawing(scores, bests, settings)
    found, unsure = drawing.found()  # the 48 blocks were looked at
    if unsure:  # the nucleus is wider than what was looked at
        for number, token in zip(unsure, drawing.exactly(unsure), strict=True):
            found[number] = token
    return found


@cache
def _kernel() -> Any:
    """`draw_kernel.py`, compiled; None where that can't be done."""
    try:
        from lora_rt.core.generation import draw_kernel

        draw_kernel.prepare()
    except Exception as error:  # another release of numba may refuse it in any way
        _log.warning("tokens are drawn by torch, which is slower: %s", error)
        return None
    return draw_kernel


def _by_kernel(
    kernel: Any, scores: Tensor, bests: Tensor, settings: Sequence[Draw], again: Callable[[int], float]
) -> list[int]:
    """The same, compiled; `again` is one more random number of a row, by its place."""
    numbers = np.zeros((len(settings), kernel.NUMBERS))
    numbers[:, : len(Draw._fields)] = settings
    tokens = np.empty(len(settings), np.int64)
    wanted = np.arange(len(settings))
    for _ in range(1 + _TRIES):
        tokens[wanted] = kernel.draw(scores.numpy(), bests.numpy(), numbers, wanted)
        wanted = wanted[tokens[wanted] == kernel.MISSED]
        if not len(wanted):
            break
        for number in wanted:
            numbers[number, kernel.UNIFORM] = again(number)
    found: list[int] = tokens.tolist()
    if rest := [number for number, token in enumerate(found) if token < 0]:
        numbers_now = [settings[n]._replace(uniform=float(numbers[n, kernel.UNIFORM])) for n in rest]
        drawing = Drawing(scores[rest], bests[rest], numbers_now)
        for number, token in zip(rest, drawing.exactly(list(range(len(rest)))), strict=True):
            found[number] = token
    return found
