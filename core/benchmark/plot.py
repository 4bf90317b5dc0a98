"""The ratios as a picture: a group of bars for each workload, the base alone at 1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_rt.core.benchmark.table import HEADS
from lora_rt.core.evaluation.plot import PlotError, canvas, save

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
    systems = list(dict.fromkeys(system for (_, system), value in ratios.items() if value and system != "base"))
    figure, axes = canvas().subplots(figsize=(9, 1.4 + 0.16 * len(items) * (len(systems) + 1)), layout="constrained")
    thickness = _BAR / max(len(systems), 1)
    for number, system in enumerate(systems):
        places = [(i + (number + 0.5) * thickness, ratios.get((w["name"], system))) for i, w in enumerate(items)]
        there = [(place, value) for place, value in places if value]
        label = HEADS.get(system, system).replace("\n", " ")
        bars = axes.barh([p for p, _ in there], [v for _, v in there], height=thickness, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks([i + _BAR / 2 for i in range(len(items))], [w["title"] for w in items])
    axes.invert_yaxis()
    axes.set_xlabel("speed, the base alone = 1")
    axes.set_title(f"{document['base']} ({document['precision']})")
    figure.legend(loc="outside lower center", ncols=3)
    save(figure, path)


def _any(ratios: Mapping[tuple[str, str], float | None], workload: str) -> bool:
    return any(value for (name, _), value in ratios.items() if name == workload)
