"""How the next tokens are chosen: for all rows at once, greedy or sampled, by numbers that belong to each row alone.

A sampled row draws one uniform number u a step and takes the token at which the sum of chances, from the most likely
token down, passes u times the chance of its nucleus. Which tokens those are is found among the few most likely ones:

    scores    (rows, vocabulary)     seen as blocks of 64 tokens
    blocks    (rows, blocks)         the largest of each
    few       (rows, 96 * 64)        the tokens of the 96 blocks with the largest ones; the 96 best are among them

Where the nucleus ends depends on the sum of all chances. For what is not among the few it lies between the chances of
their blocks' best and 64 times these, and mostly both ends give the same token; only where they do not is everything
added up. On a CPU tokens are then put into classes of nearly equal chances, and only the two are sorted in which
the nucleus ends and the draw falls; a GPU sorts faster than it is asked. The token is the same either way.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lora_rt.core.generation.sampling import Sampling

_BLOCK = 64
_FEW = 96  # tokens that are looked at first
_CLASSES = 2560  # of nearly equal chances,
_FINENESS = 64.0  # so many for every factor of e
_ROUNDING = 1e-4  # more than what single precision loses in a sum of chances
_CLOSE = 2e-5  # more than what chances in single precision lose
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
    blocks = _best_of_blocks(scores)
    best = blocks.amax(-1)  # a number that is none wins
    fine = best.isfinite().tolist()
    drawn = [number for number, row in enumerate(rows) if fine[number] and not row.sampling.greedy]
    taken = [number for number, row in enumerate(rows) if fine[number] and row.sampling.greedy]
    chosen: list[int | None] = [None] * len(rows)
    for numbers, way in ((taken, _most_likely), (drawn, _drawn)):
        if numbers:
            part = (scores, blocks) if len(numbers) == len(rows) else (scores[numbers], blocks[numbers])
            for number, token in zip(numbers, way(*part, [rows[number] for number in numbers]), strict=True):
                chosen[number] = token
    return chosen


def _adjusted(logits: Tensor, rows: Sequence[RowSampler], forbidden: Sequence[Collection[int]]) -> Tensor:
    """Scores under the repetition penalties (Keskar et al. 2019), without the forbidden tokens."""
    places = [(number, token) for number, row in enumerate(rows) for token in row.penalised]
    barred = [(number, token) for number, tokens in enumerate(forbidden) for token in tokens]
    scores = logits.float().contiguous()
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


def _best_of_blocks(scores: Tensor) -> Tensor:
    """The largest score of every block, (rows, blocks); the last block may be a short one."""
    whole = scores.shape[1] // _BLOCK * _BLOCK
    best = scores[:, :whole].reshape(len(scores), -1, _BLOCK).amax(-1)
    return best if whole == scores.shape[1] else torch.cat([best, scores[:, whole:].amax(-1, keepdim=True)], dim=1)


def _values_of(scores: Tensor, blocks: Tensor) -> Tensor:
    """The scores of the tokens of some blocks (rows, n), (rows, 64 n); -inf for what a short block lacks."""
    if scores.shape[1] % _BLOCK == 0:
        rows = torch.arange(len(scores), device=scores.device)[:, None]
        return scores.view(len(scores), -1, _BLOCK)[rows, blocks].flatten(1)
    tokens = (blocks[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=scores.device)).flatten(1)
    last = scores.shape[1] - 1
    return scores.gather(1, tokens.clamp(max=last)).masked_fill_(tokens > last, -torch.inf)


def _tokens_at(blocks: Tensor, places: Tensor) -> Tensor:
    """Which tokens stand at places (rows, m) of what `_values_of` gives for these blocks."""
    return blocks.gather(1, places // _BLOCK) * _BLOCK + places % _BLOCK


def _most_likely(scores: Tensor, blocks: Tensor, _rows: Sequence[RowSampler]) -> list[int]:
    """The best token of every row, the first one of equals."""
    best = blocks.argmax(-1, keepdim=True)
    found: list[int] = _tokens_at(best, _values_of(scores, best).argmax(-1, keepdim=True))[:, 0].tolist()
    return found


def _drawn(scores: Tensor, blocks: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """A token for every row, drawn."""
    draw = _Draw(scores, blocks, rows)
    found, unsure = draw.found()
    if unsure and scores.is_cpu:
        draw.add_up(unsure)
        found, unsure = draw.found()
    if unsure:
        for number, token in zip(unsure, draw.exactly(unsure), strict=True):
            found[number] = token
    return found


class _Draw:
    """One step of some rows: their most likely tokens, their chances, and where their random numbers fall.

    Chances are relative to the best token's. `least` and `most` (rows,) are bounds on the sum of all of a row.
    """

    def __init__(self, scores: Tensor, blocks: Tensor, rows: Sequence[RowSampler]) -> None:
        self._scores = scores
        self._best = blocks.amax(-1).double()
        many = scores.shape[1]

        settings = [
            [row.sampling.temperature or 1.0 for row in rows],
            [row.sampling.top_p for row in rows],
            [k if 0 < (k := row.sampling.top_k) < many else torch.inf for row in rows],
            [row.uniform() for row in rows],
        ]
        columns = torch.tensor(settings, dtype=torch.float64).to(scores.device)  # one copy: each is waited for
        self._heat, self._top_p, self._top_k, self._uniform = columns.unbind()
        self._whole = blocks.shape[1] <= _FEW  # nothing is missing
        if self._whole:
            values, self.tokens = scores.sort(dim=-1, descending=True, stable=True)
            self.least = self.most = self._best  # the sum that is known counts instead
        else:
            few = blocks.topk(_FEW, dim=-1, sorted=False).indices
            values = _values_of(scores, few)
            known = self._roughly(values).sum(-1).double()
            others = self._roughly(blocks).scatter_(1, few, 0.0).sum(-1).double()
            values, where = values.topk(_FEW, dim=-1)
            values, self.tokens = _sorted(values, _tokens_at(few, where))
            self.least = (known + others) * (1 - _ROUNDING)
            self.most = (known + others * _BLOCK) * (1 + _ROUNDING)
        self._chance = self._chances(values)

    def found(self) -> tuple[list[int], list[int]]:
        """A token for every row, and the numbers of the rows for which the bounds leave it open."""
        low, sure_low = self.places(self.least)
        high, sure_high = self.places(self.most)
        unsure: list[int] = ((low != high) | ~sure_low | ~sure_high).nonzero()[:, 0].tolist()
        tokens = self.tokens.gather(1, low[:, None].clamp(max=self.tokens.shape[1] - 1))[:, 0]
        return tokens.tolist(), unsure

    def add_up(self, numbers: list[int]) -> None:
        """Narrow the bounds of some rows: all chances in single precision, added up in double."""
        for number in numbers:
            row = slice(number, number + 1)
            chances = (self._scores[row] - self._best[row, None].float()).div_(self._heat[row, None].float()).exp_()
            total = chances.sum(dtype=torch.float64)
            self.least[row], self.most[row] = total * (1 - _CLOSE), total * (1 + _CLOSE)

    def _roughly(self, values: Tensor) -> Tensor:
        """The chances in single precision, which is enough for bounds, (rows, n)."""
        return (values - self._best[:, None].float()).div_(self._heat[:, None].float()).exp_()

    def _chances(self, values: Tensor) -> Tensor:
        """(rows, n)"""
        return ((values.double() - self._best[:, None]) / self._heat[:, None]).exp()

    def places(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Where each row's number falls among its most likely tokens if the sum of all is this, (rows,); if it does."""
        return _places(self._chance, totals, self._top_p, self._top_k, self._uniform, whole=self._whole)

    def exactly(self, numbers: list[int]) -> list[int]:
        """The tokens of some rows, by the sums of all chances."""
        if self._scores.is_cpu:
            bounded = self._top_k.isfinite().tolist()
            free = [number for number in numbers if not bounded[number]]
            known = {number: self._by_classes(number) for number in free}
            rest = [number for number in numbers if bounded[number]]
            known |= dict(zip(rest, self._by_sorting(rest), strict=True)) if rest else {}
            return [known[number] for number in numbers]
        return self._by_sorting(numbers)

    def _by_classes(self, number: int) -> int:
        """The token of a row without top_k: only tokens of two classes of nearly equal chances are sorted."""
        scores = self._scores[number]
        depth = scores.double().sub_(self._best[number]).div_(self._heat[number])  # 0 for the best, falling
        classes = depth.mul(-_FINENESS).clamp_(max=_CLASSES - 1).long()
        chances = depth.exp_()
        top_p, uniform = float(self._top_p[number]), float(self._uniform[number])
        sums = classes.bincount(chances, minlength=_CLASSES).cumsum(0)

        def passing(goal: float, *, strictly: bool) -> tuple[int, float]:
            """The token with which the sum of chances, from the most likely one down, passes the goal, and that sum."""
            found = int(torch.searchsorted(sums, goal, right=strictly))
            if found == _CLASSES:  # rounded up to the sum of all
                found = int(classes[chances > 0].amax())
            members = (classes == found).nonzero()[:, 0]
            members = members[chances[members] > 0]
            members = members[scores[members].argsort(descending=True, stable=True)]
            within = chances[members].cumsum(0) + (sums[found - 1] if found else 0.0)
            place = min(int(torch.searchsorted(within, goal, right=strictly)), len(members) - 1)
            return int(members[place]), float(within[place])

        total = float(sums[-1])
        last, mass = passing(top_p * total, strictly=False) if top_p < 1 else (-1, total)
        return last if top_p < 1 and uniform * mass >= mass else passing(uniform * mass, strictly=True)[0]

    def _by_sorting(self, numbers: list[int]) -> list[int]:
        """The tokens of some rows; where the most likely ones are not enough, everything is sorted."""
        rows = torch.tensor(numbers, device=self._scores.device)
        scores, settings = self._scores[rows], (self._top_p[rows], self._top_k[rows], self._uniform[rows])
        chances = ((scores.double() - self._best[rows, None]) / self._heat[rows, None]).exp()
        totals = chances.sum(-1)
        place, sure = _places(self._chance[rows], totals, *settings, whole=self._whole)
        found = self.tokens[rows].gather(1, place[:, None])[:, 0]
        rest = (~sure).nonzero()[:, 0]
        if len(rest):
            order = scores[rest].argsort(dim=-1, descending=True, stable=True)
            sorted_chances = chances[rest].gather(1, order)
            place, _ = _places(sorted_chances, totals[rest], *(s[rest] for s in settings), whole=True)
            found[rest] = order.gather(1, place[:, None])[:, 0]
        tokens: list[int] = found.tolist()
        return tokens


def _places(
    chance: Tensor, total: Tensor, top_p: Tensor, top_k: Tensor, uniform: Tensor, *, whole: bool
) -> tuple[Tensor, Tensor]:
    """Where the draws fall, (rows,), and whether that is sure, (rows,) bool: not where more tokens have to be known.

    Args:
        chance: (rows, n) in falling order. total: (rows,) the sum over the whole vocabulary.
        top_p, top_k, uniform: (rows,) settings, infinity for no top_k, and random numbers.
        whole: whether the n are the whole vocabulary.
    """
    count = chance.shape[1]
    chance = chance * (torch.arange(count, device=chance.device) < top_k[:, None])
    sums = chance.cumsum(-1)
    complete = (top_k <= count) | whole  # what lies beyond has no chance
    total = torch.where(complete, sums[:, -1], total)
    nucleus = ((sums - chance) < (top_p * total)[:, None]) & (chance > 0)  # at least one, since 0 < top_p * total
    inside = torch.where(top_p < 1, nucleus.sum(-1), top_k.clamp(max=count).long())
    mass = torch.where(top_p < 1, sums.gather(1, inside[:, None] - 1)[:, 0], total)
    place = (sums <= (uniform * mass)[:, None]).sum(-1)
    enough = torch.where(top_p < 1, inside < count, place < count)
    return torch.minimum(place, inside - 1), complete | (enough & top_k.isinf())


def _sorted(values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Falling by value; of equal ones the smaller token first, so that the order is the same however it was found."""
    by_token = tokens.argsort(dim=-1)
    values, tokens = values.gather(1, by_token), tokens.gather(1, by_token)
    order = values.argsort(dim=-1, descending=True, stable=True)
    return values.gather(1, order), tokens.gather(1, order)
