"""What is to be planned for; imports nothing heavy, since it is checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_rt.core.step.settings import Optimizer, TrainSettings
from lora_rt.errors import LoraRtError

Device = Literal["cpu", "cuda"]
_MOST_TOKENS = 2**30  # beyond, sizes do not fit the 64 bits that tensors count with


class PlanError(LoraRtError):
    """Memory that can't be told in advance."""


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
        if not self.target_modules:
            problems.append("there are no target modules; name some, or all-linear")
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
