"""Facts about the caches of transformers that ours stand on. A failure here names what an upgrade changed."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


def columns(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(1, 2, count, 4), torch.randn(1, 2, count, 4)


@pytest.mark.parametrize("make", [DynamicLayer, lambda: DynamicSlidingWindowLayer(4)], ids=["all", "window"])
def test_a_layer_is_made_ready_and_given_keys_and_values_and_goes_on_from_there(make: Any) -> None:
    (old_keys, old_values), (keys, values) = columns(3), columns(2)
    read, filled = make(), make()
    read.update(old_keys, old_values)
    filled.lazy_initialization(old_keys, old_values)
    assert filled.is_initialized
    filled.keys, filled.values = read.keys, read.values
    if hasattr(filled, "cumulative_length"):
        filled.cumulative_length = 3
    for one, other in zip(read.update(keys, values), filled.update(keys, values), strict=True):
        assert torch.equal(one, other)
    assert read.get_seq_length() == filled.get_seq_length() == 5
    assert read.get_mask_sizes(1) == filled.get_mask_sizes(1)


def test_only_a_window_counts_what_it_has_read_and_keeps_what_the_next_token_sees() -> None:
    window = DynamicSlidingWindowLayer(4)
    window.update(*columns(6))
    assert (window.cumulative_length, window.keys.shape[2], window.sliding_window) == (6, 3, 4)
    assert window.record_past is False
    assert not hasattr(DynamicLayer(), "cumulative_length")
    assert DynamicLayer().keys is None


def test_a_cache_is_made_of_layers_and_asks_these_things_of_one() -> None:
    wanted = {name for name, value in vars(CacheLayerMixin).items() if getattr(value, "__isabstractmethod__", False)}
    assert wanted == {"lazy_initialization", "update", "get_mask_sizes", "get_seq_length", "get_max_length"}
    assert "layers" in inspect.signature(Cache.__init__).parameters
