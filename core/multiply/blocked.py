"""oneDNN's product of a float32 weight that lies in blocks: what torch's own compiler uses where a weight is constant.

A plain product lays the weight out anew each time it is used with a few rows, which then costs more than to multiply;
`tests/multiply/test_blocked.py` holds the facts about torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 16  # for which the blocks are laid out; others are multiplied with the same ones


def are_there() -> bool:
    """Whether this build of torch has them."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's
    return there and all(hasattr(torch.ops.mkldnn, name) for name in names)


def in_blocks(weight: Tensor) -> Tensor:
    """A copy of a float32 weight (out, in) in blocks; `product` alone can read it."""
    laid: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return laid


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (..., out) of a float32 x (..., in), a weight in blocks and a float32 bias (out,). It knows no gradients."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y
