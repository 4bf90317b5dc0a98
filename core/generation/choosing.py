"""How the next tokens are chosen: for all rows at once, greedy or sampled, by numbers that belong to each row alone.

A sampled row draws one uniform number u a step and takes the token at which the sum of chances, from the most likely
token down, passes u times the chance of its nucleus. Which tokens those are is found among the few most likely ones:

    scores   (rows, vocabulary)     viewed as (rows, 64, blocks)
    best     (rows, blocks)         the largest of each block
    few      (rows, 64 k)           all tokens of the k blocks with the largest ones: the k best tokens are among them

Only for rows whose nucleus is larger is the whole vocabulary sorted. Both ways give the same tokens.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lora_rt.core.generation.sampling import Sampling

_BLOCK = 64
_FEW = 96  # tokens that are looked at first
_WIDEST = torch.finfo(torch.float32).max


class RowSampler:
    """What one row's choice depends on besides its scores: settings, random numbers, and the tokens it has said."""

    def __init__(self, sampling: Sampling, seed: int | None) -> None:
        self.sampling = sampling
        self._generator: torch.Generator | None = None
        if not sampling.greedy:
            self._generator = torch.Generator().manual_seed(secrets.randbits(63) if seed is None else seed)
        self._said: dict[int, None] = {}

    def said(self, token: int) -> None:
        """Note a token of the answer."""
        if self.sampling.repetition_penalty != 1.0:
            self._said[token] = None

    @property
    def penalised(self) -> Collection[int]:
        """The tokens whose scores the repetition penalty changes."""
        return self._said

    def uniform(self) -> float:
        """The row's next random number, from 0 to below 1."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def choose(
    logits: Tensor, rows: Sequence[RowSampler], forbidden: Sequence[Collection[int]] | None = None
) -> list[int | None]:
    """One token per row, or None where a row's scores are not numbers.

    Args:
        logits: (rows, vocabulary), of the last position. They may be changed.
        rows: settings and state of each.
        forbidden: tokens that each row may not take now.
    """
    scores = _adjusted(logits, rows, forbidden or [()] * len(rows))
    best, tokens = scores.max(-1)  # a number that is none wins
    fine = best.isfinite().tolist()
    chosen: list[int | None] = [token if good else None for token, good in zip(tokens.tolist(), fine, strict=True)]
    drawn = [number for number, row in enumerate(rows) if fine[number] and not row.sampling.greedy]
    if drawn:
        some = scores if len(drawn) == len(rows) else scores[drawn]
        for number, token in zip(drawn, _drawn(some, best[drawn], [rows[n] for n in drawn]), strict=True):
            chosen[number] = token
    return chosen


def _adjusted(logits: Tensor, rows: Sequence[RowSampler], forbidden: Sequence[Collection[int]]) -> Tensor:
    """Scores under the repetition penalties (Keskar et al. 2019), without the forbidden tokens."""
    places = [(number, token) for number, row in enumerate(rows) for token in row.penalised]
    barred = [(number, token) for number, tokens in enumerate(forbidden) for token in tokens]
    scores = logits.float() if places or logits.dtype != torch.float32 else logits
    if places:
        where = torch.tensor(places, device=scores.device).unbind(1)
        strengths = torch.tensor([row.sampling.repetition_penalty for row in rows], dtype=torch.float64)
        penalty = strengths.to(scores.device)[where[0]]
        old = scores[where].double()
        # In double precision and back within the range of float32: a tiny penalty makes numbers huge, not infinite.
        new = torch.where(old > 0, old / penalty, old * penalty).clamp(-_WIDEST, _WIDEST)
        scores[where] = torch.where(old.isfinite(), new, old).float()
    if barred:
        scores[torch.tensor(barred, device=scores.device).unbind(1)] = -torch.inf
    return scores


def _drawn(scores: Tensor, best: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """A token for every row; scores (rows, vocabulary), best (rows,) the largest of each."""
    heat = torch.tensor([row.sampling.temperature or 1.0 for row in rows], dtype=torch.float64, device=scores.device)
    uniform = [row.uniform() for row in rows]
    vocabulary = scores.shape[1]
    limits = [min(row.sampling.top_k or vocabulary, vocabulary) for row in rows]
    count = min(_FEW, vocabulary)
    values, tokens = _largest(scores, count)
    chances = ((values.double() - best[:, None]) / heat[:, None]).exp()  # relative to the best, (rows, count)
    totals = _totals(scores, best, heat, rows)
    found: list[int] = []
    everything = count == vocabulary
    for number, row in enumerate(rows):
        place = _place(chances[number], totals[number], row.sampling.top_p, limits[number], uniform[number], everything)
        if place is None:
            place, order = _among_all(scores[number], best[number], heat[number], row, limits[number], uniform[number])
            found.append(int(order[place]))
        else:
            found.append(int(tokens[number, place]))
    return found


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row in falling order, and their places, both (rows, count)."""
    rows, vocabulary = scores.shape
    blocks = vocabulary // _BLOCK
    if blocks <= 4 * count:
        return _sorted(*scores.topk(count, dim=-1))
    whole = scores[:, : blocks * _BLOCK]
    best = whole.reshape(rows, _BLOCK, blocks).amax(1)  # block b holds the tokens b, b + blocks, b + 2 blocks, ...
    chosen = best.topk(count, dim=-1, sorted=False).indices  # (rows, count)
    steps = torch.arange(_BLOCK, device=scores.device) * blocks
    places = (chosen[:, :, None] + steps).flatten(1)
    rest = torch.arange(blocks * _BLOCK, vocabulary, device=scores.device).expand(rows, -1)
    places = torch.cat([places, rest], dim=1)
    few, where = scores.gather(1, places).topk(count, dim=-1)
    return _sorted(few, places.gather(1, where))


def _sorted(values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Falling by value; of equal ones the smaller token first, so that the order is the same however it was found."""
    by_token = tokens.argsort(dim=-1)
    values, tokens = values.gather(1, by_token), tokens.gather(1, by_token)
    order = values.argsort(dim=-1, descending=True, stable=True)
    return values.gather(1, order), tokens.gather(1, order)


def _totals(scores: Tensor, best: Tensor, heat: Tensor, rows: Sequence[RowSampler]) -> list[float]:
    """The sum of all chances of each row, relative to the best token's; where top_k is few it is not needed."""
    if all(0 < row.sampling.top_k <= _FEW for row in rows):
        return [0.0] * len(rows)
    blocks = scores.shape[1] // _BLOCK
    relative = (scores - best[:, None]).div_(heat.float()[:, None]).exp_()
    whole = relative[:, : blocks * _BLOCK].reshape(len(rows), _BLOCK, blocks)
    # Down the columns first: how many rows there are does not change the order in which a row's numbers are added.
    total = whole.sum(1).double().sum(-1) + relative[:, blocks * _BLOCK :].double().sum(-1)
    found: list[float] = total.tolist()
    return found


def _place(chances: Tensor, total: float, top_p: float, top_k: int, uniform: float, everything: bool) -> int | None:
    """Where the draw falls among the most likely tokens, or None where more of them have to be known.

    Args:
        chances: (few,) in falling order. total: the sum over the whole vocabulary, in the same units.
        everything: whether no token is missing.
    """
    known = len(chances)
    sums = chances[:top_k].cumsum(0)
    if top_k <= known:  # what lies beyond top_k has no chance at all
        total, everything = float(sums[-1]), True
    before = sums - chances[:top_k]
    nucleus = int((before < top_p * total).sum()) if top_p < 1 else len(sums)
    if nucleus == len(sums) and not everything:
        if top_p < 1 or uniform * total >= float(sums[-1]):
            return None
        mass = total
    else:
        mass = float(sums[max(nucleus, 1) - 1])
    return min(int((sums <= uniform * mass).sum()), max(nucleus, 1) - 1)


def _among_all(
    scores: Tensor, best: Tensor, heat: Tensor, row: RowSampler, top_k: int, uniform: float
) -> tuple[int, Tensor]:
    """The draw among the whole sorted vocabulary: its place, and the tokens in falling order."""
    order = scores.argsort(descending=True, stable=True)
    chances = ((scores[order].double() - best) / heat).exp()
    place = _place(chances, float(chances.sum()), row.sampling.top_p, top_k, uniform, everything=True)
    assert place is not None
    return place, order
