"""What adapters add to many tokens, by AMX: tokens and factors are read where they lie, and sums stay in float32.

    hidden    x A1^T + x A2^T               a float32 A is the sum of two bfloat16 parts; of one that is a bfloat16
    y        += h1 B1 + h2 B1 + h1 B2       number there is one, and what is multiplied with the other is left out

Where a layer's own product is made by tiles (`multiply/many.py`), that takes h1 and h2, and adds to y what they make.

x is bfloat16 as it is, and y that or float32. What is left out, h2 B2, is 2^-16 of the sum, so y is what a float32 sum
gives, rounded once, and weights that cancel do so. Each token's numbers are made by themselves. The tokens may be those
of several lanes, equally many of each, whose factors are their own.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lora_rt.core.multiply import four_bit
from lora_rt.core.multiply.many import Ranks, can_add, ranks_of
from lora_rt.core.native import openmp

LEAST = 32
"""Tokens of a lane that are multiplied at a time; fewer are not."""

ROWS, INPUTS = 16, 32  # of a tile
_WIDEST = 3 << 13  # inputs: in two parts, sixteen ranks of so many are 1.5 MiB of a thread's stack
_HIDDEN, _HALVES, _ADDED = range(3)  # of the kernels; behind it y in float32
_WHICH = {torch.bfloat16: _ADDED, torch.float32: _ADDED + 1}


@four_bit.proven("no tiles for adapters")
def are_there() -> bool:
    """Whether this processor has AMX, and its tiles give what they should."""
    if not four_bit.could_be_tiles():
        return False
    usual: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the process takes for that
    x, factor = torch.eye(64, **usual)[:40].bfloat16(), torch.arange(48 * 64, **usual).view(48, 64) / 1024
    ranks = ranks_of([factor])
    hidden, wide = hidden_of(x, ranks), torch.ones(40, 48, **usual)
    gated = halves_of(x, ranks, torch.ones(1, 64, **usual)).float().sum(1)[:, :48]
    other, y = ranks_of([torch.eye(48, **usual)]), wide.bfloat16()
    add(y, hidden, other)
    add(wide, hidden, other)
    exact = torch.equal(hidden, factor.T[:40]) and torch.equal(gated, hidden)
    return exact and torch.equal(wide, 1 + hidden) and torch.equal(y, wide.bfloat16())


def reads(x: Tensor, lanes: int = 1) -> bool:
    """Whether an x is multiplied by AMX: of many tokens, in bfloat16 on a CPU, where no gradient is wanted.

    A fake one has no memory to be read; what it takes is estimated by torch's own operations.
    """
    if type(x) is not Tensor or x.dtype is not torch.bfloat16 or not x.is_cpu or torch.is_grad_enabled():
        return False
    return x.numel() >= LEAST * lanes * x.shape[-1] and are_there()


def fits(a: Sequence[int]) -> bool:
    """Whether a factor A of a shape (R, in) is read by tiles."""
    return len(a) == 2 and not a[1] % INPUTS and a[1] <= _WIDEST


def takes(y: Tensor, b: Sequence[int]) -> bool:
    """Whether what a factor B of a shape (out, ranks) makes is added to a y (..., out) by tiles."""
    return y.dtype in _WHICH and y.is_cpu and y.is_contiguous() and are_outputs(b)


def are_outputs(b: Sequence[int]) -> bool:
    """Whether a factor B of a shape (out, ranks) is read by tiles."""
    return len(b) == 2 and not b[0] % ROWS and can_add(b[1])


def whole_ranks(ranks: int) -> int:
    """So many, rounded up to whole tiles of inputs."""
    return math.ceil(ranks / INPUTS) * INPUTS


def hidden_of(x: Tensor, a: Ranks) -> Tensor:
    """x A^T, (..., R), float32, of a bfloat16 x (..., in) of 32 tokens or more in each lane.

    Raises:
        ValueError: x has another dtype, width or device, or fewer tokens; the kernel would read what is not there.
    """
    x = _checked(x, a)
    found = x.new_empty(*x.shape[:-1], math.ceil(a.rank / ROWS) * ROWS, dtype=torch.float32)
    _run(_HIDDEN, a, found.shape[-1] // ROWS, a.width // INPUTS, x, found, 4 * found.shape[-1])
    return found[..., : a.rank]


def halves_of(x: Tensor, a: Ranks, gate: Tensor) -> Tensor:
    """gate * (x A^T) in two bfloat16 parts (tokens, 2, R + 32), R whole 32, of an x as `hidden_of` takes it.

    Numbers that lack are 0, and 32 of them lie behind each part: a product that begins within it reads no other's.

    Args:
        gate: (1, R) or (tokens, R), float32, as wide and 0 where ranks lack.

    Raises:
        ValueError: as `hidden_of`, or the gate has another shape.
    """
    x, width = _checked(x, a), whole_ranks(a.rank)
    tokens = x.numel() // a.width
    fit = gate.shape in ((1, width), (tokens, width)) and gate.is_contiguous() and gate.dtype is torch.float32
    if not fit or not gate.is_cpu:
        raise ValueError(f"a gate {tuple(gate.shape)} in {gate.dtype} for {tokens} tokens of {a.rank} ranks")
    tiles = math.ceil(a.rank / ROWS)
    found = x.new_empty(tokens, 2, width + INPUTS)
    found[:, :, tiles * ROWS :] = 0
    of_gate = 0 if len(gate) == 1 else 4 * width
    _run(_HALVES, a, tiles, a.width // INPUTS, x, found, 4 * (width + INPUTS), gate.data_ptr(), of_gate)
    return found


def add(y: Tensor, hidden: Tensor, b: Ranks) -> Tensor:
    """y + hidden B^T in the memory of y (..., out), of bfloat16 rounded once, or of float32.

    Args:
        hidden: (..., ranks), float32.

    Raises:
        ValueError: they have other dtypes, shapes or layouts, or there are fewer than 32 tokens in a lane.
    """
    lanes, whole = b.places.shape
    tokens, ranks = hidden.numel() // hidden.shape[-1], hidden.shape[-1]
    fit = y.dtype in _WHICH and hidden.dtype is torch.float32 and y.is_cpu and hidden.is_cpu and y.is_contiguous()
    shaped = y.shape == (*hidden.shape[:-1], b.width) and ranks == b.rank and are_outputs((b.width, ranks))
    if not fit or not shaped or not _in_lanes(tokens, lanes):
        text = f"hidden {tuple(hidden.shape)} and {lanes} x {b.rank} ranks of {b.width}"
        raise ValueError(f"{text} for {y.dtype} {tuple(y.shape)}")
    halves = y.new_zeros(tokens, 2, whole, dtype=torch.bfloat16)
    flat = hidden.reshape(tokens, ranks)
    halves[:, 0, :ranks] = flat
    halves[:, 1, :ranks] = flat - halves[:, 0, :ranks]
    _run(_WHICH[y.dtype], b, b.width // ROWS, whole // INPUTS, halves.view(tokens, -1), y, 2 * whole)
    return y


def _checked(x: Tensor, a: Ranks) -> Tensor:
    width = x.shape[-1]
    tokens = x.numel() // max(width, 1)
    fit = x.dtype is torch.bfloat16 and x.is_cpu and width == a.width and not width % INPUTS and width <= _WIDEST
    if not fit or not _in_lanes(tokens, len(a.places)):
        text = f"{tuple(x.shape)} in {x.dtype} on {x.device}"
        raise ValueError(f"{text} for {len(a.places)} x {a.rank} ranks of {a.width}")
    return x.contiguous()


def _in_lanes(tokens: int, lanes: int) -> bool:
    return not tokens % lanes and tokens >= LEAST * lanes


def _run(which: int, factor: Ranks, tiles: int, chunks: int, x: Tensor, y: Tensor, of_y: int, *gate: int) -> None:
    lanes, whole = factor.places.shape
    tokens = x.numel() // x.shape[-1] // lanes
    if not all((x.data_ptr(), y.data_ptr())):  # a fake tensor says that it lies at 0
        raise ValueError("there is no memory to be read, or written to")
    of_lane = math.ceil(tokens / LEAST)
    threads = torch.get_num_threads()
    given = (
        *(0, threads, tiles, chunks, of_lane * lanes, factor.places.ctypes.data),
        *(x.element_size() * x.shape[-1], x.data_ptr(), y.data_ptr(), of_y, *(gate or (0, 0))),
        *(of_lane, tokens, 8 * whole),
    )
    openmp.run(openmp.team(), _kernels()[which], (ctypes.c_int64 * len(given))(*given), threads)


@cache
def _kernels() -> tuple[int, int, int, int]:
    from lora_rt.core.engine.tiled_kernel import kernels

    return kernels()
