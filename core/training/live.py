"""What a run shows while it goes: a live line with loss, speed and time left in a terminal, plain lines elsewhere.

Its figures may go to TensorBoard, W&B and Trackio besides, by transformers' own callbacks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from lora_rt.core.base import progress

_PLAIN_LINES = 10


class LiveLine(TrainerCallback):  # type: ignore[misc]
    """Reports loss (nats per labelled token, of the last step), tokens/s (padding not counted) and the time left."""

    def __init__(self, tokens_per_step: float, console: Console | None = None) -> None:
        self._console = console or progress.console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._progress.add_task("training", total=1, loss="-", speed="-")
        self._tokens_per_step = tokens_per_step
        self._started = 0.0
        self._first_step = 0
        self._loss = "-"  # the loop reports a step's loss after the step's end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started, self._first_step = time.perf_counter(), state.global_step
        self._progress.start()
        self._progress.update(self._task, total=state.max_steps, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._loss = f"{logs['loss']:.3f}"
        if logs and "eval_loss" in logs:
            self._console.print(f"epoch {state.epoch:g}  held-out loss {logs['eval_loss']:.3f}", highlight=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - self._first_step
        speed = done * self._tokens_per_step / max(time.perf_counter() - self._started, 1e-9)
        self._progress.update(self._task, completed=state.global_step, loss=self._loss, speed=f"{speed:.0f}")
        every = max(1, state.max_steps // _PLAIN_LINES)
        if not self._console.is_terminal and state.global_step % every == 0:
            left = (state.max_steps - state.global_step) * (time.perf_counter() - self._started) / done
            place = f"step {state.global_step}/{state.max_steps}"
            self._console.print(f"{place}  loss {self._loss}  {speed:.0f} tokens/s  left {left:.0f} s")

    def stop(self) -> None:
        """Give the terminal back, however the run ended."""
        self._progress.stop()


def logging_callbacks(names: Sequence[str], folder: Path) -> list[Any]:
    """Of each of the named trackers, which `TrainSettings.check` found installed.

    Args:
        names: of `lora_rt.core.step.settings.LOGGERS`.
        folder: where TensorBoard's files go, unless TENSORBOARD_LOGGING_DIR says otherwise.
    """
    if not names:
        return []
    from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

    os.environ.setdefault("WANDB_PROJECT", "lora-rt")
    kinds = {"tensorboard": TensorBoardCallback, "wandb": WandbCallback, "trackio": TrackioCallback}
    made = {name: kinds[name]() for name in dict.fromkeys(names)}
    if "tensorboard" in made:
        made["tensorboard"].logging_dir = made["tensorboard"].logging_dir or str(folder)
        text = f"see it with: tensorboard --logdir {made['tensorboard'].logging_dir}"
        progress.console(stderr=True).print(text, markup=False, soft_wrap=True, highlight=False)
    return list(made.values())
