"""Checkpoints of a run: where they lie, which are whole, and how Ctrl-C leaves one.

transformers writes a checkpoint file by file. A marker that is written last, after everything reached the disk, tells a
whole checkpoint from one that a kill left half-written.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

_WHOLE = "lora-rt-whole"
_STATE = "mode.safetensors"


def newest_whole(run: Path) -> Path | None:
    """The whole checkpoint of the most steps below a run's folder, or None."""
    found = []
    for folder in run.glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and (folder / _WHOLE).exists():
            found.append((int(match[1]), folder))
    return max(found)[1] if found else None


def forget(run: Path) -> None:
    """Remove a run's checkpoints."""
    shutil.rmtree(run, ignore_errors=True)


def restore_state(checkpoint: Path, state: nn.Module | None) -> None:
    """Read the mode's own state of a checkpoint back; the Trainer restores the adapter alone."""
    if state is not None:
        state.load_state_dict(load_file(checkpoint / _STATE))


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Completes each checkpoint, and turns a request to stop into a last one."""

    def __init__(self, run: Path, state: nn.Module | None) -> None:
        self._run = run
        self._state = state
        self.interrupted = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupted and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = self._run / f"checkpoint-{state.global_step}"
        if self._state is not None:
            save_file({k: v.contiguous() for k, v in self._state.state_dict().items()}, folder / _STATE)
        for file in folder.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        (folder / _WHOLE).touch()
        for older in self._run.glob("checkpoint-*"):
            if older != folder:
                shutil.rmtree(older, ignore_errors=True)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block a first Ctrl-C asks for a checkpoint after the current step, a second one stops at once."""

        def ask(_number: int, _frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        before = signal.getsignal(signal.SIGINT)
        try:
            signal.signal(signal.SIGINT, ask)
        except ValueError:  # not the main thread: whoever runs us there keeps its own handling
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
