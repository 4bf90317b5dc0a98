"""A run that is not made: how many tokens and steps it has, and what memory and time it would take."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_rt.core.base.machine import free_bytes, now
from lora_rt.core.base.silence import libraries_silenced
from lora_rt.core.base.source import BaseError
from lora_rt.core.memory.estimate import process_bytes
from lora_rt.core.memory.portions import bytes_needed
from lora_rt.core.memory.workload import EstimateError
from lora_rt.core.step.settings import TrainSettings
from lora_rt.core.training.fit import make_trainer
from lora_rt.core.training.prepare import Prepared, prepare
from lora_rt.core.training.processes import here, joined
from lora_rt.plugins.contract import IGNORE, Encoded
from lora_rt.plugins.manager import ModeHost

_GIB = 2**30
_FORWARD = 1 / 3  # of a step's work, which is a forward pass and a backward pass of twice that


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """Sizes in bytes, times in seconds. `needed` is what the run takes beside the base, None where it isn't planned.

    They are those of one process: its `base`, and its `program` where that takes of the same memory. `processes` share
    the run.
    `seconds_per_step` is of a step that was made, over sequences of middle length.
    """

    examples: int
    held_out: int
    tokens: int
    labels: int
    longest: int
    epochs: float
    steps: int
    batch_size: int
    processes: int
    base: int
    program: int
    needed: int | None
    free: int
    seconds_per_step: float
    seconds: float

    def lines(self) -> list[tuple[str, str]]:
        """What it is about, and the figure in words."""
        memory = f"{self.base / _GIB:.3g} GiB of the base"
        if self.needed is not None:
            peak = (self.base + self.program + self.needed) / _GIB
            each, whole = "", ""
            if (count := self.processes) > 1:
                each, whole = f" in each of {count} processes", f", {peak * count:.3g} in all"
            program = f" and {self.program / _GIB:.3g} of the program" if self.program else ""
            memory = f"{peak:.3g} GiB{each} at most{whole} (planned), with {memory}{program}"
        step = f"a step of middle length took {self.seconds_per_step:.2g} s here (measured)"
        return [
            ("examples", f"{self.examples} to train on, {self.held_out} held out"),
            ("tokens", f"{self.tokens:,} a pass, {self.labels:,} of them with loss; the longest has {self.longest:,}"),
            ("steps", f"{self.steps:,} of {self.batch_size} sequences, {self.epochs:g} passes"),
            ("memory", f"{memory}; {self.free / _GIB:.3g} GiB are free beside it"),
            ("time", f"about {_duration(self.seconds)}: {step}"),
        ]


@libraries_silenced()
def rehearse(settings: TrainSettings, modes: ModeHost, ready: Callable[[Prepared], None] | None = None) -> Rehearsal:
    """Prepare a run, make one step of it that is thrown away, and tell the rest.

    Raises:
        LoraRtError: what a run would raise before its first step.
    """
    program = process_bytes()  # while there is no base in it
    prepared = prepare(settings, modes)
    processes = joined()
    if ready is not None:
        ready(prepared)
    rows, size = prepared.training, settings.batch_size
    tokens = _tokens(rows)
    steps = -(-len(rows) // size)
    seconds, read = _one_step(prepared)
    work = tokens * settings.epochs + _FORWARD * 2 * _tokens(prepared.held_out)
    return Rehearsal(
        examples=prepared.examples,
        held_out=len(prepared.held_out),
        tokens=tokens,
        labels=sum(label != IGNORE for item in rows for label in item.labels[1:]),
        longest=max(len(item.input_ids) for item in rows),
        epochs=settings.epochs,
        steps=max(1, round(steps * settings.epochs)),
        batch_size=size,
        processes=processes.count,
        base=sum(here(p).nbytes for p in prepared.model.parameters() if not p.requires_grad) + prepared.copies,
        program=program if prepared.base.device.type == "cpu" else 0,
        needed=_needed(prepared),
        free=free_bytes(str(prepared.base.device)),
        seconds_per_step=seconds,
        seconds=seconds * work / read,
    )


def _tokens(rows: Sequence[Encoded]) -> int:
    return sum(len(item.input_ids) for item in rows)


def _needed(prepared: Prepared) -> int | None:
    """Bytes that a process takes beside its base: it has its part of a batch."""
    picked, processes = prepared.portions, joined()
    sequences = [*prepared.training, *prepared.held_out]
    settings = replace(prepared.settings, batch_size=prepared.settings.batch_size // processes.count)
    shards = processes.count if processes.sharded else 1
    ways = picked.optimizer, picked.accumulation, picked.checkpointing
    try:
        return bytes_needed(settings, prepared.base, sequences, *ways, shards)
    except (EstimateError, BaseError):  # a model that computes with what only its data tells
        return None


def _one_step(prepared: Prepared) -> tuple[float, int]:
    """Seconds of a step over the sequences of middle length, and how many tokens it read."""
    size = prepared.settings.batch_size
    order = sorted(prepared.training, key=lambda item: len(item.input_ids))
    start = max(0, (len(order) - size) // 2)
    some = order[start : start + size]
    with tempfile.TemporaryDirectory() as folder:
        trainer, *_ = make_trainer(prepared, Path(folder))
        rows: Any = trainer.train_dataset
        batch = trainer.data_collator([rows.row(item) for item in some])
        for _ in range(2):  # the first one also makes what is made once
            started = time.perf_counter()
            trainer.training_step(prepared.model, batch)
            seconds = now(prepared.base.device) - started
    return seconds, _tokens(some)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{max(whole, 1)} s"
