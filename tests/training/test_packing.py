"""Rows packed one behind the other have the losses and the gradients of padded ones, and every token is run once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_rt.core.base.load import load_base
from lora_rt.core.step.adapter import checkpointed, with_adapter
from lora_rt.core.step.attention import attend_by_rows, attend_in_float32
from lora_rt.core.step.loss import label_nll
from lora_rt.core.step.packing import Packing
from lora_rt.core.step.settings import TrainSettings
from lora_rt.core.training.prepare import prepare
from lora_rt.plugins.manager import load_modes
from support.tiny import Zoo

SHARED, LENGTHS = 4, (12, 7, 10)


def batch() -> dict[str, Tensor]:
    """Three rows of different lengths that begin alike, with labels from different places on."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 200, (len(LENGTHS), max(LENGTHS)), generator=generator)
    ids[:, :SHARED] = ids[0, :SHARED]
    ids[:, SHARED] = torch.tensor([11, 12, 13])
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    labels = ids.where(mask.bool(), -100)
    for row, prompt in enumerate((8, 4, 5)):
        labels[row, :prompt] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def adapted(base: Path, precision: str = "float32") -> Any:
    model = with_adapter(
        load_base(str(base), precision, "cpu", for_training=True).model,
        TrainSettings("t", "output-only", Path(), r=4, target_modules=("all-linear",), dropout=0.0),
    ).train()
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(number))
    attend_in_float32(model)
    return model


def step(model: Any, *, packed: bool) -> tuple[Tensor, Tensor]:
    """The losses of the rows, and all gradients in one tensor."""
    model.zero_grad()
    sums, counts = label_nll(model, batch(), packed=packed)
    (sums.sum() / counts.sum()).backward()  # type: ignore[no-untyped-call]
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return sums.detach(), torch.cat(grads)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_in_float32_losses_and_gradients_are_those_of_padded_rows(zoo: Zoo, architecture: str) -> None:
    model = adapted(zoo.base(architecture))
    losses, grads = step(model, packed=False)
    assert attend_by_rows(model, max(LENGTHS))
    packed_losses, packed_grads = step(model, packed=True)
    assert packed_losses.allclose(losses, rtol=1e-5)
    assert (packed_grads - grads).norm() < 1e-5 * grads.norm()
    again, _ = step(model, packed=False)
    assert again.equal(losses)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "int4"])
def test_in_fewer_bits_they_are_as_near(zoo: Zoo, precision: str) -> None:
    model = adapted(zoo.base("llama"), precision)
    losses, grads = step(model, packed=False)
    assert attend_by_rows(model, max(LENGTHS))
    packed_losses, packed_grads = step(model, packed=True)
    assert packed_losses.allclose(losses, rtol=0.01)
    assert (packed_grads - grads).norm() < 0.05 * grads.norm()


def test_they_are_the_same_where_blocks_are_run_again_in_the_backward_pass(zoo: Zoo) -> None:
    model = adapted(zoo.base("llama"))
    assert attend_by_rows(model, max(LENGTHS))
    losses, grads = step(model, packed=True)
    checkpointed(model)
    found, again = step(model, packed=True)
    assert found.equal(losses)
    assert again.allclose(grads)


def test_every_real_token_is_run_once_and_the_head_sees_those_before_labels_alone(zoo: Zoo) -> None:
    model = adapted(zoo.base("llama"))
    assert attend_by_rows(model, max(LENGTHS))
    seen: dict[str, list[int]] = {"mlp": [], "head": []}
    inner = model.get_base_model()
    inner.model.layers[0].mlp.register_forward_pre_hook(lambda _m, x: seen["mlp"].append(x[0].shape[:-1].numel()))
    inner.lm_head.register_forward_pre_hook(lambda _m, x: seen["head"].append(x[0].shape[:-1].numel()))
    label_nll(model, batch(), packed=True)
    labels = (batch()["labels"] != -100).sum()
    assert seen == {"mlp": [sum(LENGTHS) - 2 * SHARED], "head": [labels]}


def test_rows_that_begin_apart_and_a_row_alone_share_nothing() -> None:
    apart = batch()
    apart["input_ids"][:, 0] = torch.tensor([1, 2, 3])
    assert Packing.of(apart).shared == 0
    alone = Packing.of({key: value[:1] for key, value in batch().items()})
    assert alone.shared == 0
    assert alone.ids.tolist() == batch()["input_ids"][:1].tolist()


def test_a_model_that_can_not_keep_packed_rows_apart_stays_as_it_is(zoo: Zoo) -> None:
    narrow = adapted(zoo.base("mistral", sliding_window=8))
    assert not attend_by_rows(narrow, 9)
    assert narrow.config._attn_implementation == "sdpa"
    assert attend_by_rows(narrow, 8)
    eager = load_base(str(zoo.base("llama")), "float32", "cpu").model
    eager.set_attn_implementation("eager")
    assert not attend_by_rows(eager, 4)


def test_a_model_in_which_tokens_meet_outside_of_attention_stays_as_it_is(zoo: Zoo) -> None:
    model = adapted(zoo.base("llama"))
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.register_forward_hook(lambda _m, _x, y: y + y.cumsum(1))  # as a convolution or a recurrence would
    assert not attend_by_rows(model, 4)
    assert model.config._attn_implementation == "sdpa"
    assert model.training


@pytest.mark.slow
def test_a_run_packs_unless_the_mode_wants_the_logits(settings: Callable[..., TrainSettings]) -> None:
    modes = load_modes()
    assert prepare(settings(), modes).packed
    weighted = settings(mode="bridge", options={"compress-weight": "2"})
    assert not prepare(weighted, modes).packed
