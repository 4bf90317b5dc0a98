"""A run: it learns, it publishes whole adapters only, it stops at bad numbers, and it resumes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_rt.version
from lora_rt.core.runtime import Runtime
from lora_rt.core.step.loss import label_nll
from lora_rt.core.step.settings import SettingsError, TrainSettings
from lora_rt.core.training import fit
from lora_rt.core.training.fit import InterruptedRunError
from lora_rt.core.training.run import train
from lora_rt.core.training.runs import newest_whole
from lora_rt.core.training.trainer import TrainingDivergedError
from lora_rt.plugins.contract import IGNORE, Encoded, Example, Objective, ObjectiveContext, hookimpl
from lora_rt.plugins.manager import load_modes
from lora_rt.registry import home
from lora_rt.registry.card import read_card
from support.tiny import mode_host

pytestmark = pytest.mark.slow

Make = Callable[..., TrainSettings]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    return out


@pytest.mark.parametrize("precision", ["float32", "int4", "int8"])
def test_training_lowers_the_held_out_loss(settings: Make, folder: Path, precision: str) -> None:
    result = train(settings(precision=precision), load_modes(), folder)
    assert result.loss_after < result.loss_before - 0.3


def test_the_held_out_loss_still_moves_after_an_evaluation_in_the_middle(
    settings: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation before training would repack 4-bit weights into a layout that has no gradient."""
    losses = []
    measured = fit.held_out_loss
    monkeypatch.setattr(fit, "held_out_loss", lambda prepared: losses.append(measured(prepared)) or losses[-1])
    train(settings(precision="int4"), load_modes(), folder)
    assert len(losses) == 3  # before, after the first of two epochs, and at the end
    assert losses[1] < losses[0] - 0.3


def test_the_trained_adapter_is_what_the_runtime_then_measures(settings: Make, folder: Path) -> None:
    chosen = settings()
    result = train(chosen, load_modes(), folder)
    runtime = Runtime.load(chosen.base, precision="float32")
    runtime.load_adapter(str(folder), name="letters")
    before = torch.cat(runtime.answer_nll(["scene 1"], ["abcabc"])).mean()
    after = torch.cat(runtime.answer_nll(["scene 1"], ["abcabc"], "letters")).mean()
    assert after < before - 0.3
    assert read_card(folder) == result.card
    assert result.card.metrics["held_out_nll_after"] == pytest.approx(result.loss_after, abs=1e-3)
    assert (result.card.lora_rt, result.card.created) == (lora_rt.version.__version__, "")


def test_one_seed_gives_one_adapter(settings: Make, tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        train(settings(epochs=1), load_modes(), tmp_path / name)
        weights.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_loss_that_is_no_number_stops_the_run_in_that_step_and_leaves_nothing(settings: Make, folder: Path) -> None:
    class Poisoned:
        @hookimpl
        def lora_rt_objective(context: ObjectiveContext) -> Objective:
            return PoisonedFromStep3(context)

    with pytest.raises(TrainingDivergedError, match="step 3"):
        train(settings(mode="poisoned"), mode_host(poisoned=Poisoned), folder)
    assert list(folder.iterdir()) == []


class PoisonedFromStep3(Objective):
    def __init__(self, context: ObjectiveContext) -> None:
        self.context = context
        self.calls = 0

    def encode(self, example: Example) -> list[Encoded]:
        answer = self.context.answer_ids(example["text"])
        return [Encoded([1, *answer], [IGNORE, *answer])]

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, extra: Mapping[str, torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        return logits.float().mean() * (math.nan if self.calls == 3 else 1.0)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during a step, as the signal handler notes it."""
    seen = fit.Checkpoints.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            self.interrupted = True
        seen(self, args, state, control, **kwargs)

    monkeypatch.setattr(fit.Checkpoints, "on_step_end", on_step_end)


def test_an_interrupted_run_resumes_to_the_adapter_of_an_undisturbed_one(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    train(settings(dropout=0.0), load_modes(), whole)
    with monkeypatch.context() as patch:
        interrupt_at(7, patch)
        with pytest.raises(InterruptedRunError, match="--resume"):
            train(settings(dropout=0.0), load_modes(), broken)
    assert list(broken.iterdir()) == []
    (run,) = home.checkpoints().glob("letters-*")
    with pytest.raises(SettingsError, match=f"its checkpoint at step 7 is there.*--resume.*remove the folder {run}"):
        train(settings(dropout=0.0), load_modes(), broken)
    train(settings(dropout=0.0), load_modes(), broken, resume=True)
    assert (broken / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    assert list(home.checkpoints().glob("*/checkpoint-*")) == []


def test_resume_without_a_checkpoint_says_so(settings: Make, folder: Path) -> None:
    with pytest.raises(SettingsError, match="no checkpoint"):
        train(settings(), load_modes(), folder, resume=True)


def test_a_run_is_not_resumed_over_another_base_in_the_same_folder(
    settings: Make, zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    out.mkdir()
    shutil.copytree(zoo.base("llama"), base)
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        with pytest.raises(InterruptedRunError):
            train(settings(base=str(base)), load_modes(), out)
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(SettingsError, match="no checkpoint"):
        train(settings(base=str(base)), load_modes(), out, resume=True)


def test_a_checkpoint_that_is_not_whole_is_not_resumed_from(tmp_path: Path) -> None:
    for steps, whole in ((5, True), (10, False)):
        checkpoint = tmp_path / f"checkpoint-{steps}"
        checkpoint.mkdir()
        if whole:
            (checkpoint / "lora-rt-whole").touch()
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-5"


def test_an_unknown_target_module_is_answered_with_the_names_and_the_nearest(settings: Make, folder: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        train(settings(target_modules=("q_porj", "out_proj")), load_modes(), folder)
    text = str(caught.value)
    assert "'q_porj'; the nearest is 'q_proj'" in text
    assert "'out_proj'; the nearest is 'o_proj'" in text
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in text


def test_settings_out_of_range_are_all_named(settings: Make, folder: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        train(settings(r=0, dropout=1.5, epochs=0), load_modes(), folder)
    assert len(caught.value.problems) == 3


def test_the_loss_counts_labelled_tokens_alone(zoo: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(zoo.base("llama"))
    ids = torch.randint(10, 200, (2, 8))
    labels = torch.full_like(ids, IGNORE)
    labels[0, 5:7] = ids[0, 5:7]
    labels[1, 6:] = ids[1, 6:]
    sums, counts = label_nll(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    chances = model(ids).logits.log_softmax(-1)
    by_hand = [-sum(chances[row, t - 1, ids[row, t]] for t in places) for row, places in ((0, (5, 6)), (1, (6, 7)))]
    assert counts.tolist() == [2, 2]
    assert torch.allclose(sums, torch.stack(by_hand), atol=1e-4)
