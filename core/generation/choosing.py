"""How the next tokens are chosen: for all rows at once, greedy or sampled, by numbers that belong to each row alone.

Where the nucleus of a sampled row is found among its few most likely tokens, the row draws one uniform number u and
takes the token at which the sum of chances, over the nucleus by the tokens' numbers, passes u times that of all of it:

    scores    (rows, vocabulary)     seen as blocks of 64 tokens
    blocks    (rows, blocks)         the largest of each
    few       (rows, 48 * 64)        the tokens of the 48 blocks with the largest ones; the 48 best are among them

Where the nucleus ends depends on the sum of all chances. For what is not among the few it lies between the chances of
their blocks' best and 64 times these, and mostly both ends give the same nucleus; only where they do not is everything
added up. A nucleus of more tokens is not looked for on a CPU: the row draws among all tokens, in their own order, until
one is drawn that lies in it, which is told by the sum of what is more likely. A GPU sorts faster than it is asked.
Which of these ways a row goes depends on its scores alone, and not on what it draws or stands beside.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn.functional import threshold

from lora_rt.core.generation.sampling import Sampling

_BLOCK = 64
_FEW = 48  # tokens that are looked at first
_TRIES = 64  # after which a small nucleus is looked for by sorting
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
    scores = _adjusted(logits, rows, forbidden or [()] * len(rows))  # (rows, vocabulary) float32
    blocks = _best_of_blocks(scores)  # (rows, blocks), read by both ways below: the vocabulary is gone through once
    best = blocks.amax(-1)  # (rows,); a NaN wins over every number, so one check finds it wherever it stands
    fine = best.isfinite().tolist()
    drawn = [number for number, row in enumerate(rows) if fine[number] and not row.sampling.greedy]
    taken = [number for number, row in enumerate(rows) if fine[number] and row.sampling.greedy]
    chosen: list[int | None] = [None] * len(rows)
    for numbers, way in ((taken, _most_likely), (drawn, _drawn)):
        if numbers:
            # Picking rows copies a vocabulary for each, so that is not done where all rows go one way.
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
        where = torch.tensor(places, device=scores.device).unbind(1)  # row and token of each, (penalised,) both
        strengths = torch.tensor([row.sampling.repetition_penalty for row in rows], dtype=torch.float64)
        penalty = strengths.to(scores.device)[where[0]]
        old = scores[where].double()
        # In double precision and back within the range of float32: a tiny penalty makes numbers huge, not infinite.
        new = torch.where(old > 0, old / penalty, old * penalty).clamp(-_WIDEST, _WIDEST)
        scores[where] = torch.where(old.isfinite(), new, old).float()  # the clamp would make a number of -inf
    if barred:
        scores[torch.tensor(barred, device=scores.device).unbind(1)] = -torch.inf
    return scores


def _best_of_blocks(scores: Tensor) -> Tensor:
    """The largest score of every block, (rows, blocks); the last block may be a short one."""
    whole = scores.shape[1] // _BLOCK * _BLOCK
    best = scores[:, :whole].reshape(len(scores), -1, _BLOCK).amax(-1)
    return best if whole == scores.shape[1] else torch.cat([best, scores[:, whole:].amax(-1, keepdim=True)], dim=1)


def _block_sums(chances: Tensor) -> Tensor:
    """The sum of every block of one row, (blocks,), in single precision."""
    whole = len(chances) // _BLOCK * _BLOCK
    sums = chances[:whole].view(-1, _BLOCK).sum(-1)
    return sums if whole == len(chances) else torch.cat([sums, chances[whole:].sum(-1, keepdim=True)])


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
    best = blocks.argmax(-1, keepdim=True)  # (rows, 1): the block, and then 64 tokens of it instead of all
    found: list[int] = _tokens_at(best, _values_of(scores, best).argmax(-1, keepdim=True))[:, 0].tolist()
    return found


def _drawn(scores: Tensor, blocks: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """A token for every row, drawn."""
    draw = _Draw(scores, blocks, rows)
    found, unsure = draw.found()  # the 48 blocks were looked at
    if unsure and scores.is_cpu and draw.add_up(unsure):  # all chances are added up
        found, unsure = draw.found()
    if unsure:  # the nucleus is wider than what was looked at
        for number, token in zip(unsure, draw.exactly(unsure), strict=True):
            found[number] = token
    return found


class _Draw:
    """One step of some rows: their most likely tokens, their chances, and where their random numbers fall.

    Chances are relative to the best token's. `least` and `most` (rows,) are bounds on the sum of all of a row.
    """

    def __init__(self, scores: Tensor, blocks: Tensor, rows: Sequence[RowSampler]) -> None:
        self._scores, self._rows = scores, rows
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
            few = blocks.topk(_FEW, dim=-1, sorted=False).indices  # (rows, 48)
            values = _values_of(scores, few)  # (rows, 48 * 64)
            known = self._roughly(values).sum(-1).double()
            others = self._roughly(blocks).scatter_(1, few, 0.0).sum(-1).double()  # of each other block its best
            # The 48 best tokens of all lie in the 48 blocks with the largest bests: each of any other block has 48
            # bests above it.
            values, where = values.topk(_FEW, dim=-1)
            values, self.tokens = _sorted(values, _tokens_at(few, where))
            # Of the other blocks at least the best token counts, and at most all 64 are as good as it.
            self.least = (known + others) * (1 - _ROUNDING)
            self.most = (known + others * _BLOCK) * (1 + _ROUNDING)
        self._chance = self._chances(values)  # (rows, 48), or (rows, vocabulary) of a small one; falling

    def found(self) -> tuple[list[int], list[int]]:
        """A token for every row, and the numbers of the rows whose nucleus the bounds leave open."""
        # A larger sum of all makes a larger nucleus. Where both ends give the same one, so does the sum itself.
        low, known_low, tokens, _ = self._nuclei(self.least)
        high, known_high, _, _ = self._nuclei(self.most)
        unsure: list[int] = ((low != high) | ~known_low | ~known_high).nonzero()[:, 0].tolist()
        return tokens.tolist(), unsure

    def add_up(self, numbers: list[int]) -> bool:
        """Narrow the bounds of those of some rows whose nucleus may be among the few; whether there are any.

        All chances in single precision, added up in double.
        """
        # The smallest sum makes the smallest nucleus: where that is too wide for the few, no exact sum helps.
        _, possible, _, _ = self._nuclei(self.least)
        able = possible.tolist()
        for number in (number for number in numbers if able[number]):
            row = slice(number, number + 1)
            chances = (self._scores[row] - self._best[row, None].float()).div_(self._heat[row, None].float()).exp_()
            total = _block_sums(chances[0]).sum(dtype=torch.float64)
            self.least[row], self.most[row] = total * (1 - _CLOSE), total * (1 + _CLOSE)
        return any(able[number] for number in numbers)

    def _roughly(self, values: Tensor) -> Tensor:
        """The chances in single precision, which is enough for bounds, (rows, n)."""
        return (values - self._best[:, None].float()).div_(self._heat[:, None].float()).exp_()

    def _chances(self, values: Tensor) -> Tensor:
        """(rows, n)"""
        return ((values.double() - self._best[:, None]) / self._heat[:, None]).exp()

    def _nuclei(self, totals: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """If these are the sums of all chances: `_fallen` among the most likely tokens."""
        settings = self._top_p, self._top_k, self._uniform
        return _fallen(self._chance, self.tokens, totals, *settings, whole=self._whole)

    def exactly(self, numbers: list[int]) -> list[int]:
        """The tokens of some rows, by the sums of all chances."""
        if not self._scores.is_cpu:
            return self._by_sorting(numbers)
        bounded = self._top_k.isfinite().tolist()
        drawn = {number: None if bounded[number] else self._by_trying(number) for number in numbers}
        rest = [number for number, token in drawn.items() if token is None]
        sorted_ = dict(zip(rest, self._by_sorting(rest), strict=True)) if rest else {}
        return [sorted_[number] if token is None else token for number, token in drawn.items()]

    def _by_trying(self, number: int) -> int | None:
        """The token of a row without top_k: drawn among all until one is in the nucleus; None where that takes long."""
        chances = (self._scores[number] - float(self._best[number])).div_(float(self._heat[number])).exp_()
        sums = _block_sums(chances).double().cumsum(0)
        total = float(sums[-1])
        if not 0 < total < float("inf"):
            return None
        # Drawing among all and taking the first that lies in the nucleus is drawing from the nucleus.
        outside = 0.0  # the largest chance that was found to lie outside
        for _ in range(_TRIES):
            goal = float(self._uniform[number]) * total
            # First the block in which the running sum passes the goal, then the token in it.
            block = min(int(torch.searchsorted(sums, goal, right=True)), len(sums) - 1)
            first = block * _BLOCK
            within = chances[first : first + _BLOCK].double().cumsum(0) + (sums[block - 1] if block else 0.0)
            token = min(first + int((within <= goal).sum()), len(chances) - 1)
            if chances[token] >= outside and self._in_nucleus(number, chances, token, total):
                return token
            outside = max(outside, float(chances[token]))
            self._uniform[number] = self._rows[number].uniform()
        return None

    def _in_nucleus(self, number: int, chances: Tensor, token: int, total: float) -> bool:
        """Whether what is more likely than a token (of equals, what stands before it) has less than the share top_p."""
        top_p, chance = float(self._top_p[number]), float(chances[token])
        if top_p >= 1 or chance == 0:
            return chance > 0
        above = float(_block_sums(threshold(chances, chance, 0.0)).sum(dtype=torch.float64))
        above += chance * int((chances[:token] == chance).count_nonzero())
        if abs(above - top_p * total) > _CLOSE * total:
            return above < top_p * total
        # Too close for single precision to tell; rare enough to do all of it again in double.
        exact = ((self._scores[number].double() - self._best[number]) / self._heat[number]).exp()
        above = float(exact[exact > exact[token]].sum())
        above += float(exact[token]) * int((exact[:token] == exact[token]).count_nonzero())
        return above < top_p * float(exact.sum())

    def _by_sorting(self, numbers: list[int]) -> list[int]:
        """The tokens of some rows; where the most likely ones are not enough, everything is sorted."""
        rows = torch.tensor(numbers, device=self._scores.device)
        scores, settings = self._scores[rows], (self._top_p[rows], self._top_k[rows], self._uniform[rows])
        chances = ((scores.double() - self._best[rows, None]) / self._heat[rows, None]).exp()
        totals = chances.sum(-1)
        _, _, found, fell = _fallen(self._chance[rows], self.tokens[rows], totals, *settings, whole=self._whole)
        rest = (~fell).nonzero()[:, 0]
        if len(rest):
            order = scores[rest].argsort(dim=-1, descending=True, stable=True)
            sorted_chances = chances[rest].gather(1, order)
            _, _, drawn, _ = _fallen(sorted_chances, order, totals[rest], *(s[rest] for s in settings), whole=True)
            found[rest] = drawn
        tokens: list[int] = found.tolist()
        return tokens


def _fallen(
    chance: Tensor,
    tokens: Tensor,
    total: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    uniform: Tensor,
    *,
    whole: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every row the number of tokens in its nucleus, whether that is known, the token drawn, and whether that is.

    Without a nucleus (top_p of 1) only the latter may be known; what is not needs more tokens than these.

    With chances 1, 0.5, 0.25, 0.125, ... of a total of 2 and top_p 0.8, what is above the third token has 1.5 < 1.6 and
    what is above the fourth 1.75: the nucleus is the first three. If they are the tokens 7, 2 and 5, they lie in the
    order 2, 5, 7, and a number of 0.3 falls at 0.3 * 1.75 = 0.525, past token 2 (0.5), and so on token 5.

    Args:
        chance: (rows, n) in falling order. tokens: (rows, n) which ones these are.
        total: (rows,) the sum over the whole vocabulary.
        top_p, top_k, uniform: (rows,) settings, infinity for no top_k, and random numbers.
        whole: whether the n are the whole vocabulary.
    """
    count = chance.shape[1]
    ranks = torch.arange(count, device=chance.device)
    chance = chance * (ranks < top_k[:, None])
    sums = chance.cumsum(-1)
    complete = (top_k <= count) | whole  # what lies beyond has no chance, so the sum of these is that of all
    total = torch.where(complete, sums[:, -1], total)
    nucleus = ((sums - chance) < (top_p * total)[:, None]) & (chance > 0)  # at least one, since 0 < top_p * total
    inside = torch.where(top_p < 1, nucleus.sum(-1), top_k.clamp(max=count).long())
    # A nucleus that takes all n may go on behind them. With a top_k over n the total is that of k tokens, unknown here.
    known = complete | ((top_p < 1) & (inside < count) & top_k.isinf())
    drawn = _in_their_own_order(chance * (ranks < inside[:, None]), tokens, uniform, whole=whole)
    # Of what is drawn among all tokens, these may be enough only if the most likely ones come first.
    place = (sums <= (uniform * total)[:, None]).sum(-1)  # how many tokens lie wholly below the draw
    first = tokens.gather(1, place[:, None].clamp(max=count - 1))[:, 0]
    found = known | ((top_p >= 1) & (place < count) & top_k.isinf())
    return inside, known, torch.where(known, drawn, first), found


def _in_their_own_order(chance: Tensor, tokens: Tensor, uniform: Tensor, *, whole: bool) -> Tensor:
    """The tokens (rows,) on which random numbers fall where tokens with a chance (rows, n) lie by their numbers.

    By how likely they are, two tokens whose scores rounding sets one way or the other would change places, and with
    them what is drawn.
    """
    if whole:  # then a token's place is its number
        lying, chance = None, torch.zeros_like(chance).scatter_(1, tokens, chance)
    else:
        order = tokens.argsort(dim=-1)
        lying, chance = tokens.gather(1, order), chance.gather(1, order)
    sums = chance.cumsum(-1)
    place = (sums <= (uniform * sums[:, -1])[:, None]).sum(-1)
    last = (torch.arange(chance.shape[1], device=chance.device) * (chance > 0)).amax(-1)
    place = torch.minimum(place, last)
    return place if lying is None else lying.gather(1, place[:, None])[:, 0]


def _sorted(values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Falling by value; of equal ones the smaller token first, so that the order is the same however it was found."""
    by_token = tokens.argsort(dim=-1)
    values, tokens = values.gather(1, by_token), tokens.gather(1, by_token)
    order = values.argsort(dim=-1, descending=True, stable=True)
    return values.gather(1, order), tokens.gather(1, order)
