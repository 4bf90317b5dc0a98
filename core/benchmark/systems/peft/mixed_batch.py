"""A batch whose rows have adapters of their own."""

from __future__ import annotations

from collections.abc import Sequence

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.numbers import Sample
from lora_rt.core.benchmark.systems.greedy import greedy_repeat, greedy_tokens
from lora_rt.core.benchmark.systems.peft.model import Peft, unweighted
from lora_rt.core.benchmark.systems.system import Repeat
from lora_rt.core.benchmark.workloads import Workload


class PeftMixedBatch:
    """`adapter_names=[...]`: every row has one adapter, and none has a weight."""

    name = "peft-mixed"

    def __init__(self, lab: Lab, peft: Peft) -> None:
        self._lab = lab
        self._peft = peft

    def reason(self, workload: Workload) -> str | None:
        """One adapter per row, at the weight 1."""
        if workload.kind == "change":
            return "an argument, without weights"
        if workload.kind in ("cold", "training") or not workload.active:
            return "as set_adapter"
        return "one adapter per row, no weights" if workload.active > 1 or workload.weighted else None

    def prepare(self, workload: Workload) -> Repeat:
        """The plain loop; the names go with every pass."""
        model = self._peft.reside(workload)
        run = greedy_repeat(self._lab, model, workload, adapter_names=_names(workload))

        def repeat() -> Sample:
            self._peft.activate(unweighted(workload.mixes))
            return run()

        return repeat

    def tokens(self, workload: Workload) -> Sequence[Sequence[int]]:
        """What each row says under its adapter."""
        model = self._peft.reside(workload)
        self._peft.activate(unweighted(workload.mixes))
        return greedy_tokens(self._lab, model, workload, adapter_names=_names(workload))


def _names(workload: Workload) -> list[str]:
    return [name for ((name, _),) in workload.mixes]
