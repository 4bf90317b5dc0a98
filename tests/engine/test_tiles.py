"""Products of a few rows in tiles: numpy's own numbers, nothing written beside them, the same bits in every tile."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

numba = pytest.importorskip("numba")
tiles = pytest.importorskip("lora_rt.core.engine.tiles")

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


def test_a_row_has_the_same_bits_whatever_rows_stand_beside_it(run: Any) -> None:
    random = np.random.default_rng(2)
    x, m = (random.standard_normal(shape, dtype=np.float32) for shape in ((15, 70), (70, 61)))
    together = np.zeros((15, 61), np.float32)
    run(x, m, together)
    for row in range(15):
        alone = np.zeros((1, 61), np.float32)
        run(x[row : row + 1], m, alone)
        assert np.array_equal(alone[0], together[row])
