"""What a decoding step on a CPU does between its matrix products, compiled for the processor that it runs on.

transformers makes a step of some sixty small operations a block, each of which takes ten to twenty microseconds however
few its numbers are: of a base of 135 million parameters that is more than all products take.

Arrays have the dtype of the model: float32, or uint16, which holds the bits of bfloat16. Where transformers rounds to
bfloat16, these round too, half to even; sums are made in float32, in an order of their own.

    n rows of one token     H features      D features of a head     columns of keys and values

The functions are compiled when they are first called, in some seconds, and kept in the home for the next process. Those
of one row or head are built into these and into `whole_kernel.py`'s; they write in place or elsewhere, never either: a
loop of which that is not known while it is compiled is not vectorized.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_rt.core.forward import tiles
from lora_rt.core.forward.tiles import AT_ONCE, LANES, scores_of, weighed_by_four, weighed_by_one
from lora_rt.core.multiply import four_bit
from lora_rt.core.native import bfloat16, registers
from lora_rt.core.native.bfloat16 import narrowed, rounded, widened
from lora_rt.core.native.compiled import compiled

USED = [tiles.__file__, registers.__file__, bfloat16.__file__, four_bit.__file__]
"""Files that decide what is built into these functions; the last one how wide a register is."""

_LOW, _HIGH, _LOG2E = map(np.float32, (registers.EXP_LOW, registers.EXP_HIGH, registers.LOG2E))
_LN2_A, _LN2_B = map(np.float32, registers.LN2)
_C0, _C1, _C2, _C3, _C4, _C5 = map(np.float32, registers.EXP_SERIES)


@compiled(kept=False)
def exp(x: Any) -> Any:
    """e^x of a float32 to 5e-7 of it, in a form that a loop over many is vectorized in; NaN stays NaN.

    Cephes' polynomial. Below e^-87 and above e^88 it is those.
    """
    low = x if x > _LOW else _LOW
    inside = low if low < _HIGH else _HIGH
    count = np.floor(inside * _LOG2E + np.float32(0.5))
    rest = inside - count * _LN2_A - count * _LN2_B
    series = ((((_C0 * rest + _C1) * rest + _C2) * rest + _C3) * rest + _C4) * rest + _C5
    power = np.int32((np.int32(count) + np.int32(127)) << np.int32(23)).view(np.float32)
    found = (series * rest * rest + rest + np.float32(1)) * power
    return found if x == x else x


@compiled(any_order=True, kept=False)
def norm_row(x: Any, weight: Any, eps: Any, out: Any, like: Any) -> None:
    """RMSNorm of x (H,), rounded to the model's dtype."""
    squares = np.float32(0)
    for i in range(len(x)):
        squares += widened(x[i]) * widened(x[i])
    scale = np.float32(1) / np.sqrt(squares / np.float32(len(x)) + np.float32(eps))
    for i in range(len(x)):
        out[i] = narrowed(rounded(rounded(widened(x[i]) * scale, like) * widened(weight[i]), like), out)


@compiled(any_order=True, kept=False)
def norm_head(x: Any, weight: Any, eps: Any, like: Any) -> None:
    """RMSNorm of one head (D,), in place, its numbers rounded first."""
    squares = np.float32(0)
    for i in range(len(x)):
        x[i] = narrowed(rounded(widened(x[i]), like), x)
        squares += widened(x[i]) * widened(x[i])
    scale = np.float32(1) / np.sqrt(squares / np.float32(len(x)) + np.float32(eps))
    for i in range(len(x)):
        x[i] = narrowed(rounded(rounded(widened(x[i]) * scale, like) * widened(weight[i]), like), x)


@compiled(any_order=True, kept=False)
def turn_head(x: Any, cos: Any, sin: Any, like: Any) -> None:
    """The rope of one head (D,), in place, rounded to the model's dtype."""
    half = len(x) // 2
    for i in range(half):
        a, b = rounded(widened(x[i]), like), rounded(widened(x[half + i]), like)
        first = rounded(a * widened(cos[i]), like) + rounded(-b * widened(sin[i]), like)
        second = rounded(b * widened(cos[half + i]), like) + rounded(a * widened(sin[half + i]), like)
        x[i], x[half + i] = narrowed(rounded(first, like), x), narrowed(rounded(second, like), x)


@compiled(any_order=True, kept=False)
def silu_row(gate: Any, up: Any, like: Any) -> None:
    """gate = silu(gate) * up, (F,), rounded to the model's dtype; `gate` is float32."""
    for i in range(len(gate)):
        a, b = rounded(gate[i], like), rounded(widened(up[i]), like)
        gate[i] = rounded(rounded(a / (np.float32(1) + exp(-a)), like) * b, like)


@compiled(any_order=True, uses=USED)
def rms_norm(x: Any, weight: Any, eps: Any, out: Any, wide: Any) -> None:
    """RMSNorm of x (n, 1, H): `out` in the model's dtype, `wide` the same numbers in float32."""
    for r in range(len(x)):
        _norm_of(x[r, 0], weight, eps, out[r, 0], wide[r, 0])


@compiled(any_order=True, uses=USED)
def add_norm(x: Any, y: Any, weight: Any, eps: Any, out: Any, wide: Any) -> None:
    """x += y, (n, 1, H), then the RMSNorm of x."""
    for r in range(len(x)):
        for i in range(x.shape[2]):
            x[r, 0, i] = narrowed(widened(x[r, 0, i]) + rounded(widened(y[r, 0, i]), x), x)
        _norm_of(x[r, 0], weight, eps, out[r, 0], wide[r, 0])


@compiled(any_order=True, kept=False)
def _norm_of(x: Any, weight: Any, eps: Any, out: Any, wide: Any) -> None:
    norm_row(x, weight, eps, wide, x)
    for i in range(len(x)):
        out[i] = narrowed(wide[i], x)


@compiled(any_order=True, uses=USED)
def head_norm(q: Any, weight: Any, eps: Any, like: Any) -> None:
    """RMSNorm of every head of q (n, 1, heads * D), in place; `like` has the model's dtype."""
    size = len(weight)
    for r in range(len(q)):
        for start in range(0, q.shape[2], size):
            norm_head(q[r, 0, start : start + size], weight, eps, like)


@compiled(any_order=True, uses=USED)
def rotate(q: Any, cos: Any, sin: Any, out: Any) -> None:
    """The rope of q (n, 1, heads * D) by factors (n or 1, 1, D): `out` (n, heads, 1, D) in the model's dtype."""
    rows, heads, _, size = out.shape
    for r in range(rows):
        c, s = cos[min(r, cos.shape[0] - 1), 0], sin[min(r, cos.shape[0] - 1), 0]
        for head in range(heads):
            turned = out[r, head, 0]
            for i in range(size):
                turned[i] = narrowed(widened(q[r, 0, head * size + i]), out)
            turn_head(turned, c, s, out)


@compiled(kept=False)
def room_of(columns: int) -> int:
    """For how many scores and places there is room: for as many as are looked at at a time beyond all columns."""
    return (columns + AT_ONCE) // 2 * 2


@compiled(kept=False)
def seen_places(seen: Any, places: Any) -> int:
    """How many columns a row looks at, of `seen` (columns,); which ones these are goes into `places`, with `room_of`.

    As several are looked at at a time, the last one stands there some more times. Who sees nothing looks at the last.
    """
    count, columns = 0, len(seen)
    for t in range(columns):
        if seen[t]:
            places[count] = t
            count += 1
    if count == 0:
        places[0], count = columns - 1, 1
    for extra in range(AT_ONCE - 1):
        places[count + extra] = places[count - 1]
    return count


@compiled(any_order=True, kept=False)
def attend_head(
    query: Any,
    keys: Any,
    of_keys: int,
    values: Any,
    of_values: int,
    places: Any,
    count: int,
    scaling: Any,
    scores: Any,
    answer: Any,
    like: Any,
) -> None:
    """Attention of a query (D,) over the columns at `places`; `answer` (D,), float32, is rounded to the model's dtype.

    `keys` and `values` are flat, from those of the head's first column on, with columns so far apart. `scores` is room.
    """
    size = len(query)
    item = like.itemsize
    at = places.ctypes.data
    if size % LANES:
        top = _looked(query, keys, of_keys, places, count, scaling, scores)
    else:
        top = np.float32(-np.inf)
        for n in range(0, count, AT_ONCE):
            some = scores.ctypes.data + 4 * n
            looked = query.ctypes.data, keys.ctypes.data, item * of_keys, at + 8 * n
            top = max(top, scores_of(*looked, scaling, some, size // LANES, like))
    whole = np.float32(0)
    for n in range(count):
        scores[n] = exp(scores[n] - top)
        whole += scores[n]
    if size % LANES:
        _added_up(scores, values, of_values, places, count, answer)
    else:
        i = 0
        while i < size:
            given = scores.ctypes.data, values.ctypes.data + item * i, item * of_values, at, answer.ctypes.data + 4 * i
            if size - i >= 4 * LANES:
                weighed_by_four(*given, count, like)
                i += 4 * LANES
            else:
                weighed_by_one(*given, count, like)
                i += LANES
    for i in range(size):
        answer[i] = rounded(answer[i] / whole, like)


@compiled(any_order=True, kept=False)
def _looked(query: Any, keys: Any, of_keys: int, places: Any, count: int, scaling: Any, scores: Any) -> Any:
    """The scores of heads of any size, and the largest."""
    top = np.float32(-np.inf)
    for n in range(count):
        key, total = keys[places[n] * of_keys :], np.float32(0)
        for i in range(len(query)):
            total += query[i] * widened(key[i])
        scores[n] = total * scaling
        top = max(top, scores[n])
    return top


@compiled(any_order=True, kept=False)
def _added_up(scores: Any, values: Any, of_values: int, places: Any, count: int, answer: Any) -> None:
    """The sum of the columns of heads of any size, each times its score."""
    for i in range(len(answer)):
        answer[i] = np.float32(0)
    for n in range(count):
        value = values[places[n] * of_values :]
        for i in range(len(answer)):
            answer[i] += scores[n] * widened(value[i])


@compiled(any_order=True, uses=USED)
def attend(q: Any, keys: Any, values: Any, steps: Any, seen: Any, scale: Any, out: Any, wide: Any) -> None:
    """Attention of q (n, heads, 1, D) over what each row sees, `seen` (n, columns); out (n, 1, heads * D).

    `keys` and `values` are flat. `steps` is how many heads they have, and how far apart rows, heads and columns lie, of
    keys and then of values.
    """
    rows, heads, _, size = q.shape
    columns = seen.shape[1]
    group = heads // steps[0]
    room = room_of(columns)
    scores, places = np.empty(room, np.float32), np.empty(room, np.int64)
    query = np.empty(size, np.float32)
    for r in range(rows):
        count = seen_places(seen[r], places)
        for head in range(heads):
            for i in range(size):
                query[i] = widened(q[r, head, 0, i])
            own_keys = keys[r * steps[1] + head // group * steps[2] :]
            own_values = values[r * steps[4] + head // group * steps[5] :]
            answer = wide[r, 0, head * size : (head + 1) * size]
            attend_head(
                query,
                own_keys,
                steps[3],
                own_values,
                steps[6],
                places,
                count,
                np.float32(scale),
                scores,
                answer,
                out,
            )
            for i in range(size):
                out[r, 0, head * size + i] = narrowed(answer[i], out)


@compiled(any_order=True, uses=USED)
def silu_gated(gate: Any, up: Any, out: Any, wide: Any) -> None:
    """silu(gate) * up, (n, 1, F)."""
    for r in range(len(gate)):
        for i in range(gate.shape[2]):
            wide[r, 0, i] = widened(gate[r, 0, i])
        silu_row(wide[r, 0], up[r, 0], out)
        for i in range(gate.shape[2]):
            out[r, 0, i] = narrowed(wide[r, 0, i], out)


@compiled(any_order=True)
def gated_ranks(x: Any, a: Any, gate: Any, hidden: Any) -> None:
    """hidden (n, 1, R) = gate * (A x) of a float32 x (n, 1, in), a (R, in) and a gate (n or 1, 1, R)."""
    rows, _, width = x.shape
    ranks = a.shape[0]
    for r in range(rows):
        g = gate[min(r, gate.shape[0] - 1), 0]
        for q in range(ranks):
            hidden[r, 0, q] = np.float32(0)
        for i in range(width):
            number = x[r, 0, i]
            for q in range(ranks):
                hidden[r, 0, q] += number * a[q, i]
        for q in range(ranks):
            hidden[r, 0, q] *= g[q]


@compiled(any_order=True)
def add_ranks(y: Any, hidden: Any, start: int, b: Any) -> None:
    """y += B hidden, in place, of a float32 y (n, 1, out), b (out, ranks) and its ranks of hidden, from `start` on."""
    rows, _, width = y.shape
    ranks = b.shape[1]
    acting = np.empty(ranks + 3, np.int64)
    for r in range(rows):
        count = 0
        for q in range(ranks):
            if hidden[r, 0, start + q] != 0:  # of a row's own adapters; NaN is not 0
                acting[count] = q
                count += 1
        n = 0
        while n + 4 <= count:
            i, j, k, m = acting[n], acting[n + 1], acting[n + 2], acting[n + 3]
            of_i, of_j = hidden[r, 0, start + i], hidden[r, 0, start + j]
            of_k, of_m = hidden[r, 0, start + k], hidden[r, 0, start + m]
            for o in range(width):
                y[r, 0, o] += of_i * b[o, i] + of_j * b[o, j] + of_k * b[o, k] + of_m * b[o, m]
            n += 4
        while n < count:
            q = acting[n]
            number = hidden[r, 0, start + q]
            for o in range(width):
                y[r, 0, o] += number * b[o, q]
            n += 1


def prepare() -> None:
    """Compile now what adapters need in a step, or load it: A lies rank by rank or feature by feature."""
    x, hidden, gate = np.ones((1, 1, 2), np.float32), np.zeros((1, 1, 2), np.float32), np.ones((1, 1, 2), np.float32)
    for order in ("C", "F"):
        factor = np.ones((2, 2), np.float32, order=order)
        gated_ranks(x, factor, gate, hidden)
    add_ranks(x, hidden, 0, factor)
