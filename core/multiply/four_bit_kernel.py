"""The kernel of `four_bit.py`, written in LLVM's terms and compiled for this processor in a third of a second.

A tile of R rows and J outputs holds R x J sums of V numbers each in registers, and goes over the blocks of 64 inputs
once. No loop in Python would be compiled to what looks sixteen numbers up at once.
"""

from __future__ import annotations

from functools import cache, reduce
from typing import Any

from llvmlite import ir

from lora_rt.core.multiply import amx_kernel
from lora_rt.core.native import amx, registers
from lora_rt.core.native.amx import ROWS
from lora_rt.core.native.machine_code import addresses_of, shared_by_threads, taking
from lora_rt.core.native.registers import F32, I8, I64, Registers, counting

# `four_bit.py` has both as well, which has to do without llvmlite.
_BLOCK = 64  # numbers with one scale
_STEP = 4  # outputs, of which every tile holds a part
_AHEAD = 3  # tiles of outputs whose codes are fetched in advance
_INDEPENDENT = 8  # sums at least, so that each need not wait for the one before
_TILES = (8, 2), (4, 4), (2, 4), (1, 4)
"""Rows and outputs, the largest first."""

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""NF4's (QLoRA, arXiv:2305.14314), as bitsandbytes has them."""


class _Levels(Registers):
    """Registers, and how sixteen levels are looked up in them."""

    def levels(self, scale: Any, rounded: bool) -> list[Any]:
        """The sixteen levels times a scale, in one or two registers; rounded to bfloat16, half to even."""
        b, found = self.builder, []
        for first in range(0, len(LEVELS), self.lanes):
            some = ir.Constant(self.floats, [F32(level) for level in LEVELS[first : first + self.lanes]])
            level = b.fmul(some, self.spread(scale))
            if rounded:
                bits = b.bitcast(level, self.integers)
                odd = b.and_(b.lshr(bits, self.every(16)), self.every(1))
                bits = b.and_(b.add(b.add(bits, self.every(0x7FFF)), odd), self.every(0xFFFF0000))
                level = b.bitcast(bits, self.floats)
            found.append(level)
        return found

    def looked_up(self, levels: list[Any], codes: Any) -> Any:
        """The level of each code; of the codes the lowest four bits count."""
        b = self.builder
        if self.lanes == 16:
            return self.call("llvm.x86.avx512.permvar.sf.512", self.floats, levels[0], codes)
        low, high = (self.call("llvm.x86.avx2.permps", self.floats, some, codes) for some in levels)
        upper = b.icmp_unsigned("!=", b.and_(codes, self.every(8)), self.every(0))
        return b.select(upper, high, low)


def _tile(module: Any, rows: int, outputs: int, lanes: int, rounded: bool) -> Any:
    """A function (codes, scales, x, y, blocks, out) over addresses: the sums of so many rows and outputs."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 6), f"tile_{rows}_{outputs}")
    function.linkage = "internal"
    codes, scales, x, y, blocks, out = function.args
    b = ir.IRBuilder(function.append_basic_block())
    r = _Levels(b, lanes)
    halves = max(1, _INDEPENDENT // (rows * outputs))
    # How far apart rows of codes, scales, x and y lie, in bytes.
    of_codes, of_scales = b.mul(blocks, I64(_BLOCK // 2)), b.mul(blocks, I64(4))
    of_x, of_y = b.mul(blocks, I64(_BLOCK * 4)), b.mul(out, I64(4))

    def apart(start: Any, step: Any, count: int) -> list[Any]:
        return [b.add(start, b.mul(step, I64(number))) for number in range(count)]

    code_rows, scale_rows = apart(codes, of_codes, outputs), apart(scales, of_scales, outputs)
    x_rows, ahead = apart(x, of_x, rows), b.mul(of_codes, I64(_AHEAD * outputs))
    sums = [r.zeros()] * (rows * outputs * halves)
    with counting(b, I64(0), blocks, 1, sums) as block:
        at = b.mul(block, I64(_BLOCK // 2))
        levels = []
        for row, scale_row in zip(code_rows, scale_rows, strict=True):
            r.fetch(b.add(b.add(row, at), ahead))
            levels.append(r.levels(r.at(b.add(scale_row, b.mul(block, I64(4))), F32), rounded))
        for part in range(_BLOCK // 2 // lanes):
            kind = ir.VectorType(I8, lanes)
            read = [r.at(b.add(b.add(row, at), I64(part * lanes)), kind) for row in code_rows]
            lower = [b.zext(one, r.integers) for one in read]
            for half, found in enumerate((lower, [b.lshr(one, r.every(4)) for one in lower])):
                weights = [r.looked_up(some, one) for some, one in zip(levels, found, strict=True)]
                number = 2 * part + half
                inner = b.add(b.mul(block, I64(_BLOCK * 4)), I64(number * lanes * 4))
                for n, row in enumerate(x_rows):
                    given = r.at(b.add(row, inner), r.floats)
                    for j, weight in enumerate(weights):
                        place = (n * outputs + j) * halves + number % halves
                        sums[place] = r.times(given, weight, sums[place])
    apiece = [sums[place : place + halves] for place in range(0, len(sums), halves)]
    totals = r.totals([reduce(b.fadd, some) for some in apiece])
    for n, row in enumerate(apart(y, of_y, rows)):
        register, lane = divmod(n * outputs, lanes)
        r.put(r.picked(totals[register], totals[register], range(lane, lane + outputs)), row)
    b.ret_void()
    return function


def _part(module: Any, lanes: int, rounded: bool) -> Any:
    """`part` of `kernel`: the outputs from `start` to `stop`."""
    function, b, given = taking(module, "part")
    start, stop, rows, width, out, codes, scales, x, y = given
    blocks = b.sdiv(width, I64(_BLOCK))
    first: Any = I64(0)
    for many, outputs in _TILES:  # as many rows as fit in the largest tile, then the rest in smaller ones
        tile = _tile(module, many, outputs, lanes, rounded)
        last = b.add(first, b.mul(b.sdiv(b.sub(rows, first), I64(many)), I64(many)))
        with counting(b, first, last, many) as row, counting(b, start, stop, outputs) as j:
            of_codes, of_scales = b.mul(j, b.mul(blocks, I64(_BLOCK // 2))), b.mul(j, b.mul(blocks, I64(4)))
            of_x = b.mul(row, b.mul(width, I64(4)))
            of_y = b.mul(b.add(b.mul(row, out), j), I64(4))
            places = b.add(codes, of_codes), b.add(scales, of_scales), b.add(x, of_x), b.add(y, of_y)
            b.call(tile, [*places, blocks, out])
        first = last
    b.ret_void()
    return function


@cache
def kernel(lanes: int, rounded: bool, tiles: bool = False) -> tuple[int, ...]:
    """The addresses of two functions, each of which takes nine int64.

    `run`: 0, parts, rows, in, out, and where codes, scales, x and y lie. Any number of threads may run it on the same
    ones. `part`: the first output and the one behind the last, and then the same; both are multiples of four, or
    whatever they are by tiles.

    Args:
        tiles: multiply by AMX, for which the numbers of x have to be bfloat16's.
    """

    def build() -> Any:
        module = ir.Module("four_bit")
        part = amx_kernel.of_four_bits(module, "part", LEVELS) if tiles else _part(module, lanes, rounded)
        shared_by_threads(module, part, ROWS if tiles else _STEP)
        return module

    if tiles:
        amx.check()
    uses = (__file__, registers.__file__, *(amx_kernel.USED if tiles else ()))
    return addresses_of(build, "run", "part", uses=uses, told=(lanes, rounded, tiles))
