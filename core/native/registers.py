"""Vector registers in LLVM's terms, for the inner loops of kernels that no loop in Python is compiled to.

Addresses are int64, and steps between them are in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir


class _BFloat(ir.Type):  # type: ignore[misc]  # llvmlite has no types, and no bfloat16
    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


I1, I8, I16, I32, I64, F32, BF16 = *map(ir.IntType, (1, 8, 16, 32, 64)), ir.FloatType(), _BFloat()

_BYTES = {I8: 1, I16: 2, BF16: 2}

# Cephes' polynomial for e^x, with which 2^count times e^rest is multiplied.
EXP_LOW, EXP_HIGH = -87.0, 88.0  # below and above e^x is what it is there
LOG2E = 1.44269504
LN2 = 0.693359375, -2.12194440e-4  # in two parts
EXP_SERIES = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


@contextmanager
def counting(b: Any, start: Any, stop: Any, step: int, values: list[Any] | None = None) -> Iterator[Any]:
    """A loop around what is built in the block, whose number is given; not run at all where start is not below stop.

    Args:
        values: what each round makes of those of the round before: the block changes the list; behind it they stand.
    """
    kept = [] if values is None else values
    before, test, inside, after = b.block, *(b.append_basic_block() for _ in range(3))
    b.branch(test)
    b.position_at_end(test)
    number, found = b.phi(I64), [b.phi(value.type) for value in kept]
    number.add_incoming(start, before)
    for phi, value in zip(found, kept, strict=True):
        phi.add_incoming(value, before)
    b.cbranch(b.icmp_signed("<", number, stop), inside, after)
    b.position_at_end(inside)
    kept[:] = found
    yield number
    number.add_incoming(b.add(number, I64(step)), b.block)
    for phi, value in zip(found, kept, strict=True):
        phi.add_incoming(value, b.block)
    b.branch(test)
    b.position_at_end(after)
    kept[:] = found


def least(b: Any, one: Any, other: Any) -> Any:
    """The smaller one of two int64."""
    return b.select(b.icmp_signed("<", one, other), one, other)


class Registers:
    """Vectors of V numbers, and what a function that is being built does with them."""

    def __init__(self, builder: Any, lanes: int) -> None:
        """
        Args:
            lanes: V, a power of two from 8 on.
        """
        self.builder, self.lanes = builder, lanes
        self.floats, self.integers = ir.VectorType(F32, lanes), ir.VectorType(I32, lanes)

    def every(self, number: int) -> Any:
        """An integer in every lane."""
        return ir.Constant(self.integers, [I32(number)] * self.lanes)

    def zeros(self) -> Any:
        return ir.Constant(self.floats, [F32(0.0)] * self.lanes)

    def spread(self, number: Any) -> Any:
        """A number in every lane."""
        nothing = ir.Constant(ir.VectorType(number.type, self.lanes), ir.Undefined)
        one = self.builder.insert_element(nothing, number, I32(0))
        return self.builder.shuffle_vector(one, nothing, self.every(0))

    def below(self, count: Any) -> Any:
        """Which lanes have a number below an int64."""
        numbers = ir.Constant(self.integers, [I32(lane) for lane in range(self.lanes)])
        return self.builder.icmp_signed("<", numbers, self.spread(self.builder.trunc(count, I32)))

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        """One of LLVM's own functions."""
        module = self.builder.module
        kinds = [argument.type for argument in arguments]
        found = module.globals.get(name) or ir.Function(module, ir.FunctionType(result, kinds), name)
        return self.builder.call(found, arguments)

    def times(self, one: Any, other: Any, total: Any) -> Any:
        """one * other + total, rounded once where the processor does both at once."""
        return self.call(f"llvm.fmuladd.v{self.lanes}f32", self.floats, one, other, total)

    def total(self, numbers: Any) -> Any:
        """What the numbers of one register add up to, in an order of the processor's own."""
        name, kinds = f"llvm.vector.reduce.fadd.v{self.lanes}f32", [F32, self.floats]
        module = self.builder.module
        found = module.globals.get(name) or ir.Function(module, ir.FunctionType(F32, kinds), name)
        return self.builder.call(found, [F32(0.0), numbers], fastmath=("reassoc",))

    def exp(self, numbers: Any) -> Any:
        """e^x of each to 5e-7 of it, between e^-87 and e^88; NaN stays NaN."""
        b = self.builder

        def every(number: float) -> Any:
            return self.spread(F32(number))

        low = b.select(b.fcmp_ordered(">", numbers, every(EXP_LOW)), numbers, every(EXP_LOW))
        inside = b.select(b.fcmp_ordered("<", low, every(EXP_HIGH)), low, every(EXP_HIGH))
        half = self.times(inside, every(LOG2E), every(0.5))
        count = self.call(f"llvm.floor.v{self.lanes}f32", self.floats, half)
        rest = self.times(count, every(-LN2[0]), inside)
        rest = self.times(count, every(-LN2[1]), rest)
        series = every(EXP_SERIES[0])
        for factor in EXP_SERIES[1:]:
            series = self.times(series, rest, every(factor))
        power = b.add(b.fptosi(count, self.integers), self.every(127))
        power = b.bitcast(b.shl(power, self.every(23)), self.floats)
        whole = b.fmul(self.times(b.fmul(series, rest), rest, b.fadd(rest, every(1.0))), power)
        return b.select(b.fcmp_ordered("ord", numbers, numbers), whole, numbers)

    def at(self, address: Any, kind: Any, mask: Any = None) -> Any:
        """What stands at an address; 0 in lanes that are masked, which are not read."""
        pointer = self.builder.inttoptr(address, kind.as_pointer())
        if mask is not None:
            of = "f32" if kind.element is F32 else f"i{kind.element.width}"
            nothing = ir.Constant(kind, [kind.element(0)] * self.lanes)
            size = I32(_BYTES.get(kind.element, 4))
            return self.call(f"llvm.masked.load.v{self.lanes}{of}.p0", kind, pointer, size, mask, nothing)
        return self.builder.load(pointer, align=_BYTES.get(getattr(kind, "element", kind), 4))

    def fetch(self, address: Any) -> None:
        """Let the processor read what stands at an address into its caches; of one that is nobody's nothing comes."""
        pointer = self.builder.inttoptr(address, I8.as_pointer())
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(3), I32(1))

    def put(self, value: Any, address: Any, mask: Any = None) -> None:
        """Write floats; those in lanes that are masked are not."""
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        if mask is None:
            self.builder.store(value, pointer, align=4)
        else:
            self.call(f"llvm.masked.store.v{self.lanes}f32.p0", ir.VoidType(), value, pointer, I32(4), mask)

    def picked(self, one: Any, other: Any, lanes: Sequence[int]) -> Any:
        """The numbers in these lanes of two registers; those of the other one are counted on."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), [I32(lane) for lane in lanes])
        return self.builder.shuffle_vector(one, other, mask)

    def totals(self, sums: Sequence[Any]) -> list[Any]:
        """What the numbers of each register add up to, of four or more, V of them in a register.

        Two registers become one, in which half as many numbers belong to each of them, until one does. To add up one
        register at a time took a seventh of the time of a product of few rows.
        """
        lanes, unit = self.lanes, 1  # lanes of a register, and how many of them hold what was added up
        sums = list(sums)
        while unit < self.lanes:
            low, high = _neighbours(lanes, unit)
            if len(sums) > 1:
                sums += [self.zeros()] * (len(sums) % 2)
                pairs = list(zip(sums[::2], sums[1::2], strict=True))
            else:
                pairs = [(sums[0], sums[0])]
                low, high = low[: lanes // 2], high[: lanes // 2]
                lanes //= 2
            sums = [self.builder.fadd(self.picked(*pair, low), self.picked(*pair, high)) for pair in pairs]
            unit *= 2
        return list(sums)


def _neighbours(lanes: int, unit: int) -> tuple[list[int], list[int]]:
    """Which lanes of two registers are added to which others, when so many lanes hold what belongs together.

    Each is one instruction: up to two lanes are picked within every four, more of them four by four.
    """
    low: list[int] = []
    high: list[int] = []
    if unit < 4:
        for four in range(0, lanes, 4):
            for found, half in ((low, 0), (high, 2)):
                for first in range(four + half, four + half + 2, unit):
                    found += [*range(first, first + unit), *range(lanes + first, lanes + first + unit)]
        return low, high
    for start in (0, lanes):
        for eight in range(start, start + lanes, 8):
            low += range(eight, eight + 4)
            high += range(eight + 4, eight + 8)
    return low, high
