"""Parts that threads share: each output is in one of them, and a part is never of less than one."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from llvmlite import ir

from lora_rt.core.native import openmp
from lora_rt.core.native.machine_code import addresses_of, shared_by_threads
from lora_rt.core.native.registers import I64
from lora_rt.registry import home

UNTOUCHED = -77


def run(outputs: int, unit: int, parts: int) -> list[int]:
    """At the place of a part's first output how many it has, of a kernel that writes just that."""

    def build() -> ir.Module:
        module = ir.Module("sharing")
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64.as_pointer()]), "part")
        b = ir.IRBuilder(function.append_basic_block())
        start, stop, place = (b.load(b.gep(function.args[0], [I64(number)])) for number in (0, 1, 8))
        to = b.inttoptr(b.add(place, b.mul(start, I64(8))), I64.as_pointer())
        b.store(b.sub(stop, start), to)
        b.ret_void()
        shared_by_threads(module, function, unit)
        return module

    (address,) = addresses_of(build, "run", uses=[__file__], told=unit)
    found = (ctypes.c_int64 * 256)(*[UNTOUCHED] * 256)
    arguments = (ctypes.c_int64 * 9)(0, parts, 0, 0, outputs, 0, 0, 0, ctypes.addressof(found))
    openmp.run(None, address, arguments, 1)
    return list(found)


@pytest.mark.parametrize(("outputs", "unit", "parts"), [(4, 1, 8), (128, 32, 8), (100, 16, 3), (33, 32, 64), (1, 1, 1)])
def test_parts_behind_the_last_output_are_left_alone(
    outputs: int, unit: int, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of less than no outputs a part's room on the stack would be less than nothing, and a signal would find it."""
    monkeypatch.setattr(home, "home", lambda: tmp_path)
    found = run(outputs, unit, parts)
    begun = {start: count for start, count in enumerate(found) if count != UNTOUCHED}
    assert sum(begun.values()) == outputs
    assert all(count > 0 and start % unit == 0 for start, count in begun.items())
