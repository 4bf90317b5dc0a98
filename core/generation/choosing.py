"""How the next tokens are chosen: for all rows at once, greedy or sampled, by numbers that belong to each row alone.

Where the nucleus of a sampled row is found among its few most likely tokens, the row draws one uniform number u and
takes the token at which the sum of chances, over the nucleus by the tokens' numbers, passes u times that of all of it:

    scores    (rows, vocabulary)     seen as blocks of 32 tokens
    blocks    (rows, blocks)         the largest of each
    few       (rows, 48 * 32)        the tokens of the 48 blocks with the largest ones; the 48 best are among them

Where the nucleus ends depends on the sum of all chances. For what is not among the few it lies between the chances of
their blocks' best and 32 times these, and mostly both ends give the same nucleus. Where they do not, or it has more
tokens, it is not looked for on a CPU: the row draws among the tokens of all blocks that may have a part in it, in their
own order, until one is drawn that lies in it, which is told by the sum of what is more likely. A GPU sorts faster than
it is asked, and draws within the nucleus.
Which of these ways a row goes depends on its scores alone, and not on what it draws or stands beside.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_rt.core.generation.sampling import Sampling

_BLOCK = 32  # numbers of smaller ones torch reduces without the processor's vectors
_FEW = 48  # tokens that are looked at first
_SMALL = 3072  # tokens of a vocabulary that is looked at whole
_TRIES = 64  # after which a small nucleus is looked for by sorting
_ROUNDING = 1e-4  # more than what single precision loses in a sum of chances
_CLOSE = 2e-5  # more than what chances in single precision lose
_UNSEEN = 0.1  # the most share of all chances that blocks which are not looked at may have
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


def _values_of(scores: Tensor, blocks: Tensor) -> Tensor:
    """The scores of the tokens of some blocks (rows, n), (rows, 32 n); -inf for what a short block lacks."""
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
    best = blocks.argmax(-1, keepdim=True)  # (rows, 1): the block, and then 32 tokens of it instead of all
    found: list[int] = _tokens_at(best, _values_of(scores, best).argmax(-1, keepdim=True))[:, 0].tolist()
    return found


def _drawn(scores: Tensor, blocks: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """A token for every row, drawn."""
    draw = _Draw(scores, blocks, rows)
    found, unsure = draw.found()  # the 48 blocks were looked at
    if unsure:  # the nucleus is wider than what was looked at
        for number, token in zip(unsure, draw.exactly(unsure), strict=True):
            found[number] = token
    return found


@dataclass(frozen=True, slots=True)
class _Seen:
    """Some blocks (n,) of a row in their order: chances (n, 32), each one's best (n,) and sum (n,), and `total` of all.

    `rest` is the most that all other blocks have together.
    """

    blocks: Tensor
    chances: Tensor
    bests: Tensor
    sums: Tensor
    total: float
    rest: float


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
        self._whole = many <= _SMALL  # nothing is missing
        if self._whole:
            values, self.tokens = scores.sort(dim=-1, descending=True, stable=True)
            self.least = self.most = self._best  # the sum that is known counts instead
        else:
            few = blocks.topk(_FEW, dim=-1, sorted=False).indices  # (rows, 48)
            values = _values_of(scores, few)  # (rows, 48 * 32)
            known = self._roughly(values).sum(-1).double()
            self._rough = self._roughly(blocks)
            others = self._rough.scatter(1, few, 0.0).sum(-1).double()  # of each other block its best
            # The 48 best tokens of all lie in the 48 blocks with the largest bests: each of any other block has 48
            # bests above it.
            values, where = values.topk(_FEW, dim=-1)
            values, self.tokens = _sorted(values, _tokens_at(few, where))
            # Of the other blocks at least the best token counts, and at most all 32 are as good as it.
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
        """The token of a row without top_k: drawn among many until one is in the nucleus, or None."""
        seen = self._seen(number)
        if not 0 < seen.total < float("inf"):
            return None
        sums = seen.sums.double().cumsum(0)
        all_of_them, uniform = float(sums[-1]), float(self._uniform[number])
        # Drawing among more tokens and taking the first that lies in the nucleus is drawing from the nucleus.
        outside = 0.0  # the largest chance that was found to lie outside
        for _ in range(_TRIES):
            goal = uniform * all_of_them
            # First the block in which the running sum passes the goal, then the token in it.
            block = min(int(torch.searchsorted(sums, goal, right=True)), len(sums) - 1)
            within = seen.chances[block].double().cumsum(0)
            below = goal - (float(sums[block - 1]) if block else 0.0)
            offset = min(int((within <= below).count_nonzero()), _BLOCK - 1)
            chance = float(seen.chances[block, offset])
            if chance >= outside and self._in_nucleus(number, seen, block, offset):
                return int(seen.blocks[block]) * _BLOCK + offset
            outside = max(outside, chance)
            uniform = self._rows[number].uniform()
        return None

    @cached_property
    def _likely(self) -> tuple[Tensor, list[float]]:
        """Which blocks (rows, blocks) may have a part in the nucleus of a row, and the most that its others have.

        What is less likely than `floor` has less than the share `_UNSEEN` of all, and less than lies outside of the
        nucleus: no token of a block whose best is below it can be in the nucleus.
        """
        share = ((1 - self._top_p) / 2).clamp(max=_UNSEEN)
        floor = share * self.least / self._scores.shape[1]
        chosen = self._rough >= floor[:, None].float()
        others = self._rough.masked_fill(chosen, 0.0).sum(-1, dtype=torch.float64)
        return chosen, (others * _BLOCK * (1 + _CLOSE)).tolist()

    def _seen(self, number: int) -> _Seen:
        """The blocks of a row that may have a part in its nucleus, until those of another row are looked at."""
        likely, rests = self._likely
        blocks = likely[number].nonzero()[:, 0]
        chances = self._scratch[0, : len(blocks)]
        torch.index_select(self._rows_of_blocks(number), 0, blocks, out=chances)
        sums = self._row_chances(number, chances).sum(-1)
        bests = self._rough[number].index_select(0, blocks)
        return _Seen(blocks, chances, bests, sums, float(sums.sum(dtype=torch.float64)), rests[number])

    def _rows_of_blocks(self, number: int) -> Tensor:
        """The scores of a row, (blocks, 32)."""
        row = self._scores[number]
        missing = -len(row) % _BLOCK
        return (pad(row, (0, missing), value=-torch.inf) if missing else row).view(-1, _BLOCK)

    @cached_property
    def _scratch(self) -> Tensor:
        """Room for two times the scores of a row, (2, blocks, 32): new memory costs more than what is written to it."""
        return self._scores.new_empty(2, self._rough.shape[1], _BLOCK)

    def _row_chances(self, number: int, values: Tensor) -> Tensor:
        """The chances of some of a row's scores, of any shape, in single precision and in their place."""
        values -= float(self._best[number])
        if (heat := float(self._heat[number])) != 1:
            values /= heat
        return values.exp_()

    def _in_nucleus(self, number: int, seen: _Seen, block: int, offset: int) -> bool:
        """Whether what is more likely than a token (of equals, what stands before it) has less than the share top_p."""
        top_p, chance = float(self._top_p[number]), float(seen.chances[block, offset])
        if top_p >= 1 or chance == 0:
            return chance > 0
        where = (seen.bests >= chance * (1 - _CLOSE)).nonzero()[:, 0]  # blocks that have something as likely
        among = torch.index_select(seen.chances, 0, where, out=self._scratch[1, : len(where)])
        before = int(torch.searchsorted(where, block))
        equals = (among[:before] == chance).count_nonzero() + (seen.chances[block, :offset] == chance).count_nonzero()
        above = float(torch.threshold_(among, chance, 0.0).sum(-1).sum(dtype=torch.float64)) + chance * int(equals)
        if above < top_p * seen.total * (1 - _CLOSE):
            return True
        if above > top_p * (seen.total + seen.rest) * (1 + _CLOSE):
            return False
        # Too close to tell by what was seen: all chances are added up, and if need be in double precision.
        values = self._scratch[1].copy_(self._rows_of_blocks(number))
        total = float(self._row_chances(number, values).sum(-1).sum(dtype=torch.float64))
        if abs(above - top_p * total) > _CLOSE * total:
            return above < top_p * total
        token = int(seen.blocks[block]) * _BLOCK + offset
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
