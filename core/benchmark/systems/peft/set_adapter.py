"""`set_adapter` of several adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.numbers import Sample
from lora_rt.core.benchmark.processes.cold import bare_repeat
from lora_rt.core.benchmark.processes.memory import memory_repeat
from lora_rt.core.benchmark.systems.greedy import greedy_repeat, greedy_tokens
from lora_rt.core.benchmark.systems.peft.model import Peft, changes, unweighted
from lora_rt.core.benchmark.systems.system import Repeat
from lora_rt.core.benchmark.workloads import Mix, Workload


class PeftSetAdapter:
    """`set_adapter([...])`: PEFT loops over the active adapters in every layer."""

    name = "peft-set"

    def __init__(self, lab: Lab, peft: Peft) -> None:
        self._lab = lab
        self._peft = peft

    def reason(self, workload: Workload) -> str | None:
        """One composition is the state of the model."""
        if workload.differs:
            return "cannot mix weights in a batch"
        return "trains by the Trainer" if workload.kind == "training" else None

    def prepare(self, workload: Workload) -> Repeat:
        """The plain loop, with the composition set before each repeat and outside of its time; or a process."""
        if workload.kind == "cold":
            return bare_repeat(self._lab, workload)
        if workload.kind == "memory":
            return memory_repeat(self._lab, self.name, workload)
        model = self._peft.reside(workload)
        if workload.kind == "change":
            return changes(self._lab, workload, self._peft.activate, self._peft.activate)
        mix = workload.mix(0)
        run = greedy_repeat(self._lab, model, workload)

        def repeat() -> Sample:
            with self._active(model, mix):
                return run()

        return repeat

    def tokens(self, workload: Workload) -> Sequence[Sequence[int]]:
        """What it says under its one composition."""
        model = self._peft.reside(workload)
        with self._active(model, workload.mix(0)):
            return greedy_tokens(self._lab, model, workload)

    @contextmanager
    def _active(self, model: Any, mix: Mix) -> Iterator[None]:
        if not mix:
            with model.disable_adapter():
                yield
            return
        self._peft.activate(mix)
        try:
            yield
        finally:
            self._peft.activate(unweighted([mix]))  # a scale that stays would count twice in the other ways
