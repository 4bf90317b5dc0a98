"""The held-out loss after each epoch: said, logged, and with `early_stop` a reason to end; the best epoch is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

BEST = "best.safetensors"


class Evaluations(TrainerCallback):  # type: ignore[misc]
    """Measures after every epoch but the last, behind which the run itself does.

    Args:
        model: what is trained.
        measure: the held-out loss, nats per labelled token.
        steps: of an epoch.
        patience: stop when so many epochs in a row were no better than the best; None never stops.
        folder: of the run, where the best weights are kept for `--resume`; None keeps none.
    """

    def __init__(
        self, model: nn.Module, measure: Callable[[], float], steps: int, patience: int | None, folder: Path | None
    ) -> None:
        self._model = model
        self._measure = measure
        self._steps = steps
        self._patience = patience
        self._folder = folder
        self._log: Callable[[dict[str, float]], None] = lambda _: None
        self._kept: dict[str, Tensor] = {}
        self.losses: list[tuple[int, float]] = []

    def log_by(self, log: Callable[[dict[str, float]], None]) -> None:
        """Where the losses go: the Trainer's own log, which its other callbacks read."""
        self._log = log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses = [(int(e["step"]), float(e["eval_loss"])) for e in state.log_history if "eval_loss" in e]
        file = None if self._folder is None else self._folder / BEST
        if self._patience is None or not self.losses or file is None or not file.exists():
            return
        with safe_open(file, framework="pt") as opened:
            step = int((opened.metadata() or {}).get("step", -1))
        if step == self._best()[0]:
            self._kept = load_file(file)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._steps or state.global_step >= state.max_steps:
            return
        self.losses.append((state.global_step, self._measure()))
        step_is_logged = control.should_log
        self._log({"eval_loss": self.losses[-1][1]})
        control.should_log = step_is_logged  # logging anything takes it back, and with it the loss of this step
        if self._patience is None:
            return
        if self._best()[0] == state.global_step:
            self._keep(state.global_step)
        elif len(self.losses) - 1 - self.losses.index(self._best()) >= self._patience:
            control.should_training_stop = True

    def _best(self) -> tuple[int, float]:
        return min(self.losses, key=lambda one: one[1] if math.isfinite(one[1]) else math.inf)

    def _keep(self, step: int) -> None:
        self._kept = {name: p.detach().cpu().clone() for name, p in self._trained()}
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(self._kept, self._folder / BEST, {"step": str(step)})

    def bring_back_best(self, last: float) -> float:
        """The weights of the best epoch, where that was better than the last one; the loss that the model then has."""
        if not self._kept or self._best()[1] >= last:
            return last
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(self._kept[name])
        return self._best()[1]

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
