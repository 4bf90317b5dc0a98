"""Products of many rows by AMX, written in LLVM's terms: rows of x are a tile's rows as they lie.

    C (16 rows, 16 outputs) += x (16 rows, 32 inputs) . W (16 pairs of inputs, 16 outputs, 2)

Some outputs of a weight at a time are laid out as tiles read them, in a thread's own caches, and met by all rows, two
tiles of rows and two of outputs at once: four sums for four tiles that are read. A weight in 4 bits is looked up there,
in a register of its levels times the scale of a block: that takes as long as to multiply some twenty rows, and nothing
dense is kept. What adapters add are more inputs of the same sums (`tiled_factors.py`), and a bias is where these begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from lora_rt.core.multiply import amx_kernel
from lora_rt.core.multiply.amx_kernel import looked_up_row
from lora_rt.core.native import amx
from lora_rt.core.native.amx import LINE, NBYTES, ROWS, Tiles
from lora_rt.core.native.machine_code import addresses_of, shared_by_threads, taking
from lora_rt.core.native.registers import I8, I64, counting, least

OUTPUTS = 2 * ROWS
"""Outputs that are laid out at a time; fewer are not."""
LEAST = 2 * ROWS
"""Rows that are multiplied at a time; fewer are not."""
ARGUMENTS = 16

_INPUTS = 32  # of a tile
_BLOCK = 64
_SUMS, _X, _W = (0, 1, 2, 3), (4, 5), (6, 7)  # tiles
_USED = [*amx_kernel.USED, __file__]


def many_kernel(levels: Sequence[float] | None, wide: bool) -> int:
    """Where a function lies that makes products of a bfloat16 x; any number of threads may run it.

    It takes `ARGUMENTS` int64:

        0, how many parts of the outputs threads take; rows, in, out; the weight: codes and scales, or bfloat16 and 0
        x, y, the bias in float32 or 0
        of what adapters add, 0 for nothing: tiles of 32 ranks, hidden (rows, 2, ranks) in bfloat16, bytes between two
        rows of it and between its two parts, B as tiles (out / 16, parts, ranks / 32, 16, 16, 2), parts of B

    y is rounded once to bfloat16, or float32. Inputs are whole 32, of 4 bits whole blocks of 64; rows are `LEAST` or
    more and outputs `OUTPUTS`, whole 16 where adapters add to them. The last ones of either may be made twice, with the
    same bits. Each output of a part takes two bytes of a thread's stack for each input.

    Args:
        levels: sixteen, of a weight in 4 bits; None for one in bfloat16.
        wide: y is float32.
    """

    def build() -> Any:
        module = ir.Module("many")
        shared_by_threads(module, _part(module, levels, wide), OUTPUTS, arguments=ARGUMENTS)
        return module

    amx.check()
    return addresses_of(build, "run", uses=_USED, told=f"many {levels} {wide}")[0]


def _part(module: Any, levels: Sequence[float] | None, wide: bool) -> Any:
    function, b, given = taking(module, "part", ARGUMENTS)
    r = Tiles(b)
    start, stop, rows, width, out, weight, scales, x, y, bias, *added = given
    tiles = b.sdiv(width, I64(_INPUTS))
    of_panel = b.mul(tiles, I64(2 * NBYTES))
    panels = b.sdiv(b.add(b.sub(stop, start), I64(OUTPUTS - 1)), I64(OUTPUTS))
    at = b.ptrtoint(b.alloca(I8, b.add(b.mul(of_panel, panels), I64(4 * NBYTES + LINE))), I64)
    room = b.and_(b.add(at, I64(LINE - 1)), I64(-LINE))
    laid_out = b.add(room, I64(4 * NBYTES))
    item = 4 if wide else 2  # bytes of a number of y
    of_x, of_y = b.mul(width, I64(2)), b.mul(out, I64(item))

    def begins(panel: Any) -> tuple[Any, Any]:
        """The first output of a panel, and where it is laid out."""
        output = least(b, b.add(start, b.mul(panel, I64(OUTPUTS))), b.sub(out, I64(OUTPUTS)))
        return output, b.add(laid_out, b.mul(panel, of_panel))

    with r.configured():
        with counting(b, I64(0), panels, 1) as panel:
            output, to = begins(panel)
            for place in range(2):
                first, at = b.add(output, I64(ROWS * place)), b.add(to, I64(NBYTES * place))
                if levels is None:
                    _copied(b, r, b.add(weight, b.mul(first, of_x)), of_x, tiles, at)
                else:
                    _looked_up(b, r, levels, weight, scales, first, width, at, room)
        with counting(b, I64(0), rows, LEAST) as number, counting(b, I64(0), panels, 1) as panel:
            row = least(b, number, b.sub(rows, I64(LEAST)))
            output, panel_at = begins(panel)
            _begun(b, r, bias, output)
            with counting(b, I64(0), tiles, 1) as k:
                _dots(
                    b,
                    r,
                    b.add(b.add(x, b.mul(row, of_x)), b.mul(k, I64(LINE))),
                    of_x,
                    b.add(panel_at, b.mul(k, I64(2 * NBYTES))),
                    I64(NBYTES),
                )
            _added(b, r, row, output, *added)
            _written(b, r, b.add(b.add(y, b.mul(output, I64(item))), b.mul(row, of_y)), of_y, room, wide)
    b.ret_void()
    return function


def _looked_up(
    b: Any, r: Tiles, levels: Sequence[float], codes: Any, scales: Any, first: Any, width: Any, to: Any, room: Any
) -> None:
    """Sixteen outputs of a weight in 4 bits as tiles, each two tiles behind the one before."""
    of_codes, of_scales = b.sdiv(width, I64(2)), b.mul(b.sdiv(width, I64(_BLOCK)), I64(4))
    codes, scales = b.add(codes, b.mul(first, of_codes)), b.add(scales, b.mul(first, of_scales))
    with counting(b, I64(0), b.sdiv(width, I64(_BLOCK)), 1) as block:
        for row in range(ROWS):
            at = b.add(codes, b.add(b.mul(block, I64(_BLOCK // 2)), b.mul(of_codes, I64(row))))
            scale = b.add(scales, b.add(b.mul(block, I64(4)), b.mul(of_scales, I64(row))))
            found = looked_up_row(r, levels, at, scale)
            for half, lanes in enumerate((range(16), range(16, 32))):
                natural = r.picked(found[0], found[1], [*lanes, *(lane + 32 for lane in lanes)])
                r.put(natural, b.add(room, I64(NBYTES * half + LINE * row)))
        for half in range(2):
            read = [r.at(b.add(room, I64(NBYTES * half + LINE * row)), r.pairs) for row in range(ROWS)]
            _put_pairs(b, r, read, b.add(to, b.mul(b.add(b.mul(block, I64(2)), I64(half)), I64(2 * NBYTES))))


def _copied(b: Any, r: Tiles, weight: Any, of_output: Any, tiles: Any, to: Any) -> None:
    """The same of a weight in bfloat16."""
    with counting(b, I64(0), tiles, 1) as tile:
        at = b.add(weight, b.mul(tile, I64(LINE)))
        read = [r.at(b.add(at, b.mul(of_output, I64(row))), r.pairs) for row in range(ROWS)]
        _put_pairs(b, r, read, b.add(to, b.mul(tile, I64(2 * NBYTES))))


def _put_pairs(b: Any, r: Tiles, outputs: Sequence[Any], to: Any) -> None:
    """A tile of sixteen outputs, of each of which sixteen pairs of inputs are given."""
    for pair, value in enumerate(r.transposed(outputs)):
        r.put(value, b.add(to, I64(LINE * pair)))


def _begun(b: Any, r: Tiles, bias: Any, output: Any) -> None:
    """The sums of all rows begin with the bias, where there is one."""
    for tile in _SUMS:
        r.zero(tile)
    with b.if_then(b.icmp_signed("!=", bias, I64(0))):
        for tile in _SUMS:
            at = b.add(bias, b.mul(b.add(output, I64(ROWS * (tile % 2))), I64(4)))
            r.load(tile, at, I64(0))  # sixteen times the same row


def _added(
    b: Any, r: Tiles, row: Any, output: Any, ranks: Any, hidden: Any, of_row: Any, of_half: Any, factor: Any, parts: Any
) -> None:
    """What adapters add: h1 B1 + h2 B1, and h1 B2 where B has another part."""
    of_part = b.mul(ranks, I64(NBYTES))
    of_tile = b.mul(of_part, parts)
    own = b.add(hidden, b.mul(row, of_row))
    tile_at = b.add(factor, b.mul(b.sdiv(output, I64(ROWS)), of_tile))
    with counting(b, I64(0), ranks, 1) as k:
        first, one = b.add(own, b.mul(k, I64(LINE))), b.add(tile_at, b.mul(k, I64(NBYTES)))
        _dots(b, r, first, of_row, one, of_tile)
        _dots(b, r, b.add(first, of_half), of_row, one, of_tile)
        with b.if_then(b.icmp_signed(">", parts, I64(1))):
            _dots(b, r, first, of_row, b.add(one, of_part), of_tile)


def _dots(b: Any, r: Tiles, x: Any, of_x: Any, weight: Any, of_weight: Any) -> None:
    """Thirty-two rows and outputs of one tile of inputs; a tile is read right before it is needed."""
    r.load(_X[0], x, of_x)
    r.load(_W[0], weight)
    r.dot(_SUMS[0], _X[0], _W[0])
    r.load(_W[1], b.add(weight, of_weight))
    r.dot(_SUMS[1], _X[0], _W[1])
    r.load(_X[1], b.add(x, b.mul(of_x, I64(ROWS))), of_x)
    r.dot(_SUMS[2], _X[1], _W[0])
    r.dot(_SUMS[3], _X[1], _W[1])


def _written(b: Any, r: Tiles, y: Any, of_y: Any, room: Any, wide: bool) -> None:
    """The sums, rounded or as they are, to where they lie in y."""
    for tile in _SUMS:
        r.store(tile, b.add(room, I64(NBYTES * tile)))
    for block in range(2):
        with counting(b, I64(0), I64(ROWS), 1) as row:
            at = b.add(room, b.add(I64(NBYTES * 2 * block), b.mul(row, I64(LINE))))
            one, other = r.at(at, r.floats), r.at(b.add(at, I64(NBYTES)), r.floats)
            to = b.add(y, b.mul(of_y, b.add(row, I64(ROWS * block))))
            if wide:
                r.put(one, to)
                r.put(other, b.add(to, I64(LINE)))
            else:
                r.put(r.narrowed(one, other), to)
