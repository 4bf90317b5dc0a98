"""A product of a few bfloat16 rows and a dense bfloat16 weight by AMX, which reads the weight where it lies.

torch's own lays a weight out anew for the tiles whenever it is used, which takes longer than to multiply a few rows, or
multiplies a single row without them. Sums are made in float32, one row's by themselves: a row has the same bits
whatever stands beside it. Sixteen rows cost hardly more than one.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from lora_rt.core.multiply import four_bit
from lora_rt.core.native import openmp

_OUTPUTS, _INPUTS = 16, 32  # of a tile
_WIDEST = 3 << 13  # inputs: a copy of 16 rows stands on each thread's stack, 768 KiB
LEAST = 1 << 16  # numbers of a weight, below which the way to the kernel takes longer than the product
_PARTS = 4  # for each thread


@four_bit.proven("no tiles for bfloat16 weights")
def are_there() -> bool:
    """Whether this processor has AMX, and its tiles give what they should."""
    if not four_bit.could_be_tiles():
        return False
    x = torch.eye(2 * _INPUTS, dtype=torch.float32).bfloat16()
    weight = torch.arange(80 * 64, dtype=torch.float32).view(80, 64).bfloat16()
    return torch.equal(product(x, weight), weight.T.float())


def fits(weight: Tensor) -> bool:
    """Whether a weight (out, in) lies as tiles are read."""
    if weight.dtype is not torch.bfloat16 or not weight.is_cpu or not weight.is_contiguous():
        return False
    out, width = weight.shape
    return out >= _OUTPUTS and not width % _INPUTS and width <= _WIDEST and out * width >= LEAST


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (..., out), float32, of a bfloat16 x (..., in), a weight that `fits` and a bias (out,). It knows no gradients.

    Raises:
        ValueError: x has another dtype, width or device; the kernel would read what is not there.
    """
    width = x.shape[-1]
    if x.dtype is not torch.bfloat16 or width != weight.shape[1] or not x.is_cpu:
        raise ValueError(f"{tuple(x.shape)} in {x.dtype} on {x.device} for a weight of {tuple(weight.shape)}")
    run = partial(openmp.run, openmp.team(), _kernel())
    alone = LEAST * (x.numel() // width)  # however many rows there are: sixteen cost hardly more than one
    return four_bit.by_threads(run, x, weight, bias=bias, alone=alone, apiece=_PARTS)


@cache
def _kernel() -> Any:
    from lora_rt.core.multiply.amx_kernel import dense_kernel

    return dense_kernel()
