"""The loops of `tiled_layout.py`, compiled for the processor at hand.

Both take addresses where float32 ranks begin, how many lie there one behind the other, how wide a rank is, and the
tiles as 32 bits for two bfloat16 side by side, (n / 16, parts, k / 32, 16, 16). With room for one part they take the
upper halves of the numbers, and say whether some lower half was not 0: then it takes two, the number rounded and what
it lacks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_rt.core.native import bfloat16, in_c
from lora_rt.core.native.bfloat16 import narrowed, widened
from lora_rt.core.native.compiled import compiled
from lora_rt.core.native.in_c import floats_at, words_at

_USED = [bfloat16.__file__, in_c.__file__]
_LOW, _HIGH, _HALF = np.uint32(0xFFFF), np.uint32(0xFFFF0000), np.uint32(16)
_NARROW = np.zeros(1, np.uint16)


@compiled(kept=False)
def _pair(first: Any, second: Any) -> Any:
    """Two numbers rounded to bfloat16, side by side."""
    return np.uint32(narrowed(first, _NARROW)) | np.uint32(narrowed(second, _NARROW)) << _HALF


@compiled(kept=False)
def _rest(number: Any) -> Any:
    """What a number rounded to bfloat16 lacks."""
    return number - widened(narrowed(number, _NARROW))


@compiled(kept=False)
def _each(starts: Any, counts: Any, width: int) -> Any:
    """Where each rank begins; of an odd number of them the last address is 0."""
    ranks = counts.sum()
    places, n = np.zeros((ranks + 1) // 2 * 2, np.int64), 0
    for part in range(len(starts)):
        for rank in range(counts[part]):
            places[n] = starts[part] + 4 * rank * width
            n += 1
    return places


@compiled(uses=_USED)
def rows_into(starts: Any, counts: Any, width: int, tiles: Any) -> bool:
    """Ranks one below the other: of a number at n, k, n is its rank."""
    low, places = np.uint32(0), _each(starts, counts, width)
    for n in range(counts.sum()):
        into, row, bits = tiles[n // 16], floats_at(places[n], width), words_at(places[n], width)
        for k in range(width // 32):
            for pair in range(16):
                at = 32 * k + 2 * pair
                if into.shape[0] == 1:
                    first, second = bits[at], bits[at + 1]
                    low |= (first | second) & _LOW
                    into[0, k, pair, n % 16] = first >> _HALF | second & _HIGH
                else:
                    into[0, k, pair, n % 16] = _pair(row[at], row[at + 1])
                    into[1, k, pair, n % 16] = _pair(_rest(row[at]), _rest(row[at + 1]))
    return bool(low != 0)


@compiled(uses=_USED)
def columns_into(starts: Any, counts: Any, width: int, tiles: Any) -> bool:
    """Ranks side by side: of a number at n, k, k is its rank."""
    low, places, nothing = np.uint32(0), _each(starts, counts, width), np.zeros(width, np.float32)
    for pair in range(len(places) // 2):
        if places[2 * pair + 1] == 0:
            places[2 * pair + 1] = nothing.ctypes.data
        one, two = floats_at(places[2 * pair], width), floats_at(places[2 * pair + 1], width)
        bits, others = words_at(places[2 * pair], width), words_at(places[2 * pair + 1], width)
        k = pair // 16
        for n in range(width // 16):
            into = tiles[n, 0, k, pair % 16]
            at = 16 * n
            if tiles.shape[1] == 1:
                for o in range(16):
                    first, second = bits[at + o], others[at + o]
                    low |= (first | second) & _LOW
                    into[o] = first >> _HALF | second & _HIGH
            else:
                lacks = tiles[n, 1, k, pair % 16]
                for o in range(16):
                    into[o] = _pair(one[at + o], two[at + o])
                    lacks[o] = _pair(_rest(one[at + o]), _rest(two[at + o]))
    return bool(low != 0)
