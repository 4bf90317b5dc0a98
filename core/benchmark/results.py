"""From samples to the rows of the document that `bench --json` prints."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lora_rt.core.benchmark.numbers import ratio, spread
from lora_rt.core.benchmark.session import Measured

BASE = "base"


def rows(measured: Sequence[Measured], systems: Sequence[str]) -> list[dict[str, Any]]:
    """One row per workload and system, in the order of both; those without a sample and without a reason are left out.

    `tokens_per_s` and `ratio_to_base` are null where there is a `reason`, and where the workload counts no tokens:
    then `seconds` is what was measured.
    """
    return [
        row(item, system)
        for item in measured
        for system in systems
        if item.samples.get(system) or system in item.reasons
    ]


def row(item: Measured, system: str) -> dict[str, Any]:
    """The row of one workload and system."""
    samples = item.samples.get(system, [])
    speeds = [sample.speed for sample in samples]
    counted = bool(samples) and samples[0].tokens > 0
    to_base = ratio(samples, item.samples.get(BASE, []))
    return {
        "workload": item.workload.name,
        "system": system,
        "tokens_per_s": round(statistics.median(speeds), 2) if counted else None,
        "ratio_to_base": None if to_base is None else round(to_base, 4),
        "spread": round(spread(speeds), 4) if samples else None,
        "kind": item.workload.kind,
        "seconds": round(statistics.median([sample.seconds for sample in samples]), 7) if samples else None,
        "repeats": len(samples),
        "reason": item.reasons.get(system),
    }


def settings(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The workloads as data, so that a document says what its rows are."""
    return [asdict(item.workload) for item in measured]
