"""Inner loops whose sums stay in registers: products with what adapters hold, and attention over kept columns.

    y (rows, n) = x (rows, k) M        or += , M (k, n) with the outputs of each k together in memory; of one row, M may
                                       be in bfloat16
    scores (columns,) = query keys     and answer (D,) = scores values

A loop over such a product in Python is compiled to one that reads and writes y for every few k, and M for every row;
one over a head's columns adds up registers and checks what may overlap at every few: a tenth of the processor's speed.
Here numba is given the inner loops in LLVM's terms; around them, everything is Python.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lora_rt.core.multiply import four_bit
from lora_rt.core.native.compiled import compiled
from lora_rt.core.native.registers import F32, I8, I16, I64, Registers, counting

LANES = four_bit.in_a_register()
"""Numbers in a register."""
AT_ONCE = 8
"""Columns of keys that are looked at at a time."""
DOTS = 4
"""Sums over a row's numbers that are made at a time."""
_LINE = 64  # bytes that come from memory together
_AHEAD = {"dots": 8, "row": 16}  # rows of M: they come in time, where a processor does not see by itself what is next


def _tile(rows: int, vectors: int, *, some: bool = False, added: bool = False, narrow: bool = False) -> Any:
    """A function of a tile of so many rows, and registers of outputs.

    It takes addresses and steps in bytes: x, from row to row; M, from k to k; y, from row to row; how many k, and how
    many outputs there are in the last register. `some`: those k are taken whose numbers lie at a last address. `added`:
    y is added to. `narrow`: M is in bfloat16. A sum goes over its k in turn, so it has the same bits in every tile.
    """
    size = 2 if narrow else 4

    def generated(_context: Any, b: Any, _signature: Any, given: Any) -> Any:
        x, of_x, m, of_m, y, of_y, count, rest, places = given
        r = Registers(b, LANES)
        masks = [None] * (vectors - 1) + [r.below(rest)]
        xs = [b.add(x, b.mul(of_x, I64(row))) for row in range(rows)]
        sums = [r.zeros()] * (rows * vectors)
        with counting(b, I64(0), count, 1, sums) as k:
            if some:
                k = r.at(b.add(places, b.mul(k, I64(8))), I64)
            row = b.add(m, b.mul(k, of_m))
            for line in range(0, size * LANES * vectors if added and not some else 0, _LINE):
                r.fetch(b.add(row, b.add(I64(line), b.mul(of_m, I64(_AHEAD["row"])))))
            read = [_floats(r, b.add(row, I64(size * LANES * v)), mask, narrow) for v, mask in enumerate(masks)]
            for n, start in enumerate(xs):
                number = r.spread(r.at(b.add(start, b.mul(k, I64(4))), F32))
                acts = b.fcmp_unordered("!=", number, r.zeros())
                for v, one in enumerate(read):
                    place = n * vectors + v
                    total = r.times(number, one, sums[place])
                    # What is not a number in one row's adapter is none of the others': 0 times it would be NaN.
                    sums[place] = b.select(acts, total, sums[place]) if added else total
        for place, total in enumerate(sums):
            n, v = divmod(place, vectors)
            at = b.add(b.add(y, b.mul(of_y, I64(n))), I64(4 * LANES * v))
            r.put(b.fadd(total, r.at(at, r.floats, masks[v])) if added else total, at, masks[v])
        return b.inttoptr(I64(0), I8.as_pointer())

    @intrinsic  # type: ignore[untyped-decorator]  # numba has no types
    def tile(
        _context: Any, _x: Any, _of_x: Any, _m: Any, _of_m: Any, _y: Any, _of_y: Any, _count: Any, _rest: Any, _at: Any
    ) -> Any:
        return types.voidptr(*[types.int64] * 9), generated

    return tile


def _code_of_scores(like: Any) -> Any:
    """The code of `scores_of` for keys like these."""

    def generated(_context: Any, b: Any, _signature: Any, given: Any) -> Any:
        query, keys, of_keys, places, scaling, scores, count, _like = given
        r = Registers(b, LANES)
        numbers = [r.at(b.add(places, I64(8 * n)), I64) for n in range(AT_ONCE)]
        columns = [b.add(keys, b.mul(number, of_keys)) for number in numbers]
        sums = [r.zeros()] * AT_ONCE
        with counting(b, I64(0), count, 1, sums) as part:
            read = r.at(b.add(query, b.mul(part, I64(4 * LANES))), r.floats)
            for n, column in enumerate(columns):
                sums[n] = r.times(read, _widened(r, column, part, like), sums[n])
        found = r.totals(sums)[0]
        some = found.type.count
        scale = r.picked(r.spread(scaling), r.zeros(), range(some))
        found = b.fmul(found, scale)
        r.put(found, scores)
        return r.call(f"llvm.vector.reduce.fmax.v{some}f32", F32, found)

    return generated


def _code_of_sums(like: Any, vectors: int) -> Any:
    """The code of `weighed` for values like these, and so many registers of their features."""

    def generated(_context: Any, b: Any, _signature: Any, given: Any) -> Any:
        scores, values, of_values, places, answer, count, _like = given
        r = Registers(b, LANES)
        sums = [r.zeros()] * vectors
        with counting(b, I64(0), count, 1, sums) as n:
            weight = r.spread(r.at(b.add(scores, b.mul(n, I64(4))), F32))
            column = b.add(values, b.mul(r.at(b.add(places, b.mul(n, I64(8))), I64), of_values))
            for v in range(vectors):
                sums[v] = r.times(weight, _widened(r, column, I64(v), like), sums[v])
        for v, total in enumerate(sums):
            r.put(total, b.add(answer, I64(4 * LANES * v)))
        return b.inttoptr(I64(0), I8.as_pointer())

    return generated


def _widened(r: Registers, start: Any, part: Any, like: Any) -> Any:
    """The numbers of one register of float32, of an array like this that begins at an address."""
    b, size = r.builder, like.dtype.bitwidth // 8
    return _floats(r, b.add(start, b.mul(part, I64(size * LANES))), None, size == 2)


def _floats(r: Registers, place: Any, mask: Any, narrow: bool) -> Any:
    """The numbers of one register of float32, which lie at an address so or in bfloat16."""
    if not narrow:
        return r.at(place, r.floats, mask)
    b, bits = r.builder, r.at(place, ir.VectorType(I16, LANES), mask)
    return b.bitcast(b.shl(b.zext(bits, r.integers), r.every(16)), r.floats)


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def scores_of(
    _context: Any,
    _query: Any,
    _keys: Any,
    _of_keys: Any,
    _places: Any,
    _scaling: Any,
    _scores: Any,
    _count: Any,
    like: Any,
) -> Any:
    """(query, keys, of_keys, places, scaling, scores, count, like): the largest of eight scores, which are written.

    A score is scaling * query keys, of a query (count * LANES,) and the columns of keys at the first eight of `places`.
    """
    kinds = [types.int64] * 4 + [types.float32] + [types.int64] * 2
    return types.float32(*kinds, like), _code_of_scores(like)


def _weighed(vectors: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]  # numba has no types
    def weighed(
        _context: Any, _scores: Any, _values: Any, _of: Any, _places: Any, _answer: Any, _count: Any, like: Any
    ) -> Any:
        return types.voidptr(*[types.int64] * 6, like), _code_of_sums(like, vectors)

    return weighed


weighed_by_four, weighed_by_one = _weighed(4), _weighed(1)
"""(scores, values, of_values, places, answer, count, like): of four registers of features, or one, the sum of the
columns of values at `places`, each times its score."""


def _rows(vectors: int, *, some: bool) -> Any:
    """A function of any number of rows, and so many registers of outputs."""
    eight, four, one = (_tile(rows, vectors, some=some, added=some) for rows in (8, 4, 1))

    @compiled(kept=False)
    def all_rows(
        x: int, of_x: int, m: int, of_m: int, y: int, of_y: int, rows: int, count: int, rest: int, places: int
    ) -> None:
        r = 0
        while r < rows:
            x_r, y_r = x + r * of_x, y + r * of_y
            if rows - r >= 8:
                eight(x_r, of_x, m, of_m, y_r, of_y, count, rest, places)
                r += 8
            elif rows - r >= 4:
                four(x_r, of_x, m, of_m, y_r, of_y, count, rest, places)
                r += 4
            else:
                one(x_r, of_x, m, of_m, y_r, of_y, count, rest, places)
                r += 1

    return all_rows


def _tiled(*, some: bool) -> Any:
    by_two, by_one = (_rows(vectors, some=some) for vectors in (2, 1))

    @compiled(kept=False)
    def product(
        x: int, of_x: int, m: int, of_m: int, y: int, of_y: int, rows: int, count: int, outputs: int, places: int
    ) -> None:
        for j in range(0, outputs, 2 * LANES):
            left = outputs - j
            if left > LANES:
                by_two(x, of_x, m + 4 * j, of_m, y + 4 * j, of_y, rows, count, left - LANES, places)
            else:
                by_one(x, of_x, m + 4 * j, of_m, y + 4 * j, of_y, rows, count, left, places)

    return product


multiply = _tiled(some=False)
"""(x, of_x, m, of_m, y, of_y, rows, k, n, 0): y = x M, of float32 at addresses; steps from row to row in bytes."""

add_some = _tiled(some=True)
"""(x, of_x, m, of_m, y, of_y, rows, count, n, places): y += x M over those k whose numbers, int64, lie at `places`; a
row for which x is 0 at one of them is not touched by it, whatever stands in M."""


def _of_one_row(*, narrow: bool) -> Any:
    by_four, by_one = (_tile(1, vectors, added=True, narrow=narrow) for vectors in (4, 1))
    size = 2 if narrow else 4

    @compiled(kept=False)
    def product(x: int, m: int, of_m: int, y: int, count: int, outputs: int) -> None:
        j = 0
        while j < outputs:
            left = outputs - j
            if left > 3 * LANES:
                by_four(x, 0, m + size * j, of_m, y + 4 * j, 0, count, left - 3 * LANES, 0)
                j += 4 * LANES
            else:
                by_one(x, 0, m + size * j, of_m, y + 4 * j, 0, count, left, 0)
                j += LANES

    return product


def _dots(*, narrow: bool) -> Any:
    """A function of four rows of M, or of some that are named more than once."""
    size = 2 if narrow else 4

    def generated(_context: Any, b: Any, _signature: Any, given: Any) -> Any:
        x, m, of_m, last, count, rest, sums_at = given
        r = Registers(b, LANES)
        rows = []
        for n in range(DOTS):
            near = b.select(b.icmp_signed("<", last, I64(n)), last, I64(n))
            rows.append(b.add(m, b.mul(near, of_m)))
        sums = [r.zeros()] * DOTS

        def read(part: Any, mask: Any) -> None:
            one = r.at(b.add(x, b.mul(part, I64(4 * LANES))), r.floats, mask)
            for n, row in enumerate(rows):
                place = b.add(row, b.mul(part, I64(size * LANES)))
                if mask is None:
                    r.fetch(b.add(place, b.mul(of_m, I64(_AHEAD["dots"]))))
                sums[n] = r.times(one, _floats(r, place, mask, narrow), sums[n])

        with counting(b, I64(0), count, 1, sums) as part:
            read(part, None)
        read(count, r.below(rest))
        found = r.totals(sums)[0]
        r.put(r.picked(found, found, range(DOTS)), sums_at)
        return b.inttoptr(I64(0), I8.as_pointer())

    @intrinsic  # type: ignore[untyped-decorator]  # numba has no types
    def dots(_context: Any, _x: Any, _m: Any, _of_m: Any, _last: Any, _count: Any, _rest: Any, _sums: Any) -> Any:
        return types.voidptr(*[types.int64] * 7), generated

    return dots


dots, narrow_dots = _dots(narrow=False), _dots(narrow=True)
"""(x, m, of_m, last, parts, rest, sums): four sums x m, float32, of the rows of M from the first to the `last`, which
stands for those behind it; of so many whole registers and a rest of numbers."""

add_row, add_narrow_row = _of_one_row(narrow=False), _of_one_row(narrow=True)
"""(x, m, of_m, y, k, n): y += x M of one row, M in float32 or in bfloat16; the step from k to k in bytes."""
