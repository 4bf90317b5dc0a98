"""Products of a few float32 rows with what adapters hold, in tiles of rows and outputs whose sums stay in registers.

    y (rows, n) = x (rows, k) M        or += , M (k, n) with the outputs of each k together in memory

A loop over such a product in Python is compiled to one that reads and writes y for every few k, and M for every row: a
sixth of the processor's speed. Here numba is given the inner loop in LLVM's terms; around it, everything is Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from lora_rt.core.base.compiled import compiled

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
"""Numbers in a register."""
_FLOATS, _LANES = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


def _tile(rows: int, vectors: int, *, some: bool) -> Any:
    """A function of a tile of so many rows, and registers of outputs.

    It takes addresses and steps in bytes: x, from row to row; M, from k to k; y, from row to row; how many k, and how
    many outputs there are in the last register. `some`: those k are taken whose numbers lie at a last address, and y is
    added to. A sum goes over its k in turn, so it has the same bits in every tile.
    """

    def generated(_context: Any, b: Any, _signature: Any, given: Any) -> Any:
        x, of_x, m, of_m, y, of_y, count, rest, places = given
        masks = [None] * (vectors - 1) + [_below(b, rest)]
        xs = [b.add(x, b.mul(of_x, _I64(row))) for row in range(rows)]
        sums = [ir.Constant(_FLOATS, [_F32(0.0)] * LANES)] * (rows * vectors)
        with _loop(b, count, sums) as (k, now):
            if some:
                k = _read(b, b.add(places, b.mul(k, _I64(8))), _I64)
            row = b.add(m, b.mul(k, of_m))
            read = [_read(b, b.add(row, _I64(4 * LANES * v)), _FLOATS, mask) for v, mask in enumerate(masks)]
            for r, start in enumerate(xs):
                number = _spread(b, _read(b, b.add(start, b.mul(k, _I64(4))), _F32))
                for v, one in enumerate(read):
                    place = r * vectors + v
                    now[place] = _call(b, f"llvm.fma.v{LANES}f32", _FLOATS, number, one, now[place])
        for place, total in enumerate(sums):
            r, v = divmod(place, vectors)
            at = b.add(b.add(y, b.mul(of_y, _I64(r))), _I64(4 * LANES * v))
            _write(b, b.fadd(total, _read(b, at, _FLOATS, masks[v])) if some else total, at, masks[v])
        return b.inttoptr(_I64(0), ir.IntType(8).as_pointer())

    @intrinsic  # type: ignore[untyped-decorator]  # numba has no types
    def tile(
        _context: Any, _x: Any, _of_x: Any, _m: Any, _of_m: Any, _y: Any, _of_y: Any, _count: Any, _rest: Any, _at: Any
    ) -> Any:
        return types.voidptr(*[types.int64] * 9), generated

    return tile


def _call(b: Any, name: str, result: Any, *arguments: Any) -> Any:
    """One of LLVM's own functions."""
    kinds = [argument.type for argument in arguments]
    found = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(result, kinds), name)
    return b.call(found, arguments)


def _spread(b: Any, number: Any) -> Any:
    """A float in every lane."""
    one = b.insert_element(ir.Constant(_FLOATS, ir.Undefined), number, _I32(0))
    return b.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), ir.Constant(_LANES, [_I32(0)] * LANES))


def _below(b: Any, count: Any) -> Any:
    """Which lanes have a number below it."""
    nothing = ir.Constant(_LANES, ir.Undefined)
    one = b.insert_element(nothing, b.trunc(count, _I32), _I32(0))
    every = b.shuffle_vector(one, nothing, ir.Constant(_LANES, [_I32(0)] * LANES))
    return b.icmp_signed("<", ir.Constant(_LANES, [_I32(lane) for lane in range(LANES)]), every)


def _read(b: Any, address: Any, kind: Any, mask: Any = None) -> Any:
    """What stands at an address; 0 in lanes that are masked, which are not read."""
    pointer = b.inttoptr(address, kind.as_pointer())
    if mask is None:
        return b.load(pointer, align=4)
    zeros = ir.Constant(kind, [_F32(0.0)] * LANES)
    return _call(b, f"llvm.masked.load.v{LANES}f32.p0", kind, pointer, _I32(4), mask, zeros)


def _write(b: Any, value: Any, address: Any, mask: Any = None) -> None:
    pointer = b.inttoptr(address, value.type.as_pointer())
    if mask is None:
        b.store(value, pointer, align=4)
    else:
        _call(b, f"llvm.masked.store.v{LANES}f32.p0", ir.VoidType(), value, pointer, _I32(4), mask)


@contextmanager
def _loop(b: Any, count: Any, values: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """A loop around what is built in the block, whose number and values are given; these are what it leaves."""
    before, test, inside, after = b.block, *(b.append_basic_block() for _ in range(3))
    b.branch(test)
    b.position_at_end(test)
    number, found = b.phi(_I64), [b.phi(value.type) for value in values]
    number.add_incoming(_I64(0), before)
    for phi, value in zip(found, values, strict=True):
        phi.add_incoming(value, before)
    b.cbranch(b.icmp_signed("<", number, count), inside, after)
    b.position_at_end(inside)
    now = list(found)
    yield number, now
    number.add_incoming(b.add(number, _I64(1)), b.block)
    for phi, value in zip(found, now, strict=True):
        phi.add_incoming(value, b.block)
    b.branch(test)
    b.position_at_end(after)
    values[:] = found


def _tiled(*, some: bool) -> Any:
    eight_two, eight_one = _tile(8, 2, some=some), _tile(8, 1, some=some)
    four_two, four_one = _tile(4, 2, some=some), _tile(4, 1, some=some)
    one_two, one_one = _tile(1, 2, some=some), _tile(1, 1, some=some)

    @compiled(kept=False)
    def product(
        x: int, of_x: int, m: int, of_m: int, y: int, of_y: int, rows: int, count: int, outputs: int, places: int
    ) -> None:
        for j in range(0, outputs, 2 * LANES):
            m_j, rest = m + 4 * j, min(outputs - j, 2 * LANES)
            both = rest > LANES
            if both:
                rest -= LANES
            r = 0
            while r < rows:
                x_r, y_r = x + r * of_x, y + r * of_y + 4 * j
                if rows - r >= 8:
                    r += 8
                    if both:
                        eight_two(x_r, of_x, m_j, of_m, y_r, of_y, count, rest, places)
                    else:
                        eight_one(x_r, of_x, m_j, of_m, y_r, of_y, count, rest, places)
                elif rows - r >= 4:
                    r += 4
                    if both:
                        four_two(x_r, of_x, m_j, of_m, y_r, of_y, count, rest, places)
                    else:
                        four_one(x_r, of_x, m_j, of_m, y_r, of_y, count, rest, places)
                else:
                    r += 1
                    if both:
                        one_two(x_r, of_x, m_j, of_m, y_r, of_y, count, rest, places)
                    else:
                        one_one(x_r, of_x, m_j, of_m, y_r, of_y, count, rest, places)

    return product


multiply = _tiled(some=False)
"""(x, of_x, m, of_m, y, of_y, rows, k, n, 0): y = x M, of float32 at addresses; steps from row to row in bytes."""

add_some = _tiled(some=True)
"""(x, of_x, m, of_m, y, of_y, rows, count, n, places): y += x M over those k whose numbers, int64, lie at `places`."""
