"""How `vector_kernel.py` reads a weight in 4 bits, and the kernels of such weights, compiled for this processor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from llvmlite import ir

from lora_rt.core.multiply import amx_kernel, vector_kernel
from lora_rt.core.multiply.vector_kernel import BLOCK, STEP, part_of
from lora_rt.core.native import amx, registers
from lora_rt.core.native.amx import ROWS
from lora_rt.core.native.machine_code import shared_kernels
from lora_rt.core.native.registers import F32, I8, I64, Registers

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""NF4's (QLoRA, arXiv:2305.14314), as bitsandbytes has them."""


class FourBits:
    """A weight in 4 bits: codes, and a scale for each 64 numbers."""

    def __init__(self, *, rounded: bool) -> None:
        """
        Args:
            rounded: its numbers are bfloat16's.
        """
        self._rounded = rounded

    def strides(self, b: Any, blocks: Any) -> list[Any]:
        """How far apart two outputs lie, in bytes, among the codes and the scales."""
        return [b.mul(blocks, I64(BLOCK // 2)), b.mul(blocks, I64(4))]

    def read(self, r: Registers, outputs: Sequence[Sequence[Any]], block: Any, ahead: Any) -> Iterator[Iterable[Any]]:
        """See `Weight`."""
        b = r.builder
        at, kind, levels = b.mul(block, I64(BLOCK // 2)), ir.VectorType(I8, r.lanes), []
        for codes, scales in outputs:
            r.fetch(b.add(b.add(codes, at), ahead))
            levels.append(self._levels(r, r.at(b.add(scales, b.mul(block, I64(4))), F32)))
        for part in range(0, BLOCK // 2, r.lanes):
            lower = [b.zext(r.at(b.add(b.add(codes, at), I64(part)), kind), r.integers) for codes, _ in outputs]
            for found in (lower, [b.lshr(one, r.every(4)) for one in lower]):
                yield [_looked_up(r, some, one) for some, one in zip(levels, found, strict=True)]

    def _levels(self, r: Registers, scale: Any) -> list[Any]:
        """The sixteen levels times a scale, in one or two registers; rounded to bfloat16, half to even."""
        b, found = r.builder, []
        for first in range(0, len(LEVELS), r.lanes):
            some = ir.Constant(r.floats, [F32(level) for level in LEVELS[first : first + r.lanes]])
            level = b.fmul(some, r.spread(scale))
            if self._rounded:
                bits = b.bitcast(level, r.integers)
                odd = b.and_(b.lshr(bits, r.every(16)), r.every(1))
                bits = b.and_(b.add(b.add(bits, r.every(0x7FFF)), odd), r.every(0xFFFF0000))
                level = b.bitcast(bits, r.floats)
            found.append(level)
        return found


def _looked_up(r: Registers, levels: list[Any], codes: Any) -> Any:
    """The level of each code; of the codes the lowest four bits count."""
    b = r.builder
    if r.lanes == 16:
        return r.call("llvm.x86.avx512.permvar.sf.512", r.floats, levels[0], codes)
    low, high = (r.call("llvm.x86.avx2.permps", r.floats, some, codes) for some in levels)
    upper = b.icmp_unsigned("!=", b.and_(codes, r.every(8)), r.every(0))
    return b.select(upper, high, low)


@cache
def kernel(lanes: int, rounded: bool, tiles: bool = False) -> tuple[int, ...]:
    """The addresses of two functions, each of which takes nine int64.

    `run`: 0, parts, rows, in, out, and where codes, scales, x and y lie. Any number of threads may run it on the same
    ones. `part`: the first output and the one behind the last, and then the same; both are multiples of four, or
    whatever they are by tiles.

    Args:
        tiles: multiply by AMX, for which the numbers of x have to be bfloat16's.
    """

    def part(module: Any) -> Any:
        weight = FourBits(rounded=rounded)
        return amx_kernel.of_four_bits(module, LEVELS) if tiles else part_of(module, weight, lanes)

    if tiles:
        amx.check()
    uses = (__file__, vector_kernel.__file__, registers.__file__, *(amx_kernel.USED if tiles else ()))
    unit, told = ROWS if tiles else STEP, (lanes, rounded, tiles)
    return shared_kernels("four_bit", {"run": part}, unit, "part", uses=uses, told=told)
