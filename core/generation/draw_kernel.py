"""How `drawing.py` draws on a CPU from a large vocabulary, compiled: one pass over what torch makes forty of.

    scores    (rows, vocabulary)    float32, none of them NaN
    bests     (rows, blocks)        the largest of each 32

All is done row by row, by a team of threads, in single precision where only bounds are needed. What is equally likely
has the order of its tokens' numbers, wherever it stands.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray

from lora_rt.core.forward import kernels
from lora_rt.core.forward.kernels import exp
from lora_rt.core.generation import drawing
from lora_rt.core.generation.drawing import BLOCK, FEW, ROUNDING
from lora_rt.core.native import in_c, openmp
from lora_rt.core.native.compiled import callback, compiled
from lora_rt.core.native.in_c import ask, doubles_at, floats_at, integers_at

CLOSE = 2e-5  # more than what chances in single precision lose
UNSEEN = 0.1  # the most share of all chances that blocks which are not looked at may have
_USES = kernels.__file__, drawing.__file__, in_c.__file__
UNSURE, MISSED = -1, -2  # in place of a token
RUN = 64  # blocks whose chances are worked out by one loop: of more, single precision would lose too much
# Numbers of a row, float64: those of `drawing.Draw`, its best score, the least that all chances have together, whether
# it is known that its nucleus is wide, and the largest chance that was found outside of that.
HEAT, TOP_P, TOP_K, UNIFORM, BEST, LEAST, TRIED, OUTSIDE, NUMBERS = range(9)
# What the function is given, int64: how many rows, of what, and where all of it lies.
ROWS, VOCABULARY, BLOCKS, SCORES, BESTS, NUMBERS_AT, WANTED, FOUND, NUMBER, TEAM, GIVEN = range(11)
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
def _kept(value: Any, number: int, values: Any, numbers: Any, count: int) -> int:
    """Puts a value behind all that are as large, of which there are `count`, at most 48; how many there are now."""
    place = min(count, FEW - 1)
    if count == FEW and value <= values[place]:
        return count
    while place and values[place - 1] < value:
        values[place], numbers[place] = values[place - 1], numbers[place - 1]
        place -= 1
    values[place], numbers[place] = value, number
    return min(count + 1, FEW)


@compiled(kept=False)
def _likeliest(scores: Any, bests: Any, blocks: Any, values: Any, tokens: Any) -> None:
    """The 48 blocks with the largest bests, in rising order, and the 48 best tokens, in falling order."""
    count = 0
    for n in range(len(bests)):
        if count < FEW or bests[n] > values[FEW - 1]:
            count = _kept(bests[n], n, values, blocks, count)
    blocks.sort()
    count = 0
    for block in blocks:
        start = block * BLOCK
        for token in range(start, min(start + BLOCK, len(scores))):
            if count < FEW or scores[token] > values[FEW - 1]:
                count = _kept(scores[token], token, values, tokens, count)


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


@compiled(any_order=True, kept=False)
def _among_few(
    row: Any, scores: Any, bests: Any, blocks: Any, tokens: Any, values: Any, chances: Any, rough: Any, near: Any
) -> int:
    """The token of a row whose nucleus is among its 48 likeliest tokens; else `UNSURE`. Writes `LEAST`."""
    best, heat, top_p, top_k = row[BEST], row[HEAT], row[TOP_P], row[TOP_K]
    row[LEAST] = _chances(bests, np.float32(best), np.float32(heat), rough) * (1 - ROUNDING)
    if top_k == np.inf and (top_p >= 1 or top_p * row[LEAST] > FEW):  # none of the 48 is likelier than the best
        return UNSURE
    _likeliest(scores, bests, blocks, values, tokens)
    known = others = 0.0
    for block in blocks:
        start = block * BLOCK
        rough[block] = np.float32(0)
        known += _chances(scores[start : start + BLOCK], np.float32(best), np.float32(heat), near)
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
            return UNSURE
    return int(_fallen(chances, tokens, count, row[UNIFORM]))


@compiled(any_order=True, kept=False)
def _look(
    scores: Any, bests: Any, row: Any, blocks: Any, chances: Any, sums: Any, ends: Any
) -> tuple[int, int, float, float]:
    """What a wide nucleus can be in: how many blocks and runs of them, the sum of their chances, and the others' most.

    scores (vocabulary,), bests (blocks,) and `row` are of one row. Into `blocks` and `chances` (blocks, 32) goes what
    these are, into `sums` the chances up to the end of every run of neighbours, and into `ends` how many blocks those
    are: each run is one loop, and many short ones would take twice as long.
    """
    # What is less likely than `floor` has less than the share `UNSEEN` of all, and less than lies outside of the
    # nucleus: no token of a block whose best is below it can be in the nucleus.
    best, heat = np.float32(row[BEST]), np.float32(row[HEAT])
    floor = min((1 - row[TOP_P]) / 2, UNSEEN) * row[LEAST] / len(scores)
    rough = sums[: len(bests)]  # before it is what it is for
    _chances(bests, best, heat, rough)
    count, rest = 0, 0.0
    for block in range(len(bests)):
        if rough[block] < floor:
            rest += rough[block]
        else:
            blocks[count] = block
            count += 1
    runs, done, total, flat = 0, 0, 0.0, chances.reshape(-1)
    while done < count:
        end = done + 1
        while end < min(count, done + RUN) and blocks[end] == blocks[end - 1] + 1:
            end += 1
        values = scores[blocks[done] * BLOCK : (blocks[end - 1] + 1) * BLOCK]
        out = flat[done * BLOCK : end * BLOCK]
        out[len(values) :] = np.float32(0)  # of what the last block of all may lack
        total += _chances(values, best, heat, out)
        sums[runs], ends[runs] = total, end
        runs, done = runs + 1, end
    return count, runs, total, rest * BLOCK * (1 + CLOSE)


@compiled(any_order=True, kept=False)
def _above(scores: Any, bests: Any, blocks: Any, chances: Any, token: int) -> float:
    """The sum of the chances before a token: of what is more likely, and of equals what stands before it."""
    own, mine = scores[token], token // BLOCK
    above: Any = 0.0
    for n in range(len(blocks)):
        block = blocks[n]
        if bests[block] < own:
            continue
        start = block * BLOCK
        more: Any = np.float32(0)
        if block == mine or start + BLOCK > len(scores):
            for i in range(min(BLOCK, len(scores) - start)):
                score = scores[start + i]
                more += chances[n, i] if score > own or (score == own and start + i < token) else np.float32(0)
        elif block < mine:
            for i in range(BLOCK):
                more += chances[n, i] if scores[start + i] >= own else np.float32(0)
        else:
            for i in range(BLOCK):
                more += chances[n, i] if scores[start + i] > own else np.float32(0)
        above += more
    return float(above)


@compiled(any_order=True, kept=False)
def _attempt(
    scores: Any, bests: Any, row: Any, blocks: Any, chances: Any, sums: Any, ends: Any, rest: Any
) -> tuple[int, bool, float]:
    """The token on which the row's number falls among `_look`'s, whether it is in the nucleus, and its chance."""
    total, top_p, flat = sums[-1], row[TOP_P], chances.reshape(-1)
    goal = row[UNIFORM] * total
    run = 0
    while run < len(sums) - 1 and sums[run] <= goal:
        run += 1
    place, last = (ends[run - 1] if run else 0) * BLOCK, ends[run] * BLOCK - 1
    below: Any = sums[run - 1] if run else 0.0
    below += flat[place]
    while place < last and below <= goal:
        place += 1
        below += flat[place]
    token, chance = blocks[place // BLOCK] * BLOCK + place % BLOCK, flat[place]
    if chance < row[OUTSIDE]:
        return token, False, chance
    if top_p >= 1 or chance == 0:
        return token, chance > 0, chance
    above = _above(scores, bests, blocks, chances, token)
    if above < top_p * total * (1 - CLOSE):
        return token, True, chance
    if above > top_p * (total + rest) * (1 + CLOSE):
        return token, False, chance
    # Too close to tell by what was seen: all chances are added up.
    own, all_of_them, above = scores[token], 0.0, 0.0
    for i in range(len(scores)):
        exact = np.exp((np.float64(scores[i]) - row[BEST]) / row[HEAT])
        all_of_them += exact
        if scores[i] > own or (scores[i] == own and i < token):
            above += exact
    return token, above < top_p * all_of_them, chance


@compiled(any_order=True, kept=False)
def _among_many(row: Any, scores: Any, bests: Any, blocks: Any, chances: Any, sums: Any, ends: Any) -> int:
    """The token of a row whose nucleus is wide; `MISSED` where its number falls outside of that. Writes `OUTSIDE`."""
    count, runs, total, rest = _look(scores, bests, row, blocks, chances, sums, ends)
    if not 0 < total < np.inf:
        return UNSURE
    token, inside, chance = _attempt(
        scores, bests, row, blocks[:count], chances[:count], sums[:runs], ends[:runs], rest
    )
    if inside:
        return int(token)
    row[OUTSIDE] = max(row[OUTSIDE], chance)
    return MISSED


@compiled(any_order=True, kept=False)
def _all(d: Any) -> None:
    """A thread's rows."""
    vocabulary, blocks = d[VOCABULARY], d[BLOCKS]
    me, us = (ask(d[NUMBER]), ask(d[TEAM])) if d[TEAM] else (0, 1)
    few, tokens, ends = np.empty(FEW, np.int64), np.empty(FEW, np.int64), np.empty(blocks, np.int64)
    values, chances = np.empty(FEW, np.float32), np.empty(FEW, np.float64)
    rough, near, sums = np.empty(blocks, np.float32), np.empty(BLOCK, np.float32), np.empty(blocks, np.float64)
    seen, of_seen = np.empty(blocks, np.int64), np.empty((blocks, BLOCK), np.float32)
    wanted, found = integers_at(d[WANTED], d[ROWS]), integers_at(d[FOUND], d[ROWS])
    for n in range(me, d[ROWS], us):
        r = wanted[n]
        row = doubles_at(d[NUMBERS_AT] + 8 * NUMBERS * r, NUMBERS)
        scores, bests = (
            floats_at(d[SCORES] + 4 * vocabulary * r, vocabulary),
            floats_at(d[BESTS] + 4 * blocks * r, blocks),
        )
        token = UNSURE
        if row[TRIED] == 0:
            row[BEST] = bests.max()
            token = _among_few(row, scores, bests, few, tokens, values, chances, rough, near)
        if token == UNSURE and row[TOP_K] == np.inf:
            row[TRIED] = 1
            token = _among_many(row, scores, bests, seen, of_seen, sums, ends)
        found[n] = token


def draw(scores: Any, bests: Any, numbers: Any, wanted: Any) -> Any:
    """The tokens of some rows; `UNSURE` where a row has a wide nucleus beside a `top_k`, or no chances.

    A row has `MISSED` where its number falls on what is not in its nucleus: give it another one, and draw again.

    Args:
        scores, bests: float32, rows one after the other.
        numbers: (rows, `NUMBERS`) float64, which is written to.
        wanted: (n,) int64: numbers of rows.

    Returns:
        (n,) int64
    """
    found = np.empty(len(wanted), np.int64)
    team = openmp.team()
    threads = min(torch.get_num_threads(), len(wanted)) if team else 1
    shared = (0, 0) if team is None or threads == 1 else (team.number, team.size)
    arrays = (array.ctypes.data for array in (scores, bests, numbers, wanted, found))
    d = np.array([len(wanted), scores.shape[1], bests.shape[1], *arrays, *shared], np.int64)
    openmp.run(team, _address(), d.ctypes.data, threads)
    return found


@cache
def _address() -> int:
    @callback("void(voidptr)", uses=_USES)
    def drawn(arguments: Any) -> None:
        _all(carray(arguments, GIVEN, np.int64))

    _made.append(drawn)
    return int(drawn.address)


_made: list[Any] = []  # stays in memory until the process ends


def prepare() -> None:
    """Compile it now, or load it."""
    _address()
