"""One run: every workload, its systems interleaved, repeat by repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from lora_rt.core.benchmark.numbers import Sample
from lora_rt.core.benchmark.systems.system import Repeat, System
from lora_rt.core.benchmark.workloads import Workload

Report = Callable[[str], None]
"""Told of every repeat that is about to be made, for a progress line."""


@dataclass
class Measured:
    """What one workload gave: samples by system, and the reasons of those that cannot do it. Grows repeat by repeat."""

    workload: Workload
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def measure(
    workloads: Sequence[Workload], systems: Sequence[System], repeats: int, report: Report
) -> Iterator[Measured]:
    """Yields each workload's results while they still grow: whoever is interrupted keeps what there is."""
    for workload in workloads:
        measured = Measured(workload)
        yield measured
        _measure(measured, systems, repeats, report)


def _measure(measured: Measured, systems: Sequence[System], repeats: int, report: Report) -> None:
    workload = measured.workload
    ready: dict[str, Repeat] = {}
    for system in systems:
        if (reason := system.reason(workload)) is not None:
            measured.reasons[system.name] = reason
            continue
        report(f"{workload.title}: {system.name} warms up")
        ready[system.name] = system.prepare(workload)
        ready[system.name]()  # not counted: kernels are chosen, caches filled, files read
    measured.samples = {name: [] for name in ready}
    for number in range(repeats):
        for name, repeat in ready.items():
            report(f"{workload.title}: {name}, {number + 1} of {repeats}")
            measured.samples[name].append(repeat())
