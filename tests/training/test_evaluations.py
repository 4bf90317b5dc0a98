"""Each epoch is measured; early stopping ends a run that gets worse with its best epoch; figures are logged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lora_rt.core.step import settings as settings_module
from lora_rt.core.step.settings import SettingsError, TrainSettings
from lora_rt.core.training import fit
from lora_rt.core.training.fit import InterruptedRunError
from lora_rt.core.training.run import train
from lora_rt.plugins.manager import load_modes

pytestmark = pytest.mark.slow

Make = Callable[..., TrainSettings]


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> list[float]:
    """Held-out losses as they are told to be, one after the other; those that were asked for."""
    left = iter(losses)
    asked: list[float] = []
    monkeypatch.setattr(fit, "held_out_loss", lambda prepared: asked.append(next(left)) or asked[-1])
    return asked


def test_a_run_that_gets_worse_ends_early_with_its_best_epoch(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        scripted(patch, [5.0, 3.0, 2.0, 2.5, 2.6, 2.7])  # before, four epochs, and the end
        early = train(settings(epochs=6, early_stop=2), load_modes(), tmp_path / "early")
    assert (early.steps, early.loss_after) == (24, 2.0)
    kept: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        seen = fit.Evaluations.on_step_end

        def on_step_end(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
            seen(self, args, state, control, **rest)
            if state.global_step == 12:
                kept.update({name: p.detach().clone() for name, p in self._trained()})

        patch.setattr(fit.Evaluations, "on_step_end", on_step_end)
        train(settings(epochs=6, early_stop=9), load_modes(), tmp_path / "whole")
    published = load_file(tmp_path / "early" / "adapter_model.safetensors")
    for name, tensor in kept.items():
        assert published[name.replace(".default", "")].equal(tensor.bfloat16())


def test_an_interrupted_run_goes_on_with_the_best_epoch_that_it_had(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(epochs=4, early_stop=5, dropout=0.0)
    losses = [5.0, 2.0, 3.0, 4.0, 4.5]  # the first epoch is the best
    with monkeypatch.context() as patch:
        scripted(patch, losses)
        train(chosen, load_modes(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        scripted(patch, losses)
        seen = fit.Checkpoints.on_step_end

        def on_step_end(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.interrupted = self.interrupted or state.global_step == 14
            seen(self, args, state, control, **rest)

        patch.setattr(fit.Checkpoints, "on_step_end", on_step_end)
        with pytest.raises(InterruptedRunError):
            train(chosen, load_modes(), tmp_path / "broken")
    scripted(monkeypatch, [5.0, 4.0, 4.5])
    resumed = train(chosen, load_modes(), tmp_path / "broken", resume=True)
    assert resumed.loss_after == 2.0
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert files[0] == files[1]


def test_tensorboard_gets_the_losses_of_steps_and_epochs(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    train(settings(log_to=("tensorboard",)), load_modes(), tmp_path / "out")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "logs"))
    found.Reload()
    assert {"train/loss", "eval/loss"} <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Scalars("eval/loss")] == [6]
    assert [event.step for event in found.Scalars("train/loss")] == list(range(1, 13)), "the last of an epoch too"
    assert capsys.readouterr().err.count(f"tensorboard --logdir {tmp_path / 'logs'}") == 1


def test_a_logger_that_is_unknown_or_not_installed_is_told_before_anything_else(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings_module, "find_spec", lambda name: None)
    with pytest.raises(SettingsError) as caught:
        settings(log_to=("wandb", "tensorbord"), early_stop=0).check()
    assert caught.value.problems == (
        "early stop is 0; it must be at least 1 epoch",
        "there is no logger 'tensorbord'; there are: tensorboard, wandb, trackio",
        "logging to wandb needs its package; install it with: pip install wandb",
    )
