"""A product of many bfloat16 rows by AMX with a weight that is kept in 4 bits, or lies there in bfloat16.

torch's own needs a dense weight, which it lays out anew for the tiles whenever it is used: with some hundred rows that
takes as long as to multiply. Here each thread lays out a part of the weight in its own caches. Sums are made in
float32, a row's by themselves, and rounded once with a bias and what adapters add to them.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lora_rt.core.multiply import four_bit
from lora_rt.core.multiply.four_bit import FourBit
from lora_rt.core.native import openmp

LEAST = 32
"""Rows that are multiplied at a time; fewer are not."""
_OUTPUTS, _RANKS = 32, 32  # that are multiplied at a time
_WIDEST = 3 << 13  # inputs: 32 outputs of so many are 1.5 MiB of a thread's stack
_ROOM = 1 << 19  # bytes of it that a part takes, where its outputs are not as wide as that
_MOST = 1 << 10  # ranks of B: those of 32 outputs, in two parts, are 128 KiB of it
_ARGUMENTS = ctypes.c_int64 * 16  # those of the kernel


class Ranks(NamedTuple):
    """A factor by its ranks, each of which is float32 numbers that lie one after the other.

    places    (lanes, n) int64   where they lie, n whole tiles of 32; where a lane has none there are zeros
    rank      how many there are in the lane that has the most
    width     numbers of each
    made_of   whose addresses these are; they stay while this is there
    """

    places: Any
    rank: int
    width: int
    made_of: Any


class Added(NamedTuple):
    """What adapters add to a product: hidden B^T.

    hidden    (tokens, 2, R)   float32 in two bfloat16 parts: a number, rounded, and what it has lost
    start     the first of B's ranks among these
    factor    B, whose lanes have equally many tokens each
    """

    hidden: Tensor
    start: int
    factor: Ranks


def are_ranks(parts: Sequence[Tensor]) -> bool:
    """Whether they are float32 (r, width) on a CPU, whose ranks lie one after the other."""
    lie = all(part.dim() == 2 and part.is_contiguous() for part in parts)
    return lie and all(part.is_cpu and part.dtype is torch.float32 for part in parts)


def ranks_of(parts: Sequence[Tensor]) -> Ranks:
    """One lane of such parts.

    Raises:
        ValueError: some are others; the kernel would read what is not there.
    """
    if not are_ranks(parts):
        raise ValueError(f"no ranks: {[(tuple(part.shape), part.dtype, part.device.type) for part in parts]}")
    width = parts[0].shape[1]
    firsts = ((part.data_ptr(), len(part)) for part in parts)
    where = [place for first, ranks in firsts for place in range(first, first + 4 * width * ranks, 4 * width)]
    return in_lanes(np.array([where], np.int64), width, list(parts))


def in_lanes(places: Any, width: int, made_of: Any) -> Ranks:
    """Of the addresses (lanes, ranks), 0 where a lane has no rank."""
    lanes, rank = places.shape
    nothing = _zeros(width).data_ptr()
    whole = np.full((lanes, math.ceil(rank / _RANKS) * _RANKS), nothing, np.int64)
    whole[:, :rank] = np.where(places == 0, nothing, places)
    return Ranks(whole, rank, width, made_of)


@cache
def _zeros(width: int) -> Tensor:
    return torch.zeros(width, dtype=torch.float32, device="cpu")


def can_add(rank: int) -> bool:
    """Whether a product adds what so many ranks of B make."""
    return rank <= _MOST


@four_bit.proven("no tiles for many rows")
def are_there(*, dense: bool = False) -> bool:
    """Whether this processor has AMX, and its tiles give what they should: of a weight in 4 bits, or of a dense one."""
    if not four_bit.have_tiles():
        return False
    x = torch.eye(128, dtype=torch.float32)[:100].bfloat16()
    if dense:
        numbers = torch.arange(80 * 128, dtype=torch.float32).view(80, 128).bfloat16()
        return torch.equal(product(x, numbers), numbers[:, :100].T)
    codes = (torch.arange(80 * 128) % 16).to(torch.uint8).view(80, 128)
    weight = four_bit.from_codes(codes, torch.ones(80, 2, dtype=torch.float32), torch.bfloat16)
    return torch.equal(product(x, weight), four_bit.product(x.float(), weight).bfloat16())


def could_take(out: int, width: int) -> bool:
    """Whether weights of this shape are multiplied so; of 4 bits their inputs are whole blocks."""
    return out >= _OUTPUTS and not width % _OUTPUTS and width <= _WIDEST


def takes(x: Tensor, out: int, *, dense: bool = False) -> bool:
    """Whether a product of these rows is made so, with a weight in 4 bits or a dense one, which lies as it is read."""
    width = x.shape[-1]
    many = x.dtype is torch.bfloat16 and x.is_cpu and x.numel() >= LEAST * width
    return many and could_take(out, width) and are_there(dense=dense)


def product(
    x: Tensor,
    weight: FourBit | Tensor,
    bias: Tensor | None = None,
    added: Added | None = None,
    *,
    wide: bool = False,
) -> Tensor:
    """y (..., out), rounded once to bfloat16 or, if `wide`, float32 as it was summed up.

    x (..., in) is bfloat16, of `LEAST` rows or more. It knows no gradients.

    Args:
        weight: in 4 bits, rounded to bfloat16, or of that dtype and contiguous, (out, in).
        bias: (out,).

    Raises:
        ValueError: x has another dtype, width or device, or fewer rows, or what is added has others; the kernel would
            read what is not there.
    """
    *rows, width = x.shape
    count = x.numel() // max(width, 1)
    out, places, known = _read(weight)
    if x.dtype is not torch.bfloat16 or not x.is_cpu or width != known or count < LEAST or not could_take(out, width):
        raise ValueError(f"{tuple(x.shape)} in {x.dtype} on {x.device} for a weight of {out} x {known}")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"a bias of {tuple(bias.shape)} for {out} outputs")
    x = x.contiguous()
    begun = None if bias is None else bias.detach().float().contiguous()
    y = x.new_empty(*rows, out, dtype=torch.float32 if wide else torch.bfloat16)
    threads = torch.get_num_threads()
    read = _read_added(added, count, out)
    of_output = 2 * width + 4 * _RANKS * read[1]  # bytes that one takes
    share = max(_OUTPUTS, _ROOM // of_output // _OUTPUTS * _OUTPUTS)  # outputs of a part
    parts = math.ceil(math.ceil(out / share) / threads) * threads
    all_places = *places, x.data_ptr(), y.data_ptr(), 0 if begun is None else begun.data_ptr()
    arguments = _ARGUMENTS(0, parts, count, width, out, *all_places, *read)
    openmp.run(openmp.team(), _kernel(isinstance(weight, FourBit), wide), arguments, threads)
    return y


def _read(weight: FourBit | Tensor) -> tuple[int, tuple[int, int], int]:
    """Outputs, addresses and inputs of a weight."""
    if isinstance(weight, FourBit):
        out, half = weight.codes.shape
        return out, (weight.codes.data_ptr(), weight.scales.data_ptr()), 2 * half
    if weight.dtype is not torch.bfloat16 or not weight.is_contiguous() or not weight.is_cpu:
        raise ValueError(f"a weight in {weight.dtype} on {weight.device}, strides {weight.stride()}")
    return *weight.shape[:1], (weight.data_ptr(), 0), weight.shape[1]


def _read_added(added: Added | None, count: int, out: int) -> tuple[int, ...]:
    """Tokens of a lane, and the kernel's arguments behind that."""
    if added is None:
        return count, 0, 0, 0, 0, 0
    hidden, (lanes, ranks) = added.hidden, added.factor.places.shape
    tokens, two, width = hidden.shape
    fit = (tokens, two, added.factor.width) == (count, 2, out) and hidden.stride(-1) == 1 and can_add(ranks)
    inside = added.start + ranks <= width  # what is read beyond a site's ranks is multiplied with 0
    if not fit or not inside or hidden.dtype is not torch.bfloat16 or count % lanes or count < LEAST * lanes:
        text = f"{tuple(hidden.shape)} from {added.start} on and {lanes} x {ranks} ranks of {added.factor.width}"
        raise ValueError(f"{text} for {count} rows of {out} outputs")
    size = hidden.element_size()
    at = hidden.data_ptr() + size * added.start
    strides = size * hidden.stride(0), size * hidden.stride(1)
    return count // lanes, ranks // _RANKS, at, *strides, added.factor.places.ctypes.data


@cache
def _kernel(in_four_bits: bool, wide: bool) -> int:
    from lora_rt.core.multiply.amx_many_kernel import many_kernel

    return many_kernel(in_four_bits, wide)
