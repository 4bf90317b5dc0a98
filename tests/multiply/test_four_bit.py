"""The kernel of 4-bit weights multiplies the very numbers of the dense weight, by any number of rows and threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from lora_rt.core.multiply import four_bit
from lora_rt.core.multiply.product import Product
from lora_rt.core.multiply.ways import SIZES, dense_weight, ways_of
from support.features import lacks

pytestmark = pytest.mark.skipif(not four_bit.are_there(), reason=lacks("AVX2"))

OUT, IN = 92, 192


@pytest.fixture(params=[16, 8])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """As on a processor with AVX-512, and on one with AVX2."""
    if request.param > four_bit._lanes():
        pytest.skip(lacks("AVX-512"))
    monkeypatch.setattr(four_bit, "_lanes", lambda: request.param)
    four_bit._run.cache_clear()
    yield request.param
    four_bit._run.cache_clear()


def layer(
    *, nested: bool = True, dtype: torch.dtype = torch.bfloat16, out: int = OUT, **other: object
) -> bnb.nn.Linear4bit:
    torch.manual_seed(0)
    kind = {"quant_type": "nf4", **other}
    made = (
        bnb.nn.Linear4bit(IN, out, bias=False, compute_dtype=dtype, compress_statistics=nested, **kind).to("cpu").eval()
    )
    made.support_avx512bf16_for_cpu = False
    return made.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [True, False])
def test_the_numbers_are_those_that_bitsandbytes_makes_dense(lanes: int, nested: bool, dtype: torch.dtype) -> None:
    module = layer(nested=nested, dtype=dtype)
    assert torch.equal(four_bit.product(torch.eye(IN), four_bit.laid_out(module)).T, dense_weight(module).float())


def test_any_number_of_rows_is_multiplied_with_the_sum_of_float32(lanes: int) -> None:
    module = layer()
    weight, dense = four_bit.laid_out(module), dense_weight(module).double()
    for rows in range(1, 36):
        x, bias = torch.randn(rows, IN), torch.randn(OUT)
        found = four_bit.product(x, weight, bias)
        assert found.dtype == torch.float32
        assert (found - (x.double() @ dense.T + bias)).abs().max() < 1e-5
        assert torch.equal(found, four_bit.product(x, weight, bias))
    x = torch.randn(IN, 3).T[:, None]  # not one after the other, and of three axes
    assert torch.equal(four_bit.product(x, weight), four_bit.product(x.contiguous(), weight))
    assert four_bit.product(x, weight).shape == (3, 1, OUT)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_change_no_bit_and_several_may_multiply_at_once(threads: int) -> None:
    weight = four_bit.from_codes(
        torch.randint(0, 16, (1024, 512), dtype=torch.uint8), torch.rand(1024, 8), torch.bfloat16
    )
    xs = [torch.randn(rows, 512) for rows in (1, 5, 16)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = [four_bit.product(x, weight) for x in xs]
        torch.set_num_threads(threads)
        assert all(torch.equal(four_bit.product(x, weight), one) for x, one in zip(xs, wanted, strict=True))
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda n: four_bit.product(xs[n % 3], weight), range(60)))
        assert all(torch.equal(one, wanted[n % 3]) for n, one in enumerate(found))
    finally:
        torch.set_num_threads(before)


def test_what_is_no_number_stays_in_its_row_and_its_output() -> None:
    module = layer()
    weight = four_bit.laid_out(module)
    x = torch.randn(5, IN)
    clean = four_bit.product(x, weight)
    x[2, 7] = float("nan")
    found = four_bit.product(x, weight)
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    weight.scales[3, 1] = float("nan")
    assert four_bit.product(torch.randn(5, IN), weight).isnan().any(0).nonzero().flatten().tolist() == [3]


@pytest.fixture
def tiles() -> None:
    """As on a processor with AMX."""
    if not four_bit.have_tiles():
        pytest.skip(lacks("AMX"))


def test_by_tiles_a_row_has_the_same_bits_whatever_stands_beside_it(tiles: None) -> None:
    for out, width in ((12, 64), (OUT, IN), (148, 64), (256, 512)):
        codes = torch.randint(0, 16, (out, width), dtype=torch.uint8)
        weight = four_bit.from_codes(codes, torch.rand(out, width // 64) + 0.01, torch.bfloat16)
        dense = four_bit.product(torch.eye(width), weight).T.double()
        x = torch.randn(35, width).bfloat16().float()
        found = four_bit.product(x, weight, narrow=True)
        assert (found - x.double() @ dense.T).abs().max() < 2e-5 * found.abs().max()
        for rows in (1, 2, 15, 16, 17):
            for first in (0, 35 - rows):
                some = slice(first, first + rows)
                assert torch.equal(four_bit.product(x[some], weight, narrow=True), found[some])


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_change_no_bit_of_tiles_and_leave_those_of_torch_as_they_were(tiles: None, threads: int) -> None:
    weight = four_bit.from_codes(
        torch.randint(0, 16, (1032, 512), dtype=torch.uint8), torch.rand(1032, 8), torch.bfloat16
    )
    xs = [torch.randn(rows, 512).bfloat16() for rows in (1, 5, 16)]
    other = torch.randn(256, 512).bfloat16()
    beside = torch.nn.functional.linear(other, other)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = [four_bit.product(x.float(), weight, narrow=True) for x in xs]
        torch.set_num_threads(threads)

        def one(number: int) -> bool:
            found = four_bit.product(xs[number % 3].float(), weight, narrow=True)
            near = torch.allclose(torch.nn.functional.linear(other, other), beside, rtol=0.01, atol=0.01)
            return torch.equal(found, wanted[number % 3]) and near

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(one, range(60)))
    finally:
        torch.set_num_threads(before)


def test_by_tiles_what_is_no_number_stays_in_its_row_and_its_output(tiles: None) -> None:
    weight = four_bit.laid_out(layer())
    x = torch.randn(5, IN).bfloat16().float()
    clean = four_bit.product(x, weight, narrow=True)
    x[2, 7] = float("nan")
    found = four_bit.product(x, weight, narrow=True)
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
    weight.scales[3, 1] = float("nan")
    assert four_bit.product(x[:2], weight, narrow=True).isnan().any(0).nonzero().flatten().tolist() == [3]


def test_tiles_take_neither_numbers_that_are_no_bfloat16_nor_weights_in_float32(tiles: None) -> None:
    module = layer()
    weight, x = four_bit.laid_out(module), torch.randn(4, IN)
    assert (four_bit.product(x, weight) - x.double() @ dense_weight(module).double().T).abs().max() < 1e-5
    whole = layer(dtype=torch.float32)
    exact = x.double() @ dense_weight(whole).double().T
    assert (four_bit.product(x, four_bit.laid_out(whole), narrow=True) - exact).abs().max() < 1e-5


def test_weights_of_too_many_inputs_for_tiles_are_multiplied_without(
    tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = four_bit.laid_out(layer()), torch.randn(4, IN).bfloat16().float()
    monkeypatch.setattr(four_bit, "WIDEST", IN - 64)
    assert torch.equal(four_bit.product(x, weight, narrow=True), four_bit.product(x, weight))
    assert four_bit.kernel_of(torch.bfloat16, widest=IN) == four_bit.kernel_of(torch.bfloat16)


@pytest.mark.parametrize("other", [{"quant_type": "fp4"}, {"out": 90}, {"dtype": torch.float16}])
def test_what_lies_otherwise_is_not_multiplied_so(other: dict[str, object]) -> None:
    module = layer(**other)  # type: ignore[arg-type]
    assert not four_bit.fits(module)
    assert "four-bit" not in ways_of(module)
    assert "four-bit" in ways_of(layer())


def test_the_other_blocks_of_bitsandbytes_are_not_multiplied_so() -> None:
    module = layer()
    module.weight = bnb.nn.Params4bit(torch.randn(OUT, IN), requires_grad=False, quant_type="nf4", blocksize=128).to(
        "cpu"
    )
    assert not four_bit.fits(module)


def test_what_bitsandbytes_has_packed_is_not_read_as_if_it_had_not() -> None:
    module = layer()
    assert four_bit.fits(module)
    module.weight.quant_state.packing_format_for_cpu = True
    assert not four_bit.fits(module)


def test_a_layer_multiplied_so_is_the_dense_one_up_to_rounding_and_so_is_its_gradient() -> None:
    module = layer()
    product = Product(module, ("four-bit",) * len(SIZES))
    x = torch.randn(1, 5, IN).bfloat16()
    exact = x.double() @ dense_weight(module).double().T
    assert (product(x).double() - exact).abs().max() <= 0.01 * exact.abs().max()
    gradients: list[Tensor | None] = []
    for forward in (product, Product(layer(), ("dense-wide",) * len(SIZES))):
        given = x.clone().requires_grad_()
        forward(given).float().pow(2).sum().backward()
        gradients.append(given.grad)
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert torch.allclose(gradients[0], gradients[1], rtol=0.02, atol=0.01)


@pytest.mark.parametrize("other", [{"quant_type": "fp4"}, {"blocksize": 128}, {"blocksize": 32}, {"rows": 96}])
def test_a_weight_that_is_put_in_its_place_is_the_one_that_counts(other: dict[str, Any]) -> None:
    module = layer()
    product = Product(module, ("four-bit",) * len(SIZES))
    x = torch.randn(1, 5, IN).bfloat16()
    product(x)
    kind = {"quant_type": "nf4", **other}
    rows = kind.pop("rows", OUT)
    module.weight = bnb.nn.Params4bit(torch.randn(rows, IN), requires_grad=False, **kind).to("cpu")
    module.weight.module = module
    module.out_features = rows
    exact = x.double() @ dense_weight(module).double().T
    assert (product(x).double() - exact).abs().max() <= 0.02 * exact.abs().max()


@pytest.mark.parametrize(
    "x", [torch.zeros(2, IN).bfloat16(), torch.zeros(2, IN // 2), torch.zeros(2, IN, device="meta")]
)
def test_what_the_kernel_would_misread_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=f"{OUT} x {IN}"):
        four_bit.product(x, four_bit.laid_out(layer()))


def test_the_default_dtype_of_others_is_nothing_to_it() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        four_bit.are_there.cache_clear()
        assert four_bit.are_there()
    finally:
        torch.set_default_dtype(torch.float32)
        four_bit.are_there.cache_clear()


def test_the_default_device_of_others_is_nothing_to_it() -> None:
    torch.set_default_device("meta")
    try:
        four_bit.are_there.cache_clear()
        assert four_bit.are_there()
    finally:
        torch.set_default_device(None)
        four_bit.are_there.cache_clear()


def test_without_torchs_own_openmp_one_thread_does_it_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weight = four_bit.laid_out(layer())
    x = torch.randn(40, IN)
    wanted = four_bit.product(x, weight)
    monkeypatch.setattr(four_bit, "_parallel", lambda: None)
    four_bit._run.cache_clear()
    assert torch.equal(four_bit.product(x, weight), wanted)
    four_bit._run.cache_clear()
