"""Medians, spreads and ratios, on numbers made up for it."""

from __future__ import annotations

import pytest

from lora_rt.core.benchmark.results import Measured, Sample, ratio, row, spread
from lora_rt.core.benchmark.workloads import Workload


def samples(*seconds: float, tokens: int = 100) -> list[Sample]:
    return [Sample(time, tokens) for time in seconds]


def test_the_spread_is_the_interquartile_range_as_a_part_of_the_median() -> None:
    assert spread([10.0, 20.0, 30.0, 40.0, 50.0]) == pytest.approx((40 - 20) / 30)
    assert spread([7.0]) == 0.0


def test_the_ratio_is_the_median_of_ratios_within_repeats_not_the_ratio_of_medians() -> None:
    base, ours = samples(1.0, 1.0, 10.0), samples(2.0, 4.0, 10.0)  # the third repeat was slow for both
    assert ratio(ours, base) == pytest.approx(0.5)  # of 0.5, 0.25 and 1
    assert ratio(ours, []) is None


def test_a_repeat_that_was_cut_off_counts_for_nobody() -> None:
    assert ratio(samples(2.0), samples(1.0, 100.0)) == pytest.approx(0.5)


def test_a_row_holds_the_median_speed_and_the_ratio_to_the_base() -> None:
    found = row(Measured(Workload("w", "w"), {"base": samples(1.0, 1.0, 2.0), "ours": samples(2.0, 2.0, 2.0)}), "ours")
    assert (found["tokens_per_s"], found["ratio_to_base"], found["spread"]) == (50.0, 0.5, 0.0)


def test_a_change_of_composition_has_seconds_and_no_tokens() -> None:
    item = Measured(Workload("w", "w", kind="change"), {"ours": samples(0.002, 0.004, 0.003, tokens=0)})
    found = row(item, "ours")
    assert (found["tokens_per_s"], found["ratio_to_base"], found["seconds"]) == (None, None, 0.003)


def test_training_is_compared_with_the_trainer_and_not_with_the_base() -> None:
    item = Measured(Workload("w", "w", kind="training"), {"ours": samples(1.0), "peft-trainer": samples(2.0)})
    found = row(item, "ours")
    assert (found["ratio"], found["reference"], found["ratio_to_base"]) == (2.0, "peft-trainer", None)


def test_half_the_memory_is_a_ratio_of_two() -> None:
    item = Measured(
        Workload("w", "w", kind="memory"),
        {"base": [Sample(1.0, megabytes=200.0)], "ours": [Sample(1.0, megabytes=100.0)]},
    )
    found = row(item, "ours")
    assert (found["megabytes"], found["ratio_to_base"], found["tokens_per_s"]) == (100.0, 2.0, None)
