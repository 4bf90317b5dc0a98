"""All systems do the same work: with the same composition they say the same tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.session import ready
from lora_rt.core.benchmark.systems import LOADERS, loaded, runtime_of
from lora_rt.core.benchmark.workloads import SYSTEMS, Workload, reason

pytestmark = pytest.mark.slow

ONE_MIX = Workload("one", "one", rows=3, active=2, prompt_tokens=9, new_tokens=12, rank=8)
MIXES = replace(ONE_MIX, distinct=True)
SINGLES = replace(ONE_MIX, distinct=True, active=1, weighted=False)


def said(lab: Lab, workload: Workload, *names: str) -> list[list[list[int]]]:
    """What each of these systems says in turn."""
    with loaded(lab, workload, set(names)) as systems:
        found = []
        for name in names:
            systems[name].prepare()
            found.append(systems[name].run().tokens)
        return found


def test_all_columns_but_that_of_training_can_be_loaded() -> None:
    assert [*LOADERS, "peft-trainer"] == sorted(SYSTEMS, key=lambda name: name == "peft-trainer")


def test_one_composition_is_the_same_in_ours_and_in_both_ways_of_peft(lab: Lab) -> None:
    base, ours, *peft = said(lab, ONE_MIX, "base", "ours", "peft-set", "peft-cat", "peft-set")
    assert len(ours) == 3
    assert {len(row) for row in ours} == {13}
    assert peft == [ours] * 3  # no way leaves its scales, or its adapter, to the next
    assert base != ours


def test_each_row_of_a_mixed_batch_is_what_peft_says_under_that_rows_composition(lab: Lab) -> None:
    with loaded(lab, MIXES, ["ours", "peft-set"]) as systems:
        for row, tokens in enumerate(systems["ours"].run().tokens):
            systems["peft-set"].change(MIXES.mix(row))
            assert systems["peft-set"].run().tokens[row] == tokens


def test_one_adapter_per_row_is_the_same_in_ours_and_in_pefts_mixed_batch(lab: Lab) -> None:
    with loaded(lab, SINGLES, ["peft-set", "peft-mixed", "ours"]) as systems:
        systems["peft-set"].change(ONE_MIX.mix(0))  # whose weights must not stay
        systems["peft-mixed"].prepare()
        assert systems["peft-mixed"].run().tokens == systems["ours"].run().tokens


def test_the_base_is_the_same_by_the_plain_loop_by_generate_and_without_an_active_adapter(lab: Lab) -> None:
    base, *others = said(lab, replace(ONE_MIX, active=0), "base", "generate", "ours", "peft-set")
    assert others == [base] * 3


@pytest.mark.parametrize("name", ["base", "generate", "ours", "peft-set", "peft-cat"])
def test_sampled_tokens_are_as_many_as_greedy_ones_and_others(lab: Lab, name: str) -> None:
    (greedy,), (drawn,) = said(lab, ONE_MIX, name), said(lab, replace(ONE_MIX, sampled=True), name)
    assert [len(row) for row in drawn] == [len(row) for row in greedy]
    assert drawn != greedy


def test_systems_share_the_weights_and_not_the_modules(lab: Lab) -> None:
    with loaded(lab, ONE_MIX, ["ours"]) as systems:
        systems["ours"].run()
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
    for resident in (4, 6, 2):
        with runtime_of(lab, replace(ONE_MIX, resident=resident)) as runtime:
            assert len(runtime.adapters) == resident
    ours, peft = said(lab, replace(ONE_MIX, targets=("q_proj", "v_proj")), "ours", "peft-set")
    assert peft == ours


@pytest.mark.parametrize(
    ("system", "workload", "why"),
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
def test_what_a_system_cannot_do_it_says(lab: Lab, system: str, workload: Workload, why: str | None) -> None:
    assert reason(system, workload, lab.origin) == why


def test_changes_are_timed_in_ours_and_in_peft(lab: Lab) -> None:
    change = replace(ONE_MIX, kind="change")
    with ready(lab, change, ["ours", "peft-set", "peft-cat"]) as repeats:
        for repeat in [*repeats.values()] * 2:
            assert repeat().seconds > 0
