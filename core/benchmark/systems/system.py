"""What a system of the benchmark is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from lora_rt.core.benchmark.numbers import Sample
from lora_rt.core.benchmark.workloads import Workload

Repeat = Callable[[], Sample]
"""Runs the workload once and says how long the timed part took."""


class System(Protocol):
    """One column of the table. Heavy parts are loaded by the first `prepare`."""

    name: str

    def reason(self, workload: Workload) -> str | None:
        """Why it cannot do this workload, in a few words; None where it can."""

    def prepare(self, workload: Workload) -> Repeat:
        """Load what the workload needs; what it returns may be called any number of times."""

    def tokens(self, workload: Workload) -> Sequence[Sequence[int]]:
        """What it says to a decoding workload, (rows, new tokens + 1): the check that all do the same work."""
