"""The dtype in which an adapter's factors are multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

_MANY = 64


def in_dtype_for(x: Tensor, factor: Tensor) -> Tensor:
    """A factor in the dtype that it is multiplied fastest in.

    On a CPU factors are kept in float32, in which a product with few tokens is fastest; with many tokens the input's
    bfloat16 is, at the precision of the base's own products. Elsewhere factors are kept in the base's dtype anyway.
    """
    many = x.dtype is torch.bfloat16 and x.numel() >= _MANY * x.shape[-1]
    return factor.to(x.dtype) if many else factor
