"""A product of float32 rows and a weight in bfloat16 or float16 that is read where it lies, on processors without AMX.

torch has it cast first there, or takes much longer. A copy that is fast to multiply takes as much memory again, and of
an output head a second to make. Here its numbers are widened on the way into the registers, so that what is multiplied
is exact, and the sum is one of float32.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from lora_rt.core.multiply import four_bit
from lora_rt.core.multiply.four_bit import BLOCK, TILE
from lora_rt.core.multiply.tiled import LEAST
from lora_rt.core.native import openmp

_DTYPES = (torch.bfloat16, torch.float16)


@four_bit.proven("no kernel for weights in %s")
def are_there(dtype: torch.dtype) -> bool:
    """Whether this processor has what the kernel needs, and it gives what it should."""
    if not four_bit.could_be() or four_bit.could_be_tiles():
        return False
    weight = torch.arange(8 * BLOCK, dtype=torch.float32).view(8, BLOCK).to(dtype)
    return torch.equal(product(torch.eye(BLOCK, dtype=torch.float32), weight).T, weight.float())


def fits(weight: Tensor) -> bool:
    """Whether a weight (out, in) lies as the kernel reads it."""
    if weight.dtype not in _DTYPES or not weight.is_cpu or not weight.is_contiguous():
        return False
    out, width = weight.shape
    return not out % TILE and not width % BLOCK and out * width >= LEAST


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (..., out) of a float32 x (..., in), a weight that `fits` and a float32 bias (out,). It knows no gradients.

    Raises:
        ValueError: x has another dtype, width or device; the kernel would read what is not there.
    """
    if x.dtype is not torch.float32 or x.shape[-1] != weight.shape[1] or not x.is_cpu:
        raise ValueError(f"{tuple(x.shape)} in {x.dtype} on {x.device} for a weight of {tuple(weight.shape)}")
    return four_bit.by_threads(partial(_run, weight.dtype), x, weight, bias=bias)


def _run(dtype: torch.dtype, arguments: Any, threads: int) -> None:
    openmp.run(openmp.team(), _kernel(dtype), arguments, threads)


@cache
def _kernel(dtype: torch.dtype) -> int:
    from lora_rt.core.multiply.vector_kernel import kernel_of_sixteen

    return kernel_of_sixteen(four_bit.in_a_register(), brain=dtype is torch.bfloat16)
