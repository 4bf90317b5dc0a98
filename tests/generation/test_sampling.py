"""Sampling settings do what they are called after, and settings that make no sense are refused, all at once."""

from __future__ import annotations

import math

import pytest
import torch

from lora_rt.core.generation.choosing import Chooser
from lora_rt.core.generation.sampling import Sampling, SamplingError, seeds_per_row

END = 3
SCORES = torch.tensor([[2.0, 1.0, 0.5, 3.0]])


def chooser(seed: int = 0, **settings: object) -> Chooser:
    return Chooser(Sampling(**settings), [seed], [END])  # type: ignore[arg-type]


def drawn(count: int = 400, **settings: object) -> list[float]:
    """How often each token is chosen."""
    mine = chooser(**settings)
    tokens = [mine.choose(SCORES, [[]])[0] for _ in range(count)]
    return [tokens.count(token) / count for token in range(4)]


@pytest.mark.parametrize("temperature", [None, 0, 0.0, 1e-30])
def test_without_a_temperature_the_best_token_is_taken(temperature: float | None) -> None:
    assert drawn(20, temperature=temperature) == [0, 0, 0, 1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_the_chances_of_their_scores(temperature: float) -> None:
    wanted = torch.softmax(SCORES[0] / temperature, -1).tolist()
    assert drawn(2000, temperature=temperature) == pytest.approx(wanted, abs=0.04)


def test_top_p_leaves_the_smallest_set_of_tokens_that_holds_that_share() -> None:
    # Chances 0.62, 0.23, 0.08, 0.05 of tokens 3, 0, 1, 2.
    assert drawn(temperature=1.0, top_p=0.6) == [0, 0, 0, 1]
    some = drawn(temperature=1.0, top_p=0.8)
    assert some[1] == some[2] == 0
    assert some[0] > 0.1


def test_top_k_leaves_that_many_tokens() -> None:
    some = drawn(temperature=2.0, top_k=2)
    assert some[1] == some[2] == 0
    assert some[0] > 0.1
    assert drawn(temperature=2.0, top_k=99)[2] > 0.05


def test_too_short_an_answer_can_not_end() -> None:
    mine = chooser(min_new_tokens=2, max_new_tokens=5)
    assert [mine.choose(SCORES, [answer])[0] for answer in ([], [1], [1, 1])] == [0, 0, END]
    assert drawn(temperature=1.0, min_new_tokens=1)[END] == 0


def test_every_end_is_forbidden_to_too_short_an_answer() -> None:
    mine = Chooser(Sampling(min_new_tokens=1), [0, 0], [0, END])
    assert mine.choose(SCORES.expand(2, -1), [[], [1]]) == [1, END]


def test_a_repetition_penalty_counts_the_answer_s_own_tokens() -> None:
    mine = chooser(repetition_penalty=2.0)
    assert [mine.choose(SCORES, [answer])[0] for answer in ([], [END], [END, 0], [END, END])] == [END, 0, END, 0]


def test_a_row_draws_the_same_whatever_stands_beside_it() -> None:
    settings = Sampling(temperature=1.5, top_p=0.95)
    alone, beside = Chooser(settings, [7], [END]), Chooser(settings, [8, 7, None], [END])
    for _ in range(30):
        batch = torch.cat([torch.rand(1, 4), SCORES, torch.rand(1, 4)])
        assert beside.choose(batch, [[], [], []])[1] == alone.choose(SCORES, [[]])[0]


def test_output_that_is_no_number_is_explained_and_its_row_named() -> None:
    scores = torch.cat([SCORES, SCORES * math.nan])
    for temperature in (None, 1.0):
        mine = Chooser(Sampling(temperature), [0, 0], [END])
        with pytest.raises(SamplingError, match="row 1"):
            mine.choose(scores, [[], []])


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


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30, 1.5, "x"])
def test_what_is_no_seed_is_refused(seed: object) -> None:
    with pytest.raises(SamplingError, match="is no seed"):
        seeds_per_row([seed], 1)  # type: ignore[list-item]
