"""lora-rt itself, through its runtime: residents, planner and decoder as every request has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.numbers import Sample
from lora_rt.core.benchmark.processes.cold import compose_repeat
from lora_rt.core.benchmark.processes.memory import memory_repeat
from lora_rt.core.benchmark.processes.training import training_repeat
from lora_rt.core.benchmark.systems.greedy import timed, wanted_steps
from lora_rt.core.benchmark.systems.system import Repeat
from lora_rt.core.benchmark.workloads import Mix, Workload
from lora_rt.core.runtime import Runtime
from lora_rt.plugins.manager import load_modes
from lora_rt.registry.registry import Registry

_CHANGES = 10


class Ours:
    """One batch, every row under its own composition."""

    name = "ours"

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._residents: dict[str, Path] = {}

    @cached_property
    def _runtime(self) -> Runtime:
        modes = load_modes()
        base = replace(self._lab.base, model=self._lab.model())
        return Runtime(base, modes, Registry(project=self._lab.folder))

    def reason(self, workload: Workload) -> str | None:
        """It does all of them."""
        return None

    def prepare(self, workload: Workload) -> Repeat:
        """Makes exactly the workload's adapters resident, here or in a process of its own."""
        if workload.kind == "cold":
            return compose_repeat(self._lab, workload)
        if workload.kind == "memory":
            return memory_repeat(self._lab, self.name, workload)
        if workload.kind == "training":
            return training_repeat(self._lab, workload, "ours")
        self._reside(workload)
        if workload.kind == "change":
            return self._change(workload)
        begin = self._decoding(workload, wanted_steps(workload))
        return lambda: timed(self._lab, workload, begin)

    def tokens(self, workload: Workload) -> Sequence[Sequence[int]]:
        """What each row says under its composition."""
        self._reside(workload)
        steps = list(self._decoding(workload, workload.new_tokens + 1)())
        return [list(row) for row in zip(*steps, strict=True)]

    def _decoding(self, workload: Workload, steps: int) -> Callable[[], Iterator[Any]]:
        """Begins the request, from the texts of its compositions on."""
        specs = [spec(mix) for mix in workload.mixes]
        prompts = self._lab.prompts(workload)
        return lambda: self._runtime.decode(prompts, specs, max_new_tokens=steps, min_new_tokens=steps)

    def _reside(self, workload: Workload) -> None:
        wanted = self._lab.shelf.paths(workload)
        for name in [name for name, path in self._residents.items() if wanted.get(name) != path]:
            self._runtime.unload_adapter(name)
            del self._residents[name]
        for name, path in wanted.items():
            if name not in self._residents:
                self._runtime.load_adapter(str(path), name)
                self._residents[name] = path

    def _change(self, workload: Workload) -> Repeat:
        """From the text of a composition to the plan that a forward pass runs under, each composition a new one."""
        numbers = count()

        def repeat() -> Sample:
            texts = [spec(workload.mix(next(numbers))) for _ in range(_CHANGES)]
            start = self._lab.now()
            for text in texts:
                self._runtime.plan([[0]], [text])
            return Sample((self._lab.now() - start) / _CHANGES)

        return repeat


def spec(mix: Mix) -> str | None:
    """The text of a composition."""
    return " ".join(f"{name}:{weight}" for name, weight in mix) or None
