"""What adapters add to many tokens by AMX: sums of float32 factors, each token's by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_rt.core.engine import tiled_factors
from lora_rt.core.engine.tiled_factors import LEAST, Tiled, add, fits, hidden_of, laid_out, takes
from lora_rt.core.engine.tiled_layout import columns_as_tiles, rows_as_tiles
from lora_rt.core.native import compiled

pytestmark = pytest.mark.skipif(not tiled_factors.are_there(), reason="this processor has no tiles")

IN, OUT = 96, 80


def given(*shape: int, narrow: bool = False) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return made.bfloat16().float() if narrow else made


def some(tokens: int) -> Tensor:
    return given(tokens, IN).bfloat16()


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("ranks", [1, 16, 20, 33, 100])
@pytest.mark.parametrize("tokens", [LEAST, 47, 200])
def test_sums_are_nearly_float32s(tokens: int, ranks: int, narrow: bool) -> None:
    x, a, b = some(tokens), given(ranks, IN, narrow=narrow), given(OUT, ranks, narrow=narrow)
    tiled = laid_out(a)
    assert tiled.tiles.shape[1] == (1 if narrow else 2)  # what is a bfloat16 number has no second part
    hidden = hidden_of(x, tiled)
    exact = x.double() @ a.double().T
    assert (hidden - exact).abs().max() < (2**-20 if narrow else 2**-16) * exact.abs().max()
    for dtype, error in ((torch.float32, 2**-14), (torch.bfloat16, 2**-8)):
        before = given(tokens, OUT).to(dtype)
        y = before.clone()
        assert add(y, hidden, laid_out(b)) is y
        wanted = before.double() + hidden.double() @ b.double().T
        assert ((y - wanted).abs() <= error * wanted.abs() + 2**-14 * wanted.abs().max()).all()


def test_some_ranks_of_a_hidden_are_read_where_they_lie() -> None:
    hidden, b = given(2, 30, 60), given(OUT, 25)
    y, other = torch.zeros(2, 30, OUT), torch.zeros(60, OUT)
    add(y, hidden[..., 10:35], laid_out(b))
    add(other, hidden[..., 10:35].reshape(60, 25).contiguous(), laid_out(b))
    assert torch.equal(y.view(60, OUT), other)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_token_has_the_same_bits_whatever_stands_beside_it(threads: int) -> None:
    x, a, b = some(500), laid_out(given(24, IN)), laid_out(given(OUT, 24))
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
    hidden, b = given(33, 8), laid_out(given(OUT, 8))
    memory = torch.zeros(40, OUT, dtype=torch.bfloat16)
    add(memory[:33], hidden, b)
    assert memory[:33].any()
    assert not memory[33:].any()


def test_what_is_no_number_stays_in_its_row() -> None:
    x, a, b = some(64), laid_out(given(24, IN)), laid_out(given(OUT, 24))
    clean = add(torch.ones(64, OUT), hidden_of(x, a), b)
    x[20, 5] = float("nan")
    found = add(torch.ones(64, OUT), hidden_of(x, a), b)
    others = [row for row in range(64) if row != 20]
    assert found[20].isnan().all()
    assert torch.equal(found[others], clean[others])


def test_weights_that_cancel_do_so() -> None:
    x, a, b = some(64), given(12, IN), given(OUT, 12)
    hidden = hidden_of(x, laid_out(torch.cat([a, a])))
    y = add(torch.zeros(64, OUT), torch.cat([hidden[:, :12], -hidden[:, 12:]], 1), laid_out(torch.cat([b, b], 1)))
    assert y.abs().max() < 1e-4 * hidden.abs().max()


def test_what_does_not_fit_is_refused_before_it_is_read() -> None:
    a, b, hidden = laid_out(given(24, IN)), laid_out(given(OUT, 24)), given(64, 24)
    assert not fits((4, 40))
    assert not takes(torch.zeros(64, 24), (24, 4))
    assert not takes(torch.zeros(OUT, 64).T, (OUT, 4))
    assert not takes(torch.zeros(64, OUT).half(), (OUT, 4))
    for x in (some(LEAST - 1), some(64).float(), some(64)[:, :64], some(64).to("meta")):
        with pytest.raises(ValueError, match="for a factor of 24 x 96"):
            hidden_of(x, a)
    wrong: list[tuple[Tensor, Tensor, Tiled]] = [
        (torch.zeros(64, OUT).half(), hidden, b),
        (torch.zeros(63, OUT), hidden, b),
        (torch.zeros(OUT, 64).T, hidden, b),
        (torch.zeros(64, OUT), hidden[:, :20], b),
        (torch.zeros(64, OUT), hidden.T.contiguous().T, b),
        (torch.zeros(64, OUT), hidden.double(), b),
        (torch.zeros(64, 90), hidden, laid_out(given(90, 24))),
    ]
    for y, given_hidden, factor in wrong:
        with pytest.raises(ValueError, match="hidden"):
            add(y, given_hidden, factor)


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("ranks", [(8,), (1, 3), (16, 16, 5), (7, 20, 9)])
def test_a_set_is_laid_out_from_where_its_parts_lie(
    ranks: tuple[int, ...], narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tuple(given(r, IN, narrow=narrow) for r in ranks)
    columns = tuple(given(r, OUT, narrow=narrow).T for r in ranks)
    wanted = laid_out(torch.cat(rows)), laid_out(torch.cat(columns, dim=1))
    for there in (True, False):
        monkeypatch.setattr(compiled, "is_loaded", lambda there=there: there and compiled.is_there())
        for made, one in zip((rows_as_tiles(rows), columns_as_tiles(columns)), wanted, strict=True):
            assert (made.n, made.k) == (one.n, one.k)
            assert torch.equal(made.tiles, one.tiles)


def test_one_number_that_is_no_bfloat16_brings_a_second_part() -> None:
    rows = given(4, IN, narrow=True), given(2, IN, narrow=True)
    rows[1][1, 95] += 2**-12
    assert rows_as_tiles(rows).tiles.shape[1] == 2
    assert columns_as_tiles((rows[0][:, :80].T, rows[1][:, :80].T)).tiles.shape[1] == 1
