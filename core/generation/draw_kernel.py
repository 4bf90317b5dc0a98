"""How `drawing.py` draws on a CPU from a large vocabulary, compiled: one pass over what torch makes forty of.

    scores    (rows, vocabulary)    float32, none of them NaN
    bests     (rows, blocks)        the largest of each 32

All is done row by row, in single precision where only bounds are needed. What is equally likely has the order of its
tokens' numbers, wherever it stands.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_rt.core.base.compiled import compiled
from lora_rt.core.engine import kernels
from lora_rt.core.engine.kernels import exp
from lora_rt.core.generation import drawing
from lora_rt.core.generation.drawing import BLOCK, FEW, ROUNDING

CLOSE = 2e-5  # more than what chances in single precision lose
UNSEEN = 0.1  # the most share of all chances that blocks which are not looked at may have
_USES = kernels.__file__, drawing.__file__
UNSURE = -1  # in place of a token
_NONE = 1 << 60  # in place of a block or token: it is the first to make room
# Numbers of a row, float64: those of `drawing.Draw`, its best score, and the least that all chances have together.
HEAT, TOP_P, TOP_K, UNIFORM, BEST, LEAST, NUMBERS = range(7)
_NOTHING = np.float32(-87.0)  # e to the power of less is not looked at


@compiled(any_order=True, kept=False)
def _chances(values: Any, best: Any, heat: Any, out: Any) -> Any:
    """The chances of values (n,) in single precision, relative to the best token's, into `out` (n,); their sum."""
    total = np.float32(0)
    for i in range(len(values)):
        power = (values[i] - best) / heat
        chance = exp(power) if power > _NOTHING else np.float32(0)
        out[i] = chance
        total += chance
    return total


@compiled(kept=False)
def _kept(value: Any, number: int, values: Any, numbers: Any, lowest: int) -> int:
    """Puts a value in the place of the lowest one; gives where the lowest one is now: of equals, the last number's."""
    values[lowest], numbers[lowest] = value, number
    lowest = 0
    for n in range(1, FEW):
        if values[n] < values[lowest] or (values[n] == values[lowest] and numbers[n] > numbers[lowest]):
            lowest = n
    return lowest


@compiled(kept=False)
def _likeliest(scores: Any, bests: Any, blocks: Any, values: Any, tokens: Any) -> None:
    """The 48 blocks with the largest bests, in rising order, and the 48 best tokens, in falling order."""
    lowest = 0
    for n in range(FEW):
        values[n], blocks[n] = -np.inf, _NONE
    for n in range(len(bests)):
        if bests[n] > values[lowest] or blocks[lowest] == _NONE:
            lowest = _kept(bests[n], n, values, blocks, lowest)
    blocks.sort()
    lowest = 0
    for n in range(FEW):
        values[n], tokens[n] = -np.inf, _NONE
    for block in blocks:
        start = block * BLOCK
        for token in range(start, min(start + BLOCK, len(scores))):
            if scores[token] > values[lowest] or tokens[lowest] == _NONE:
                lowest = _kept(scores[token], token, values, tokens, lowest)
    for n in range(1, FEW):  # sorted by insertion: fewer than fifty
        value, token, place = values[n], tokens[n], n
        while place and (values[place - 1] < value or (values[place - 1] == value and tokens[place - 1] > token)):
            values[place], tokens[place] = values[place - 1], tokens[place - 1]
            place -= 1
        values[place], tokens[place] = value, token


@compiled(kept=False)
def _nucleus(chances: Any, among: int, share: Any) -> int:
    """How many of the first `among` tokens, the likeliest first, have before them less than this sum of chances."""
    before = 0.0
    for n in range(among):
        if before >= share or chances[n] == 0:
            return n
        before += chances[n]
    return among


@compiled(kept=False)
def _fallen(chances: Any, tokens: Any, count: int, uniform: Any) -> int:
    """Of the first `count` tokens the one on which a number falls where they lie by their own; both are reordered."""
    total = 0.0
    for n in range(count):
        chance, token, place = chances[n], tokens[n], n
        total += chance
        while place and tokens[place - 1] > token:
            chances[place], tokens[place] = chances[place - 1], tokens[place - 1]
            place -= 1
        chances[place], tokens[place] = chance, token
    below, goal, last = 0.0, uniform * total, 0
    for n in range(count):
        below += chances[n]
        if chances[n] > 0:  # where rounding leaves the goal behind all of them, it is the last that has a chance
            last = n
        if below > goal:
            break
    return int(tokens[last])


@compiled(any_order=True, uses=_USES)
def draw(scores: Any, bests: Any, numbers: Any, found: Any) -> None:
    """A token of every row, where its nucleus is among its 48 likeliest tokens, into `found` (rows,); else `UNSURE`.

    `numbers` (rows, 6) is written to: `LEAST`.
    """
    blocks, tokens = np.empty(FEW, np.int64), np.empty(FEW, np.int64)
    values, chances = np.empty(FEW, np.float32), np.empty(FEW, np.float64)
    rough, near = np.empty(bests.shape[1], np.float32), np.empty(BLOCK, np.float32)
    for r in range(len(scores)):
        row = numbers[r]
        best, heat, top_p, top_k = row[BEST], row[HEAT], row[TOP_P], row[TOP_K]
        _likeliest(scores[r], bests[r], blocks, values, tokens)
        _chances(bests[r], np.float32(best), np.float32(heat), rough)
        known = others = 0.0
        for block in blocks:
            start = block * BLOCK
            rough[block] = np.float32(0)
            known += _chances(scores[r, start : start + BLOCK], np.float32(best), np.float32(heat), near)
        for n in range(len(rough)):
            others += rough[n]
        # Of the other blocks at least the best token counts, and at most all 32 are as good as it.
        row[LEAST] = (known + others) * (1 - ROUNDING)
        most = (known + others * BLOCK) * (1 + ROUNDING)
        for n in range(FEW):
            chances[n] = np.exp((np.float64(values[n]) - best) / heat)
        if top_k <= FEW:  # what lies beyond has no chance
            count = int(top_k)
            if top_p < 1:
                total = 0.0
                for n in range(count):
                    total += chances[n]
                count = _nucleus(chances, count, top_p * total)
        else:
            # A larger sum of all makes a larger nucleus. Where both ends give the same one, so does the sum itself.
            count = _nucleus(chances, FEW, top_p * row[LEAST])
            if top_p >= 1 or top_k != np.inf or count == FEW or count != _nucleus(chances, FEW, top_p * most):
                found[r] = UNSURE
                continue
        found[r] = _fallen(chances, tokens, count, row[UNIFORM])


@compiled(any_order=True, uses=_USES)
def look(scores: Any, bests: Any, row: Any, blocks: Any, chances: Any, sums: Any) -> tuple[int, float, float]:
    """What a wide nucleus can be in: how many blocks, the sum of their chances, and the most that all others have.

    scores (vocabulary,), bests (blocks,) and `row` (6,) are of one row. Into `blocks`, `chances` (blocks, 32) and
    `sums` (blocks,), which run on, goes what these are.
    """
    # What is less likely than `floor` has less than the share `UNSEEN` of all, and less than lies outside of the
    # nucleus: no token of a block whose best is below it can be in the nucleus.
    best, heat = np.float32(row[BEST]), np.float32(row[HEAT])
    floor = min((1 - row[TOP_P]) / 2, UNSEEN) * row[LEAST] / len(scores)
    rough = sums[: len(bests)]  # until each is overwritten by the sum of a block before it, or its own
    _chances(bests, best, heat, rough)
    count, total, rest = 0, 0.0, 0.0
    for block in range(len(bests)):
        if rough[block] < floor:
            rest += rough[block]
            continue
        start = block * BLOCK
        width = min(len(scores) - start, BLOCK)
        chances[count, width:] = np.float32(0)
        total += _chances(scores[start : start + width], best, heat, chances[count, :width])
        blocks[count], sums[count] = block, total
        count += 1
    return count, total, rest * BLOCK * (1 + CLOSE)


@compiled(any_order=True, uses=_USES)
def attempt(
    scores: Any, row: Any, blocks: Any, chances: Any, sums: Any, total: Any, rest: Any, uniform: Any, outside: Any
) -> tuple[int, bool, float]:
    """The token on which a random number falls among `look`'s, whether it is in the nucleus, and its chance.

    A token that is less likely than `outside` is not in it.
    """
    goal = uniform * total
    block = 0
    while block < len(sums) - 1 and sums[block] <= goal:
        block += 1
    offset = 0
    below: Any = sums[block - 1] if block else 0.0
    below += chances[block, 0]
    while offset < BLOCK - 1 and below <= goal:
        offset += 1
        below += chances[block, offset]
    token, chance, top_p = blocks[block] * BLOCK + offset, chances[block, offset], row[TOP_P]
    if chance < outside:
        return token, False, chance
    if top_p >= 1 or chance == 0:
        return token, chance > 0, chance
    # What is more likely, and of equals what stands before it, has less than the share top_p.
    own = scores[token]
    above: Any = 0.0
    for n in range(len(blocks)):
        start = blocks[n] * BLOCK
        more: Any = np.float32(0)
        for i in range(min(BLOCK, len(scores) - start)):
            score = scores[start + i]
            more += chances[n, i] if score > own or (score == own and start + i < token) else np.float32(0)
        above += more
    if above < top_p * total * (1 - CLOSE):
        return token, True, chance
    if above > top_p * (total + rest) * (1 + CLOSE):
        return token, False, chance
    # Too close to tell by what was seen: all chances are added up.
    all_of_them = above = 0.0
    for i in range(len(scores)):
        exact = np.exp((np.float64(scores[i]) - row[BEST]) / row[HEAT])
        all_of_them += exact
        if scores[i] > own or (scores[i] == own and i < token):
            above += exact
    return token, above < top_p * all_of_them, chance


def prepare() -> None:
    """Compile all of it now, or load it: what draws from wide nuclei would take seconds later, in any answer."""
    scores, numbers = np.zeros((1, 2 * FEW * BLOCK), np.float32), np.ones((1, NUMBERS))
    bests, blocks, sums = np.zeros((1, 2 * FEW), np.float32), np.empty(2 * FEW, np.int64), np.empty(2 * FEW)
    chances = np.empty((2 * FEW, BLOCK), np.float32)
    draw(scores, bests, numbers, np.empty(1, np.int64))
    count, total, rest = look(scores[0], bests[0], numbers[0], blocks, chances, sums)
    attempt(scores[0], numbers[0], blocks[:count], chances[:count], sums[:count], total, rest, 0.5, 0.0)
