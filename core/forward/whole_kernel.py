"""A decoding step of a Llama-like decoder over 4-bit weights in one call, by a team of threads: see `whole_step.py`.

Every thread runs `_whole`. Between two barriers it makes a part of what is to be made, which no other one reads before
the second of them:

    norm            rows                            x += what the layers before have made, then RMSNorm
    q, k, v         outputs, and ranks of A x       then B (A x) is added to the thread's own outputs
    keys, values    rows and heads                  into the cache
    attention       rows and heads
    o               outputs, ranks; norm as above
    gate, up        outputs, ranks                  then silu(gate) * up of the thread's own outputs
    down            outputs, ranks

All numbers between products are float32; where the model would round them to bfloat16, they are rounded.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray

from lora_rt.core.forward import kernels
from lora_rt.core.forward.kernels import (
    attend_head,
    norm_head,
    norm_row,
    room_of,
    seen_places,
    silu_row,
    turn_head,
)
from lora_rt.core.forward.tiles import DOTS, LANES, add_narrow_row, add_row, add_some, dots, multiply, narrow_dots
from lora_rt.core.native import in_c
from lora_rt.core.native.bfloat16 import narrowed, rounded, widened
from lora_rt.core.native.compiled import callback, compiled
from lora_rt.core.native.in_c import ask, floats_at, integers_at, numbers_at, pointer, run_with, wait

# What `whole_step.py` writes: numbers and addresses of a step, int64.
ROWS, COLUMNS, BLOCKS, HIDDEN, HEADS, KEYS, SIZE, WIDTH, ROPES = range(9)
BARRIER, NUMBER, TEAM, PART, LAYERS, NUMBERS, CACHE, ADAPTERS = range(9, 17)
X, COS, SIN, SEEN, RANKS, RANKS_WIDTH, KEPT, SCORES, CALLS, OUT = range(17, 27)
INPUT = 27  # of each of the four groups, and the outputs of each of the seven layers
OUTPUT = INPUT + 4
STEP = OUTPUT + 7
FIRST = (0, 3, 4, 6, 7)  # layers of each group: q, k, v; o; gate, up; down

# ... of each block: the weights of its norms, then of each layer codes, scales, bias and the numbers of its features.
NORM_1, NORM_2, NORM_Q, NORM_K = range(4)
LAYER = 4  # the first layer: q, k, v, o, gate, up, down
CODES, SCALES, BIAS, IN, FEATURES, FACTS = range(6)
BLOCK = LAYER + 7 * FACTS
# ... float64: what norms add to a mean square, at the places of their weights; what scores are multiplied by
SCALING, FLOATS = 4, 5
# ... of the cache: keys and values, and how far apart rows, heads and columns lie in each
KEYS_AT, VALUES_AT, OF_KEYS, OF_VALUES, PLACES = 0, 1, 2, 5, 8
# ... of adapters: of the four groups A, its ranks, how far apart ranks and features lie, its gate and that one's rows;
# of the seven sites B, its ranks, the first of these in the group, how far apart they lie. Or, where there are pieces,
# what is `AT` lies so many times, one behind the other: those of a site, or of all sites of a group.
A_AT, A_PIECES, A_RANKS, A_OF_RANKS, A_OF_FEATURES, GATE_AT, GATE_ROWS, GROUP = range(8)
B_AT, B_PIECES, B_RANKS, B_START, B_OF_RANKS, SITE = range(6)
SITES = 4 * GROUP
ADAPTED = SITES + 7 * SITE
# ... of a piece (see `pieces.py`): its row, A and B row after row, its ranks, where these begin in the row's hidden,
# their gates, and whether A and B are in bfloat16
P_ROW, P_A, P_B, P_RANKS, P_START, P_GATE, P_NARROW, PIECE = range(8)

_USED = [kernels.__file__, *kernels.USED, in_c.__file__]

CALL = 16  # int64 apart lie the arguments of two threads' calls
SCORED = 12  # bytes: a score and a place
TOGETHER = 8  # rows to which one B is added


@compiled(kept=False)
def _meet(s: Any) -> None:
    if s[BARRIER]:
        wait(s[BARRIER])


@compiled(kept=False)
def _share(count: int, unit: int, me: int, all_of_us: int) -> tuple[int, int]:
    """From where to where a thread's part of so many things goes, whole units."""
    units = (count + unit - 1) // unit
    return min(units * me // all_of_us * unit, count), min(units * (me + 1) // all_of_us * unit, count)


@compiled(any_order=True, kept=False)
def _norms(s: Any, weight: int, eps: Any, added: int, me: int, us: int, like: Any) -> None:
    """The rows of a thread: x += added, where something is, then its RMSNorm."""
    width = s[HIDDEN]
    for r in range(me, s[ROWS], us):
        x, out = floats_at(s[X] + 4 * r * width, width), floats_at(s[INPUT] + 4 * r * width, width)
        extra = floats_at(added + 4 * r * width, width if added else 0)
        for i in range(len(extra)):
            x[i] = rounded(x[i] + rounded(extra[i], like), like)
        norm_row(x, numbers_at(weight, width, like), eps, out, like)


@compiled(any_order=True, kept=False)
def _layer(s: Any, block: Any, site: int, x: int, y: int, me: int, us: int, like: Any) -> None:
    """A thread's outputs of a layer: W x + bias."""
    at = LAYER + FACTS * site
    features = block[at + FEATURES]
    start, stop = _share(features, 16, me, us)
    if start == stop:
        return
    call = integers_at(s[CALLS] + 8 * CALL * me, 9)
    call[0], call[1], call[2], call[3], call[4] = start, stop, s[ROWS], block[at + IN], features
    call[5], call[6], call[7], call[8] = block[at + CODES], block[at + SCALES], x, y
    run_with(s[PART], s[CALLS] + 8 * CALL * me)
    if block[at + BIAS]:
        bias = numbers_at(block[at + BIAS] + like.itemsize * start, stop - start, like)
        for r in range(s[ROWS]):
            row = floats_at(y + 4 * (r * features + start), stop - start)
            for o in range(stop - start):
                row[o] += widened(bias[o])


@compiled(any_order=True, kept=False)
def _ranks(s: Any, adapted: Any, group: int, x: int, width: int, me: int, us: int) -> None:
    """A thread's rows of gate * (A x), or of fewer rows than threads its ranks."""
    at = GROUP * group
    if adapted[at + A_PIECES]:
        _ranks_of_pieces(s, adapted[at + A_AT], adapted[at + A_PIECES], x, width, me, us)
        return
    ranks, rows = adapted[at + A_RANKS], s[ROWS]
    of_ranks, of_features = adapted[at + A_OF_RANKS], adapted[at + A_OF_FEATURES]
    first, last, start, stop = 0, rows, 0, ranks
    if rows >= us:
        first, last = _share(rows, 1, me, us)
    else:
        start, stop = _share(ranks, 8, me, us)
    count = stop - start
    a = adapted[at + A_AT] + 4 * start * of_ranks
    y = s[RANKS] + 4 * start
    apart = 4 * s[RANKS_WIDTH]  # of two rows of y
    if of_ranks == 1:
        given, into, of_x = x + 4 * first * width, y + first * apart, 4 * width
        multiply(given, of_x, a, 4 * of_features, into, apart, last - first, width, count, 0)
    else:
        for q in range(count):
            for r in range(first, last):
                row = floats_at(a + 4 * q * of_ranks, width)
                floats_at(y + r * apart, count)[q] = _dot(row, floats_at(x + 4 * r * width, width))
    for r in range(first, last):
        gate = floats_at(adapted[at + GATE_AT] + 4 * (ranks * min(r, adapted[at + GATE_ROWS] - 1) + start), count)
        hidden = floats_at(y + r * apart, count)
        for q in range(count):
            hidden[q] *= gate[q]


@compiled(any_order=True, kept=False)
def _dot(row: Any, given: Any) -> Any:
    total = np.float32(0)
    for i in range(len(given)):
        total += row[i] * given[i]
    return total


@compiled(kept=False)
def _ranks_of_pieces(s: Any, pieces: int, count: int, x: int, width: int, me: int, us: int) -> None:
    """A thread's ranks of gate * (A x), of all rows' pieces."""
    ranks, before = 0, 0
    for p in range(count):
        ranks += integers_at(pieces + 8 * PIECE * p, PIECE)[P_RANKS]
    start, stop = _share(ranks, DOTS, me, us)
    parts, rest = width // LANES, width % LANES
    sums_at = s[KEPT] + 8 * s[RANKS_WIDTH] * me
    sums = floats_at(sums_at, DOTS)
    for p in range(count):
        piece = integers_at(pieces + 8 * PIECE * p, PIECE)
        first, last = max(start - before, 0), min(stop - before, piece[P_RANKS])
        before += piece[P_RANKS]
        given = x + 4 * piece[P_ROW] * width
        hidden = floats_at(s[RANKS] + 4 * (piece[P_ROW] * s[RANKS_WIDTH] + piece[P_START]), piece[P_RANKS])
        gate = floats_at(piece[P_GATE], piece[P_RANKS])
        for q in range(first, last, DOTS):
            if piece[P_NARROW]:
                narrow_dots(given, piece[P_A] + 2 * q * width, 2 * width, last - q - 1, parts, rest, sums_at)
            else:
                dots(given, piece[P_A] + 4 * q * width, 4 * width, last - q - 1, parts, rest, sums_at)
            for n in range(min(last - q, DOTS)):
                hidden[q + n] = gate[q + n] * sums[n]


@compiled(kept=False)
def _add_pieces(s: Any, pieces: int, count: int, y: int, features: int, me: int, us: int) -> None:
    """B (gate * (A x)) of all rows' pieces, added to a thread's outputs."""
    start, stop = _share(features, 16, me, us)
    for p in range(count):
        piece = integers_at(pieces + 8 * PIECE * p, PIECE)
        row, ranks = piece[P_ROW], piece[P_RANKS]
        if ranks == 0:
            continue
        hidden, y_at = s[RANKS] + 4 * (row * s[RANKS_WIDTH] + piece[P_START]), y + 4 * (row * features + start)
        if piece[P_NARROW]:
            add_narrow_row(hidden, piece[P_B] + 2 * start, 2 * features, y_at, ranks, stop - start)
        else:
            add_row(hidden, piece[P_B] + 4 * start, 4 * features, y_at, ranks, stop - start)


@compiled(any_order=True, kept=False)
def _add(s: Any, adapted: Any, site: int, y: int, features: int, me: int, us: int) -> None:
    """B (gate * (A x)), added to a thread's outputs."""
    at = SITES + SITE * site
    if not adapted[at + B_AT]:
        return
    if adapted[at + B_PIECES]:
        _add_pieces(s, adapted[at + B_AT], adapted[at + B_PIECES], y, features, me, us)
        return
    ranks, of_ranks = adapted[at + B_RANKS], adapted[at + B_OF_RANKS]
    start, stop = _share(features, 16, me, us)
    apart, b = s[RANKS_WIDTH], adapted[at + B_AT] + 4 * start
    kept_at = s[KEPT] + 8 * s[RANKS_WIDTH] * me
    kept = integers_at(kept_at, ranks)
    for r in range(0, s[ROWS], TOGETHER):
        y_at, hidden_at = y + 4 * (r * features + start), s[RANKS] + 4 * (r * apart + adapted[at + B_START])
        some = min(TOGETHER, s[ROWS] - r)
        count = _used(floats_at(hidden_at, (some - 1) * apart + ranks), apart, some, kept)
        add_some(hidden_at, 4 * apart, b, 4 * of_ranks, y_at, 4 * features, some, count, stop - start, kept_at)


@compiled(kept=False)
def _used(hidden: Any, apart: int, rows: int, kept: Any) -> int:
    """How many ranks do something in one of these rows, and which: those of other rows' adapters are 0. NaN is not."""
    count = 0
    for q in range(len(kept)):
        for r in range(rows):
            if hidden[r * apart + q] != 0:
                kept[count] = q
                count += 1
                break
    return count


@compiled(any_order=True, kept=False)
def _keep(s: Any, block: Any, numbers: Any, cache: Any, me: int, us: int, like: Any) -> None:
    """A thread's rows and heads of keys and values, into the last column of the cache."""
    size, heads, last = s[SIZE], s[KEYS], s[COLUMNS] - 1
    of_item = like.itemsize
    for unit in range(me, s[ROWS] * heads, us):
        r, head = unit // heads, unit % heads
        key, value = floats_at(s[OUTPUT + 1] + 4 * unit * size, size), floats_at(s[OUTPUT + 2] + 4 * unit * size, size)
        if block[NORM_K]:
            norm_head(key, numbers_at(block[NORM_K], size, like), numbers[NORM_K], like)
        turn = min(r, s[ROPES] - 1) * size * 4
        turn_head(key, floats_at(s[COS] + turn, size), floats_at(s[SIN] + turn, size), like)
        for at, first, new in ((cache[KEYS_AT], OF_KEYS, key), (cache[VALUES_AT], OF_VALUES, value)):
            place = at + of_item * (r * cache[first] + head * cache[first + 1] + last * cache[first + 2])
            kept = numbers_at(place, size, like)
            for i in range(size):
                kept[i] = narrowed(new[i], like)


@compiled(any_order=True, kept=False)
def _attend(s: Any, block: Any, numbers: Any, cache: Any, me: int, us: int, like: Any) -> None:
    """A thread's rows and heads of the attention."""
    size, heads, columns = s[SIZE], s[HEADS], s[COLUMNS]
    group = heads // s[KEYS]
    of_item = like.itemsize
    room = room_of(columns)
    scores = floats_at(s[SCORES] + SCORED * room * me, room)
    places = integers_at(s[SCORES] + SCORED * room * me + 4 * room, room)
    row_before, count = -1, 0
    start, stop = _share(s[ROWS] * heads, 1, me, us)
    for unit in range(start, stop):
        r, head = unit // heads, unit % heads
        query = floats_at(s[OUTPUT] + 4 * unit * size, size)
        if block[NORM_Q]:
            norm_head(query, numbers_at(block[NORM_Q], size, like), numbers[NORM_Q], like)
        turn = min(r, s[ROPES] - 1) * size * 4
        turn_head(query, floats_at(s[COS] + turn, size), floats_at(s[SIN] + turn, size), like)
        if r != row_before:
            row_before = r
            count = seen_places(carray(pointer(s[SEEN] + r * columns), columns, np.uint8), places)
        keys = cache[KEYS_AT] + of_item * (r * cache[OF_KEYS] + head // group * cache[OF_KEYS + 1])
        values = cache[VALUES_AT] + of_item * (r * cache[OF_VALUES] + head // group * cache[OF_VALUES + 1])
        of_keys, of_values = cache[OF_KEYS + 2], cache[OF_VALUES + 2]
        attend_head(
            query,
            numbers_at(keys, (columns - 1) * of_keys + size, like),
            of_keys,
            numbers_at(values, (columns - 1) * of_values + size, like),
            of_values,
            places,
            count,
            np.float32(numbers[SCALING]),
            scores,
            floats_at(s[INPUT + 1] + 4 * unit * size, size),
            like,
        )


@compiled(any_order=True, kept=False)
def _gated(s: Any, me: int, us: int, like: Any) -> None:
    """silu(gate) * up of a thread's outputs, in the place of gate."""
    width = s[WIDTH]
    start, stop = _share(width, 16, me, us)
    for r in range(s[ROWS]):
        at = 4 * (r * width + start)
        gate, up = floats_at(s[OUTPUT + 4] + at, stop - start), floats_at(s[OUTPUT + 5] + at, stop - start)
        silu_row(gate, up, like)


@compiled(kept=False)
def _group(s: Any, block: Any, adapted: Any, group: int, me: int, us: int, like: Any) -> None:
    """A thread's outputs of the layers that read one x, with all that adapters add."""
    first, last = FIRST[group], FIRST[group + 1]
    x, width = s[INPUT + group], block[LAYER + FACTS * first + IN]
    for site in range(first, last):
        _layer(s, block, site, x, s[OUTPUT + site], me, us, like)
    if not adapted[GROUP * group + A_AT]:
        return
    _ranks(s, adapted, group, x, width, me, us)
    _meet(s)
    for site in range(first, last):
        _add(s, adapted, site, s[OUTPUT + site], block[LAYER + FACTS * site + FEATURES], me, us)


@compiled(kept=False)
def _whole(s: Any, like: Any) -> None:
    """A thread's part of a step: x (rows, H) is read, `OUT` (rows, H) is written."""
    alone = s[BARRIER] == 0
    me = np.int64(0) if alone else np.int64(ask(s[NUMBER]))
    us = np.int64(1) if alone else np.int64(ask(s[TEAM]))
    added: Any = 0  # where what the layers before have made lies, which x still lacks
    for number in range(s[BLOCKS] + 1):
        block = integers_at(s[LAYERS] + 8 * BLOCK * number, BLOCK)
        numbers = carray(pointer(s[NUMBERS] + 8 * FLOATS * number), FLOATS, np.float64)
        cache = integers_at(s[CACHE] + 8 * PLACES * number, PLACES)
        adapted = integers_at(s[ADAPTERS] + 8 * ADAPTED * number, ADAPTED)
        for group in range(4):  # one loop, so that each function is built into this one once
            if group % 2 == 0:
                which = group // 2
                _norms(s, block[NORM_1 + which], numbers[NORM_1 + which], added, me, us, like)
                _meet(s)
            if number == s[BLOCKS]:
                break  # behind the blocks there is one more norm
            if group == 1:
                _keep(s, block, numbers, cache, me, us, like)
                _meet(s)
                _attend(s, block, numbers, cache, me, us, like)
                _meet(s)
            _group(s, block, adapted, group, me, us, like)
            if group == 2:
                _gated(s, me, us, like)
            _meet(s)
            added = s[OUTPUT + FIRST[group + 1] - 1]
    for r in range(me, s[ROWS], us):
        given = floats_at(s[INPUT] + 4 * r * s[HIDDEN], s[HIDDEN])
        out = numbers_at(s[OUT] + r * s[HIDDEN] * like.itemsize, s[HIDDEN], like)
        for i in range(s[HIDDEN]):
            out[i] = narrowed(given[i], like)


@cache
def step_of(dtype: Any) -> int:
    """The address of a function that takes the step's int64, for a model in bfloat16 (numpy's uint16) or float32.

    It stays in memory until the process ends.
    """
    if dtype == np.uint16:

        @callback("void(voidptr)", uses=_USED)
        def step(arguments: Any) -> None:
            s = carray(arguments, STEP, np.int64)
            _whole(s, carray(arguments, 0, np.uint16))
    else:

        @callback("void(voidptr)", uses=_USED)
        def step(arguments: Any) -> None:
            s = carray(arguments, STEP, np.int64)
            _whole(s, carray(arguments, 0, np.float32))

    _made.append(step)
    return int(step.address)


_made: list[Any] = []
