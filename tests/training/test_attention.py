"""Attention in float32 while a model of fewer bits trains on a CPU: the same numbers, rounded less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_rt.core.base.load import load_base
from lora_rt.core.step import attention
from lora_rt.core.step.adapter import with_adapter
from lora_rt.core.step.attention import NAME, attend_by_rows, attend_in_float32
from lora_rt.core.step.loss import label_nll
from lora_rt.core.step.settings import TrainSettings
from support.tiny import Zoo, some_ids


def step(base: Path, precision: str, *, widely: bool) -> tuple[float, Tensor]:
    """The loss of one step over padded rows, and its gradients in one tensor."""
    torch.manual_seed(0)
    model = with_adapter(
        load_base(str(base), precision, "cpu", for_training=True).model,
        TrainSettings("t", "output-only", Path(), r=4, target_modules=("all-linear",), dropout=0.0),
    ).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for number, parameter in enumerate(trained):
            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(number))
    if widely:
        attend_in_float32(model)
    ids, mask = some_ids(rows=3, tokens=20), torch.ones((3, 20), dtype=torch.long)
    mask[0, 12:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    sums, counts = label_nll(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    loss = sums.sum() / counts.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), torch.cat(
        [parameter.grad.flatten().float() for parameter in trained if parameter.grad is not None]
    )


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "gpt2", "opt"])
def test_a_step_is_as_near_to_the_one_in_float32_as_before(zoo: Zoo, architecture: str) -> None:
    base = zoo.base(architecture)
    (wanted, exact), (before, plain), (now, wide) = (
        step(base, "float32", widely=False),
        step(base, "bfloat16", widely=False),
        step(base, "bfloat16", widely=True),
    )
    assert now == pytest.approx(wanted, abs=max(2 * abs(before - wanted), 0.02))
    assert (wide - exact).norm() <= 1.2 * (plain - exact).norm()


@pytest.mark.slow
def test_models_in_float32_and_those_that_attend_otherwise_stay_as_they_are(zoo: Zoo) -> None:
    whole = load_base(str(zoo.base("llama")), "float32", "cpu").model
    attend_in_float32(whole)
    assert whole.config._attn_implementation == "sdpa"
    eager = load_base(str(zoo.base("llama")), "bfloat16", "cpu").model
    eager.set_attn_implementation("eager")
    attend_in_float32(eager)
    assert eager.config._attn_implementation == "eager"
    few = load_base(str(zoo.base("llama")), "int4", "cpu", for_training=True).model
    attend_in_float32(few)
    assert few.config._attn_implementation == NAME


@pytest.mark.slow
def test_a_trial_of_packed_rows_that_is_broken_off_leaves_the_model_as_it_was(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    model = load_base(str(zoo.base("llama")), "float32", "cpu").model.train()
    monkeypatch.setattr(attention, "_keeps_packed_rows_apart", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attend_by_rows(model, 8)
    assert (model.training, model.config._attn_implementation) == (True, "sdpa")
