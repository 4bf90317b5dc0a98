"""What is compiled in LLVM's terms is kept in the home, and never run where it is not whole."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llvmlite")

from llvmlite import ir

from lora_rt.core.native import machine_code
from lora_rt.core.native.machine_code import addresses_of
from lora_rt.core.native.registers import I64


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_RT_HOME", str(tmp_path))
    return tmp_path


def answer(number: int, built: list[int], told: object = None) -> int:
    """What a compiled function gives that gives this number; when it is built, that is noted."""

    def build() -> Any:
        built.append(number)
        module = ir.Module("answer")
        function = ir.Function(module, ir.FunctionType(I64, []), "answer")
        ir.IRBuilder(function.append_basic_block()).ret(I64(number))
        return module

    (address,) = addresses_of(build, "answer", uses=(__file__,), told=number if told is None else told)
    return int(ctypes.CFUNCTYPE(ctypes.c_int64)(address)())


def test_it_is_compiled_once_for_what_is_told_and_its_sources(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    assert [answer(42, built), answer(7, built), answer(42, built)] == [42, 7, 42]
    assert built == [42, 7]
    assert len([*home.rglob("*.o")]) == 2
    monkeypatch.setattr(machine_code.binding, "get_host_cpu_name", lambda: "x86-64-v3")
    assert answer(42, built) == 42
    assert built == [42, 7, 42]


@pytest.mark.parametrize(
    "damage", [lambda code: code[:-9], lambda code: b"", lambda code: code[:40] + b"x" + code[41:]]
)
def test_what_is_damaged_is_compiled_again_and_not_run(home: Path, damage: Callable[[bytes], bytes]) -> None:
    built: list[int] = []
    answer(42, built)
    (kept,) = home.rglob("*.o")
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert answer(42, built) == 42
    assert built == [42, 42]
    assert kept.read_bytes() == whole
    assert answer(42, built) == 42
    assert built == [42, 42]


def test_a_home_that_cannot_be_written_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LORA_RT_HOME", str(tmp_path / "file"))
    built: list[int] = []
    assert [answer(42, built), answer(42, built)] == [42, 42]
    assert built == [42, 42]
