"""Sampling settings do what they are called after, and settings that make no sense are refused, all at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from lora_rt.core.generation import choosing
from lora_rt.core.generation.choosing import RowSampler, choose
from lora_rt.core.generation.sampling import Sampling, SamplingError, seeds_per_row
from lora_rt.core.native import compiled

END = 3
SCORES = torch.tensor([[2.0, 1.0, 0.5, 3.0]])


def sampler(seed: int = 0, said: tuple[int, ...] = (), **settings: object) -> RowSampler:
    row = RowSampler(Sampling(**settings), seed)  # type: ignore[arg-type]
    for token in said:
        row.said(token)
    return row


def chosen(row: RowSampler, scores: torch.Tensor = SCORES) -> int | None:
    return choose(scores.clone(), [row])[0]


def drawn(count: int = 400, **settings: object) -> list[float]:
    """How often each token is chosen."""
    mine = sampler(**settings)
    tokens = [chosen(mine) for _ in range(count)]
    return [tokens.count(token) / count for token in range(4)]


@pytest.mark.parametrize("temperature", [None, 0, 0.0, 1e-30])
def test_without_a_temperature_the_best_token_is_taken(temperature: float | None) -> None:
    assert drawn(20, temperature=temperature) == [0, 0, 0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_the_chances_of_their_scores(temperature: float) -> None:
    wanted = torch.softmax(SCORES[0] / temperature, -1).tolist()
    assert drawn(2000, temperature=temperature) == pytest.approx(wanted, abs=0.04)


@pytest.mark.slow
def test_top_p_leaves_the_smallest_set_of_tokens_that_holds_that_share() -> None:
    # Chances 0.62, 0.23, 0.08, 0.05 of tokens 3, 0, 1, 2.
    assert drawn(temperature=1.0, top_p=0.6) == [0, 0, 0, 1]
    some = drawn(temperature=1.0, top_p=0.8)
    assert some[1] == some[2] == 0
    assert some[0] > 0.1


@pytest.mark.slow
def test_top_k_leaves_that_many_tokens() -> None:
    some = drawn(temperature=2.0, top_k=2)
    assert some[1] == some[2] == 0
    assert some[0] > 0.1
    assert drawn(temperature=2.0, top_k=99)[2] > 0.05


def test_a_forbidden_token_is_not_chosen() -> None:
    assert choose(SCORES.expand(2, -1).clone(), [sampler(), sampler()], [[END], []]) == [0, END]
    warm = sampler(temperature=1.0)
    assert END not in {choose(SCORES.clone(), [warm], [[END]])[0] for _ in range(200)}


def test_a_repetition_penalty_counts_the_answer_s_own_tokens() -> None:
    found = [chosen(sampler(said=said, repetition_penalty=2.0)) for said in ((), (END,), (END, 0), (END, END))]
    assert found == [END, 0, END, 0]


@pytest.mark.parametrize("penalty", [1e-30, 1e-300, 99.0])
@pytest.mark.parametrize("temperature", [None, 1e-3, 1.0, 50.0])
def test_a_penalty_however_small_gives_numbers(penalty: float, temperature: float | None) -> None:
    mine = sampler(said=(1, 2), repetition_penalty=penalty, temperature=temperature, top_p=0.9)
    found = {chosen(mine) for _ in range(20)}
    assert None not in found
    assert found <= {1, 2} if penalty < 1 else found & {0, 3}


def test_a_row_draws_the_same_whatever_stands_beside_it() -> None:
    wide = torch.randn(1, 5000, generator=torch.Generator().manual_seed(1)) * 3
    settings = [{"temperature": 1.5, "top_p": 0.95}, {"temperature": 0.7}, {"temperature": 3.0, "top_k": 7}, {}]
    for own in settings:
        alone, beside = sampler(7, **own), sampler(7, **own)
        others = [sampler(8, temperature=0.5), sampler(9, top_p=0.5, temperature=9.0)]
        for _ in range(30):
            batch = torch.cat([torch.rand(1, 5000) * 9, wide, torch.rand(1, 5000)])
            assert choose(batch, [others[0], beside, others[1]])[1] == chosen(alone, wide)


def nucleus(scores: torch.Tensor, temperature: float, top_p: float) -> set[int]:
    """The smallest set of the most likely tokens that holds that share, by sorting everything in double precision."""
    chances = torch.softmax(scores.double() / temperature, -1)
    order = chances.argsort(descending=True, stable=True).tolist()
    kept, sum_ = set(), 0.0
    for token in order:
        if sum_ >= top_p:
            break
        kept.add(token)
        sum_ += float(chances[token])
    return kept


@pytest.mark.parametrize(("spread", "vocabulary"), [(0.5, 300), (2.0, 2_999), (6.0, 25_000), (7.0, 25_063)])
def test_the_nucleus_is_that_of_sorting_the_whole_vocabulary(spread: float, vocabulary: int) -> None:
    random = torch.Generator().manual_seed(int(spread * 10))
    for top_p in (0.2, 0.9, 0.99):
        scores = torch.randn(4, vocabulary, generator=random) * spread
        wanted = [nucleus(row, 0.8, top_p) for row in scores]
        mine = [sampler(n, temperature=0.8, top_p=top_p) for n in range(4)]
        # The smallest and the largest random number fall on the first and on the last token of the nucleus.
        for number, end in ((0.0, min), (1.0 - 1e-12, max)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(RowSampler, "uniform", lambda _self, number=number: number)
                assert choose(scores.clone(), mine) == [end(one) for one in wanted]


@pytest.mark.parametrize("top_p", [0.6, 0.9, 0.99])
@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_a_nucleus_of_thousands_ends_where_sorting_everything_ends_it(spread: float, top_p: float) -> None:
    scores = torch.randn(1, 25_063, generator=torch.Generator().manual_seed(3)).bfloat16().float() * spread
    chances = torch.softmax(scores[0].double() / 0.8, -1)
    order = chances.argsort(descending=True, stable=True).tolist()
    wanted = nucleus(scores[0], 0.8, top_p)
    last, beyond = order[len(wanted) - 1], order[len(wanted)]
    sums = chances.cumsum(0)
    # The numbers that fall on a token where all of them are drawn in their own order.
    numbers = {token: float(sums[token] - chances[token] / 2) for token in (order[0], last, beyond)}
    for tries in ((order[0],), (last,), (beyond, last), (beyond, beyond, order[0])):
        with pytest.MonkeyPatch.context() as patch:
            coming = iter(tries)
            patch.setattr(RowSampler, "uniform", lambda _self, coming=coming: numbers[next(coming)])
            assert choose(scores.clone(), [sampler(temperature=0.8, top_p=top_p)]) == [tries[-1]]


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [0.02, 0.7, 1.0])
def test_tokens_of_a_wide_nucleus_are_drawn_with_their_chances(top_p: float) -> None:
    scores = torch.zeros(1, 6_000)
    scores[0, 3_000:] = math.log(3.0)  # three quarters of the chance
    rows = [sampler(seed, temperature=1.0, top_p=top_p) for seed in range(600)]
    tokens = [token for token in choose(scores.repeat(600, 1), rows) if token is not None]
    assert len(tokens) == 600
    inside = range(3_000, 3_000 + math.ceil(top_p * 4_000)) if top_p < 0.75 else range(6_000)
    assert all(token in inside for token in tokens)
    upper = sum(token >= inside[len(inside) // 2] for token in tokens) / 600
    assert upper == pytest.approx(0.75 if top_p == 1 else 0.5, abs=0.07)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("spread", [0.0, 0.3, 2.0])
def test_a_draw_is_the_token_of_the_nucleus_at_which_the_sum_of_chances_passes_the_number(
    spread: float, top_p: float
) -> None:
    generator = torch.Generator().manual_seed(5)
    scores = (torch.randn(4, 3001, generator=generator) * spread).bfloat16().float()  # with many equal ones
    for turn in range(6):
        rows = [sampler(seed=100 * turn + number, temperature=0.8, top_p=top_p) for number in range(4)]
        numbers = [sampler(seed=100 * turn + number, temperature=0.8).uniform() for number in range(4)]
        found = choose(scores.clone(), rows)
        for row, number, token in zip(scores, numbers, found, strict=True):
            order = row.argsort(descending=True, stable=True)
            chances = torch.softmax(row.double() / 0.8, -1)
            sums = chances[order].cumsum(0)
            beyond = order[int(((sums - chances[order]) < top_p * sums[-1]).sum()) :]
            chances[beyond] = 0.0
            sums = chances.cumsum(0)
            assert token == int((sums <= number * sums[-1]).sum())


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [300, 25_000])
def test_what_rounding_makes_the_likelier_of_two_does_not_decide_what_is_drawn(vocabulary: int) -> None:
    """A row in a batch has scores that differ in the last bits from those of the row alone."""
    scores = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(1)) * 4
    best = scores[0].topk(24).indices.tolist()
    alone, beside = scores.clone(), scores.clone()
    for one, other in pairwise(best[:20:2]):
        alone[0, one], beside[0, one] = scores[0, other] + 1e-6, scores[0, other] - 1e-6
    for turn in range(200):
        rows = [sampler(seed=turn, temperature=0.9, top_p=0.9) for _ in range(2)]
        assert choose(alone.clone(), rows[:1]) == choose(beside.clone(), rows[1:])


def test_rows_of_a_large_vocabulary_choose_together_what_they_choose_alone() -> None:
    scores = torch.randn(5, 250_000, generator=torch.Generator().manual_seed(1)).bfloat16()
    said = [(7, 249_999), (), (123_456,), (), (1,)]
    settings = [{"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3}, {}, {"repetition_penalty": 2.0}, {}, {}]

    def rows(numbers: range) -> list[RowSampler]:
        return [sampler(number, said[number], **settings[number]) for number in numbers]

    together = choose(scores.clone(), rows(range(5)), [(3,), (), (), (), ()])
    alone = [choose(scores[n : n + 1].clone(), rows(range(n, n + 1)), [(3,) if n == 0 else ()])[0] for n in range(5)]
    assert together == alone
    assert together[1] == int(scores[1].argmax())


HARD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "few are likely": lambda scores: scores * 6,
    "many are equal": lambda scores: (scores * 2).round() * 2,
    "all are equal": lambda scores: scores * 0,
    "most are forbidden": lambda scores: torch.where(torch.arange(scores.shape[1]) % 171 == 9, scores, -torch.inf),
    "all but one are forbidden": lambda scores: torch.where(torch.arange(scores.shape[1]) == 4_999, scores, -torch.inf),
    "far apart": lambda scores: scores * 1e37,
    "hardly apart": lambda scores: scores * 1e-7,
}


WAYS: tuple[dict[str, Any], ...] = (
    {"top_p": 0.9},
    {"top_k": 48},
    {"top_k": 49, "top_p": 0.5},
    {"top_k": 1},
    {"top_k": 7, "top_p": 0.7},
    {"top_p": 0.3, "temperature": 0.01},
    {},
)


def by_sorting_everything(scores: torch.Tensor, sampling: Sampling, number: float) -> tuple[int, set[int]]:
    """The token of one row (vocabulary,) by the rule alone, and its nucleus; of equals the first are the likelier."""
    order = scores.argsort(descending=True, stable=True)
    chances = torch.softmax(scores.double() / (sampling.temperature or 1), -1)[order]
    if sampling.top_k:
        chances[sampling.top_k :] = 0
    sums = chances.cumsum(0)
    chances[(sums - chances) >= sampling.top_p * sums[-1]] = 0
    chances = torch.zeros_like(chances).scatter_(0, order, chances)
    sums = chances.cumsum(0)
    nucleus = chances.nonzero()[:, 0].tolist()
    return min(int((sums <= number * sums[-1]).sum()), nucleus[-1]), set(nucleus)


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("vocabulary", [5_000, 5_001])
@pytest.mark.parametrize("kind", HARD)
def test_what_is_drawn_is_what_sorting_everything_gives(
    kind: str, vocabulary: int, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_compiled and not compiled.is_there():
        pytest.skip("numba is not installed")
    assert not is_compiled or choosing._kernel() is not None
    monkeypatch.setattr(compiled, "is_there", lambda: is_compiled)
    scores = HARD[kind](torch.randn(len(WAYS), vocabulary, generator=torch.Generator().manual_seed(4)))
    for turn in range(10):
        rows = [sampler(turn, **{"temperature": 0.8, **way}) for way in WAYS]
        numbers = [sampler(turn, temperature=1.0).uniform() for _ in rows]
        tokens = choose(scores.clone(), rows)
        for own, row, number, token in zip(scores, rows, numbers, tokens, strict=True):
            wanted, nucleus = by_sorting_everything(own, row.sampling, number)
            # Where it is open how many tokens the nucleus has, a CPU draws among more of them until one is in it.
            is_open = (
                is_compiled and kind in ("many are equal", "all are equal", "hardly apart") and not row.sampling.top_k
            )
            assert token in nucleus if is_open else token == wanted


def test_without_a_kernel_torch_draws_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if compiled.is_there():  # another release of it
        monkeypatch.setattr("lora_rt.core.generation.draw_kernel.prepare", lambda: 1 / 0)
    monkeypatch.setattr(compiled, "is_there", lambda: True)
    monkeypatch.setattr(choosing, "_kernel", cache(choosing._kernel.__wrapped__))
    flat = torch.zeros(2, 5_000)
    assert None not in choose(flat, [sampler(n, temperature=1.0, top_p=0.9) for n in range(2)])
    assert None not in choose(flat, [sampler(n, temperature=1.0, top_p=0.9) for n in range(2)])
    assert caplog.text.count("tokens are drawn by torch") == 1


@pytest.mark.slow
@pytest.mark.parametrize("is_compiled", [True, False])
def test_tokens_beyond_the_few_most_likely_are_drawn_with_their_chances(
    is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_compiled and not compiled.is_there():
        pytest.skip("numba is not installed")
    monkeypatch.setattr(compiled, "is_there", lambda: is_compiled)
    flat = torch.zeros(1, 30_000)
    flat[0, :10] = 2.0
    mine = sampler(temperature=1.0)
    tokens = [chosen(mine, flat) for _ in range(400)]
    assert len(set(tokens)) > 350
    assert max(token for token in tokens if token is not None) > 25_000
    # Half of all chance lies on 48 tokens at the end, and the other half before them.
    flat = torch.zeros(1, 30_048)
    flat[0, -48:] = math.log(30_000 / 48)
    tokens = [chosen(mine, flat) for _ in range(400)]
    assert sum(token >= 30_000 for token in tokens if token is not None) / 400 == pytest.approx(0.5, abs=0.1)


def test_output_that_is_no_number_gives_no_token_and_spoils_no_other_row() -> None:
    scores = torch.cat([SCORES, SCORES * math.nan, SCORES * math.inf])
    for temperature in (None, 1.0):
        found = choose(scores.clone(), [sampler(temperature=temperature) for _ in range(3)])
        assert found[0] is not None
        assert found[1:] == [None, None]


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
def test_whole_numbers_of_any_type_are_seeds(kind: type[np.integer[Any]]) -> None:
    assert seeds_per_row(kind(5), 2) == [5, 5]
    assert seeds_per_row(np.array([1, 2], dtype=kind), 2) == [1, 2]  # type: ignore[arg-type]


def test_all_settings_out_of_range_are_named_at_once() -> None:
    wrong = Sampling(temperature=-1, top_p=0, top_k=-1, repetition_penalty=0, max_new_tokens=0, min_new_tokens=-1)
    with pytest.raises(SamplingError) as caught:
        wrong.check()
    names = ["temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "min_new_tokens"]
    assert [problem.split()[0] for problem in caught.value.problems] == names


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty"])
def test_what_is_no_finite_number_is_out_of_range(name: str, number: float) -> None:
    with pytest.raises(SamplingError):
        Sampling(**{name: number}).check()


def test_a_minimum_above_the_maximum_is_refused() -> None:
    with pytest.raises(SamplingError, match="min_new_tokens is 9"):
        Sampling(max_new_tokens=8, min_new_tokens=9).check()


def test_seeds_are_one_for_all_or_one_per_row() -> None:
    assert seeds_per_row(4, 2) == [4, 4]
    assert seeds_per_row(None, 2) == [None, None]
    assert seeds_per_row([1, None], 2) == [1, None]
    with pytest.raises(SamplingError, match="3 seeds for 2 rows"):
        seeds_per_row([1, 2, 3], 2)


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30, 1.5, "x", True, np.True_])
def test_what_is_no_seed_is_refused(seed: object) -> None:
    with pytest.raises(SamplingError, match="is not a seed"):
        seeds_per_row([seed], 1)  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty", "top_k", "max_new_tokens"])
@pytest.mark.parametrize("value", ["8", [8], b"8", True, np.True_, torch.tensor(True), 1j])
def test_what_is_no_number_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(SamplingError, match=f"{name} is .*number"):
        Sampling(**{name: value}).check()


def test_numbers_of_other_libraries_are_numbers() -> None:
    Sampling(np.float32(0.5), np.float64(0.9), np.int64(3), np.float32(1.1), np.int64(8), np.int64(0)).check()
