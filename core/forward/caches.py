"""Keys and values of rows that join and leave, in the cache classes of transformers.

    keys, values    (rows, heads, columns, size)    columns: all that were read, or the last of a sliding window

Columns are aligned on the right. A row that is shorter than the others has padding on the left, which the mask hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


def joined(empty: Any, parts: Sequence[tuple[Any, Tensor]], read: int) -> Any:
    """A cache of some rows of several others.

    Args:
        empty: a new cache of the same model, which is filled.
        parts: caches, and the numbers (n,) of the rows that are taken from each.
        read: how many columns the new cache has read.
    """
    for index, layer in enumerate(empty.layers):
        old = [(cache.layers[index], rows) for cache, rows in parts]
        if getattr(old[0][0], "keys", None) is None:
            continue  # nothing was kept here: the layer uses another one's
        columns = read
        if hasattr(layer, "cumulative_length"):  # a sliding window keeps the columns that the next token still sees
            columns = min(read, layer.sliding_window - 1)
        keys = torch.cat([fitted(one.keys[rows.to(one.keys.device)], columns, dim=2) for one, rows in old])
        values = torch.cat([fitted(one.values[rows.to(one.values.device)], columns, dim=2) for one, rows in old])
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = read
    return empty


def beginning(empty: Any, cache: Any, columns: int) -> Any:
    """A cache of the first columns of another one, in which every layer keeps all of them.

    Args:
        empty: a new cache of the same model, which is filled.
    """
    for layer, old in zip(empty.layers, cache.layers, strict=True):
        keys, values = old.keys[:, :, :columns], old.values[:, :, :columns]
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return empty


def fitted(values: Tensor, columns: int, dim: int) -> Tensor:
    """The last columns along a dimension, with zeros on the left where there are fewer."""
    there = values.shape[dim]
    if there >= columns:
        return values.narrow(dim, there - columns, columns)
    return pad(values, [0, 0] * (values.dim() - 1 - dim) + [columns - there, 0])
