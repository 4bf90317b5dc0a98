"""Factors in float32 on units that multiply bfloat16: every number is the sum of two bfloat16 parts.

    hidden    p + q     p = x (A1 | A2)^T, rounded to bfloat16     q = x (A1 | A2)^T - p, what that has lost
    y        += h1 B1 + h2 B1 + h1 B2, one product: of each rank (h1 | h2 | h1) (B1 | B1 | B2)

x and y are bfloat16 as they are. What is left out, h2 B2, is 2^-16 of the sum, so y is what a float32 sum gives,
rounded once, and weights that cancel do so. Whether it pays off is measured, as the ways to multiply a weight are.

On a processor with AMX its tiles do so with less to write in between (`tiled_factors.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_rt.core.engine import tiled_factors
from lora_rt.core.multiply.measured import quickest

MANY = 256
"""Tokens from which on it may pay off: below, float32 is faster on every processor that was measured."""

AT_ONCE = 128
"""Tokens whose float32 deltas are added to a bfloat16 y: such a sum copies both, which so stay in the cache."""

T = TypeVar("T")
F = TypeVar("F", Tensor, tuple[Tensor, ...])
_SIZE, _RANKS = 576, 16  # of the layer that is measured


@cache
def pay_off() -> bool:
    """Whether many tokens are multiplied faster in parts here; measured once a machine, in some milliseconds."""
    return _quickest() == "bfloat16"


class Kept:
    """Parts of factors, made when they are first asked for; anew where a factor was changed in place since."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, Any], tuple[Any, Any, Any]] = {}

    def of(self, factor: F, made: Callable[[F], T]) -> T:
        """What `made`, a function of a module, makes of a factor, or of the tensors that it consists of."""
        tensors: tuple[Tensor, ...] = factor if isinstance(factor, tuple) else (factor,)
        version = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        key = id(factor), made
        found = self._made.get(key)
        if found is None or found[0] is not factor or found[1] != version:
            found = self._made[key] = factor, version, made(factor)
        return found[2]


def parts_of_a(a: Tensor) -> Tensor:
    """(A1 | A2), (2R, in), of a float32 a (R, in)."""
    return torch.cat(_halves(a))


def parts_of_b(b: Tensor) -> Tensor:
    """Of each rank B1, B1 and B2, (3 ranks, out), of a float32 b (out, ranks)."""
    one, other = _halves(b.t())
    return torch.stack([one, one, other], dim=1).flatten(0, 1)


def parts_of_hidden(hidden: Tensor) -> Tensor:
    """Of each rank h1, h2 and h1, (tokens, 3R), of a float32 hidden (..., R)."""
    first, second = _halves(hidden.reshape(-1, hidden.shape[-1]))
    return torch.stack([first, second, first], dim=2).flatten(1)


def hidden_of(x: Tensor, parts: Tensor) -> Tensor:
    """x A^T in float32, (..., R), of a bfloat16 x (..., in) and the parts of A."""
    flat, ranks = x.reshape(-1, x.shape[-1]), len(parts) // 2
    rounded = linear(flat, parts)
    lost = torch.addmm(rounded, flat, parts.t(), beta=-1)  # summed in float32, and rounded after the subtraction
    found = rounded.float().add_(lost.float())
    return found.view(len(flat), 2, ranks).sum(1).view(*x.shape[:-1], ranks)


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

    parts, other = parts_of_a(a), parts_of_b(b)
    by_tiles = tiled_factors.are_there()
    tiles = [tiled_factors.laid_out(factor) for factor in (a, b)] if by_tiles else []

    def in_parts() -> None:
        if by_tiles:
            tiled_factors.add(y, tiled_factors.hidden_of(x, tiles[0]), tiles[1])
        else:
            y.addmm_(parts_of_hidden(hidden_of(x, parts)), other)

    with torch.no_grad():
        return quickest("adapters", {"float32": in_float32, "bfloat16": in_parts})
