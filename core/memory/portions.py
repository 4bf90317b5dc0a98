"""In which portions a run does its steps: the optimizer, the parts of a batch, and whether activations are kept.

Picked from what the device has free, by planning the step with the longest sequences of the data: all at once where
that fits, else the batch in parts, else with gradient checkpointing too. What is computed is the same in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_rt.core.base.choices import check_precision
from lora_rt.core.base.machine import free_bytes
from lora_rt.core.base.source import BaseError
from lora_rt.core.memory.training import plan_training
from lora_rt.core.memory.workload import EstimateError
from lora_rt.core.step.loss import is_plain
from lora_rt.core.step.settings import Optimizer, SettingsError, TrainSettings
from lora_rt.plugins.contract import IGNORE, Encoded, Objective

if TYPE_CHECKING:
    from lora_rt.core.base.load import LoadedBase

_SHARE = 0.8  # of the free memory that a run may plan with; the rest is for what planning does not see
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Portions:
    """How the steps are run. `why` is a line for the user where it is not the plain way, else empty."""

    optimizer: Optimizer
    accumulation: int
    checkpointing: bool
    why: str = ""


def pick_portions(
    settings: TrainSettings, base: LoadedBase, objective: Objective, sequences: Sequence[Encoded], processes: int = 1
) -> Portions:
    """The first of the possible ways that fits into the memory that is free; the last one where none does.

    Several processes share a step's sequences, and on a CPU the memory.

    Raises:
        SettingsError: what the settings ask for can't be had on this device or with this mode.
    """
    optimizer = _optimizer(settings, base.device.type)
    divisible = is_plain(objective)
    if processes > 1 and not divisible:
        text = f"the mode {settings.mode!r} has a loss of its own over a whole batch, which processes can't share"
        raise SettingsError(text, next_step="Train it in one process")
    if settings.batch_size % processes:
        text = f"a batch of {settings.batch_size} can't be shared by {processes} processes"
        raise SettingsError(text, next_step=f"Give a --batch-size that {processes} divides")
    settings = replace(settings, batch_size=settings.batch_size // processes)
    ways = list(_ways(settings, base, divisible=divisible))
    if len(ways) == 1:
        return Portions(optimizer, *ways[0])
    free = free_bytes(str(base.device)) // (processes if base.device.type == "cpu" else 1)
    needs = {}
    for way in ways:
        try:
            needs[way] = bytes_needed(settings, base, sequences, optimizer, *way)
        except (EstimateError, BaseError) as error:
            return Portions(optimizer, *ways[0], why=f"memory is not planned: {error.message}")
        if needs[way] <= _SHARE * free:
            break
    return Portions(optimizer, *way, why=_why(needs, way, ways[0], free))


def _optimizer(settings: TrainSettings, device: str) -> Optimizer:
    if settings.optimizer == "paged-adamw-8bit" and device != "cuda":
        raise SettingsError(f"{device} has no paged optimizer", next_step="Use --optimizer adamw")
    if settings.optimizer == "adamw" or device != "cuda":
        return "adamw"
    return "paged-adamw-8bit"


def _ways(settings: TrainSettings, base: LoadedBase, *, divisible: bool) -> Iterator[tuple[int, bool]]:
    """(parts, checkpointing), the preferred ones first."""
    if settings.accumulation is not None:
        parts = [settings.accumulation]
    else:
        parts = [n for n in range(1, settings.batch_size + 1) if settings.batch_size % n == 0] if divisible else [1]
    if parts != [1] and not divisible:
        raise SettingsError(
            f"the mode {settings.mode!r} has a loss of its own over a whole batch, with these options",
            next_step="Leave --accumulation out; a smaller --batch-size and --gradient-checkpointing save memory too",
        )
    can = bool(base.model.supports_gradient_checkpointing)
    again = [False, True] if can else [False]
    if settings.gradient_checkpointing is not None:
        again = [settings.gradient_checkpointing]
    yield from ((n, checkpointing) for checkpointing in again for n in parts)


def bytes_needed(
    settings: TrainSettings,
    base: LoadedBase,
    sequences: Sequence[Encoded],
    optimizer: Optimizer,
    accumulation: int,
    checkpointing: bool,
    shards: int = 1,
) -> int:
    """Bytes that a run takes beside the loaded base, when its longest sequences meet in one part of a batch."""
    rows = min(settings.batch_size // accumulation, len(sequences))
    longest = sorted(sequences, key=lambda item: len(item.input_ids), reverse=True)[:rows]
    columns = {place for item in longest for place, label in enumerate(item.labels[1:]) if label != IGNORE}
    memory = plan_training(
        base.model.config,
        check_precision(base.precision),
        "cpu" if base.device.type == "cpu" else "cuda",
        settings,
        rows=rows,
        tokens=len(longest[0].input_ids),
        labels=len(columns),
        optimizer=optimizer,
        checkpointing=checkpointing,
        shards=shards,
    )
    return memory.peak - memory.weights


def _why(needs: dict[tuple[int, bool], int], way: tuple[int, bool], plain: tuple[int, bool], free: int) -> str:
    fits = needs[way] <= _SHARE * free
    if way == plain and fits:
        return ""
    picked = [f"the batch in {way[0]} parts"] if way[0] > 1 else []
    picked += ["gradient checkpointing"] if way[1] else []
    text = f"memory: {free / _GIB:.3g} GiB are free and a plain step needs {needs[plain] / _GIB:.3g}"
    how = f"; picked {' and '.join(picked)} ({needs[way] / _GIB:.3g} GiB)" if picked else ""
    return f"{text}{how}" + ("" if fits else "; this may not fit: use a smaller --batch-size or shorter texts")
