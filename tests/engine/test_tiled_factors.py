"""What adapters add to many tokens by AMX: sums of float32 factors, each token's by themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_rt.core.engine import tiled_factors
from lora_rt.core.engine.tiled_factors import LEAST, add, fits, hidden_of, takes
from lora_rt.core.multiply.many import Ranks, in_lanes, ranks_of
from support.features import lacks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not tiled_factors.are_there(), reason=lacks("AMX")),
]

IN, OUT = 96, 80


def given(*shape: int, narrow: bool = False) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return made.bfloat16().float() if narrow else made


def some(tokens: int) -> Tensor:
    return given(tokens, IN).bfloat16()


def rows(a: Tensor) -> Ranks:
    """A factor A (r, in)."""
    return ranks_of([a.contiguous()])


def columns(b: Tensor) -> Ranks:
    """A factor B (out, r)."""
    return ranks_of([b.T.contiguous()])


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("ranks", [1, 16, 20, 33, 100])
@pytest.mark.parametrize("tokens", [LEAST, 47, 200])
def test_sums_are_nearly_float32s(tokens: int, ranks: int, narrow: bool) -> None:
    x, a, b = some(tokens), given(ranks, IN, narrow=narrow), given(OUT, ranks, narrow=narrow)
    hidden = hidden_of(x, rows(a))
    exact = x.double() @ a.double().T
    assert (hidden - exact).abs().max() < (2**-20 if narrow else 2**-16) * exact.abs().max()
    for dtype, error in ((torch.float32, 2**-14), (torch.bfloat16, 2**-8)):
        before = given(tokens, OUT).to(dtype)
        y = before.clone()
        assert add(y, hidden, columns(b)) is y
        wanted = before.double() + hidden.double() @ b.double().T
        assert ((y - wanted).abs() <= error * wanted.abs() + 2**-14 * wanted.abs().max()).all()


def test_some_ranks_of_a_hidden_are_read_where_they_lie() -> None:
    hidden, b = given(2, 30, 60), given(OUT, 25)
    y, other = torch.zeros(2, 30, OUT), torch.zeros(60, OUT)
    add(y, hidden[..., 10:35], columns(b))
    add(other, hidden[..., 10:35].reshape(60, 25).contiguous(), columns(b))
    assert torch.equal(y.view(60, OUT), other)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_token_has_the_same_bits_whatever_stands_beside_it(threads: int) -> None:
    x, a, b = some(500), rows(given(24, IN)), columns(given(OUT, 24))
    hidden = hidden_of(x, a)
    y = add(torch.ones(500, OUT), hidden, b)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for part in (slice(40), slice(17, 90), slice(400, 500)):
            own = hidden_of(x[part], a)
            assert torch.equal(own, hidden[part])
            assert torch.equal(add(torch.ones(len(own), OUT), own, b), y[part])
    finally:
        torch.set_num_threads(before)


def test_nothing_is_written_beyond_the_end() -> None:
    hidden, b = given(33, 8), columns(given(OUT, 8))
    memory = torch.zeros(40, OUT, dtype=torch.bfloat16)
    add(memory[:33], hidden, b)
    assert memory[:33].any()
    assert not memory[33:].any()


def test_what_is_no_number_stays_in_its_row() -> None:
    x, a, b = some(64), rows(given(24, IN)), columns(given(OUT, 24))
    clean = add(torch.ones(64, OUT), hidden_of(x, a), b)
    x[20, 5] = float("nan")
    found = add(torch.ones(64, OUT), hidden_of(x, a), b)
    others = [row for row in range(64) if row != 20]
    assert found[20].isnan().all()
    assert torch.equal(found[others], clean[others])


def test_weights_that_cancel_do_so() -> None:
    x, a, b = some(64), given(12, IN), given(OUT, 12)
    hidden = hidden_of(x, rows(torch.cat([a, a])))
    y = add(torch.zeros(64, OUT), torch.cat([hidden[:, :12], -hidden[:, 12:]], 1), columns(torch.cat([b, b], 1)))
    assert y.abs().max() < 1e-4 * hidden.abs().max()


def test_what_does_not_fit_is_refused_before_it_is_read() -> None:
    a, b, hidden = rows(given(24, IN)), columns(given(OUT, 24)), given(64, 24)
    assert not fits((4, 40))
    assert not takes(torch.zeros(64, 24), (24, 4))
    assert not takes(torch.zeros(OUT, 64).T, (OUT, 4))
    assert not takes(torch.zeros(64, OUT).half(), (OUT, 4))
    for x in (some(LEAST - 1), some(64).float(), some(64)[:, :64], some(64).to("meta")):
        with pytest.raises(ValueError, match="24 ranks of 96"):
            hidden_of(x, a)
    wrong: list[tuple[Tensor, Tensor, Ranks]] = [
        (torch.zeros(64, OUT).half(), hidden, b),
        (torch.zeros(63, OUT), hidden, b),
        (torch.zeros(OUT, 64).T, hidden, b),
        (torch.zeros(64, OUT), hidden[:, :20], b),
        (torch.zeros(64, OUT), hidden.double(), b),
        (torch.zeros(64, 90), hidden, columns(given(90, 24))),
    ]
    for y, given_hidden, factor in wrong:
        with pytest.raises(ValueError, match="hidden"):
            add(y, given_hidden, factor)


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("ranks", [(8,), (1, 3), (16, 16, 5), (7, 20, 9)])
@pytest.mark.parametrize("out", [OUT, OUT + 16])
def test_a_set_is_read_where_its_parts_lie(out: int, ranks: tuple[int, ...], narrow: bool) -> None:
    parts = [given(r, IN, narrow=narrow) for r in ranks]
    turned = [given(r, out, narrow=narrow) for r in ranks]
    x = some(70)
    hidden = hidden_of(x, ranks_of(parts))
    assert torch.equal(hidden, hidden_of(x, rows(torch.cat(parts))))
    y, other = torch.ones(2, 70, out)
    assert torch.equal(add(y, hidden, ranks_of(turned)), add(other, hidden, columns(torch.cat(turned).T)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_lane_has_factors_of_its_own(dtype: torch.dtype) -> None:
    x, ranks = some(4 * 50), (8, 20, 1, 0)
    a, b = ([given(r, width) for r in ranks] for width in (IN, OUT))

    def lanes(parts: list[Tensor], width: int) -> Ranks:
        places = [
            [part.data_ptr() + 4 * width * n for n in range(len(part))] + [0] * (20 - len(part)) for part in parts
        ]
        return in_lanes(np.array(places), width, parts)

    y = torch.ones(200, OUT, dtype=dtype)
    hidden = hidden_of(x, lanes(a, IN))
    add(y, hidden, lanes(b, OUT))
    for lane in range(3):
        part = slice(50 * lane, 50 * (lane + 1))
        own = hidden_of(x[part], rows(a[lane]))
        assert torch.equal(hidden[part, : ranks[lane]], own)
        assert not hidden[part, ranks[lane] :].any()
        assert torch.equal(y[part], add(torch.ones(50, OUT, dtype=dtype), own, columns(b[lane].T)))
    assert (y[150:] == 1).all()


def test_one_number_that_is_no_bfloat16_is_not_rounded() -> None:
    x, a, b = torch.eye(64, IN).bfloat16(), given(4, IN, narrow=True), given(4, OUT, narrow=True)
    a[1, 40] += 2**-12
    b[3, 79] += 2**-12
    assert torch.equal(hidden_of(x, rows(a)), a.T[:64])
    assert torch.equal(add(torch.zeros(64, OUT), torch.eye(64, 4), columns(b.T))[:4], b)


def test_a_factor_that_was_changed_in_place_is_read_as_it_is() -> None:
    x, a = some(40), given(8, IN)
    ranks = rows(a)
    hidden_of(x, ranks)
    a.mul_(2)
    assert torch.equal(hidden_of(x, ranks), hidden_of(x, rows(a.clone())))


def test_what_is_no_float32_that_lies_there_is_not_read_by_address() -> None:
    for part in (given(8, IN).bfloat16(), given(8, IN).double(), given(IN, 8).T, given(8, IN).to("meta"), given(8)):
        with pytest.raises(ValueError, match="no ranks"):
            ranks_of([given(4, IN), part])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_whether_there_are_tiles_does_not_depend_on_what_a_process_computes_in(dtype: torch.dtype) -> None:
    tiled_factors.are_there.cache_clear()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert tiled_factors.are_there()
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("width", [3 << 13, 12 << 10])
def test_wide_inputs_are_read_sixteen_ranks_at_a_time(width: int) -> None:
    x, a = given(40, width).bfloat16(), given(40, width)
    exact = x.double() @ a.double().T
    assert (hidden_of(x, rows(a)) - exact).abs().max() < 2**-16 * exact.abs().max()
