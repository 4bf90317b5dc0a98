"""FBGEMM's product of a float32 x and a weight that is kept in float16: half of what a float32 copy makes memory give.

A few rows of tokens are multiplied as fast as the weight is read, on processors without units for bfloat16 above all.
The weight is widened on the way into the registers and the sum is made in float32, so nothing is rounded twice:
`tests/multiply/test_half.py` holds the facts about torch.

Numbers of 8 or 11 bits (bfloat16, float16) stand in float16 exactly, but for those whose size it does not reach: then
the whole weight is brought near its upper end by a power of two, and what is smaller than 2^-32 of its largest number
still loses bits, as it does in a float32 sum.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_QUIET = threading.RLock()
_TOP = 14  # 2^15 is the largest power of two in float16; a number below 2^(14 + 1) stays clear of its end


class Half(NamedTuple):
    """A packed weight (out, in), and what its product is multiplied with: 1, or a power of two."""

    packed: Any
    scale: float


@cache
def are_there() -> bool:
    """Whether this build of torch has FBGEMM, and this processor what it needs."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        return False
    try:
        with quiet():
            return bool(product(torch.ones(1, 2), in_half(torch.eye(2)))[0, 0] == 1)
    except (AttributeError, RuntimeError):
        return False


@contextmanager
def quiet() -> Iterator[None]:
    """Within it `in_half` is called: some builds of torch warn that quantizing moves to another package.

    Filters of warnings belong to the process, and two threads that set them at once would leave it silent.
    """
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_half(weight: Tensor) -> Half:
    """A copy of a float32 weight (out, in); `product` alone can read it. One with a number that is none gives none."""
    scale = 1.0
    if not weight.isfinite().all():  # FBGEMM would make it finite
        weight, scale = torch.zeros_like(weight), math.nan
    elif not torch.equal(weight.half().float(), weight):
        scale = 2.0 ** (math.frexp(float(weight.abs().max()))[1] - 1 - _TOP)
        weight = weight / scale
    return Half(torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), None), scale)


def product(x: Tensor, weight: Half, bias: Tensor | None = None) -> Tensor:
    """y (..., out) of a float32 x (..., in), a packed weight and a float32 bias (out,). It knows no gradients."""
    # By its overload: to choose one takes as long as a quarter of a small product.
    y: Tensor = torch.ops.quantized.linear_dynamic_fp16.default(x, weight.packed)
    if weight.scale != 1.0:
        y = y.mul_(weight.scale)
    return y if bias is None else y.add_(bias)
