"""Products with a dense bfloat16 weight where it lies, by AMX: sums in float32, one row's by themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lora_rt.core.multiply import tiled
from lora_rt.core.multiply.product import Product
from lora_rt.core.multiply.ways import SIZES, ways_of
from support.features import lacks

pytestmark = pytest.mark.skipif(not tiled.are_there(), reason=lacks("AMX"))

OUT, IN = 528, 160


def given(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def layer(*, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias).bfloat16().requires_grad_(False)


def test_sums_are_float32s_and_a_row_has_the_same_bits_whatever_stands_beside_it() -> None:
    x, weight, bias = given(35, IN), given(OUT, IN), torch.randn(OUT)
    found = tiled.product(x, weight, bias)
    assert found.dtype is torch.float32
    assert (found - (x.double() @ weight.double().T + bias)).abs().max() < 1e-4
    for rows in (1, 2, 15, 16, 17):
        for some in (slice(rows), slice(35 - rows, 35)):
            assert torch.equal(tiled.product(x[some], weight, bias), found[some])
    assert tiled.product(x[:6].view(3, 2, IN), weight).shape == (3, 2, OUT)
    for out in (OUT + 4, OUT - 1):  # the last tile reaches back
        other = given(out, IN)
        assert (tiled.product(x, other) - x.double() @ other.double().T).abs().max() < 1e-4
    many = given(1030, IN)  # so many that threads take several times sixteen rows at once
    found = tiled.product(many, weight)
    assert torch.equal(found[-7:], tiled.product(many[-7:], weight))
    assert (found - many.double() @ weight.double().T).abs().max() < 1e-4
    apart = given(IN, 3).T  # not one after the other
    assert torch.equal(tiled.product(apart, weight), tiled.product(apart.contiguous(), weight))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit(threads: int) -> None:
    x, weight = given(5, IN), given(OUT, IN)
    wanted, before = tiled.product(x, weight), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(tiled.product(x, weight), wanted)
    finally:
        torch.set_num_threads(before)


def test_what_is_no_number_stays_in_its_row() -> None:
    x, weight = given(4, IN), given(OUT, IN)
    clean = tiled.product(x, weight)
    x[1, 3] = float("inf")
    found = tiled.product(x, weight)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2, 3]], clean[[0, 2, 3]])


@pytest.mark.parametrize(
    "weight",
    [
        given(8, 64 * IN),
        given(OUT, 1 << 15),
        given(OUT, IN + 16),
        given(OUT, IN).float(),
        given(IN, OUT).T,
        given(16, 32),
        given(OUT, IN).to("meta"),
    ],
)
def test_what_lies_otherwise_is_not_multiplied_so(weight: Tensor) -> None:
    assert not tiled.fits(weight)
    module = layer()
    assert "tiles" in ways_of(module)
    module.weight = nn.Parameter(weight, requires_grad=False)
    assert "tiles" not in ways_of(module)


@pytest.mark.parametrize("x", [torch.zeros(2, IN), given(2, IN // 2), given(2, IN).to("meta")])
def test_what_the_kernel_would_misread_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=str(IN)):
        tiled.product(x, given(OUT, IN))


def test_a_process_that_has_asked_for_nothing_may_multiply() -> None:
    code = "import torch; from lora_rt.core.multiply import tiled; x = torch.ones(4, 64).bfloat16()\n"
    code += "print(tiled.product(x, torch.ones(32, 64).bfloat16()).sum().item())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "8192.0"), done.stderr


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_multiplied_so_and_where_gradients_flow_as_torch_does(bias: bool) -> None:
    module, x = layer(bias=bias), given(1, 5, IN)
    product = Product(module, ("tiles",) * len(SIZES))
    exact = linear(x.double(), module.weight.double(), None if module.bias is None else module.bias.double())
    found = product(x)
    assert found.dtype is torch.bfloat16
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()
    some = x.clone().requires_grad_()
    assert product.way(some) == "packed"
    product(some).float().sum().backward()
    assert some.grad is not None
    with torch.no_grad():
        assert product.way(some) == "tiles"


def test_a_weight_that_is_put_in_its_place_is_the_one_that_counts() -> None:
    module, x = layer(), given(1, 2, IN)
    product = Product(module, ("tiles",) * len(SIZES))
    product(x)
    for other in (given(OUT, IN), given(IN, OUT).T, given(OUT + 4, IN), given(8, IN)):
        module.weight = nn.Parameter(other, requires_grad=False)
        exact = x.double() @ other.double().T
        assert (product(x).double() - exact).abs().max() <= 0.01 * exact.abs().max()
