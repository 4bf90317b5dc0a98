"""Facts about torch that products of weights in blocks stand on. A failure here names what an upgrade changed."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from lora_rt.core.multiply import blocked
from support.features import lacks

pytestmark = pytest.mark.skipif(not blocked.are_there(), reason=lacks("oneDNN"))


@pytest.mark.parametrize("shape", [(96, 128), (7, 13), (1, 5)])
@pytest.mark.parametrize("tokens", [(1,), (2, 3), (17,), (300,)])
def test_a_weight_in_blocks_is_multiplied_exactly_by_any_number_of_rows(
    shape: tuple[int, int], tokens: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(shape), torch.randn(shape[0]), torch.randn(*tokens, shape[1])
    found = blocked.product(x, blocked.in_blocks(weight), bias)
    wanted = linear(x.double(), weight.double(), bias.double())
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))
    assert torch.equal(blocked.product(x, blocked.in_blocks(weight), bias), found)


def test_rows_that_do_not_lie_one_after_the_other_are_read_as_they_are() -> None:
    weight, x = torch.randn(8, 6), torch.randn(6, 5).t()
    assert torch.allclose(blocked.product(x, blocked.in_blocks(weight)), x @ weight.t(), atol=1e-6)


def test_a_copy_made_in_inference_mode_or_not_serves_both() -> None:
    weight, x = torch.randn(8, 6), torch.randn(3, 6)
    with torch.inference_mode():
        inside = blocked.product(x, blocked.in_blocks(weight))
    laid = blocked.in_blocks(weight)
    assert torch.equal(blocked.product(x, laid), inside)
    with torch.inference_mode():
        assert torch.equal(blocked.product(x, laid), inside)
