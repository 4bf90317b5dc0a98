"""Factors of adapters as AMX's tiles, laid out where they are multiplied, from where their ranks lie in float32.

    A (ranks, in)    a tile is 32 inputs of 16 ranks     x A^T    rank after rank, each (in,)
    B (out, ranks)   a tile is 32 ranks of 16 outputs    h B^T    rank after rank, each (out,)

Nothing is kept for a set of adapters: to lay out a factor takes as long as to multiply it with some twenty tokens. A
float32 number is two bfloat16: rounded, and what it has lost. Most adapters are saved in bfloat16 and lose nothing,
which is seen on the way: what they would be multiplied with is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from lora_rt.core.native.amx import LINE, NBYTES, ROWS, Tiles
from lora_rt.core.native.registers import I32, I64, counting

INPUTS = 32
"""Of a tile: what is summed up."""
_PLACE = 8  # bytes of an address


def rows_as_tiles(b: Any, r: Tiles, places: Any, many: int, chunks: Any, to: Any) -> Any:
    """Lay out so many times sixteen ranks of an A, whose addresses stand at `places`.

    The tiles of chunk k of the inputs begin at `to` + k * many * NBYTES, second parts behind all first ones.

    Returns:
        Whether there is something in the second parts; where there isn't, they are not written.
    """

    def tiles_of(k: Any, part: int, low: list[Any]) -> None:
        for place in range(many):
            read = []
            for row in range(ROWS):
                rank = _address(b, r, places, ROWS * place + row)
                at = b.add(rank, b.mul(k, I64(2 * LINE)))
                read.append(_pairs(b, r, (r.at(at, r.floats), r.at(b.add(at, I64(LINE)), r.floats)), part, low))
            into = b.add(to, b.mul(b.add(b.mul(k, I64(many)), I64(place)), I64(NBYTES)))
            into = into if part == 0 else b.add(into, b.mul(chunks, I64(many * NBYTES)))
            r.put_transposed(read, into)

    return _in_parts(b, r, chunks, tiles_of)


def columns_as_tiles(b: Any, r: Tiles, places: Any, output: Any, many: int, chunks: Any, to: Any) -> Any:
    """Lay out so many times sixteen outputs of a B, from `output` on, in the same order; `chunks` are of its ranks."""
    turned = [place + half for place in range(ROWS) for half in (0, ROWS)]

    def tiles_of(k: Any, part: int, low: list[Any]) -> None:
        into = b.add(to, b.mul(k, I64(many * NBYTES)))
        into = into if part == 0 else b.add(into, b.mul(chunks, I64(many * NBYTES)))
        with counting(b, I64(0), I64(ROWS), 1, low) as pair:
            at = b.add(places, b.mul(b.add(b.mul(k, I64(ROWS)), pair), I64(2 * _PLACE)))
            two = [b.add(_address(b, r, at, rank), b.mul(output, I64(4))) for rank in range(2)]
            for place in range(many):
                own = [r.at(b.add(rank, I64(LINE * place)), r.floats) for rank in two]
                bits = b.bitcast(_pairs(b, r, (own[0], own[1]), part, low), r.narrow)
                r.put(r.picked(bits, bits, turned), b.add(b.add(into, I64(NBYTES * place)), b.mul(pair, I64(LINE))))

    return _in_parts(b, r, chunks, tiles_of)


def dots(b: Any, r: Tiles, sums: Sequence[int], read: Sequence[int], x: Any, of_x: Any, factor: Any, many: int) -> None:
    """Thirty-two rows, `of_x` bytes apart, times one or two tiles that lie one behind the other.

    Args:
        sums: four tiles, two for each sixteen rows. read: four more, each read right before it is needed.
    """
    for block, given in enumerate(read[:2]):
        r.load(given, b.add(x, b.mul(of_x, I64(ROWS * block))), of_x)
        for place, tile in enumerate(read[2 : 2 + many]):
            if block == 0:
                r.load(tile, b.add(factor, I64(NBYTES * place)))
            r.dot(sums[2 * block + place], given, tile)


def halves(b: Any, r: Tiles, low: Any, high: Any) -> tuple[Any, Any]:
    """The bits of two bfloat16 of each of 32 float32, whose sum it is up to 2^-17."""
    one = r.narrowed(low, high)
    rest = [b.fsub(number, wide) for number, wide in zip((low, high), widened(b, r, one), strict=True)]
    return one, r.narrowed(*rest)


def widened(b: Any, r: Tiles, bits: Any) -> list[Any]:
    """Registers of sixteen float32, of the bits of 16 or 32 bfloat16."""
    count: int = bits.type.count
    parts = [r.picked(bits, bits, range(first, first + ROWS)) for first in range(0, count, ROWS)]
    return [b.bitcast(b.shl(b.zext(part, r.integers), r.every(16)), r.floats) for part in parts]


def _in_parts(b: Any, r: Tiles, chunks: Any, tiles_of: Any) -> Any:
    """The first parts, and second ones where the bits that the first ones lack are not all 0."""
    low = [ir.Constant(r.integers, [I32(0)] * ROWS)]
    with counting(b, I64(0), chunks, 1, low) as k:
        tiles_of(k, 0, low)
    lost = r.call("llvm.vector.reduce.or.v16i32", I32, b.and_(low[0], r.every(0xFFFF)))
    some = b.icmp_signed("!=", lost, I32(0))
    with b.if_then(some), counting(b, I64(0), chunks, 1) as k:
        tiles_of(k, 1, [low[0]])
    return some


def _pairs(b: Any, r: Tiles, numbers: tuple[Any, Any], part: int, low: list[Any]) -> Any:
    """One part of 32 float32, as sixteen pairs; the bits of all of them are added to `low`."""
    if part == 0:
        for number in numbers:
            low[0] = b.or_(low[0], b.bitcast(number, r.integers))
    bits = r.narrowed(*numbers) if part == 0 else halves(b, r, *numbers)[1]
    return b.bitcast(bits, r.pairs)


def _address(b: Any, r: Tiles, places: Any, number: int) -> Any:
    return r.at(b.add(places, I64(_PLACE * number)), I64)
