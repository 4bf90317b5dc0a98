"""All systems do the same work: with the same composition they say the same tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.systems.base import BaseAlone
from lora_rt.core.benchmark.systems.generate import Generate
from lora_rt.core.benchmark.systems.greedy import greedy_tokens
from lora_rt.core.benchmark.systems.ours import Ours
from lora_rt.core.benchmark.systems.peft.concatenated import PeftConcatenated
from lora_rt.core.benchmark.systems.peft.mixed_batch import PeftMixedBatch
from lora_rt.core.benchmark.systems.peft.model import Peft
from lora_rt.core.benchmark.systems.peft.set_adapter import PeftSetAdapter
from lora_rt.core.benchmark.workloads import Workload

ONE_MIX = Workload("one", "one", rows=3, active=2, prompt_tokens=9, new_tokens=12, rank=8)
MIXES = replace(ONE_MIX, distinct=True)
SINGLES = replace(ONE_MIX, distinct=True, active=1, weighted=False)


def test_one_composition_is_the_same_in_ours_and_in_both_ways_of_peft(lab: Lab) -> None:
    peft = Peft(lab)
    ours = Ours(lab).tokens(ONE_MIX)
    assert len(ours) == 3
    assert {len(row) for row in ours} == {13}
    assert PeftSetAdapter(lab, peft).tokens(ONE_MIX) == ours
    assert PeftConcatenated(lab, peft).tokens(ONE_MIX) == ours
    assert PeftSetAdapter(lab, peft).tokens(ONE_MIX) == ours  # no way leaves its scales to the next
    assert BaseAlone(lab).tokens(ONE_MIX) != ours


def test_each_row_of_a_mixed_batch_is_what_peft_says_under_that_rows_composition(lab: Lab) -> None:
    peft = Peft(lab)
    model = peft.reside(MIXES)
    for row, said in enumerate(Ours(lab).tokens(MIXES)):
        peft.activate(MIXES.mix(row))
        assert greedy_tokens(lab, model, MIXES)[row] == said


def test_one_adapter_per_row_is_the_same_in_ours_and_in_pefts_mixed_batch(lab: Lab) -> None:
    assert PeftMixedBatch(lab, Peft(lab)).tokens(SINGLES) == Ours(lab).tokens(SINGLES)


def test_the_base_is_the_same_by_the_plain_loop_by_generate_and_without_an_active_adapter(lab: Lab) -> None:
    alone = replace(ONE_MIX, active=0)
    base = BaseAlone(lab).tokens(alone)
    assert Generate(lab).tokens(alone) == base
    assert Ours(lab).tokens(alone) == base
    assert PeftSetAdapter(lab, Peft(lab)).tokens(alone) == base


def test_systems_share_the_weights_and_not_the_modules(lab: Lab) -> None:
    Ours(lab).tokens(ONE_MIX)
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
    ours, peft = Ours(lab), Peft(lab)
    for resident in (4, 6, 2):
        workload = replace(ONE_MIX, resident=resident)
        ours.prepare(workload)
        assert len(ours._runtime.adapters) == resident
        assert len(peft.reside(workload).peft_config) == resident
    other = replace(ONE_MIX, targets=("q_proj", "v_proj"))
    assert PeftSetAdapter(lab, peft).tokens(other) == ours.tokens(other)


@pytest.mark.parametrize(
    ("system", "workload", "reason"),
    [
        ("set", MIXES, "cannot mix weights in a batch"),
        ("cat", MIXES, "one mix for all rows"),
        ("mixed", MIXES, "one adapter per row, no weights"),
        ("set", ONE_MIX, None),
        ("mixed", SINGLES, None),
        ("base", replace(ONE_MIX, kind="change"), "has no composition"),
        ("ours", MIXES, None),
    ],
)
def test_what_a_system_cannot_do_it_says(lab: Lab, system: str, workload: Workload, reason: str | None) -> None:
    peft = Peft(lab)
    systems = {
        "set": PeftSetAdapter(lab, peft),
        "cat": PeftConcatenated(lab, peft),
        "mixed": PeftMixedBatch(lab, peft),
        "base": BaseAlone(lab),
        "ours": Ours(lab),
    }
    assert systems[system].reason(workload) == reason


def test_changes_are_timed_in_ours_and_in_peft(lab: Lab) -> None:
    change = replace(ONE_MIX, kind="change")
    peft = Peft(lab)
    for system in (Ours(lab), PeftSetAdapter(lab, peft), PeftConcatenated(lab, peft)):
        assert system.prepare(change)().seconds > 0
    assert PeftSetAdapter(lab, peft).tokens(ONE_MIX) == Ours(lab).tokens(ONE_MIX)
