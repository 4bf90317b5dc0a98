"""Products of many rows by AMX: the numbers of the weight, sums of float32, and what adapters add in the same sums."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor

from lora_rt.core.engine import tiled_factors
from lora_rt.core.engine.tiled_factors import halves_of, whole_ranks
from lora_rt.core.multiply import four_bit, many
from lora_rt.core.multiply.four_bit import FourBit
from lora_rt.core.multiply.many import LEAST, Added, Ranks, in_lanes, product, ranks_of
from lora_rt.core.multiply.product import Product
from support.features import lacks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not many.are_there(), reason=lacks("AMX")),
]

IN, OUT = 192, 144


def given(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def some(rows: int, width: int = IN) -> Tensor:
    return given(rows, width).bfloat16()


def weight_of(out: int = OUT, width: int = IN) -> FourBit:
    dice = torch.Generator().manual_seed(out)
    codes = torch.randint(0, 16, (out, width), generator=dice, dtype=torch.uint8)
    return four_bit.from_codes(codes, torch.rand(out, width // 64, generator=dice) + 0.1, torch.bfloat16)


def dense(weight: FourBit) -> Tensor:
    """The very numbers of a weight, (out, in), bfloat16."""
    width = 2 * weight.codes.shape[1]
    return four_bit.product(torch.eye(width), weight).T.contiguous().bfloat16()


def rows(a: Tensor) -> Ranks:
    """A factor A (r, in)."""
    return ranks_of([a.contiguous()])


def columns(b: Tensor) -> Ranks:
    """A factor B (out, r)."""
    return ranks_of([b.T.contiguous()])


def rounded_once(found: Tensor, exact: Tensor) -> bool:
    """Whether they are those numbers rounded to bfloat16, but for what float32 sums differ by."""
    return bool(((found.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-18 * exact.abs().max()).all())


@pytest.mark.parametrize("in_four_bits", [True, False])
@pytest.mark.parametrize(("out", "width"), [(OUT, IN), (32, 64), (36, 128), (100, 1536), (64, 1 << 14)])
@pytest.mark.parametrize("rows", [LEAST, 64, 97])
def test_sums_are_float32s_of_the_weight_s_own_numbers(rows: int, out: int, width: int, in_four_bits: bool) -> None:
    weight, x, bias = weight_of(out, width), some(rows, width), given(out)
    numbers = dense(weight)
    exact = x.double() @ numbers.double().T
    found = product(x, weight if in_four_bits else numbers)
    assert found.dtype is torch.bfloat16
    assert rounded_once(found, exact)
    assert rounded_once(product(x, weight if in_four_bits else numbers, bias), exact + bias.double())


def test_a_weight_of_inputs_that_are_no_whole_blocks_is_multiplied_where_it_is_dense() -> None:
    numbers, x = given(OUT, 96).bfloat16(), some(70, 96)
    assert rounded_once(product(x, numbers), x.double() @ numbers.double().T)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_has_the_same_bits_whatever_stands_beside_it_and_whoever_makes_it(threads: int) -> None:
    weight, x = weight_of(), some(300)
    whole = product(x, weight)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(product(x, weight), whole)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(product(x[7:71], weight), whole[7:71])
    assert torch.equal(product(x[200:].view(2, 50, IN), weight).view(100, OUT), whole[200:])
    assert torch.equal(product(x, dense(weight)), whole)


def test_rows_that_do_not_lie_one_after_the_other_are_read_as_they_are() -> None:
    weight, wide = weight_of(), some(80, 2 * IN)
    assert torch.equal(product(wide[:, IN:], weight), product(wide[:, IN:].contiguous(), weight))


def test_what_is_no_number_stays_in_its_row() -> None:
    weight, x = weight_of(), some(70)
    clean = product(x, weight)
    x[33, 5] = float("nan")
    x[34, 6] = float("inf")
    found = product(x, weight)
    others = [row for row in range(70) if row not in (33, 34)]
    assert torch.equal(found[others], clean[others])
    assert found[33].isnan().all()
    assert not found[34].isfinite().any()


def test_nothing_is_written_beyond_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = weight_of(), some(65)
    room = torch.full((67, OUT), 7.0).bfloat16()
    monkeypatch.setattr(Tensor, "new_empty", lambda *_given, **_named: room[1:66])
    product(x, weight)
    assert (room[[0, 66]] == 7).all()


def test_what_is_no_number_in_a_hidden_stays_in_its_token_whatever_ranks_are_read() -> None:
    """Sixteen ranks from the eighth on reach beyond what is there: zeros, and not the next token's."""
    weight, x, a, b = weight_of(), some(80), given(16, IN), given(OUT, 8)
    factor, gate = columns(b), torch.nn.functional.pad(torch.ones(1, 16), (0, 16))
    clean = product(x, weight, None, Added(halves_of(x, rows(a), gate), 8, factor))
    x[40, 3] = float("nan")
    x[60] *= 1e38
    found = product(x, weight, None, Added(halves_of(x, rows(a), gate), 8, factor))
    others = [row for row in range(80) if row not in (40, 60)]
    assert torch.equal(found[others], clean[others])
    assert found[40].isnan().all()


def test_y_may_be_had_before_it_is_rounded() -> None:
    weight, x = weight_of(), some(70)
    wide = product(x, weight, wide=True)
    assert wide.dtype is torch.float32
    assert torch.equal(wide.bfloat16(), product(x, weight))
    exact = x.double() @ dense(weight).double().T
    assert (wide - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("ranks", [1, 16, 24, 33, 100])
@pytest.mark.parametrize("tokens", [LEAST, 100])
def test_what_adapters_add_is_summed_up_with_it_and_rounded_once(tokens: int, ranks: int, narrow: bool) -> None:
    def factor(*shape: int) -> Tensor:
        return given(*shape).bfloat16().float() if narrow else given(*shape)

    weight, x, a, b = weight_of(), some(tokens), factor(ranks, IN), factor(OUT, ranks)
    for gate in (torch.rand(1, ranks), torch.rand(tokens, ranks)):
        wide = torch.nn.functional.pad(gate, (0, whole_ranks(ranks) - ranks))
        halves = halves_of(x, rows(a), wide)
        hidden = (x.double() @ a.double().T) * gate.double()
        found = halves[:, 0, :ranks].double() + halves[:, 1, :ranks].double()
        assert (found - hidden).abs().max() < 2**-15 * hidden.abs().max()
        assert not halves[:, :, ranks:].any()
        exact = x.double() @ dense(weight).double().T + hidden @ b.double().T
        y = product(x, weight, None, Added(halves, 0, columns(b)))
        assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-14 * exact.abs().max()).all()


def test_some_ranks_of_a_hidden_are_read_where_they_lie_and_the_others_are_nothing_to_it() -> None:
    weight, x, a, b = weight_of(), some(80), given(60, IN), given(OUT, 25)
    halves = halves_of(x, rows(a), torch.nn.functional.pad(torch.ones(1, 60), (0, 4)))
    alone = halves_of(x, rows(a[10:35]), torch.nn.functional.pad(torch.ones(1, 25), (0, 7)))
    factor = columns(b)
    assert torch.equal(
        product(x, weight, None, Added(halves, 10, factor)), product(x, weight, None, Added(alone, 0, factor))
    )
    last = rows(a[36:60])  # up to the end, behind which there is room
    y = product(x, weight, None, Added(halves, 36, columns(b[:, :24])))
    other = halves_of(x, last, torch.nn.functional.pad(torch.ones(1, 24), (0, 8)))
    assert torch.equal(y, product(x, weight, None, Added(other, 0, columns(b[:, :24]))))


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("out", [OUT, 100])
def test_each_lane_has_factors_of_its_own(out: int, narrow: bool) -> None:
    weight, x = weight_of(out), some(3 * 45)
    ranks = 8, 20, 0
    a, b = ([given(r, width, seed=r).bfloat16().float() for r in ranks] for width in (IN, out))
    if not narrow:
        a[1][3, 7] += 2**-13
        b[0][5, 9] += 2**-13

    def lanes(parts: list[Tensor], width: int) -> Ranks:
        places = [
            [part.data_ptr() + 4 * width * n for n in range(len(part))] + [0] * (20 - len(part)) for part in parts
        ]
        return in_lanes(np.array(places), width, parts)

    gate = torch.nn.functional.pad(torch.rand(3, 20), (0, 12)).repeat_interleave(45, dim=0)
    found = product(x, weight, None, Added(halves_of(x, lanes(a, IN), gate), 0, lanes(b, out)))
    for lane in range(3):
        part = slice(45 * lane, 45 * (lane + 1))
        if not ranks[lane]:
            assert torch.equal(found[part], product(x[part], weight))
            continue
        halves = halves_of(x[part], rows(a[lane]), gate[part, : whole_ranks(ranks[lane])].contiguous())
        alone = product(x[part], weight, None, Added(halves, 0, columns(b[lane].T)))
        assert torch.equal(found[part], alone)


def test_weights_that_cancel_do_so() -> None:
    weight, x, a, b = weight_of(), some(80), given(8, IN), given(OUT, 8)
    twice = torch.cat([a, a]), torch.cat([b, b], dim=1)
    gate = torch.tensor([1000.0] * 8 + [-1000.0] * 8)[None]
    halves = halves_of(x, rows(twice[0]), torch.nn.functional.pad(gate, (0, 16)))
    found = product(x, weight, None, Added(halves, 0, columns(twice[1]))).double()
    plain = x.double() @ dense(weight).double().T
    assert (found - plain).abs().max() < 2**-8 * plain.abs().max() + 1e-3


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (some(31), weight_of(), None),
        (some(64).float(), weight_of(), None),
        (some(64, 128), weight_of(), None),
        (some(64), weight_of(28), None),
        (some(64, 1 << 15), weight_of(32, 1 << 15), None),
        (some(64), given(OUT, IN), None),
        (some(64), given(IN, OUT).bfloat16().T, None),
        (some(64), weight_of(), given(OUT - 1)),
    ],
    ids=["rows", "dtype", "width", "outputs", "widest", "weight", "strides", "bias"],
)
def test_what_the_kernel_would_misread_is_refused(x: Tensor, weight: Any, bias: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"for a weight of|a weight in|a bias of"):
        product(x, weight, bias)


def test_what_does_not_belong_to_it_is_not_added() -> None:
    weight, x = weight_of(), some(64)
    hidden, factor = torch.zeros(64, 2, 32).bfloat16(), columns(given(OUT, 20))
    wrong = (
        Added(hidden[:63], 0, factor),
        Added(hidden, 1, factor),
        Added(hidden, 0, columns(given(OUT + 16, 20))),
        Added(hidden, 40, factor),
        Added(hidden.float(), 0, factor),
        Added(hidden.transpose(1, 2).contiguous().transpose(1, 2), 0, factor),
    )
    for added in wrong:
        with pytest.raises(ValueError, match="outputs"):
            product(x, weight, None, added)
    with pytest.raises(ValueError, match="gate"):
        halves_of(x, rows(given(20, IN)), torch.ones(1, 20))
    with pytest.raises(ValueError, match="gate"):
        halves_of(x, rows(given(20, IN)), torch.ones(63, 32))


def test_a_process_that_has_asked_for_nothing_may_multiply() -> None:
    """The system gives leave to use tiles for the asking, and ends who has not asked."""
    code = (
        "import torch\n"
        "from lora_rt.core.multiply import many\n"
        "print(many.product(torch.ones(64, 64).bfloat16(), torch.ones(32, 64).bfloat16())[0, 0].item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "64.0"


def layer_of(bias: bool) -> Linear4bit:
    torch.manual_seed(1)
    layer = Linear4bit(IN, OUT, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu").eval()
    layer.requires_grad_(False)
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_takes_it_for_many_tokens_and_has_its_gradient(bias: bool) -> None:
    layer = layer_of(bias)
    made = Product(layer, ("four-bit",) * 6)
    numbers, x = made.made(torch.bfloat16).double(), some(128).view(2, 64, IN)
    exact = x.double() @ numbers.T + (layer.bias.double() if bias else 0)
    assert rounded_once(made(x), exact)
    assert made.unrounded(x, Tensor.to).dtype is torch.float32  # something may be added
    assert made.can_add(x)
    assert not made.can_add(x[:1, :20])
    flowing = x.clone().requires_grad_()
    assert not made.can_add(flowing)
    if bias:
        layer.bias.requires_grad_()
        assert made(x).requires_grad
        layer.bias.requires_grad_(False)
    made(flowing).float().sum().backward()
    assert flowing.grad is not None
    torch.testing.assert_close(flowing.grad.double(), numbers.sum(0).expand_as(x), rtol=2e-2, atol=0.5)


def test_tokens_whose_products_are_made_so_are_as_many_as_kernels_of_few_rows_leave() -> None:
    """A way has two kernels."""
    assert many.takes(some(LEAST), OUT)
    assert many.takes(some(LEAST), OUT, dense=True)
    assert not many.takes(some(LEAST - 1), OUT)
    assert not many.takes(some(LEAST).float(), OUT)
    assert not many.takes(some(LEAST), 31)
    assert not many.takes(some(LEAST, 48), OUT)
    assert tiled_factors.LEAST <= LEAST
