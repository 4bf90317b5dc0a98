"""The memory of one base in every precision, for inference and for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_rt.core.base.precision import Precision
from lora_rt.core.memory.config import BaseConfig, PlanError
from lora_rt.core.memory.inference import InferenceMemory, plan_inference
from lora_rt.core.memory.process import process_bytes
from lora_rt.core.memory.skeleton import Device, skeleton
from lora_rt.core.memory.training import TrainingMemory, plan_training
from lora_rt.core.step.settings import Optimizer, TrainSettings

_MOST_TOKENS = 2**30  # beyond, sizes do not fit the 64 bits that tensors count with


@dataclass(frozen=True, slots=True)
class Workload:
    """What is to be held in memory. `labels` are the tokens of a sequence that carry loss, while it trains."""

    device: Device
    r: int
    target_modules: tuple[str, ...]
    batch: int
    seq: int
    adapters: int
    labels: int

    def check(self) -> None:
        """Raises PlanError with everything that is out of range."""
        least = {"r": 1, "batch": 1, "seq": 2, "adapters": 0, "labels": 1}
        problems = [f"{name} is {getattr(self, name)}; it must be at least {n}" for name, n in least.items()]
        problems = [p for p, (name, n) in zip(problems, least.items(), strict=True) if getattr(self, name) < n]
        most = {"r": 2**16, "batch": 2**16, "seq": 2**24, "adapters": 2**16}
        problems += [
            f"{name} is {getattr(self, name)}; it must be at most {n}"
            for name, n in most.items()
            if getattr(self, name) > n
        ]
        if not problems and self.batch * self.seq > _MOST_TOKENS:
            problems.append(f"batch x seq is {self.batch * self.seq}; it must be at most {_MOST_TOKENS}")
        if self.labels >= self.seq:
            problems.append(f"labels is {self.labels}; it must be below seq, {self.seq}: a first token has none before")
        if problems:
            raise PlanError("this can't be planned", problems=problems, next_step="See: lora-rt plan --help")

    @property
    def optimizer(self) -> Optimizer:
        """The one that training picks on that device."""
        return "adamw" if self.device == "cpu" else "paged-adamw-8bit"

    @property
    def settings(self) -> TrainSettings:
        """As settings of a run, of which planning reads what concerns the adapter."""
        return TrainSettings("plan", "output-only", Path(), r=self.r, target_modules=self.target_modules)


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """One precision. `training` is a step in one part, `checkpointed` the same with gradient checkpointing."""

    precision: Precision
    inference: InferenceMemory
    training: TrainingMemory
    checkpointed: TrainingMemory | None


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All precisions of a base. `process` is what the interpreter and the libraries take of the same memory."""

    base: BaseConfig
    parameters: int
    workload: Workload
    process: int
    precisions: tuple[PrecisionPlan, ...]


def plan_memory(base: BaseConfig, precisions: Sequence[Precision], workload: Workload) -> MemoryPlan:
    """Plan a base in these precisions.

    Raises:
        PlanError: the workload makes no sense, or the model computes with what only its data tells.
        SettingsError: the base has no such target modules.
    """
    workload.check()
    model = skeleton(base.config, "float32")
    return MemoryPlan(
        base=base,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        workload=workload,
        process=process_bytes() if workload.device == "cpu" else 0,
        precisions=_planned(base.config, precisions, workload),
    )


def _planned(config: Any, precisions: Sequence[Precision], workload: Workload) -> tuple[PrecisionPlan, ...]:
    made: dict[str, PrecisionPlan] = {}
    for precision in precisions:
        twin = made.get("bfloat16" if precision == "float16" else "")  # bytes alike, dtypes apart
        made[precision] = replace(twin, precision=precision) if twin else _one(config, precision, workload)
    return tuple(made.values())


def _one(config: Any, precision: Precision, w: Workload) -> PrecisionPlan:
    def training(*, checkpointing: bool) -> TrainingMemory:
        return plan_training(
            config,
            precision,
            w.device,
            w.settings,
            rows=w.batch,
            tokens=w.seq,
            labels=w.labels,
            optimizer=w.optimizer,
            checkpointing=checkpointing,
        )

    can = skeleton(config, precision).supports_gradient_checkpointing
    return PrecisionPlan(
        precision,
        plan_inference(config, precision, w.device, w.settings, adapters=w.adapters, rows=w.batch, tokens=w.seq),
        training(checkpointing=False),
        training(checkpointing=True) if can else None,
    )
