"""From timed repeats to the rows that `bench --json` prints: medians, spreads and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_rt.core.benchmark.workloads import Workload

BASE = "base"
TRAINER = "peft-trainer"


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed repeat: `tokens` is how many it computed, 0 where the time, or the peak memory, is what counts."""

    seconds: float
    tokens: int = 0
    megabytes: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens per second; where no tokens are counted, repeats per second."""
        return (self.tokens or 1) / self.seconds


@dataclass
class Measured:
    """What one workload gave: samples by system, and the reasons of those that cannot do it. Grows repeat by repeat."""

    workload: Workload
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def spread(values: Sequence[float]) -> float:
    """The interquartile range as a part of the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)


def ratio(samples: Sequence[Sample], reference: Sequence[Sample]) -> float | None:
    """The median of the ratios of speeds, each of two repeats that followed on one another; None without a pair.

    A ratio within one repeat is free of what slows the machine down for some seconds. Less memory is above 1 too.
    """
    pairs = zip(samples, reference, strict=False)
    return _median([b.megabytes / a.megabytes if a.megabytes else a.speed / b.speed for a, b in pairs], 4)


def rows(measured: Sequence[Measured], systems: Sequence[str]) -> list[dict[str, Any]]:
    """One row per workload and system, in the order of both; what was not reached is left out."""
    pairs = [(item, system) for item in measured for system in systems]
    return [row(item, system) for item, system in pairs if item.samples.get(system) or system in item.reasons]


def row(item: Measured, system: str) -> dict[str, Any]:
    """The row of one workload and system.

    `tokens_per_s` and `ratio_to_base` are null where there is a `reason`, and where the workload counts no tokens: then
    `seconds` or `megabytes` is what was measured. `ratio` is that to `reference`: for training, whose base does not
    train, plain PEFT under the Trainer. Ratios are those of speeds: above 1 is faster, or less memory.
    """
    samples, kind = item.samples.get(system, []), item.workload.kind
    reference = TRAINER if kind == "training" else BASE
    found = ratio(samples, item.samples.get(reference, []))
    return {
        "workload": item.workload.name,
        "system": system,
        "tokens_per_s": _median([s.speed for s in samples if s.tokens], 2),
        "ratio_to_base": found if reference == BASE else None,
        "spread": round(spread([s.megabytes or s.speed for s in samples]), 4) if samples else None,
        "kind": kind,
        "ratio": found,
        "reference": reference,
        "seconds": _median([s.seconds for s in samples], 7),
        "megabytes": _median([s.megabytes for s in samples if s.megabytes], 1),
        "repeats": len(samples),
        "reason": item.reasons.get(system),
    }


def _median(values: Sequence[float], digits: int) -> float | None:
    return round(statistics.median(values), digits) if values else None
