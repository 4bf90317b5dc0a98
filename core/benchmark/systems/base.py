"""The base alone: the plain transformers model, which nobody hooked up. The denominator of every ratio."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.processes.cold import bare_repeat
from lora_rt.core.benchmark.processes.memory import memory_repeat
from lora_rt.core.benchmark.systems.greedy import greedy_repeat, greedy_tokens
from lora_rt.core.benchmark.systems.system import Repeat
from lora_rt.core.benchmark.workloads import Workload


class BaseAlone:
    """Greedy decoding by the plain loop, without any adapter."""

    name = "base"

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    @cached_property
    def _model(self) -> Any:
        return self._lab.model()

    def reason(self, workload: Workload) -> str | None:
        """It has no composition, and nothing to train."""
        return {"change": "has no composition", "training": "trains nothing"}.get(workload.kind)

    def prepare(self, workload: Workload) -> Repeat:
        """The plain loop, or a process of its own."""
        if workload.kind == "cold":
            return bare_repeat(self._lab)
        if workload.kind == "memory":
            return memory_repeat(self._lab, self.name, workload)
        return greedy_repeat(self._lab, self._model, workload)

    def tokens(self, workload: Workload) -> Sequence[Sequence[int]]:
        """What the base says."""
        return greedy_tokens(self._lab, self._model, workload)
