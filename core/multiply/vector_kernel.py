"""Products of float32 rows by vector registers, with weights of any kind, in LLVM's terms.

A register has V numbers. One or two rows meet the numbers of a weight as these are read: four outputs at a time, V
inputs of each in a register, whose sums are added up in the end. No loop in Python would be compiled to what looks
sixteen numbers up at once.

With more rows a thread first writes the numbers of 2 V outputs as float32 into its own caches, input by input, V
outputs in a register, and lets as many rows as lie beside them there meet these: then a row has the same bits whatever
stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial, reduce
from typing import Any, Protocol

from llvmlite import ir

from lora_rt.core.native import registers
from lora_rt.core.native.machine_code import internal, shared_kernels, taking
from lora_rt.core.native.registers import F32, I8, I16, I64, Registers, counting, least

BLOCK = 64  # inputs that are read at a time
STEP = 4  # outputs that are made together
_AHEAD = 3  # steps of outputs whose numbers are fetched in advance
_INDEPENDENT = 8  # sums at least, so that each need not wait for the one before
_MANY = 3  # rows from which on it pays to write a weight's numbers
_BLOCKS = 6  # of inputs, at most, that are written at a time: of 16 outputs 24 KiB, which a first cache holds
_ROOM = 3 << 17  # bytes of a second cache that rows may take
_UNROLLED = 4  # inputs, in a round of a loop
_LINE = 64  # bytes that a processor reads at once
_SPREAD = 1 << 8  # inputs; of a multiple of so many the rows of x would fall on the same lines of a cache
_ROWS = {8: (6, 4, 2, 1), 16: (12, 8, 4, 2, 1)}
"""V -> rows that are multiplied together: the sums of twice as many registers fit into a processor's."""


class Weight(Protocol):
    """How the numbers of a weight (out, in) are read."""

    def strides(self, b: Any, blocks: Any) -> list[Any]:
        """How far apart two outputs lie, in bytes, in each of its arrays."""

    def read(self, r: Registers, outputs: Sequence[Sequence[Any]], block: Any, ahead: Any) -> Iterator[Iterable[Any]]:
        """Of 64 inputs V at a time: their numbers in each of the outputs, which begin at these addresses.

        Args:
            ahead: so many bytes behind those in the first array lies what will be read soon.
        """


class Sixteen:
    """A weight in bfloat16 or float16."""

    def __init__(self, *, brain: bool) -> None:
        """
        Args:
            brain: it is bfloat16.
        """
        self._brain = brain

    def strides(self, b: Any, blocks: Any) -> list[Any]:
        """See `Weight`."""
        return [b.mul(blocks, I64(2 * BLOCK))]

    def read(self, r: Registers, outputs: Sequence[Sequence[Any]], block: Any, ahead: Any) -> Iterator[Iterable[Any]]:
        """See `Weight`."""
        b = r.builder
        for part in range(0, 2 * BLOCK, 2 * r.lanes):
            at = b.add(b.mul(block, I64(2 * BLOCK)), I64(part))
            if part % _LINE == 0:
                for (first,) in outputs:
                    r.fetch(b.add(b.add(first, at), ahead))
            yield (self._widened(r, b.add(first, at)) for (first,) in outputs)

    def _widened(self, r: Registers, place: Any) -> Any:
        b = r.builder
        if not self._brain:
            return b.fpext(r.at(place, ir.VectorType(ir.HalfType(), r.lanes)), r.floats)
        bits = b.zext(r.at(place, ir.VectorType(I16, r.lanes)), r.integers)
        return b.bitcast(b.shl(bits, r.every(16)), r.floats)


def _apart(b: Any, starts: Sequence[Any], strides: Sequence[Any], count: int) -> list[list[Any]]:
    """Where so many rows begin in each array, whose first ones begin at `starts`."""
    return [[b.add(s, b.mul(step, I64(n))) for s, step in zip(starts, strides, strict=True)] for n in range(count)]


def _few(module: Any, weight: Weight, rows: int, lanes: int) -> Any:
    """A function (array, array, x, y, blocks, out) over addresses: the sums of one or two rows and four outputs."""
    function, b, (*arrays, x, y, blocks, out) = internal(module, f"rows_{rows}", 6)
    r = Registers(b, lanes)
    parts = max(1, _INDEPENDENT // (rows * STEP))  # of each sum
    strides = weight.strides(b, blocks)
    of_weight = _apart(b, arrays[: len(strides)], strides, STEP)
    x_rows, y_rows = (
        [place for (place,) in _apart(b, [first], [step], rows)]
        for first, step in ((x, b.mul(blocks, I64(4 * BLOCK))), (y, b.mul(out, I64(4))))
    )
    ahead = b.mul(strides[0], I64(_AHEAD * STEP))
    sums = [r.zeros()] * (rows * STEP * parts)
    with counting(b, I64(0), blocks, 1, sums) as block:
        for number, weights in enumerate(weight.read(r, of_weight, block, ahead)):
            inner = b.add(b.mul(block, I64(4 * BLOCK)), I64(4 * lanes * number))
            given = [r.at(b.add(row, inner), r.floats) for row in x_rows]
            for j, one in enumerate(weights):
                for n, x_now in enumerate(given):
                    place = (n * STEP + j) * parts + number % parts
                    sums[place] = r.times(x_now, one, sums[place])
    apiece = [sums[place : place + parts] for place in range(0, len(sums), parts)]
    totals = r.totals([reduce(b.fadd, some) for some in apiece])
    for n, row in enumerate(y_rows):
        register, lane = divmod(n * STEP, lanes)
        r.put(r.picked(totals[register], totals[register], range(lane, lane + STEP)), row)
    b.ret_void()
    return function


def _writing(module: Any, weight: Weight, lanes: int) -> Any:
    """A function (array, array, written, blocks, first, stop, last): V outputs, some of their blocks, input by input.

    Behind the one of number `last`, which may be negative, that one is read again.
    """
    function, b, (*arrays, written, blocks, start, stop, last) = internal(module, "written", 7)
    r = Registers(b, lanes)
    strides = weight.strides(b, blocks)
    numbers = [least(b, I64(n), last) for n in range(lanes)]
    of_weight = [[b.add(a, b.mul(n, s)) for a, s in zip(arrays, strides, strict=False)] for n in numbers]
    with counting(b, start, stop, 1) as block:
        for number, weights in enumerate(weight.read(r, of_weight, block, b.mul(strides[0], I64(lanes)))):
            inner = b.add(b.mul(b.sub(block, start), I64(BLOCK)), I64(lanes * number))
            for n, of_input in enumerate(_turned(r, list(weights))):
                r.put(of_input, b.add(written, b.mul(b.add(inner, I64(n)), I64(8 * lanes))))
    b.ret_void()
    return function


def _turned(r: Registers, registers: list[Any]) -> list[Any]:
    """V registers, of which each has one number of every one that is given."""
    unit = 1
    while unit < r.lanes:
        lower = [lane if not lane & unit else r.lanes + lane - unit for lane in range(r.lanes)]
        upper = [lane + unit if not lane & unit else r.lanes + lane for lane in range(r.lanes)]
        for n in range(r.lanes):
            if not n & unit:
                one, other = registers[n], registers[n | unit]
                registers[n], registers[n | unit] = r.picked(one, other, lower), r.picked(one, other, upper)
        unit *= 2
    return registers


def _many(module: Any, rows: int, lanes: int, *, cut: bool) -> Any:
    """A function (written, x, y, blocks, apart, out, begun, count): the sums of so many rows and 2 V outputs.

    `apart` bytes lie between two rows of x, and `out` numbers between two of y. Where what is written are not the first
    inputs, `begun`, it adds to what is there.

    Args:
        cut: of the outputs there are only `count`.
    """
    name = f"rows_{rows}_of_written" + "_cut" * cut
    function, b, (written, x, y, blocks, apart, out, begun, count) = internal(module, name, 8)
    r = Registers(b, lanes)
    x_rows, y_rows = (
        [place for (place,) in _apart(b, [first], [step], rows)]
        for first, step in ((x, apart), (y, b.mul(out, I64(4))))
    )
    sums = [r.zeros()] * (2 * rows)
    with counting(b, I64(0), b.mul(blocks, I64(BLOCK)), _UNROLLED, sums) as first:
        for n in range(_UNROLLED):
            at = b.add(written, b.mul(b.add(first, I64(n)), I64(8 * lanes)))
            weights = [r.at(b.add(at, I64(4 * lanes * half)), r.floats) for half in range(2)]
            for row, x_row in enumerate(x_rows):
                given = r.spread(r.at(b.add(x_row, b.mul(b.add(first, I64(n)), I64(4))), F32))
                for half, one in enumerate(weights):
                    sums[2 * row + half] = r.times(given, one, sums[2 * row + half])
    for row, y_row in enumerate(y_rows):
        for half in range(2):
            place = b.add(y_row, I64(4 * lanes * half))
            mask = r.below(b.sub(count, I64(lanes * half))) if cut else None
            before = b.select(b.icmp_signed("!=", begun, I64(0)), r.at(place, r.floats, mask), r.zeros())
            r.put(b.fadd(sums[2 * row + half], before), place, mask)
    b.ret_void()
    return function


def part_of(module: Any, weight: Weight, lanes: int) -> Any:
    """A function `part`, which is given the first output and the one behind the last, multiples of four; and how many
    rows, inputs and outputs there are, and where the two arrays of a weight, x and y lie.
    """
    function, b, given = taking(module, "part")
    start, stop, rows, width, out, *arrays, x, y = given
    blocks = b.sdiv(width, I64(BLOCK))
    strides = weight.strides(b, blocks)

    def beginning(j: Any) -> list[Any]:
        """Where an output of the weight begins in both arrays."""
        return [b.add(a, b.mul(j, s)) for a, s in zip(arrays, [*strides, I64(0)], strict=False)]

    def of_rows(row: Any, j: Any, block: Any) -> list[Any]:
        """Where x and y begin, of a row and an output, x from a block of inputs on."""
        x_row = b.add(b.add(x, b.mul(row, apart)), b.mul(block, I64(4 * BLOCK)))
        return [x_row, b.add(y, b.mul(b.add(b.mul(row, out), j), I64(4)))]

    apart = b.mul(width, I64(4))
    whole = _ROWS[lanes][0]
    written, copied = _space(b, 8 * lanes * BLOCK * _BLOCKS), _space(b, _ROOM + 4 * BLOCK * _BLOCKS * whole)
    few, many, end = (b.append_basic_block() for _ in range(3))
    b.cbranch(b.icmp_signed(">=", rows, I64(_MANY)), many, few)

    b.position_at_end(few)
    first: Any = I64(0)
    for count in range(_MANY - 1, 0, -1):
        last = b.add(first, b.mul(b.sdiv(b.sub(rows, first), I64(count)), I64(count)))
        sums = _few(module, weight, count, lanes)
        with counting(b, first, last, count) as row, counting(b, start, stop, STEP) as j:
            b.call(sums, [*beginning(j), *of_rows(row, j, I64(0)), blocks, out])
        first = last
    b.branch(end)

    b.position_at_end(many)
    write, outputs = _writing(module, weight, lanes), 2 * lanes
    kinds = {cut: [_many(module, count, lanes, cut=cut) for count in _ROWS[lanes]] for cut in (False, True)}
    # All of a weight's blocks in shares of about the same size, and as many rows of one as a thread keeps at hand.
    share = _shared(b, blocks, _shared(b, blocks, I64(_BLOCKS)))
    at_once = b.mul(b.add(b.sdiv(I64(_ROOM // 4 // BLOCK), b.mul(share, I64(whole))), I64(1)), I64(whole))
    fall = b.icmp_signed("==", b.and_(width, I64(_SPREAD - 1)), I64(0))
    behind = b.add(start, b.mul(b.sdiv(b.sub(stop, start), I64(outputs)), I64(outputs)))
    with (
        counting(b, I64(0), _shared(b, blocks, share), 1) as number,
        counting(b, I64(0), _shared(b, rows, at_once), 1) as turn,
    ):
        block, first_row = b.mul(number, share), b.mul(turn, at_once)
        read, bound = least(b, b.add(block, share), blocks), least(b, b.add(first_row, at_once), rows)
        x_first, _ = of_rows(first_row, I64(0), block)
        size = b.mul(b.sub(read, block), I64(4 * BLOCK))
        _copy(b, lanes, x_first, apart, copied, size, b.select(fall, b.sub(bound, first_row), I64(0)))
        x_first, x_apart = b.select(fall, copied, x_first), b.select(fall, size, apart)
        for cut, (begin, finish) in {False: (start, behind), True: (behind, stop)}.items():
            with counting(b, begin, finish, outputs) as j:
                for half in range(2):
                    j_now, place = b.add(j, I64(lanes * half)), b.add(written, I64(4 * lanes * half))
                    last = b.sub(b.sub(out, j_now), I64(1))
                    b.call(write, [*beginning(j_now), place, blocks, block, read, last])
                first = first_row
                for count, sums in zip(_ROWS[lanes], kinds[cut], strict=True):
                    last = b.add(first, b.mul(b.sdiv(b.sub(bound, first), I64(count)), I64(count)))
                    with counting(b, first, last, count) as row:
                        x_row = b.add(x_first, b.mul(b.sub(row, first_row), x_apart))
                        places = written, x_row, of_rows(row, j, block)[1]
                        b.call(sums, [*places, b.sub(read, block), x_apart, out, block, b.sub(finish, j)])
                    first = last
    b.branch(end)

    b.position_at_end(end)
    b.ret_void()
    return function


def _space(b: Any, size: int) -> Any:
    """The address of so many bytes of a thread's stack."""
    space = b.alloca(ir.ArrayType(I8, size))
    space.align = _LINE
    return b.ptrtoint(space, I64)


def _copy(b: Any, lanes: int, given: Any, apart: Any, found: Any, size: Any, rows: Any) -> None:
    """Copy so many bytes of each of some rows that lie `apart`, so that they lie one after the other."""
    r = Registers(b, lanes)
    with counting(b, I64(0), rows, 1) as row, counting(b, I64(0), size, 4 * lanes) as at:
        number = r.at(b.add(b.add(given, b.mul(row, apart)), at), r.floats)
        r.put(number, b.add(b.add(found, b.mul(row, size)), at))


def _shared(b: Any, count: Any, size: Any) -> Any:
    """How many shares of a size so many make, the last of which may be smaller."""
    return b.sdiv(b.add(count, b.sub(size, I64(1))), size)


@cache
def kernel_of_sixteen(lanes: int, *, brain: bool) -> int:
    """The address of a function `run` (see `four_bit_kernel.kernel`) of a weight in 16 bits, in place of codes."""
    parts = {"run": partial(part_of, weight=Sixteen(brain=brain), lanes=lanes)}
    return shared_kernels("sixteen", parts, STEP, uses=(__file__, registers.__file__), told=(lanes, brain))[0]
