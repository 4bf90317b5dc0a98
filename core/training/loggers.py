"""Where a run's figures go besides the terminal: transformers' own callbacks for TensorBoard, W&B and Trackio."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_rt.core.base.progress import console


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
        console(stderr=True).print(text, markup=False, soft_wrap=True, highlight=False)
    return list(made.values())
