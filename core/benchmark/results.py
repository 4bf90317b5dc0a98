"""From samples to the document that `bench --json` prints."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.machine import machine, versions
from lora_rt.core.benchmark.numbers import ratio, spread
from lora_rt.core.benchmark.session import Measured

BASE = "base"
TRAINER = "peft-trainer"


def document(lab: Lab, measured: Sequence[Measured], systems: Sequence[str]) -> dict[str, Any]:
    """Machine, versions, the systems in the order of the table, the workloads as data, and the rows."""
    return {
        "machine": machine(lab.device),
        "versions": versions(),
        "base": lab.base.identity.id,
        "precision": lab.base.precision,
        "systems": list(systems),
        "workloads": settings(measured),
        "rows": rows(measured, systems),
    }


def settings(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The workloads as data, so that a document says what its rows are."""
    return [asdict(item.workload) for item in measured]


def rows(measured: Sequence[Measured], systems: Sequence[str]) -> list[dict[str, Any]]:
    """One row per workload and system, in the order of both; what was not reached is left out."""
    return [
        row(item, system)
        for item in measured
        for system in systems
        if item.samples.get(system) or system in item.reasons
    ]


def row(item: Measured, system: str) -> dict[str, Any]:
    """The row of one workload and system.

    `tokens_per_s` and `ratio_to_base` are null where there is a `reason`, and where the workload counts no tokens: then
    `seconds` or `megabytes` is what was measured. `ratio` is that to `reference`: for training, whose base does not
    train, plain PEFT under the Trainer. Ratios are those of speeds: above 1 is faster, or less memory.
    """
    samples = item.samples.get(system, [])
    kind = item.workload.kind
    reference = TRAINER if kind == "training" else BASE
    values = [sample.megabytes or sample.speed for sample in samples]
    found = _ratio(item, system, reference)
    return {
        "workload": item.workload.name,
        "system": system,
        "tokens_per_s": _rounded([s.speed for s in samples], 2) if samples and samples[0].tokens else None,
        "ratio_to_base": found if reference == BASE else None,
        "spread": round(spread(values), 4) if samples else None,
        "kind": kind,
        "ratio": found,
        "reference": reference,
        "seconds": _rounded([s.seconds for s in samples], 7),
        "megabytes": _rounded([s.megabytes for s in samples], 1) if kind == "memory" else None,
        "repeats": len(samples),
        "reason": item.reasons.get(system),
    }


def _ratio(item: Measured, system: str, reference: str) -> float | None:
    samples, others = item.samples.get(system, []), item.samples.get(reference, [])
    if item.workload.kind == "memory":
        return round(others[0].megabytes / samples[0].megabytes, 4) if samples and others else None
    found = ratio(samples, others)
    return None if found is None else round(found, 4)


def _rounded(values: Sequence[float], digits: int) -> float | None:
    return round(statistics.median(values), digits) if values else None
