"""Checkpoints of a run: what makes them whole, and how Ctrl-C leaves one.

transformers writes a checkpoint file by file. A marker that is written last, after everything reached the disk, tells a
whole checkpoint from one that a kill left half-written.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from lora_rt.core.training.processes import joined
from lora_rt.core.training.runs import WHOLE, newest_whole
from lora_rt.core.training.trainer import TrainingDivergedError
from lora_rt.registry.durable import storage_errors, sync_all
from lora_rt.registry.errors import StorageError
from lora_rt.registry.files import STATE


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Completes each checkpoint, and turns a request to stop into a last one."""

    def __init__(self, run: Path, state: nn.Module | None, *, writes: bool = True) -> None:
        self._run = run
        self._state = state
        self._writes = writes
        self.asked = False  # to stop, by a signal to this process
        self.interrupted = False  # all processes agree to stop after this step
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interrupted and state.global_step < state.max_steps:
            control.should_save = self._writes
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        folder = self._run / f"checkpoint-{state.global_step}"
        if model is not None and not all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad):
            shutil.rmtree(folder, ignore_errors=True)
            raise TrainingDivergedError(
                f"weights are no longer finite numbers at step {state.global_step}; they are not saved",
                next_step="Try a smaller --lr, or another --precision",
            )
        if self._state is not None:
            save_file({k: v.contiguous() for k, v in self._state.state_dict().items()}, folder / STATE)
        sync_all(folder)
        (folder / WHOLE).touch()
        for older in self._run.glob("checkpoint-*"):
            if older != folder:
                shutil.rmtree(older, ignore_errors=True)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Within the block, a disk that takes no checkpoint is an error that says what is kept.

        Raises:
            StorageError: a checkpoint could not be written.
        """
        try:
            with storage_errors("a checkpoint"):
                yield
        except StorageError as error:
            kept = newest_whole(self._run)
            text = f"{kept.name} is kept, --resume goes on from there" if kept else "no checkpoint is there yet"
            step = f"{error.next_step}; {text}"
            raise StorageError(f"the run is stopped: {error.message}", next_step=step) from error

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block a first Ctrl-C asks for a checkpoint after the current step, a second one stops at once.

        Of several processes each may be the one that is asked. A launcher passes Ctrl-C on to all of them, and stops
        those that are left when one has ended by SIGTERM, which asks for the same.
        """

        def ask(number: int, _frame: FrameType | None) -> None:
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = True

        signals = [signal.SIGINT] if joined().count == 1 else [signal.SIGINT, signal.SIGTERM]
        before = [signal.getsignal(number) for number in signals]
        try:
            for number in signals:
                signal.signal(number, ask)
        except ValueError:  # not the main thread: whoever runs us there keeps its own handling
            yield
            return
        try:
            yield
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)
