"""Factors as AMX reads them, laid out for a set of adapters from where the residents keep them.

    tiles    (n / 16, parts, k / 32, 16, 16, 2)    of a factor (n, k) the number at n, k stands at
             [n // 16, part, k // 32, k % 32 // 2, n % 16, k % 2]

To stack the factors first and to lay out the stack by a dozen of torch's operations took 40 ms for a set of two.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lora_rt.core.engine.tiled_factors import INPUTS, ROWS, Tiled, laid_out
from lora_rt.core.native import compiled

_log = logging.getLogger("lora_rt.engine")


def rows_as_tiles(parts: tuple[Tensor, ...]) -> Tiled:
    """A (R, in) of float32 parts (r, in), one below the other; `in` is a multiple of 32."""
    return _as_tiles(parts, sum(part.shape[0] for part in parts), parts[0].shape[1], by_rows=True)


def columns_as_tiles(parts: tuple[Tensor, ...]) -> Tiled:
    """B (out, ranks) of float32 parts (out, r), side by side; `out` is a multiple of 16."""
    return _as_tiles(tuple(part.T for part in parts), len(parts[0]), sum(p.shape[1] for p in parts), by_rows=False)


def _as_tiles(parts: Sequence[Tensor], n: int, k: int, *, by_rows: bool) -> Tiled:
    loops = _loops() if compiled.is_loaded() else None
    if loops is None:  # by torch's operations it takes some milliseconds longer
        whole = torch.cat(list(parts))
        return laid_out(whole if by_rows else whole.T)
    parts = [part.contiguous() for part in parts]
    starts = np.array([part.data_ptr() for part in parts], np.int64)
    counts = np.array([part.shape[0] for part in parts], np.int64)
    for several in (1, 2):
        tiles = torch.zeros(-(-n // ROWS), several, -(-k // INPUTS), INPUTS // 2, ROWS, dtype=torch.int32, device="cpu")
        if not loops[by_rows](starts, counts, k if by_rows else n, tiles.numpy().view(np.uint32)):
            break
    return Tiled(tiles.view(torch.bfloat16).view(*tiles.shape, 2), n, k)


@cache
def _loops() -> tuple[Callable[..., bool], Callable[..., bool]] | None:
    """By columns and by rows, compiled and tried; None where they can't be."""
    try:
        from lora_rt.core.engine.tiled_loops import columns_into, rows_into

        factor, tiles = np.ones((ROWS, INPUTS), np.float32), np.zeros((1, 1, 1, INPUTS // 2, ROWS), np.uint32)
        start, count = np.array([factor.ctypes.data]), np.array([ROWS])
        if rows_into(start, count, INPUTS, tiles) or not (tiles == 0x3F803F80).all():
            return None
        columns_into(start, count, INPUTS, np.zeros((2, 1, 1, INPUTS // 2, ROWS), np.uint32))
    except Exception as error:  # another release of numba may refuse it in any way
        _log.info("no loops for tiles here: %s", error)
        return None
    return columns_into, rows_into
