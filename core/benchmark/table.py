"""The results as one table for a terminal of 100 columns (workloads down, systems across), and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lora_rt.core.base.picture import PlotError, canvas, save
from lora_rt.core.benchmark.results import TRAINER
from lora_rt.core.benchmark.workloads import SYSTEMS

Row = Mapping[str, Any]

WIDTH = 100

BUSY = 0.25
"""A spread (half of the middle of the repeats, relative to their median) beyond which a row is noise."""

IDLE = 0.15
"""The share of the processor that others may use beside a measurement."""

_UNITS = {"change": "ms", "cold": "s", "memory": "MB", "training": "tokens/s"}
_DECODING = ("decode", "prefill")
_BAR = 0.8


def shown(document: Mapping[str, Any], width: int = WIDTH) -> Group:
    """Machine and versions, the table, and what its numbers in brackets stand for; lines of at most so many columns."""
    reasons: list[str] = []
    cells = {(row["workload"], row["system"]): row for row in document["rows"]}
    systems = _columns(document)
    table = Table(box=box.HORIZONTALS, show_edge=False, pad_edge=False, padding=(0, 1))
    table.add_column("tokens/s\n[dim]ratio, spread[/]", min_width=18)
    for system in systems:
        table.add_column(SYSTEMS.get(system, escape(system)), justify="right")
    previous = ""
    for item in document["workloads"]:
        found = [cells.get((item["name"], system)) for system in systems]
        if item["kind"] == "training" or not any(found):
            continue
        if previous in _DECODING and item["kind"] not in _DECODING:
            table.add_section()
        previous = item["kind"]
        table.add_row(_title(item), *(_cell(row, reasons) for row in found))
    lines: list[RenderableType] = [Text(line) for line in _machine(document, min(width, WIDTH))]
    lines += [table] if table.row_count else []
    lines += [Text(f"({number}) {reason}") for number, reason in enumerate(reasons, 1)]
    lines += [Text(line) for line in _absent(document["rows"], systems)]
    return Group(*lines, *_training(document))


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


def _columns(document: Mapping[str, Any]) -> list[str]:
    """The systems that have a number in the table; training stands below it."""
    found = {row["system"] for row in document["rows"] if row["kind"] != "training" and row["reason"] is None}
    return [system for system in document["systems"] if system in found]


def _absent(rows: Sequence[Row], systems: Sequence[str]) -> list[str]:
    """A line for each system without a column, where all that kept it out is one and the same reason."""
    why: dict[str, set[str]] = {}
    for row in rows:
        if row["system"] not in (*systems, TRAINER) and row["kind"] != "training":
            why.setdefault(row["system"], set()).add(row["reason"])
    return [f"{system}: {reasons.pop()}" for system, reasons in why.items() if len(reasons) == 1]


def _machine(document: Mapping[str, Any], width: int) -> list[str]:
    facts = document["machine"]
    device = facts.get("gpu", facts["cpu"])
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    cores = f"{facts['threads']} threads of {facts['cores']} cores"
    where = f"{device}, {cores}, {facts['memory_gib']} GiB, load {facts['load']}"
    about = f"{document['base']} ({document['precision']}) on {where}", versions
    return [line for text in about for line in wrap(text, width)] + [""]


def _title(item: Mapping[str, Any]) -> str:
    unit = _UNITS.get(item["kind"])
    return escape(item["title"]) + (f"\n[dim]{unit}[/]" if unit else "")


def _cell(row: Row | None, reasons: list[str]) -> str:
    if row is None:
        return ""
    if row["reason"] is not None:
        if row["reason"] not in reasons:
            reasons.append(row["reason"])
        return f"[dim]({reasons.index(row['reason']) + 1})[/]"
    ratio = "" if row["ratio_to_base"] is None else f"{row['ratio_to_base']:.2f} "
    repeated = f"±{row['spread'] * 100:.0f}%" if row["repeats"] > 1 else ""
    if row["spread"] > 1:
        repeated = "noise"
    return f"{_value(row)}\n[dim]{ratio}{repeated}[/]"


def _value(row: Row) -> str:
    if row["kind"] == "change":
        return f"{row['seconds'] * 1000:.2f}"
    if row["kind"] == "cold":
        return f"{row['seconds']:.2f}"
    value = float(row["megabytes"] or row["tokens_per_s"])
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _training(document: Mapping[str, Any]) -> list[Text]:
    """A line for each training workload: what it is compared with is no column of the table."""
    lines = []
    for item in document["workloads"]:
        found = [row for row in document["rows"] if row["workload"] == item["name"] and row["kind"] == "training"]
        speeds = {row["system"]: row for row in found if row["tokens_per_s"]}
        told = [f"{_name(system)} {_value(row)} tokens/s" for system, row in speeds.items()]
        if "ours" in speeds and TRAINER in speeds:
            told = [f"{told[0]}, {speeds['ours']['ratio']:.2f} times {_name(TRAINER)} ({_value(speeds[TRAINER])})"]
        lines += [Text(f"{item['title']}: {text}") for text in told]
    return lines


def _name(system: str) -> str:
    return SYSTEMS.get(system, system).replace("\n", " ")


def draw(document: Mapping[str, Any], path: Path) -> None:
    """The ratios as bars, a group for each workload, the base alone at 1: a PNG, or whatever the suffix says.

    Raises:
        PlotError: there is nothing to draw, or the file can't be written.
    """
    ratios = {(row["workload"], row["system"]): row["ratio_to_base"] for row in document["rows"]}
    items = [w for w in document["workloads"] if w["kind"] in ("decode", "prefill") and _any(ratios, w["name"])]
    if not items:
        raise PlotError("there are no ratios to draw", next_step="Measure the base and a decoding workload")
    spreads = {(row["workload"], row["system"]): row["spread"] or 0.0 for row in document["rows"]}
    systems = list(dict.fromkeys(system for (_, system), value in ratios.items() if value and system != "base"))
    figure, axes = canvas().subplots(figsize=(9, 1.4 + 0.16 * len(items) * (len(systems) + 1)), layout="constrained")
    thickness = _BAR / max(len(systems), 1)
    for number, system in enumerate(systems):
        # (where it stands, ratio, half of the spread: the whiskers hold the middle half of the repeats)
        places = [
            (i + (number + 0.5) * thickness, ratios.get((w["name"], system)), spreads.get((w["name"], system), 0.0) / 2)
            for i, w in enumerate(items)
        ]
        there = [(place, value, value * min(half, 1.0)) for place, value, half in places if value]
        label = SYSTEMS.get(system, system).replace("\n", " ")
        at, values, reach = ([item[k] for item in there] for k in range(3))
        bars = axes.barh(at, values, xerr=reach, ecolor="gray", height=thickness, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks([i + _BAR / 2 for i in range(len(items))], [w["title"] for w in items])
    axes.invert_yaxis()
    axes.set_xlabel("speed, the base alone = 1")
    title = f"{document['base']} ({document['precision']}); whiskers: the middle half of the repeats"
    axes.set_title("\n".join([title, *wrap(noise(document), 90)]), fontsize=9)
    figure.legend(loc="outside lower center", ncols=3)
    save(figure, path)


def _any(ratios: Mapping[tuple[str, str], float | None], workload: str) -> bool:
    return any(value for (name, _), value in ratios.items() if name == workload)
