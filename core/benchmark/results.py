"""From timed repeats to the rows that `bench --json` prints, and these as a table of 100 columns and as a picture."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lora_rt.core.base.picture import PlotError, canvas, save
from lora_rt.core.benchmark.workloads import DECODING, SYSTEMS, Workload

BASE = "base"
TRAINER = "peft-trainer"
WIDTH = 100
BUSY = 0.25  # a spread (half of the middle of the repeats, relative to their median) beyond which a row is noise
IDLE = 0.15  # the share of the processor that others may use beside a measurement
_UNITS = {"change": "\n[dim]ms[/]", "cold": "\n[dim]s[/]", "memory": "\n[dim]MB[/]"}
_BAR = 0.8


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
    samples: dict[str, list[Sample]] = field(default_factory=lambda: defaultdict(list))
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
    return [row(item, system) for item in measured for system in systems if system in item.samples | item.reasons]


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


def shown(document: Mapping[str, Any], width: int = WIDTH) -> Group:
    """Machine and versions, the table, and what its numbers in brackets stand for; lines of at most so many columns."""
    facts, widest = document["machine"], min(width, WIDTH)
    where = f"{facts['threads']} threads of {facts['cores']} cores, {facts['memory_gib']} GiB, load {facts['load']}"
    about = f"{document['base']} ({document['precision']}) on {facts.get('gpu', facts['cpu'])}, {where}"
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    rows = [row for row in document["rows"] if row["kind"] != "training"]  # it stands below: no system of these trains
    measured = {row["system"] for row in rows if row["reason"] is None}
    systems = [system for system in document["systems"] if system in measured]
    table = Table(box=box.HORIZONTALS, show_edge=False, pad_edge=False, padding=(0, 1))
    table.add_column("tokens/s\n[dim]ratio, spread[/]", min_width=18)
    for system in systems:
        table.add_column(SYSTEMS.get(system, escape(system)), justify="right")
    reasons: dict[str, int] = {}
    previous = ""
    for item in document["workloads"]:
        found = {row["system"]: row for row in rows if row["workload"] == item["name"] and row["system"] in measured}
        if not found:
            continue
        if previous in DECODING and item["kind"] not in DECODING:
            table.add_section()
        previous = item["kind"]
        cells = [_cell(found[system], reasons) if system in found else "" for system in systems]
        table.add_row(escape(item["title"]) + _UNITS.get(item["kind"], ""), *cells)

    below = [f"({number}) {reason}" for reason, number in reasons.items()]
    for system in document["systems"]:
        why = dict.fromkeys(row["reason"] for row in rows if row["system"] == system)
        if why and system not in (*measured, TRAINER):
            below.append(f"{system}: {'; '.join(why)}")
    below += _training(document)
    above = [*wrap(about, widest), *wrap(versions, widest), ""]
    return Group(*map(Text, above), *([table] if table.row_count else []), *map(Text, below))


def noise(document: Mapping[str, Any]) -> str:
    """A warning where the figures differ too much between repeats to be figures; empty where they do not."""
    wide = [row for row in document["rows"] if row["spread"] is not None and row["spread"] > BUSY]
    others = document["machine"].get("others", 0.0)
    busy = f"others used {others:.0%} of the processor meanwhile" if others > IDLE else ""
    if not wide:
        return busy
    worst = max(wide, key=lambda row: float(row["spread"]))
    return (
        f"{len(wide)} of {len(document['rows'])} figures spread by more than {BUSY:.0%} between their repeats "
        f"({worst['system']} on {worst['workload']}: {worst['spread']:.0%}) and are not to be relied on; "
        + (busy or "the machine may be busy with something else, or short of memory")
    )


def _cell(row: Mapping[str, Any], reasons: dict[str, int]) -> str:
    """A figure over its ratio and spread, or the number of a reason; a new one goes to the `reasons`."""
    if row["reason"] is not None:
        return f"[dim]({reasons.setdefault(row['reason'], len(reasons) + 1)})[/]"
    ratio = "" if row["ratio_to_base"] is None else f"{row['ratio_to_base']:.2f} "
    repeated = f"±{row['spread'] * 100:.0f}%" if row["repeats"] > 1 else ""
    return f"{_value(row)}\n[dim]{ratio}{'noise' if row['spread'] > 1 else repeated}[/]"


def _value(row: Mapping[str, Any]) -> str:
    if row["kind"] in ("change", "cold"):
        return f"{row['seconds'] * (1000 if row['kind'] == 'change' else 1):.2f}"
    value = float(row["megabytes"] or row["tokens_per_s"])
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _training(document: Mapping[str, Any]) -> list[str]:
    """A line for each training workload: what it is compared with is no column of the table."""
    lines, trained = [], [row for row in document["rows"] if row["kind"] == "training" and row["tokens_per_s"]]
    for item in document["workloads"]:
        speeds = {row["system"]: row for row in trained if row["workload"] == item["name"]}
        told = [f"{_name(system)} {_value(row)} tokens/s" for system, row in speeds.items()]
        if "ours" in speeds and TRAINER in speeds:
            told = [f"{told[0]}, {speeds['ours']['ratio']:.2f} times {_name(TRAINER)} ({_value(speeds[TRAINER])})"]
        lines += [f"{item['title']}: {text}" for text in told]
    return lines


def _name(system: str) -> str:
    return SYSTEMS.get(system, system).replace("\n", " ")


def draw(document: Mapping[str, Any], path: Path) -> None:
    """The ratios as bars, a group for each workload, the base alone at 1: a PNG, or whatever the suffix says.

    Raises:
        PlotError: there is nothing to draw, or the file can't be written.
    """
    rows = [row for row in document["rows"] if row["kind"] in DECODING and row["ratio_to_base"]]
    if not rows:
        raise PlotError("there are no ratios to draw", next_step="Measure the base and a decoding workload")
    names = list(dict.fromkeys(row["workload"] for row in rows))
    systems = list(dict.fromkeys(row["system"] for row in rows if row["system"] != "base"))
    figure, axes = canvas().subplots(figsize=(9, 1.4 + 0.16 * len(names) * (len(systems) + 1)), layout="constrained")
    thickness = _BAR / max(len(systems), 1)
    for number, system in enumerate(systems):
        own = [row for row in rows if row["system"] == system]
        at = [names.index(row["workload"]) + (number + 0.5) * thickness for row in own]
        ratios = [row["ratio_to_base"] for row in own]
        # The whiskers hold the middle half of the repeats.
        reach = [row["ratio_to_base"] * min(row["spread"] / 2, 1.0) for row in own]
        bars = axes.barh(at, ratios, xerr=reach, ecolor="gray", height=thickness, label=_name(system))
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.axvline(1.0, color="black", linewidth=0.8)
    titles = {item["name"]: item["title"] for item in document["workloads"]}
    axes.set_yticks([i + _BAR / 2 for i in range(len(names))], [titles[name] for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("speed, the base alone = 1")
    title = f"{document['base']} ({document['precision']}); whiskers: the middle half of the repeats"
    axes.set_title("\n".join([title, *wrap(noise(document), 90)]), fontsize=9)
    figure.legend(loc="outside lower center", ncols=3)
    save(figure, path)
