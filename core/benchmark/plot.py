"""The ratios as a picture: a group of bars for each workload, the base alone at 1."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_rt.core.base.picture import PlotError, canvas, save
from lora_rt.core.benchmark.table import noise
from lora_rt.core.benchmark.workloads import SYSTEMS

_BAR = 0.8


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Write a PNG (or whatever the suffix says).

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
    axes.set_title("\n".join([title, *textwrap.wrap(noise(document), 90)]), fontsize=9)
    figure.legend(loc="outside lower center", ncols=3)
    save(figure, path)


def _any(ratios: Mapping[tuple[str, str], float | None], workload: str) -> bool:
    return any(value for (name, _), value in ratios.items() if name == workload)
