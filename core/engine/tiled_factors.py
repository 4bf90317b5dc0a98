"""What adapters add to many tokens, by AMX: the tiles read tokens where they lie, and sums stay in float32.

    hidden    x A1^T + x A2^T               a float32 A is the sum of two bfloat16 parts; of one that is a bfloat16
    y        += h1 B1 + h2 B1 + h1 B2       number there is one, and what is multiplied with the other is left out

Where a layer's own product is made by tiles (`multiply/many.py`), that takes h1 and h2, and adds to y what they make.

x is bfloat16 as it is, and y that or float32. What is left out, h2 B2, is 2^-16 of the sum, so y is what a float32 sum
gives, rounded once, and weights that cancel do so. Each token's numbers are made by themselves.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lora_rt.core.multiply import four_bit
from lora_rt.core.native import openmp

_log = logging.getLogger("lora_rt.engine")

LEAST = 32
"""Tokens that are multiplied at a time; fewer are not."""

ROWS, INPUTS = 16, 32  # of a tile
_RANKS = 1 << 10  # of B: both parts of 32 tokens' hidden stand on each thread's stack, 128 KiB
_PARTS = 4  # for each thread
_WHICH = {torch.bfloat16: 1, torch.float32: 2}  # of the kernels, by the dtype of y


class Tiled(NamedTuple):
    """A factor (n, k): `tiles` (n / 16, parts, k / 32, 16 pairs of k, 16 n, 2), what lacks is 0."""

    tiles: Tensor
    n: int
    k: int


@cache
def are_there() -> bool:
    """Whether this processor has AMX, and its tiles give what they should."""
    if not four_bit.could_be_tiles():
        return False
    try:
        x, factor = torch.eye(64)[:40].bfloat16(), torch.arange(48 * 64).view(48, 64) / 1024
        tiled = laid_out(factor)
        hidden, y = hidden_of(x, tiled), torch.ones(40, 48, dtype=torch.bfloat16)
        other, wide = laid_out(torch.eye(48)), y.float()
        add(y, hidden, other)
        add(wide, hidden, other)
        return torch.equal(hidden, factor.T[:40]) and torch.equal(wide, 1 + hidden) and torch.equal(y, wide.bfloat16())
    except Exception as error:  # another release of llvmlite may refuse it in any way; others multiply as well
        _log.info("no tiles for adapters here: %s", error)
        return False


def fits(a: Sequence[int]) -> bool:
    """Whether a factor A of a shape (R, in) is read by tiles."""
    return len(a) == 2 and not a[1] % INPUTS


def takes(y: Tensor, b: Sequence[int]) -> bool:
    """Whether what a factor B of a shape (out, ranks) makes is added to a y (..., out) by tiles."""
    return y.dtype in _WHICH and y.is_contiguous() and are_outputs(b)


def are_outputs(b: Sequence[int]) -> bool:
    """Whether a factor B of a shape (out, ranks) is read by tiles."""
    return len(b) == 2 and not b[0] % ROWS and b[1] <= _RANKS


def laid_out(factor: Tensor) -> Tiled:
    """A float32 factor (n, k) as tiles are read."""
    n, k = factor.shape
    tiles_n, tiles_k = -(-n // ROWS), -(-k // INPUTS)
    whole = factor.new_zeros(tiles_n * ROWS, tiles_k * INPUTS)
    whole[:n, :k] = factor
    one = whole.bfloat16()
    other = (whole - one.float()).bfloat16()
    parts = torch.stack([one, other] if other.any() else [one])
    tiles = parts.view(len(parts), tiles_n, ROWS, tiles_k, INPUTS // 2, 2).permute(1, 0, 3, 4, 2, 5)
    return Tiled(tiles.contiguous(), n, k)


def hidden_of(x: Tensor, a: Tiled) -> Tensor:
    """x A^T, (..., R), float32, of a bfloat16 x (..., in) of 32 tokens or more.

    Raises:
        ValueError: x has another dtype, width or device, or fewer tokens; the kernel would read what is not there.
    """
    *rows, width = x.shape
    tokens = x.numel() // max(width, 1)
    if not _can_read(x, a):
        raise ValueError(f"{tuple(x.shape)} in {x.dtype} on {x.device} for a factor of {a.n} x {a.k}")
    x = x.contiguous()
    found = x.new_empty(*rows, len(a.tiles) * ROWS, dtype=torch.float32)
    sizes = len(a.tiles), width // INPUTS, tokens
    _run(a, 0, sizes, (a.tiles.data_ptr(), 2 * width, x.data_ptr(), found.data_ptr()))
    return found[..., : a.n]


def halves_of(x: Tensor, a: Tiled, gate: Tensor) -> Tensor:
    """gate * (x A^T) in two bfloat16 parts (tokens, 2, R + 32), R whole 32, of an x as `hidden_of` takes it.

    Numbers that lack are 0, and 32 of them lie behind each part: a product that begins within it reads no other's.

    Args:
        gate: (1, R) or (tokens, R), float32, as wide and 0 where ranks lack.

    Raises:
        ValueError: as `hidden_of`, or the gate has another shape.
    """
    tokens, width = x.numel() // max(x.shape[-1], 1), whole_ranks(a.n)
    fit = gate.shape in ((1, width), (tokens, width)) and gate.is_contiguous() and gate.dtype is torch.float32
    if not _can_read(x, a) or not fit or not gate.is_cpu:
        raise ValueError(f"{tuple(x.shape)} in {x.dtype}, a gate {tuple(gate.shape)} for a factor of {a.n} x {a.k}")
    x = x.contiguous()
    found, tiles = x.new_empty(tokens, 2, width + INPUTS), len(a.tiles)
    found[:, :, tiles * ROWS :] = 0
    of_gate = 0 if len(gate) == 1 else 4 * width
    sizes = tiles, a.k // INPUTS, tokens
    places = a.tiles.data_ptr(), 2 * a.k, x.data_ptr(), found.data_ptr(), gate.data_ptr(), of_gate, 4 * (width + INPUTS)
    _run(a, 3, sizes, places)
    return found


def whole_ranks(ranks: int) -> int:
    """So many, rounded up to whole tiles of inputs."""
    return -(-ranks // INPUTS) * INPUTS


def add(y: Tensor, hidden: Tensor, b: Tiled) -> Tensor:
    """y + hidden B^T in the memory of y (..., out), of bfloat16 rounded once, or of float32.

    Args:
        hidden: (..., ranks), float32.

    Raises:
        ValueError: they have other dtypes, shapes or layouts.
    """
    flat = hidden.flatten(0, -2)
    ranks, apart = flat.shape[1], flat.stride(0)
    fit = y.dtype in _WHICH and flat.dtype is torch.float32 and y.is_cpu and flat.is_cpu and y.is_contiguous()
    if not fit or y.shape != (*hidden.shape[:-1], b.n) or ranks != b.k or flat.stride(1) != 1 or b.n % ROWS:
        raise ValueError(f"hidden {tuple(hidden.shape)} and a factor of {b.n} x {b.k} for {y.dtype} {tuple(y.shape)}")
    sizes = len(b.tiles), ranks, len(flat)
    _run(b, _WHICH[y.dtype], sizes, (b.tiles.data_ptr(), 4 * apart, flat.data_ptr(), y.data_ptr()))
    return y


def _can_read(x: Tensor, a: Tiled) -> bool:
    width = x.shape[-1]
    fit = x.dtype is torch.bfloat16 and x.is_cpu and width == a.k and not width % INPUTS
    return fit and x.numel() >= LEAST * width


def _run(factor: Tiled, which: int, sizes: tuple[int, ...], places: tuple[int, ...]) -> None:
    if not all(places[:4]):  # a fake tensor says that it lies at 0
        raise ValueError("there is no memory to be read, or written to")
    threads = torch.get_num_threads()
    parts = _PARTS * threads if threads > 1 else 1
    given = 0, parts, *sizes, *places
    openmp.run(openmp.team(), _kernels(factor.tiles.shape[1])[which], (ctypes.c_int64 * len(given))(*given), threads)


@cache
def _kernels(parts: int) -> tuple[int, int, int, int]:
    from lora_rt.core.engine.tiled_kernel import kernels

    return kernels(parts)
