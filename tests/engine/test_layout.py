"""Where rows and tokens lie in a layer's input, told from passes of two sizes; gates and rows follow it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lora_rt.core.engine.layout import PROBES, Layout, PassError, as_before, layout_of, rows_first, spread

SIZE = 4
WAYS: dict[str, tuple[Layout, tuple[int, ...]]] = {
    "usual": (("b", "t"), (0, 1)),
    "turned": (("t", "b"), (1, 0)),
    "latent": (("b", "", "t"), (0, -1, 1)),
    "heads": (("b", "t", ""), (0, 1, -1)),
    "flat": (("bt",), ()),
    "flat and turned": (("tb",), ()),
    "flat under one": (("", "bt"), ()),
}


def laid_out(x: Tensor, layout: Layout) -> Tensor:
    """(rows, tokens, n) in another layout, written anew."""
    if "bt" in layout or "tb" in layout:
        flat = (x if "bt" in layout else x.transpose(0, 1)).reshape(-1, x.shape[-1])
        return flat if len(layout) == 1 else flat[None]
    turned = x if layout.index("b") < layout.index("t") else x.transpose(0, 1)
    for axis, what in enumerate(layout):
        turned = turned if what else torch.stack([turned] * 2, axis)
    return turned


@pytest.mark.parametrize("way", WAYS)
def test_a_layout_is_told_and_gates_follow_it(way: str) -> None:
    layout = WAYS[way][0]
    alike = [torch.randn(1, tokens, SIZE).expand(rows, -1, -1) for rows, tokens in PROBES]
    assert layout_of([laid_out(x, layout) for x in alike]) == layout
    rows, tokens = 4, 7
    x, gate = torch.randn(rows, tokens, SIZE), torch.randn(rows, tokens, SIZE)
    placed = laid_out(x, layout)
    assert_close(placed * spread(gate, layout, placed, rows, tokens, None), laid_out(x * gate, layout))
    by_row = torch.randn(rows, 1, SIZE)
    assert_close(placed * spread(by_row, layout, placed, rows, tokens, None), laid_out(x * by_row, layout))


@pytest.mark.parametrize("way", WAYS)
def test_rows_come_first_and_go_back(way: str) -> None:
    layout = WAYS[way][0]
    rows, tokens = 4, 7
    x, factor = torch.randn(rows, tokens, SIZE), torch.randn(rows, 1, SIZE)
    placed = laid_out(x, layout)
    first = rows_first(placed, layout, rows, tokens)
    assert first.shape[0] == rows
    assert_close(as_before(first * factor, layout, placed, rows, tokens), laid_out(x * factor, layout))


def test_inputs_that_say_nothing_of_rows_have_no_layout() -> None:
    assert layout_of([torch.randn(4, SIZE), torch.randn(9, SIZE)]) is None
    assert layout_of([torch.randn(2, 3, SIZE), torch.randn(15, SIZE)]) is None
    x = torch.randn(5, SIZE)
    with pytest.raises(PassError, match="5 of 6 tokens"):
        spread(torch.randn(2, 1, SIZE), None, x, 2, 3, None)
    same = torch.randn(1, 1, SIZE)
    assert_close(x * spread(same, None, x, 2, 3, None), x * same[0])
