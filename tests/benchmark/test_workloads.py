"""The workloads are what their names say, and names that nobody knows are refused."""

from __future__ import annotations

import pytest

from lora_rt.core.benchmark.workloads import (
    DEFAULT,
    QUICK,
    BenchmarkError,
    Workload,
    choose_workloads,
)

BY_NAME = {workload.name: workload for workload in (*DEFAULT, *QUICK)}


def test_no_two_workloads_share_a_name() -> None:
    assert len(BY_NAME) == len(DEFAULT) + len(QUICK)


@pytest.mark.parametrize("workload", BY_NAME.values(), ids=lambda workload: workload.name)
def test_every_row_uses_as_many_residents_as_it_says(workload: Workload) -> None:
    residents = set(workload.residents)
    for mix in workload.mixes:
        assert len({name for name, _ in mix}) == workload.active
        assert {name for name, _ in mix} <= residents
    if workload.weighted:  # sixteen rows with one of four adapters each can't all be different without weights
        assert len(set(workload.mixes)) == (workload.rows if workload.distinct else 1)


def test_sixteen_rows_of_two_among_sixty_four_use_thirty_two_different_adapters() -> None:
    used = [name for mix in BY_NAME["rows16-k64"].mixes for name, _ in mix]
    assert len(set(used)) == 32


def test_patterns_choose_and_unknown_names_are_all_refused_with_the_nearest() -> None:
    assert [workload.name for workload in choose_workloads(["row1-k*"])] == ["row1-k2", "row1-k4"]
    with pytest.raises(BenchmarkError) as caught:
        choose_workloads(["row1-k2", "prefil", "nothing-like-it"])
    assert [problem for problem in caught.value.problems if "prefill" in problem]
    assert len(caught.value.problems) == 2
    assert "rows16-mixes" in caught.value.next_step
