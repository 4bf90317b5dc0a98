"""Products of a few rows by AMX, written in LLVM's terms: of a 4-bit weight, and of one in bfloat16 where it lies.

    xT      of each 32 inputs a tile (16 pairs, 16 rows, 2): laid out of x once for all outputs of a thread
    C       a tile of 16 outputs and 16 rows of x; a product of 16 outputs and 32 inputs is added to it at once

A weight's rows are a tile's rows as they lie. Of one in 4 bits a block of 64 inputs is looked up in a register of its
levels times its scale, twice 32 at once, and goes to the tiles by way of the nearest cache: as sixteen rows cost what
one costs, that is done once for all of them, and while tiles are multiplied the next ones are looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llvmlite import ir

from lora_rt.core.native import amx, registers
from lora_rt.core.native.amx import LINE, NBYTES, ROWS, Tiles
from lora_rt.core.native.machine_code import internal, shared_kernels, taking
from lora_rt.core.native.registers import F32, I8, I16, I32, I64, counting, least

USED = [__file__, amx.__file__, registers.__file__]
"""Files that decide what is built."""

_BLOCK = 64  # inputs with one scale
_INPUTS = 32  # of a tile
_AT_ONCE = 4, 1  # tiles of outputs that share what is read of x, where a weight is looked up
_STEP = 4  # rows that are looked up between two instructions for tiles
_LEFT, _RIGHT = (4, 5), (6, 7)  # tiles of the weight and of x
_ROOM = 4 * 2 * NBYTES  # bytes: what is looked up of a block for four tiles of outputs


def _laid_out(module: Any, pair_of: Callable[[Any, Tiles, Any, Any], Any]) -> Any:
    """A function (x, of_x, rows, tiles, xt, room): of up to sixteen rows of x so many tiles; rows that lack are 0.

    Args:
        pair_of: builds sixteen pairs of one row of x, which begins at an address, for a tile of that number.
    """
    function, b, (x, of_x, rows, tiles, xt, room) = internal(module, "laid_out", 6)
    r = Tiles(b)
    empty = ir.Constant(r.pairs, [I32(0)] * ROWS)
    for n in range(ROWS):
        r.put(empty, b.add(room, I64(LINE * n)))
    with counting(b, I64(0), tiles, 1) as tile:
        with counting(b, I64(0), rows, 1) as row:
            r.put(pair_of(b, r, b.add(x, b.mul(row, of_x)), tile), b.add(room, b.mul(row, I64(LINE))))
        read = [r.at(b.add(room, I64(LINE * n)), r.pairs) for n in range(ROWS)]
        r.put_transposed(read, b.add(xt, b.mul(tile, I64(NBYTES))))
    b.ret_void()
    return function


def _of_blocks(b: Any, r: Tiles, row: Any, tile: Any) -> Any:
    """Pairs of float32 in the order in which the halves of codes are looked up: 0 to 15 and 32 to 47, or the others."""
    at = b.add(row, b.add(b.mul(b.lshr(tile, I64(1)), I64(4 * _BLOCK)), b.mul(b.and_(tile, I64(1)), I64(LINE))))
    return b.bitcast(r.narrowed(r.at(at, r.floats), r.at(b.add(at, I64(2 * LINE)), r.floats)), r.pairs)


def _as_they_lie(b: Any, r: Tiles, row: Any, tile: Any) -> Any:
    """Pairs of bfloat16."""
    return r.at(b.add(row, b.mul(tile, I64(LINE))), r.pairs)


def _written(b: Any, r: Tiles, y: Any, rows: Any, of_y: Any, room: Any, tiles: Sequence[int], count: Any) -> None:
    """Write tiles, outputs of so many rows one after the other, to y float32, whose rows lie so far apart.

    Args:
        count: outputs of a single tile.
    """
    after = b.add(room, I64(NBYTES))
    mask = r.below(count) if len(tiles) == 1 else None
    for place, tile in enumerate(tiles):
        r.store(tile, room)
        r.put_transposed([r.at(b.add(room, I64(LINE * n)), r.floats) for n in range(ROWS)], after)
        with counting(b, I64(0), rows, 1) as row:
            found = r.at(b.add(after, b.mul(row, I64(LINE))), r.floats)
            r.put(found, b.add(b.add(y, I64(LINE * place)), b.mul(row, of_y)), mask)


def looked_up_row(r: Tiles, levels: Sequence[float], codes: Any, scale: Any) -> list[Any]:
    """The bits of a block of one output in bfloat16: its inputs 0 to 15 and 32 to 47, and then the others."""
    b = r.builder
    plain, four = ir.Constant(r.floats, [F32(level) for level in levels]), ir.Constant(r.narrow, [I16(4)] * 32)
    scaled = b.fmul(plain, r.spread(r.at(scale, F32)))
    table = r.narrowed(scaled, scaled)  # twice: of a place the lowest five bits count, of a code four
    places = b.zext(r.at(codes, ir.VectorType(I8, 32)), r.narrow)
    return [
        r.call("llvm.x86.avx512.permvar.hi.512", r.narrow, table, place) for place in (places, b.lshr(places, four))
    ]


def _looked_up(module: Any, levels: Sequence[float], tiles: int) -> Any:
    """A function (codes, scales, xt, y, width, rows, of_y, room, count): the products of so many tiles of outputs.

    Of a single tile, of `count` outputs: the last one is looked up in the place of those that lack.
    """
    function, b, given = internal(module, f"looked_up_{tiles}", 9)
    codes, scales, xt, y, width, rows, of_y, room, count = given
    r = Tiles(b)
    blocks = b.sdiv(width, I64(_BLOCK))
    of_codes, of_scales = b.mul(blocks, I64(_BLOCK // 2)), b.mul(blocks, I64(4))
    empty = ir.Constant(r.pairs, [I32(0)] * ROWS)

    def multiplied(tile: int) -> list[Callable[[], None]]:
        """What multiplies the block of a tile of outputs that has been looked up."""
        at = b.add(room, I64(2 * NBYTES * tile))
        low, high = _LEFT
        return [
            lambda: r.load(low, at),
            lambda: r.dot(tile, low, _RIGHT[0]),
            lambda: r.load(high, b.add(at, I64(NBYTES))),
            lambda: r.dot(tile, high, _RIGHT[1]),
        ]

    def look_up(row: Any, scale: Any, at: Any) -> None:
        """A row of a block: its numbers go to two tiles."""
        r.fetch(b.add(row, b.mul(of_codes, I64(ROWS * tiles))))  # of the outputs behind these
        for half, found in enumerate(looked_up_row(r, levels, row, scale)):
            r.put(found, b.add(at, I64(NBYTES * half)))

    outputs = [I64(output) for output in range(ROWS * tiles)]
    if tiles == 1:
        last = b.sub(count, I64(1))
        outputs = [b.select(b.icmp_signed("<", output, last), output, last) for output in outputs]
    for tile in (*range(tiles), *_RIGHT):
        r.zero(tile)
    for line in range(2 * ROWS):  # before the first block the last tile is multiplied with nothing
        r.put(empty, b.add(room, I64(2 * NBYTES * (tiles - 1) + LINE * line)))
    with counting(b, I64(0), blocks, 1) as block:
        of_block, of_scale = b.add(codes, b.mul(block, I64(_BLOCK // 2))), b.add(scales, b.mul(block, I64(4)))
        for tile in range(tiles):
            # Of one tile of outputs the room is written anew, so it has to be multiplied first.
            waiting = multiplied((tile - 1) % tiles)
            if tiles == 1:
                _all(waiting)
            for row in range(ROWS):
                look_up(
                    b.add(of_block, b.mul(of_codes, outputs[ROWS * tile + row])),
                    b.add(of_scale, b.mul(of_scales, outputs[ROWS * tile + row])),
                    b.add(room, I64(2 * NBYTES * tile + LINE * row)),
                )
                if waiting and row % _STEP == _STEP - 1:
                    waiting.pop(0)()
            if tile == 0:  # until now those of the block before
                for half, of_x in enumerate(_RIGHT):
                    r.load(of_x, b.add(xt, b.add(b.mul(block, I64(2 * NBYTES)), I64(NBYTES * half))))
    _all(multiplied(tiles - 1))
    _written(b, r, y, rows, of_y, room, range(tiles), count)
    b.ret_void()
    return function


def _all(steps: list[Callable[[], None]]) -> None:
    while steps:
        steps.pop(0)()


def _as_it_lies(module: Any) -> Any:
    """A function (weight, 0, xt, y, width, rows, of_y, room, 16): one tile of outputs."""
    function, b, (weight, _, xt, y, width, rows, of_y, room, count) = internal(module, "as_it_lies", 9)
    r = Tiles(b)
    of_row = b.mul(width, I64(2))
    r.zero(0)
    with counting(b, I64(0), b.sdiv(width, I64(_INPUTS)), 1) as tile:
        at = b.add(weight, b.mul(tile, I64(LINE)))
        for row in range(ROWS):
            r.fetch(b.add(at, b.mul(of_row, I64(ROWS + row))))  # of the outputs behind these
        r.load(1, at, of_row)
        r.load(2, b.add(xt, b.mul(tile, I64(NBYTES))))
        r.dot(0, 1, 2)
    _written(b, r, y, rows, of_y, room, [0], count)
    b.ret_void()
    return function


def of_four_bits(module: Any, levels: Sequence[float]) -> Any:
    """A function of nine int64: the first output and the one behind the last, rows, in, out, codes, scales, x, y.

    x is float32; its numbers are rounded to bfloat16. Inputs are whole blocks of 64; each takes 32 bytes of a thread's
    stack.

    Args:
        levels: sixteen.
    """
    products = {tiles: _looked_up(module, levels, tiles) for tiles in _AT_ONCE}

    def of_output(b: Any, width: Any) -> tuple[Any, Any]:
        return b.sdiv(width, I64(2)), b.mul(b.sdiv(width, I64(_BLOCK)), I64(4))

    return _part(module, _laid_out(module, _of_blocks), products, of_output, 4)


def of_bfloat16(module: Any) -> Any:
    """A function of nine int64: the first output and the one behind the last, rows, in, out, weight, 0, x, y.

    x is bfloat16, y float32. Outputs are sixteen or more; the last ones may be made twice, by two threads, with the
    same bits. Inputs are whole 32; each takes 32 bytes of a thread's stack.
    """

    def of_output(b: Any, width: Any) -> tuple[Any, Any]:
        return b.mul(width, I64(2)), I64(0)

    return _part(module, _laid_out(module, _as_they_lie), {1: _as_it_lies(module)}, of_output, 2, whole=True)


def dense_kernel() -> int:
    """Where a function lies that makes products with a weight in bfloat16; any number of threads may run it.

    It takes nine int64: 0, parts, rows, in, out, weight, 0, x, y; see `of_bfloat16`.
    """
    amx.check()
    return shared_kernels("tiled", {"run": of_bfloat16}, ROWS, uses=USED, told="dense")[0]


def _part(
    module: Any,
    lay_out: Any,
    products: Mapping[int, Any],
    of_output: Callable[[Any, Any], tuple[Any, Any]],
    item: int,
    *,
    whole: bool = False,
) -> Any:
    """The function that is described above.

    Args:
        lay_out: makes xT.
        products: functions by how many tiles of outputs they make of sixteen rows; large numbers first.
        of_output: the builder, inputs -> bytes of an output at each of the weight's addresses.
        item: bytes of a number of x.
        whole: tiles of outputs can't be read in part, so the last one reaches back.
    """
    function, b, given = taking(module, "part")
    start, stop, rows, width, out, first, second, x, y = given
    r = Tiles(b)
    tiles = b.sdiv(width, I64(_INPUTS))
    room = amx.room(b, b.add(b.mul(tiles, I64(NBYTES)), I64(_ROOM)))
    xt = b.add(room, I64(_ROOM))
    of_x, of_y, of_weight = b.mul(width, I64(item)), b.mul(out, I64(4)), of_output(b, width)
    with r.configured(), counting(b, I64(0), rows, ROWS) as row:
        some = least(b, b.sub(rows, row), I64(ROWS))
        b.call(lay_out, [b.add(x, b.mul(row, of_x)), of_x, some, tiles, xt, room])
        before = start
        for many, product in products.items():
            step = I64(ROWS * many)
            after = stop if many == 1 else b.add(before, b.mul(b.sdiv(b.sub(stop, before), step), step))
            with counting(b, before, after, ROWS * many) as output:
                j = least(b, output, b.sub(out, I64(ROWS))) if whole else output
                places = [b.add(one, b.mul(j, of)) for one, of in zip((first, second), of_weight, strict=True)]
                to = b.add(b.add(y, b.mul(row, of_y)), b.mul(j, I64(4)))
                count = I64(ROWS) if whole else least(b, b.sub(stop, j), I64(ROWS))
                b.call(product, [*places, xt, to, width, some, of_y, room, count])
            before = after
    b.ret_void()
    return function
