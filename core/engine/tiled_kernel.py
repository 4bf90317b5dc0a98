"""The loops of `tiled_factors.py`, written in LLVM's terms for AMX: many tokens are a product's rows as they lie.

    hidden    C (16 tokens, 16 ranks) = x A1 + x A2, tiles of x read where it lies; C is written where hidden lies
    halves    the same times a gate, as two bfloat16 numbers
    y         C (16 tokens, 16 outputs) = h1 B1 + h2 B1 + h1 B2, then y + C, of a bfloat16 y rounded once

Two tiles of tokens meet two tiles of a factor at a time: four sums, and four tiles that are read for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from lora_rt.core.native import amx, registers
from lora_rt.core.native.amx import LINE, NBYTES, ROWS, Tiles
from lora_rt.core.native.machine_code import addresses_of, shared_by_threads, taking
from lora_rt.core.native.registers import I8, I16, I64, counting, least

TOKENS = 2 * ROWS
"""Tokens of a part: fewer are read for so many."""
OF_HALVES = 12
"""Arguments of `halves`."""

_USED = [__file__, amx.__file__, registers.__file__]
_SUMS, _GIVEN, _FACTOR = (0, 1, 2, 3), (4, 5), (6, 7)  # tiles
_INPUTS = 32  # of a tile


def kernels(parts: int) -> tuple[int, int, int, int]:
    """Where four functions lie, for factors in so many parts; any number of threads may run each.

    They take nine int64: 0, how many parts of tokens threads take, and
        hidden: tiles of ranks, tiles of inputs, tokens; the factor's tiles, bytes between two tokens of x, x, hidden.
        halves, which takes three more: the same; the gate of whole tiles of ranks, bytes between two tokens of it and
        between those of hidden, of which each has all ranks rounded and behind these, in the middle, what they lack.
        y, of bfloat16 and of float32: tiles of outputs, ranks, tokens; the factor's tiles, bytes between two tokens of
        hidden, hidden, y.
    x and hidden have at least `TOKENS` tokens; hidden has tiles of ranks, whole ones, where it is written.
    """

    def build() -> Any:
        module = ir.Module("tiled_factors")
        shared_by_threads(module, _hidden(module, parts), TOKENS, names[0])
        for name, wide in zip(names[1:3], (False, True), strict=True):
            shared_by_threads(module, _added(module, parts, wide), TOKENS, name)
        shared_by_threads(module, _hidden(module, parts, halved=True), TOKENS, names[3], arguments=OF_HALVES)
        return module

    amx.check()
    names = "hidden", "added", "added_wide", "halves"
    hidden, added, wide, halves = addresses_of(build, *names, uses=_USED, told=f"factors {parts}")
    return hidden, added, wide, halves


def _by_two(b: Any, count: Any) -> list[tuple[int, Any, Any]]:
    """Loops over so many tiles: of two at a time, from where to where, and of the one that may be left."""
    even = b.and_(count, I64(-2))
    return [(2, I64(0), even), (1, even, count)]


def _hidden(module: Any, parts: int, *, halved: bool = False) -> Any:
    function, b, given = taking(module, f"part_of_hidden_{halved:d}", OF_HALVES if halved else 9)
    start, stop, ranks, inputs, tokens, factor, of_x, x, y, *gate = given
    r = Tiles(b)
    room = _room(b, 4 * NBYTES) if halved else None
    of_part = b.mul(inputs, I64(NBYTES))
    of_tile = b.mul(of_part, I64(parts))  # of sixteen ranks
    of_y = gate[2] if halved else b.mul(ranks, I64(LINE))
    with r.configured(), counting(b, start, stop, TOKENS) as number:
        token = least(b, number, b.sub(tokens, I64(TOKENS)))  # the last ones are made twice, with the same bits
        x_at, y_at = b.add(x, b.mul(token, of_x)), b.add(y, b.mul(token, of_y))
        for many, first, last in _by_two(b, ranks):
            with counting(b, first, last, many) as rank:
                _zero(r, many)
                with counting(b, I64(0), inputs, 1) as k:
                    for block, tile in enumerate(_GIVEN):
                        r.load(tile, b.add(b.add(x_at, b.mul(of_x, I64(ROWS * block))), b.mul(k, I64(LINE))), of_x)
                    for part in range(parts):
                        at = b.add(b.add(factor, b.mul(rank, of_tile)), b.mul(of_part, I64(part)))
                        _read(b, r, b.add(at, b.mul(k, I64(NBYTES))), of_tile, many)
                        _multiply(r, many)
                if halved:
                    _gated_halves(b, r, many, token, rank, y_at, room, gate)
                    continue
                for block in range(2):
                    for place in range(many):
                        to = b.add(
                            b.add(y_at, b.mul(of_y, I64(ROWS * block))), b.mul(b.add(rank, I64(place)), I64(LINE))
                        )
                        r.store(_SUMS[2 * block + place], to, of_y)
    b.ret_void()
    return function


def _room(b: Any, size: int) -> Any:
    """So many bytes of the stack, from the beginning of a line on."""
    at = b.ptrtoint(b.alloca(I8, I64(size + LINE)), I64)
    return b.and_(b.add(at, I64(LINE - 1)), I64(-LINE))


def _gated_halves(b: Any, r: Tiles, many: int, token: Any, rank: Any, y: Any, room: Any, gate: Sequence[Any]) -> None:
    """One or two tiles of ranks of thirty-two tokens, times their gates, to where their halves lie."""
    gates, of_gate, of_y = gate
    for tile in range(4):
        if tile % 2 < many:
            r.store(_SUMS[tile], b.add(room, I64(NBYTES * tile)))
    half = b.lshr(of_y, I64(1))
    for block in range(2):
        with counting(b, I64(0), I64(ROWS), 1) as row:
            own = b.add(row, I64(ROWS * block))
            at = b.add(room, b.add(I64(2 * NBYTES * block), b.mul(row, I64(LINE))))
            gate_at = b.add(b.add(gates, b.mul(of_gate, b.add(token, own))), b.mul(rank, I64(LINE)))
            found = [
                b.fmul(r.at(b.add(at, I64(NBYTES * n)), r.floats), r.at(b.add(gate_at, I64(LINE * n)), r.floats))
                for n in range(many)
            ]
            one, other = _halves(b, r, found[0], found[-1])
            to = b.add(b.add(y, b.mul(of_y, own)), b.mul(rank, I64(LINE // 2)))
            for bits, place in ((one, to), (other, b.add(to, half))):
                r.put(bits if many == 2 else r.picked(bits, bits, range(ROWS)), place)


def _added(module: Any, parts: int, wide: bool) -> Any:
    function, b, given = taking(module, f"part_of_added_{wide:d}")
    start, stop, outputs, ranks, tokens, factor, of_h, h, y = given
    r = Tiles(b)
    chunks = b.sdiv(b.add(ranks, I64(_INPUTS - 1)), I64(_INPUTS))
    of_part = b.mul(chunks, I64(NBYTES))
    of_tile = b.mul(of_part, I64(parts))  # of sixteen outputs
    of_output = (4 if wide else 2) * ROWS  # bytes of a tile's
    of_y = b.mul(outputs, I64(of_output))
    # Of each block of tokens h1 of all ranks, then h2.
    of_block = b.mul(of_part, I64(2))
    at = b.ptrtoint(b.alloca(I8, b.add(b.mul(of_block, I64(2)), I64(5 * NBYTES))), I64)
    sums = b.and_(b.add(at, I64(LINE - 1)), I64(-LINE))
    split = b.add(sums, I64(4 * NBYTES))
    with r.configured(), counting(b, start, stop, TOKENS) as token:
        for block in range(2):
            with counting(b, I64(0), chunks, 1) as chunk, counting(b, I64(0), I64(ROWS), 1) as row:
                own = least(b, b.add(token, b.add(row, I64(ROWS * block))), b.sub(tokens, I64(1)))
                given_at = b.add(b.add(h, b.mul(own, of_h)), b.mul(chunk, I64(4 * _INPUTS)))
                left = b.sub(ranks, b.mul(chunk, I64(_INPUTS)))
                one, other = _halves(
                    b,
                    r,
                    r.at(given_at, r.floats, r.below(left)),
                    r.at(b.add(given_at, I64(LINE)), r.floats, r.below(b.sub(left, I64(ROWS)))),
                )
                to = b.add(b.add(split, b.mul(of_block, I64(block))), b.mul(chunk, I64(NBYTES)))
                to = b.add(to, b.mul(row, I64(LINE)))
                r.put(one, to)
                r.put(other, b.add(to, of_part))
        for many, first, last in _by_two(b, outputs):
            with counting(b, first, last, many) as output:
                _zero(r, many)
                factor_at = b.add(factor, b.mul(output, of_tile))
                with counting(b, I64(0), chunks, 1) as chunk:
                    offset = b.mul(chunk, I64(NBYTES))
                    for part, half in ((0, 0), (0, 1), (1, 0))[: 1 + parts]:
                        for block, tile in enumerate(_GIVEN):
                            half_at = b.add(b.mul(of_block, I64(block)), b.mul(of_part, I64(half)))
                            r.load(tile, b.add(b.add(split, half_at), offset))
                        if not half:
                            part_at = b.add(factor_at, b.mul(of_part, I64(part)))
                            _read(b, r, b.add(part_at, offset), of_tile, many)
                        _multiply(r, many)
                for block in range(2):
                    for place in range(many):
                        r.store(_SUMS[2 * block + place], b.add(sums, I64(NBYTES * place)))
                    first_row = b.add(token, I64(ROWS * block))
                    rows = least(b, I64(ROWS), b.sub(tokens, first_row))
                    y_at = b.add(b.add(y, b.mul(first_row, of_y)), b.mul(output, I64(of_output)))
                    with counting(b, I64(0), rows, 1) as row:
                        found = [
                            r.at(b.add(b.add(sums, I64(NBYTES * place)), b.mul(row, I64(LINE))), r.floats)
                            for place in range(many)
                        ]
                        (_add_to if wide else _round_into)(b, r, b.add(y_at, b.mul(row, of_y)), found)
    b.ret_void()
    return function


def _zero(r: Tiles, many: int) -> None:
    for block in range(2):
        for place in range(many):
            r.zero(_SUMS[2 * block + place])


def _read(b: Any, r: Tiles, at: Any, of_tile: Any, many: int) -> None:
    """One or two tiles of a factor, so far apart."""
    for place in range(many):
        r.load(_FACTOR[place], b.add(at, b.mul(of_tile, I64(place))))


def _multiply(r: Tiles, many: int) -> None:
    for block, tile in enumerate(_GIVEN):
        for place in range(many):
            r.dot(_SUMS[2 * block + place], tile, _FACTOR[place])


def _halves(b: Any, r: Tiles, low: Any, high: Any) -> tuple[Any, Any]:
    """The bits of two bfloat16 of each of 32 float32, whose sum it is up to 2^-17."""
    one = r.narrowed(low, high)
    rest = [b.fsub(number, wide) for number, wide in zip((low, high), _widened(b, r, one), strict=True)]
    return one, r.narrowed(*rest)


def _widened(b: Any, r: Tiles, bits: Any) -> list[Any]:
    """Registers of sixteen float32, of the bits of 16 or 32 bfloat16."""
    count: int = bits.type.count
    halves = [r.picked(bits, bits, range(first, first + ROWS)) for first in range(0, count, ROWS)]
    return [b.bitcast(b.shl(b.zext(half, r.integers), r.every(16)), r.floats) for half in halves]


def _round_into(b: Any, r: Tiles, y: Any, found: Sequence[Any]) -> None:
    """y += what was found, of 16 or 32 bfloat16 at an address, rounded once."""
    before = r.at(y, ir.VectorType(I16, ROWS * len(found)))
    total = [b.fadd(one, wide) for one, wide in zip(found, _widened(b, r, before), strict=True)]
    bits = r.narrowed(total[0], total[-1])
    r.put(bits if len(found) == 2 else r.picked(bits, bits, range(ROWS)), y)


def _add_to(b: Any, r: Tiles, y: Any, found: Sequence[Any]) -> None:
    """The same, of float32."""
    for place, one in enumerate(found):
        at = b.add(y, I64(LINE * place))
        r.put(b.fadd(one, r.at(at, r.floats)), at)
