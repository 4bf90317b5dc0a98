"""Facts about torch that products of float16 weights stand on. A failure here names what an upgrade changed."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from lora_rt.core.multiply import half
from support.features import lacks

pytestmark = pytest.mark.skipif(not half.are_there(), reason=lacks("FBGEMM"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96, 128), (7, 13), (1, 5)])
@pytest.mark.parametrize("tokens", [(1,), (2, 3), (17,), (300,)])
def test_a_weight_in_float16_is_multiplied_exactly_by_any_number_of_rows(
    dtype: torch.dtype, shape: tuple[int, int], tokens: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(shape).to(dtype).float(), torch.randn(shape[0]), torch.randn(*tokens, shape[1])
    packed = half.in_half(weight)
    found = half.product(x, packed, bias)
    wanted = linear(x.double(), weight.double(), bias.double())
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))
    assert torch.equal(half.product(x, packed, bias), found)


@pytest.mark.parametrize("power", [-120, -30, -10, 0, 14, 20, 100])
def test_the_numbers_of_bfloat16_stand_in_it_exactly_whatever_their_size(power: int) -> None:
    """Of a row that picks them out one by one, from the largest to 2^-24 of it."""
    weight = (torch.rand(25, 25, generator=torch.Generator().manual_seed(1)) + 1).bfloat16().float()
    weight *= 2.0 ** (power - torch.arange(25.0))
    found = half.product(torch.eye(25), half.in_half(weight)).T
    assert torch.equal(found, weight)


def test_zeros_are_zeros_and_what_is_no_number_stays_none() -> None:
    x = torch.ones(2, 6)
    assert torch.equal(half.product(x, half.in_half(torch.zeros(8, 6))), torch.zeros(2, 8))
    for number in ("nan", "inf"):
        weight = torch.ones(8, 6)
        weight[3, 2] = float(number)
        assert half.product(x, half.in_half(weight))[:, 3].isnan().all()
    assert half.product(x * float("nan"), half.in_half(torch.ones(8, 6))).isnan().all()


def test_rows_that_do_not_lie_one_after_the_other_are_read_as_they_are() -> None:
    weight, x = torch.randn(8, 6).half().float(), torch.randn(6, 5).t()
    assert torch.allclose(half.product(x, half.in_half(weight)), x @ weight.t(), atol=1e-5)


def test_a_copy_made_in_inference_mode_or_not_serves_both_and_any_number_of_threads() -> None:
    weight, x = torch.randn(80, 64).half().float(), torch.randn(3, 64)
    with torch.inference_mode():
        inside = half.product(x, half.in_half(weight))
    packed = half.in_half(weight)
    assert torch.equal(half.product(x, packed), inside)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.allclose(half.product(x, packed), inside, atol=1e-5)
    finally:
        torch.set_num_threads(before)
