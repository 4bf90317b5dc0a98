"""Products of many rows by AMX, written in LLVM's terms: rows of x are a tile's rows as they lie.

    C (16 rows, 16 outputs) += x (16 rows, 32 inputs) . W (16 pairs of inputs, 16 outputs, 2)

Some outputs of a weight at a time are laid out as tiles read them, in a thread's own caches, and met by all rows, two
tiles of rows and two of outputs at once: four sums for four tiles that are read. A weight in 4 bits is looked up there,
in a register of its levels times the scale of a block: that takes as long as to multiply some twenty rows, and nothing
dense is kept. What adapters add are more inputs of the same sums, whose factors are laid out there as well, and a bias
is where these begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from lora_rt.core.multiply import amx_kernel
from lora_rt.core.multiply.amx_kernel import looked_up_row
from lora_rt.core.multiply.four_bit_kernel import LEVELS
from lora_rt.core.native import amx, amx_factors
from lora_rt.core.native.amx import LINE, NBYTES, ROWS, Tiles
from lora_rt.core.native.amx_factors import columns_as_tiles, dots
from lora_rt.core.native.machine_code import shared_kernels, taking
from lora_rt.core.native.registers import I1, I64, counting, least

OUTPUTS = 2 * ROWS
"""Outputs that are laid out at a time; fewer are not."""
LEAST = 2 * ROWS
"""Rows that are multiplied at a time; fewer are not."""
ARGUMENTS = 16

_INPUTS = 32  # of a tile
_BLOCK = 64
_SUMS, _READ = (0, 1, 2, 3), (4, 5, 6, 7)  # tiles
_USED = [*amx_kernel.USED, amx_factors.__file__, __file__]


def many_kernel(in_four_bits: bool, wide: bool) -> int:
    """Where a function lies that makes products of a bfloat16 x; any number of threads may run it.

    It takes `ARGUMENTS` int64:

        0, how many parts of the outputs threads take; rows, in, out; the weight: codes and scales, or bfloat16 and 0
        x, y, the bias in float32 or 0
        rows of a lane, of which each has factors of its own
        of what adapters add, 0 for nothing: tiles of 32 ranks, hidden (rows, 2, ranks) in bfloat16, bytes between two
        rows of it and between its two parts, the addresses of the ranks of B (lanes, 32 times that) in float32

    y is rounded once to bfloat16, or float32. Inputs are whole 32, of 4 bits whole blocks of 64; rows of a lane are
    `LEAST` or more and outputs `OUTPUTS`. The last ones of either may be made twice, with the same bits. Each output of
    a part takes two bytes of a thread's stack for each input, and four for each rank.

    Args:
        in_four_bits: the weight is, and otherwise in bfloat16.
        wide: y is float32.
    """
    amx.check()
    levels = LEVELS if in_four_bits else None
    parts, told = {"run": partial(_part, levels=levels, wide=wide)}, f"many {levels} {wide}"
    return shared_kernels("many", parts, OUTPUTS, uses=_USED, told=told, arguments=ARGUMENTS)[0]


def _part(module: Any, levels: Sequence[float] | None, wide: bool) -> Any:
    function, b, given = taking(module, "part", ARGUMENTS)
    r = Tiles(b)
    start, stop, rows, width, out, weight, scales, x, y, bias, of_lane, ranks, hidden, of_hidden, half, table = given
    tiles = b.sdiv(width, I64(_INPUTS))
    of_panel = b.mul(tiles, I64(2 * NBYTES))
    of_factor = b.mul(ranks, I64(4 * NBYTES))  # two parts
    panels = b.sdiv(b.add(b.sub(stop, start), I64(OUTPUTS - 1)), I64(OUTPUTS))
    of_both = b.add(of_panel, of_factor)
    room = amx.room(b, b.add(b.mul(of_both, panels), I64(4 * NBYTES)))
    two_parts = b.alloca(I1, panels)
    laid_out = b.add(room, I64(4 * NBYTES))
    factors = b.add(laid_out, b.mul(of_panel, panels))
    item = 4 if wide else 2  # bytes of a number of y
    of_x, of_y = b.mul(width, I64(2)), b.mul(out, I64(item))

    def begins(panel: Any) -> tuple[Any, Any, Any]:
        """The first output of a panel, where it is laid out, and where what is added to it."""
        output = least(b, b.add(start, b.mul(panel, I64(OUTPUTS))), b.sub(out, I64(OUTPUTS)))
        return output, b.add(laid_out, b.mul(panel, of_panel)), b.add(factors, b.mul(panel, of_factor))

    def lay_out() -> None:
        with counting(b, I64(0), panels, 1) as panel:
            output, to, _ = begins(panel)
            for place in range(2):
                first, at = b.add(output, I64(ROWS * place)), b.add(to, I64(NBYTES * place))
                if levels is None:
                    _copied(b, r, b.add(weight, b.mul(first, of_x)), of_x, tiles, at)
                else:
                    _looked_up(b, r, levels, weight, scales, first, width, at, room)

    def add(row: Any, panel: Any, factor: Any) -> None:
        """h1 B1 + h2 B1, and h1 B2 where bfloat16 does not hold B."""
        own = b.add(hidden, b.mul(row, of_hidden))
        with counting(b, I64(0), ranks, 1) as k:
            first, one = b.add(own, b.mul(k, I64(LINE))), b.add(factor, b.mul(k, I64(2 * NBYTES)))
            dots(b, r, _SUMS, _READ, first, of_hidden, one, 2)
            dots(b, r, _SUMS, _READ, b.add(first, half), of_hidden, one, 2)
            with b.if_then(b.load(b.gep(two_parts, [panel]))):
                two = b.add(one, b.mul(ranks, I64(2 * NBYTES)))
                dots(b, r, _SUMS, _READ, first, of_hidden, two, 2)

    with r.configured():
        lay_out()
        with counting(b, I64(0), b.sdiv(rows, of_lane), 1) as lane:
            places = b.add(table, b.mul(lane, b.mul(ranks, I64(8 * _INPUTS))))
            with counting(b, I64(0), b.select(b.icmp_signed(">", ranks, I64(0)), panels, I64(0)), 1) as panel:
                output, _, factor = begins(panel)
                some = columns_as_tiles(b, r, places, output, 2, ranks, factor)
                b.store(some, b.gep(two_parts, [panel]))
            with counting(b, I64(0), of_lane, LEAST) as number, counting(b, I64(0), panels, 1) as panel:
                row = b.add(b.mul(lane, of_lane), least(b, number, b.sub(of_lane, I64(LEAST))))
                output, panel_at, factor = begins(panel)
                _begun(b, r, bias, output)
                with counting(b, I64(0), tiles, 1) as k:
                    x_at = b.add(b.add(x, b.mul(row, of_x)), b.mul(k, I64(LINE)))
                    dots(b, r, _SUMS, _READ, x_at, of_x, b.add(panel_at, b.mul(k, I64(2 * NBYTES))), 2)
                add(row, panel, factor)
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
            r.put_transposed(read, b.add(to, b.mul(b.add(b.mul(block, I64(2)), I64(half)), I64(2 * NBYTES))))


def _copied(b: Any, r: Tiles, weight: Any, of_output: Any, tiles: Any, to: Any) -> None:
    """The same of a weight in bfloat16."""
    with counting(b, I64(0), tiles, 1) as tile:
        at = b.add(weight, b.mul(tile, I64(LINE)))
        read = [r.at(b.add(at, b.mul(of_output, I64(row))), r.pairs) for row in range(ROWS)]
        r.put_transposed(read, b.add(to, b.mul(tile, I64(2 * NBYTES))))


def _begun(b: Any, r: Tiles, bias: Any, output: Any) -> None:
    """The sums of all rows begin with the bias, where there is one."""
    for tile in _SUMS:
        r.zero(tile)
    with b.if_then(b.icmp_signed("!=", bias, I64(0))):
        for tile in _SUMS:
            at = b.add(bias, b.mul(b.add(output, I64(ROWS * (tile % 2))), I64(4)))
            r.load(tile, at, I64(0))  # sixteen times the same row


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
