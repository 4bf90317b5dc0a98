"""One run: every workload, its systems interleaved, repeat by repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.numbers import Sample
from lora_rt.core.benchmark.systems.system import Repeat, System
from lora_rt.core.benchmark.workloads import PROCESSES, Workload

_MOST_PROCESSES = 3  # each costs seconds of loading, and they differ by little

Report = Callable[[int, str], None]
"""Told of every repeat that is about to be made, with the number of workloads that are done."""


@dataclass
class Measured:
    """What one workload gave: samples by system, and the reasons of those that cannot do it. Grows repeat by repeat."""

    workload: Workload
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def measure(
    lab: Lab, workloads: Sequence[Workload], systems: Sequence[System], repeats: int, report: Report
) -> Iterator[Measured]:
    """Yields each workload's results while they still grow: whoever is interrupted keeps what there is."""
    for done, workload in enumerate(workloads):
        measured = Measured(workload)
        yield measured
        tell = partial(report, done)
        _measure(measured, lab, systems, min(repeats, most_repeats(workload)), tell)


def most_repeats(workload: Workload) -> int:
    """A bound on the repeats: processes are slow to start, and a peak is always the same."""
    if workload.kind == "memory":
        return 1
    return _MOST_PROCESSES if workload.kind in PROCESSES else 1 << 30


def _measure(
    measured: Measured, lab: Lab, systems: Sequence[System], repeats: int, tell: Callable[[str], None]
) -> None:
    workload = measured.workload
    ready: dict[str, Repeat] = {}
    for system in systems:
        if (reason := lab.reason(workload) or system.reason(workload)) is not None:
            measured.reasons[system.name] = reason
            continue
        tell(f"{workload.title}: {system.name} warms up")
        ready[system.name] = system.prepare(workload)
        if workload.kind not in ("memory", "training"):
            ready[system.name]()  # not counted: kernels are chosen, caches filled, files read
    measured.samples = {name: [] for name in ready}
    for number in range(repeats):
        for name, repeat in ready.items():
            tell(f"{workload.title}: {name}, {number + 1} of {repeats}")
            measured.samples[name].append(repeat())
