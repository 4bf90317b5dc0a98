"""What is to be planned for; imports nothing heavy, since it is checked before torch is imported."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lora_rt.core.step.settings import Optimizer, TrainSettings
from lora_rt.errors import LoraRtError

Device = Literal["cpu", "cuda"]
Use = Literal["inference", "training"]
_MOST_TOKENS = 2**30  # beyond, sizes do not fit the 64 bits that tensors count with


class EstimateError(LoraRtError):
    """Memory that can't be estimated."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is to be held in memory. `labels` are the tokens of a sequence that carry loss, while it trains.

    `processes` share the batch of a training step, each with the whole base or, `sharded`, with its part of the blocks.
    """

    device: Device
    r: int
    target_modules: tuple[str, ...]
    batch: int
    seq: int
    adapters: int
    labels: int
    processes: int = 1
    sharded: bool = False

    def check(self) -> None:
        """Raises EstimateError with everything that is out of range."""
        least = {"r": 1, "batch": 1, "seq": 2, "adapters": 0, "labels": 1, "processes": 1}
        most, own = {"r": 2**16, "batch": 2**16, "seq": 2**24, "adapters": 2**16}, asdict(self)
        problems = [f"{name} is {own[name]}; it must be at least {n}" for name, n in least.items() if own[name] < n]
        problems += [f"{name} is {own[name]}; it must be at most {n}" for name, n in most.items() if own[name] > n]
        if not problems and self.batch * self.seq > _MOST_TOKENS:
            problems.append(f"batch x seq is {self.batch * self.seq}; it must be at most {_MOST_TOKENS}")
        if not problems and self.batch % self.processes:
            problems.append(f"batch is {self.batch}, which {self.processes} processes can't share evenly")
        if not self.target_modules:
            problems.append("there are no target modules; name some, or all-linear")
        if self.labels >= self.seq:
            told = f"labels is {self.labels} and seq is {self.seq}"
            problems.append(f"{told}; labels must be smaller than seq: the first token is never predicted")
        if problems:
            raise EstimateError(
                "this memory can't be estimated", problems=problems, next_step="See: lora-rt plan --help"
            )

    def rows(self, use: Use) -> int:
        """How many of the sequences a process has at once."""
        return self.batch // self.processes if use == "training" else self.batch

    @property
    def optimizer(self) -> Optimizer:
        """The one that training picks on that device."""
        return "adamw" if self.device == "cpu" else "paged-adamw-8bit"

    @property
    def settings(self) -> TrainSettings:
        """As settings of a run, of which planning reads what concerns the adapter."""
        return TrainSettings("plan", "output-only", Path(), r=self.r, target_modules=self.target_modules)
