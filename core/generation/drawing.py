"""How a token is drawn, for all rows at once.

A row draws one uniform number u and takes the token at which the sum of chances, over the nucleus by the tokens'
numbers, passes u times that of all of it. The nucleus is looked for among its few most likely tokens:

    scores    (rows, vocabulary)     seen as blocks of 32 tokens
    bests     (rows, blocks)         the largest score of each
    few       (rows, 48 * 32)        the tokens of the 48 blocks with the largest ones; the 48 best are among them

Where the nucleus ends depends on the sum of all chances. For what is not among the few it lies between the chances of
their blocks' best and 32 times these, and mostly both ends give the same nucleus. Where they do not, or it has more
tokens, everything is sorted.

So it is done here, by some forty operations of torch. On a CPU `draw_kernel.py` does the same at once, and does not
sort for a nucleus without top_k: the row draws among the tokens of all blocks that may have a part in it, in their own
order, until one is drawn that lies in it, which is told by the sum of what is more likely.
On one machine the way that a row goes depends on its scores alone, and not on what it draws or stands beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32  # numbers of smaller ones torch reduces without the processor's vectors
FEW = 48  # tokens that are looked at first
ROUNDING = 1e-4  # more than what single precision loses in a sum of chances
SMALL = 3072  # tokens of a vocabulary that is looked at whole


class Draw(NamedTuple):
    """By what a row draws: `top_k` is infinite for none, `uniform` a random number from 0 to below 1."""

    heat: float
    top_p: float
    top_k: float
    uniform: float


def values_of(scores: Tensor, blocks: Tensor) -> Tensor:
    """The scores of the tokens of some blocks (rows, n), (rows, 32 n); -inf for what a short block lacks."""
    if scores.shape[1] % BLOCK == 0:
        rows = torch.arange(len(scores), device=scores.device)[:, None]
        return scores.view(len(scores), -1, BLOCK)[rows, blocks].flatten(1)
    tokens = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=scores.device)).flatten(1)
    last = scores.shape[1] - 1
    return scores.gather(1, tokens.clamp(max=last)).masked_fill_(tokens > last, -torch.inf)


def tokens_at(blocks: Tensor, places: Tensor) -> Tensor:
    """Which tokens stand at places (rows, m) of what `values_of` gives for these blocks."""
    return blocks.gather(1, places // BLOCK) * BLOCK + places % BLOCK


class Drawing:
    """One step of some rows: their most likely tokens, their chances, and where their random numbers fall.

    Chances are relative to the best token's. `least` and `most` (rows,) are bounds on the sum of all of a row.
    """

    def __init__(self, scores: Tensor, bests: Tensor, settings: Sequence[Draw]) -> None:
        self._scores = scores
        self._best = bests.amax(-1).double()
        columns = torch.tensor(settings, dtype=torch.float64).to(scores.device)  # one copy: each is waited for
        self._heat, self._top_p, self._top_k, self._uniform = columns.unbind(1)
        self._ends = (self._top_p < 1) | self._top_k.isfinite()  # whether it is not drawn among all tokens
        self._whole = scores.shape[1] <= SMALL  # nothing is missing
        if self._whole:
            values, self.tokens = scores.sort(dim=-1, descending=True, stable=True)
            self.least = self.most = self._best  # the sum that is known counts instead
        else:
            few = bests.topk(FEW, dim=-1, sorted=False).indices  # (rows, 48)
            values = values_of(scores, few)  # (rows, 48 * 32)
            known = self._roughly(values).sum(-1).double()
            others = self._roughly(bests).scatter(1, few, 0.0).sum(-1).double()  # of each other block its best
            # The 48 best tokens of all lie in the 48 blocks with the largest bests: each of any other block has 48
            # bests above it.
            values, where = values.topk(FEW, dim=-1)
            values, self.tokens = _sorted(values, tokens_at(few, where))
            # Of the other blocks at least the best token counts, and at most all 32 are as good as it.
            self.least = (known + others) * (1 - ROUNDING)
            self.most = (known + others * BLOCK) * (1 + ROUNDING)
        self._values = values
        self._chance = self._chances(values)  # (rows, 48), or (rows, vocabulary) of a small one; falling

    def found(self) -> tuple[list[int], list[int]]:
        """A token for every row, and the numbers of the rows whose nucleus the bounds leave open."""
        # A larger sum of all makes a larger nucleus. Where both ends give the same one, so does the sum itself.
        low, known_low, tokens = self._nuclei(self.least)
        high, known_high, _ = self._nuclei(self.most)
        is_open = (low != high) | ~known_low | ~known_high | self._tied(low, slice(None))
        unsure: list[int] = is_open.nonzero()[:, 0].tolist()
        return tokens.tolist(), unsure

    def _tied(self, inside: Tensor, rows: Tensor | slice) -> Tensor:
        """Whether what was not looked at may be as likely as the last token of a nucleus of so many, (rows,)."""
        values = self._values[rows]
        last = values.gather(1, (inside - 1).clamp(min=0)[:, None])[:, 0]
        return (last == values[:, -1]) & (not self._whole)

    def _roughly(self, values: Tensor) -> Tensor:
        """The chances in single precision, which is enough for bounds, (rows, n)."""
        return (values - self._best[:, None].float()).div_(self._heat[:, None].float()).exp_()

    def _chances(self, values: Tensor) -> Tensor:
        """(rows, n)"""
        return ((values.double() - self._best[:, None]) / self._heat[:, None]).exp()

    def _nuclei(self, totals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """If these are the sums of all chances: `_fallen` among the most likely tokens."""
        settings = self._top_p, self._top_k, self._uniform
        return _fallen(self._chance, self.tokens, totals, *settings, whole=self._whole)

    def exactly(self, numbers: list[int]) -> list[int]:
        """The tokens of some rows, by the sums of all chances; where the 48 are not enough, everything is sorted."""
        rows = torch.tensor(numbers, device=self._scores.device)
        scores, settings = self._scores[rows], (self._top_p[rows], self._top_k[rows], self._uniform[rows])
        chances = ((scores.double() - self._best[rows, None]) / self._heat[rows, None]).exp()
        totals = chances.sum(-1)
        inside, known, drawn = _fallen(self._chance[rows], self.tokens[rows], totals, *settings, whole=self._whole)
        ends, known = self._ends[rows], known & ~self._tied(inside, rows)
        found = torch.where(ends & known, drawn, _fallen_on(chances, settings[-1]))
        rest = (ends & ~known).nonzero()[:, 0]
        if len(rest):
            order = scores[rest].argsort(dim=-1, descending=True, stable=True)
            sorted_chances = chances[rest].gather(1, order)
            _, _, found[rest] = _fallen(sorted_chances, order, totals[rest], *(s[rest] for s in settings), whole=True)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row the number of tokens in its nucleus, whether that is known, and the token drawn from it.

    It needs more tokens than these where it is not known.

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
    return inside, known, drawn


def _in_their_own_order(chance: Tensor, tokens: Tensor, uniform: Tensor, *, whole: bool) -> Tensor:
    """The tokens (rows,) on which random numbers fall where tokens with a chance (rows, n) lie by their numbers.

    By how likely they are, two tokens whose scores rounding sets one way or the other would change places, and with
    them what is drawn.
    """
    if whole:  # then a token's place is its number
        return _fallen_on(torch.zeros_like(chance).scatter_(1, tokens, chance), uniform)
    order = tokens.argsort(dim=-1)
    place = _fallen_on(chance.gather(1, order), uniform)
    return tokens.gather(1, order).gather(1, place[:, None])[:, 0]


def _fallen_on(chance: Tensor, uniform: Tensor) -> Tensor:
    """On which of the chances (rows, n), in the order in which they lie, random numbers fall; on none that is 0."""
    sums = chance.cumsum(-1)
    place = (sums <= (uniform * sums[:, -1])[:, None]).sum(-1)
    last = (torch.arange(chance.shape[1], device=chance.device) * (chance > 0)).amax(-1)
    return torch.minimum(place, last)


def _sorted(values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Falling by value; of equal ones the smaller token first, so that the order is the same however it was found."""
    by_token = tokens.argsort(dim=-1)
    values, tokens = values.gather(1, by_token), tokens.gather(1, by_token)
    order = values.argsort(dim=-1, descending=True, stable=True)
    return values.gather(1, order), tokens.gather(1, order)
