"""Kernels for processors without AMX multiply the very numbers of a weight, however many rows and outputs there are."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_rt.core.multiply import as_it_lies, four_bit
from lora_rt.core.multiply.product import Product
from lora_rt.core.multiply.ways import SIZES, ways_of
from support.features import lacks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not four_bit.are_there(), reason=lacks("AVX2")),
]

SHAPES = [(4, 64), (20, 128), (92, 448), (36, 1024), (8, 2112)]
Weight = tuple[Tensor, Callable[[Tensor], Tensor]]  # its numbers, and the product with them


@pytest.fixture(scope="module", autouse=True)
def without_amx() -> Any:
    """Processors with AMX have other kernels for bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(four_bit, "could_be_tiles", lambda: False)
        as_it_lies.are_there.cache_clear()
        yield
    as_it_lies.are_there.cache_clear()


@pytest.fixture(params=[8, 16])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """As with AVX2 and with AVX-512, whose registers LLVM makes of two where there are none."""
    monkeypatch.setattr(four_bit, "in_a_register", lambda: request.param)
    as_it_lies._kernel.cache_clear()
    yield request.param
    as_it_lies._kernel.cache_clear()


def in_four_bits(out: int, width: int) -> Weight:
    codes = torch.randint(0, 16, (out, width), dtype=torch.uint8)
    weight = four_bit.from_codes(codes, torch.rand(out, width // 64), torch.bfloat16)
    numbers = torch.cat([four_bit.product(row[None], weight) for row in torch.eye(width)]).T
    return numbers, lambda x: four_bit.product(x, weight)


def in_sixteen(dtype: torch.dtype, out: int, width: int) -> Weight:
    weight = torch.randn(out, width).to(dtype)
    return weight.float(), lambda x: as_it_lies.product(x, weight)


def weight_of(kind: str, out: int, width: int) -> Weight:
    torch.manual_seed(0)
    return in_four_bits(out, width) if kind == "four-bit" else in_sixteen(getattr(torch, kind), out, width)


@pytest.mark.parametrize("kind", ["four-bit", "bfloat16", "float16"])
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_any_number_of_rows_and_outputs_is_multiplied_with_the_sum_of_float32(
    kind: str, out: int, width: int, lanes: int
) -> None:
    if kind == "four-bit" and lanes != four_bit._lanes():
        pytest.skip("this processor looks up in other registers")
    numbers, product = weight_of(kind, out, width)
    for rows in (*range(1, 10), 13, 40, 300):
        x = torch.randn(rows, width)
        wanted = x.double() @ numbers.double().T
        assert (product(x) - wanted).abs().max() < 2e-6 * width**0.5 * wanted.std()


@pytest.mark.parametrize("kind", ["four-bit", "bfloat16"])
def test_from_three_rows_on_a_row_has_the_same_bits_whatever_stands_beside_it(kind: str, lanes: int) -> None:
    if kind == "four-bit" and lanes != four_bit._lanes():
        pytest.skip("this processor looks up in other registers")
    _, product = weight_of(kind, 92, 1024)
    x = torch.randn(500, 1024)
    whole = product(x)
    for rows in (3, 4, 5, 6, 7, 11, 64, 257, 499):
        assert torch.equal(product(x[:rows]), whole[:rows])
        assert torch.equal(product(x[-rows:]), whole[-rows:])


@pytest.mark.parametrize(
    ("rows", "out", "start", "stop"), [(1, 20, 4, 12), (5, 20, 4, 12), (40, 92, 72, 92), (3, 4, 0, 4)]
)
def test_nothing_but_a_part_s_outputs_is_written(rows: int, out: int, start: int, stop: int, lanes: int) -> None:
    width = 448
    weight, x = torch.randn(out, width).bfloat16(), torch.randn(rows, width)
    y = torch.full((rows + 2, out), -7.0)
    weight_bits = weight.view(torch.int16).numpy()
    arguments = (ctypes.c_int64 * 9)(
        0, 1, rows, width, stop - start, weight_bits[start:].ctypes.data, 0, x.data_ptr(), y[1:].data_ptr()
    )
    as_it_lies._run(torch.bfloat16, arguments, 1)
    found = y.flatten()[out : out + rows * (stop - start)].view(rows, -1)
    assert torch.allclose(found, x @ weight[start:stop].float().T, atol=1e-3)
    assert (y.flatten()[:out] == -7).all()
    assert (y.flatten()[out + rows * (stop - start) :] == -7).all()


def test_what_is_no_number_stays_in_its_row_and_its_output() -> None:
    for rows in (2, 9):
        weight, x = torch.randn(20, 128).bfloat16(), torch.randn(rows, 128)
        clean = as_it_lies.product(x, weight)
        x[1, 7], weight[3, 100] = float("nan"), float("inf")
        found = as_it_lies.product(x, weight)
        assert found[1].isnan().all()
        assert not found[:, 3].isfinite().any()
        others = [n for n in range(20) if n != 3]
        assert torch.equal(found[::2, others], clean[::2, others])


def layer(dtype: torch.dtype, out: int = 512, width: int = 128) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, out).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dense_layer_is_multiplied_where_its_weight_lies_and_keeps_no_copy(dtype: torch.dtype) -> None:
    module = layer(dtype)
    assert "as-it-lies" in ways_of(module)
    product = Product(module, ("as-it-lies",) * len(SIZES))
    for rows in (1, 2, 5, 70):
        x = torch.randn(rows, 128, dtype=dtype)
        wanted = nn.functional.linear(x.float(), module.weight.float(), module.bias.float())
        assert (product(x).float() - wanted).abs().max() < 0.03
        x.requires_grad_()
        product(x).sum().backward()
        assert x.grad is not None
        assert (x.grad.float() - module.weight.float().sum(0)).abs().max() < 0.05
    assert not product._kept
    module.weight = nn.Parameter(torch.zeros(510, 128, dtype=dtype), requires_grad=False)  # what doesn't fit
    assert product.way(torch.randn(1, 128, dtype=dtype)) == "packed"


def test_what_the_kernel_can_t_read_is_left_to_others() -> None:
    for module in (
        layer(torch.bfloat16, out=1022),
        layer(torch.bfloat16, width=1000),
        layer(torch.float32),
        layer(torch.float16, 4),
    ):
        assert not as_it_lies.fits(module.weight)
    assert not as_it_lies.fits(torch.zeros(512, 128, dtype=torch.bfloat16).T)
    for x in (torch.randn(2, 64), torch.randn(2, 128).double()):
        with pytest.raises(ValueError, match="for a weight of"):
            as_it_lies.product(x, layer(torch.bfloat16).weight)


def test_processors_with_amx_have_a_way_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit, "could_be_tiles", lambda: True)
    as_it_lies.are_there.cache_clear()
    assert "as-it-lies" not in ways_of(layer(torch.bfloat16))
    as_it_lies.are_there.cache_clear()


def test_numbers_are_read_to_the_last_bit() -> None:
    """All of bfloat16 and float16, subnormal ones and infinities too."""
    bits = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16))
    one = torch.zeros(3, 64)
    one[:, 0] = 1
    for dtype in (torch.bfloat16, torch.float16):
        finite = torch.where(bits.view(dtype).isfinite(), bits.view(dtype), 0)
        weight = torch.zeros(1 << 16, 64, dtype=dtype)
        weight[:, 0] = finite
        for rows in (1, 3):
            assert torch.equal(as_it_lies.product(one[:rows], weight)[0], finite.float())
