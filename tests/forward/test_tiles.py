"""Products of a few rows in tiles: numpy's own numbers, nothing written beside them, the same bits in every tile."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from support.features import lacks

numba = pytest.importorskip("numba")
tiles = pytest.importorskip("lora_rt.core.forward.tiles")

# LLVM makes a program of each test's own.
pytestmark = pytest.mark.slow

SHAPES = [(1, 1, 1), (1, 33, 16), (2, 7, 17), (3, 64, 5), (4, 9, 32), (7, 33, 50), (8, 40, 96), (13, 3, 31)]


@pytest.fixture(scope="module")
def run() -> Any:
    multiply, add_some = tiles.multiply, tiles.add_some

    @numba.njit(error_model="numpy")
    def called(add: bool, x: int, m: int, y: int, steps: Any, rows: int, k: int, n: int, places: int) -> None:
        if add:
            add_some(x, steps[0], m, steps[1], y, steps[2], rows, k, n, places)
        else:
            multiply(x, steps[0], m, steps[1], y, steps[2], rows, k, n, places)

    def product(x: Any, m: Any, y: Any, kept: Any = None) -> None:
        steps = np.array([x.strides[0], m.strides[0], y.strides[0]])
        kept = np.empty(0, np.int64) if kept is None else np.array(kept, np.int64)
        count = len(kept) or x.shape[1]
        at = (one.ctypes.data for one in (x, m, y))
        called(bool(len(kept)), *at, steps, len(x), count, m.shape[1], kept.ctypes.data)

    return product


@pytest.mark.parametrize(("rows", "k", "n"), SHAPES)
def test_a_product_writes_what_it_has_to_and_nothing_beside_it(run: Any, rows: int, k: int, n: int) -> None:
    random = np.random.default_rng(0)
    x, m = (random.standard_normal(shape, dtype=np.float32) for shape in ((rows, k + 3), (k, n + 2)))
    around = np.full((rows, n + 40), 7, np.float32)
    run(x[:, :k], m[:, :n], around[:, 3 : 3 + n])
    assert np.allclose(around[:, 3 : 3 + n], x[:, :k] @ m[:, :n], atol=1e-4)
    around[:, 3 : 3 + n] = 7
    assert (around == 7).all()


@pytest.mark.parametrize(("rows", "k", "n"), SHAPES)
def test_some_of_the_k_are_added(run: Any, rows: int, k: int, n: int) -> None:
    random = np.random.default_rng(1)
    x, m, y = (random.standard_normal(shape, dtype=np.float32) for shape in ((rows, k), (k, n), (rows, n)))
    kept = sorted(random.choice(k, max(1, k // 2), replace=False))
    m[[one for one in range(k) if one not in kept]] = np.nan  # which are not read
    wanted = y + x[:, kept] @ m[kept]
    run(x, m, y, kept)
    assert np.allclose(y, wanted, atol=1e-4)


@pytest.mark.parametrize("rows", [2, 5, 9])
def test_what_one_row_adds_does_not_touch_the_others_whatever_it_is(run: Any, rows: int) -> None:
    x, m = np.eye(rows, dtype=np.float32), np.ones((rows, 40), np.float32)
    m[1], m[0, 3] = np.nan, np.inf
    y = np.zeros((rows, 40), np.float32)
    run(x, m, y, range(rows))
    assert np.isnan(y[1]).all()
    assert np.isinf(y[0, 3])
    y[1], y[0, 3] = 1, 1
    assert (y == 1).all()


def test_a_row_has_the_same_bits_whatever_rows_stand_beside_it(run: Any) -> None:
    random = np.random.default_rng(2)
    x, m = (random.standard_normal(shape, dtype=np.float32) for shape in ((15, 70), (70, 61)))
    together = np.zeros((15, 61), np.float32)
    run(x, m, together)
    for row in range(15):
        alone = np.zeros((1, 61), np.float32)
        run(x[row : row + 1], m, alone)
        assert np.array_equal(alone[0], together[row])


def halved(m: Any) -> tuple[Any, Any]:
    """The bits of a matrix in bfloat16, and what they mean."""
    bits = (m.view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture(scope="module")
def of_one_row() -> Any:
    """x, m, y, narrow -> y += x M; and m, x, sums, narrow -> the first sums of x and the rows of m."""
    row, narrow_row, dots, narrow_dots = tiles.add_row, tiles.add_narrow_row, tiles.dots, tiles.narrow_dots

    @numba.njit(error_model="numpy")
    def added(x: int, m: int, step: int, y: int, k: int, n: int, narrow: bool) -> None:
        if narrow:
            narrow_row(x, m, step, y, k, n)
        else:
            row(x, m, step, y, k, n)

    @numba.njit(error_model="numpy")
    def dotted(x: int, m: int, step: int, last: int, parts: int, rest: int, sums: int, narrow: bool) -> None:
        if narrow:
            narrow_dots(x, m, step, last, parts, rest, sums)
        else:
            dots(x, m, step, last, parts, rest, sums)

    def add(x: Any, m: Any, y: Any) -> None:
        narrow = m.dtype == np.uint16
        added(x.ctypes.data, m.ctypes.data, m.strides[0], y.ctypes.data, *m.shape, narrow)

    def dot(m: Any, x: Any, sums: Any) -> None:
        parts, rest = divmod(len(x), tiles.LANES)
        given = x.ctypes.data, m.ctypes.data, m.strides[0], len(m) - 1, parts, rest, sums.ctypes.data
        dotted(*given, m.dtype == np.uint16)

    return add, dot


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("k", "n"), [(1, 16), (3, 64), (8, 100), (2, 5), (5, 192)])
def test_a_row_is_added_to_by_a_matrix_in_either_width(of_one_row: Any, k: int, n: int, narrow: bool) -> None:
    random = np.random.default_rng(4)
    x, m = (random.standard_normal(shape, dtype=np.float32) for shape in (k, (k, n)))
    given, meant = halved(m) if narrow else (m, m)
    around = np.full(n + 32, 7, np.float32)
    of_one_row[0](x, given, around[:n])
    assert np.allclose(around[:n], 7 + x @ meant, atol=1e-5)
    assert (around[n:] == 7).all()


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("width", [16, 64, 70, 5])
def test_sums_of_a_row_are_made_four_at_a_time(of_one_row: Any, rows: int, width: int, narrow: bool) -> None:
    random = np.random.default_rng(5)
    m, x = (random.standard_normal(shape, dtype=np.float32) for shape in ((rows, width), width))
    given, meant = halved(m) if narrow else (m, m)
    sums = np.full(6, 7, np.float32)
    of_one_row[1](given, x, sums)
    assert np.allclose(sums[:rows], meant @ x, atol=1e-5)
    assert (sums[4:] == 7).all()


@pytest.mark.parametrize("narrow", [False, True])
def test_what_threads_share_has_the_same_bits_however_it_is_shared(of_one_row: Any, narrow: bool) -> None:
    """Ranks four by four, and outputs in parts of sixteen."""
    add, dot = of_one_row
    random = np.random.default_rng(6)
    m, x = random.standard_normal((8, 176), dtype=np.float32), random.standard_normal(176, dtype=np.float32)
    given = halved(m)[0] if narrow else m
    whole, alone = np.empty((2, 4), np.float32), np.empty((8, 4), np.float32)
    for first in (0, 4):
        dot(given[first:], x, whole[first // 4])
    for row in range(8):
        dot(given[row : row + 1], x, alone[row])
    assert np.array_equal(whole.ravel(), alone[:, 0])
    together, apart = np.ones(176, np.float32), np.ones(176, np.float32)
    add(x, given, together)
    for first, last in ((0, 16), (16, 112), (112, 176)):
        add(x, given[:, first:last], apart[first:last])
    assert np.array_equal(together, apart)


@pytest.fixture(scope="module")
def attend() -> Any:
    from lora_rt.core.forward import kernels

    seen_places, attend_head = kernels.seen_places, kernels.attend_head

    @numba.njit(error_model="numpy")
    def called(query: Any, keys: Any, values: Any, size: int, seen: Any, places: Any, scores: Any, answer: Any) -> None:
        count = seen_places(seen, places)
        scaling = np.float32(0.25)
        attend_head(query, keys, size, values, size, places, count, scaling, scores, answer, keys)

    def answer_of(query: Any, keys: Any, values: Any, seen: Any) -> Any:
        columns, size = keys.shape
        room = kernels.room_of.py_func(columns)
        places, scores, answer = np.empty(room, np.int64), np.empty(room, np.float32), np.empty(size, np.float32)
        called(query, keys.ravel(), values.ravel(), size, seen.view(np.uint8), places, scores, answer)
        return answer

    return answer_of


@pytest.mark.parametrize("size", [8, 16, 24, 64, 80])
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 33])
def test_heads_of_any_size_look_at_what_their_row_sees(attend: Any, size: int, columns: int) -> None:
    random = np.random.default_rng(3)
    query = random.standard_normal(size, dtype=np.float32)
    keys, values = (random.standard_normal((columns, size), dtype=np.float32) for _ in range(2))
    seen = random.random(columns) < 0.6
    seen[-1] = True
    keys[~seen] = values[~seen] = np.nan
    chances = np.exp(0.25 * keys[seen] @ query)
    wanted = chances @ values[seen] / chances.sum()
    assert np.allclose(attend(query, keys, values, seen), wanted, atol=1e-5)
    narrow = [(one.view(np.uint32) >> 16).astype(np.uint16) for one in (keys, values)]
    wide = [(one[seen].astype(np.uint32) << 16).view(np.float32) for one in narrow]
    chances = np.exp(0.25 * wide[0] @ query)
    found = attend(query, *narrow, seen)
    assert np.allclose(found, chances @ wide[1] / chances.sum(), rtol=0.005, atol=1e-5)


def test_a_head_without_a_number_says_so(attend: Any) -> None:
    keys = np.ones((20, 32), np.float32)
    keys[11, 5] = np.nan
    assert np.isnan(attend(np.ones(32, np.float32), keys, np.ones_like(keys), np.ones(20, bool))).all()


_WITH_EIGHT = """
import sys, pytest
from lora_rt.core.multiply import four_bit
four_bit._lanes = lambda: 8
from lora_rt.core.forward import tiles
assert tiles.LANES == 8
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:schemathesis", "-k", "not processor", sys.argv[1]]))
"""


@pytest.mark.skipif(tiles.LANES == 8, reason=lacks("AVX-512"))
def test_a_processor_without_avx512_does_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", _WITH_EIGHT, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "100%" in done.stdout
