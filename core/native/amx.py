"""Tiles of Intel's AMX in LLVM's terms: registers of sixteen rows of 64 bytes, and products of two of them.

    C (16, 16) float32 += A (16 outputs, 32 inputs) bfloat16 . B (16 pairs of inputs, 16 rows of x, 2) bfloat16

Each number of C is summed up by itself, whatever stands in the other rows and columns, and how many of these count.
Numbers below float32's smallest normal one are taken for 0.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features

from lora_rt.core.native.registers import BF16, I8, I16, I32, I64, Registers

_log = logging.getLogger("lora_rt.base")

ROWS = 16
"""Rows of a tile."""
LINE = 64  # bytes of a row, and between two rows in memory
NBYTES = ROWS * LINE

_TILES = 8
_NEEDED = ("amx-tile", "amx-bf16", "avx512f", "avx512bw", "avx512bf16")
_SYSCALL, _ASK, _DATA = 158, 0x1023, 18  # of Linux on x86-64: arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA


@cache
def are_there() -> bool:
    """Whether this processor has tiles of bfloat16, and the kernel lets this process use them."""
    try:
        features = get_host_cpu_features()
    except RuntimeError:
        return False
    if sys.platform != "linux" or not all(features.get(name) for name in _NEEDED):
        return False
    refused: int = ctypes.CDLL(None).syscall(_SYSCALL, _ASK, _DATA)
    if refused:
        _log.info("this process may not use the processor's AMX tiles")
    return not refused


def check() -> None:
    """To be called before what is built here is run: without the leave of the system its first tile ends the process.

    Raises:
        RuntimeError: there are no tiles.
    """
    if not are_there():
        raise RuntimeError("this processor has no AMX tiles, or this process may not use them")


def room(b: Any, size: Any) -> Any:
    """So many bytes of the stack, from the beginning of a line on."""
    at = b.ptrtoint(b.alloca(I8, b.add(size, I64(LINE))), I64)
    return b.and_(b.add(at, I64(LINE - 1)), I64(-LINE))


class Tiles(Registers):
    """Tiles by their numbers 0 to 7, beside registers of sixteen float32."""

    pairs = ir.VectorType(I32, 16)  # of bfloat16
    narrow = ir.VectorType(I16, 32)  # the bits of bfloat16

    def __init__(self, builder: Any) -> None:
        super().__init__(builder, 16)

    def zero(self, tile: int) -> None:
        self.call("llvm.x86.tilezero", ir.VoidType(), I8(tile))

    def load(self, tile: int, address: Any, apart: Any = None) -> None:
        """Read sixteen rows that lie so many bytes apart, `LINE` where nothing is said."""
        self.call("llvm.x86.tileloadd64", ir.VoidType(), I8(tile), self._at(address), apart or I64(LINE))

    def store(self, tile: int, address: Any, apart: Any = None) -> None:
        """Write sixteen rows, as `load` reads them."""
        self.call("llvm.x86.tilestored64", ir.VoidType(), I8(tile), self._at(address), apart or I64(LINE))

    def dot(self, total: int, one: int, other: int) -> None:
        """C += A . B, of the tiles' numbers."""
        self.call("llvm.x86.tdpbf16ps", ir.VoidType(), I8(total), I8(one), I8(other))

    def narrowed(self, low: Any, high: Any) -> Any:
        """The bits of sixteen float32 and sixteen more, rounded to bfloat16, half to even."""
        kind = ir.VectorType(BF16, 32)
        made = self.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", kind, high, low)
        return self.builder.bitcast(made, self.narrow)

    def transposed(self, rows: Sequence[Any]) -> list[Any]:
        """Sixteen registers of sixteen numbers, rows and columns changed."""
        low = [place for lane in range(8) for place in (lane, lane + 16)]
        high = [place + 8 for place in low]
        now = list(rows)
        for _ in range(4):  # each time two registers that are eight apart become one after the other
            pairs = list(zip(now[:8], now[8:], strict=True))
            now = [self.picked(*pair, half) for pair in pairs for half in (low, high)]
        return now

    def put_transposed(self, rows: Sequence[Any], address: Any) -> None:
        """Write sixteen registers of sixteen numbers, rows and columns changed, one behind the other."""
        for n, row in enumerate(self.transposed(rows)):
            self.put(row, self.builder.add(address, I64(LINE * n)))

    @contextmanager
    def configured(self) -> Iterator[None]:
        """What is built in the block has eight full tiles; behind it they are as somebody else had set them."""
        b = self.builder
        own, before = (b.alloca(I8, I64(LINE)) for _ in range(2))
        wanted = bytearray(LINE)  # the palette; from byte 16 on bytes of a row, from byte 48 on rows
        wanted[0] = 1
        for tile in range(_TILES):
            wanted[16 + 2 * tile], wanted[48 + tile] = LINE, ROWS
        b.store(
            ir.Constant(ir.ArrayType(I8, LINE), wanted), b.bitcast(own, ir.ArrayType(I8, LINE).as_pointer()), align=1
        )
        self.call("llvm.x86.sttilecfg", ir.VoidType(), before)
        self.call("llvm.x86.ldtilecfg", ir.VoidType(), own)
        yield
        self.call("llvm.x86.ldtilecfg", ir.VoidType(), before)

    def _at(self, address: Any) -> Any:
        return self.builder.inttoptr(address, I8.as_pointer())
