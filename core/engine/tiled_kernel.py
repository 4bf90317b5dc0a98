"""The loops of `tiled_factors.py`, written in LLVM's terms for AMX: many tokens are a product's rows as they lie.

    hidden    C (16 tokens, 16 ranks) = x A1 + x A2, tiles of x read where it lies; C is written where hidden lies
    halves    the same times a gate, as two bfloat16 numbers
    y         C (16 tokens, 16 outputs) = h1 B1 + h2 B1 + h1 B2, then y + C, of a bfloat16 y rounded once

Two tiles of tokens meet two tiles of a factor at a time: four sums, and four tiles that are read for them. A factor is
laid out by each thread for its own tokens. Tokens are those of one or more lanes, of as many each, and each lane has
factors of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from llvmlite import ir

from lora_rt.core.native import amx, amx_factors, registers
from lora_rt.core.native.amx import LINE, NBYTES, ROWS, Tiles, room
from lora_rt.core.native.amx_factors import columns_as_tiles, dots, halves, rows_as_tiles, widened
from lora_rt.core.native.machine_code import shared_kernels, taking
from lora_rt.core.native.registers import I16, I64, counting, least

TOKENS = 2 * ROWS
"""Tokens that are multiplied at a time: of fewer in a lane there is none."""
ARGUMENTS = 15

_USED = [__file__, amx.__file__, amx_factors.__file__, registers.__file__]
_SUMS, _READ = (0, 1, 2, 3), (4, 5, 6, 7)  # tiles
_BY_TWO = 128  # tiles of inputs, of which two times as many lie on a thread's stack, in two parts: 512 KiB


def kernels() -> tuple[int, int, int, int]:
    """Where four functions lie: hidden, halves, and y in bfloat16 and in float32; any number of threads may run each.

    They take `ARGUMENTS` int64:

        0, how many parts of tokens threads take
        tiles of 16 ranks, of y of 16 outputs; tiles of 32 inputs, of y of 32 ranks; times `TOKENS` tokens of all lanes
        where the addresses of the first lane's ranks stand, for whole tiles
        bytes between two tokens of x, x; hidden, bytes between two tokens of it
            of y: bytes between two tokens of h, h; y, bytes between the two parts of h
        the gate of whole tiles of ranks, bytes between two tokens of it; of halves alone
        times `TOKENS` tokens of a lane, its tokens, bytes between the addresses of two lanes

    Of halves each token has all ranks rounded and behind these, in the middle, what they lack.
    """
    parts = {
        "hidden": partial(_hidden, halved=False),
        "halves": partial(_hidden, halved=True),
        "added": partial(_added, wide=False),
        "added_wide": partial(_added, wide=True),
    }
    amx.check()
    hidden, halved, added, wide = shared_kernels(
        "tiled_factors", parts, 1, uses=_USED, told="factors", arguments=ARGUMENTS
    )
    return hidden, halved, added, wide


def _by_two(b: Any, count: Any, most: Any) -> list[tuple[int, Any, Any]]:
    """Loops over so many tiles: of two at a time, from where to where, and of those that are left; 0 of two at most."""
    even = least(b, b.and_(count, I64(-2)), most)
    return [(2, I64(0), even), (1, even, count)]


def _lanes(b: Any, given: Sequence[Any], of_lane: Callable[[Any, Any, Callable[[], Any]], None]) -> None:
    """Each lane of a part: the addresses of its ranks, its first token, and a loop over its tokens, some at a time."""
    start, stop, table, units, tokens, of_table = given
    with counting(b, b.sdiv(start, units), b.sdiv(b.add(stop, b.sub(units, I64(1))), units), 1) as lane:
        before = b.mul(lane, units)
        first = b.sub(start, before)
        first = b.select(b.icmp_signed("<", first, I64(0)), I64(0), first)
        last = least(b, b.sub(stop, before), units)
        of_lane(b.add(table, b.mul(lane, of_table)), b.mul(lane, tokens), lambda: counting(b, first, last, 1))


def _hidden(module: Any, halved: bool) -> Any:
    function, b, given = taking(module, f"part_of_hidden_{halved:d}", ARGUMENTS)
    start, stop, ranks, inputs, _, table, of_x, x, y, of_y, gate, of_gate, units, tokens, of_table = given
    r = Tiles(b)
    few = b.icmp_signed("<=", inputs, I64(_BY_TWO))
    size = b.mul(b.mul(inputs, I64(2 * NBYTES)), b.select(few, I64(2), I64(1)))
    gated = room(b, b.add(size, I64(4 * NBYTES)))
    laid_out = b.add(gated, I64(4 * NBYTES))

    def of_lane(places: Any, first_token: Any, blocks: Callable[[], Any]) -> None:
        for many, first, last in _by_two(b, ranks, b.select(few, ranks, I64(0))):
            with counting(b, first, last, many) as rank:
                own = b.add(places, b.mul(rank, I64(8 * ROWS)))
                lost = rows_as_tiles(b, r, own, many, inputs, laid_out)
                with blocks() as block:
                    # The last ones are made twice, with the same bits.
                    token = b.add(first_token, least(b, b.mul(block, I64(TOKENS)), b.sub(tokens, I64(TOKENS))))
                    x_at, y_at = b.add(x, b.mul(token, of_x)), b.add(y, b.mul(token, of_y))
                    _zero(r, many)
                    _summed(b, r, inputs, many, x_at, of_x, laid_out)
                    with b.if_then(lost):
                        _summed(b, r, inputs, many, x_at, of_x, b.add(laid_out, b.mul(inputs, I64(many * NBYTES))))
                    if halved:
                        gates = b.add(gate, b.mul(of_gate, token))
                        _gated_halves(b, r, many, rank, y_at, of_y, gated, gates, of_gate)
                        continue
                    for tile in range(2):
                        to = b.add(b.add(y_at, b.mul(of_y, I64(ROWS * tile))), b.mul(rank, I64(LINE)))
                        for place in range(many):
                            r.store(_SUMS[2 * tile + place], b.add(to, I64(LINE * place)), of_y)

    with r.configured():
        _lanes(b, (start, stop, table, units, tokens, of_table), of_lane)
    b.ret_void()
    return function


def _summed(b: Any, r: Tiles, chunks: Any, many: int, x: Any, of_x: Any, factor: Any) -> None:
    with counting(b, I64(0), chunks, 1) as k:
        at = b.add(factor, b.mul(k, I64(many * NBYTES)))
        dots(b, r, _SUMS, _READ, b.add(x, b.mul(k, I64(LINE))), of_x, at, many)


def _gated_halves(
    b: Any, r: Tiles, many: int, rank: Any, y: Any, of_y: Any, room: Any, gates: Any, of_gate: Any
) -> None:
    """One or two tiles of ranks of thirty-two tokens, times their gates, to where their halves lie."""
    for tile in range(4):
        if tile % 2 < many:
            r.store(_SUMS[tile], b.add(room, I64(NBYTES * tile)))
    half = b.lshr(of_y, I64(1))
    for block in range(2):
        with counting(b, I64(0), I64(ROWS), 1) as row:
            own = b.add(row, I64(ROWS * block))
            at = b.add(room, b.add(I64(2 * NBYTES * block), b.mul(row, I64(LINE))))
            gate_at = b.add(b.add(gates, b.mul(of_gate, own)), b.mul(rank, I64(LINE)))
            found = [
                b.fmul(r.at(b.add(at, I64(NBYTES * n)), r.floats), r.at(b.add(gate_at, I64(LINE * n)), r.floats))
                for n in range(many)
            ]
            one, other = halves(b, r, found[0], found[-1])
            to = b.add(b.add(y, b.mul(of_y, own)), b.mul(rank, I64(LINE // 2)))
            for bits, place in ((one, to), (other, b.add(to, half))):
                r.put(bits if many == 2 else r.picked(bits, bits, range(ROWS)), place)


def _added(module: Any, wide: bool) -> Any:
    function, b, given = taking(module, f"part_of_added_{wide:d}", ARGUMENTS)
    start, stop, outputs, chunks, _, table, of_h, h, y, half, _, _, units, tokens, of_table = given
    r = Tiles(b)
    of_output = (4 if wide else 2) * ROWS  # bytes of a tile's
    of_y = b.mul(outputs, I64(of_output))
    sums = room(b, b.add(b.mul(chunks, I64(4 * NBYTES)), I64(4 * NBYTES)))
    laid_out = b.add(sums, I64(4 * NBYTES))

    def of_lane(places: Any, first_token: Any, blocks: Callable[[], Any]) -> None:
        for many, first, last in _by_two(b, outputs, outputs):
            with counting(b, first, last, many) as output:
                lost = columns_as_tiles(b, r, places, b.mul(output, I64(ROWS)), many, chunks, laid_out)
                with blocks() as block:
                    number = b.mul(block, I64(TOKENS))
                    # The last ones are read once more; what is there already is not added to y again.
                    before = least(b, number, b.sub(tokens, I64(TOKENS)))
                    token = b.add(first_token, before)
                    h_at = b.add(h, b.mul(token, of_h))
                    _zero(r, many)
                    _summed(b, r, chunks, many, h_at, of_h, laid_out)
                    _summed(b, r, chunks, many, b.add(h_at, half), of_h, laid_out)
                    with b.if_then(lost):
                        _summed(b, r, chunks, many, h_at, of_h, b.add(laid_out, b.mul(chunks, I64(many * NBYTES))))
                    for tile in _SUMS:
                        if tile % 2 < many:
                            r.store(tile, b.add(sums, I64(LINE * (tile % 2) + 2 * NBYTES * (tile // 2))), I64(2 * LINE))
                    y_at = b.add(b.add(y, b.mul(token, of_y)), b.mul(output, I64(of_output)))
                    with counting(b, b.sub(number, before), I64(TOKENS), 1) as row:
                        at = b.add(sums, b.mul(row, I64(2 * LINE)))
                        found = [r.at(b.add(at, I64(LINE * place)), r.floats) for place in range(many)]
                        (_add_to if wide else _round_into)(b, r, b.add(y_at, b.mul(row, of_y)), found)

    with r.configured():
        _lanes(b, (start, stop, table, units, tokens, of_table), of_lane)
    b.ret_void()
    return function


def _zero(r: Tiles, many: int) -> None:
    for tile in _SUMS:
        if tile % 2 < many:
            r.zero(tile)


def _round_into(b: Any, r: Tiles, y: Any, found: Sequence[Any]) -> None:
    """y += what was found, of 16 or 32 bfloat16 at an address, rounded once."""
    before = r.at(y, ir.VectorType(I16, ROWS * len(found)))
    total = [b.fadd(one, wide) for one, wide in zip(found, widened(b, r, before), strict=True)]
    bits = r.narrowed(total[0], total[-1])
    r.put(bits if len(found) == 2 else r.picked(bits, bits, range(ROWS)), y)


def _add_to(b: Any, r: Tiles, y: Any, found: Sequence[Any]) -> None:
    """The same, of float32."""
    for place, one in enumerate(found):
        at = b.add(y, I64(LINE * place))
        r.put(b.fadd(one, r.at(at, r.floats)), at)
