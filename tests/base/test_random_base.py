"""Random bases have the shape of what they stand for, in every precision."""

from __future__ import annotations

import pytest
import torch

from lora_rt.core.base.precision import PRECISIONS
from lora_rt.core.base.random_base import _config, random_base


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_random_base_answers_with_finite_logits_in_every_precision(precision: str) -> None:
    base = random_base("tiny", precision, "cpu")
    with torch.no_grad():
        logits = base.model(input_ids=torch.arange(300, 320)[None]).logits
    assert bool(logits.isfinite().all())
    assert base.facts.precision == precision
    stored = base.model.model.layers[0].mlp.up_proj.weight.dtype
    assert stored == {"int4": torch.uint8, "int8": torch.int8}.get(precision, base.dtype)
    assert not any(tensor.is_meta for tensor in [*base.model.parameters(), *base.model.buffers()])


@pytest.mark.parametrize(("size", "billions"), [("7b", 7.24), ("13b", 13.02)])
def test_the_large_ones_have_as_many_parameters_as_their_models(size: str, billions: float) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(size))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_same_size_is_the_same_base_each_time() -> None:
    assert random_base("tiny", "float32", "cpu").digest() == random_base("tiny", "float32", "cpu").digest()
