"""What a system of the benchmark is: one column of the table. The session times all of them in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.workloads import Mix, Workload


class Turn(NamedTuple):
    """One run of a workload: seconds of the prompt with the first token, seconds of the steps behind it, the tokens."""

    prefill: float
    decode: float
    tokens: list[list[int]]  # (rows, steps): the check that the work was done, and that all do the same


class System:
    """Heavy parts are loaded by the first `prepare`."""

    name = ""
    changes = 10  # how many changes of composition are timed at once

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def reason(self, workload: Workload) -> str | None:
        """Why it cannot do this workload, in a few words; None where it can."""
        return None

    def prepare(self, workload: Workload) -> None:
        """Load what the workload needs, from whatever state; before every turn, and outside of its time."""

    def run(self, workload: Workload) -> Turn:
        """Decode every row."""
        raise NotImplementedError

    def change(self, mix: Mix) -> None:
        """The way from the composition before to this one."""
        raise NotImplementedError


def timed(lab: Lab, begin: Callable[[], Iterator[Any]]) -> Turn:
    """Times the beginning and the first step of a loop as prefill, and all other steps as decoding.

    Args:
        lab: whose clock it is.
        begin: starts the loop; each step yields a token per row, (rows,).
    """
    start = lab.now()
    steps = begin()
    said = [next(steps)]
    first = lab.now()
    said.extend(steps)
    last = lab.now()
    tokens: list[list[int]] = torch.stack([torch.as_tensor(step) for step in said], dim=1).tolist()
    return Turn(first - start, last - first, tokens)
