"""A run learns, and takes the memory that is planned for it."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_rt.core.base.load import load_base
from lora_rt.core.base.precision import Precision
from lora_rt.core.memory.estimate import read_config
from lora_rt.core.memory.inference import plan_inference
from lora_rt.core.memory.training import plan_training
from lora_rt.core.runtime import Runtime
from lora_rt.core.step.adapter import checkpointed, with_adapter
from lora_rt.core.step.loss import label_nll
from lora_rt.core.step.settings import TrainSettings
from lora_rt.core.training.prepare import prepare
from lora_rt.core.training.run import train
from lora_rt.core.training.trainer import Collator, Sequences
from lora_rt.plugins.manager import load_modes
from support.features import lacks
from support.tiny import EVEN, Zoo

pytestmark = pytest.mark.slow

NEAR = 0.15
"""The share by which a peak may differ from its plan."""
SIZE = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
}
ROWS, TOKENS, LABELS = 4, 512, 200


@pytest.fixture
def settings(zoo: Zoo, tmp_path: Path, device: str) -> Callable[..., TrainSettings]:
    def make(**changes: Any) -> TrainSettings:
        lines = [json.dumps({"scene": f"scene {n}", "text": "abcabcabc"[: 6 + n % 3]}) for n in range(24)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
        base, data = str(zoo.base("llama", **EVEN)), tmp_path / "pairs.jsonl"
        plain: dict[str, Any] = {"base": base, "data": data, "device": device, "r": 4, "alpha": 8, "epochs": 2}
        plain |= {"learning_rate": 2e-2, "batch_size": 4, "target_modules": ("all-linear",)}
        return TrainSettings("letters", "output-only", **{**plain, **changes})

    return make


def test_a_run_lowers_the_loss_and_the_runtime_measures_the_same(
    settings: Callable[..., TrainSettings], tmp_path: Path, device: str, precision: Precision
) -> None:
    chosen = settings(precision=precision)
    result = train(chosen, load_modes(), tmp_path / "out")
    assert result.loss_after < result.loss_before - 0.3
    runtime = Runtime.load(chosen.base, precision=precision, device=device)
    runtime.load_adapter(str(tmp_path / "out"), name="letters")
    before, after = (torch.cat(runtime.answer_nll(["scene 1"], ["abcabc"], spec)).mean() for spec in (None, "letters"))
    assert after < before - 0.3


def test_rows_are_packed_and_keep_the_losses_and_gradients_of_padded_ones(
    settings: Callable[..., TrainSettings], device: str, precision: Precision
) -> None:
    prepared = prepare(settings(precision=precision, dropout=0.0), load_modes())
    assert prepared.packed
    rows = Sequences(prepared.training)
    batch = Collator(prepared.text.pad_id)([rows[number] for number in range(4)])
    moved = {key: value.to(device) for key, value in batch.items()}
    trained = [parameter for parameter in prepared.model.train().parameters() if parameter.requires_grad]
    for number, parameter in enumerate(trained):
        torch.nn.init.normal_(parameter, 0, 0.05, generator=torch.Generator(device).manual_seed(number))
    found = []
    for packed in (False, True):
        prepared.model.zero_grad()
        sums, counts = label_nll(prepared.model, moved, packed=packed)
        (sums.sum() / counts.sum()).backward()  # type: ignore[no-untyped-call]
        found.append((sums.detach(), torch.cat([p.grad.flatten().float() for p in trained if p.grad is not None])))
    (losses, grads), (packed_losses, packed_grads) = found
    assert packed_losses.allclose(losses, rtol=0.02)
    assert (packed_grads - grads).norm() < 0.1 * grads.norm()


def test_the_optimizer_is_paged_on_a_gpu_alone(settings: Callable[..., TrainSettings], device: str) -> None:
    wanted = "adamw" if device == "cpu" else "paged-adamw-8bit"
    assert prepare(settings(precision="int4"), load_modes()).portions.optimizer == wanted


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("optimizer", ["adamw", "paged-adamw-8bit"])
def test_both_optimizers_learn(settings: Callable[..., TrainSettings], tmp_path: Path, optimizer: str) -> None:
    result = train(settings(precision="int4", optimizer=optimizer), load_modes(), tmp_path / "out")
    assert result.loss_after < result.loss_before - 0.3


def peak() -> int:
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@pytest.fixture
def fresh_memory() -> None:
    """Nothing of other tests counts."""
    if not torch.cuda.is_available():
        pytest.skip(lacks("CUDA"))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
def test_a_prefill_takes_what_is_planned(fresh_memory: None, zoo: Zoo, precision: Precision) -> None:
    base, targets = zoo.base("llama", **SIZE), ("q_proj", "v_proj")
    before = torch.cuda.memory_allocated()
    runtime = Runtime.load(str(base), precision=precision, device="cuda")
    weights = torch.cuda.memory_allocated() - before
    for seed in (1, 2):
        runtime.load_adapter(str(zoo.adapter("llama", changes=SIZE, r=16, targets=targets, seed=seed)), name=f"a{seed}")
    torch.cuda.reset_peak_memory_stats()
    ids = [[9] * TOKENS] * ROWS
    next(iter(runtime.decode(ids, "a1:0.5 a2:0.5", max_new_tokens=2)))
    found = peak() - before
    plan = plan_inference(
        read_config(str(base)).config,
        precision,
        "cuda",
        TrainSettings("plan", "output-only", Path(), r=16, target_modules=targets),
        adapters=2,
        rows=ROWS,
        tokens=TOKENS,
    )
    print(f"{precision}: weights {weights}, peak {found}, plan {plan.total} of {plan}")
    assert plan.total == pytest.approx(found, rel=NEAR)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["bfloat16", "int4"])
def test_a_step_takes_what_is_planned(fresh_memory: None, zoo: Zoo, precision: Precision, checkpointing: bool) -> None:
    base = zoo.base("llama", **SIZE)
    chosen = TrainSettings("plan", "output-only", Path(), r=16, target_modules=("all-linear",))
    before = torch.cuda.memory_allocated()
    model = with_adapter(load_base(str(base), precision, "cuda", for_training=True).model, chosen).train()
    if checkpointing:
        checkpointed(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.full((ROWS, TOKENS), 9, device="cuda")
    labels = ids.clone()
    labels[:, :-LABELS] = -100
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        sums, counts = label_nll(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
        (sums.sum() / counts.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = peak() - before
    plan = plan_training(
        read_config(str(base)).config,
        precision,
        "cuda",
        chosen,
        rows=ROWS,
        tokens=TOKENS,
        labels=LABELS,
        optimizer="adamw",
        checkpointing=checkpointing,
    )
    print(f"{precision}, checkpointing {checkpointing}: peak {found}, plan {plan.peak} of {plan}")
    assert plan.peak == pytest.approx(found, rel=NEAR)
