"""The memory of one base in every precision, for inference and for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from lora_rt.core.base.choices import Precision
from lora_rt.core.base.identity import label_of
from lora_rt.core.base.reading import config_alone
from lora_rt.core.base.source import parse_base
from lora_rt.core.memory.inference import InferenceMemory, plan_inference
from lora_rt.core.memory.skeleton import skeleton
from lora_rt.core.memory.training import TrainingMemory, plan_training
from lora_rt.core.memory.workload import Device, Workload

_TOUCHED = 112 << 20
"""What a run of the default base has beside its tensors and its imports: tokenizer, pages of libraries, kernels."""


@dataclass(frozen=True, slots=True)
class BaseConfig:
    """A base's name and transformers' configuration of it."""

    name: str
    config: Any

    @property
    def text(self) -> Any:
        """The part of the configuration that describes the language model."""
        return self.config.get_text_config()


def device_here() -> Device:
    """The kind of device that "auto" is on this machine."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def read_config(base: str) -> BaseConfig:
    """The configuration of "default", a folder, a GGUF file (its header), or a hub id (config.json alone).

    Raises:
        BaseError: there is none, it can't be fetched, or transformers can't read it.
    """
    source = parse_base(base)
    return BaseConfig(label_of(source), config_alone(source))


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """One precision. `training` is a step in one part, `checkpointed` the same with gradient checkpointing.

    Where several processes share the batch, both are what one of them takes.
    """

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
        EstimateError: the workload makes no sense, or the model computes with what only its data tells.
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
            rows=w.rows("training"),
            tokens=w.seq,
            labels=w.labels,
            optimizer=w.optimizer,
            checkpointing=checkpointing,
            shards=w.processes if w.sharded else 1,
        )

    can = skeleton(config, precision).supports_gradient_checkpointing
    return PrecisionPlan(
        precision,
        plan_inference(config, precision, w.device, w.settings, adapters=w.adapters, rows=w.batch, tokens=w.seq),
        training(checkpointing=False),
        training(checkpointing=True) if can else None,
    )


def process_bytes() -> int:
    """What a process of ours takes beside tensors: measured on this one, which loads no model, and `_TOUCHED`."""
    from transformers import Trainer  # noqa: F401  # what a run imports counts as well

    return int(psutil.Process().memory_info().rss) + _TOUCHED
