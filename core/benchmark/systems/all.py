"""The columns of the table, in their order."""

from __future__ import annotations

from collections.abc import Sequence

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.systems.base import BaseAlone
from lora_rt.core.benchmark.systems.generate import Generate
from lora_rt.core.benchmark.systems.llama_cpp import LlamaCpp
from lora_rt.core.benchmark.systems.ours import Ours
from lora_rt.core.benchmark.systems.peft.concatenated import PeftConcatenated
from lora_rt.core.benchmark.systems.peft.mixed_batch import PeftMixedBatch
from lora_rt.core.benchmark.systems.peft.model import Peft
from lora_rt.core.benchmark.systems.peft.set_adapter import PeftSetAdapter
from lora_rt.core.benchmark.systems.peft.trainer import PeftTrainer
from lora_rt.core.benchmark.systems.system import System


def make_systems(names: Sequence[str], lab: Lab) -> list[System]:
    """The systems of these names, in the order of the table."""
    peft = Peft(lab)
    systems: list[System] = [
        BaseAlone(lab),
        Generate(lab),
        Ours(lab),
        PeftSetAdapter(lab, peft),
        PeftConcatenated(lab, peft),
        PeftMixedBatch(lab, peft),
        PeftTrainer(lab),
        LlamaCpp(lab),
    ]
    return [system for system in systems if system.name in names]
