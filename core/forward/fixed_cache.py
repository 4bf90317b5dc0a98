"""Keys and values in fixed places: what a recorded pass reads and extends.

keys, values    (rows, heads, columns, size), of which the first ones are read so far
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class FixedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One layer. Every pass writes at the columns that `column` (tokens,) holds, and gets all columns."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.column = keys, values, column
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the places are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values."""
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns, 0)"""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        """All columns: which of them count is said by the mask, and positions are given."""
        return int(self.keys.shape[2])

    def get_max_length(self) -> int:
        """All columns."""
        return int(self.keys.shape[2])


def fixed_cache(like: Sequence[Any], rows: int, columns: int, column: Tensor) -> Any:
    """A cache of so many rows and columns, for layers such as those of another cache.

    Memory that was never written may hold what is not a number, which no mask hides: the places begin as zeros.
    """

    def places(of: Tensor) -> Tensor:
        return torch.zeros((rows, of.shape[1], columns, of.shape[3]), dtype=of.dtype, device=of.device)

    return Cache(layers=[FixedLayer(places(layer.keys), places(layer.values), column) for layer in like])
