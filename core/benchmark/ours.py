"""lora-rt itself, through its runtime: residents, planner and decoder as every request has them."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.system import System, Turn, timed
from lora_rt.core.benchmark.workloads import SAMPLED, Mix, Workload
from lora_rt.core.runtime import Runtime
from lora_rt.plugins.manager import load_modes
from lora_rt.registry.registry import Registry


class Ours(System):
    """One batch, every row under its own composition."""

    name = "ours"

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._residents: dict[str, Path] = {}

    @cached_property
    def runtime(self) -> Runtime:
        """Over a module tree of its own."""
        base = replace(self.lab.base, model=self.lab.model())
        return Runtime(base, load_modes(), Registry(project=self.lab.folder))

    def prepare(self, workload: Workload) -> None:
        """Makes exactly the workload's adapters resident."""
        wanted = self.lab.adapters(workload)
        for name in [name for name, path in self._residents.items() if wanted.get(name) != path]:
            self.runtime.unload_adapter(name)
            del self._residents[name]
        for name, path in wanted.items():
            if name not in self._residents:
                self.runtime.load_adapter(str(path), name)
                self._residents[name] = path

    def run(self, workload: Workload) -> Turn:
        """One request, timed from the texts of its compositions on."""
        texts = [text_of(mix) for mix in workload.mixes]
        prompts, steps = self.lab.prompts(workload), workload.steps
        settings: dict[str, Any] = {"max_new_tokens": steps, "min_new_tokens": steps}
        if workload.sampled:
            settings |= {**SAMPLED, "seed": 0}
        return timed(self.lab, lambda: self.runtime.decode(prompts, texts, **settings))

    def change(self, mix: Mix) -> None:
        """From the text of a composition to the plan that a forward pass runs under."""
        self.runtime.plan([[0]], [text_of(mix)])


def text_of(mix: Mix) -> str | None:
    """The text of a composition."""
    return " ".join(f"{name}:{weight}" for name, weight in mix) or None
