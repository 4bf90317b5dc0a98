"""`add_weighted_adapter` with `combination_type="cat"`."""

from __future__ import annotations

from collections.abc import Sequence

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.numbers import Sample
from lora_rt.core.benchmark.processes.memory import memory_repeat
from lora_rt.core.benchmark.systems.greedy import greedy_repeat, greedy_tokens
from lora_rt.core.benchmark.systems.peft.model import Peft, changes
from lora_rt.core.benchmark.systems.system import Repeat
from lora_rt.core.benchmark.workloads import Workload


class PeftConcatenated:
    """`add_weighted_adapter(..., combination_type="cat")`: one mix for everybody, made anew for each composition."""

    name = "peft-cat"

    def __init__(self, lab: Lab, peft: Peft) -> None:
        self._lab = lab
        self._peft = peft

    def reason(self, workload: Workload) -> str | None:
        """One mix is the state of the model."""
        if workload.differs:
            return "one mix for all rows"
        if not workload.active:
            return "as set_adapter"
        return "as set_adapter" if workload.kind in ("cold", "training") else None

    def prepare(self, workload: Workload) -> Repeat:
        """The plain loop; the mix is made before each repeat and outside of its time. Or a process."""
        if workload.kind == "memory":
            return memory_repeat(self._lab, self.name, workload)
        model = self._peft.reside(workload)
        if workload.kind == "change":
            return changes(self._lab, workload, self._peft.concatenate, lambda _: self._peft.forget_mix(), times=1)
        run = greedy_repeat(self._lab, model, workload)

        def repeat() -> Sample:
            self._peft.concatenate(workload.mix(0))
            try:
                return run()
            finally:
                self._peft.forget_mix()

        return repeat

    def tokens(self, workload: Workload) -> Sequence[Sequence[int]]:
        """What it says under its one mix."""
        model = self._peft.reside(workload)
        self._peft.concatenate(workload.mix(0))
        try:
            return greedy_tokens(self._lab, model, workload)
        finally:
            self._peft.forget_mix()
