"""All systems do the same work: with the same composition they say the same tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.session import make_systems, repeat_of
from lora_rt.core.benchmark.systems import Ours, System, run_plainly
from lora_rt.core.benchmark.with_peft import Peft, PeftAdapters
from lora_rt.core.benchmark.workloads import SYSTEMS, Workload

pytestmark = pytest.mark.slow

ONE_MIX = Workload("one", "one", rows=3, active=2, prompt_tokens=9, new_tokens=12, rank=8)
MIXES = replace(ONE_MIX, distinct=True)
SINGLES = replace(ONE_MIX, distinct=True, active=1, weighted=False)


def said(system: System, workload: Workload) -> list[list[int]]:
    system.prepare(workload)
    return system.run(workload).tokens


@pytest.fixture
def systems(lab: Lab) -> dict[str, System]:
    return {system.name: system for system in make_systems(list(SYSTEMS), lab)}


def test_the_columns_stand_in_the_order_of_the_table(systems: dict[str, System]) -> None:
    assert list(systems) == list(SYSTEMS)


def test_one_composition_is_the_same_in_ours_and_in_both_ways_of_peft(systems: dict[str, System]) -> None:
    ours = said(systems["ours"], ONE_MIX)
    assert len(ours) == 3
    assert {len(row) for row in ours} == {13}
    assert said(systems["peft-set"], ONE_MIX) == ours
    assert said(systems["peft-cat"], ONE_MIX) == ours
    assert said(systems["peft-set"], ONE_MIX) == ours  # no way leaves its scales, or its adapter, to the next
    assert said(systems["base"], ONE_MIX) != ours


def test_each_row_of_a_mixed_batch_is_what_peft_says_under_that_rows_composition(lab: Lab) -> None:
    peft = PeftAdapters(lab)
    peft.reside(MIXES)
    for row, tokens in enumerate(said(Ours(lab), MIXES)):
        peft.activate(MIXES.mix(row))
        assert run_plainly(lab, peft.model, MIXES).tokens[row] == tokens


def test_one_adapter_per_row_is_the_same_in_ours_and_in_pefts_mixed_batch(systems: dict[str, System]) -> None:
    assert said(systems["peft-set"], ONE_MIX)  # whose weights must not stay
    assert said(systems["peft-mixed"], SINGLES) == said(systems["ours"], SINGLES)


def test_the_base_is_the_same_by_the_plain_loop_by_generate_and_without_an_active_adapter(
    systems: dict[str, System],
) -> None:
    alone = replace(ONE_MIX, active=0)
    base = said(systems["base"], alone)
    for name in ("generate", "ours", "peft-set"):
        assert said(systems[name], alone) == base


@pytest.mark.parametrize("name", ["base", "generate", "ours", "peft-set", "peft-cat"])
def test_sampled_tokens_are_as_many_as_greedy_ones_and_others(systems: dict[str, System], name: str) -> None:
    greedy, drawn = said(systems[name], ONE_MIX), said(systems[name], replace(ONE_MIX, sampled=True))
    assert [len(row) for row in drawn] == [len(row) for row in greedy]
    assert drawn != greedy


def test_systems_share_the_weights_and_not_the_modules(lab: Lab) -> None:
    said(Ours(lab), ONE_MIX)
    mine, other = lab.model(), lab.base.model
    assert not any("forward" in vars(module) for module in [*mine.modules(), *other.modules()])
    assert all(a is b for a, b in zip(mine.parameters(), other.parameters(), strict=True))
    assert not set(mine.modules()) & set(other.modules())


def test_a_quantized_base_is_shared_too(lab: Lab, tmp_path: object) -> None:
    quantized = Lab(replace(lab.origin, precision="int4"), lab.folder / "int4")
    ids = torch.tensor(quantized.prompts(ONE_MIX))
    with torch.inference_mode():
        logits = [model(input_ids=ids).logits for model in (quantized.model(), quantized.base.model)]
    assert torch.equal(*logits)


def test_exactly_the_workloads_adapters_are_resident(lab: Lab) -> None:
    ours, peft = Ours(lab), PeftAdapters(lab)
    for resident in (4, 6, 2):
        workload = replace(ONE_MIX, resident=resident)
        ours.prepare(workload)
        peft.reside(workload)
        assert len(ours.runtime.adapters) == len(peft.model.peft_config) == resident
    other = replace(ONE_MIX, targets=("q_proj", "v_proj"))
    assert said(Peft(lab, "set", peft), other) == said(ours, other)


@pytest.mark.parametrize(
    ("system", "workload", "reason"),
    [
        ("peft-set", MIXES, "cannot mix weights in a batch"),
        ("peft-cat", MIXES, "one mix for all rows"),
        ("peft-mixed", MIXES, "one adapter per row, no weights"),
        ("peft-set", ONE_MIX, None),
        ("peft-mixed", SINGLES, None),
        ("base", replace(ONE_MIX, kind="change"), "has no composition"),
        ("ours", MIXES, None),
    ],
)
def test_what_a_system_cannot_do_it_says(
    systems: dict[str, System], system: str, workload: Workload, reason: str | None
) -> None:
    assert systems[system].reason(workload) == reason


def test_changes_are_timed_in_ours_and_in_peft(lab: Lab, systems: dict[str, System]) -> None:
    change = replace(ONE_MIX, kind="change")
    for name in ("ours", "peft-set", "peft-cat"):
        repeat = repeat_of(lab, systems[name], change)
        assert repeat().seconds > 0
        assert repeat().seconds > 0
    assert said(systems["peft-set"], ONE_MIX) == said(systems["ours"], ONE_MIX)
