"""What fits on a device of so many gigabytes: the precision that loses least, and how much of it at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lora_rt.core.base.choices import PRECISIONS, Precision
from lora_rt.core.memory.estimate import MemoryPlan
from lora_rt.core.memory.inference import InferenceMemory
from lora_rt.core.memory.training import TrainingMemory
from lora_rt.core.memory.workload import Use

DEVICES_GB = (24, 48, 80)
"""In units of 10^9 bytes. Cards of these names have a few per cent more; that is for the driver and for gaps."""

USES: tuple[Use, ...] = ("inference", "training")


@dataclass(frozen=True, slots=True)
class Fit:
    """The best that fits.

    `batch` and `seq` are the wanted ones where those fit, else the most that does. `most` is the largest batch at this
    `seq`, `size` the bytes of (batch, seq).
    """

    precision: Precision
    checkpointing: bool
    batch: int
    seq: int
    most: int
    size: int


@dataclass(frozen=True, slots=True)
class _Choice:
    precision: Precision
    checkpointing: bool
    fixed: int
    per_row: float


def best_fit(plan: MemoryPlan, use: Use, gigabytes: int) -> Fit | None:
    """The first precision, from float32 down, in which the workload fits; else as much of it as the smallest allows.

    Memory beyond what is fixed is taken to grow with rows and with tokens in proportion. None: not one token fits.
    Of several processes that train, each has such a device, and its part of the batch.
    """
    room = gigabytes * 10**9 - plan.process
    batch, seq = plan.workload.rows(use), plan.workload.seq
    choices = _choices(plan, use)
    for choice in choices:
        most = int((room - choice.fixed) / choice.per_row)
        if most >= batch:
            size = choice.fixed + round(choice.per_row * batch) + plan.process
            return Fit(choice.precision, choice.checkpointing, batch, seq, most, size)
    last = min(choices, key=lambda choice: choice.fixed + choice.per_row)
    rows = int((room - last.fixed) / last.per_row)
    tokens = seq if rows >= 1 else int(seq * (room - last.fixed) / last.per_row)
    if tokens < 1:
        return None
    rows = max(rows, 1)
    size = last.fixed + round(last.per_row * rows * tokens / seq) + plan.process
    return Fit(last.precision, last.checkpointing, rows, tokens, rows, size)


def _choices(plan: MemoryPlan, use: Use) -> list[_Choice]:
    """In the order of preference: what loses less comes first, and checkpointing, which takes time, second."""
    found = []
    for item in sorted(plan.precisions, key=lambda item: PRECISIONS.index(item.precision)):
        rows = plan.workload.rows(use)
        if use == "inference":
            found.append(_Choice(item.precision, False, item.inference.fixed, item.inference.per_batch / rows))
            continue
        for memory in (item.training, item.checkpointed):
            if memory is not None:
                again = memory is item.checkpointed
                found.append(_Choice(item.precision, again, memory.fixed, memory.per_batch / rows))
    return found


def fits(plan: MemoryPlan) -> dict[int, dict[Use, Fit | None]]:
    """What fits on a device of each of the sizes, for each use."""
    return {size: {use: best_fit(plan, use, size) for use in USES} for size in DEVICES_GB}


def document(plan: MemoryPlan) -> dict[str, Any]:
    """A plan in JSON's form; sizes in bytes."""

    def training(memory: TrainingMemory | None) -> dict[str, int] | None:
        return None if memory is None else {**asdict(memory), "peak": memory.peak + plan.process}

    return {
        "base": plan.base.name,
        "parameters": plan.parameters,
        "workload": {**asdict(plan.workload), "optimizer": plan.workload.optimizer},
        "process": plan.process,
        "precisions": {
            item.precision: {
                "inference": _parts(item.inference) | {"total": item.inference.total + plan.process},
                "copies": item.inference.copies,
                "training": training(item.training),
                "training_checkpointed": training(item.checkpointed),
            }
            for item in plan.precisions
        },
        "fits": {
            f"{size} GB": {use: None if fit is None else asdict(fit) for use, fit in found.items()}
            for size, found in fits(plan).items()
        },
    }


def _parts(memory: InferenceMemory) -> dict[str, int]:
    """What adds up to the total."""
    return {name: size for name, size in asdict(memory).items() if name != "copies"}
