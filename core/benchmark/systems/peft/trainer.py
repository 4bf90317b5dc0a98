"""PEFT and transformers' Trainer, as their manuals have it: what our training is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.processes.training import training_repeat
from lora_rt.core.benchmark.systems.system import Repeat
from lora_rt.core.benchmark.workloads import Workload


class PeftTrainer:
    """It trains, and does nothing else."""

    name = "peft-trainer"

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def reason(self, workload: Workload) -> str | None:
        """It does not decode."""
        return None if workload.kind == "training" else "trains alone"

    def prepare(self, workload: Workload) -> Repeat:
        """One epoch in a new process."""
        return training_repeat(self._lab, workload, "plain")

    def tokens(self, workload: Workload) -> Sequence[Sequence[int]]:
        """It says nothing."""
        return []
