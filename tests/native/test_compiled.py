"""What numba has compiled is kept in the home, and nothing hangs on what lies there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_rt.core.native import compiled

pytestmark = pytest.mark.skipif(not compiled.is_there(), reason="numba is not installed")


def doubled(x: float) -> float:
    return 2 * x


def made(home: Path) -> tuple[Any, set[str]]:
    """The function, called once, and the files that it has left."""
    function = compiled.compiled(any_order=True)(doubled)
    assert function(4.0) == 8.0
    return function, {path.name for path in home.rglob("*.nb?")}


def hits(function: Any) -> int:
    """How many versions were found in the home."""
    return sum(function.stats.cache_hits.values())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_RT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_it_is_found_again_and_numba_keeps_what_is_not_ours_elsewhere(home: Path) -> None:
    from numba import config

    before = config.CACHE_DIR
    first, files = made(home)
    second, _ = made(home)
    assert (hits(first), hits(second)) == (0, 1)
    assert {name.rpartition(".")[2] for name in files} == {"nbi", "nbc"}
    assert before == config.CACHE_DIR


@pytest.mark.parametrize("kind", ["*.nbi", "*.nbc", "*.nb?"])
@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:50], lambda content: b"x" + content])
def test_what_is_damaged_is_compiled_again(home: Path, kind: str, damage: Callable[[bytes], bytes]) -> None:
    made(home)
    for path in home.rglob(kind):
        path.write_bytes(damage(path.read_bytes()))
    assert hits(made(home)[0]) == 0
    assert hits(made(home)[0]) == 1


def test_a_home_that_cannot_be_written_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_RT_HOME", str(tmp_path / "file" / "home"))
    assert made(tmp_path)[1] == set()


def called(argument: float) -> float:
    return 3 * argument


def back(home: Path) -> set[str]:
    """A function for C, called once, and the files that it has left."""
    found = compiled.callback("float64(float64)", uses=[__file__])(called)
    assert found.ctypes(2.0) == 6.0
    return {path.name for path in home.rglob("*.nb?")}


@pytest.mark.parametrize("damage", [None, lambda content: b"", lambda content: content[:50]])
def test_what_c_calls_is_kept_and_made_again_where_it_is_damaged(home: Path, damage: Any) -> None:
    from numba import config

    before = config.CACHE_DIR
    assert {name.rpartition(".")[2] for name in back(home)} == {"nbi", "nbc"}
    for path in home.rglob("*.nb?"):
        path.write_bytes(damage(path.read_bytes()) if damage else path.read_bytes())
    times = {path: path.stat().st_mtime_ns for path in home.rglob("*.nbc")}
    back(home)
    again = back(home)
    assert {name.rpartition(".")[2] for name in again} == {"nbi", "nbc"}
    assert before == config.CACHE_DIR
    if damage is None:
        assert times == {path: path.stat().st_mtime_ns for path in home.rglob("*.nbc")}


def test_what_c_calls_is_compiled_though_nothing_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_RT_HOME", str(tmp_path / "file" / "home"))
    assert back(tmp_path) == set()


def test_no_machine_code_calls_a_function_that_another_file_may_bring(home: Path) -> None:
    import numpy as np

    @compiled.compiled(any_order=True, kept=False)
    def smoothed(x: Any, y: Any) -> float:  # too long to be built in by itself, five times
        total = 0.0
        for i in range(1, len(x) - 1):
            total += (x[i - 1] * y[i] + x[i] * y[i + 1] + x[i + 1] * y[i - 1]) / (1.0 + x[i] * x[i] + abs(y[i]))
            total += np.sqrt(abs(x[i])) * np.floor(y[i]) - x[i - 1] * x[i + 1] / (2.0 + y[i - 1] * y[i - 1])
        for i in range(0, len(x), 3):
            total -= x[i] / (1.0 + y[i] * y[i])
        return total

    @compiled.compiled(any_order=True)
    def called_often(x: Any, y: Any) -> float:
        return (
            smoothed(x, y) + smoothed(y, x) * smoothed(x[1:], y[1:]) - smoothed(y[2:], x[2:]) + smoothed(x[3:], y[3:])
        )

    x = np.ones(9)
    assert called_often(x, x) == called_often(x, x)
    (code,) = called_often.inspect_llvm().values()
    assert [name for name in re.findall(r"^define .*@(\S+)\(", code, re.MULTILINE) if "smoothed" in name] == []
