"""Factors in float32 on units that multiply bfloat16: every number is the sum of two bfloat16 parts.

    hidden    x A^T = p + q     p = x (A1 | A2)^T, rounded to bfloat16     q = x (A1 | A2)^T - p, what that has lost
    y        += h1 B1 + h2 B1 + h1 B2, one product: (h1 | h2 | h1) (B1 | B1 | B2)

x and y are bfloat16 as they are. What is left out, h2 B2, is 2^-16 of the sum, so y is what a float32 sum gives,
rounded once, and weights that cancel do so. Whether it pays off is measured, as the ways to multiply a weight are.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_rt.core.base.measured import quickest

MANY = 256
"""Tokens from which on it may pay off: below, float32 is faster on every processor that was measured."""

AT_ONCE = 128
"""Tokens whose float32 deltas are added to a bfloat16 y: such a sum copies both, which so stay in the cache."""

_SIZE, _RANKS = 576, 16  # of the layer that is measured


@cache
def pay_off() -> bool:
    """Whether many tokens are multiplied faster in parts here; measured once a machine, in some milliseconds."""
    return _quickest() == "bfloat16"


def hidden_of(x: Tensor, a: Tensor) -> Tensor:
    """x A^T in float32, (..., R), of a bfloat16 x (..., in) and a float32 a (R, in)."""
    flat, both = x.reshape(-1, x.shape[-1]), torch.cat(_halves(a))
    rounded = linear(flat, both)
    lost = torch.addmm(rounded, flat, both.t(), beta=-1)  # summed in float32, and rounded after the subtraction
    parts = rounded.float().add_(lost.float())
    return parts.view(len(flat), 2, len(a)).sum(1).view(*x.shape[:-1], len(a))


def add_to(y: Tensor, hidden: Tensor, b: Tensor) -> None:
    """Add hidden B^T to a bfloat16 y (tokens, out), in place, of float32 hidden (tokens, ranks) and b (out, ranks)."""
    (first, second), (one, other) = _halves(hidden), _halves(b.t())
    y.addmm_(torch.cat([first, second, first], dim=1), torch.cat([one, one, other]))


def _halves(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 tensors whose sum it is, up to 2^-17."""
    first = numbers.bfloat16()
    return first, (numbers - first.float()).bfloat16()


def _quickest() -> str:
    x, y = (torch.full((2 * MANY, _SIZE), 0.5, dtype=torch.bfloat16) for _ in range(2))
    a, b = torch.full((_RANKS, _SIZE), 0.1), torch.full((_SIZE, _RANKS), 0.1)

    def in_float32() -> None:
        hidden = linear(x.float(), a)
        for start in range(0, len(y), AT_ONCE):
            y[start : start + AT_ONCE].add_(linear(hidden[start : start + AT_ONCE], b))

    with torch.no_grad():
        return quickest("adapters", {"float32": in_float32, "bfloat16": lambda: add_to(y, hidden_of(x, a), b)})
